"""The name and operator of a node by its number: TensorRT before 10.0 says no more of the node it refuses.

Read from the protobuf wire format, as engines do without onnx: a message is a row of (field << 3 | kind, value), both
numbers of seven bits per byte. The numbers of the fields are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_GRAPH, _NODE, _NAME, _OPERATOR = 7, 1, 3, 4  # ModelProto.graph, GraphProto.node, NodeProto.name and .op_type


def node(graph: Path, number: int) -> tuple[str, str] | None:
    """Name and operator of the node at that place, from 0; None where the file cannot be read that far."""
    try:
        nodes = [value for part in _fields(graph.read_bytes(), _GRAPH) for value in _fields(part, _NODE)]
        found = nodes[number] if 0 <= number < len(nodes) else None
        if found is None:
            return None
        name, operator = (b"".join(_fields(found, field)).decode() for field in (_NAME, _OPERATOR))
    except (OSError, IndexError, ValueError):
        return None
    return name, operator


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The values of one field, of those that are bytes; raises IndexError or ValueError where it is damaged."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _number(message, at)
        elif kind == _BYTES:
            size, at = _number(message, at)
            if at + size > len(message):
                raise ValueError("cut short")
            if field == wanted:
                yield message[at : at + size]
            at += size
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"no wire type {kind}")


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
