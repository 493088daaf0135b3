"""Nodes are found by their number without onnx, in what onnx writes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, helper

from hydradeploy.engines.nodes import node


def model(count: int) -> ModelProto:
    """With everything else that a file has: inputs, a long documentation, numbers and floats."""
    nodes = [
        helper.make_node(f"Op{at}", ["x"], ["y"], name=f"näme{at}" * at, alpha=0.5, beta=-1) for at in range(count)
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, ["batch", 300])], [])
    graph.doc_string = "long " * 1000
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_each_is_found_and_none_beyond_them(tmp_path):
    (tmp_path / "m.onnx").write_bytes(model(200).SerializeToString())
    found = [node(tmp_path / "m.onnx", at) for at in range(-1, 201)]
    assert found == [None, *((f"näme{at}" * at, f"Op{at}") for at in range(200)), None]


def test_no_file_is_none(tmp_path):
    assert node(tmp_path / "absent.onnx", 0) is None


@given(end=st.integers(0, 1500), change=st.integers(0, 1500), to=st.integers(0, 255))
def test_a_damaged_file_is_no_crash(tmp_path_factory, end, change, to):
    data = bytearray(model(3).SerializeToString()[:end])
    if change < len(data):
        data[change] = to
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(data)
    found = node(path, 1)
    assert found is None or len(found) == 2
