"""Plans become engines, after CUDA has said that there is a GPU: without one TensorRT can crash the process."""

from __future__ import annotations

from typing import Any

from hydradeploy.engines import cudart
from hydradeploy.engines.logger import errors, logger
from hydradeploy.errors import MissingError


def load(trt: Any, plan: bytes) -> tuple[Any, Any, Any]:
    """Engine, runtime and logger, to be kept alive together and dropped in that order.

    Raises MissingError without a GPU and for what TensorRT refuses: another GPU's plan, another version's, damage.
    """
    reason = cudart.why_no_gpu()
    if reason is not None:
        raise MissingError(reason)
    log = logger(trt)
    errors(log)  # of before
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    # None is all that TensorRT says of it.
    if engine is None:
        raise MissingError(f"TensorRT refuses the plan: {errors(log)}")
    return engine, runtime, log
