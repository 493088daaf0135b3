"""The emulation of bfloat16 graphs: what it computes is what arithmetic in bfloat16 with wide sums gives."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.data.preprocess import normalise
from hydradeploy.exporter import lower
from hydradeploy.exporter.export import source_of
from hydradeploy.exporter.graph import Constant, Graph, Node, Weight
from hydradeploy.exporter.jobs import Job
from hydradeploy.exporter.precision import precision
from hydradeploy.exporter.weights import block
from hydradeploy.exporter.widened import widened
from hydradeploy.stored import stored
from hydradeploy.supernet.store import load

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(BFLOAT16).astype(np.float32)


def emulated(supernet_file: Path, batch, input) -> tuple[Graph, bytes]:
    """The bfloat16 graph of h03 for TensorRT, and a model of its emulation."""
    weights = load(supernet_file)
    geometry, job = weights.spec.geometry, Job(3, precision("bf16"), batch, True, input)
    graph, wanted = job.graphs(geometry)["trt"], stored(geometry.subnet(3), job.form(geometry))
    found = source_of(weights).tensors({name: tensor.dtype for name, tensor in wanted.items()})
    return graph, lower.embedded(widened(graph), {name: block(t, wanted[name].shape) for name, t in found}, {})


@pytest.mark.parametrize("batch", [1, "dynamic"])
@pytest.mark.parametrize("input", ["float32", "uint8"])
def test_every_result_of_the_graph_is_a_bfloat16_number_in_the_emulation(supernet_file, everything, batch, input):
    graph, model = emulated(supernet_file, batch, input)
    assert graph.dtype == "bfloat16"
    proto = onnx.load_from_string(model)
    names = [node.outputs[0] for node in graph.nodes if node.outputs[0] != "logits"]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    images = everything.golden().images[:1]
    shown = images if input == "uint8" else normalise(images, everything.spec.preprocessing)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    found = dict(zip(names, session.run(names, {"image": shown}), strict=True))
    assert len(found) > 60
    unlike = [
        name for name, values in found.items() if values.dtype == np.float32 and np.any(values != rounded(values))
    ]
    assert unlike == []
    assert np.array_equal(session.run(["logits"], {"image": shown})[0], found["head"])


def lone(*nodes: Node, constants: tuple[Constant, ...] = (), weights: tuple[Weight, ...] = ()) -> Graph:
    return Graph(
        opset=17,
        ir_version=8,
        dtype="bfloat16",
        batch=1,
        input="float32",
        image_shape=(1, 1, 8),
        classes=8,
        nodes=nodes,
        weights=weights,
        constants=constants,
        steps=(),
    )


@given(st.integers(0, 999))
def test_a_product_is_summed_wide_and_rounded_once(seed):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(8, 8)).astype(BFLOAT16)
    image = generator.normal(size=(1, 1, 1, 8)).astype(np.float32)
    graph = lone(
        Node(op="Cast", inputs=("image",), outputs=("x",), attributes={"to": 16}),
        Node(op="MatMul", inputs=("x", "w"), outputs=("y",), attributes={}),
        Node(op="Mul", inputs=("y", "third"), outputs=("z",), attributes={}),
        Node(op="Reshape", inputs=("z", "flat"), outputs=("flattened",), attributes={}),
        Node(op="Cast", inputs=("flattened",), outputs=("logits",), attributes={"to": 1}),
        constants=(
            Constant(name="third", dtype="bfloat16", shape=(), values=(1 / 3,)),
            Constant(name="flat", dtype="int64", shape=(2,), values=(1, 8)),
        ),
        weights=(Weight(name="w", dtype="bfloat16", shape=(8, 8)),),
    )
    model = lower.embedded(widened(graph), {"w": matrix}, {})
    got = onnxruntime.InferenceSession(model).run(None, {"image": image})[0]
    product = (rounded(image)[0, 0].astype(np.float64) @ matrix.astype(np.float64)).astype(np.float32)
    expected = rounded(rounded(product) * rounded(np.float32(1 / 3)))
    # A sum that lies half-way, to float32's last bit, may go either way.
    assert (got == expected).mean() >= 7 / 8
    np.testing.assert_allclose(got, expected, rtol=2**-7)


def test_the_emulation_has_the_same_operations_and_nothing_in_bfloat16_but_what_it_reads(supernet_file):
    graph, _ = emulated(supernet_file, 1, "float32")
    wide = widened(graph)
    assert wide.dtype == "float32"
    assert [node.op for node in wide.nodes if node.op != "Cast"] == [
        node.op for node in graph.nodes if node.op != "Cast"
    ]
    assert {weight.cast for weight in wide.weights} == {"float32"}
    assert "bfloat16" not in {constant.dtype for constant in wide.constants}
