"""A backend that computes nothing and takes the time it is told to take, on a clock of its own.

What the profiler and the statistics say of known distributions is tested with it, in this process and at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Model, Options
from hydradeploy.bundle import Dialect


@dataclass
class VirtualClock:
    """Seconds that pass only when they are made to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        """In place of time.sleep."""
        self.advance(seconds)


@dataclass(frozen=True)
class Null:
    """`latencies` gives, per opened model, the duration of its first run and of every later one, in seconds."""

    clock: VirtualClock
    latencies: Callable[[Model], Iterator[float]]
    load_s: float = 0.1
    name: str = "null"
    dialect: Dialect = "ort"
    processor: str = "cpu"
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def compute_types(self, precision: str) -> tuple[str, ...]:
        return (precision,)

    def why_not(self) -> str | None:
        return None

    def software(self) -> Mapping[str, str]:
        return {}

    def prepare(self) -> None:
        """There is no runtime."""

    def open(self, model: Model, options: Options) -> NullSession:
        self.clock.advance(self.load_s)
        return NullSession(self.clock, model.classes, self.latencies(model))


@dataclass
class NullSession:
    """Logits of zeros, after the next latency."""

    clock: VirtualClock
    classes: int
    latencies: Iterator[float]
    _facts: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> NullSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, images: Images) -> NDArray[np.float32]:
        self.clock.advance(next(self.latencies))
        return np.zeros((len(images), self.classes), np.float32)

    def facts(self) -> Mapping[str, str]:
        return self._facts
