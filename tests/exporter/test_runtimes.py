"""Artifacts open in place in other runtimes and compilers, and compute the same there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydradeploy import export, open_bundle
from hydradeploy.bundle import Bundle
from hydradeploy.data.preprocess import normalise
from tests.conftest import geometry, require, write_supernet


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """Work in another directory: external data is to be found beside the graph, not where the process is."""
    monkeypatch.chdir(tmp_path)


# In a process of its own: OpenVINO 2026.4.1 puts this thread's signal stack (sigaltstack) into memory that it unmaps
# when models are released in another order than they were compiled; the next signal with a handler ends the process.
OPENVINO = """
import sys
import numpy as np, openvino

images, out, *graphs = sys.argv[1:]
core = openvino.Core()
compiled = [core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for graph in graphs]
np.save(out, [model(np.load(images))[0] for model in compiled])
"""


def openvino_differences(bundle: Bundle, name: str) -> list[float]:
    artifact, golden = bundle.artifact(name), bundle.golden()
    np.save("images.npy", normalise(golden.images[:1], bundle.spec.preprocessing))
    expected = golden.logits[name][:1]
    graphs = [str(bundle.path / graph) for graph in artifact.graphs.values()]
    subprocess.run([sys.executable, "-c", OPENVINO, "images.npy", "logits.npy", *graphs], check=True)
    differences = []
    for logits in np.load("logits.npy"):
        assert logits.argmax() == expected.argmax()
        differences.append(float(np.abs(logits - expected).max() / np.abs(expected).max()))
    return differences


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("heads", range(2, 7))
def test_openvino_opens_both_dialects_in_place_with_equal_logits(shared_bundle, heads):
    require("openvino")
    assert max(openvino_differences(open_bundle(shared_bundle), f"h{heads:02d}-fp32")) < 1e-5
    assert max(openvino_differences(open_bundle(shared_bundle), f"h{heads:02d}-fp16")) < 1e-2


def compiled_bytes(path: Path) -> int:
    """The size of the plan TensorRT-RTX compiles from a graph, without a GPU; fails with the parser's words."""
    import tensorrt_rtx

    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert [network.get_output(i).name for i in range(network.num_outputs)] == ["logits"]
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    assert plan is not None
    return int(plan.nbytes)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("heads", [2, 4, 6])
def test_tensorrt_rtx_compiles_the_trt_dialect_without_a_gpu(shared_bundle, heads, precision):
    require("tensorrt_rtx")
    artifact = open_bundle(shared_bundle).artifact(f"h{heads:02d}-{precision}")
    assert compiled_bytes(shared_bundle / artifact.graphs["trt"]) > 0


@pytest.mark.usefixtures("elsewhere")
def test_a_compiled_plan_holds_the_slice_and_not_the_supernet(tmp_path):
    require("tensorrt_rtx")
    file = write_supernet(
        tmp_path / "s.safetensors", geometry(head_dim=64, heads=12, trained_heads=(2, 12), depth=2, classes=100)
    )
    bundle = export(file, tmp_path / "bundle")
    plans = {k: compiled_bytes(bundle.path / f"h{k:02d}-fp32.trt.onnx") for k in (2, 12)}
    stored = (bundle.path / "supernet-fp32.weights").stat().st_size
    own = {k: bundle.artifact(f"h{k:02d}-fp32").parameters * 4 for k in (2, 12)}
    assert plans[12] > own[12]
    assert plans[2] - own[2] < plans[12] - own[12] + stored / 10


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("heads", range(3, 13))
def test_every_subnet_of_a_deit_b_in_every_runtime(deit_b_bundle, heads):
    """Real size: both graphs in OpenVINO with equal logits, the trt graph through the TensorRT-RTX compiler."""
    for package in ("openvino", "tensorrt_rtx"):
        require(package)
    bundle = open_bundle(deit_b_bundle)
    artifact = bundle.artifact(f"h{heads:02d}-fp32")
    assert max(openvino_differences(bundle, artifact.name)) < 1e-4
    weights = artifact.parameters * 4
    assert weights < compiled_bytes(bundle.path / artifact.graphs["trt"]) < weights + 12e6


@pytest.mark.slow
def test_ten_subnets_of_a_deit_b_take_hardly_more_than_its_file(deit_b_file, deit_b_bundle):
    written = [p for p in deit_b_bundle.iterdir() if p.suffix in (".onnx", ".weights")]
    assert len(written) == 21
    assert sum(p.stat().st_size for p in written) <= 1.02 * deit_b_file.stat().st_size
