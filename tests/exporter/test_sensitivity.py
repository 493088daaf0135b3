"""int8 simulated in torch, by hand and by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hydradeploy.errors import InputError, UsageError
from hydradeploy.exporter.calibration import calibrate
from hydradeploy.exporter.sensitivity import ranking, simulate
from hydradeploy.spec import Spec, Subnet, three
from hydradeploy.stored import layers
from hydradeploy.supernet.store import Weights
from tests.conftest import geometry, spec, supernet


def silent(what: str, done: int, total: int) -> None:
    pass


def weights(seed: int = 0, of: Spec | None = None) -> Weights:
    of = of or spec()
    return Weights(of, supernet(of.geometry, seed).state_dict())


def images(count: int, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype(np.float32)


def steps_of(found: Weights, subnet: Subnet) -> dict[str, float]:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    return calibrate(found, [subnet], pixels, "minmax", silent)[subnet.heads]


def integers(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] as integers of 64 levels and a scale per output."""
    scale = np.abs(matrix).max(1) / 64
    return np.rint(matrix / scale[:, None]).astype(np.int64), scale


def norm(x: np.ndarray, state: dict[str, torch.Tensor], name: str) -> np.ndarray:
    w, b = (state[f"{name}.{part}"].double().numpy() for part in ("weight", "bias"))
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * w[: x.shape[-1]] + (
        b[: x.shape[-1]]
    )


@torch.inference_mode()
def test_without_int8_it_is_the_plain_vit():
    found = weights()
    for subnet in (geometry().subnet(2), geometry().subnet(6)):
        shown = images(11)
        expected = found.plain(subnet)(torch.from_numpy(shown)).numpy()
        np.testing.assert_allclose(simulate(found, subnet, shown, (), None), expected, rtol=1e-4, atol=1e-5)


def features(found: Weights, subnet: Subnet, shown: np.ndarray) -> np.ndarray:
    """What the head is given, in float: (n, d)."""
    plain = found.plain(subnet)
    plain.head = torch.nn.Linear(subnet.width, subnet.width)
    plain.geometry = geometry(classes=subnet.width).alone(subnet.heads)
    with torch.no_grad():
        plain.head.weight.copy_(torch.eye(subnet.width))
        plain.head.bias.zero_()
        return plain(torch.from_numpy(shown)).double().numpy()


def test_a_static_head_is_the_integer_product_by_hand():
    found, subnet, shown, step = weights(), geometry().subnet(3), images(5), 0.02
    x = np.clip(np.rint(features(found, subnet, shown) / step), -128, 127)
    assert (x == 127).any()  # the step is small enough to cut off
    matrix = found.tensors["head.weight"].numpy()
    whole, scale = integers(matrix)
    expected = (x @ whole[:, :24].T) * step * scale + found.tensors["head.bias"].numpy()
    got = simulate(found, subnet, shown, ["head"], {"head": step})
    # Rounding may go the other way where a value is between two integers: one step of one input.
    np.testing.assert_allclose(got, expected, atol=step * np.abs(matrix).max() * 1.01)
    assert np.median(np.abs(got - expected)) < 1e-5
    # The scales are of the supernet's matrix, not of the columns that the subnet reads.
    _, own = integers(matrix[:, :24])
    assert not np.allclose(own, scale)


def test_a_dynamic_head_has_a_range_for_each_image_that_includes_zero():
    found, subnet, shown = weights(), geometry().subnet(3), images(5)
    found.tensors["norm.bias"].add_(1.7)  # so that some images have no negative input
    x = features(found, subnet, shown)
    whole, scale = integers(found.tensors["head.weight"].numpy())
    expected = []
    for row in x:
        least, most = min(row.min(), 0.0), max(row.max(), 0.0)
        step = (most - least) / 255
        zero = np.rint(-least / step)
        q = np.clip(np.rint(row / step) + zero, 0, 255)
        expected.append(((q - zero) @ whole[:, :24].T) * step * scale)
    got = simulate(found, subnet, shown, ["head"], None) - found.tensors["head.bias"].numpy()
    assert (x.min(1) > 0).any()
    assert (x.min(1) < 0).any()
    assert np.median(np.abs(got - expected)) < 1e-5
    np.testing.assert_allclose(got, expected, atol=0.05)


