"""PyTorch on an NVIDIA GPU, without a graph file: it computes from the weights file.

Each stored tensor is uploaded once for all sessions of a process, and a subnet's tensors are views of it. What a
session computes is captured in a CUDA graph for each batch size, over the same weights and in one pool of memory, so
that another subnet costs its replay and hardly any memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Model, Options, Weights, check_input, check_options, read_ahead, with_defaults
from hydradeploy.backends.torch import TYPES, file_key, first_line, forward, nested, weights_of, whole
from hydradeploy.engines import cudart
from hydradeploy.engines.cudart import AMPERE
from hydradeploy.errors import EnvironmentFailed, MissingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# tf32 is float32 whose products are done with ten bits of mantissa.
_TYPES = {**TYPES, "tf32": "float32"}
# A graph holds its input and output; of more batch sizes than this the one captured first goes.
_GRAPHS = 4


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph of one batch size with the memory it reads and writes; `graph` is None where nothing is captured."""

    graph: torch.cuda.CUDAGraph | None
    sent: Tensor
    images: Tensor
    logits: Tensor | None


class _Session:
    def __init__(self, model: Model, options: Options) -> None:
        import torch

        chosen = with_defaults(BACKEND, options, model.precision)
        weights = weights_of(model)
        self._model, self._subnet, self._kind = model, weights.subnet, str(chosen.compute_type)
        self._dtype: torch.dtype = getattr(torch, _TYPES[self._kind])
        self._graphs = chosen.settings["mode"] == "graph"
        self._captured: dict[int, _Captured] = {}
        read_ahead(model)
        with _lock, _said_so(model):
            # Held, because the views do not hold the tensors by which others find them.
            self._whole = _uploaded(weights, self._dtype)
            self._tensors = nested(self._whole, weights)
            if model.batch != "dynamic":
                self._ready(model.batch)
        self._facts = {
            "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda),
            "gpu": torch.cuda.get_device_name(),
            "compute_type": self._kind,
            **chosen.settings,
        }
        self._open = True

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._open, self._tensors, self._whole, self._captured = False, {}, {}, {}

    def run(self, images: Images) -> NDArray[np.float32]:
        if not self._open:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        # One at a time: graphs share the memory of what is between input and output.
        with _lock, _said_so(self._model):
            return self._run(images)

    def _run(self, images: Images) -> NDArray[np.float32]:
        ready = self._ready(len(images))
        np.copyto(ready.sent.numpy(), images)
        ready.images.copy_(ready.sent, non_blocking=True)
        if ready.graph is None:
            logits = self._logits(ready.images)
        else:
            assert ready.logits is not None
            ready.graph.replay()
            logits = ready.logits
        # Waits for the GPU, because the memory it copies into is not pinned.
        return np.asarray(logits.cpu().numpy())

    def _logits(self, images: Tensor) -> Tensor:
        import torch

        with torch.inference_mode(), _products(self._kind):
            return forward(self._tensors, self._subnet, images.to(self._dtype)).float()

    def _ready(self, batch: int) -> _Captured:
        if batch not in self._captured:
            if len(self._captured) == _GRAPHS:
                del self._captured[next(iter(self._captured))]
            self._captured[batch] = self._capture(batch)
        return self._captured[batch]

    def _capture(self, batch: int) -> _Captured:
        import torch

        dtype = getattr(torch, self._model.input)
        sent = torch.zeros((batch, *self._model.image_shape), dtype=dtype, pin_memory=True)
        images = sent.to("cuda")
        if not self._graphs:
            return _Captured(None, sent, images, None)
        # Libraries choose and load kernels at their first call, which cannot be captured.
        aside = _aside()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._logits(images)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool()):
            logits = self._logits(images)
        captured = _Captured(graph, sent, images, logits)
        _live.add(captured)
        return captured

    def facts(self) -> Mapping[str, str]:
        return self._facts


class _TorchCuda:
    name = "torch-cuda"
    dialect = None
    processor = "cuda"
    settings: Mapping[str, tuple[str, ...]] = {"mode": ("graph", "eager")}

    def compute_types(self, precision: str) -> tuple[str, ...]:
        import torch

        if self.why_not() is not None:
            return ()
        narrow = ("tf32", "bf16") if torch.cuda.get_device_capability() >= AMPERE else ()
        if precision == "fp32":
            return ("fp32", "fp16", *narrow)
        return (precision,) if precision == "fp16" or precision in narrow else ()

    def why_not(self) -> str | None:
        if not find_spec("torch"):
            return "the package torch is not installed"
        # Before torch is imported, which takes seconds, for most machines have no GPU.
        return cudart.why_no_driver() or _why_no_gpu()

    def software(self) -> Mapping[str, str]:
        import torch

        return {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}

    def prepare(self) -> None:
        import torch

        torch.zeros(1, device="cuda")

    def open(self, model: Model, options: Options) -> _Session:
        check_options(self, options, model.precision)
        return _Session(model, options)


BACKEND = _TorchCuda()

_lock = threading.RLock()
_resident: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


def _uploaded(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole stored tensors on the GPU, each once in a process for all who hold it."""
    key, mapped, found = file_key(weights.path), whole(weights), {}
    for name, tensor in mapped.items():
        there = _resident.get((key, name, dtype))
        if there is None:
            there = _resident[key, name, dtype] = tensor.to(dtype).to("cuda")
        found[name] = there
    return found


@contextmanager
def _products(kind: str) -> Iterator[None]:
    """Products of float32 in float32 or in tf32, whatever the process has them in elsewhere."""
    import torch

    wanted: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in wanted]
    for each in wanted:
        each.allow_tf32 = kind == "tf32"
    try:
        yield
    finally:
        for each, value in zip(wanted, before, strict=True):
            each.allow_tf32 = value


@contextmanager
def _said_so(model: Model) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise EnvironmentFailed(f"{model.name}: the GPU's memory is full", hint="close other sessions") from error
    except RuntimeError as error:
        raise MissingError(f"torch-cuda cannot run {model.name}: {first_line(error)}") from error


_live: WeakSet[_Captured] = WeakSet()


@cache
def _aside() -> Any:
    """One stream for all, because each that computes products has a work space of up to 32 MiB."""
    import torch

    cuda: Any = torch.cuda
    return cuda.Stream()


def _pool() -> Any:
    """That of the graphs there are; a pool ends with the last graph in it."""
    import torch

    graphs = [each.graph for each in _live if each.graph is not None]
    return graphs[0].pool() if graphs else torch.cuda.graph_pool_handle()


@cache
def _why_no_gpu() -> str | None:
    import torch

    if torch.version.cuda is None:
        return "this build of torch computes on the processor only"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"
