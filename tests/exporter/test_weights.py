"""The weights file: layout, and a content hash that sees what a subnet reads and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.exporter.source import Source
from hydradeploy.exporter.weights import HeadDigests, block, layout, map_weights, numpy_type, united, write_weights
from hydradeploy.spec import Geometry
from hydradeploy.stored import ITEM_BYTES, Form, Tensor, layers, stored
from tests.conftest import geometry, spec, supernet

SHAPE = geometry(heads=4, trained_heads=(1, 2, 3, 4), head_dim=4, depth=1)
SEPARATE = geometry(heads=4, trained_heads=(1, 2, 3, 4), head_dim=4, depth=1, classifiers="separate")
FORMS = {
    "fp32": Form(dtype="float32"),
    "fp16, pixels": Form(dtype="float16", input="uint8"),
    "bf16": Form(dtype="bfloat16"),
    "int8": Form(dtype="float32", int8=layers(SHAPE)),
    "int8 but for two layers": Form(dtype="float32", int8=layers(SHAPE)[1:-1]),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def arrays(seed: int = 0, shape: Geometry = SHAPE) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in supernet(shape, seed).state_dict().items()}


def full(tensors: Mapping[str, np.ndarray], form: Form, shape: Geometry = SHAPE) -> dict[str, np.ndarray]:
    """Everything that any subnet reads, at full width."""
    source = Source(tensors, shape, spec(shape).preprocessing)
    names = {name: t.dtype for subnet in shape.subnets() for name, t in stored(subnet, form).items()}
    return dict(source.tensors(names))


def contents(tensors: Mapping[str, np.ndarray], form: Form, largest: int = 4, shape: Geometry = SHAPE) -> list[str]:
    digests = HeadDigests(shape, largest, form)
    for name, tensor in full(tensors, form, shape).items():
        digests.update(name, tensor)
    return [digests.content(k) for k in range(1, largest + 1)]


@every_form
def test_the_file_holds_each_tensor_once_on_pages_and_maps_back(tmp_path, form):
    tensors = stored(SHAPE.subnet(4), form)
    table, end = layout(tensors)
    expected = full(arrays(), form)
    record = write_weights(tmp_path / "w", table, expected.items())
    assert record.size_bytes == end == (tmp_path / "w").stat().st_size
    assert all(entry.offset % 4096 == 0 for entry in table.values())
    ends = [entry.offset + int(np.prod(entry.shape)) * ITEM_BYTES[entry.dtype] for entry in table.values()]
    starts = [entry.offset for entry in table.values()]
    assert all(before <= after for before, after in zip(ends, starts[1:], strict=False))
    mapped = map_weights(tmp_path / "w", table)
    assert list(mapped) == list(tensors)
    for name, tensor in mapped.items():
        assert tensor.dtype == numpy_type(tensors[name].dtype)
        assert np.array_equal(tensor, expected[name])


def test_only_what_is_int8_takes_a_byte_and_the_rest_of_such_a_file_is_float32():
    tensors = stored(SHAPE.subnet(4), FORMS["int8"])
    int8 = {name for name, tensor in tensors.items() if tensor.dtype == "int8"}
    assert int8 == {
        f"blocks.0.{part}.int8" for part in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    } | {"head.int8"}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in int8} == {"float32"}


@every_form
@pytest.mark.parametrize("shape", [SHAPE, SEPARATE], ids=["shared", "separate"])
def test_content_does_not_depend_on_the_largest_subnet_exported(form, shape):
    assert contents(arrays(0, shape), form, 2, shape) == contents(arrays(0, shape), form, 4, shape)[:2]


@every_form
def test_equal_weights_have_equal_content_and_others_do_not(form):
    assert contents(arrays(0), form) == contents(arrays(0), form)
    assert not set(contents(arrays(0), form)) & set(contents(arrays(1), form))


@given(
    shape=st.sampled_from([SHAPE, SEPARATE]),
    data=st.data(),
    at=st.integers(0, 10**6),
    form=st.sampled_from(list(FORMS)),
)
def test_one_changed_weight_changes_just_the_subnets_that_read_it(shape, data, at, form):
    of, name = FORMS[form], data.draw(st.sampled_from(sorted(shape.shapes())))
    before, tensors = contents(arrays(0, shape), of, 4, shape), arrays(0, shape)
    flat = tensors[name].reshape(-1)
    flat[at % flat.size] += 1
    after = contents(tensors, of, 4, shape)
    unchanged, changed = full(arrays(0, shape), of, shape), full(tensors, of, shape)
    for k in shape.trained_heads:
        reads = any(
            not np.array_equal(*(block(side[n], tensor.shape) for side in (unchanged, changed)))
            for n, tensor in stored(shape.subnet(k), of).items()
        )
        assert (before[k - 1] != after[k - 1]) == reads


ANY_FORM = st.builds(
    Form,
    dtype=st.just("float32"),
    input=st.sampled_from(["float32", "uint8"]),
    int8=st.sets(st.sampled_from(layers(SHAPE))).map(tuple),
)


@given(st.lists(ANY_FORM, min_size=1, max_size=4), st.sampled_from([SHAPE, SEPARATE]))
def test_forms_that_share_a_file_have_their_tensors_in_their_own_order(forms, shape):
    """So that content, which is hashed in that order, does not depend on the others in the file."""
    together: dict[str, Tensor] = {}
    wanted = [stored(shape.subnet(heads), form) for form in forms for heads in (4, 2)]
    for one in wanted:
        together = united(together, one)
    for one in wanted:
        assert [name for name in together if name in one] == list(one)
    assert set(together) == {name for one in wanted for name in one}


@every_form
def test_each_subnets_own_classifier_is_in_its_content_and_in_no_others(form):
    before, tensors = contents(arrays(0, SEPARATE), form, 4, SEPARATE), arrays(0, SEPARATE)
    for k in SEPARATE.trained_heads:
        tensors[f"head.h0{k}.bias"] += 1
        after = contents(tensors, form, 4, SEPARATE)
        assert [one == other for one, other in zip(before, after, strict=True)] == [n != k for n in (1, 2, 3, 4)]
        before = after


def test_content_includes_its_context():
    digests = HeadDigests(SHAPE, 4, FORMS["fp32"])
    for name, tensor in full(arrays(), FORMS["fp32"]).items():
        digests.update(name, tensor)
    contexts = ([], [b"a"], [b"a", b"b"], [b"ab"])
    assert len({digests.content(4, *context) for context in contexts}) == 4
