"""Processes of our own: how they are started, that they die with who asked, and how they ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import hydradeploy
from hydradeploy.errors import UsageError

_PR_SET_PDEATHSIG = 1
_MOST_THREADS = 16  # for each core


def check_threads(count: int) -> None:
    """Raise UsageError for fewer threads than one, and for so many that starting them takes the machine with it."""
    most = _MOST_THREADS * len(os.sched_getaffinity(0))
    if not 1 <= count <= most:
        raise UsageError(f"threads must be 1 to {most} on this machine, got {count}")


def fresh(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a fresh interpreter that runs the `main` of one of our modules."""
    # Not `-m`: that would let a file in the working directory stand in for a module of that name.
    start = f"import sys; sys.path = list(filter(None, sys.path)); from {module} import main; sys.exit(main())"
    package = str(Path(hydradeploy.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-c", start, *arguments], os.environ | {"PYTHONPATH": path}


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let this process end by that signal when its parent, the process of that number, does; exit where it has."""
    with suppress(AttributeError, OSError):  # Linux only; elsewhere a killed parent leaves its child at work
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it died before that was set
        sys.exit("the process that asked is gone")


def signal_name(number: int) -> str:
    """SIGKILL of 9; of those without a name, signal and the number."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
