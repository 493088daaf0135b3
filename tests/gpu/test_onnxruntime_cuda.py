"""ONNX Runtime's CUDA provider on a real GPU: the same answers, from every thread, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from hydradeploy import export
from hydradeploy.backends import Options, backend, model_of, prepared, run_all
from hydradeploy.engines import cudart
from hydradeploy.errors import ExitCode, MissingError
from tests.conftest import missing

pytestmark = pytest.mark.gpu

# Of the largest logit, by compute type: what rounding every product to 24, 11 and 11 bits may come to.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2}
GRAPHS = ("off", "on")


@pytest.fixture
def runner():
    try:
        return backend("onnxruntime-cuda")
    except MissingError as error:
        missing("gpu", error.message)


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_subnet_gives_its_golden_logits_in_every_compute_type(runner, everything, precision, graph):
    golden = everything.golden()
    for artifact in (each for each in everything.manifest.artifacts if each.precision == precision):
        model = model_of(everything, artifact, "ort")
        images = prepared(golden.images, artifact.input, everything.spec.preprocessing)
        for kind in runner.compute_types(precision):
            with runner.open(model, Options(compute_type=kind, settings={"graph": graph})) as session:
                for _ in range(2):
                    off = difference(run_all(session, model, images), golden.logits[artifact.name])
                    assert off <= max(TOLERANCES[kind], artifact.parity.tolerance), (artifact.name, kind)


def test_int8_is_refused_with_what_there_is(runner, everything):
    for artifact in (each for each in everything.manifest.artifacts if each.precision.startswith("int8")):
        with pytest.raises(MissingError, match="does not run int8") as refused:
            runner.open(model_of(everything, artifact, "ort"), Options())
        assert refused.value.exit_code is ExitCode.MISSING


@pytest.mark.parametrize("convolution", ["exhaustive", "heuristic", "default"])
def test_every_search_for_a_convolution_leaves_the_answer(runner, everything, convolution):
    golden, artifact = everything.golden(), everything.artifact("h04-fp32")
    model = model_of(everything, artifact, "ort")
    images = prepared(golden.images, artifact.input, everything.spec.preprocessing)
    with runner.open(model, Options(settings={"convolution": convolution})) as session:
        assert difference(run_all(session, model, images), golden.logits[artifact.name]) <= TOLERANCES["fp32"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_any_batch_of_a_dynamic_graph_and_back_again(runner, supernet_file, tmp_path, graph):
    """More sizes than have a CUDA graph and memory of their own."""
    made = export(supernet_file, tmp_path / "b", heads=(3,), precisions=("fp32", "fp16"), batch="dynamic")
    golden = made.golden()
    images = prepared(golden.images, "float32", made.spec.preprocessing)
    for artifact in made.manifest.artifacts:
        with runner.open(model_of(made, artifact, "ort"), Options(settings={"graph": graph})) as session:
            for size in (1, 2, 3, 4, 5, 6, 5, 1, 3):
                logits = session.run(images[:size])
                assert difference(logits, golden.logits[artifact.name][:size]) <= TOLERANCES[artifact.precision], size


@pytest.mark.parametrize("graph", GRAPHS)
def test_sessions_in_turns_and_from_other_threads_do_not_disturb_each_other(runner, everything, graph):
    golden = everything.golden()
    artifacts = [each for each in everything.manifest.artifacts if each.precision == "fp32" and each.input == "float32"]
    models = [model_of(everything, each, "ort") for each in artifacts]
    images = prepared(golden.images, "float32", everything.spec.preprocessing)
    sessions = [runner.open(model, Options(settings={"graph": graph})) for model in models]
    wrong: list[str] = []

    def turns() -> None:
        for _ in range(3):
            for session, model, artifact in zip(sessions, models, artifacts, strict=True):
                if not difference(run_all(session, model, images), golden.logits[artifact.name]) <= TOLERANCES["fp32"]:
                    wrong.append(artifact.name)

    threads = [threading.Thread(target=turns) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for session in sessions:
        session.__exit__(None, None, None)


def test_the_time_on_the_gpu_is_part_of_a_call(runner, everything):
    golden, artifact = everything.golden(), everything.artifact("h06-fp32")
    images = prepared(golden.images, artifact.input, everything.spec.preprocessing)[:1]
    with runner.open(model_of(everything, artifact, "ort"), Options()) as session:
        calls = []
        for _ in range(50):
            began = time.perf_counter()
            session.run(images)
            calls.append(time.perf_counter() - began)
        assert 0 < float(session.facts()["device_s"]) < sorted(calls)[len(calls) // 2]


def test_closing_gives_the_memory_back(runner, everything):
    model = model_of(everything, everything.artifact("h04-fp32"), "ort")

    def once() -> None:
        with runner.open(model, Options(settings={"graph": "on"})):
            pass

    def lost_by_twenty() -> int:
        free, _ = cudart.load().memory()
        for _ in range(20):
            once()
        return free - cudart.load().memory()[0]

    once()
    # Less than two sessions take: a lost one every time would be twenty, in every round. Other programs on the card may
    # take memory in one.
    assert min(lost_by_twenty() for _ in range(3)) < 64 << 20


def test_stdout_is_clean_without_torchs_libraries_loaded(runner, everything):
    code = f"""
        import sys
        from pathlib import Path
        import numpy as np
        from hydradeploy import open_bundle
        from hydradeploy.backends import Options, backend, model_of
        bundle = open_bundle(Path({str(everything.path.resolve())!r}))
        runner = backend("onnxruntime-cuda")
        runner.prepare()
        with runner.open(model_of(bundle, bundle.artifact("h04-fp32"), "ort"), Options()) as session:
            session.run(np.zeros((1, 3, 32, 32), np.float32))
        assert "torch" not in sys.modules
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_a_profile_of_the_gpu_has_what_nvml_tells(runner, shared_bundle, cli, tmp_path):
    out, how = tmp_path / "profiles", ("--device", "cuda", "--backend", "onnxruntime-cuda")
    done = cli("profile", "--bundle", shared_bundle, "--profiles", out, *how, "--heads", "4", "--json")
    assert done.code == 0, done.err
    (path,) = out.glob("*.json")
    profile = json.loads(path.read_text())
    assert profile["device"]["kind"] == "cuda"
    for cell in profile["cells"]:
        assert (cell["backend"], cell.get("error")) == ("onnxruntime-cuda", None)
        assert min(cell["latency_s"]) > 0
        assert cell["memory_bytes"] > 0


def test_golden_logits_through_the_command_line(runner, shared_bundle, cli):
    done = cli("verify", "--bundle", shared_bundle, "--backend", "onnxruntime-cuda")
    assert done.code == 0, done.err
