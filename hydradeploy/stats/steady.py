"""Whether a run of latencies has stopped changing.

What has to settle is not known beforehand (clocks take seconds, lazy loading a call), so the first half of a warm-up is
given up and the latest half judged, however long that is: a warm-up that is twice as long forgets twice as much (as
Gelman and Rubin do with chains, Statistical Science 7, 1992). The half is cut into three windows. It is steady where

- their medians agree within AGREEMENT, or differ by no more than their own noise explains: the studentized range of
  three at 95 % (Tukey, 3.31) times the standard error of a median, 1.253 sigma / sqrt(n). Sigma is the interquartile
  range of what windows leave over their medians, over 1.349: neither a few spikes nor a trend widen it much; and
- there is no trend: Spearman's rank correlation of latency and place is within two of its standard errors,
  1 / sqrt(n - 1), or the outer windows' medians differ by less than NEGLIGIBLE.

A process still speeding up is refused rather too long than too briefly: the test is put again as the run goes on, so a
wrong "no" costs some calls and a wrong "yes" the measurement. What moves by less than NEGLIGIBLE in half of a warm-up
passes; heat is such a thing, and `agree` over long windows is for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from hydradeploy.stats.basics import median
from hydradeploy.stats.order import quantile

AGREEMENT = 0.05
NEGLIGIBLE = 0.01
# Fewer in a window say nothing of its median.
LEAST_WINDOW = 5
# Of more only evenly spaced ones are looked at, so that a test costs the same after a million calls.
MOST_WINDOW = 64
LEAST_SAMPLES = 2 * 3 * LEAST_WINDOW


def steady(samples: Sequence[float]) -> bool | None:
    """Whether latencies, all of a warm-up in order, had stopped changing at its end; None for fewer than LEAST_SAMPLES.

    Takes less than a millisecond, of however many.
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    size = len(samples) // 6
    step = math.ceil(size / MOST_WINDOW)
    first = len(samples) - 3 * size
    windows = [list(samples[start : start + size : step]) for start in range(first, len(samples), size)]
    medians = [median(window) for window in windows]
    noise = _sigma(windows, medians) * 1.253 / math.sqrt(len(windows[0]))
    if not (agree(medians, AGREEMENT) or max(medians) - min(medians) <= 3.31 * noise):
        return False
    latest = [value for window in windows for value in window]
    moved = abs(medians[-1] - medians[0]) > NEGLIGIBLE * median(medians)
    return not (moved and abs(_rank_correlation(latest)) * math.sqrt(len(latest) - 1) > 2)


def agree(medians: Sequence[float], tolerance: float) -> bool:
    """Whether windows' medians lie within that fraction of the one in their middle; `medians` is not empty."""
    return max(medians) - min(medians) <= tolerance * median(medians)


def _sigma(windows: Sequence[Sequence[float]], medians: Sequence[float]) -> float:
    """Standard deviation of one sample about its window's median, from the quartiles."""
    left = sorted(value - middle for window, middle in zip(windows, medians, strict=True) for value in window)
    return (quantile(left, 0.75) - quantile(left, 0.25)) / 1.349


def _rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, of the values and their places; equal values share their mean rank. 0 where all are equal."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    rank = {value: (found[0] + found[-1]) / 2 for value, found in places.items()}
    centre = (len(values) - 1) / 2
    ranks = [rank[value] - centre for value in values]
    times = [place - centre for place in range(len(values))]
    power = math.fsum(map(mul, ranks, ranks)) * math.fsum(map(mul, times, times))
    return math.fsum(map(mul, ranks, times)) / math.sqrt(power) if power else 0.0
