"""How far a command is: a bar with the time left on a terminal, else lines and a sign of life."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from hydradeploy.cli.output import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_HEARTBEAT_S = 5.0


class Reporter(Protocol):
    """Progress of one command: how far it is, and lines to keep."""

    def __call__(self, what: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def progress() -> Iterator[Reporter]:
    """Progress on stderr: a bar with time left on a terminal, else a line per step and a heartbeat."""
    if not sys.stderr.isatty():
        yield _Heartbeat()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # What is told names files, which may look like rich's markup or its emoji, [old] and :cat:.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True)
    try:
        yield _Bars(progress)
    finally:
        progress.stop()


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._progress.start()  # not before: it would wipe out what ssh asks
            self._tasks[what] = self._progress.add_task(what, total=total or None)
        self._progress.update(self._tasks[what], completed=done)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)


class _Heartbeat:
    def __init__(self) -> None:
        self._what, self._last = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._last >= _HEARTBEAT_S:
            say(f"{what} {done}/{total}" if total else what)
            self._what, self._last = what, now

    def say(self, text: str) -> None:
        say(text)
        self._last = time.monotonic()
