"""Artifacts open in place in other runtimes and compilers, and compute the same there."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest

from hydradeploy import export
from hydradeploy.backends import PRECISION_NAMES, prepared
from hydradeploy.bundle import Artifact, Bundle, Dialect
from hydradeploy.devices.cpu import features
from hydradeploy.engines import module
from hydradeploy.engines.builder import BuildSpec, build
from hydradeploy.engines.module import RTX
from tests.conftest import geometry, missing, require, spec, write_images, write_supernet

OLDEST = Path(__file__).parents[2] / ".venv-device" / "bin" / "python"

# What another runtime's rounding may change, as a fraction of the largest logit. In int8 a value half-way between two
# integers may go either way.
CLOSE = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-5, "int8dyn": 3e-2, "int8": 3e-2}
# What the gate allows.
BF16_TOLERANCE = 4e-2


def allowed(precision: str, times: float = 1) -> float:
    """What OpenVINO's rounding may change, so many times where a network is deep.

    Products of bf16 in the processor's own instructions are summed and rounded in another order than the gate's.
    """
    if precision == "bf16" and features() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return BF16_TOLERANCE
    return times * CLOSE[precision]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """Work in another directory: external data is to be found beside the graph, not where the process is."""
    monkeypatch.chdir(tmp_path)


# In a process of its own: OpenVINO 2026.4.1 puts this thread's signal stack (sigaltstack) into memory that it unmaps
# when models are released in another order than they were compiled; the next signal with a handler ends the process.
OPENVINO = """
import sys
import numpy as np, openvino

core = openvino.Core()
arrays = np.load(sys.argv[1])
found = {}
for graph, image in zip(arrays["graphs"], arrays["images"]):
    compiled = core.compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found[str(graph)] = compiled(arrays[str(image)])[0]
np.savez(sys.argv[2], **found)
"""

# With `keep`, what it makes of each graph is written too.
ONNXRUNTIME = """
import sys
import numpy as np, onnxruntime

arrays = np.load(sys.argv[1])
found = {}
for number, (graph, image) in enumerate(zip(arrays["graphs"], arrays["images"])):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if "keep" in sys.argv:
        options.optimized_model_filepath = f"{number}.optimised.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{number}.data")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    found[str(graph)] = session.run(["logits"], {"image": arrays[str(image)]})[0]
