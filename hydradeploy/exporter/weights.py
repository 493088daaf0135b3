"""Weights as graphs want them: q, k and v apart, matrices as [in, out], every subnet a leading block.

The weights file holds each tensor once, page-aligned, in forward order. Rows are inputs, so the rows a subnet reads
are the first ones: contiguous on disk, and the pages behind them are never touched.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.bundle import FileRecord, StoredTensor, stored_shapes
from hydradeploy.errors import InputError
from hydradeploy.exporter.precision import Precision
from hydradeploy.spec import Geometry, Subnet, three

Array = NDArray[Any]

PAGE = 4096


def stored_tensors(tensors: Mapping[str, Array], geometry: Geometry) -> dict[str, Array]:
    """The stored names and the supernet's tensors in stored form, as views."""
    stored: dict[str, Array] = {}
    for name in geometry.shapes():
        tensor = tensors[name]
        if ".attn.qkv." in name:
            stored |= {name.replace("qkv", part): piece.T for part, piece in zip("qkv", three(tensor), strict=True)}
        else:
            stored[name] = tensor.T if tensor.ndim == 2 else tensor
    return stored


def convert(name: str, tensor: Array, precision: Precision) -> Array:
    """A contiguous copy in the precision's type; raises InputError where a value does not fit into it."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(tensor, dtype=np.dtype(precision.dtype))
    if precision.dtype == "float16" and not np.isfinite(converted).all():
        largest = float(np.abs(tensor).max())
        raise InputError(
            f"tensor {name} holds {largest:g}, more than {precision.name} can (65504)", hint="export it in fp32"
        )
    return converted


def layout(shapes: Mapping[str, Sequence[int]], precision: Precision) -> tuple[dict[str, StoredTensor], int]:
    """Where each tensor goes in a weights file, and how long the file is."""
    table, end = {}, 0
    for name, shape in shapes.items():
        table[name] = StoredTensor(dtype=precision.dtype, shape=tuple(shape), offset=end)
        size = int(np.prod(shape)) * np.dtype(precision.dtype).itemsize
        end += -(-size // PAGE) * PAGE
    return table, end


def write_weights(path: Path, table: Mapping[str, StoredTensor], tensors: Iterable[tuple[str, Array]]) -> FileRecord:
    """Write a weights file by its table and return what it is; `tensors` come converted, in the table's order."""
    sha, end = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for name, tensor in tensors:
            stored = table[name]
            block = np.ascontiguousarray(tensor[tuple(slice(size) for size in stored.shape)])
            data = _bytes(block)
            padding = bytes(-len(data) % PAGE)
            for piece in (data, padding):
                sha.update(piece)
                _write_all(file.fileno(), piece)
            end += len(data) + len(padding)
        os.fsync(file.fileno())
    return FileRecord(sha256=sha.hexdigest(), size_bytes=end)


def map_weights(path: Path, table: Mapping[str, StoredTensor]) -> dict[str, Array]:
    """The tensors of a weights file, mapped read-only."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, stored in table.items():
        size = int(np.prod(stored.shape)) * np.dtype(stored.dtype).itemsize
        piece = data[stored.offset : stored.offset + size]
        tensors[name] = piece.view(np.dtype(stored.dtype)).reshape(stored.shape)
    return tensors


class HeadDigests:
    """What each head adds to the weights, hashed once.

    Subnet k's weights are those that heads 1 to k add, so k digests stand for all of them: the content of ten subnets
    is hashed in one pass over the largest, and does not depend on how large that is.
    """

    def __init__(self, geometry: Geometry, heads: int) -> None:
        self._shapes = [stored_shapes(Subnet(geometry=geometry, heads=head)) for head in range(1, heads + 1)]
        self._digests = [hashlib.sha256() for _ in self._shapes]

    def update(self, name: str, tensor: Array) -> None:
        """Take in one stored tensor, at least as large as the largest subnet's."""
        smaller: tuple[int, ...] = (0,) * tensor.ndim
        for shapes, digest in zip(self._shapes, self._digests, strict=True):
            digest.update(name.encode() + b"\0")
            for block in _added(tensor, smaller, shapes[name]):
                digest.update(_bytes(np.ascontiguousarray(block)))
            smaller = shapes[name]

    def content(self, heads: int, *context: bytes) -> str:
        """SHA-256 of the weights of the first `heads` heads, and of `context`."""
        total = hashlib.sha256()
        for part in (*context, *(digest.digest() for digest in self._digests[:heads])):
            total.update(len(part).to_bytes(8, "little") + part)
        return total.hexdigest()


def _added(tensor: Array, smaller: Sequence[int], larger: Sequence[int]) -> Iterator[Array]:
    """The blocks of the leading `larger` block that are outside the leading `smaller` one, without overlap."""
    for axis in range(tensor.ndim):
        before = tuple(slice(size) for size in smaller[:axis])
        after = tuple(slice(size) for size in larger[axis + 1 :])
        block = tensor[(*before, slice(smaller[axis], larger[axis]), *after)]
        if block.size:
            yield block


def _bytes(tensor: Array) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return tensor.reshape(-1).view(np.uint8).data


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
