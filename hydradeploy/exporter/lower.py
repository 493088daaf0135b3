"""A graph becomes an ONNX model: initialisers that point into a weights file, or that carry their own values.

External data knows only offset and length. A subnet's rows are the first rows of the stored matrix, so those two cut
the rows; a Slice node, which every runtime folds when it loads, cuts the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hydradeploy.bundle import StoredTensor, leading_rows
from hydradeploy.errors import UsageError
from hydradeploy.exporter.graph import Constant, Graph, Node, Weight
from hydradeploy.stored import ITEM_BYTES

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
}
_STORED = ".stored"
_PROTOBUF_LIMIT = 2**31 - 2**20


def shared(graph: Graph, table: Mapping[str, StoredTensor], location: str, steps: Mapping[str, float]) -> bytes:
    """The model whose weights are in the file `location` beside it, at the places the table says."""
    model = ModelProto()
    for weight in graph.weights:
        stored = table[weight.name]
        rows = leading_rows(stored.shape, weight.shape)
        cut = [axis for axis, size in enumerate(weight.shape) if rows[axis] != size]
        _point(_chain(model, weight, cut), rows, stored, location)
        if weight.scale is not None:
            whole = table[weight.scale]
            _point(model.graph.initializer.add(name=weight.scale), whole.shape, whole, location)
    return _finished(model, graph, steps)


def embedded(graph: Graph, tensors: Mapping[str, NDArray[Any]], steps: Mapping[str, float]) -> bytes:
    """The self-contained model; `tensors` are the blocks it reads, by their stored names.

    Raises UsageError for a model beyond protobuf's 2 GiB.
    """
    size = sum(prod(weight.shape) * ITEM_BYTES[weight.dtype] for weight in graph.weights)
    if size > _PROTOBUF_LIMIT:
        raise UsageError(
            f"a self-contained graph of {size} bytes is beyond ONNX's limit of 2 GiB",
            hint="export without --standalone",
        )
    model = ModelProto()
    for weight in graph.weights:
        _fill(_chain(model, weight, []), tensors[weight.name])
        if weight.scale is not None:
            _fill(model.graph.initializer.add(name=weight.scale), tensors[weight.scale])
    return _finished(model, graph, steps)


def embedded_tensors(model: bytes) -> dict[str, NDArray[Any]]:
    """The weights of a self-contained model by their stored names."""
    tensors = onnx.load_from_string(model).graph.initializer
    return {tensor.name.removesuffix(_STORED): numpy_helper.to_array(tensor) for tensor in tensors}


def _chain(model: ModelProto, weight: Weight, cut: list[int]) -> TensorProto:
    """Add an initialiser and the nodes between it and what the graph reads; the initialiser, to be filled."""
    steps = [
        *(["dequantised"] if weight.scale is not None else []),
        *(["cut"] if cut else []),
        *(["cast"] if weight.cast is not None else []),
    ]
    names = [f"{weight.name}.{step}" for step in steps[:-1]] + [weight.name]
    tensor: TensorProto = model.graph.initializer.add(name=weight.name + (_STORED if steps else ""))
    source = tensor.name
    for step, name in zip(steps, names, strict=True) if steps else ():
        if step == "dequantised":
            node = helper.make_node("DequantizeLinear", [source, str(weight.scale)], [name], name=name, axis=1)
        elif step == "cut":
            node, bounds = _slice(weight, source, name, cut)
            model.graph.initializer.extend(bounds)
        else:
            node = helper.make_node("Cast", [source], [name], name=name, to=_TYPES[str(weight.cast)])
        model.graph.node.append(node)
        source = name
    return tensor


def _point(tensor: TensorProto, shape: tuple[int, ...], stored: StoredTensor, location: str) -> None:
    tensor.data_type, tensor.data_location = _TYPES[stored.dtype], TensorProto.EXTERNAL
    tensor.dims.extend(shape)
    length = prod(shape) * ITEM_BYTES[stored.dtype]
    for key, value in (("location", location), ("offset", str(stored.offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _fill(tensor: TensorProto, values: NDArray[Any]) -> None:
    # In place: ONNX's helpers would copy hundreds of megabytes three times.
    tensor.data_type = _TYPES[values.dtype.name]
    tensor.dims.extend(values.shape)
    tensor.raw_data = values.tobytes()


def _slice(weight: Weight, source: str, output: str, axes: list[int]) -> tuple[NodeProto, list[TensorProto]]:
    bounds = {"starts": [0] * len(axes), "ends": [weight.shape[axis] for axis in axes], "axes": axes}
    tensors = [
        numpy_helper.from_array(np.array(values, np.int64), f"{weight.name}.{name}") for name, values in bounds.items()
    ]
    inputs = [source, *(tensor.name for tensor in tensors)]
    return helper.make_node("Slice", inputs, [output], name=output), tensors


def _node(node: Node) -> NodeProto:
    made = helper.make_node(node.op, node.inputs, node.outputs, name=node.outputs[0])
    made.attribute.extend(helper.make_attribute(name, value) for name, value in sorted(node.attributes.items()))
    return made


def _constant(constant: Constant) -> TensorProto:
    dtype = np.dtype(ml_dtypes.bfloat16 if constant.dtype == "bfloat16" else constant.dtype)
    return numpy_helper.from_array(np.array(constant.values, dtype).reshape(constant.shape), constant.name)


def _finished(model: ModelProto, graph: Graph, steps: Mapping[str, float]) -> bytes:
    """Add everything but the weights, and the nodes that cut them, which are there already."""
    # No version of ours in the file: the same weights give the same bytes whoever writes them.
    model.producer_name, model.ir_version = "hydradeploy", graph.ir_version
    model.opset_import.append(helper.make_opsetid("", graph.opset))
    model.graph.name = "hydradeploy"
    model.graph.node.extend(_node(node) for node in graph.nodes)
    model.graph.initializer.extend(_constant(constant) for constant in graph.constants)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(steps[name], np.float32), name) for name in graph.steps
    )
    batch = "batch" if graph.batch == "dynamic" else graph.batch
    image, logits = [batch, *graph.image_shape], [batch, graph.classes]
    model.graph.input.append(helper.make_tensor_value_info("image", _TYPES[graph.input], image))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits))
    return bytes(model.SerializeToString(deterministic=True))
