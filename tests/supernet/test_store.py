"""Supernet files: round trips, damage, headers, tensors that do not fit, and placing a smaller ViT."""

from __future__ import annotations

import json
import os

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file

from hydradeploy.errors import EnvironmentFailed, HydraError, InputError, IntegrityError, UsageError
from hydradeploy.supernet.store import HEADER, Header, load, place, save
from tests.conftest import geometry, spec, supernet, write_supernet

TINY = {"head_dim": 2, "heads": 2, "trained_heads": (1, 2), "depth": 1, "classes": 2}


def state(shape=None, seed=0):
    """A state dict of random weights."""
    return dict(supernet(shape, seed).state_dict())


def write(path, header, tensors=None):
    """A safetensors file with any header entry."""
    metadata = {"format": "pt"} if header is None else {HEADER: header}
    save_file(state() if tensors is None else tensors, path, metadata)
    return path


def header(**changes):
    """A supernet file's header entry with top-level fields changed."""
    return json.dumps(msgspec.to_builtins(Header(schema=1, spec=spec())) | changes)


def images(shape, count=2):
    """Normalised images for a geometry."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, shape.channels, shape.image_size, shape.image_size, generator=generator)


def test_what_was_saved_is_loaded_with_its_spec_and_class_names(tmp_path):
    written = msgspec.structs.replace(spec(crop_pct=0.9), class_names=tuple(f"Klasse {i} é" for i in range(10)))
    save(tmp_path / "s.safetensors", written, state())
    loaded = load(tmp_path / "s.safetensors")
    assert loaded.spec == written
    assert set(loaded.tensors) == set(state())
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in state().items())
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_a_supernet_file_is_safetensors_under_timms_names_in_fp32(tmp_path):
    from safetensors import safe_open

    with safe_open(write_supernet(tmp_path / "s.safetensors"), framework="np") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        kinds = {file.get_tensor(name).dtype.name for name in shapes}
    assert shapes == geometry().shapes()
    assert kinds == {"float32"}


def test_the_same_weights_give_the_same_bytes(tmp_path):
    assert len({write_supernet(tmp_path / str(i)).read_bytes() for i in range(6)}) == 1


def test_saving_makes_the_directory(tmp_path):
    save(tmp_path / "new" / "s.safetensors", spec(), state())
    assert load(tmp_path / "new" / "s.safetensors").spec == spec()


def test_saving_takes_tensors_in_any_order_layout_and_gradient_mode(tmp_path):
    tensors = {name: state()[name] for name in reversed(list(state()))}
    tensors["head.weight"] = tensors["head.weight"].T.contiguous().T.requires_grad_()
    save(tmp_path / "s", spec(), tensors)
    assert torch.equal(load(tmp_path / "s").tensors["head.weight"], state()["head.weight"])


def test_saving_takes_tensors_that_share_memory(tmp_path):
    tensors = state()
    tensors["norm.weight"] = tensors["blocks.0.norm1.weight"]
    save(tmp_path / "s", spec(), tensors)
    assert torch.equal(load(tmp_path / "s").tensors["norm.weight"], state()["blocks.0.norm1.weight"])


def test_a_loaded_model_answers_as_the_one_saved(supernet_file):
    weights, batch = load(supernet_file), images(geometry())
    with torch.inference_mode():
        for heads in geometry().trained_heads:
            expected = supernet()(batch, heads)
            assert torch.equal(weights.model()(batch, heads), expected)
            assert torch.equal(weights.plain(weights.spec.geometry.subnet(heads))(batch), expected)


def test_changing_a_loaded_model_does_not_change_the_loaded_weights(supernet_file):
    weights = load(supernet_file)
    with torch.no_grad():
        for model in (weights.model(), weights.plain(weights.spec.geometry.subnet(6))):
            for tensor in model.parameters():
                tensor.zero_()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in state().items())


def test_no_file_is_a_usage_error_that_says_how_to_get_one(tmp_path):
    with pytest.raises(UsageError, match="no such file") as refused:
        load(tmp_path / "absent")
    assert "hydradeploy import" in refused.value.hint


def test_a_truncated_file_is_an_integrity_error_that_names_it(tmp_path, supernet_file):
    data, path = supernet_file.read_bytes(), tmp_path / "cut.safetensors"
    cuts = {0, 1, 7, 8, 9, 10, 100, len(data) - 1, len(data) - 4, *range(0, len(data), len(data) // 60)}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(IntegrityError) as refused:
            load(path)
        assert str(path) in refused.value.message, cut


@settings(max_examples=60)
@given(st.dictionaries(st.integers(0, 1200), st.integers(0, 255), min_size=1, max_size=4))
def test_a_file_with_damaged_bytes_loads_or_is_refused_by_name(tmp_path, tiny_file, changes):
    damaged = bytearray(tiny_file.read_bytes())
    for at, value in changes.items():
        damaged[at] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        loaded = load(path)
    except HydraError as refused:
        assert isinstance(refused, IntegrityError | InputError)  # noqa: PT017
        assert str(path) in refused.message  # noqa: PT017
    else:
        assert set(loaded.tensors) == set(loaded.spec.geometry.shapes())


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A supernet file of two heads."""
    return write_supernet(tmp_path_factory.mktemp("tiny") / "s", geometry(**TINY))


