"""The backend `onnxruntime-cuda` on a GPU in the host's memory and with an ONNX Runtime whose CUDA provider computes
there what its processor does. What every backend must do alike is tested with it too."""

from __future__ import annotations

import ctypes as C
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hydradeploy import export
from hydradeploy.backends import BACKEND_MODULES, Options, backend, check_options, model_of, onnxruntime_cuda, run_all
from hydradeploy.doctor import software
from hydradeploy.doctor.patient import Absent
from hydradeploy.engines import cudart
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
from tests.engines.fakes import FakeCuda, nothing_left

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PRELOADED = "Failed to load /site-packages/nvidia/cu13/lib/libcublas.so.13: truncated\n"
LACKING = "Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file\nPlease follow a page.\n"


class Runtime:
    """What the module says and takes, and what tests turn."""

    def __init__(self, cuda: FakeCuda, session: Any) -> None:
        self.cuda, self.session = cuda, session
        self.available, self.providers = ["TensorrtExecutionProvider", CUDA, CPU], [CUDA, CPU]
        self.printed = PRELOADED
        self.preloads = 0
        self.elsewhere: list[tuple[str, str]] = []
        self.raises: Exception | None = None
        self.opened: list[FakeSession] = []
        self.kept: list[Any] = []

    def preload(self) -> None:
        self.preloads += 1
        print(self.printed, end="")

    @property
    def last(self) -> FakeSession:
        return self.opened[-1]


class FakeSession:
    """Computes on the stream that it is given, from and into the memory that it is bound to."""

    runtime: Runtime

    def __init__(self, path: str, options: Any, *, providers: list, **rest: object) -> None:
        ((name, self.given),) = providers
        assert name == CUDA
        self.options, self.rest, self.runs = options, rest, []
        self.inner = self.runtime.session(path, providers=[CPU])
        self.runtime.opened.append(self)

    def get_providers(self) -> list[str]:
        return self.runtime.providers

    def io_binding(self) -> Any:
        bound: dict[str, tuple] = {}

        def bind(name: str, where: str, number: int, kind: Any, shape: tuple, address: int) -> None:
            assert (where, number) == ("cuda", 0)
            bound[name] = (np.dtype(kind), shape, address)

        return SimpleNamespace(bind_input=bind, bind_output=bind, bound=bound)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.runtime.raises is not None:
            raise self.runtime.raises
        waits = entry(options, "disable_synchronize_execution_providers", "get_run_config_entry") != "1"
        self.runs.append((entry(options, "gpu_graph_id", "get_run_config_entry"), waits))
        stream, fake = int(self.given["user_compute_stream"]), self.runtime.cuda.fake

        def work(_: object) -> None:
            given, taken = (memory(*binding.bound[name]) for name in ("image", "logits"))
            taken[:] = self.inner.run(["logits"], {"image": given})[0]

        callback = C.CFUNCTYPE(None, C.c_void_p)(work)
        self.runtime.kept.append(callback)
        assert fake.cudaLaunchHostFunc(stream, C.cast(callback, C.c_void_p), None) == 0
        if waits:
            assert fake.cudaStreamSynchronize(C.c_void_p(stream)) == 0

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(provider: str, op: str, name: str) -> Any:
            return SimpleNamespace(
                ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=op, name=name, domain="")]
            )

        shapes = [part(CPU, "Shape", "batch"), part(CPU, "Concat", "embed.class.shape")]
        return [part(CUDA, "Conv", "embed.conv"), *shapes, *(part(CPU, *node) for node in self.runtime.elsewhere)]


def memory(kind: np.dtype, shape: tuple, address: int) -> np.ndarray:
    count = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((C.c_ubyte * count).from_address(address), kind).reshape(shape)


def entry(options: Any, name: str, ask: str = "get_session_config_entry") -> str | None:
    try:
        return str(getattr(options, ask)(name))
    except RuntimeError:
        return None


@pytest.fixture
def name():
    return "onnxruntime-cuda"


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
def runtime(cuda, monkeypatch):
    """With the sessions of the processor as they are."""
    require("onnxruntime")
    import onnxruntime

    original = onnxruntime.InferenceSession
    found = Runtime(cuda, original)

    def session(path: str, options: Any = None, *, providers: list, **rest: object) -> Any:
        kind = original if providers == [CPU] else type("Session", (FakeSession,), {"runtime": found})
        return kind(path, options, providers=providers, **rest)

    setattr(session, TELLS, None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found.available)
    monkeypatch.setattr(onnxruntime, "preload_dlls", found.preload, raising=False)
    onnxruntime_cuda._why_no_provider.cache_clear()
    yield found
    onnxruntime_cuda._why_no_provider.cache_clear()


