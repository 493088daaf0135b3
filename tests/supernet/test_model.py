"""The supernet: every head count is the plain ViT its leading weights form."""

from __future__ import annotations

import threading
from itertools import pairwise

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hydradeploy.errors import UsageError
from hydradeploy.supernet.model import Supernet
from tests.conftest import deit_b_geometry, geometry, supernet

KINDS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@st.composite
def geometries(draw):
    """Small geometries of any proportions."""
    patch, heads = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    return geometry(
        image_size=patch * draw(st.integers(1, 4)),
        patch_size=patch,
        channels=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 16)),
        heads=heads,
        trained_heads=tuple(range(1, heads + 1)),
        depth=draw(st.integers(1, 3)),
        mlp_ratio=float(draw(st.integers(1, 4))),
        classes=draw(st.integers(1, 12)),
        eps=draw(st.sampled_from((1e-6, 1e-5))),
        classifiers=draw(st.sampled_from(("shared", "separate"))),
    )


def separated(model):
    """A supernet of the same logits: each subnet has the columns of the one classifier that it reads as its own."""
    shape = msgspec.structs.replace(model.geometry, classifiers="separate")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    for subnet in shape.subnets():
        state[f"head.{subnet.name}.weight"] = model.head.weight[:, : subnet.width]
        state[f"head.{subnet.name}.bias"] = model.head.bias
    apart = Supernet(shape).eval()
    apart.load_state_dict(state)
    return apart


def images(shape, count=2, seed=1):
    """Normalised images for a geometry."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, shape.channels, shape.image_size, shape.image_size, generator=generator)


def reference(weights, shape, heads):
    """A ViT of PyTorch's own encoder layers that answers images with logits."""
    width = shape.head_dim * heads
    layers = []
    for i in range(shape.depth):
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            round(shape.mlp_ratio * width),
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=shape.eps,
            batch_first=True,
            norm_first=True,
        )
        names = {
            "norm1": "norm1",
            "norm2": "norm2",
            "self_attn.out_proj": "attn.proj",
            "linear1": "mlp.fc1",
            "linear2": "mlp.fc2",
        }
        state = {
            f"{theirs}.{part}": weights[f"blocks.{i}.{ours}.{part}"]
            for theirs, ours in names.items()
            for part in ("weight", "bias")
        }
        state["self_attn.in_proj_weight"] = weights[f"blocks.{i}.attn.qkv.weight"]
        state["self_attn.in_proj_bias"] = weights[f"blocks.{i}.attn.qkv.bias"]
        layer.load_state_dict(state)
        layers.append(layer)

    def answer(batch):
        size, side = shape.patch_size, shape.image_size // shape.patch_size
        cells = batch.reshape(len(batch), shape.channels, side, size, side, size)
        flat = cells.permute(0, 2, 4, 1, 3, 5).reshape(len(batch), side * side, -1)
        x = flat @ weights["patch_embed.proj.weight"].reshape(width, -1).T + weights["patch_embed.proj.bias"]
        x = torch.cat([weights["cls_token"].repeat(len(batch), 1, 1), x], 1) + weights["pos_embed"]
        for layer in layers:
            x = layer(x)
        x = nn.functional.layer_norm(x, (width,), weights["norm.weight"], weights["norm.bias"], shape.eps)
        return x[:, 0] @ weights["head.weight"].T + weights["head.bias"]

    return answer


@settings(max_examples=25)
@given(geometries())
def test_every_head_count_gives_the_bits_of_the_plain_vit_cut_out_of_it(shape):
    model, batch = supernet(shape), images(shape)
    with torch.inference_mode():
        for heads in shape.trained_heads:
            assert torch.equal(model(batch, heads), model.subnet(heads)(batch))


@settings(max_examples=25)
@given(geometries())
def test_separate_classifiers_with_the_shared_ones_columns_give_its_bits(shape):
    model, batch = supernet(msgspec.structs.replace(shape, classifiers="shared")), images(shape)
    apart = separated(model)
    with torch.inference_mode():
        for heads in shape.trained_heads:
            assert torch.equal(apart(batch, heads), model(batch, heads))
        assert torch.equal(apart(batch), model(batch))


def test_a_subnet_is_answered_by_its_own_classifier_and_by_no_other():
    model = supernet(geometry(classifiers="separate"))
    batch = images(model.geometry)
    with torch.inference_mode():
        before = {heads: model(batch, heads) for heads in model.geometry.trained_heads}
        model.head["h03"].bias += 1
        for heads, answer in before.items():
            if heads == 3:
                torch.testing.assert_close(model(batch, heads), answer + 1)
            else:
                assert torch.equal(model(batch, heads), answer)


@pytest.mark.parametrize("heads", range(3, 13))
def test_at_deit_b_width_every_head_count_gives_the_bits_of_the_plain_vit(deit_b, heads):
    batch = images(deit_b.geometry, count=1)
    with torch.inference_mode():
        nested = deit_b(batch, heads)
        assert nested.shape == (1, 1000)
        assert torch.equal(nested, deit_b.subnet(heads)(batch))


@pytest.fixture(scope="module")
def deit_b():
    """A supernet of DeiT-B's width, two blocks deep."""
    return supernet(deit_b_geometry(depth=2))