np.savez(sys.argv[2], **found)
"""


def first_images(bundle: Bundle, artifact: Artifact) -> np.ndarray:
    size = artifact.batch if isinstance(artifact.batch, int) else 3
    return np.asarray(prepared(bundle.golden().images[:size], artifact.input, bundle.spec.preprocessing))


def differences(
    script: str,
    bundle: Bundle,
    artifacts: Iterable[Artifact],
    dialects: tuple[Dialect, ...],
    python: Path,
    *arguments: str,
) -> dict[str, float]:
    """By graph, how far another process's logits are from the golden ones, as a fraction of the largest."""
    chosen = [(artifact, artifact.graphs[d]) for artifact in artifacts for d in dialects if d in artifact.graphs]
    np.savez(
        "given.npz",
        graphs=[str(bundle.path / graph) for _, graph in chosen],
        images=[f"image.{artifact.input}" for artifact, _ in chosen],
        **{f"image.{artifact.input}": first_images(bundle, artifact) for artifact, _ in chosen},
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(python), "-c", script, "given.npz", "logits.npz", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    found, golden, off = np.load("logits.npz"), bundle.golden(), {}
    for artifact, graph in chosen:
        logits = found[str(bundle.path / graph)]
        expected = golden.logits[artifact.name][: len(logits)]
        assert logits.shape == expected.shape
        off[graph] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return off


def of_precision(bundle: Bundle, precision: str) -> list[Artifact]:
    return [artifact for artifact in bundle.manifest.artifacts if artifact.precision == precision]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_openvino_opens_both_dialects_in_place_with_equal_logits(everything, precision):
    require("openvino")
    found = differences(OPENVINO, everything, of_precision(everything, precision), ("ort", "trt"), Path(sys.executable))
    assert len(found) == (4 if precision == "int8dyn" else 8)
    assert max(found.values()) <= allowed(precision), found


def oldest_python() -> Path:
    if not OLDEST.exists():
        missing("python3.10", "no Python 3.10 with the device's packages (make setup)")
    return OLDEST


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_the_oldest_onnx_runtime_gives_the_golden_logits_in_every_precision(everything, precision):
    found = differences(ONNXRUNTIME, everything, of_precision(everything, precision), ("ort",), oldest_python())
    assert len(found) == 4
    assert max(found.values()) <= CLOSE[precision], found


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("options", [{"batch": "dynamic"}, {"batch": 3}, {"standalone": True}], ids=str)
def test_the_oldest_onnx_runtime_opens_every_kind_of_graph_in_every_precision(supernet_file, tmp_path, options):
    data = write_images(tmp_path / "images.npz")
    bundle = export(
        supernet_file, tmp_path / "b", heads=(3,), precisions=PRECISION_NAMES, data=data, input="uint8", **options
    )
    found = differences(ONNXRUNTIME, bundle, bundle.manifest.artifacts, ("ort",), oldest_python())
    assert len(found) == 5
    for artifact in bundle.manifest.artifacts:
        # Ranges at run time are those of a batch: the golden logits are of other batches than these.
        most = 0.1 if artifact.precision == "int8dyn" else CLOSE[artifact.precision]
        assert found[artifact.graphs["ort"]] <= most, artifact.name


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("age", ["newest", "oldest"])
def test_onnx_runtime_computes_every_int8_product_in_integers(everything, age):
    """By the graph that it makes of ours: nothing of int8 is left to float, where it would be slower than fp32."""
    python = Path(sys.executable) if age == "newest" else oldest_python()
    artifacts = [*of_precision(everything, "int8"), *of_precision(everything, "int8dyn")]
    differences(ONNXRUNTIME, everything, artifacts, ("ort",), python, "keep")
    for number, artifact in enumerate(artifacts):
        nodes = onnx.load(f"{number}.optimised.onnx", load_external_data=False).graph.node
        counts = collections.Counter(node.op_type for node in nodes)
        # q, k, v, projection and both of the MLP in two blocks, and the head.
        assert counts["MatMulIntegerToFloat"] + counts["DynamicQuantizeMatMul"] == 6 * 2 + 1
        # What is left: two of attention, where it is in parts, and the embedding of pixels.
        attention = 0 if artifact.precision == "int8dyn" else 2 * 2
        pixels = 1 if artifact.input == "uint8" else 0
        assert sum(counts[op] for op in ("MatMul", "FusedMatMul", "Gemm", "MatMulInteger")) == attention + pixels
        assert counts["DequantizeLinear"] == pixels, "no weight is widened"


def compiled_bytes(path: Path) -> int:
    """The size of the plan TensorRT-RTX compiles from a graph, without a GPU; fails with the parser's words."""
    model = onnx.load(path, load_external_data=False)
    assert [output.name for output in model.graph.output] == ["logits"]
    batch, *rest = (size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim)
    shapes = {} if batch else {"image": tuple((count, *rest) for count in (1, 4, 16))}
    return len(build(module.module(RTX), BuildSpec(path, shapes)).plan)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("precision", [name for name in PRECISION_NAMES if name != "int8dyn"])
def test_tensorrt_rtx_compiles_the_trt_dialect_without_a_gpu(everything, precision):
    require("tensorrt_rtx")
    for artifact in of_precision(everything, precision):
        assert compiled_bytes(everything.path / artifact.graphs["trt"]) > 0


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("batch", [3, "dynamic"])
def test_tensorrt_rtx_compiles_any_batch(supernet_file, tmp_path, batch):
    require("tensorrt_rtx")
    options = {"heads": (3,), "precisions": ("fp16", "int8"), "data": write_images(tmp_path / "images.npz")}
    for input in ("float32", "uint8"):
        bundle = export(supernet_file, tmp_path / "b", input=input, batch=batch, **options)
    for artifact in bundle.manifest.artifacts:
        assert compiled_bytes(bundle.path / artifact.graphs["trt"]) > 0


@pytest.fixture(scope="session")
def wide_bundle(tmp_path_factory) -> Bundle:
    """Two blocks of DeiT-B's width: what weights take can be told from what a plan takes besides."""
    path = tmp_path_factory.mktemp("wide")
    shape = geometry(head_dim=64, heads=12, trained_heads=(2, 12), depth=2, classes=100)
    file, data = write_supernet(path / "s.safetensors", shape), write_images(path / "images.npz", spec(shape))
    return export(file, path / "bundle", precisions=("fp32", "fp16", "bf16", "int8"), data=data)


@pytest.mark.usefixtures("elsewhere")
def test_a_compiled_plan_holds_the_slice_and_not_the_supernet(wide_bundle):
    require("tensorrt_rtx")
    plans = {k: compiled_bytes(wide_bundle.path / f"h{k:02d}-fp32.trt.onnx") for k in (2, 12)}
    stored = (wide_bundle.path / "supernet-fp32.weights").stat().st_size
    own = {k: wide_bundle.artifact(f"h{k:02d}-fp32").parameters * 4 for k in (2, 12)}
    assert plans[12] > own[12]
    assert plans[2] - own[2] < plans[12] - own[12] + stored / 10


@pytest.mark.usefixtures("elsewhere")
def test_a_compiled_plan_is_as_small_as_its_precision(wide_bundle):
    """In int8 about a quarter of fp32's: the compiler keeps the weights in int8 and folds no scale into them."""
    require("tensorrt_rtx")
    plans = {
        name: compiled_bytes(wide_bundle.path / f"h12-{name}.trt.onnx") for name in ("fp32", "fp16", "bf16", "int8")
    }
    empty = compiled_bytes(wide_bundle.path / "h02-int8.trt.onnx")
    weights = {name: (size - empty) / (plans["fp32"] - empty) for name, size in plans.items()}
    assert weights["fp16"] == pytest.approx(0.5, abs=0.05)
    assert weights["bf16"] == pytest.approx(0.5, abs=0.05)
    assert weights["int8"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("heads", range(3, 13))
def test_every_subnet_of_a_deit_b_in_every_runtime_and_precision(deit_b_everything, heads):
    """Real size: both graphs in OpenVINO and ONNX Runtime's oldest with equal logits."""
    require("openvino")
    artifacts = [artifact for artifact in deit_b_everything.manifest.artifacts if artifact.heads == heads]
    assert [artifact.precision for artifact in artifacts] == list(PRECISION_NAMES)
    for script, dialects, python in (
        (OPENVINO, ("ort", "trt"), Path(sys.executable)),
        (ONNXRUNTIME, ("ort",), oldest_python()),
    ):
        found = differences(script, deit_b_everything, artifacts, dialects, python)
        for artifact in artifacts:
            assert all(
                found[artifact.graphs[d]] <= allowed(artifact.precision, 10) for d in dialects if d in artifact.graphs
            ), found


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("heads", range(3, 13))
def test_every_subnet_of_a_deit_b_is_compiled_in_every_precision(deit_b_everything, heads):
    """Real size, through the TensorRT-RTX compiler, and no larger than its weights are in that precision."""
    require("tensorrt_rtx")
    artifacts = [artifact for artifact in deit_b_everything.manifest.artifacts if artifact.heads == heads]
    plans = {
        a.precision: compiled_bytes(deit_b_everything.path / a.graphs["trt"]) for a in artifacts if "trt" in a.graphs
    }
    assert sorted(plans) == ["bf16", "fp16", "fp32", "int8"]
    weights = artifacts[0].parameters * 4
    assert weights < plans["fp32"] < weights + 12e6
    assert max(plans["fp16"], plans["bf16"]) < weights / 2 + 12e6
    assert plans["int8"] < 0.27 * weights + 12e6


@pytest.mark.slow
def test_ten_subnets_of_a_deit_b_take_hardly_more_than_its_file(deit_b_file, deit_b_bundle):
    written = [p for p in deit_b_bundle.iterdir() if p.suffix in (".onnx", ".weights")]
    assert len(written) == 21
    assert sum(p.stat().st_size for p in written) <= 1.02 * deit_b_file.stat().st_size
