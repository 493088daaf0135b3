"""The CUDA runtime by ctypes: memory, streams, events and graphs, without torch, cupy or pycuda.

It binds the libcudart that is on the device, of CUDA 11.4 or later. Two calls are avoided because what they take has
changed between versions: cudaGraphInstantiate (12.0) and cudaGetDeviceProperties (12 and 13). Attributes are asked one
by one instead, name and UUID of libcuda.
"""

from __future__ import annotations

import ctypes as C
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from glob import escape, glob
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hydradeploy.errors import EnvironmentFailed, HydraError, MissingError

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_DIRECTORIES = (
    "",
    "/usr/local/cuda/lib64/",
    "/usr/local/cuda/targets/aarch64-linux/lib/",
    "/usr/local/cuda/targets/sbsa-linux/lib/",
)
_DRIVER = "libcuda.so.1"

_OUT_OF_MEMORY, _INSUFFICIENT_DRIVER = 2, 35
# Not initialised, a stub library, driver missing or too old, no device, unknown.
_NO_DEVICE = (3, 34, 35, 100, 999)
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_MAPPED = 2
# A stream that does not wait for the default one.
_NON_BLOCKING = 1
# Other threads may do what they like while a stream is captured.
_RELAXED = 2
_SM_COUNT, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76

_P, _I, _U, _S, _F = C.c_void_p, C.c_int, C.c_uint, C.c_size_t, C.c_float
_PP, _PI = C.POINTER(_P), C.POINTER(_I)
_SIGNATURES: dict[str, list[Any]] = {
    "cudaGetDeviceCount": [_PI],
    "cudaDeviceGetAttribute": [_PI, _I, _I],
    "cudaRuntimeGetVersion": [_PI],
    "cudaDriverGetVersion": [_PI],
    "cudaGetLastError": [],
    "cudaMalloc": [_PP, _S],
    "cudaFree": [_P],
    "cudaHostAlloc": [_PP, _S, _U],
    "cudaFreeHost": [_P],
    "cudaHostGetDevicePointer": [_PP, _P, _U],
    "cudaMemcpyAsync": [_P, _P, _S, _I, _P],
    "cudaStreamCreateWithFlags": [_PP, _U],
    "cudaStreamSynchronize": [_P],
    "cudaStreamDestroy": [_P],
    "cudaEventCreateWithFlags": [_PP, _U],
    "cudaEventRecord": [_P, _P],
    "cudaEventElapsedTime": [C.POINTER(_F), _P, _P],
    "cudaEventDestroy": [_P],
    "cudaStreamBeginCapture": [_P, _I],
    "cudaStreamEndCapture": [_P, _PP],
    "cudaGraphInstantiateWithFlags": [_PP, _P, C.c_ulonglong],
    "cudaGraphLaunch": [_P, _P],
    "cudaGraphExecDestroy": [_P],
    "cudaGraphDestroy": [_P],
}


class CudaFailed(MissingError):
    """A call of CUDA's that failed, with its code and CUDA's own words."""

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function}: {text} (CUDA error {code})")
        self.code = code


# The first compute capability with products in bf16 and tf32.
AMPERE = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use (CUDA_VISIBLE_DEVICES chooses it).

    `capability` is the compute capability such as "8.7". An `integrated` GPU shares the memory of the CPU.
    """

    name: str
    capability: str
    sm_count: int
    integrated: bool

    @property
    def generation(self) -> tuple[int, int]:
        """The compute capability as numbers, to be compared: AMPERE and later."""
        major, minor = self.capability.split(".")
        return int(major), int(minor)


_Given = TypeVar("_Given", bound="Handle")


class Handle:
    """Something of CUDA's that has to be given back: by `close`, by leaving the `with` block, once."""

    def __init__(self, address: int, give_back: Callable[[int], object]) -> None:
        self._address, self._give_back = address, give_back

    @property
    def address(self) -> int:
        """The pointer or handle as CUDA knows it; raises RuntimeError after `close`."""
        if not self._address:
            raise RuntimeError("it was given back to CUDA")
        return self._address

    def close(self) -> None:
        """Give it back. An error here is none of the caller's: what was the matter has been said before."""
        address, self._address = self._address, 0
        if address:
            self._give_back(address)

    def __enter__(self: _Given) -> _Given:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Memory(Handle):
    """Memory of the GPU, `size` bytes."""

    def __init__(self, address: int, size: int, give_back: Callable[[int], object]) -> None:
        super().__init__(address, give_back)
        self.size = size


