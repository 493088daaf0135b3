"""The backends `tensorrt` and `tensorrt-rtx`, on a GPU in the host's memory and with a TensorRT whose engines are
computed by ONNX Runtime from the same graphs. What every backend must do alike is tested with them too."""

from __future__ import annotations

import re
from importlib import import_module

import numpy as np
import pytest

from hydradeploy.backends import Options, check_options, model_of
from hydradeploy.engines import cudart, module, plans
from hydradeploy.errors import EnvironmentFailed, ExitCode, MissingError
from tests.backends import test_conformance as alike
from tests.backends.test_conformance import (
    images,
    model,
    opened,  # noqa: F401
    test_a_closed_session_does_not_run,  # noqa: F401
    test_a_compute_type_it_lacks_is_refused_with_those_it_has,  # noqa: F401
    test_a_file_that_is_none_of_ours_is_one_clear_error,  # noqa: F401
    test_a_setting_or_a_value_it_does_not_know_is_refused_with_those_it_knows,  # noqa: F401
    test_a_view_that_is_not_contiguous_gives_the_same_logits,  # noqa: F401
    test_another_shape_or_type_is_refused_with_both,  # noqa: F401
    test_any_number_of_images_is_run_in_the_batches_the_model_wants,  # noqa: F401
    test_batches_fixed_and_dynamic_agree_with_single_images,  # noqa: F401
    test_every_compute_type_is_taken_and_on_record,  # noqa: F401
    test_every_setting_is_taken_is_on_record_and_leaves_the_answer,  # noqa: F401
    test_it_runs_fp32_and_that_in_fp32_by_default,  # noqa: F401
    test_logits_are_float32_on_the_host_and_the_callers_own,  # noqa: F401
    test_sessions_in_threads_do_not_disturb_each_other,  # noqa: F401
    test_threads_are_on_record_where_a_runtime_is_given_them,  # noqa: F401
    test_threads_do_not_change_the_answer,  # noqa: F401
)
from tests.conftest import require
from tests.engines.fakes import FakeCuda, FakeEngine, FakeTensorRT, nothing_left

BACKENDS = {"tensorrt": "hydradeploy.backends.tensorrt", "tensorrt-rtx": "hydradeploy.backends.tensorrt_rtx"}


@pytest.fixture(params=sorted(BACKENDS))
def name(request):
    return request.param


@pytest.fixture
def cuda(monkeypatch):
    found = FakeCuda()
    found.fake.fake_gpu(0, 8, 6)
    monkeypatch.setattr(cudart, "load", lambda: found)
    monkeypatch.setattr(cudart, "why_no_gpu", lambda: None if found.device_count() else "no CUDA device: none")
    with nothing_left(found):
        yield found
    found.fake.fake_reset()


@pytest.fixture
def trt(cuda, monkeypatch):
    require("onnxruntime")
    import onnxruntime

    fake = FakeTensorRT(cuda)
    fake.asked = []

    def plan(kind, model, bundle, options):
        assert bundle == model.graph.parent
        fake.asked.append(options)
        # ONNX Runtime has no kernels in bfloat16 here; its own graph widens the same weights.
        graph = str(model.graph).replace(".trt.onnx", ".onnx") if model.precision == "bf16" else str(model.graph)
        try:
            session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise MissingError("the parser refuses it") from error
        dynamic = model.batch == "dynamic"
        key = str(model.graph).encode()
        fake.engines[key] = FakeEngine(
            fake,
            lambda batch: session.run(["logits"], {"image": batch})[0],
            (-1 if dynamic else model.batch, *model.image_shape),
            model.classes,
            types={"image": "UINT8" if model.input == "uint8" else "FLOAT"},
            profile=(1, 1, 2),
        )
        return key

    monkeypatch.setattr(plans, "plan", plan)
    monkeypatch.setattr(module, "why_not", lambda kind: None)
    monkeypatch.setattr(module, "module", lambda kind: fake)
    monkeypatch.setattr(module, "version", lambda kind: "10.3.0")
    return fake


@pytest.fixture
def runner(name, trt):
    return import_module(BACKENDS[name]).BACKEND


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_artifact_reproduces_its_golden_logits(runner, everything, precision):
    alike.test_every_artifact_reproduces_its_golden_logits_or_is_refused_with_what_would_run(
        runner, everything, precision
    )


def test_int8dyn_is_refused_with_what_it_has(runner):
    with pytest.raises(MissingError, match=f"{runner.name} does not run int8dyn here") as refused:
        check_options(runner, Options(), "int8dyn")
    assert refused.value.hint == "it has fp32, fp16, bf16, int8"


def test_facts_say_what_ran_and_what_it_took(runner, name, opened, trt):  # noqa: F811
    with runner.open(model(opened, runner), Options()) as session:
        assert "device_s" not in session.facts()
        session.run(images(opened)[:1])
        facts = session.facts()
    assert facts[name] == "10.3.0"
    assert facts["gpu"] == "Fake GPU"
    assert facts["graph"] == "on"
    assert facts["context_bytes"] == facts["scratch_bytes"] == "1000"
    assert float(facts["device_s"]) > 0
    assert "graph_failed" not in facts


