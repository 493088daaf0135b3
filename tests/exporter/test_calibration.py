"""Steps of activations: histograms that widen, where each method cuts off, and what a layer's input is."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import InputError, UsageError
from hydradeploy.exporter.calibration import BINS, METHODS, Entropy, Histogram, Maximum, Percentile, calibrate
from hydradeploy.stored import layers
from hydradeploy.supernet.store import Weights
from tests.conftest import geometry, spec, supernet

ARRAYS = st.lists(
    st.builds(
        lambda seed, count, exponent: np.float32(2.0**exponent) * np.random.default_rng(seed).normal(size=count),
        st.integers(0, 2**32),
        st.integers(1, 200),
        st.floats(-30, 30),
    ),
    min_size=1,
    max_size=6,
)


def silent(what: str, done: int, total: int) -> None:
    pass


def filled(kind: type[Maximum], *parts: np.ndarray) -> Maximum:
    seen = kind()
    for part in parts:
        seen.add(torch.from_numpy(np.asarray(part, np.float32)))
    return seen


def weights(seed: int = 0, **changes: torch.Tensor) -> Weights:
    tensors = supernet(seed=seed).state_dict()
    return Weights(spec(), {**tensors, **changes})


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@given(ARRAYS)
def test_a_widened_histogram_counts_as_one_that_was_wide_from_the_start(parts):
    seen = filled(Histogram, *parts)
    assert isinstance(seen, Histogram)
    magnitudes = np.abs(np.concatenate(parts).astype(np.float32)).astype(np.float64)
    top = seen.width * BINS
    assert top / 2 <= magnitudes.max() < top
    direct, _ = np.histogram(magnitudes, BINS, (0, top))
    assert np.array_equal(seen.counts, direct)
    assert seen.maximum == magnitudes.max()


@given(ARRAYS, st.randoms(use_true_random=False))
def test_the_order_of_batches_does_not_matter(parts, random):
    seen = filled(Histogram, *parts)
    random.shuffle(parts)
    again = filled(Histogram, *parts)
    assert isinstance(seen, Histogram)
    assert isinstance(again, Histogram)
    assert np.array_equal(seen.counts, again.counts)
    assert (seen.width, seen.maximum) == (again.width, again.maximum)


@given(st.integers(0, 2**32), st.integers(1, 50_000))
def test_a_percentile_gives_up_one_value_in_ten_thousand_to_a_bin(seed, count):
    values = np.random.default_rng(seed).standard_t(2, count).astype(np.float32)
    seen = filled(Percentile, values)
    assert isinstance(seen, Histogram)
    exact = np.sort(np.abs(values))[count - count // 10_000 - 1]
    assert exact <= seen.limit() <= min(exact + seen.width * (1 + 1e-6), np.abs(values).max())


def test_a_percentile_ignores_rare_outliers_and_keeps_a_large_channel():
    values = np.random.default_rng(0).normal(size=(200, 768)).astype(np.float32)
    rare = values.copy()
    rare[:10, 5] = 100
    assert filled(Percentile, rare).limit() < 6
    values[:, 5] = 100 + values[:, 5]
    assert filled(Percentile, values).limit() > 100


def divergence(counts: np.ndarray, cut: int) -> float:
    """KL divergence of 128 levels from the counts up to a cut, bin by bin."""
    p = counts[:cut].astype(np.float64)
    p[-1] += counts[cut:].sum()
    level = np.repeat(np.arange(128), [(i + 1) * cut // 128 - i * cut // 128 for i in range(128)])
    spread = np.bincount(level, counts[:cut]) / np.maximum(np.bincount(level, p > 0), 1)
    there = p > 0
    p, q = p[there] / p.sum(), spread[level][there] / counts[:cut].sum()
    return float((p * np.log(p / q)).sum()) if (q > 0).all() else np.inf


DRAWS = {
    "bell with outliers": lambda draw: np.concatenate([draw.normal(size=20_000), draw.laplace(size=500) * 8]),
    "heavy tails": lambda draw: draw.standard_t(2, size=20_000),
    "one side": lambda draw: draw.lognormal(size=20_000),
}


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("shape", DRAWS)
def test_entropy_cuts_where_the_divergence_computed_bin_by_bin_is_smallest(shape, seed):
    values = DRAWS[shape](np.random.default_rng(seed))
    seen = filled(Entropy, values)
    assert isinstance(seen, Histogram)
    last = int(np.flatnonzero(seen.counts)[-1]) + 1
    chosen = last if seen.limit() == seen.maximum else round(seen.limit() / seen.width)
    assert divergence(seen.counts, chosen) <= min(divergence(seen.counts, cut) for cut in range(128, last + 1)) + 1e-9


def test_entropy_cuts_off_a_far_outlier_and_no_even_spread():
    draw = np.random.default_rng(0)
    even = draw.uniform(-1, 1, 100_000)
    assert filled(Entropy, even).limit() > 0.98
    bell = np.append(draw.normal(size=100_000), 30.0)
    assert filled(Entropy, bell).limit() < 8


def test_entropy_of_a_histogram_takes_less_than_a_tenth_of_a_second():
    seen = filled(Entropy, np.append(np.random.default_rng(0).normal(size=100_000), 4.09))
    taken = []
    for _ in range(5):
        started = time.process_time()
        seen.limit()
        taken.append(time.process_time() - started)
    assert min(taken) < 0.1


@pytest.mark.parametrize("kind", [Maximum, Percentile, Entropy])
def test_values_all_alike_are_not_cut(kind):
    assert filled(kind, np.full(1000, -3.0)).limit() == 3.0
    assert filled(kind, np.zeros(10)).limit() == 0.0
    assert filled(kind, np.zeros(10), [2.0], np.zeros(10)).limit() == 2.0


def inputs(found: Weights, heads: int, images: np.ndarray) -> dict[str, torch.Tensor]:
    """What the layers of a subnet are given, written out: of the last block's all but qkv only the class token."""
    model = found.plain(found.spec.geometry.subnet(heads))
    state, g = model.state_dict(), model.geometry
    d, layer_norm, linear = g.head_dim * heads, torch.nn.functional.layer_norm, torch.nn.functional.linear
    x = model.patch_embed(torch.from_numpy(normalise(images, found.spec.preprocessing)), d)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    seen = {}
    for i in range(g.depth):
        at, last = f"blocks.{i}", i == g.depth - 1
        w = {name: state[f"{at}.{name}"] for name in (n.removeprefix(f"{at}.") for n in state if n.startswith(at))}
        y = seen[f"{at}.attn.qkv"] = layer_norm(x, (d,), w["norm1.weight"], w["norm1.bias"], g.eps)
        qkv = linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).reshape(len(x), -1, 3, heads, g.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) * g.head_dim**-0.5).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(len(x), -1, d)
        x = x + linear(mixed, w["attn.proj.weight"], w["attn.proj.bias"])
        y = layer_norm(x, (d,), w["norm2.weight"], w["norm2.bias"], g.eps)
        hidden = torch.nn.functional.gelu(linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
        for name, value in (("attn.proj", mixed), ("mlp.fc1", y), ("mlp.fc2", hidden)):
            seen[f"{at}.{name}"] = value[:, :1] if last else value
    seen["head"] = layer_norm(x[:, :1], (d,), state["norm.weight"], state["norm.bias"], g.eps)
    return seen


@torch.inference_mode()
def test_minmax_puts_the_largest_input_of_each_layer_on_127_and_ignores_patches_after_the_last_attention():
    found, images = weights(), pixels(11)
    subnets = [geometry().subnet(heads) for heads in (2, 5)]
    steps = calibrate(found, subnets, images, "minmax", silent)
    assert list(steps) == [2, 5]
    for heads, chosen in steps.items():
        expected = {layer: float(x.abs().max()) / 127 for layer, x in inputs(found, heads, images).items()}
        assert tuple(chosen) == layers(geometry())
        assert chosen == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("method", "kind"), [("percentile", Percentile), ("entropy", Entropy)])
