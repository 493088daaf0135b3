"""Plans become engines, after CUDA has said that there is a GPU: without one TensorRT can crash the process."""

from __future__ import annotations

from typing import Any

from hydradeploy.engines import cudart
from hydradeploy.errors import MissingError


def load(trt: Any, plan: bytes) -> tuple[Any, Any, Any]:
    """Engine, runtime and logger, to be kept alive together and dropped in that order.

    Raises MissingError without a GPU and for what TensorRT refuses: another GPU's plan, another version's, damage.
    """
    reason = cudart.why_no_gpu()
    if reason is not None:
        raise MissingError(reason)
    log = _logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    # None is all that TensorRT says of it.
    if engine is None:
        raise MissingError(f"TensorRT refuses the plan: {errors(log)}")
    return engine, runtime, log


def errors(log: Any) -> str:
    """What a logger of `load`'s has heard since it was last asked, in one line."""
    said, log.lines = log.lines, []
    return "; ".join(said)[:800] or "it logged no reason"


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if str(severity).rsplit(".", 1)[-1] in ("ERROR", "INTERNAL_ERROR"):
                self.lines.append(" ".join(message.split()))

    return Logger()
