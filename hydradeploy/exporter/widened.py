"""A bfloat16 graph as one in float32 that rounds every result to bfloat16.

Processor runtimes have no kernels for bfloat16 graphs, and accelerators that have accumulate in float32 and round what
an operation gives: so does this, wherever there is a Cast. The parity gate runs it in place of the graph.
"""

from __future__ import annotations

import ml_dtypes
import msgspec
import numpy as np

from hydradeploy.exporter.graph import Constant, Graph, Node, Weight

_FLOAT, _BFLOAT16 = 1, 16
# They only move values.
_EXACT = ("Cast", "Concat", "Expand", "Gather", "Reshape", "Shape", "Transpose")


def widened(graph: Graph) -> Graph:
    """The same graph, emulated."""
    return msgspec.structs.replace(
        graph,
        dtype="float32",
        nodes=tuple(made for node in graph.nodes for made in _rounded(node)),
        weights=tuple(_weight(weight) for weight in graph.weights),
        constants=tuple(_constant(constant) for constant in graph.constants),
    )


def _rounded(node: Node) -> tuple[Node, ...]:
    to_narrow = node.op == "Cast" and node.attributes["to"] == _BFLOAT16
    if node.op in _EXACT and not to_narrow:
        return (node,)
    exact, narrow = f"{node.outputs[0]}.exact", f"{node.outputs[0]}.narrow"
    attributes = {"to": _FLOAT} if to_narrow else node.attributes
    return (
        msgspec.structs.replace(node, outputs=(exact,), attributes=attributes),
        Node(op="Cast", inputs=(exact,), outputs=(narrow,), attributes={"to": _BFLOAT16}),
        Node(op="Cast", inputs=(narrow,), outputs=node.outputs, attributes={"to": _FLOAT}),
    )


def _weight(weight: Weight) -> Weight:
    return msgspec.structs.replace(weight, cast="float32") if weight.dtype == "bfloat16" else weight


def _constant(constant: Constant) -> Constant:
    if constant.dtype != "bfloat16":
        return constant
    values = tuple(float(value) for value in np.array(constant.values, ml_dtypes.bfloat16))
    return msgspec.structs.replace(constant, dtype="float32", values=values)