def test_a_safetensors_file_without_a_spec_is_refused_with_the_command_that_imports_it(tmp_path):
    with pytest.raises(InputError, match="holds no spec") as refused:
        load(write(tmp_path / "plain.safetensors", None))
    assert f"hydradeploy import {tmp_path / 'plain.safetensors'}" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (header(colour=1), "colour"),
        (header(spec={}), "$.spec"),
        (header(spec=3), "$.spec"),
        (header().replace('"heads": 6', '"heads": "6"'), "$.spec.geometry.heads"),
        (header().replace('"heads": 6', '"heads": 0'), "heads must be at least 1"),
        (header().replace('"depth": 2', '"depth": 2, "stem": 1'), "stem"),
        (header().replace("bicubic", "cubic"), "$.spec.preprocessing.interpolation"),
        (header(schema=2), "schema 2, this version reads 1"),
        (header(schema="1"), "$.schema"),
        (header(schema=None), "$.schema"),
        ("{}", "schema"),
        ("[]", "Expected `object`"),
        ("1", "Expected `object`"),
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "Expected `object`"),
        ('{"schema": ' + "9" * 5000 + "}", "$.schema"),
    ],
    ids=lambda value: value[-20:],
)
def test_a_header_that_is_not_ours_is_refused_with_file_and_place(tmp_path, text, named):
    path = write(tmp_path / "s.safetensors", text)
    with pytest.raises(IntegrityError) as refused:
        load(path)
    assert str(path) in refused.value.message
    assert named in refused.value.message


def test_a_newer_schema_is_refused_with_the_hint_to_upgrade(tmp_path):
    with pytest.raises(IntegrityError) as refused:
        load(write(tmp_path / "s", header(schema=2)))
    assert "upgrade" in refused.value.hint


NOT_FINITE = [
    {0: float("nan")},
    {0: float("inf")},
    {-1: float("-inf")},
    {0: float("inf"), 1: float("-inf")},
    {3: float("nan"), 4: float("inf")},
]


