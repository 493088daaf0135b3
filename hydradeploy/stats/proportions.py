"""Proportions: how often something is right, and whether two things differ in it on the same cases."""

from __future__ import annotations

import math

from hydradeploy.stats.basics import normal_quantile


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval for a proportion (Wilson 1927): honest near 0 and 1 and for few samples.

    Raises ValueError unless 0 <= correct <= total, total > 0 and 0 < confidence < 1.
    """
    if not (0 <= correct <= total and total > 0 and 0 < confidence < 1):
        raise ValueError(f"no interval for {correct} of {total} at confidence {confidence}")
    z = normal_quantile((1 + confidence) / 2)
    share, weight = correct / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    # At the ends the exact bounds are 0 and 1; rounding must not leave the share outside its own interval.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def mcnemar(only_one: int, only_other: int) -> float:
    """Two-sided exact p-value that two classifiers are equally often right on the same cases (McNemar 1947).

    `only_one` counts the cases that the first alone had right, `only_other` those of the second alone: under equality
    each is a fair coin's toss. Raises ValueError for negative counts.
    """
    if only_one < 0 or only_other < 0:
        raise ValueError(f"counts cannot be negative: {only_one}, {only_other}")
    total, fewer = only_one + only_other, min(only_one, only_other)
    # From the largest term down; the first is found in logarithms, because powers of a half underflow.
    log_first = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1)
    term = math.exp(log_first + total * math.log(0.5))
    tail = 0.0
    for i in range(fewer, -1, -1):
        tail += term
        term *= i / (total - i + 1)
        if term < 1e-17 * tail:
            break
    return min(1.0, 2 * tail)