def test_every_value_of_a_layers_input_is_counted_once(method, kind):
    found, images = weights(), pixels(9)
    steps = calibrate(found, [geometry().subnet(3)], images, method, silent)[3]
    for layer, x in inputs(found, 3, images).items():
        # Rounding may move a value into the next bin.
        assert steps[layer] == pytest.approx(filled(kind, x.numpy()).limit() / 127, rel=0.02)


@torch.inference_mode()
def test_images_are_shown_to_all_subnets_in_one_pass_which_is_reported():
    heard: list[tuple[str, int, int]] = []
    calibrate(weights(), geometry().subnets(), pixels(20), "minmax", lambda *what: heard.append(what))
    assert heard == [("calibrating", done, 20) for done in (0, 8, 16, 20)]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_only_given_zeros_has_a_step_above_zero(method):
    zero = {"norm.weight": torch.zeros(48), "norm.bias": torch.zeros(48)}
    steps = calibrate(weights(**zero), [geometry().subnet(2)], pixels(1), method, silent)[2]
    assert steps["head"] == 1.0
    assert min(steps.values()) > 0


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="'kl'") as refused:
        calibrate(weights(), [geometry().subnet(2)], pixels(1), "kl", silent)
    assert refused.value.hint == "one of minmax, percentile, entropy"


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (pixels(0), r"uint8 of shape \(0, 32, 32, 3\)"),
        (pixels(2)[:, :16], r"uint8 of shape \(2, 16, 32, 3\)"),
        (pixels(2)[0], r"uint8 of shape \(32, 32, 3\)"),
        (pixels(2).astype(np.float32), r"float32 of shape \(2, 32, 32, 3\)"),
    ],
)
def test_other_images_are_refused_with_both_shapes(images, shape):
    with pytest.raises(InputError, match=f"{shape}, expected uint8 of shape \\(n, 32, 32, 3\\), n at least 1"):
        calibrate(weights(), [geometry().subnet(2)], images, "minmax", silent)


@pytest.mark.parametrize("method", METHODS)
def test_an_input_that_is_not_finite_names_layer_and_head_count(method):
    bad = weights()
    bad.tensors["blocks.0.mlp.fc1.weight"][100, 17] = 3e38  # the first row and column beyond two heads
    bad.tensors["blocks.0.mlp.fc1.bias"][90] = 3e38
    bad.tensors["blocks.0.mlp.fc1.weight"][90, :24] = 3e38
    assert calibrate(bad, [geometry().subnet(2)], pixels(1), method, silent)
    with pytest.raises(InputError, match=r"layer blocks\.0\.mlp\.fc2 of h03 \(3 heads\)"):
        calibrate(bad, geometry().subnets(), pixels(1), method, silent)
