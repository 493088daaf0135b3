"""A CUDA in the host's memory and a TensorRT that computes on it."""

from __future__ import annotations

import ctypes as C
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np

from hydradeploy.engines.cudart import Cuda
from tests.conftest import missing

KINDS = ("memory", "host", "streams", "events", "graphs", "executables")

_kept = TemporaryDirectory(prefix="fake-cudart-")


@cache
def library() -> Path:
    """The fake libcudart, which is libcuda too; skips where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        missing("cc", "no C compiler to make a CUDA of")
    made = Path(_kept.name) / "libcudart.so.13"
    source = Path(__file__).with_name("fake_cudart.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return made


class FakeCuda(Cuda):
    """With what tests turn."""

    def __init__(self) -> None:
        super().__init__(str(library()), driver=str(library()))
        self.fake = self._library
        self.fake.fake_used.restype = C.c_size_t
        self.fake.fake_copies.restype = C.c_long
        self.fake.fake_limit.argtypes = [C.c_size_t]
        self.fake.cudaLaunchHostFunc.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p]
        self.fake.fake_reset()

    def fail(self, function: str, code: int, after: int = 0) -> None:
        """The call of that name fails once, after so many that do not."""
        self.fake.fake_fail(function.encode(), code, after)

    def live(self) -> dict[str, int]:
        """What was not given back."""
        found = {name: self.fake.fake_live(kind) for kind, name in enumerate(KINDS)}
        return {name: count for name, count in found.items() if count}

    def used(self) -> int:
        return int(self.fake.fake_used())

    def copies(self) -> int:
        """Copies made between host and GPU."""
        return int(self.fake.fake_copies())


Function = Callable[[np.ndarray], np.ndarray]
_SIZES = {"FLOAT": np.float32, "UINT8": np.uint8}


class FakeEngine:
    """Computes `function` of a batch, in `context_bytes` of scratch memory that it really writes to."""

    def __init__(self, trt: FakeTensorRT, function: Function, shape: tuple, classes: int, **rest: Any) -> None:
        self.trt, self.function, self.classes = trt, function, classes
        self.shapes = {"image": shape, "logits": (shape[0], classes)}
        self.types = {"image": "FLOAT", "logits": "FLOAT"} | rest.get("types", {})
        self.profile = rest.get("profile", (1, 1, 4))
        if trt.generation == "8.6":
            self.device_memory_size = rest.get("context_bytes", 1000)
            self.create_execution_context_without_device_memory = self._context
        else:
            self.device_memory_size_v2 = rest.get("context_bytes", 1000)
            self.create_execution_context = self._context

    num_io_tensors = 2

    def _context(self, *asked: Any) -> FakeContext | None:
        wanted = {"8.6": (), "10.3": ("USER_MANAGED",), "rtx": (FakeRuntimeConfig("USER_MANAGED", "EAGER"),)}
        assert asked == wanted[self.trt.generation]
        self.trt.contexts += 1
        return None if self.trt.refuses == "context" else (Context86 if asked == () else Context10)(self)

    def create_runtime_config(self) -> FakeRuntimeConfig:
        assert self.trt.generation == "rtx"
        return FakeRuntimeConfig()

    def get_tensor_name(self, at: int) -> str:
        return list(self.shapes)[at]

    def get_tensor_shape(self, name: str) -> tuple:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{self.types[name]}"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list:
        return [(count, *self.shapes[name][1:]) for count in self.profile]


@dataclass
class FakeRuntimeConfig:
    """Of TensorRT for RTX."""

    allocation: str = "STATIC"
    dynamic_shapes_kernel_specialization_strategy: str = "LAZY"

    def set_execution_context_allocation_strategy(self, kind: str) -> None:
        self.allocation = kind


class FakeContext:
    """A context without memory of its own."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.addresses, self.batch, self.memory = engine, {}, engine.shapes["image"][0], 0
        self.keep: list[Any] = []

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        self.batch = shape[0]
        return self.engine.trt.refuses != "shape" and shape[1:] == self.engine.shapes["image"][1:]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.engine.trt.refuses != "address"

    def execute_async_v3(self, stream: int) -> bool:
        trt, engine = self.engine.trt, self.engine
        trt.enqueues += 1
        if trt.refuses == "enqueue":
            trt.log.log("Severity.ERROR", "no kernel\n for it")
            return False
        addresses, batch, memory = dict(self.addresses), self.batch, self.memory
        size = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", 0)

        def work(_: object) -> None:
            assert memory or not size, "no scratch memory"
            if size:
                C.memset(memory, 0x5A, size)
            kind = np.dtype(_SIZES[engine.types["image"]])
            shape = (batch, *engine.shapes["image"][1:])
            given = np.ctypeslib.as_array(
                (C.c_ubyte * (int(np.prod(shape)) * kind.itemsize)).from_address(addresses["image"])
            )
            taken = (C.c_float * (batch * engine.classes)).from_address(addresses["logits"])
            result = engine.function(given.view(kind).reshape(shape)).astype(np.float32)
            np.ctypeslib.as_array(taken)[:] = result.ravel()
            trt.ran += 1

        callback = C.CFUNCTYPE(None, C.c_void_p)(work)
        trt.callbacks.append(callback)
        return trt.cuda.fake.cudaLaunchHostFunc(stream, C.cast(callback, C.c_void_p), None) == 0


class Context86(FakeContext):
    """8.5 to 10.2: memory by an attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("memory" if name == "device_memory" else name, value)


class Context10(FakeContext):
    """10.3 and later: memory with its size."""

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = address


class FakeTensorRT:
    """A module as 8.6, as 10.3 or as TensorRT for RTX has it. `engines` are found by their plan."""

    def __init__(self, cuda: FakeCuda, generation: str = "10.3") -> None:
        self.cuda, self.generation, self.refuses = cuda, generation, ""
        self.__version__ = generation
        self.engines: dict[bytes, FakeEngine] = {}
        self.callbacks: list[Any] = []
        self.enqueues = self.ran = self.contexts = 0
        self.log: Any = None
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        self.DataType = SimpleNamespace(FLOAT=0, HALF=1, INT8=2)
        if generation != "8.6":
            self.DataType.BF16 = 3
            self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
        if generation == "rtx":
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="LAZY", EAGER="EAGER")

    def Runtime(self, log: Any) -> Any:
        assert self.cuda.device_count(), "the real one crashes the process"
        self.log = log

        def deserialize(plan: bytes) -> FakeEngine | None:
            if plan not in self.engines:
                log.log("Severity.ERROR", "Error Code 1: the plan is of\n another device")
            return self.engines.get(plan)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@contextmanager
def nothing_left(cuda: FakeCuda):
    """Everything made inside is given back, and no error stays behind."""
    before = cuda.live()
    yield
    assert cuda.live() == before
    assert cuda.fake.fake_last_error() == 0