@pytest.mark.parametrize("static", [True, False])
def test_attention_of_a_lone_block_by_hand(static):
    of = spec(geometry(depth=1))
    found, subnet, shown = weights(of=of), of.geometry.subnet(3), images(4)
    state, d = found.plain(subnet).state_dict(), subnet.width
    with torch.no_grad():
        embedded = found.plain(subnet).patch_embed(torch.from_numpy(shown), d).double().numpy()
    token = np.broadcast_to(state["cls_token"].numpy(), (len(shown), 1, d))
    x = np.concatenate([token, embedded], 1) + state["pos_embed"].numpy()
    y = norm(x, state, "blocks.0.norm1")
    layer = "blocks.0.attn.qkv"
    steps = {layer: 0.03} if static else None

    def rounded(values: np.ndarray) -> np.ndarray:
        if static:
            return np.clip(np.rint(values / 0.03), -128, 127) * 0.03
        least, most = min(values.min(), 0.0), max(values.max(), 0.0)
        step = (most - least) / 255
        zero = np.rint(-least / step)
        return (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step

    full = three(found.tensors[f"{layer}.weight"].numpy())
    wq, wk, wv = ((whole * scale[:, None])[:d, :d] for whole, scale in map(integers, full))
    bq, bk, bv = three(found.tensors[f"{layer}.bias"].numpy())[:, :d]
    tokens = []
    for i in range(len(shown)):
        # The last block's query is of the class token, with a range of its own.
        q = (rounded(y[i, :1]) @ wq.T + bq).reshape(-1, 3, 8).transpose(1, 0, 2)
        k = (rounded(y[i]) @ wk.T + bk).reshape(-1, 3, 8).transpose(1, 2, 0)
        v = (rounded(y[i]) @ wv.T + bv).reshape(-1, 3, 8).transpose(1, 0, 2)
        scores = np.exp(q @ k / np.sqrt(8))
        tokens.append((scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(1, d))
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    x = x[:, :1] + np.stack(tokens) @ w["blocks.0.attn.proj.weight"].T + w["blocks.0.attn.proj.bias"]
    y = norm(x, state, "blocks.0.norm2") @ w["blocks.0.mlp.fc1.weight"].T + w["blocks.0.mlp.fc1.bias"]
    y = torch.nn.functional.gelu(torch.from_numpy(y)).numpy()
    x = x + y @ w["blocks.0.mlp.fc2.weight"].T + w["blocks.0.mlp.fc2.bias"]
    expected = (norm(x, state, "norm") @ w["head.weight"].T + w["head.bias"])[:, 0]
    got = simulate(found, subnet, shown, [layer], steps)
    unquantised = simulate(found, subnet, shown, [], None)
    # float32 may round a value the other way; that is far less than what int8 changes.
    assert np.abs(got - expected).mean() < 0.02 * np.abs(unquantised - expected).mean()


def test_an_images_logits_do_not_depend_on_its_neighbours():
    found, subnet, shown = weights(), geometry().subnet(4), images(10)
    shown[3] *= 50
    together = simulate(found, subnet, shown, layers(geometry()), None)
    alone = np.concatenate([simulate(found, subnet, shown[i : i + 1], layers(geometry()), None) for i in range(10)])
    # A value between two integers may be rounded the other way, which moves logits by a little.
    assert np.abs(together - alone).max() < 0.02 * np.abs(alone).max()


def harmful(layer: str, source: str) -> Weights:
    """Weights where a channel of one layer's input dwarfs the others, and no weight of the layer reads it."""
    found = weights(seed=2)
    found.tensors[f"{source}.bias"][5] = 400.0
    found.tensors[f"{layer}.weight"][:, 5] = 0.0
    return found


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("blocks.1.attn.qkv", "blocks.1.norm1"),
        ("blocks.1.mlp.fc1", "blocks.1.norm2"),
        ("blocks.0.mlp.fc2", "blocks.0.mlp.fc1"),
        ("head", "norm"),
    ],
)
def test_the_layer_with_an_outlier_channel_in_its_input_is_found_first(layer, source, static):
    found, subnet = harmful(layer, source), geometry().subnet(4)
    steps = steps_of(found, subnet) if static else None
    ranked = ranking(found, subnet, images(10), steps, silent)
    assert ranked[0] == layer
    assert sorted(ranked) == sorted(layers(geometry()))
    assert ranking(weights(seed=2), subnet, images(10), None, silent)[0] == "blocks.0.attn.qkv"


