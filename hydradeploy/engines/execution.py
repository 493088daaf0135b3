"""A plan at work: its tensors, its contexts and the scratch memory that all plans of a process share.

A context is made for each batch size, because a captured graph holds the shapes and addresses of the context it was
captured from, which must not change under it. Contexts own no memory; the scratch memory they compute in is lent to
whichever runs.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack
from functools import cache
from math import prod
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.engines.cudart import Cuda, Handle, HostMemory, Memory
from hydradeploy.engines.lanes import Lanes
from hydradeploy.engines.logger import errors
from hydradeploy.errors import HydraError, InputError, MissingError

_INPUT, _OUTPUT = "image", "logits"
_TYPES = {"FLOAT": "float32", "UINT8": "uint8"}
# Calls whose time on the GPU is remembered.
_TIMES = 101


class Scratch:
    """One piece of the GPU's memory for all engines of a process, as large as the largest of them wants.

    Who computes in it holds `lock` until the GPU is done. `address` changes when it grows or was lost.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.lock = threading.RLock()
        self._cuda = cuda
        self._wanted: dict[object, int] = {}
        self._memory: Memory | None = None

    @property
    def size(self) -> int:
        """Bytes it has."""
        return 0 if self._memory is None else self._memory.size

    def enter(self, who: object, size: int) -> None:
        """Want `size` bytes from now on; raises EnvironmentFailed where they cannot be had."""
        with self.lock:
            self._wanted[who] = size
            try:
                self.address()
            except BaseException:
                del self._wanted[who]
                raise

    def leave(self, who: object) -> None:
        """Want nothing any more. The last one gives the memory back."""
        with self.lock:
            self._wanted.pop(who, None)
            if not self._wanted and self._memory is not None:
                self._memory.close()
                self._memory = None

    def address(self) -> int:
        """Where it is now, 0 where nobody wants any; raises EnvironmentFailed. To be called with `lock` held."""
        size = max(self._wanted.values(), default=0)
        if size > self.size:
            # First back, then anew: a device may not have room for both.
            if self._memory is not None:
                self._memory.close()
                self._memory = None
            self._memory = self._cuda.allocate(size)
        return 0 if self._memory is None else self._memory.address


@cache
def scratch(cuda: Cuda) -> Scratch:
    """The one of this process."""
    return Scratch(cuda)