def test_a_capture_that_failed_is_on_record_and_it_runs_without(runner, opened, cuda):  # noqa: F811
    cuda.fail("cudaStreamEndCapture", 900)
    with runner.open(model(opened, runner), Options()) as session:
        expected = opened.golden().logits["h04-fp32"][:1]
        np.testing.assert_allclose(session.run(images(opened)[:1]), expected, atol=1e-4 * np.abs(expected).max())
        assert session.facts()["graph"] == "off"
        assert "not permitted when stream is capturing" in session.facts()["graph_failed"]


def test_no_memory_is_the_environments_fault_and_names_the_graph(runner, opened, cuda):  # noqa: F811
    cuda.fake.fake_limit(10)
    with pytest.raises(EnvironmentFailed, match=r"cannot open .*h04-fp32.*: cudaMalloc: out of memory") as failed:
        runner.open(model(opened, runner), Options())
    assert failed.value.exit_code is ExitCode.ENVIRONMENT
    assert cuda.used() == 0


def test_types_are_those_that_module_and_gpu_have(runner, trt, cuda):
    def has() -> list[tuple[str, ...]]:
        return [runner.compute_types(name) for name in ("fp32", "fp16", "bf16", "int8dyn", "int8")]

    assert has() == [("fp32", "tf32"), ("fp16",), ("bf16",), (), ("int8",)]
    cuda.fake.fake_gpu(0, 7, 5)
    assert has() == [("fp32",), ("fp16",), (), (), ("int8",)]
    cuda.fake.fake_gpu(0, 8, 6)
    del trt.DataType.BF16
    assert has() == [("fp32", "tf32"), ("fp16",), (), (), ("int8",)]


def test_what_fp32_artifacts_are_computed_in_is_asked_for_and_others_leave_to_tf32_what_they_have_in_fp32(
    runner, everything, trt
):
    for precision, kind in (("fp32", None), ("fp32", "tf32"), ("int8", None), ("fp16", None)):
        with runner.open(model(everything, runner, f"h04-{precision}"), Options(compute_type=kind)) as session:
            assert session.facts()["compute_type"] == (kind or precision)
    assert [options.tf32 for options in trt.asked] == [False, True, True, True]


def test_it_is_usable_where_package_and_gpu_are(runner, cuda, monkeypatch):
    assert runner.why_not() is None
    cuda.fake.fake_devices(0, 100)
    assert runner.why_not() == "no CUDA device: none"
    monkeypatch.setattr(module, "why_not", lambda kind: f"the package {kind} is not installed")
    assert runner.why_not() == f"the package {runner.name} is not installed"


@pytest.mark.parametrize(("major", "minor"), [(8, 7), (9, 0), (11, 0), (10, 1)])
def test_tensorrt_for_rtx_says_on_which_gpus_it_runs(trt, cuda, major, minor):
    """Orin, H100 and H200, Thor under CUDA 13 and under CUDA 12."""
    rtx, full = (import_module(BACKENDS[name]).BACKEND for name in ("tensorrt-rtx", "tensorrt"))
    assert rtx.why_not() is None
    cuda.fake.fake_gpu(0, major, minor)
    assert re.fullmatch(rf".* does not run on Fake GPU of compute capability {major}\.{minor}, .*", rtx.why_not())
    assert full.why_not() is None


def test_its_software_is_tensorrt_and_cuda(runner, name, monkeypatch):
    import importlib.metadata

    def version(distribution: str) -> str:
        if distribution != f"{name}-cu12":
            raise importlib.metadata.PackageNotFoundError(distribution)
        return "10.3.0.30"

    assert runner.software() | {name: ""} == {name: "", "cuda": "12.6", "cuda-driver": "12.6"}
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert runner.software()[name] == "10.3.0.30"


def test_preparing_makes_cudas_context_and_keeps_nothing(runner, cuda):
    cuda.fail("cudaMalloc", 700)
    with pytest.raises(MissingError, match="cudaMalloc"):
        runner.prepare()
    runner.prepare()
    assert cuda.used() == 0


def test_closing_after_an_error_gives_everything_back(runner, opened, cuda):  # noqa: F811
    with runner.open(model(opened, runner), Options()) as session:
        cuda.fail("cudaGraphLaunch", 700)
        with pytest.raises(MissingError, match="illegal memory access"):
            session.run(images(opened)[:1])
    assert cuda.used() == 0


def test_subnets_beside_each_other_share_the_scratch(runner, opened, cuda):  # noqa: F811
    targets = [model_of(opened, opened.artifact(f"h{k:02d}-fp32"), runner.dialect) for k in (2, 3, 4)]
    sessions = [runner.open(target, Options()) for target in targets]
    assert {session.facts()["scratch_bytes"] for session in sessions} == {"1000"}
    assert cuda.live()["memory"] == 1 + 2 * len(sessions)
    for session, target in zip(sessions, targets, strict=True):
        expected = opened.golden().logits[target.name][:1]
        np.testing.assert_allclose(session.run(images(opened)[:1]), expected, atol=1e-4 * np.abs(expected).max())
        session.__exit__(None, None, None)