@pytest.mark.parametrize("static", [True, False])
def test_the_order_is_that_of_each_layer_simulated_alone(static):
    found, subnet, shown = weights(seed=3), geometry().subnet(5), images(19)
    steps = steps_of(found, subnet) if static else None
    plain = simulate(found, subnet, shown, (), None).astype(np.float64)
    harm = {}
    for layer in layers(geometry()):
        changed = simulate(found, subnet, shown, [layer], steps)
        harm[layer] = (((changed - plain) ** 2).sum(1) / (plain**2).sum(1)).mean()
    assert len(set(harm.values())) == len(harm)
    assert ranking(found, subnet, shown, steps, silent) == tuple(sorted(harm, key=lambda layer: -harm[layer]))


def test_progress_goes_from_no_layer_to_all():
    heard: list[tuple[str, int, int]] = []
    ranking(weights(), geometry().subnet(2), images(1), None, lambda *what: heard.append(what))
    assert heard == [("ranking layers", done, 9) for done in range(10)]


def test_an_all_zero_input_stays_zero_with_either_kind_of_range():
    found, subnet = weights(), geometry().subnet(2)
    for name in ("norm.weight", "norm.bias"):
        found.tensors[name].zero_()
    for steps in (None, {"head": 1.0}):
        got = simulate(found, subnet, images(2), ["head"], steps)
        np.testing.assert_array_equal(got, np.tile(found.tensors["head.bias"].numpy(), (2, 1)))


def test_other_images_are_refused_with_both_shapes():
    expected = r"expected float32 of shape \(n, 3, 32, 32\), n at least 1"
    with pytest.raises(InputError, match=rf"float32 of shape \(2, 3, 16, 16\), {expected}"):
        simulate(weights(), geometry().subnet(2), images(2, size=16), (), None)
    with pytest.raises(InputError, match=rf"float32 of shape \(0, 3, 32, 32\), {expected}"):
        ranking(weights(), geometry().subnet(2), images(0), None, silent)


def test_a_layer_that_is_not_there_or_has_no_step_is_refused():
    with pytest.raises(UsageError, match=r"no layer 'blocks\.0\.attn\.q'") as refused:
        simulate(weights(), geometry().subnet(2), images(1), ["blocks.0.attn.q"], None)
    assert "blocks.0.attn.qkv" in str(refused.value.hint)
    with pytest.raises(UsageError, match=r"layer blocks\.0\.attn\.proj has no quantisation step"):
        ranking(weights(), geometry().subnet(2), images(1), {"blocks.0.attn.qkv": 0.1}, silent)


def test_logits_that_are_not_finite_cannot_be_ranked_and_name_the_head_count():
    found = weights()
    found.tensors["head.bias"][0] = float("inf")
    with pytest.raises(InputError, match=r"h02 \(2 heads\) has NaN or infinite logits"):
        ranking(found, geometry().subnet(2), images(1), None, silent)
