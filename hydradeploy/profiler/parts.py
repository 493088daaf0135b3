"""What of a process belongs to a regime: of a sustained run the first seconds, and what was settled."""

from __future__ import annotations

import math

from hydradeploy.profiler.sampling import Measured

# A device's fans, governor and heat sink have hardly answered yet.
BURST_S = 10.0


def part_of(found: Measured, regime: str) -> slice:
    """The samples that belong to a regime; what was never settled is at least half of it warm."""
    samples = found.latency_s
    if regime == "burst":
        return slice(0, _burst(found))
    if regime == "sustained":
        return slice(len(samples) // 2 if found.settled_from is None else found.settled_from, len(samples))
    return slice(0, len(samples))


def window_of(found: Measured, regime: str) -> tuple[float, float]:
    """When those were taken, on the monotonic clock."""
    if regime not in ("burst", "sustained"):
        return found.started_s, found.ended_s
    samples, part = found.latency_s, part_of(found, regime)
    # Such calls are back to back: what is between them is the same after each.
    pace = (found.ended_s - found.started_s) / math.fsum(samples)
    started_s, ended_s = (found.started_s + pace * math.fsum(samples[:place]) for place in (part.start, part.stop))
    return started_s, ended_s


def _burst(found: Measured) -> int:
    total = 0.0
    for count, value in enumerate(found.latency_s):
        total += value
        if total > BURST_S and count:
            return count
    return len(found.latency_s)