TELLS = "get_provider_graph_assignment_info"


@pytest.fixture
def runner(runtime, name):
    return backend(name)


def opened_with(runner, target, **settings: str):
    return runner.open(target, Options(settings=settings))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8dyn", "int8"])
def test_every_artifact_reproduces_its_golden_logits_or_is_refused(runner, everything, precision):
    alike.test_every_artifact_reproduces_its_golden_logits_or_is_refused_with_what_would_run(
        runner, everything, precision
    )


@pytest.mark.parametrize("precision", ["int8dyn", "int8"])
def test_int8_is_refused_with_what_it_has(runner, precision):
    with pytest.raises(MissingError, match=f"onnxruntime-cuda does not run {precision} here") as refused:
        check_options(runner, Options(), precision)
    assert refused.value.exit_code is ExitCode.MISSING
    assert refused.value.hint == "it has fp32, fp16, bf16"


def test_types_are_those_of_the_gpu(runner, cuda):
    assert runner.compute_types("fp32") == runner.compute_types("bf16") == ("fp32", "tf32")
    assert runner.compute_types("fp16") == ("fp16",)
    cuda.fake.fake_gpu(0, 7, 5)
    assert runner.compute_types("fp32") == runner.compute_types("bf16") == ("fp32",)
    assert runner.compute_types("fp16") == ("fp16",)


def test_what_is_asked_for_reaches_the_provider(runner, runtime, opened):  # noqa: F811
    with runner.open(model(opened, runner), Options()):
        assert runtime.last.given.pop("user_compute_stream") != "0"
        assert runtime.last.given == {
            "device_id": "0",
            "use_tf32": "0",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "enable_cuda_graph": "0",
        }
        assert runtime.last.rest == {"enable_fallback": 0}
    chosen = Options(threads=3, compute_type="tf32", settings={"graph": "on", "convolution": "heuristic"})
    with runner.open(model(opened, runner), chosen):
        del runtime.last.given["user_compute_stream"]
        assert runtime.last.given == {
            "device_id": "0",
            "use_tf32": "1",
            "cudnn_conv_algo_search": "HEURISTIC",
            "enable_cuda_graph": "1",
        }
        assert runtime.last.options.intra_op_num_threads == 3


def test_facts_say_what_ran_and_what_it_took_without_the_copies(runner, opened):  # noqa: F811
    with runner.open(model(opened, runner), Options()) as session:
        assert "device_s" not in session.facts()
        session.run(images(opened)[:1])
        facts = dict(session.facts())
    assert float(facts.pop("device_s")) > 0
    assert facts.pop("onnxruntime") == runner.software()["onnxruntime"]
    assert facts == {
        "provider": CUDA,
        "gpu": "Fake GPU",
        "threads": "default",
        "compute_type": "fp32",
        "graph": "off",
        "convolution": "exhaustive",
    }


def test_a_provider_that_is_not_there_is_one_clear_error_and_nothing_runs(runner, runtime, opened):  # noqa: F811
    runtime.providers = [CPU]
    with pytest.raises(MissingError, match=r"cannot open .*h04-fp32.*: .*cannot load its CUDA provider.*CPUExe") as no:
        runner.open(model(opened, runner), Options())
    assert no.value.exit_code is ExitCode.MISSING
    assert "\n" not in no.value.message
    assert runtime.last.runs == []


def test_nodes_that_compute_on_the_processor_are_refused_by_name(runner, runtime, opened):  # noqa: F811
    runtime.elsewhere = [("Gelu", "blocks.0.mlp.act")]
    with pytest.raises(MissingError, match=r"does not take Gelu blocks\.0\.mlp\.act, which would run on the processor"):
        runner.open(model(opened, runner), Options())
    runtime.elsewhere = [("Gelu", f"blocks.{block}.mlp.act") for block in range(12)]
    with pytest.raises(MissingError, match=r"blocks\.2\.mlp\.act and 9 more, which"):
        runner.open(model(opened, runner), Options())
    assert runtime.last.runs == []


def test_the_shape_of_a_dynamic_batch_is_all_that_may_be_on_the_processor(supernet_file, tmp_path):
    """The nodes of our graphs that compute sizes bear the names that are let through."""
    import onnx

    for batch in (2, "dynamic"):
        made = export(supernet_file, tmp_path / str(batch), heads=(3,), batch=batch)
        graph = onnx.load(made.graph(made.artifact("h03-fp32"), "ort"), load_external_data=False).graph
        sizes = {node.name for node in graph.node if node.op_type == "Shape"}
        after = {node.name for node in graph.node if sizes & set(node.input)}
        assert sizes | after == (set(onnxruntime_cuda._SHAPES) if batch == "dynamic" else set())