class Execution:
    """A deserialised engine that runs batches of images; raises MissingError for one that is not of this model.

    `batch` is the number of images it was exported for, None for any. Closed by `close`.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        loaded: tuple[Any, Any, Any],
        *,
        image_shape: tuple[int, ...],
        dtype: str,
        classes: int,
        batch: int | None,
        graph: bool,
    ) -> None:
        self._trt, self._cuda, self._graph = trt, cuda, graph
        self._engine, self._runtime, self._log = loaded
        self._shape, self._dtype, self._classes = tuple(image_shape), np.dtype(dtype), classes
        self.batches = self._batches(batch)
        self.context_bytes = context_bytes(self._engine)
        self.graph_failed = ""
        self._lanes = Lanes(self._new_lane)
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._scratch = scratch(cuda)
        with ExitStack() as undo:
            self._scratch.enter(self, self.context_bytes)
            undo.callback(self._scratch.leave, self)
            self._mapped = cuda.gpu().integrated
            self._stream = undo.enter_context(cuda.stream())
            self._start, self._end = undo.enter_context(cuda.event()), undo.enter_context(cuda.event())
            undo.callback(self._lanes.close)
            if batch is not None:
                with self._scratch.lock:
                    self._lane(batch)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Give everything back: graphs and contexts before the engine, the engine before its runtime."""
        with self._scratch.lock:
            self._undo.close()
            self._engine = None
            self._runtime = None
            self._log = None

    @property
    def device_s(self) -> float | None:
        """Median of the seconds that the last calls took on the GPU, without copies; None before the first."""
        return median(self._times) if self._times else None

    @property
    def scratch_bytes(self) -> int:
        """What all engines of the process share."""
        return self._scratch.size

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits (b, classes), the caller's own; more images than the engine takes at once go in turn.

        Raises InputError for fewer than it takes, MissingError and EnvironmentFailed where CUDA or TensorRT fail.
        """
        least, most = self.batches
        parts = [images[at : at + most] for at in range(0, len(images), most)]
        if len(parts[-1]) < least:
            raise InputError(f"a batch of {len(parts[-1])} images; the engine takes {least} to {most} at once")
        with self._scratch.lock:
            logits = [self._run(part) for part in parts]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        lane, cuda = self._lane(len(images)), self._cuda
        lane.input.fill(images)
        lane.input.copy_in(cuda, self._stream)
        cuda.record(self._start, self._stream)
        self._launch(lane)
        cuda.record(self._end, self._stream)
        lane.output.copy_out(cuda, self._stream)
        cuda.wait(self._stream)
        self._times.append(cuda.elapsed_s(self._start, self._end))
        return lane.output.array.copy()

    def _launch(self, lane: _Lane) -> None:
        if lane.graph is not None:
            self._cuda.launch(lane.graph, self._stream)
        else:
            self._enqueue(lane)

    def _enqueue(self, lane: _Lane) -> None:
        if not lane.context.execute_async_v3(self._stream.address):
            raise MissingError(f"TensorRT cannot run the engine: {errors(self._log)}")

    def _lane(self, batch: int) -> _Lane:
        """The one for a batch size, ready: in the scratch memory where it is now, captured."""
        lane = self._lanes.of(batch)
        address = self._scratch.address()
        if lane.scratch != address:
            self._place(lane, address)
        return lane

    def _new_lane(self, batch: int) -> _Lane:
        context = self._context()
        with ExitStack() as undo:
            given = DeviceTensor(self._cuda, (batch, *self._shape), self._dtype, mapped=self._mapped)
            undo.callback(given.close)
            taken = DeviceTensor(self._cuda, (batch, self._classes), np.dtype(np.float32), mapped=self._mapped)
            undo.callback(taken.close)
            if not context.set_input_shape(_INPUT, given.array.shape):
                raise MissingError(f"TensorRT refuses a batch of {batch} images: {errors(self._log)}")
            for name, tensor in ((_INPUT, given), (_OUTPUT, taken)):
                if not context.set_tensor_address(name, tensor.address):
                    raise MissingError(f"TensorRT refuses the memory of {name}: {errors(self._log)}")
            undo.pop_all()
        return _Lane(context, given, taken)

    def _context(self) -> Any:
        """A context without memory of its own, whose kernels are those that it will go on with."""
        kinds = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        specialised = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None:
            context = self._engine.create_execution_context_without_device_memory()
        elif specialised is None:
            context = self._engine.create_execution_context(kinds.USER_MANAGED)
        else:
            # TensorRT for RTX would compile the kernels of a batch size while others that are slower stand in for them,
            # and a graph that was captured meanwhile would keep those.
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(kinds.USER_MANAGED)
            config.dynamic_shapes_kernel_specialization_strategy = specialised.EAGER
            context = self._engine.create_execution_context(config)
        if context is None:
            raise MissingError(f"TensorRT makes no execution context: {errors(self._log)}")
        return context

    def _place(self, lane: _Lane, address: int) -> None:
        """Let it compute there, and capture it anew: a graph holds the addresses that it was captured with."""
        lane.forget_graph()
        if address and hasattr(lane.context, "set_device_memory"):
            lane.context.set_device_memory(address, self._scratch.size)
        elif address:
            lane.context.device_memory = address
        # What TensorRT puts off until the first enqueue must be done before a capture.
        self._enqueue(lane)
        self._cuda.wait(self._stream)
        if self._graph:
            try:
                lane.graph = self._cuda.capture(self._stream, lambda: self._enqueue(lane))
            except HydraError as error:
                self.graph_failed = error.message
        lane.scratch = address

    def _batches(self, batch: int | None) -> tuple[int, int]:
        """The fewest and the most images at once, of an engine that is of this model."""
        engine = self._engine
        names = {engine.get_tensor_name(at) for at in range(engine.num_io_tensors)}
        if names != {_INPUT, _OUTPUT}:
            raise MissingError(f"the engine is none of this model: its tensors are {', '.join(sorted(names))}")
        for name, dtype, rest in ((_INPUT, self._dtype, self._shape), (_OUTPUT, np.float32, (self._classes,))):
            shape = tuple(engine.get_tensor_shape(name))
            kind = str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]
            fits = shape[1:] == rest and shape[0] in (-1, batch) and _TYPES.get(kind) == np.dtype(dtype).name
            if not fits:
                raise MissingError(f"the engine is none of this model: its {name} is {kind} {shape}")
        if batch is not None:
            return batch, batch
        least, _, most = engine.get_tensor_profile_shape(_INPUT, 0)
        return int(least[0]), int(most[0])


class DeviceTensor:
    """An input or output: where the host writes or reads it and where the GPU does. `mapped`, that is one memory."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any], *, mapped: bool = False) -> None:
        size = prod(shape) * dtype.itemsize
        self._size = size
        self._host: HostMemory = cuda.host(size, mapped=mapped)
        self._device: Memory | None = None
        try:
            self._device = None if mapped else cuda.allocate(size)
            self.array = self._host.array(shape, dtype)
            self.array[:] = 0
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        if self._device is not None:
            return self._device.address
        return int(self._host.device_address or 0)

    def fill(self, values: NDArray[Any]) -> None:
        self.array[:] = values

    def copy_in(self, cuda: Cuda, stream: Handle) -> None:
        if self._device is not None:
            cuda.copy_in(self._device, self._host, self._size, stream)

    def copy_out(self, cuda: Cuda, stream: Handle) -> None:
        if self._device is not None:
            cuda.copy_out(self._host, self._device, self._size, stream)

    def close(self) -> None:
        # The array must not outlive the memory.
        self.array = np.empty(0)
        self._host.close()
        if self._device is not None:
            self._device.close()


class _Lane:
    """A batch size: its context, its tensors, and its graph where there is one. `scratch` is where it computes."""

    def __init__(self, context: Any, given: DeviceTensor, taken: DeviceTensor) -> None:
        self.context, self.input, self.output = context, given, taken
        self.graph: Handle | None = None
        self.scratch = -1

    def forget_graph(self) -> None:
        if self.graph is not None:
            self.graph.close()
        self.graph, self.scratch = None, -1

    def close(self) -> None:
        self.forget_graph()
        self.context = None
        self.input.close()
        self.output.close()


def context_bytes(engine: Any) -> int:
    """What one context of the engine computes in."""
    newer = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if newer is None else newer)
