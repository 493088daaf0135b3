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
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from hydradeploy.backends import Backend, Model, Options, backend, model_of
from hydradeploy.bundle import open_bundle
from hydradeploy.devices import machine
from hydradeploy.errors import HydraError, IntegrityError, MissingError
from hydradeploy.processes import die_with, fresh, signal_name
from hydradeploy.profiler.sampling import Measured, Sampling, measure
from hydradeploy.profiler.watched import Ended, oom_kills, run_watched
from hydradeploy.spec import Preprocessing, Record

_PR_SET_TIMERSLACK = 29


class Request(Record, frozen=True, kw_only=True):
    """What to measure: an artifact of the bundle in that directory, whose graph must still be the one it was.

    `batches` is an .npy file of uint8 (b, n, s, s, channels). `device` is the kind of device that says how much memory
    is occupied, `cores` those to stay on, None for any that the parent may use, `other` the artifact to switch from.
    """

    bundle: str
    artifact: str
    graph_sha256: str
    backend: str
    compute_type: str
    settings: dict[str, str]
    threads: int
    batches: str
    sampling: Sampling
    device: str = "cpu"
    cores: tuple[int, ...] | None = None
    other: str | None = None

    @property
    def options(self) -> Options:
        return Options(self.threads, self.compute_type, self.settings)


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
        raise MissingError(f"{request.artifact}: {_how(ended, patience_s, killed_before)}: {ended.last_words}")
    try:
        return msgspec.json.decode(ended.out.splitlines()[-1], type=Measured)
    except (IndexError, msgspec.DecodeError) as error:
        raise MissingError(f"{request.artifact}: the measuring process ended without an answer") from error


def _how(ended: Ended, patience_s: float, killed_before: int) -> str:
    if ended.code is None:
        return f"no answer within {patience_s:g} s"
    if ended.code > 0:
        return f"the measuring process ended with exit {ended.code}"
    if -ended.code == signal.SIGKILL and oom_kills() > killed_before:
        return "the measuring process was killed for lack of memory"
    return f"the measuring process ended with {signal_name(-ended.code)}"


def answer(request: Request, settled: Callable[[], bool] = lambda: True) -> Measured:
    """Measure in this process; raises IntegrityError where the bundle has been changed since it was asked."""
    runner = backend(request.backend)
    subject = subject_of(request, runner)
    return measure(
        runner,
        subject.model,
        request.options,
        np.load(request.batches, mmap_mode=None),
        subject.preprocessing,
        request.sampling,
        other=subject.other,
        occupied_bytes=machine(request.device).occupied_bytes,
        settled=settled,
    )


@dataclass(frozen=True)
class Subject:
    """What a request is about, as a backend wants it."""

    model: Model
    other: Model | None
    preprocessing: Preprocessing


def subject_of(request: Request, runner: Backend) -> Subject:
    """What a request names, found in its bundle; raises what `answer` does."""
    # The parent has hashed its files.
    bundle = open_bundle(Path(request.bundle), "manifest")
    artifact = bundle.artifact(request.artifact)
    if artifact.graph_sha256 != request.graph_sha256:
        raise IntegrityError(f"{bundle.path}: was exported again while it was measured")
    other = None if request.other is None else model_of(bundle, bundle.artifact(request.other), runner.dialect)
    return Subject(model_of(bundle, artifact, runner.dialect), other, bundle.spec.preprocessing)


def main() -> int:
    """Answer the request on stdin."""
    # Whatever a runtime prints goes to stderr; the last line on stdout is the answer.
    stdout = os.dup(1)
    os.dup2(2, 1)
    die_with(int(sys.argv[1]))
    _wake_on_time()
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


def _wake_on_time() -> None:
    """Else the kernel may wake a caller 50 us after its call is due."""
    with suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


def _stdin_ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])
