"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Model, Options, check_input, read_ahead
from hydradeploy.bundle import Dialect
from hydradeploy.errors import MissingError

_ERRORS_ONLY = 3
# Its telemetry is on by default, with a database in the home directory. To be set before the package is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class _Session:
    def __init__(self, model: Model, options: Options) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        self._model = model
        self._facts = {
            "onnxruntime": str(onnxruntime.__version__),
            "provider": "CPUExecutionProvider",
            "threads": "default" if options.threads is None else str(options.threads),
        }
        read_ahead(model)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model.graph), settings, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime's exceptions have no common base below Exception.
        except Exception as error:
            raise MissingError(f"onnxruntime cannot open {model.graph}: {_first_line(error)}") from error

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._session is None:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        try:
            logits: NDArray[np.float32] = self._session.run(["logits"], {"image": np.ascontiguousarray(images)})[0]
        except Exception as error:
            raise MissingError(f"onnxruntime cannot run {self._model.graph}: {_first_line(error)}") from error
        return logits

    def facts(self) -> Mapping[str, str]:
        return self._facts


class _Onnxruntime:
    name = "onnxruntime"
    dialect: Dialect = "ort"
    processor = "cpu"

    def why_not(self) -> str | None:
        return None if find_spec("onnxruntime") else "the package onnxruntime is not installed"

    def software(self) -> Mapping[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        # The same module comes in several distributions.
        for distribution in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-training"):
            with suppress(PackageNotFoundError):
                return {"onnxruntime": version(distribution)}
        import onnxruntime

        return {"onnxruntime": str(onnxruntime.__version__)}

    def prepare(self) -> None:
        import onnxruntime

        onnxruntime.SessionOptions()

    def open(self, model: Model, options: Options) -> _Session:
        return _Session(model, options)


BACKEND = _Onnxruntime()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
