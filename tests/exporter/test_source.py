"""Stored tensors: what is computed before the first image is, and that prefixes of it are the subnets' own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as matrices_of

from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import InputError
from hydradeploy.exporter.source import LEVELS, Source, convert, quantised
from hydradeploy.exporter.weights import block
from hydradeploy.spec import Preprocessing, Spec, three
from hydradeploy.stored import Form, layers, stored
from tests.conftest import geometry, spec, supernet

SHAPE = geometry(heads=4, trained_heads=(1, 2, 3, 4), head_dim=4, depth=2)
FLOAT, PIXELS = Form(dtype="float32"), Form(dtype="float32", input="uint8")
INT8 = Form(dtype="float32", int8=layers(SHAPE))


def full(form: Form, of: Spec | None = None) -> dict[str, np.ndarray]:
    """Everything that any subnet reads, at full width."""
    of = of or spec(SHAPE)
    state = {name: tensor.numpy() for name, tensor in supernet(of.geometry).state_dict().items()}
    wanted = stored(of.geometry.subnet(of.geometry.heads), form)
    return dict(Source(state, of.geometry, of.preprocessing).tensors({n: t.dtype for n, t in wanted.items()}))


@pytest.mark.parametrize("form", [FLOAT, PIXELS], ids=["float32", "uint8"])
def test_stored_blocks_are_the_subnets_own_tensors(form):
    everything, model = full(form), supernet(SHAPE)
    for k in SHAPE.trained_heads:
        plain = model.subnet(k)
        own = Source(
            {name: tensor.numpy() for name, tensor in plain.state_dict().items()},
            plain.geometry,
            spec(SHAPE).preprocessing,
        )
        wanted = stored(SHAPE.subnet(k), form)
        assert everything.keys() == wanted.keys()
        for name, tensor in own.tensors({n: t.dtype for n, t in wanted.items()}):
            assert tensor.shape == wanted[name].shape
            assert np.array_equal(block(everything[name], tensor.shape), tensor), name


def test_matrices_are_in_by_out_q_is_scaled_and_k_has_no_bias():
    found, state = full(FLOAT), {n: t.numpy() for n, t in supernet(SHAPE).state_dict().items()}
    q, k, v = three(state["blocks.1.attn.qkv.weight"])
    assert np.array_equal(found["blocks.1.attn.q.weight"], q.T / 2)  # heads of 4: 4 ** -0.5
    assert np.array_equal(found["blocks.1.attn.k.weight"], k.T)
    assert np.array_equal(found["blocks.1.attn.v.weight"], v.T)
    assert np.array_equal(found["blocks.1.attn.q.bias"], three(state["blocks.1.attn.qkv.bias"])[0] / 2)
    assert not any(name.endswith("attn.k.bias") for name in found)
    assert np.array_equal(found["head.weight"], state["head.weight"].T)


@given(
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.05, 2)] * 3),
    seed=st.integers(0, 99),
)
def test_pixels_embed_as_their_normalised_images_do(mean, std, seed):
    """By the definition: patches of (pixel / 255 - mean) / std by the convolution, in float64."""
    preprocessing = Preprocessing(mean=mean, std=std, crop_pct=0.875, interpolation="bicubic")
    found = full(PIXELS, Spec(geometry=SHAPE, preprocessing=preprocessing))
    state = {n: t.numpy().astype(np.float64) for n, t in supernet(SHAPE).state_dict().items()}
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    pixels[0, :8] = 0
    pixels[0, 8:16] = 255

    def patches(image: np.ndarray) -> np.ndarray:
        """(s, s, c) to (patches, p, p, c)."""
        return image.reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 8, 8, 3)

    normalised = (pixels[0] / 255 - np.array(mean)) / np.array(std)
    kernel = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    expected = np.tensordot(patches(normalised), kernel, 3) + state["patch_embed.proj.bias"]
    expected += state["pos_embed"][0, 1:]
    centred = (patches(pixels[0]).astype(np.float32) - 128) / 256
    got = centred.reshape(16, -1) @ found["embed.uint8.weight"] + found["embed.uint8.patches"][0]
    scale = np.abs(expected).max() + np.abs(found["embed.uint8.patches"]).max()
    np.testing.assert_allclose(got, expected, atol=2e-6 * scale)
    # And `normalise`, which other inputs come from, has the same definition.
    np.testing.assert_allclose(
        normalise(pixels, preprocessing)[0].transpose(1, 2, 0), normalised, atol=1e-6 * np.abs(normalised).max()
    )


def test_int8_blocks_and_scales_are_prefixes_of_the_whole_matrix_quantised():
    found, plain = full(INT8), full(FLOAT)
    for k in SHAPE.trained_heads:
        for name, tensor in stored(SHAPE.subnet(k), INT8).items():
            if not name.endswith(".int8"):
                continue
            layer = name.removesuffix(".int8")
            values, scale = quantised(plain[f"{layer}.weight"])
            rows, columns = tensor.shape
            assert np.array_equal(block(found[name], tensor.shape), values[:rows, :columns])
            assert np.array_equal(block(found[f"{layer}.scale"], (columns,)), scale[:columns])


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@given(matrix=matrices_of(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=floats))
def test_every_int8_value_is_within_64_and_every_weight_within_half_a_step(matrix):
    values, scale = quantised(matrix)
    assert values.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == matrix.shape[1:]
    assert (scale > 0).all()
    assert np.abs(values.astype(int)).max() <= 64
    error = np.abs(matrix.astype(np.float64) - values * scale.astype(np.float64))
    largest = np.abs(matrix).max(0)
    lost = largest < 2.0**-120  # a step made from such a column would not be a normal number
    assert (error[:, ~lost] <= scale[~lost].astype(np.float64) * 0.50001).all()
    assert (np.abs(values.astype(int)).max(0)[~lost] == 64).all()
    assert (values[:, lost] == 0).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, 7e-37])
def test_a_column_of_nothing_has_a_harmless_scale(value):
    """Weights that decay end among the denormal numbers; a scale of 0 would turn them into anything."""
    matrix = np.array([[value, 1.0], [-value, 0.5]], np.float32)
    values, scale = quantised(matrix)
    assert values.tolist() == [[0, 64], [0, 32]]
    assert scale.tolist() == [1.0, 1 / 64]


def test_two_products_of_a_byte_and_the_largest_weight_fit_16_bits_and_with_one_level_more_they_would_not():
    assert 2 * 255 * LEVELS <= np.iinfo(np.int16).max < 2 * 255 * (LEVELS + 1)


def test_a_value_beyond_half_precision_is_refused_by_name():
    with pytest.raises(InputError, match=r"head\.bias holds 70000"):
        convert("head.bias", np.array([1.0, -70000.0], np.float32), "float16")
    assert convert("head.bias", np.array([65504.0], np.float32), "float16")[0] == 65504
    assert convert("head.bias", np.array([70000.0], np.float32), "bfloat16")[0] == 70144
