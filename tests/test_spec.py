"""Geometry, shapes, parameters, MACs, head lists and the leading block."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.errors import UsageError
from hydradeploy.spec import Preprocessing, Spec, leading, parse_heads, show_heads, three
from tests.conftest import deit_b_geometry, geometry, spec

DEIT_B = deit_b_geometry()
# heads, width, parameters, GMACs, MiB in fp32
TABLE = [
    (3, 192, 5717416, "1.254", "21.8"),
    (4, 256, 9982184, "2.136", "38.1"),
    (5, 320, 15426600, "3.251", "58.8"),
    (6, 384, 22050664, "4.599", "84.1"),
    (7, 448, 29854376, "6.179", "113.9"),
    (8, 512, 38837736, "7.991", "148.2"),
    (9, 576, 49000744, "10.036", "186.9"),
    (10, 640, 60343400, "12.313", "230.2"),
    (11, 704, 72865704, "14.822", "278.0"),
    (12, 768, 86567656, "17.564", "330.2"),
]
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@st.composite
def geometries(draw):
    """Small geometries of any proportions."""
    patch, grid, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return geometry(
        image_size=patch * grid,
        patch_size=patch,
        channels=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 8)),
        heads=heads,
        trained_heads=tuple(sorted(draw(st.sets(st.integers(1, heads), min_size=1)))),
        depth=draw(st.integers(1, 2)),
        mlp_ratio=float(draw(st.integers(1, 4))),
        classes=draw(st.integers(1, 6)),
        classifiers=draw(st.sampled_from(("shared", "separate"))),
    )


def prefix_rows(name, full, small):
    """The indices per axis of a subnet's tensor within the supernet's, written out."""
    axes = [list(range(size)) for size in small]
    if ".attn.qkv." in name:
        whole, part = full[0] // 3, small[0] // 3
        axes[0] = [i for start in (0, whole, 2 * whole) for i in range(start, start + part)]
    return np.ix_(*axes)


@pytest.mark.parametrize(("heads", "width", "parameters", "gmacs", "mib"), TABLE)
def test_deit_b_has_the_sizes_of_the_papers_subnets(heads, width, parameters, gmacs, mib):
    subnet = DEIT_B.subnet(heads)
    assert (subnet.width, subnet.mlp_width) == (width, 4 * width)
    assert subnet.parameters == parameters
    assert f"{subnet.macs / 1e9:.3f}" == gmacs
    assert f"{4 * subnet.parameters / 2**20:.1f}" == mib


def test_deit_b_has_152_tensors_under_timms_names():
    names = {"cls_token", "pos_embed"}
    names |= {f"{layer}.{part}" for layer in ("patch_embed.proj", "norm", "head") for part in ("weight", "bias")}
    names |= {f"blocks.{i}.{layer}.{part}" for i in range(12) for layer in BLOCK for part in ("weight", "bias")}
    assert len(names) == 152
    assert set(DEIT_B.shapes()) == names


def test_the_largest_subnet_has_the_supernets_shapes():
    assert DEIT_B.subnet(12).shapes == DEIT_B.shapes()


def test_a_deit_b_has_197_tokens():
    assert (DEIT_B.patches, DEIT_B.tokens) == (196, 197)


def test_subnets_are_named_by_their_heads_and_come_smallest_first():
    assert [subnet.name for subnet in DEIT_B.subnets()] == [f"h{heads:02d}" for heads in range(3, 13)]


@given(geometries())
def test_parameters_are_the_elements_of_all_shapes(shape):
    for subnet in shape.subnets():
        assert subnet.parameters == sum(math.prod(size) for size in subnet.shapes.values())


@given(geometries())
def test_macs_are_those_of_each_matrix_product(shape):
    for subnet in shape.subnets():
        n, d, h = shape.tokens, subnet.width, subnet.mlp_width
        per_block = [(n, d, 3 * d), *[(n, shape.head_dim, n), (n, n, shape.head_dim)] * subnet.heads]
        per_block += [(n, d, d), (n, d, h), (n, h, d)]
        products = [(shape.patches, shape.channels * shape.patch_size**2, d), *per_block * shape.depth]
        products += [(1, d, shape.classes)]
        assert subnet.macs == sum(math.prod(product) for product in products)


def test_separate_classifiers_are_each_as_wide_as_its_subnet_and_cost_a_subnet_nothing():
    separate = deit_b_geometry(classifiers="separate")
    shapes, shared = separate.shapes(), DEIT_B.shapes()
    own = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    assert own == {
        name: shape
        for heads in range(3, 13)
        for name, shape in ((f"head.h{heads:02d}.weight", (1000, 64 * heads)), (f"head.h{heads:02d}.bias", (1000,)))
    }
    assert {*shapes} - {*own} == {*shared} - {"head.weight", "head.bias"}
    for subnet in separate.subnets():
        plain = DEIT_B.subnet(subnet.heads)
        assert (subnet.parameters, subnet.macs, subnet.shapes) == (plain.parameters, plain.macs, plain.shapes)


def test_a_subnets_classifier_has_a_name_of_its_own_only_where_it_is_its_own():
    assert DEIT_B.subnet(3).classifier == "head"
    subnet = deit_b_geometry(classifiers="separate").subnet(3)
    assert subnet.classifier == "head.h03"
    assert [subnet.source(name) for name in ("head.weight", "head.bias")] == ["head.h03.weight", "head.h03.bias"]
    assert subnet.source("blocks.0.norm1.weight") == "blocks.0.norm1.weight"
    assert all(DEIT_B.subnet(3).source(name) == name for name in DEIT_B.shapes())


@given(geometries())
def test_every_tensor_of_a_subnet_has_its_source_in_the_supernet(shape):
    shapes = shape.shapes()
    read = set()
    for subnet in shape.subnets():
        for name, small in subnet.shapes.items():
            assert all(size <= whole for size, whole in zip(small, shapes[subnet.source(name)], strict=True))
            read.add(subnet.source(name))
    assert read == set(shapes)


@pytest.mark.parametrize("heads", [-1, 0, 1, 7, 100])
def test_a_head_count_that_was_not_trained_is_refused_and_the_hint_names_those_that_were(heads):
    with pytest.raises(UsageError, match=f"{heads} heads were not trained") as refused:
        geometry().subnet(heads)
    assert "2-6" in refused.value.hint


@pytest.mark.parametrize("classifiers", ["shared", "separate"])
def test_a_subnet_alone_is_a_plain_vit_of_its_heads(classifiers):
    alone = geometry(classifiers=classifiers).alone(3)
    assert (alone.heads, alone.trained_heads, alone.classifiers) == (3, (3,), "shared")
    assert alone.shapes() == geometry(classifiers=classifiers).subnet(3).shapes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (field, value)
            for field in ("image_size", "patch_size", "channels", "head_dim", "heads", "depth", "classes")
            for value in (0, -1)
        ],
        ("image_size", 33),
        ("patch_size", 5),
        ("mlp_ratio", 0.0),
        ("mlp_ratio", -4.0),
        ("mlp_ratio", 0.3),
        ("mlp_ratio", float("nan")),
        ("mlp_ratio", float("inf")),
        ("eps", 0.0),
        ("eps", 1.0),
        ("eps", -1e-6),
        ("eps", float("nan")),
        ("trained_heads", ()),
        ("trained_heads", (3, 2)),
        ("trained_heads", (2, 2)),
        ("trained_heads", (0, 1)),
        ("trained_heads", (5, 6, 7)),
    ],
)
def test_a_geometry_that_makes_no_sense_is_refused_by_the_fields_name(field, value):
    with pytest.raises(ValueError, match=field):
        geometry(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_pct", 0.0),
        ("crop_pct", -0.5),
        ("crop_pct", 1.01),
        ("crop_pct", float("nan")),
        ("mean", ()),
        ("mean", (0.5,)),
        ("mean", (0.5, float("nan"), 0.5)),
        ("mean", (0.5, float("inf"), 0.5)),
        ("std", (0.5, 0.5)),
        ("std", (0.5, 0.0, 0.5)),
        ("std", (0.5, -1.0, 0.5)),
        ("std", (0.5, float("nan"), 0.5)),
        ("std", (float("inf"), 0.5, 0.5)),
    ],
)
def test_a_preprocessing_that_makes_no_sense_is_refused_by_the_fields_name(field, value):
    with pytest.raises(ValueError, match=field):
        spec(**{field: value})


def test_mean_and_std_must_fit_the_channels():
    with pytest.raises(ValueError, match="mean has 3 values but the images have 1 channels"):
        Spec(geometry=geometry(channels=1), preprocessing=spec().preprocessing)


def test_class_names_must_fit_the_classes():
    with pytest.raises(ValueError, match="2 class_names for 10 classes"):
        Spec(geometry=geometry(), preprocessing=spec().preprocessing, class_names=("cat", "dog"))


@given(geometries())
def test_a_spec_on_disk_reads_back_as_it_was(shape):
    written = spec(shape)
    assert msgspec.json.decode(msgspec.json.encode(written), type=Spec) == written


def test_a_head_dim_that_is_no_power_of_two_takes_any_whole_hidden_width():
    for head_dim in range(1, 129):
        for per_head in (1, 3, 7, 2 * head_dim + 1, 4 * head_dim):
            shape = geometry(head_dim=head_dim, mlp_ratio=per_head / head_dim)
            assert [subnet.mlp_width for subnet in shape.subnets()] == [heads * per_head for heads in range(2, 7)]


def edited(path, value):
    """A spec as JSON with one value replaced or added; `path` is like "geometry.heads"."""
    document = msgspec.to_builtins(spec())
    *parents, last = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    place[last] = value
    return msgspec.json.encode(document)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("colour", 1, "colour"),
        ("geometry.register_tokens", 4, "register_tokens"),
        ("preprocessing.flip", True, "flip"),
        ("geometry.heads", "6", "$.geometry.heads"),
        ("geometry.heads", 6.5, "$.geometry.heads"),
        ("geometry.trained_heads", [2, "3"], "$.geometry.trained_heads[1]"),
        ("geometry.eps", None, "$.geometry.eps"),
        ("geometry.depth", 0, "$.geometry"),
        ("geometry.classifiers", "each", "$.geometry.classifiers"),
        ("preprocessing.mean", 0.5, "$.preprocessing.mean"),
        ("preprocessing.interpolation", "cubic", "$.preprocessing.interpolation"),
        ("class_names", [1, 2], "$.class_names[0]"),
    ],
)
def test_reading_is_strict_and_names_the_place(path, value, named):
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.json.decode(edited(path, value), type=Spec)
    assert named in str(refused.value)


def test_a_geometry_that_does_not_say_shares_one_classifier():
    document = msgspec.to_builtins(spec(geometry(classifiers="separate")))
    del document["geometry"]["classifiers"]
    assert msgspec.convert(document, Spec).geometry == geometry()


def test_a_missing_field_is_refused_by_its_name():
    with pytest.raises(msgspec.ValidationError, match="std"):
        msgspec.json.decode(b'{"mean": [0.5], "crop_pct": 1, "interpolation": "bicubic"}', type=Preprocessing)


@given(st.sets(st.integers(1, 4096), min_size=1, max_size=40))
def test_shown_heads_read_back_as_they_were(heads):
    assert parse_heads(show_heads(heads)) == tuple(sorted(heads))


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("3", (3,)),
        ("3,6,9-12", (3, 6, 9, 10, 11, 12)),
        (" 3 , 2 - 4 ", (2, 3, 4)),
        ("5,5,5-5", (5,)),
        ("12,3", (3, 12)),
    ],
)
def test_head_lists_are_read_in_any_order(text, heads):
    assert parse_heads(text) == heads


@pytest.mark.parametrize(
    ("heads", "text"), [((3,), "3"), ((3, 4), "3-4"), ((12, 3, 6, 11, 9, 10), "3,6,9-12"), (range(3, 13), "3-12")]
)
def test_heads_are_shown_as_the_shortest_text(heads, text):
    assert show_heads(heads) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ",", "3,", ",3", "3,,4", "a", "3-", "-3", "3--4", "3-4-5", "4-3", "0", "0-3", "1.5", "+3", "3 4"),
        *("1-4097", "1-99999999999", "9" * 5000),
    ],
)
def test_what_is_no_list_of_heads_is_refused_with_an_example(text):
    with pytest.raises(UsageError) as refused:
        parse_heads(text)
    assert "write for example" in refused.value.hint


@given(geometries())
def test_the_leading_block_is_what_written_out_indices_give(shape):
    for subnet in shape.subnets():
        for name, small in subnet.shapes.items():
            full = shape.shapes()[subnet.source(name)]
            tensor = np.arange(math.prod(full), dtype=np.float32).reshape(full)
            expected = tensor[prefix_rows(name, full, small)]
            assert np.array_equal(leading(tensor, name, small), expected)
            assert np.array_equal(leading(torch.from_numpy(tensor), name, small).numpy(), expected)


@given(geometries())
def test_the_leading_block_is_a_view_except_of_qkv(shape):
    for subnet in shape.subnets():
        for name, small in subnet.shapes.items():
            tensor = np.zeros(shape.shapes()[subnet.source(name)], np.float32)
            block = leading(tensor, name, small)
            if ".attn.qkv." not in name:
                assert np.shares_memory(block, tensor)


def test_the_three_parts_of_qkv_are_a_view_of_it():
    qkv = np.arange(24).reshape(12, 2)
    parts = three(qkv)
    assert np.shares_memory(parts, qkv)
    assert [part.tolist() for part in parts] == [qkv[:4].tolist(), qkv[4:8].tolist(), qkv[8:].tolist()]
