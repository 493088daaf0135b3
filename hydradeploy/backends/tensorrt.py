"""TensorRT, and TensorRT for RTX, on the first GPU; without torch.

An artifact's engine is found in the cache or built by `engines.building`. The plan has the weights in it; one without
would be refitted from `Model.weights` between `plan_of` and `Execution`, and needs nothing else of a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Model, Options, check_input, check_options, read_ahead, with_defaults
from hydradeploy.bundle import Dialect
from hydradeploy.engines import cudart, loading, module
from hydradeploy.engines.building import plan_of
from hydradeploy.engines.cudart import AMPERE
from hydradeploy.engines.execution import Execution
from hydradeploy.engines.module import RTX, RTX_CAPABILITIES, TENSORRT
from hydradeploy.errors import EnvironmentFailed, HydraError, MissingError
from hydradeploy.units import show_cuda_version

# What each precision is to TensorRT. A version without the type has no kernels for it.
_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}
# Those whose products came with Ampere.
_SINCE_AMPERE = ("bf16", "tf32")


class _Session:
    def __init__(self, runner: TensorRT, model: Model, options: Options) -> None:
        chosen = with_defaults(runner, options, model.precision)
        self._model, self._chosen = model, chosen
        if model.graph is None:
            raise MissingError(f"{runner.name} runs graphs, and {model.name} has none")
        trt, cuda = module.module(runner.name), cudart.load()
        self._facts = {
            runner.name: module.version(runner.name),
            "gpu": cuda.gpu().name,
            "compute_type": str(chosen.compute_type),
            **chosen.settings,
        }
        read_ahead(model)
        try:
            plan = plan_of(runner.name, model, model.graph.parent, str(chosen.compute_type))
            loaded = loading.load(trt, plan)
            self._execution: Execution | None = Execution(
                trt,
                cuda,
                loaded,
                image_shape=model.image_shape,
                dtype=model.input,
                classes=model.classes,
                batch=None if model.batch == "dynamic" else model.batch,
                graph=chosen.settings["graph"] == "on",
            )
        except (MissingError, EnvironmentFailed) as error:
            kind = EnvironmentFailed if isinstance(error, EnvironmentFailed) else MissingError
            raise kind(f"{runner.name} cannot open {model.graph}: {error.message}", hint=error.hint) from error

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._execution is not None:
            self._execution.close()
        self._execution = None

    def run(self, images: Images) -> NDArray[np.float32]:
        if self._execution is None:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        return self._execution.run(images)

    def facts(self) -> Mapping[str, str]:
        """With the bytes that the engine's context computes in and those all engines here share, and with the median
        time on the GPU, copies apart. `graph` is off where a capture failed, `graph_failed` says why."""
        found, execution = dict(self._facts), self._execution
        if execution is not None:
            found["context_bytes"], found["scratch_bytes"] = str(execution.context_bytes), str(execution.scratch_bytes)
            if execution.graph_failed:
                found |= {"graph": "off", "graph_failed": execution.graph_failed}
            if execution.device_s is not None:
                found["device_s"] = f"{execution.device_s:.6g}"
        return found


class TensorRT:
    """A backend of the kind `name`: `tensorrt` or `tensorrt-rtx`."""

    dialect: Dialect = "trt"
    processor = "cuda"
    settings: Mapping[str, tuple[str, ...]] = {"graph": ("on", "off")}

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self) -> str | None:
        # Asked of CUDA alone: TensorRT can crash the process where there is no GPU.
        reason = module.why_not(self.name) or cudart.why_no_gpu()
        if reason is not None or self.name != RTX:
            return reason
        try:
            gpu = cudart.load().gpu()
        except HydraError as error:
            return error.message
        if gpu.capability in RTX_CAPABILITIES:
            return None
        has = ", ".join(RTX_CAPABILITIES)
        return f"TensorRT for RTX does not run on {gpu.name} of compute capability {gpu.capability}, only on {has}"

    def compute_types(self, precision: str) -> tuple[str, ...]:
        kind = _TYPES.get(precision)
        if kind is None or not hasattr(module.module(self.name).DataType, kind):
            return ()
        ampere = cudart.load().gpu().generation >= AMPERE
        types = ("fp32", "tf32") if precision == "fp32" else (precision,)
        return tuple(name for name in types if ampere or name not in _SINCE_AMPERE)

    def software(self) -> Mapping[str, str]:
        found = {self.name: _version(self.name)}
        for what, version in zip(("cuda", "cuda-driver"), cudart.load().versions(), strict=True):
            if version:
                found[what] = show_cuda_version(version)
        return found

    def prepare(self) -> None:
        module.module(self.name)
        # CUDA makes its context with the first memory it is asked for.
        cudart.load().allocate(1).close()

    def open(self, model: Model, options: Options) -> _Session:
        check_options(self, options, model.precision)
        return _Session(self, model, options)


BACKEND = TensorRT(TENSORRT)


def _version(kind: str) -> str:
    """Without importing it where a distribution tells: NVIDIA's names have the CUDA version in them."""
    from importlib.metadata import PackageNotFoundError, version

    for distribution in (kind, f"{kind}-cu13", f"{kind}-cu12", f"{kind}-cu13-bindings", f"{kind}-cu12-bindings"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    return module.version(kind)
