"""Stored weights: layout, prefixes, and a content hash that sees what a subnet reads and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.bundle import stored_shapes
from hydradeploy.errors import InputError
from hydradeploy.exporter.precision import PRECISIONS
from hydradeploy.exporter.weights import (
    HeadDigests,
    convert,
    layout,
    map_weights,
    stored_tensors,
    write_weights,
)
from tests.conftest import geometry, supernet

FP32, FP16 = PRECISIONS["fp32"], PRECISIONS["fp16"]
SHAPE = geometry(heads=4, trained_heads=(1, 2, 3, 4), head_dim=4, depth=1)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in supernet(SHAPE, seed).state_dict().items()}


def contents(tensors: dict[str, np.ndarray], largest: int = 4) -> list[str]:
    digests = HeadDigests(SHAPE, largest)
    for name, tensor in stored_tensors(tensors, SHAPE).items():
        digests.update(name, tensor)
    return [digests.content(k) for k in range(1, largest + 1)]


def test_stored_blocks_are_the_subnets_own_tensors():
    full = supernet(SHAPE)
    stored = stored_tensors({name: tensor.numpy() for name, tensor in full.state_dict().items()}, SHAPE)
    for k in SHAPE.trained_heads:
        plain = full.subnet(k)
        own = stored_tensors({n: t.numpy() for n, t in plain.state_dict().items()}, plain.geometry)
        shapes = stored_shapes(SHAPE.subnet(k))
        assert shapes.keys() == own.keys() == stored.keys()
        for name, shape in shapes.items():
            assert np.array_equal(stored[name][tuple(slice(s) for s in shape)], own[name])


def test_the_file_holds_each_tensor_once_on_pages_and_maps_back(tmp_path):
    table, end = layout(stored_shapes(SHAPE.subnet(4)), FP32)
    stored = stored_tensors(arrays(), SHAPE)
    record = write_weights(tmp_path / "w", table, stored.items())
    assert record.size_bytes == end == (tmp_path / "w").stat().st_size
    assert all(entry.offset % 4096 == 0 for entry in table.values())
    ends = [entry.offset + int(np.prod(entry.shape)) * 4 for entry in table.values()]
    starts = [entry.offset for entry in table.values()]
    assert all(before <= after for before, after in zip(ends, starts[1:], strict=False))
    for name, tensor in map_weights(tmp_path / "w", table).items():
        assert np.array_equal(tensor, stored[name])


def test_a_value_beyond_half_precision_is_refused_by_name():
    with pytest.raises(InputError, match=r"head\.bias holds 70000"):
        convert("head.bias", np.array([1.0, -70000.0], np.float32), FP16)
    assert convert("head.bias", np.array([65504.0], np.float32), FP16)[0] == 65504


def test_content_does_not_depend_on_the_largest_subnet_exported():
    assert contents(arrays(), 2) == contents(arrays())[:2]


def test_equal_weights_have_equal_content_and_others_do_not():
    assert contents(arrays(0)) == contents(arrays(0))
    assert not set(contents(arrays(0))) & set(contents(arrays(1)))


@given(name=st.sampled_from(sorted(SHAPE.shapes())), at=st.integers(0, 10**6))
def test_one_changed_weight_changes_just_the_subnets_that_read_it(name, at):
    before, tensors = contents(arrays()), arrays()
    flat = tensors[name].reshape(-1)
    flat[at % flat.size] += 1
    after = contents(tensors)
    stored, changed = stored_tensors(arrays(), SHAPE), stored_tensors(tensors, SHAPE)
    for k in SHAPE.trained_heads:
        reads = any(
            not np.array_equal(*(side[n][tuple(slice(s) for s in shape)] for side in (stored, changed)))
            for n, shape in stored_shapes(SHAPE.subnet(k)).items()
        )
        assert (before[k - 1] != after[k - 1]) == reads


def test_content_includes_its_context():
    digests = HeadDigests(SHAPE, 4)
    for name, tensor in stored_tensors(arrays(), SHAPE).items():
        digests.update(name, tensor)
    assert (
        len({digests.content(4), digests.content(4, b"a"), digests.content(4, b"a", b"b"), digests.content(4, b"ab")})
        == 4
    )