def test_a_release_that_cannot_be_asked_is_not_usable(runner, runtime):
    """As 1.23, which computes on the processor what its CUDA provider does not take, and does not tell."""
    import onnxruntime

    delattr(onnxruntime.InferenceSession, TELLS)
    onnxruntime_cuda._why_no_provider.cache_clear()
    assert "does not tell what it computes on the processor, as 1.24 and newer do" in runner.why_not()


def test_it_records_where_each_node_runs(runner, runtime, opened):  # noqa: F811
    with runner.open(model(opened, runner), Options()):
        assert entry(runtime.last.options, "session.record_ep_graph_assignment_info") == "1"


def test_nothing_reaches_stdout(runner, runtime, opened, capfd):  # noqa: F811
    runtime.printed = LACKING
    onnxruntime_cuda._why_no_provider.cache_clear()
    assert runner.why_not()
    runtime.printed = PRELOADED
    onnxruntime_cuda._why_no_provider.cache_clear()
    with runner.open(model(opened, runner), Options()) as session:
        session.run(images(opened)[:1])
    assert runtime.preloads == 3
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("graph", ["off", "on"])
def test_memory_is_taken_when_it_opens_and_no_call_takes_more(runner, opened, cuda, graph):  # noqa: F811
    with opened_with(runner, model(opened, runner), graph=graph) as session:
        live, used = cuda.live(), cuda.used()
        for at in range(3):
            session.run(images(opened)[at : at + 1])
        assert (cuda.live(), cuda.used()) == (live, used)
    assert cuda.used() == 0


def test_a_graph_is_captured_when_it_opens_and_replayed_from_the_same_memory(runner, runtime, opened):  # noqa: F811
    with opened_with(runner, model(opened, runner), graph="on") as session:
        assert runtime.last.runs == [("1", True)]
        session.run(images(opened)[:1])
        session.run(images(opened)[1:2])
        assert runtime.last.runs[1:] == [("1", False)] * 2
    with opened_with(runner, model(opened, runner), graph="off"):
        assert runtime.last.runs == [(None, True)]


def test_graphs_are_of_the_first_batch_sizes_and_memory_of_the_last(runner, runtime, supernet_file, tmp_path, cuda):
    made = export(supernet_file, tmp_path / "b", heads=(2,), batch="dynamic")
    target, expected = model(made, runner, "h02-fp32"), made.golden().logits["h02-fp32"]
    with opened_with(runner, target, graph="on") as session:
        assert cuda.live().get("memory") is None
        for size in (1, 2, 3, 4, 5, 6, 5, 1):
            logits = session.run(images(made)[:size])
            np.testing.assert_allclose(logits, expected[:size], atol=1e-5 * np.abs(expected).max())
            assert cuda.live()["memory"] <= 2 * 4
        numbers = [number for number, waits in runtime.last.runs if waits]
        assert numbers == ["1", "2", "3", "4", "-1", "-1", "-1"]


def test_a_full_memory_is_the_environments_fault_and_gives_all_back(runner, runtime, opened, cuda):  # noqa: F811
    cuda.fake.fake_limit(10)
    with pytest.raises(EnvironmentFailed, match=r"cannot open .*h04-fp32.*: cuda\w+: out of memory"):
        runner.open(model(opened, runner), Options())
    cuda.fake.fake_limit(1 << 40)
    for words in (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 38535168",
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
    ):
        runtime.raises = RuntimeError(words)
        with pytest.raises(EnvironmentFailed, match=r"cannot open .*: the GPU's memory is full") as failed:
            runner.open(model(opened, runner), Options())
        assert failed.value.exit_code is ExitCode.ENVIRONMENT
        assert cuda.live() == {}


def test_what_fails_while_it_runs_is_one_error_and_the_session_can_be_closed(runner, runtime, opened, cuda):  # noqa: F811
    target = model(opened, runner)
    with runner.open(target, Options()) as session:
        for words, told in (
            (
                "/x.cc:154 int CudaCall() [with T = int] CUDA failure 700: an illegal access ; GPU=0 ; hostname=here",
                "CUDA failure 700: an illegal access",
            ),
            (
                "Non-zero status code while running Conv node. Name:'embed.conv'\n{json}",
                "Non-zero status code while running Conv node. Name:'embed.conv'",
            ),
        ):
            runtime.raises = RuntimeError(words)
            with pytest.raises(MissingError) as failed:
                session.run(images(opened)[:1])
            assert failed.value.message == f"onnxruntime-cuda cannot run {target.graph}: {told}"
        runtime.raises = None
        cuda.fail("cudaMemcpyAsync", 700)
        with pytest.raises(MissingError, match=r"cannot run .*: cudaMemcpyAsync: "):
            session.run(images(opened)[:1])
    assert cuda.live() == {}


