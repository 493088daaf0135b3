"""What a fixed rate of arrivals makes of responses, each counted from its intended arrival in seconds."""

from __future__ import annotations

from collections.abc import Sequence


def deadline_misses(latency_s: Sequence[float], pace_hz: float) -> float:
    """The share of responses that take longer than one period: the next frame was there before they were done."""
    return sum(value > 1 / pace_hz for value in latency_s) / len(latency_s)


def frame_age_s(latency_s: Sequence[float], pace_hz: float, process: Sequence[int] | None = None) -> tuple[float, ...]:
    """How old the newest finished frame gets before the next one is finished, one value per pair of successive frames.

    The next frame arrives a period later and is finished a response after that; no frame is dropped. `process` tells
    the child each response comes from, where there are several: the last frame of one has no successor.
    """
    child = process if process is not None else [0] * len(latency_s)
    return tuple(
        1 / pace_hz + latency_s[after] for after in range(1, len(latency_s)) if child[after] == child[after - 1]
    )
