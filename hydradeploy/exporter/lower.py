"""A graph becomes an ONNX model: initialisers that point into a weights file, or that carry their own values.

External data knows only offset and length. A subnet's rows are the first rows of the stored matrix, so those two cut
the rows; a Slice node, which every runtime folds when it loads, cuts the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hydradeploy.bundle import StoredTensor, leading_rows
from hydradeploy.errors import UsageError
from hydradeploy.exporter.graph import Graph, Node, Weight

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
_PROTOBUF_LIMIT = 2**31 - 2**20


def shared(graph: Graph, table: Mapping[str, StoredTensor], location: str) -> bytes:
    """The model whose weights are in the file `location` beside it, at the places the table says."""
    model = ModelProto()
    for weight in graph.weights:
        stored = table[weight.name]
        rows = leading_rows(stored.shape, weight.shape)
        cut = [axis for axis, size in enumerate(weight.shape) if rows[axis] != size]
        name = f"{weight.name}.rows" if cut else weight.name
        model.graph.initializer.append(_external(name, rows, stored, location))
        if cut:
            node, bounds = _slice(weight, name, cut)
            model.graph.node.append(node)
            model.graph.initializer.extend(bounds)
    return _finished(model, graph)


def embedded(graph: Graph, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The self-contained model; `tensors` are the blocks it reads, in its type.

    Raises UsageError for a model beyond protobuf's 2 GiB.
    """
    size = sum(prod(weight.shape) for weight in graph.weights) * np.dtype(graph.dtype).itemsize
    if size > _PROTOBUF_LIMIT:
        raise UsageError(
            f"a self-contained graph of {size} bytes is beyond ONNX's limit of 2 GiB",
            hint="export without --standalone",
        )
    model = ModelProto()
    for weight in graph.weights:
        # Filled in place: ONNX's helpers would copy hundreds of megabytes three times.
        tensor = model.graph.initializer.add(name=weight.name, data_type=_TYPES[graph.dtype], dims=weight.shape)
        tensor.raw_data = tensors[weight.name].tobytes()
    return _finished(model, graph)


def embedded_tensors(model: bytes) -> dict[str, NDArray[Any]]:
    """The initialisers of a self-contained model by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}


def _external(name: str, shape: tuple[int, ...], stored: StoredTensor, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=_TYPES[stored.dtype], dims=shape, data_location=TensorProto.EXTERNAL)
    length = prod(shape) * np.dtype(stored.dtype).itemsize
    for key, value in (("location", location), ("offset", str(stored.offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _slice(weight: Weight, source: str, axes: list[int]) -> tuple[NodeProto, list[TensorProto]]:
    bounds = {"starts": [0] * len(axes), "ends": [weight.shape[axis] for axis in axes], "axes": axes}
    tensors = [
        numpy_helper.from_array(np.array(values, np.int64), f"{weight.name}.{name}") for name, values in bounds.items()
    ]
    inputs = [source, *(tensor.name for tensor in tensors)]
    return helper.make_node("Slice", inputs, [weight.name], name=weight.name), tensors


def _node(node: Node) -> NodeProto:
    made = helper.make_node(node.op, node.inputs, [node.output], name=node.output)
    made.attribute.extend(helper.make_attribute(name, value) for name, value in sorted(node.attributes.items()))
    return made


def _finished(model: ModelProto, graph: Graph) -> bytes:
    """Add everything but the weights, and the nodes that cut them, which are there already."""
    # No version of ours in the file: the same weights give the same bytes whoever writes them.
    model.producer_name, model.ir_version = "hydradeploy", graph.ir_version
    model.opset_import.append(helper.make_opsetid("", graph.opset))
    model.graph.name = "hydradeploy"
    model.graph.node.extend(_node(node) for node in graph.nodes)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(c.values, np.dtype(c.dtype)).reshape(c.shape), c.name) for c in graph.constants
    )
    batch = "batch" if graph.batch == "dynamic" else graph.batch
    image, logits = [batch, *graph.image_shape], [batch, graph.classes]
    model.graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, image))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits))
    return bytes(model.SerializeToString(deterministic=True))
