"""OpenVINO on the CPU.

Two of its habits are kept from the process it runs in. Importing it writes to the home directory and sends an event to
its makers. And its processor plugin, loaded once per Core, gives the thread another stack for signal handlers and takes
it back only where Cores go in the reverse order of their making; in another order the next handled signal, a Ctrl-C for
one, runs on memory that is gone. So there is one Core, which stays, and the thread keeps the stack that it had.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Model, Options, check_input, check_options, read_ahead, with_defaults
from hydradeploy.bundle import Dialect
from hydradeploy.devices.cpu import features
from hydradeploy.errors import MissingError

# What OpenVINO calls the type that everything but int8 products is computed in.
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


class _Session:
    def __init__(self, model: Model, options: Options) -> None:
        core = _core()
        import openvino

        chosen = with_defaults(BACKEND, options, model.precision)
        kind = str(chosen.compute_type)
        properties = {
            # Never left to OpenVINO, which takes a narrower type than the graph's where the processor has one.
            "INFERENCE_PRECISION_HINT": _HINTS[kind],
            "PERFORMANCE_HINT": chosen.settings["hint"].upper(),
        }
        if chosen.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = str(chosen.threads)
        self._model = model
        read_ahead(model)
        try:
            compiled = core.compile_model(str(model.graph), "CPU", properties)
            self._compiled: Any = compiled
            self._free: list[Any] = [compiled.create_infer_request()]
            used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            threads = compiled.get_property("INFERENCE_NUM_THREADS")
            streams = compiled.get_property("NUM_STREAMS")
        except Exception as error:
            raise MissingError(f"openvino cannot open {model.graph}: {_last_line(error)}") from error
        if used != _HINTS[kind]:
            raise MissingError(f"openvino computes {model.name} in {used} here, not in {kind}")
        self._facts = {
            "openvino": str(openvino.__version__),
            "device": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
            # Those it uses, which may be fewer than it was told.
            "threads": "default" if options.threads is None else str(threads),
            "streams": str(streams),
            "compute_type": kind,
            **chosen.settings,
        }

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compiled, self._free = None, []

    def run(self, images: Images) -> NDArray[np.float32]:
        if self._compiled is None:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        try:
            request = self._request()
            found = request.infer({"image": np.ascontiguousarray(images)}, share_inputs=True)
        except Exception as error:
            raise MissingError(f"openvino cannot run {self._model.graph}: {_last_line(error)}") from error
        logits: NDArray[np.float32] = found["logits"]
        self._free.append(request)
        return logits

    def _request(self) -> Any:
        """One that nobody else has, for it refuses a second caller."""
        try:
            return self._free.pop()
        except IndexError:
            return self._compiled.create_infer_request()

    def facts(self) -> Mapping[str, str]:
        return self._facts


class _Openvino:
    name = "openvino"
    dialect: Dialect = "ort"
    processor = "cpu"
    settings: Mapping[str, tuple[str, ...]] = {"hint": ("latency", "throughput")}

    def compute_types(self, precision: str) -> tuple[str, ...]:
        has = _capabilities()
        narrow = tuple(name for name in ("bf16", "fp16") if name.upper() in has)
        if precision == "fp32":
            return ("fp32", *narrow)
        if precision in ("fp16", "bf16"):
            return (precision, "fp32") if precision in narrow else ("fp32",)
        # Ranges found at run time it computes apart from the products, slower than the same in fp32.
        return ("int8",) if precision == "int8" and "INT8" in has else ()

    def why_not(self) -> str | None:
        return None if find_spec("openvino") else "the package openvino is not installed"

    def software(self) -> Mapping[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return {"openvino": version("openvino")}
        except PackageNotFoundError:  # of Intel's archive, which pip knows nothing of
            _core()
            import openvino

            return {"openvino": str(openvino.__version__)}

    def prepare(self) -> None:
        _core()

    def open(self, model: Model, options: Options) -> _Session:
        check_options(self, options, model.precision)
        if model.precision == "int8" and model.batch == "dynamic" and "amx_int8" in features():
            raise MissingError(
                f"{model.name}: openvino crashes on this processor's AMX with int8 and any number of images",
                hint="export it with a fixed --batch",
            )
        return _Session(model, options)


BACKEND = _Openvino()

_lock = threading.Lock()


def _core() -> Any:
    """The Core of this process."""
    with _lock:
        return _made()


@cache
def _made() -> Any:
    with _untold():
        import openvino

    with _own_signal_stack():
        core = openvino.Core()
        try:
            core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin
        except RuntimeError as error:
            raise MissingError(f"openvino cannot start: {_last_line(error)}") from error
    return core


def _capabilities() -> tuple[str, ...]:
    return tuple(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@contextmanager
def _untold() -> Iterator[None]:
    """Within it, the package that sends telemetry cannot be imported; OpenVINO then does without."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """After it, this thread's signal handlers run on the stack that they ran on before."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def _last_line(error: Exception) -> str:
    """The cause: OpenVINO tells it last, after where in its source it was noticed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
