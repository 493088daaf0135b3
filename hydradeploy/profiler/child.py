"""One fresh process per cell and round: a request as a line of JSON on stdin, what was measured as JSON on stdout.

Fresh, because where memory lands and what a runtime decided at its start differ from process to process, and because
two runtimes with spinning threads spoil each other's numbers. A request that is `sustain` leaves stdin open until
temperatures have settled: its end tells the child so.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from hydradeploy.backends import Model, Options, backend
from hydradeploy.bundle import Batch, Extent
from hydradeploy.devices import machine
from hydradeploy.errors import HydraError, MissingError
from hydradeploy.profiler.sampling import Measured, Sampling, measure
from hydradeploy.profiler.watched import Ended, fresh, oom_kills, run_watched
from hydradeploy.spec import Record

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29


class Opened(Record, frozen=True, kw_only=True):
    """A model to open."""

    name: str
    graph: str
    batch: Batch
    image_shape: tuple[int, int, int]
    classes: int
    extents: tuple[tuple[str, int, int], ...]

    @property
    def model(self) -> Model:
        extents = tuple(Extent(Path(path), offset, length) for path, offset, length in self.extents)
        return Model(self.name, Path(self.graph), self.batch, self.image_shape, self.classes, extents)


class Request(Opened, frozen=True, kw_only=True):
    """What to measure. `batches` is an .npy file of float32 (b, n, channels, s, s).

    `device` is the kind of device that says how much memory is occupied, `cores` those to stay on, None for any that
    the parent may use, `other` the model to switch from.
    """

    backend: str
    threads: int
    batches: str
    sampling: Sampling
    device: str = "cpu"
    cores: tuple[int, ...] | None = None
    other: Opened | None = None


def spawn(
    request: Request,
    *,
    patience_s: float = 3600.0,
    settled: Callable[[], bool] | None = None,
) -> Measured:
    """Answer a request in a fresh process, which dies with this thread, and its own children with it.

    This thread is blocked meanwhile. `settled` is asked once a second whether temperatures have stopped rising; without
    it they count as settled. Raises MissingError with the last words of a process that fails, or that has not answered
    within `patience_s`.
    """
    command, env = fresh(__name__, str(os.getpid()))
    killed_before = oom_kills()
    ended = run_watched(command, msgspec.json.encode(request) + b"\n", env=env, patience_s=patience_s, release=settled)
    if ended.code != 0:
        raise MissingError(f"{request.name}: {_how(ended, patience_s, killed_before)}: {ended.last_words}")
    try:
        return msgspec.json.decode(ended.out.splitlines()[-1], type=Measured)
    except (IndexError, msgspec.DecodeError) as error:
        raise MissingError(f"{request.name}: the measuring process ended without an answer") from error


def _how(ended: Ended, patience_s: float, killed_before: int) -> str:
    if ended.code is None:
        return f"no answer within {patience_s:g} s"
    if ended.code > 0:
        return f"the measuring process ended with exit {ended.code}"
    if -ended.code == signal.SIGKILL and oom_kills() > killed_before:
        return "the measuring process was killed for lack of memory"
    known = -ended.code in {int(known) for known in signal.Signals}
    name = signal.Signals(-ended.code).name if known else f"signal {-ended.code}"
    return f"the measuring process ended with {name}"


def answer(request: Request, settled: Callable[[], bool] = lambda: True) -> Measured:
    """Measure in this process."""
    batches = np.load(request.batches, mmap_mode=None)
    return measure(
        backend(request.backend),
        request.model,
        Options(request.threads),
        batches,
        request.sampling,
        other=request.other.model if request.other is not None else None,
        occupied_bytes=machine(request.device).occupied_bytes,
        settled=settled,
    )


def main() -> int:
    """Answer the request on stdin."""
    # Whatever a runtime prints goes to stderr; the last line on stdout is the answer.
    stdout = os.dup(1)
    os.dup2(2, 1)
    _die_with(int(sys.argv[1]))
    try:
        request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
        if request.cores is not None:  # before a runtime counts them
            os.sched_setaffinity(0, request.cores)
        found = answer(request, _stdin_ended)
    except HydraError as error:
        print(error.message, file=sys.stderr)
        return int(error.exit_code)
    with os.fdopen(stdout, "wb") as file:
        file.write(b"\n" + msgspec.json.encode(found))
    return 0


def _die_with(parent: int) -> None:
    with suppress(AttributeError, OSError):  # Linux only; elsewhere a killed parent leaves its child measuring
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # Else the kernel may wake a caller 50 us after its call is due.
        libc.prctl(_PR_SET_TIMERSLACK, 1)
    if os.getppid() != parent:  # it died before that was set
        sys.exit("the process that asked is gone")


def _stdin_ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])
