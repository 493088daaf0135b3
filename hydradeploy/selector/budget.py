"""What must hold."""

from __future__ import annotations

import re
from typing import Literal, get_args

from hydradeploy.errors import UsageError
from hydradeploy.spec import Record
from hydradeploy.units import DURATION, parse

Preference = Literal["accuracy", "latency", "energy", "memory", "size"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)

DEFAULT_LEVEL = 0.95


class LatencyLimit(Record, frozen=True, kw_only=True):
    """The `percentile` (0 to 1) of the latency is at most `limit_s`."""

    percentile: float
    limit_s: float

    @property
    def name(self) -> str:
        """`p95`, `p99.9`."""
        return percentile_name(self.percentile)


class Budget(Record, frozen=True, kw_only=True):
    """Everything that must hold, each with `confidence` where chance is in it; None is no limit.

    `throughput_per_s` is in images, `min_top1` a fraction that the lower end of the accuracy's Wilson interval
    must reach.
    """

    latency: tuple[LatencyLimit, ...] = ()
    memory_bytes: float | None = None
    energy_j: float | None = None
    size_bytes: float | None = None
    throughput_per_s: float | None = None
    min_top1: float | None = None
    confidence: float = 0.95

    @property
    def level(self) -> float:
        """The percentile that latencies are compared by: the first that is limited."""
        return self.latency[0].percentile if self.latency else DEFAULT_LEVEL

    @property
    def only_a_floor(self) -> bool:
        """Whether nothing but accuracy is asked for: then the fastest is wanted, not the most accurate."""
        others = (self.memory_bytes, self.energy_j, self.size_bytes, self.throughput_per_s)
        return self.min_top1 is not None and not self.latency and all(limit is None for limit in others)


def parse_latency(text: str) -> LatencyLimit:
    """A limit from `20ms` (the 95th percentile), `p99<=20ms` or `p99.9<20ms`; raises UsageError."""
    match = re.fullmatch(r"\s*(?:p([0-9]{1,2}(?:\.[0-9]+)?)\s*<=?\s*)?(.*)", text)
    if match is None or "<" in match[2]:
        raise UsageError(f"{text!r} is not a latency budget", hint="write for example 20ms or 'p99<=20ms'")
    level = DEFAULT_LEVEL if match[1] is None else round(float(match[1]) / 100, 9)
    limit_s = parse(match[2], DURATION)
    if not 0 < level < 1 or limit_s <= 0:
        raise UsageError(f"{text!r} is no percentile below 100 and a duration above 0", hint="write 'p99<=20ms'")
    return LatencyLimit(percentile=level, limit_s=limit_s)


def percentile_name(level: float) -> str:
    """0.95 is `p95`."""
    return f"p{100 * level:.7f}".rstrip("0").rstrip(".")
