"""The builder with a real compiler: TensorRT for RTX needs no GPU. All head counts in every precision are built by
tests/exporter/test_runtimes.py, in the slow tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hydradeploy.engines import module
from hydradeploy.engines.builder import BuildSpec, Built, build
from hydradeploy.engines.module import RTX
from hydradeploy.engines.nodes import node
from hydradeploy.errors import MissingError
from tests.conftest import require


@pytest.fixture
def trt() -> Any:
    require("tensorrt_rtx")
    return module.module(RTX)


def saved(path: Path, operator: str = "Relu", name: str = "blocks.0.act", opset: int = 17, batch: object = 1) -> Path:
    """A product and the operator."""
    weights = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["a"], name="blocks.0.fc"),
        helper.make_node(operator, ["a"], ["logits"], name=name),
    ]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [batch, 64]) for end in ("image", "logits")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def refusal(trt: Any, spec: BuildSpec) -> str:
    with pytest.raises(MissingError) as refused:
        build(trt, spec)
    assert "\n" not in refused.value.message
    return refused.value.message


@pytest.mark.parametrize("name", ["h06-fp32", "h06-fp16", "h06-int8"])
def test_an_artifact_is_built(trt, everything, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its weights are found beside it, not here
    heard = []
    graph = everything.path / everything.artifact(name).graphs["trt"]
    built = build(trt, BuildSpec(graph), progress=lambda *step: heard.append(step))
    assert isinstance(built, Built)
    assert built.timing_cache == b""
    assert len(built.plan) > 64
    stages = [stage for stage, _ in heard]
    assert stages[:3] == ["starting", "parsing", "building"]
    assert len(set(stages)) > 3, "no events of the compiler"
    assert all(0 <= fraction <= 1 for _, fraction in heard if fraction is not None)


@pytest.mark.parametrize(("operator", "name"), [("Bernoulli", "blocks.0.coin"), ("Nonsense", "blocks.0.none")])
def test_a_broken_graph_is_one_line_that_names_the_node(trt, tmp_path, operator, name, capfd):
    graph = saved(tmp_path / "h06-fp32.trt.onnx", operator, name)
    told = refusal(trt, BuildSpec(graph))
    assert told.startswith(f"{graph}: TensorRT refuses node {name} ({operator}): ")
    assert capfd.readouterr() == ("", "")


def test_the_number_of_a_refused_node_is_its_place_in_the_file(trt, tmp_path):
    """Which is all that TensorRT tells of it before 10.0."""
    graph = saved(tmp_path / "m.onnx", "Bernoulli", "blocks.0.coin")
    log = type("Log", (trt.ILogger,), {"log": lambda self, severity, text: None})()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert not parser.parse_from_file(str(graph))
    error = parser.get_error(0)
    assert node(graph, error.node()) == (error.node_name(), error.node_operator()) == ("blocks.0.coin", "Bernoulli")


@pytest.mark.parametrize("damage", ["garbage", "absent", "cut"])
def test_a_file_that_is_no_graph_is_one_line_and_nothing_is_printed(trt, tmp_path, damage, capfd):
    graph = saved(tmp_path / "m.onnx")
    if damage == "garbage":
        graph.write_bytes(b"garbage" * 100)
    elif damage == "cut":
        graph.write_bytes(graph.read_bytes()[:-300])
    else:
        graph.unlink()
    assert refusal(trt, BuildSpec(graph)).startswith(f"{graph}: TensorRT refuses it: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("first", "told"), [(1, None), (8, "MIN<=OPT<=MAX")])
def test_bounds_are_taken_or_refused_in_tensorrts_words(trt, tmp_path, first, told):
    graph = saved(tmp_path / "m.onnx", batch="batch")
    spec = BuildSpec(graph, {"image": ((first, 64), (4, 64), (6, 64))})
    if told is None:
        assert build(trt, spec).plan
    else:
        assert told in refusal(trt, spec)
    assert "dynamic and has no bounds" in refusal(trt, BuildSpec(graph))


def test_targets_are_built_for_and_those_of_a_jetson_refused(trt, tmp_path):
    graph = saved(tmp_path / "m.onnx")
    one, two = (len(build(trt, BuildSpec(graph, targets=chosen)).plan) for chosen in (("sm86",), ("sm86", "sm120")))
    assert 0 < one < two
    told = refusal(trt, BuildSpec(graph, targets=("sm87",)))
    assert "for sm87, only for sm75, sm80, sm86, sm89, sm120" in told


def test_an_interrupt_ends_a_build_and_the_next_one_works(trt, tmp_path):
    graph = saved(tmp_path / "m.onnx")

    def hear(stage: str, fraction: float | None) -> None:
        if fraction is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(trt, BuildSpec(graph), progress=hear)
    assert build(trt, BuildSpec(graph)).plan
