"""Readings as a machine would give them, of functions of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hydradeploy.devices.reading import Reading
from hydradeploy.profiler.monitor import Watch

Value = float | Callable[[float], float]


def reading(at_s: float, **values: float) -> Reading:
    """Gauges and counters by name, `__` for a dot: counters are what the table of readings calls so."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    counters = {name for name in named if name.partition(".")[0] in COUNTERS}
    return Reading(
        at_s=at_s,
        gauges={name: value for name, value in named.items() if name not in counters},
        counters={name: value for name, value in named.items() if name in counters},
    )


COUNTERS = (
    "busy_s",
    "steal_s",
    "ours_s",
    "cgroup_throttled",
    "cgroup_throttled_s",
    "throttle_events",
    "overcurrent_events",
    "swapped_pages",
    "energy_j",
)


def readings(times: Sequence[float], **values: Value) -> list[Reading]:
    """A reading at each of the times."""
    return [
        reading(at_s, **{name: value(at_s) if callable(value) else value for name, value in values.items()})
        for at_s in times
    ]


def every(interval_s: float, started_s: float, ended_s: float) -> list[float]:
    """Times from start to end, both included."""
    count = round((ended_s - started_s) / interval_s)
    return [started_s + i * interval_s for i in range(count + 1)]


def latest(watch: Watch) -> Reading | None:
    """What a monitor reads now, None where it has ended."""
    now = time.monotonic()
    return next(reversed(watch.between(now, now)), None)