def test_sessions_beside_each_other_have_their_own_stream_and_memory(runner, runtime, opened):  # noqa: F811
    targets = [model_of(opened, opened.artifact(f"h{k:02d}-fp32"), "ort") for k in (2, 3, 4)]
    sessions = [runner.open(target, Options()) for target in targets]
    assert len({each.given["user_compute_stream"] for each in runtime.opened}) == len(targets)
    for session, target in zip(sessions, targets, strict=True):
        expected = opened.golden().logits[target.name]
        np.testing.assert_allclose(
            run_all(session, target, images(opened)), expected, atol=1e-4 * np.abs(expected).max()
        )
        session.__exit__(None, None, None)


def test_it_is_usable_where_gpu_provider_and_libraries_are(runtime, cuda, name, monkeypatch):
    def reason() -> str | None:
        onnxruntime_cuda._why_no_provider.cache_clear()
        return onnxruntime_cuda.BACKEND.why_not()

    assert reason() is None
    runtime.printed = LACKING
    assert (reason() or "").endswith("brings: libcurand.so.10: cannot open shared object file")
    runtime.printed = PRELOADED + LACKING.replace("curand.so.10", "cublas.so.13")
    assert (reason() or "").endswith("brings: truncated"), "what is wrong with the one that is there"
    runtime.available = [CPU]
    assert "computes on the processor only; onnxruntime-gpu, the same module, does on both" in (reason() or "")
    before = runtime.preloads
    cuda.fake.fake_devices(0, 100)
    assert reason() == "no CUDA device: none"
    assert runtime.preloads == before
    monkeypatch.setattr(onnxruntime_cuda, "find_spec", lambda package: None)
    assert reason() == "the package onnxruntime is not installed"
    with pytest.raises(MissingError, match="onnxruntime-cuda: the package onnxruntime is not installed") as refused:
        backend(name)
    assert refused.value.hint == "on a machine with an NVIDIA GPU: pip install 'hydradeploy[cuda]'"


def test_doctor_says_in_one_line_why_it_is_not_usable(runtime, name):
    runtime.printed = LACKING
    reason = onnxruntime_cuda.BACKEND.why_not()
    (row,) = software.backends(SimpleNamespace(backends={name: Absent(reason, "cuda")}, has_nvidia=True))
    assert (row.name, row.found) == (name, reason)
    assert row.fix == "pip install 'hydradeploy[cuda]'"
    assert "\n" not in row.found


def test_it_is_refused_where_it_is_not_usable_although_opened_directly(runtime, cuda, opened):  # noqa: F811
    cuda.fake.fake_devices(0, 100)
    runner = onnxruntime_cuda.BACKEND
    for action in (runner.prepare, lambda: runner.open(model(opened, runner), Options())):
        with pytest.raises(MissingError, match="onnxruntime-cuda cannot run here: no CUDA device: none"):
            action()


def test_its_software_is_onnx_runtime_and_cuda(runner):
    import onnxruntime

    assert runner.software() == {"onnxruntime": onnxruntime.__version__, "cuda": "12.6", "cuda-driver": "12.6"}


def test_preparing_asks_the_provider_for_memory(runner, monkeypatch):
    import onnxruntime

    asked = []

    def values(*arguments: object) -> None:
        asked.append(arguments)
        if len(asked) == 2:
            raise RuntimeError("CUDA Provider not available, can't get interface for it\n")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", values)
    runner.prepare()
    with pytest.raises(
        MissingError, match=r"cannot run here: CUDA Provider not available, can't get interface for it$"
    ):
        runner.prepare()
    assert asked == [((1,), np.float32, "cuda", 0)] * 2


def test_the_first_backend_for_a_gpu_is_still_another_one():
    order = list(BACKEND_MODULES)
    assert order.index("onnxruntime-cuda") > max(map(order.index, ("torch-cuda", "tensorrt", "tensorrt-rtx")))


def test_the_version_is_the_modules_although_another_distribution_is_installed(tmp_path):
    """onnxruntime and onnxruntime-gpu are one module; metadata tells of both."""
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text('"""Ours."""\n__version__ = "9.8.7"\nraise ImportError("was imported")\n')
    code = """
        from hydradeploy.backends import backend
        print(backend("onnxruntime").software())
    """
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "{'onnxruntime': '9.8.7'}\n", ran.stderr
