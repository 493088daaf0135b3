"""TensorRT for RTX, on desktop cards: the same session, another module and other plans."""

from __future__ import annotations

from hydradeploy.backends.tensorrt import TensorRT
from hydradeploy.engines.module import RTX

BACKEND = TensorRT(RTX)
