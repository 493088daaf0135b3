"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Model, Options, check_input, check_options, read_ahead, with_defaults
from hydradeploy.bundle import Dialect
from hydradeploy.devices.cpu import features
from hydradeploy.errors import MissingError

ERRORS_ONLY = 3
# Its telemetry is on by default, with a database in the home directory. To be set before the package is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}


class _Session:
    def __init__(self, model: Model, options: Options) -> None:
        import onnxruntime

        chosen = with_defaults(BACKEND, options, model.precision)
        self._model = model
        self._facts = {
            "onnxruntime": str(onnxruntime.__version__),
            "provider": "CPUExecutionProvider",
            "threads": "default" if options.threads is None else str(options.threads),
            "compute_type": str(chosen.compute_type),
            **chosen.settings,
        }
        read_ahead(model)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model.graph), _session_options(chosen), providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime's exceptions have no common base below Exception.
        except Exception as error:
            raise MissingError(f"onnxruntime cannot open {model.graph}: {first_line(error)}") from error

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, images: Images) -> NDArray[np.float32]:
        if self._session is None:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        try:
            logits: NDArray[np.float32] = self._session.run(["logits"], {"image": np.ascontiguousarray(images)})[0]
        except Exception as error:
            raise MissingError(f"onnxruntime cannot run {self._model.graph}: {first_line(error)}") from error
        return logits

    def facts(self) -> Mapping[str, str]:
        return self._facts


class _Onnxruntime:
    name = "onnxruntime"
    dialect: Dialect = "ort"
    processor = "cpu"
    settings: Mapping[str, tuple[str, ...]] = {
        "spinning": ("on", "off"),
        "arena": ("on", "off"),
        "optimisation": tuple(_LEVELS),
    }

    def compute_types(self, precision: str) -> tuple[str, ...]:
        if precision not in ("fp32", "bf16"):
            return (precision,)
        # Graphs of bf16 weights widen them when they are loaded. Products in bfloat16 are an option of its kernels for
        # ARM, which it ignores in silence where the processor has none.
        narrow = platform.machine() == "aarch64" and "bf16" in features()
        return ("fp32", "bf16") if narrow else ("fp32",)

    def why_not(self) -> str | None:
        return None if find_spec("onnxruntime") else "the package onnxruntime is not installed"

    def software(self) -> Mapping[str, str]:
        return {"onnxruntime": version()}

    def prepare(self) -> None:
        import onnxruntime

        onnxruntime.SessionOptions()

    def open(self, model: Model, options: Options) -> _Session:
        check_options(self, options, model.precision)
        return _Session(model, options)


BACKEND = _Onnxruntime()


def version() -> str:
    """The module's own, without importing it: of two distributions that hold it, the one installed last is there."""
    spec = find_spec("onnxruntime")
    if spec is not None and spec.origin:
        found = re.search(r'^__version__ = "(.+)"$', Path(spec.origin).read_text(), re.MULTILINE)
        if found:
            return found[1]
    import onnxruntime

    return str(onnxruntime.__version__)


def _session_options(chosen: Options) -> Any:
    import onnxruntime

    found = onnxruntime.SessionOptions()
    found.log_severity_level = ERRORS_ONLY
    if chosen.threads is not None:
        found.intra_op_num_threads = chosen.threads
    found.enable_cpu_mem_arena = chosen.settings["arena"] == "on"
    level = _LEVELS[chosen.settings["optimisation"]]
    found.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    spinning = "1" if chosen.settings["spinning"] == "on" else "0"
    found.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    if chosen.compute_type == "bf16":
        found.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
    return found


def first_line(error: Exception) -> str:
    """Of what it says, its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
