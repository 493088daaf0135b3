"""Order statistics: which ranks bound a quantile, and how many samples that takes.

Distribution-free, for independent samples (Hahn and Meeker, Statistical Intervals, section 5.2). Ranks start at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache


def quantile(ordered: Sequence[float], level: float) -> float:
    """The order statistic of rank ceil(n * level), without interpolation; `ordered` ascends and is not empty."""
    # A level such as 0.95 times 100 must not become 95.00000000000001 and rank 96.
    return ordered[max(1, math.ceil(round(len(ordered) * level, 9))) - 1]


def upper_rank(n: int, level: float, confidence: float) -> int | None:
    """The smallest rank that bounds the quantile from above with that confidence; None for too few samples."""
    misses = allowed_misses(n, level, confidence)
    return None if misses is None else n - misses


def lower_rank(n: int, level: float, confidence: float) -> int | None:
    """The largest rank that bounds the quantile from below with that confidence; None for too few samples."""
    rank = _largest_tail(n, level, 1 - confidence)
    return None if rank is None else rank + 1


@lru_cache(maxsize=4096)
def allowed_misses(n: int, level: float, confidence: float) -> int | None:
    """How many of n samples may exceed a limit while "the quantile is within it" still holds with that confidence."""
    return _largest_tail(n, 1 - level, 1 - confidence)


@lru_cache(maxsize=4096)
def samples_needed(level: float, confidence: float, misses: int = 0) -> int:
    """The fewest samples that bound the quantile from above when `misses` of them may exceed the bound."""
    n = misses + 1
    step = max(1, misses)
    while not _enough(n, level, confidence, misses):
        n += step
        step *= 2
    low = misses
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (low, middle) if _enough(middle, level, confidence, misses) else (middle, n)
    return n


def _enough(n: int, level: float, confidence: float, misses: int) -> bool:
    allowed = allowed_misses(n, level, confidence)
    return allowed is not None and allowed >= misses


def _largest_tail(n: int, share: float, most: float) -> int | None:
    """The largest m with P(Bin(n, share) <= m) <= most; None where not even m = 0 has it."""
    if not (n >= 0 and 0 < share < 1 and 0 < most < 1):
        raise ValueError(f"no ranks for {n} samples, share {share}, probability {most}")
    # From twelve standard deviations below the mean: what lies before is nothing. In logarithms, as terms underflow.
    first = max(0, math.floor(n * share - 12 * math.sqrt(n * share * (1 - share)) - 12))
    odds = math.log(share) - math.log1p(-share)
    term = math.lgamma(n + 1) - math.lgamma(first + 1) - math.lgamma(n - first + 1)
    term += first * math.log(share) + (n - first) * math.log1p(-share)
    total = 0.0
    for m in range(first, n + 1):
        total += math.exp(term)
        # Equality counts, but a sum of floats does not reach it: thousands of terms are off by up to 1e-10.
        if total > most * (1 + 1e-9):
            return m - 1 if m else None
        if m < n:
            term += math.log((n - m) / (m + 1)) + odds
    return n
