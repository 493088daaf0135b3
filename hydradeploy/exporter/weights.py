"""The weights file: each tensor once, page-aligned, in forward order.

Rows are inputs, so the rows a subnet reads are the first ones: contiguous on disk, and the pages behind them are never
touched.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hydradeploy.bundle import FileRecord, StoredTensor
from hydradeploy.spec import Geometry, Subnet
from hydradeploy.stored import ITEM_BYTES, Dtype, Form, Tensor, stored

Array = NDArray[Any]

PAGE = 4096


def numpy_type(dtype: Dtype) -> np.dtype[Any]:
    """numpy's type of that name; bfloat16 is none of its own."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def united(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of both, those of each in its order; where both have one, that of `one`."""
    names, place = list(one), len(one)
    for name in reversed(other):
        if name in one:
            place = names.index(name)
        else:
            names.insert(place, name)
    both = other | one
    return {name: both[name] for name in names}


def layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, StoredTensor], int]:
    """Where each tensor goes in a weights file, and how long the file is."""
    table, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        table[name] = StoredTensor(dtype=dtype, shape=shape, offset=end)
        end += -(-prod(shape) * ITEM_BYTES[dtype] // PAGE) * PAGE
    return table, end


def write_weights(path: Path, table: Mapping[str, StoredTensor], tensors: Iterable[tuple[str, Array]]) -> FileRecord:
    """Write a weights file by its table and return what it is; `tensors` come converted, in the table's order."""
    sha, end = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for name, tensor in tensors:
            data = _bytes(block(tensor, table[name].shape))
            padding = bytes(-len(data) % PAGE)
            for piece in (data, padding):
                sha.update(piece)
                _write_all(file.fileno(), piece)
            end += len(data) + len(padding)
        os.fsync(file.fileno())
    return FileRecord(sha256=sha.hexdigest(), size_bytes=end)


def block(tensor: Array, shape: Sequence[int]) -> Array:
    """The leading block of that shape, contiguous."""
    return np.ascontiguousarray(tensor[tuple(slice(size) for size in shape)])


def map_weights(path: Path, table: Mapping[str, StoredTensor]) -> dict[str, Array]:
    """The tensors of a weights file, mapped read-only."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, there in table.items():
        piece = data[there.offset : there.offset + prod(there.shape) * ITEM_BYTES[there.dtype]]
        tensors[name] = piece.view(numpy_type(there.dtype)).reshape(there.shape)
    return tensors


class HeadDigests:
    """What each head adds to the weights of one form, hashed once.

    Subnet k's weights are those that heads 1 to k add, so k digests stand for all of them: the content of ten subnets
    is hashed in one pass over the largest, and does not depend on how large that is. A classifier that is a subnet's
    own is in a digest of its own.
    """

    def __init__(self, geometry: Geometry, heads: int, form: Form) -> None:
        self._subnets = [Subnet(geometry=geometry, heads=head) for head in range(1, heads + 1)]
        self._shapes = [stored(subnet, form) for subnet in self._subnets]
        self._digests = [hashlib.sha256() for _ in self._subnets]
        self._own = {
            subnet.classifier: hashlib.sha256() for subnet in self._subnets if geometry.classifiers == "separate"
        }

    def update(self, name: str, tensor: Array) -> None:
        """Take in one stored tensor, at least as large as the largest subnet's; one that the form does not read is left
        out."""
        if (own := self._own.get(name.rpartition(".")[0])) is not None:
            if any(name in shapes for shapes in self._shapes):
                own.update(name.encode() + b"\0")
                own.update(_bytes(np.ascontiguousarray(tensor)))
            return
        smaller: tuple[int, ...] = (0,) * tensor.ndim
        for shapes, digest in zip(self._shapes, self._digests, strict=True):
            if name not in shapes:
                return
            digest.update(name.encode() + b"\0")
            for piece in _added(tensor, smaller, shapes[name].shape):
                digest.update(_bytes(np.ascontiguousarray(piece)))
            smaller = shapes[name].shape

    def content(self, heads: int, *context: bytes) -> str:
        """SHA-256 of the weights of the first `heads` heads, and of `context`."""
        total = hashlib.sha256()
        own = self._own.get(self._subnets[heads - 1].classifier)
        digests = [*self._digests[:heads], *([] if own is None else [own])]
        for part in (*context, *(digest.digest() for digest in digests)):
            total.update(len(part).to_bytes(8, "little") + part)
        return total.hexdigest()


def _added(tensor: Array, smaller: Sequence[int], larger: Sequence[int]) -> Iterator[Array]:
    """The blocks of the leading `larger` block that are outside the leading `smaller` one, without overlap."""
    for axis in range(tensor.ndim):
        before = tuple(slice(size) for size in smaller[:axis])
        after = tuple(slice(size) for size in larger[axis + 1 :])
        piece = tensor[(*before, slice(smaller[axis], larger[axis]), *after)]
        if piece.size:
            yield piece


def _bytes(tensor: Array) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return tensor.reshape(-1).view(np.uint8).data


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
