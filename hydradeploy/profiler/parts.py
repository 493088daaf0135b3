"""What of a process belongs to a regime: of a sustained run the first seconds, and what was settled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hydradeploy.profiler.sampling import Measured

# A device's fans, governor and heat sink have hardly answered yet.
BURST_S = 10.0


@dataclass(frozen=True)
class Part:
    """Samples of a process, and when they were taken on the monotonic clock.

    `calls` are those that a meter counts, the last of which was done at `called_until_s`.
    """

    samples: tuple[float, ...]
    started_s: float
    ended_s: float
    calls: int
    called_until_s: float


def part_of(found: Measured, regime: str) -> Part:
    """What belongs to a regime; of what was never settled that is the latter half, as at least half of it is warm."""
    samples = found.latency_s
    if regime == "burst":
        return _between(found, 0, _burst(samples))
    if regime == "sustained":
        return _between(found, len(samples) // 2 if found.settled_from is None else found.settled_from, len(samples))
    return Part(samples, found.started_s, found.ended_s, found.calls, found.called_until_s)


def _between(found: Measured, first: int, last: int) -> Part:
    samples = found.latency_s
    # Such calls are back to back: what is between them is the same after each.
    pace = (found.ended_s - found.started_s) / math.fsum(samples)
    started_s, ended_s = (found.started_s + pace * math.fsum(samples[:place]) for place in (first, last))
    return Part(samples[first:last], started_s, ended_s, last - first, ended_s)


def _burst(samples: tuple[float, ...]) -> int:
    """How many of the first samples it is."""
    total = 0.0
    for count, value in enumerate(samples):
        total += value
        if total > BURST_S and count:
            return count
    return len(samples)
