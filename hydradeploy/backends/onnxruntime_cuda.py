"""ONNX Runtime on the first GPU, through its CUDA provider and without torch.

ONNX Runtime computes on the processor in silence what its CUDA provider does not take, all of it where the provider
cannot be loaded. Here that is an error: a session is opened only when every node that computes is CUDA's.

Images go through memory of the host that the system does not move, and copies and kernels are on one stream, whose
events take the time on the GPU without the copies.
"""

from __future__ import annotations

import io
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache
from importlib.util import find_spec
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import (
    Images,
    Model,
    Options,
    check_input,
    check_options,
    check_usable,
    read_ahead,
    with_defaults,
)
from hydradeploy.backends.onnxruntime import ERRORS_ONLY, first_line, version
from hydradeploy.bundle import Dialect
from hydradeploy.engines import cudart
from hydradeploy.engines.cudart import AMPERE, Cuda
from hydradeploy.engines.execution import DeviceTensor
from hydradeploy.engines.lanes import SIZES, Lanes
from hydradeploy.errors import EnvironmentFailed, HydraError, MissingError
from hydradeploy.units import show_cuda_version

_PROVIDER = "CUDAExecutionProvider"
# CUDA counts the GPUs that CUDA_VISIBLE_DEVICES leaves; the others here take the first one too.
_DEVICE = 0
_CONVOLUTION = {"exhaustive": "EXHAUSTIVE", "heuristic": "HEURISTIC", "default": "DEFAULT"}
# The names of what computes the shape of a dynamic batch, which ONNX Runtime puts on the processor on purpose.
_SHAPES = ("batch", "embed.class.shape")
# Calls whose time on the GPU is remembered.
_TIMES = 101
_NOT_CAPTURED = "-1"
_CUDA_FAILED = re.compile(r"CUDA failure \d+: [^;\n]*[^;\s]")
_MEMORY_IS_FULL = re.compile("out of memory|Failed to allocate memory|smaller than requested bytes")
# A capture fails where another thread of the process asks CUDA for memory meanwhile.
_lock = threading.RLock()


class _Session:
    def __init__(self, model: Model, options: Options) -> None:
        chosen = with_defaults(BACKEND, options, model.precision)
        if model.graph is None:
            raise MissingError(f"{BACKEND.name} runs graphs, and {model.name} has none")
        self._model, self._cuda = model, cudart.load()
        self._graphs = chosen.settings["graph"] == "on"
        self._captured = 0
        self._lanes = Lanes(self._new_lane)
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._session: Any = None
        read_ahead(model)
        with _lock, _said_so(f"{BACKEND.name} cannot open {model.graph}"), ExitStack() as undo:
            self._stream = undo.enter_context(self._cuda.stream())
            self._start, self._end = (undo.enter_context(self._cuda.event()) for _ in range(2))
            undo.callback(self._forget)
            self._session = _opened(model, chosen, self._stream.address)
            if model.batch != "dynamic":
                self._lanes.of(model.batch)
            self._facts = {
                "onnxruntime": version(),
                "provider": _PROVIDER,
                "gpu": self._cuda.gpu().name,
                "threads": "default" if options.threads is None else str(options.threads),
                "compute_type": str(chosen.compute_type),
                **chosen.settings,
            }
            self._undo = undo.pop_all()

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._undo.close()

    def _forget(self) -> None:
        """What is bound to the session, then the session, before the stream that it computes on."""
        self._lanes.close()
        self._session = None

    def run(self, images: Images) -> NDArray[np.float32]:
        if self._session is None:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        with _lock, _said_so(f"{BACKEND.name} cannot run {self._model.graph}"):
            return self._run(images)

    def _run(self, images: Images) -> NDArray[np.float32]:
        lane, cuda, stream = self._lanes.of(len(images)), self._cuda, self._stream
        lane.images.fill(images)
        lane.images.copy_in(cuda, stream)
        cuda.record(self._start, stream)
        self._session.run_with_iobinding(lane.binding, lane.options)
        cuda.record(self._end, stream)
        lane.logits.copy_out(cuda, stream)
        cuda.wait(stream)
        self._times.append(cuda.elapsed_s(self._start, self._end))
        return lane.logits.array.copy()

    def _new_lane(self, batch: int) -> _Lane:
        """Ready: kernels chosen, memory taken, and captured, all of which the first run does."""
        number = None
        if self._graphs:
            self._captured += 1
            # Graphs that are captured are never given back, so that there must not be one for every size.
            number = str(self._captured) if self._captured <= SIZES else _NOT_CAPTURED
        lane = _Lane(self._cuda, self._session, self._model, batch, number)
        try:
            # With the options that let it wait for the GPU: what goes wrong is told here.
            self._session.run_with_iobinding(lane.binding, _run_options(number))
        except BaseException:
            lane.close()
            raise
        return lane

    def facts(self) -> Mapping[str, str]:
        """With the median time of the last calls on the GPU, copies apart."""
        return self._facts | ({"device_s": f"{median(self._times):.6g}"} if self._times else {})