class HostMemory(Memory):
    """Memory of the host that the system does not move, which is what copies overlap with and run fastest from.

    `device_address` is where the GPU sees it, None unless it was made `mapped`.
    """

    def __init__(self, address: int, size: int, give_back: Callable[[int], object], device_address: int | None) -> None:
        super().__init__(address, size, give_back)
        self.device_address = device_address

    def array(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Its beginning as an array, which must not be used after `close`; raises ValueError where it is too small."""
        count = int(np.prod(shape))
        held = (C.c_ubyte * self.size).from_address(self.address)
        return np.frombuffer(memoryview(held), np.dtype(dtype), count).reshape(tuple(shape))


class Cuda:
    """A libcudart.

    Every method raises EnvironmentFailed where memory runs out, CudaFailed for what else goes wrong. `path` is the
    library's name as it was found, `why_no_device` CUDA's reason after `device_count` was 0.
    """

    def __init__(self, path: str, driver: str = _DRIVER) -> None:
        """Raises OSError where it cannot be loaded, AttributeError where it lacks a function."""
        self.path, self.why_no_device = path, ""
        self._driver_path = driver
        self._library = C.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, _I
        self._library.cudaGetErrorString.argtypes = [_I]
        self._library.cudaGetErrorString.restype = C.c_char_p

    def call(self, function: str, *arguments: Any) -> None:
        """One call of the library's; raises as every method does."""
        code = getattr(self._library, function)(*arguments)
        if code:
            raise self._failed(function, code)

    def _failed(self, function: str, code: int) -> HydraError:
        # Or the next unrelated call reports it again.
        self._library.cudaGetLastError()
        text = self._library.cudaGetErrorString(code).decode(errors="replace")
        if code == _OUT_OF_MEMORY:
            return EnvironmentFailed(
                f"{function}: {text} (CUDA error {code})",
                hint="close what else uses the GPU, or run fewer or smaller subnets at once",
            )
        return CudaFailed(function, code, text)

    def _asked(self, function: str, kind: Any, *arguments: Any) -> Any:
        value = kind()
        self.call(function, C.byref(value), *arguments)
        return value.value

    def _given_back(self, function: str, address: int) -> None:
        if getattr(self._library, function)(address):
            self._library.cudaGetLastError()

    # What there is

    def device_count(self) -> int:
        """How many GPUs this process may use."""
        try:
            count = int(self._asked("cudaGetDeviceCount", _I))
        except CudaFailed as error:
            if error.code not in _NO_DEVICE:
                raise
            self.why_no_device = error.message
            return 0
        self.why_no_device = "" if count else "CUDA sees no device"
        return count

    def is_too_new(self) -> bool:
        """Whether it says that the driver is older than it takes; with an older libcudart there may be a GPU."""
        try:
            self._asked("cudaGetDeviceCount", _I)
        except HydraError as error:
            return isinstance(error, CudaFailed) and error.code == _INSUFFICIENT_DRIVER
        return False

    def versions(self) -> tuple[int, int]:
        """Runtime and driver as 12060 for 12.6, 0 for unknown: without a driver CUDA 11 tells neither."""

        def version(function: str) -> int:
            try:
                return int(self._asked(function, _I))
            except CudaFailed:
                return 0

        return version("cudaRuntimeGetVersion"), version("cudaDriverGetVersion")

    def gpu(self) -> Gpu:
        """The GPU; raises MissingError where there is none."""
        if not self.device_count():
            raise MissingError(f"no CUDA device: {self.why_no_device}")
        count, integrated, major, minor = (
            int(self._asked("cudaDeviceGetAttribute", _I, which, 0))
            for which in (_SM_COUNT, _INTEGRATED, _MAJOR, _MINOR)
        )
        return Gpu(_name(self._driver_path), f"{major}.{minor}", count, bool(integrated))

    # Memory

    def allocate(self, size: int) -> Memory:
        """`size` bytes, at least one, of the GPU's memory, aligned to 256 bytes."""
        address = self._asked("cudaMalloc", _P, size)
        return Memory(address, size, partial(self._given_back, "cudaFree"))

    def host(self, size: int, *, mapped: bool = False) -> HostMemory:
        """`size` bytes, at least one, of the host's memory; `mapped` into the GPU's addresses too."""
        address = self._asked("cudaHostAlloc", _P, size, _MAPPED if mapped else 0)
        made = HostMemory(address, size, partial(self._given_back, "cudaFreeHost"), None)
        if mapped:
            try:
                made.device_address = self._asked("cudaHostGetDevicePointer", _P, address, 0)
            except BaseException:
                made.close()
                raise
        return made

    def copy_in(self, to: Memory, source: HostMemory, size: int, stream: Handle) -> None:
        """Put a copy from the host to the GPU on the stream."""
        self._copy(to, source, size, _HOST_TO_DEVICE, stream)

    def copy_out(self, to: HostMemory, source: Memory, size: int, stream: Handle) -> None:
        """Put a copy from the GPU to the host on the stream."""
        self._copy(to, source, size, _DEVICE_TO_HOST, stream)

    def _copy(self, to: Memory, source: Memory, size: int, kind: int, stream: Handle) -> None:
        if size > min(to.size, source.size):
            raise ValueError(f"{size} bytes from {source.size} to {to.size}")
        self.call("cudaMemcpyAsync", to.address, source.address, size, kind, stream.address)

    # Streams, events, graphs

    def stream(self) -> Handle:
        """A stream that does not wait for the default stream."""
        return self._made("cudaStreamCreateWithFlags", "cudaStreamDestroy", _NON_BLOCKING)

    def wait(self, stream: Handle) -> None:
        """Return when everything on the stream is done; raises what went wrong there."""
        self.call("cudaStreamSynchronize", stream.address)

    def event(self) -> Handle:
        """An event that takes the time."""
        return self._made("cudaEventCreateWithFlags", "cudaEventDestroy", 0)

    def record(self, event: Handle, stream: Handle) -> None:
        """Put the event on the stream."""
        self.call("cudaEventRecord", event.address, stream.address)

    def elapsed_s(self, start: Handle, end: Handle) -> float:
        """Seconds on the GPU between two events that have happened."""
        return float(self._asked("cudaEventElapsedTime", _F, start.address, end.address)) / 1e3

    def capture(self, stream: Handle, enqueue: Callable[[], object]) -> Handle:
        """A graph of what `enqueue` puts on the stream, to `launch` any number of times.

        Raises what `enqueue` raises and what cannot be captured; the stream is usable in either case.
        """
        graph = _P()
        self.call("cudaStreamBeginCapture", stream.address, _RELAXED)
        try:
            enqueue()
        except BaseException:
            # Or the stream stays in capture.
            self._library.cudaStreamEndCapture(stream.address, C.byref(graph))
            self._library.cudaGetLastError()
            if graph.value:
                self._given_back("cudaGraphDestroy", graph.value)
            raise
        self.call("cudaStreamEndCapture", stream.address, C.byref(graph))
        try:
            address = self._asked("cudaGraphInstantiateWithFlags", _P, graph, 0)
        finally:
            self._given_back("cudaGraphDestroy", graph.value or 0)
        return Handle(address, partial(self._given_back, "cudaGraphExecDestroy"))

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Put all of the graph on the stream."""
        self.call("cudaGraphLaunch", graph.address, stream.address)

    def _made(self, create: str, destroy: str, flags: int) -> Handle:
        return Handle(self._asked(create, _P, flags), partial(self._given_back, destroy))


def candidates() -> Iterator[str]:
    """Where a libcudart may be, in order: where the loader looks, the toolkit's directories, packages of Python's."""
    for directory in _DIRECTORIES:
        for name in _NAMES:
            yield directory + name
    for path in sys.path:
        found = glob(os.path.join(escape(path or "."), "nvidia", "*", "lib", "libcudart.so*"))
        yield from sorted(found, reverse=True)


@cache
def load() -> Cuda:
    """This process's libcudart; raises MissingError where there is none that has what is needed.

    Of several it is the first that the driver is new enough for, else the first.
    """
    reasons, too_new = [], None
    for path in candidates():
        try:
            found = Cuda(path)
        except OSError:
            continue
        # The loader's name of a library says nothing of what is in it.
        except AttributeError as error:
            reasons.append(f"; {path} is too old: {error}")
            continue
        if why_no_driver() is not None or not found.is_too_new():
            return found
        too_new = too_new or found
    if too_new is not None:
        return too_new
    raise MissingError(
        f"libcudart, CUDA's runtime, is not found{''.join(reasons)}",
        hint="on a Jetson install JetPack's CUDA, elsewhere: pip install nvidia-cuda-runtime",
    )


@cache
def why_no_gpu() -> str | None:
    """None where CUDA has a GPU here, else the sentence to show. Asks CUDA alone, and is safe without a driver."""
    try:
        cuda = load()
        return None if cuda.device_count() else f"no CUDA device: {cuda.why_no_device}"
    except HydraError as error:
        return error.message


@cache
def why_no_driver() -> str | None:
    """None where there is a driver, else the sentence to show: without one no runtime finds a GPU."""
    try:
        _driver(_DRIVER)
    except MissingError as error:
        return error.message
    return None


def _driver(path: str) -> C.CDLL:
    try:
        return C.CDLL(path)
    except OSError as error:
        raise MissingError(f"CUDA's driver cannot be loaded: {error}") from error


def _name(path: str) -> str:
    """Of the first GPU, from the driver; raises MissingError."""
    driver = _driver(path)
    device, name = _I(), C.create_string_buffer(256)
    for function, arguments in (
        ("cuInit", (_U(0),)),
        ("cuDeviceGet", (C.byref(device), _I(0))),
        ("cuDeviceGetName", (name, _I(len(name)), device)),
    ):
        code = getattr(driver, function)(*arguments)
        if code:
            raise MissingError(f"{function} of {path}: CUDA error {code}")
    return name.value.decode(errors="replace")
