"""One fresh process per cell and round: a request as JSON on stdin, what was measured as JSON on stdout.

Fresh, because where memory lands and what a runtime decided at its start differ from process to process, and because
two runtimes with spinning threads spoil each other's numbers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

import hydradeploy
from hydradeploy.backends import Model, Options, backend
from hydradeploy.bundle import Batch, Extent
from hydradeploy.errors import HydraError, MissingError
from hydradeploy.profiler.sampling import Measured, Sampling, measure
from hydradeploy.spec import Record

_PATIENCE_S = 3600
_PR_SET_PDEATHSIG = 1
# Not `-m`: that would let a file in the working directory stand in for a module of that name.
_START = f"import sys; sys.path = list(filter(None, sys.path)); from {__name__} import main; sys.exit(main())"


class Request(Record, frozen=True, kw_only=True):
    """What to measure. `batches` is an .npy file of float32 (b, n, channels, s, s)."""

    backend: str
    name: str
    graph: str
    batch: Batch
    image_shape: tuple[int, int, int]
    classes: int
    extents: tuple[tuple[str, int, int], ...]
    threads: int
    batches: str
    sampling: Sampling

    @property
    def model(self) -> Model:
        extents = tuple(Extent(Path(path), offset, length) for path, offset, length in self.extents)
        return Model(self.name, Path(self.graph), self.batch, self.image_shape, self.classes, extents)


def spawn(request: Request) -> Measured:
    """Answer a request in a fresh process; raises MissingError with its last words where that fails."""
    package = str(Path(hydradeploy.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _START],
            input=msgspec.json.encode(request),
            capture_output=True,
            env=os.environ | {"PYTHONPATH": path},
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{request.name}: no answer within {_PATIENCE_S} s") from error
    if ran.returncode:
        words = ran.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"signal {-ran.returncode}" if ran.returncode < 0 else f"exit {ran.returncode}"
        raise MissingError(f"{request.name}: the measuring process ended with {how}: {words[-1]}")
    try:
        return msgspec.json.decode(ran.stdout.splitlines()[-1], type=Measured)
    except (IndexError, msgspec.DecodeError) as error:
        raise MissingError(f"{request.name}: the measuring process ended without an answer") from error


def answer(request: Request) -> Measured:
    """Measure in this process."""
    batches = np.load(request.batches, mmap_mode=None)
    return measure(backend(request.backend), request.model, Options(request.threads), batches, request.sampling)


def main() -> int:
    """Answer the request on stdin."""
    # Whatever a runtime prints goes to stderr; the last line on stdout is the answer.
    stdout = os.dup(1)
    os.dup2(2, 1)
    with suppress(AttributeError, OSError):  # Linux only; elsewhere a killed parent leaves its child measuring
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        found = answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Request))
    except HydraError as error:
        print(error.message, file=sys.stderr)
        return int(error.exit_code)
    with os.fdopen(stdout, "wb") as file:
        file.write(b"\n" + msgspec.json.encode(found))
    return 0