class _OnnxruntimeCuda:
    name = "onnxruntime-cuda"
    dialect: Dialect = "ort"
    processor = "cuda"
    settings: Mapping[str, tuple[str, ...]] = {"graph": ("off", "on"), "convolution": tuple(_CONVOLUTION)}

    def compute_types(self, precision: str) -> tuple[str, ...]:
        if precision == "fp16":
            return ("fp16",)
        # Graphs of bf16 weights widen them when they are loaded. It has no kernels for products of int8.
        if precision not in ("fp32", "bf16"):
            return ()
        return ("fp32", "tf32") if cudart.load().gpu().generation >= AMPERE else ("fp32",)

    def why_not(self) -> str | None:
        if not find_spec("onnxruntime"):
            return "the package onnxruntime is not installed"
        # Asked of CUDA before ONNX Runtime is imported, for most machines have no GPU.
        return cudart.why_no_gpu() or _why_no_provider()

    def software(self) -> Mapping[str, str]:
        found = {"onnxruntime": version()}
        for what, number in zip(("cuda", "cuda-driver"), cudart.load().versions(), strict=True):
            if number:
                found[what] = show_cuda_version(number)
        return found

    def prepare(self) -> None:
        import onnxruntime

        check_usable(self)
        # The provider's library is loaded, and CUDA's context made, by the first who asks it for memory.
        with _said_so(f"{self.name} cannot run here"):
            onnxruntime.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, "cuda", _DEVICE)

    def open(self, model: Model, options: Options) -> _Session:
        check_options(self, options, model.precision)
        return _Session(model, options)


BACKEND = _OnnxruntimeCuda()


class _Lane:
    """A batch size: where its images and logits are, always the same, and the binding that says so to the session.

    `number` is its CUDA graph's, None where none are captured.
    """

    def __init__(self, cuda: Cuda, session: Any, model: Model, batch: int, number: str | None) -> None:
        self.options, self.binding = _run_options(number), session.io_binding()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with ExitStack() as undo:
            self.images = DeviceTensor(cuda, (batch, *model.image_shape), np.dtype(model.input))
            undo.callback(self.images.close)
            self.logits = DeviceTensor(cuda, (batch, model.classes), np.dtype(np.float32))
            undo.callback(self.logits.close)
            for bind, name, one in (
                (self.binding.bind_input, "image", self.images),
                (self.binding.bind_output, "logits", self.logits),
            ):
                bind(name, "cuda", _DEVICE, one.array.dtype.type, one.array.shape, one.address)
            self._undo = undo.pop_all()

    def close(self) -> None:
        self.binding = None
        self._undo.close()


def _opened(model: Model, chosen: Options, stream: int) -> Any:
    """A session of which nothing that computes is on the processor; raises MissingError for any other."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if chosen.threads is not None:
        options.intra_op_num_threads = chosen.threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(model.graph),
        options,
        providers=[(_PROVIDER, _provider_options(chosen, stream))],
        # Or it tries again on the processor, and says so on stdout.
        enable_fallback=0,
    )
    has = list(session.get_providers())
    if _PROVIDER not in has:
        raise MissingError(
            f"ONNX Runtime cannot load its CUDA provider, and would compute with {', '.join(has)}",
            hint="what it says of the reason is above, on stderr",
        )
    elsewhere = _elsewhere(session)
    if elsewhere:
        raise MissingError(
            f"its CUDA provider does not take {_few(elsewhere)}, which would run on the processor",
            hint="newer releases of onnxruntime-gpu have more kernels",
        )
    return session


def _provider_options(chosen: Options, stream: int) -> dict[str, str]:
    return {
        "device_id": str(_DEVICE),
        # On by default, where fp32 would not be fp32.
        "use_tf32": "1" if chosen.compute_type == "tf32" else "0",
        "cudnn_conv_algo_search": _CONVOLUTION[chosen.settings["convolution"]],
        "enable_cuda_graph": "1" if chosen.settings["graph"] == "on" else "0",
        "user_compute_stream": str(stream),
    }


def _run_options(number: str | None) -> Any:
    import onnxruntime

    found = onnxruntime.RunOptions()
    if number is not None:
        found.add_run_config_entry("gpu_graph_id", number)
    return found


def _elsewhere(session: Any) -> list[str]:
    """The nodes that compute and are not CUDA's, as `MatMul blocks.0.mlp.fc1`."""
    return [
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != _PROVIDER
        for node in part.get_nodes()
        if node.name not in _SHAPES
    ]


def _few(names: list[str], at_most: int = 3) -> str:
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _said_so(what: str) -> Iterator[None]:
    """One error of ours for whatever CUDA and ONNX Runtime raise, whose exceptions have no common base."""
    try:
        yield
    except HydraError as error:
        kind = EnvironmentFailed if isinstance(error, EnvironmentFailed) else MissingError
        raise kind(f"{what}: {error.message}", hint=error.hint) from error
    except Exception as error:
        if _MEMORY_IS_FULL.search(str(error)):
            raise EnvironmentFailed(f"{what}: the GPU's memory is full", hint="close other sessions") from error
        # What it says of a call of CUDA's has the C++ function before it, and after it the machine's name.
        cuda = _CUDA_FAILED.search(str(error))
        raise MissingError(f"{what}: {cuda[0] if cuda else first_line(error)}") from error


@cache
def _why_no_provider() -> str | None:
    """None where this build of ONNX Runtime has a CUDA provider and the libraries it needs are loaded."""
    import onnxruntime

    if _PROVIDER not in onnxruntime.get_available_providers():
        return f"onnxruntime {version()} computes on the processor only; onnxruntime-gpu, the same module, does on both"
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        # Up to 1.23, whose provider also has no kernel for the Attention of the graphs here.
        return f"onnxruntime {version()} does not tell what it computes on the processor, as 1.24 and newer do"
    # It warns of each way that it looks for the provider.
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    said = io.StringIO()
    with redirect_stdout(said):
        onnxruntime.preload_dlls()
    # First it tries the libraries of packages, by their path, then those that the loader finds.
    failed = re.findall(r"^Failed to load (\S+): (.+)$", said.getvalue(), re.MULTILINE)
    missing = next((name for name, _ in failed if "/" not in name), None)
    if missing is None:
        return None
    reason = next(words for path, words in failed if path.rpartition("/")[2] == missing)
    return f"ONNX Runtime lacks a library of CUDA's, which 'onnxruntime-gpu[cuda,cudnn]' brings: {reason}"
