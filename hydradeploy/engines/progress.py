"""A build is never silent: TensorRT's own events where it has them, and the last one again while it says nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Progress = Callable[[str, float | None], None]
"""Told the stage, and the fraction of it that is done, 0 to 1, or None where that is not known."""

BEAT_S = 2.0


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Teller:
    """Passes on what a build does, from any thread, one call at a time.

    An exception of the receiver, an interrupt among them, must not pass through TensorRT: it is kept, stops the build
    at its next event, and is raised by `check`.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.RLock()
        self._last: tuple[str, float | None] = ("", None)
        self._phases: dict[str, _Phase] = {}
        self._failed: BaseException | None = None

    def tell(self, stage: str, fraction: float | None = None) -> bool:
        """Pass a stage on; False where the build is to stop."""
        with self._lock:
            self._last = (stage, fraction)
            return self.again()

    def again(self) -> bool:
        """Pass on the last stage once more."""
        with self._lock:
            if self._failed is None:
                try:
                    self._progress(*self._last)
                except BaseException as error:
                    self._failed = error
            return self._failed is None

    def check(self) -> None:
        """Raise what the receiver raised."""
        if self._failed is not None:
            raise self._failed

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of TensorRT begins, within another or by itself."""
        with self._lock:
            self._phases[name] = _Phase(parent if parent in self._phases else None, steps)
            self.tell(name, self._fraction(name))

    def step(self, name: str, step: int) -> bool:
        """A step of it is done, counted from 0; False where the build is to stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
            return self.tell(name, self._fraction(name))

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(name, None)

    def _fraction(self, name: str) -> float | None:
        """Of the outermost phase that this one is part of: its own share is one step of its parent."""
        share = 0.0
        inner: str | None = name
        while inner is not None and inner in self._phases:
            phase = self._phases[inner]
            share = min(1.0, (phase.done + share) / phase.steps) if phase.steps else share
            inner = phase.parent
        return share if name in self._phases else None


@contextmanager
def beating(teller: Teller, every_s: float = BEAT_S) -> Iterator[None]:
    """Within it the last stage is passed on again every so many seconds, also when nothing new is heard."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(every_s):
            teller.again()

    thread = threading.Thread(target=beat, name="build heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def monitor(trt: Any, teller: Teller) -> Any:
    """TensorRT's events as a teller's, for `IBuilderConfig.progress_monitor`; to outlive the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # or the binding has no C++ half

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            teller.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return teller.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            teller.finish(phase_name)

    return Monitor()
