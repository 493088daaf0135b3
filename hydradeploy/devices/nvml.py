"""NVIDIA's management library: which GPU is CUDA's first, and questions to it of which each may fail on its own.

Initialised at the first question and again in a forked process, for its state does not survive a fork. Spoken to
through nvidia-ml-py (module `pynvml`): https://docs.nvidia.com/deploy/nvml-api/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

_Answer = TypeVar("_Answer")

_REASONS = {
    "NVMLError_NotSupported": "this GPU or its driver does not support it",
    "NVMLError_NoPermission": "no permission",
    "NVMLError_FunctionNotFound": "the driver is too old for it",
    "NVMLError_LibraryNotFound": "the driver's libnvidia-ml.so.1 is not here",
    "NVMLError_DriverNotLoaded": "the driver is not loaded",
}


class Untold(Exception):
    """An answer that is none, such as 0 W; says why."""


class _Gpu(NamedTuple):
    """`library` and `handle` are NVML's; `why_not` is None where they are there."""

    library: Any
    handle: Any
    why_not: str | None


def load() -> Any:
    """The module; raises ImportError."""
    return import_module("pynvml")


@dataclass
class Nvml:
    """`problems` says why a question had no answer, by the name of what was asked for."""

    load: Callable[[], Any] = load
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    problems: dict[str, str] = field(default_factory=dict)
    _opened: dict[int, _Gpu] = field(default_factory=dict)

    def why_not(self) -> str | None:
        """None where there is a GPU, else what was looked for."""
        return self._gpu().why_not

    def ask(self, what: str, *ways: Callable[[Any, Any], _Answer]) -> _Answer | None:
        """What the first way answers that does, given the library and the GPU; never raises."""
        library, handle, why_not = self._gpu()
        reasons = []
        for way in ways if why_not is None else ():
            try:
                answer = way(library, handle)
            except Exception as error:  # of ctypes too: no answer of a driver may end a measurement
                reasons.append(_reason(error))
            else:
                self.problems.pop(what, None)
                return answer
        self.problems[what] = why_not or "; ".join(dict.fromkeys(reasons))
        return None

    def _gpu(self) -> _Gpu:
        process = os.getpid()
        if process not in self._opened:
            self._opened = {process: self._open()}
        return self._opened[process]

    def _open(self) -> _Gpu:
        try:
            library = self.load()
        except ImportError:
            return _Gpu(None, None, "looked for the package nvidia-ml-py, which is not installed")
        except Exception as error:  # another package of that name, or a damaged one
            return _Gpu(None, None, f"looked for the package nvidia-ml-py, which fails: {_reason(error)}")
        try:
            library.nvmlInit()
            return _Gpu(library, _first_visible(library, self.environment), None)
        except Untold as why:
            return _Gpu(None, None, str(why))
        except Exception as error:
            return _Gpu(None, None, f"looked for a GPU through NVML: {_reason(error)}")


def _first_visible(library: Any, environment: Mapping[str, str]) -> Any:
    """The GPU that CUDA calls 0. Raises Untold, or NVML's errors.

    What CUDA_VISIBLE_DEVICES means is in the CUDA Programming Guide, Environment Variables: numbers count as nvidia-smi
    does, nothing from the first invalid entry on is visible, and the start of a UUID will do.
    """
    count = library.nvmlDeviceGetCount()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not count:
        raise Untold("looked for a GPU through NVML, which has none")
    first = "0" if visible is None else visible.partition(",")[0].strip()
    seen = f"CUDA_VISIBLE_DEVICES is {visible!r}"
    if first.startswith("MIG-"):
        raise Untold(f"{seen}: a part of a GPU (MIG) cannot be read apart from the rest")
    if first.startswith("GPU-"):
        return _by_uuid(library, count, first, seen)
    if not re.fullmatch("[0-9]{1,9}", first) or int(first) >= count:
        raise Untold(f"{seen}, which makes none of {count} GPUs visible")
    if count > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len(_names(library, count)) > 1:
        raise Untold("there are unlike GPUs, which CUDA puts in another order; set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return _whole(library, library.nvmlDeviceGetHandleByIndex(int(first)))


def _by_uuid(library: Any, count: int, start: str, seen: str) -> Any:
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    found = [handle for handle in handles if text(library.nvmlDeviceGetUUID(handle)).startswith(start)]
    if len(found) != 1:
        raise Untold(f"{seen}, which fits {len(found)} of {count} GPUs")
    return _whole(library, found[0])


def _whole(library: Any, handle: Any) -> Any:
    """The GPU; raises Untold where it is divided, for CUDA then sees a part of it."""
    try:
        divided = library.nvmlDeviceGetMigMode(handle)[0]
    except Exception:  # most GPUs cannot be divided, and older drivers do not know of it
        return handle
    if divided:
        raise Untold("the GPU is divided (MIG), and a part of it cannot be read apart from the rest")
    return handle


def _names(library: Any, count: int) -> set[str]:
    return {text(library.nvmlDeviceGetName(library.nvmlDeviceGetHandleByIndex(index))) for index in range(count)}


def text(value: str | bytes) -> str:
    """Older releases of nvidia-ml-py give bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _reason(error: Exception) -> str:
    return _REASONS.get(type(error).__name__) or str(error) or type(error).__name__