@pytest.mark.parametrize("values", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", ["cls_token", "blocks.1.attn.qkv.weight", "head.bias"])
@pytest.mark.parametrize("when", ["saving", "loading"])
def test_values_that_are_not_finite_are_refused_with_the_tensors_name(tmp_path, when, name, values):
    tensors = state()
    for index, value in values.items():
        tensors[name].reshape(-1)[index] = value
    path = tmp_path / "s"
    if when == "loading":
        write(path, header(), tensors)
    with pytest.raises(InputError, match=f"tensor {name} holds NaN or infinite values") as refused:
        load(path) if when == "loading" else save(path, spec(), tensors)
    assert str(path) in refused.value.message


def test_large_finite_values_are_no_reason_to_refuse(tmp_path):
    tensors = state()
    tensors["head.weight"].fill_(3e38)
    save(tmp_path / "s", spec(), tensors)
    assert torch.equal(load(tmp_path / "s").tensors["head.weight"], tensors["head.weight"])


def test_values_that_are_too_large_for_fp32_are_refused_rather_than_saved_as_infinite(tmp_path):
    tensors = state() | {"head.bias": torch.full((10,), 1e300, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"head\.bias"):
        save(tmp_path / "s", spec(), tensors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["saving", "loading"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cls_token", (1, 2, 48)),
        ("pos_embed", (17, 48)),
        ("patch_embed.proj.weight", (48, 3, 8, 4)),
        ("blocks.0.attn.qkv.weight", (48, 144)),
        ("blocks.1.mlp.fc1.bias", (191,)),
        ("head.weight", (11, 48)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path, when, name, shape):
    tensors = state() | {name: torch.zeros(shape)}
    if when == "loading":
        write(tmp_path / "s", header(), tensors)
    with pytest.raises(InputError) as refused:
        load(tmp_path / "s") if when == "loading" else save(tmp_path / "s", spec(), tensors)
    expected = geometry().shapes()[name]
    assert refused.value.message == f"{tmp_path / 's'}: tensor {name} has shape {shape}, expected {expected}"


@pytest.mark.parametrize("name", list(geometry().shapes()))
def test_a_missing_tensor_is_refused_with_its_name_and_shape(tmp_path, name):
    tensors = state()
    del tensors[name]
    with pytest.raises(InputError) as refused:
        load(write(tmp_path / "s", header(), tensors))
    assert f"tensor {name} is missing" in refused.value.message
    assert str(geometry().shapes()[name]) in refused.value.message


@pytest.mark.parametrize(
    "name", ["dist_token", "blocks.0.ls1.gamma", "blocks.2.norm1.weight", "reg_token", "norm.extra"]
)
def test_a_tensor_too_many_is_refused_with_its_name_and_shape(tmp_path, name):
    with pytest.raises(InputError, match=name) as refused:
        load(write(tmp_path / "s", header(), state() | {name: torch.zeros(4, 5)}))
    assert "(4, 5)" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(tmp_path, kind):
    tensors = state() | {"head.bias": torch.ones(10, dtype=kind)}
    with pytest.raises(InputError, match=r"tensor head\.bias is .* expected floating point"):
        save(tmp_path / "s", spec(), tensors)


def test_a_refused_save_keeps_the_old_file(tmp_path):
    path = write_supernet(tmp_path / "s")
    before = path.read_bytes()
    with pytest.raises(InputError):
        save(path, spec(), state() | {"head.bias": torch.full((10,), float("nan"))})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def test_a_save_that_fails_on_the_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_supernet(tmp_path / "s")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFailed, match="no space left on device while writing") as failed:
        save(path, spec(), state(seed=1))
    assert "free some space" in failed.value.hint
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def test_a_save_under_a_file_is_an_environment_failure(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(EnvironmentFailed, match="writing"):
        save(tmp_path / "file" / "s", spec(), state())


@settings(max_examples=25)
@given(
    st.integers(1, 5).flatmap(lambda heads: st.tuples(st.just(heads), st.integers(1, heads))),
    st.integers(1, 8),
    st.integers(1, 2),
    st.integers(1, 3),
)
def test_the_supernet_equals_a_placed_vit_at_its_heads_bit_for_bit(heads, head_dim, depth, ratio):
    total, few = heads
    big = geometry(
        head_dim=head_dim, heads=total, trained_heads=tuple(range(1, total + 1)), depth=depth, mlp_ratio=float(ratio)
    )
    model, small = supernet(big), supernet(big.alone(few), seed=1)
    place(model, small.state_dict(), small.geometry)
    batch = images(big)
    with torch.inference_mode():
        assert torch.equal(model(batch, few), small(batch))


@pytest.mark.parametrize("small", ["shared", "separate"])
def test_separate_classifiers_of_the_placed_head_counts_are_the_small_ones_and_the_others_stay(small):
    """The small one was trained with 1, 2 and 4 heads, the supernet with 2 to 6."""
    model = supernet(geometry(classifiers="separate"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = supernet(geometry(heads=4, trained_heads=(1, 2, 4), classifiers=small), seed=1)
    place(model, one.state_dict(), one.geometry)
    batch = images(model.geometry)
    with torch.inference_mode():
        for heads in (2, 4):
            assert torch.equal(model(batch, heads), one(batch, heads))
    for name in (f"head.h0{heads}.{part}" for heads in (3, 5, 6) for part in ("weight", "bias")):
        assert torch.equal(model.state_dict()[name], before[name]), name


def test_separate_classifiers_have_no_place_in_a_supernet_that_shares_one():
    model = supernet()
    one = supernet(geometry(heads=2, trained_heads=(2,), classifiers="separate"), seed=1)
    with pytest.raises(InputError, match="the smaller ViT has separate classifiers, the supernet shares one"):
        place(model, one.state_dict(), one.geometry)
    assert all(torch.equal(tensor, state()[name]) for name, tensor in model.state_dict().items())


def test_a_supernet_file_with_separate_classifiers_comes_back_and_each_subnet_has_its_own(tmp_path):
    shape = geometry(classifiers="separate")
    loaded = load(write_supernet(tmp_path / "s", shape))
    assert loaded.spec.geometry == shape
    batch, model = images(shape), supernet(shape)
    with torch.inference_mode():
        for subnet in shape.subnets():
            plain = loaded.plain(subnet)
            assert plain.geometry.classifiers == "shared"
            assert torch.equal(plain(batch), model(batch, subnet.heads))
            assert torch.equal(loaded.model()(batch, subnet.heads), model(batch, subnet.heads))


@pytest.mark.parametrize("stored", ["shared", "separate"])
def test_classifiers_that_are_not_those_of_the_spec_are_refused(tmp_path, stored):
    asked = {"shared": "separate", "separate": "shared"}[stored]
    tensors = state(geometry(classifiers=stored))
    missing = {"separate": r"head\.h02\.weight", "shared": r"head\.weight"}[asked]
    with pytest.raises(InputError, match=f"tensor {missing} is missing"):
        save(tmp_path / "s", spec(geometry(classifiers=asked)), tensors)


def test_placing_leaves_the_rest_as_it_was():
    model, small = supernet(), supernet(geometry().alone(2), seed=1)
    place(model, small.state_dict(), small.geometry)
    before, after = state(), model.state_dict()
    for name, piece in small.state_dict().items():
        changed = torch.zeros(after[name].shape, dtype=torch.bool)
        if ".attn.qkv." in name:
            for third in range(3):
                changed[48 * third : 48 * third + 16, ...] = True
            if changed.ndim == 2:
                changed[:, 16:] = False
        else:
            changed[tuple(slice(size) for size in piece.shape)] = True
        assert torch.equal(after[name][~changed], before[name][~changed]), name
        assert torch.equal(after[name][changed], piece.reshape(-1)), name


@pytest.mark.parametrize(
    ("changes", "name", "shapes"),
    [
        ({"depth": 1}, "blocks.1.norm1.weight", ["(16,)"]),
        ({"depth": 3}, "blocks.2.norm1.weight", ["(16,)"]),
        ({"classes": 5}, "head.weight", ["(5, 16)", "(10, 16)"]),
        ({"image_size": 16}, "pos_embed", ["(1, 5, 16)", "(1, 17, 16)"]),
        ({"patch_size": 4, "image_size": 16}, "patch_embed.proj.weight", ["(16, 3, 4, 4)", "(16, 3, 8, 8)"]),
        ({"channels": 1}, "patch_embed.proj.weight", ["(16, 1, 8, 8)", "(16, 3, 8, 8)"]),
        ({"mlp_ratio": 2.0}, "blocks.0.mlp.fc1.weight", ["(32, 16)", "(64, 16)"]),
        ({"heads": 7, "trained_heads": (7,)}, "cls_token", ["(1, 1, 56)", "(1, 1, 48)"]),
    ],
    ids=str,
)
def test_a_vit_that_does_not_fit_is_refused_with_tensor_and_shapes_and_changes_nothing(changes, name, shapes):
    model = supernet()
    small = supernet(geometry(**({"heads": 2, "trained_heads": (2,)} | changes)), seed=1)
    with pytest.raises(InputError) as refused:
        place(model, small.state_dict(), small.geometry)
    assert f"tensor {name} " in refused.value.message
    assert all(shape in refused.value.message for shape in shapes)
    assert all(torch.equal(tensor, state()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"head_dim": 16, "heads": 1}, {"head_dim": 4, "heads": 4}, {"head_dim": 16}])
def test_a_vit_of_another_head_size_is_refused_with_both_sizes_even_where_the_widths_agree(changes):
    heads = changes.get("heads", 2)
    small = supernet(geometry(**({"heads": heads, "trained_heads": (heads,)} | changes)), seed=1)
    with pytest.raises(InputError) as refused:
        place(supernet(), small.state_dict(), small.geometry)
    assert f"head_dim {changes['head_dim']}" in refused.value.message
    assert "supernet 8" in refused.value.message


def test_a_vit_that_does_not_fit_its_own_geometry_is_refused():
    small = supernet(geometry().alone(2), seed=1).state_dict()
    with pytest.raises(InputError, match=r"tensor cls_token has shape \(1, 1, 16\), expected \(1, 1, 24\)"):
        place(supernet(), small, geometry().alone(3))


def test_a_vit_with_values_that_are_not_finite_is_not_placed():
    model, small = supernet(), supernet(geometry().alone(2), seed=1).state_dict()
    small["head.bias"][0] = float("nan")
    with pytest.raises(InputError, match=r"head\.bias holds NaN"):
        place(model, small, geometry().alone(2))
    assert all(torch.equal(tensor, state()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_supernet_file_in_another_float_type_loads_as_a_model_that_runs(tmp_path, kind):
    path = tmp_path / "s"
    path.write_bytes(to_safetensors({name: tensor.to(kind) for name, tensor in state().items()}, {HEADER: header()}))
    with torch.inference_mode():
        answer = load(path).model()(images(geometry()))
    assert torch.isfinite(answer).all()