@settings(max_examples=25)
@given(geometries())
def test_every_head_count_computes_what_pytorchs_encoder_layers_compute(shape):
    model, batch = supernet(shape), images(shape)
    with torch.no_grad():
        for heads in shape.trained_heads:
            expected = reference(model.subnet(heads).state_dict(), shape, heads)(batch)
            assert torch.allclose(model(batch, heads), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_head_counts_differ_in_what_they_compute():
    model = supernet()
    batch = images(model.geometry)
    with torch.no_grad():
        answers = [model(batch, heads) for heads in model.geometry.trained_heads]
    assert not any(torch.allclose(one, other, rtol=0.01) for one, other in pairwise(answers))


def test_all_heads_are_the_default():
    model = supernet()
    batch = images(model.geometry)
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch, 6))


def test_threads_running_different_head_counts_of_one_model_get_the_serial_answers():
    model = supernet()
    batch = images(model.geometry, count=4)
    with torch.inference_mode():
        serial = {heads: model(batch, heads) for heads in model.geometry.trained_heads}
    wrong, ran, barrier = [], [], threading.Barrier(len(serial))

    def work(heads):
        barrier.wait()
        with torch.inference_mode():
            for _ in range(20):
                ran.append(heads)
                if not torch.equal(model(batch, heads), serial[heads]):
                    wrong.append(heads)

    threads = [threading.Thread(target=work, args=(heads,)) for heads in serial]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ran) == 20 * len(serial)
    assert wrong == []


def test_forward_changes_no_state():
    model = supernet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for heads in model.geometry.trained_heads:
        model(images(model.geometry), heads)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not model.training


def test_a_cut_subnet_shares_no_memory_with_its_supernet():
    model = supernet()
    plain = model.subnet(3)
    owned = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in owned for tensor in plain.parameters())


def test_weights_outside_the_sampled_heads_get_a_gradient_of_zero():
    model = supernet()
    model(images(model.geometry), 2).sum().backward()
    inside = model.geometry.subnet(2).shapes
    for name, tensor in model.named_parameters():
        assert tensor.grad is not None, name
        if ".attn.qkv." in name:
            sampled = torch.zeros(3, 48, dtype=torch.bool)
            sampled[:, :16] = True
            outside = tensor.grad[~sampled.reshape(-1)]
        else:
            outside = tensor.grad.clone()
            outside[tuple(slice(size) for size in inside[name])] = 0
        assert not outside.any(), name


@settings(max_examples=15)
@given(geometries(), st.data())
def test_gradients_of_a_head_count_are_those_of_the_plain_vit(shape, data):
    heads = data.draw(st.sampled_from(shape.trained_heads))
    model, batch = supernet(shape), images(shape)
    plain = model.subnet(heads)
    model(batch, heads).square().sum().backward()
    plain(batch).square().sum().backward()
    for name, tensor in plain.named_parameters():
        whole = dict(model.named_parameters())[shape.subnet(heads).source(name)].grad
        if ".attn.qkv." in name:
            part = len(tensor) // 3
            whole = torch.cat([third[:part] for third in whole.chunk(3)])
        block = whole[tuple(slice(size) for size in tensor.shape)]
        scale = float(tensor.grad.abs().max())
        assert torch.allclose(block, tensor.grad, rtol=1e-4, atol=1e-5 * scale + 1e-12), name


@pytest.mark.parametrize("heads", [0, 1, 7, -2])
def test_a_head_count_that_was_not_trained_is_refused(heads):
    model = supernet()
    with pytest.raises(UsageError, match="were not trained") as refused:
        model(images(model.geometry), heads)
    assert "2-6" in refused.value.hint
    with pytest.raises(UsageError, match="were not trained"):
        model.subnet(heads)


@pytest.mark.parametrize(("classifiers", "others"), [("shared", 8), ("separate", 16)])
def test_the_state_dict_has_the_geometrys_names_shapes_and_order(classifiers, others):
    shape = geometry(classifiers=classifiers)
    state = Supernet(shape).state_dict()
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == list(shape.shapes().items())
    blocks = {f"blocks.{i}.{kind}.{part}" for i in range(2) for kind in KINDS for part in ("weight", "bias")}
    assert blocks <= set(state)
    assert len(state) == len(blocks) + others


def test_initialising_is_the_same_under_the_same_generator_whatever_torchs_own_state():
    def initialised(seed):
        torch.rand(seed)
        return Supernet(geometry()).initialise(torch.Generator().manual_seed(seed)).state_dict()

    one, same, other = initialised(3), initialised(3), initialised(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pos_embed"], other["pos_embed"])


def test_initialising_gives_timms_distributions():
    state = Supernet(geometry(head_dim=64, depth=1)).initialise(torch.Generator().manual_seed(0)).state_dict()
    for name in ("pos_embed", "head.weight", *(f"blocks.0.{kind}.weight" for kind in KINDS if "norm" not in kind)):
        assert float(state[name].std()) == pytest.approx(0.02, rel=0.1), name
        assert abs(float(state[name].mean())) < 0.002, name
    assert all(not tensor.any() for name, tensor in state.items() if name.endswith(".bias"))
    norms = [tensor for name, tensor in state.items() if "norm" in name and name.endswith(".weight")]
    assert len(norms) == 3
    assert all(bool((tensor == 1).all()) for tensor in norms)


def test_separate_classifiers_begin_by_the_same_rule_and_differ():
    shape = geometry(head_dim=64, depth=1, classifiers="separate")
    state = Supernet(shape).initialise(torch.Generator().manual_seed(0)).state_dict()
    for subnet in shape.subnets():
        assert float(state[f"{subnet.classifier}.weight"].std()) == pytest.approx(0.02, rel=0.1)
        assert not state[f"{subnet.classifier}.bias"].any()
    assert not torch.equal(state["head.h03.weight"][:, :128], state["head.h02.weight"])
