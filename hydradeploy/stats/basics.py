"""Mean, median, variance, the normal and Student's distribution in plain floats.

The standard library's statistics module is exact, a hundred times slower, and takes 10 ms to import; a pick has 300.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

_STEPS = 200
# Beyond that many degrees of freedom Student's t is the normal distribution and the first term of what is between.
_ALMOST_NORMAL = 500


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; `values` is not empty."""
    return math.fsum(values) / len(values)


def median(values: Sequence[float]) -> float:
    """The middle value, of an even number the mean of the two in the middle; `values` is not empty."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def variance(values: Sequence[float]) -> float:
    """The sample's variance (n - 1), 0 for one value."""
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / max(1, len(values) - 1)


def normal_quantile(level: float) -> float:
    """The standard normal distribution's quantile; raises ValueError unless 0 < level < 1."""
    if not 0 < level < 1:
        raise ValueError(f"no quantile of level {level}")
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2)) < level else (low, middle)
    return (low + high) / 2


@lru_cache(maxsize=256)
def student_quantile(level: float, freedom: float) -> float:
    """The quantile of Student's t with `freedom` degrees of it, a real number of at least 1.

    With t = sqrt(freedom) * tan(angle) the density is a power of the cosine, which Simpson's rule integrates; the
    angle is found by halving. Raises ValueError unless 0 < level < 1 and freedom >= 1.
    """
    if not (0 < level < 1 and freedom >= 1):
        raise ValueError(f"no quantile of level {level} with {freedom} degrees of freedom")
    if level < 0.5:
        return -student_quantile(1 - level, freedom)
    if freedom > _ALMOST_NORMAL:
        z = normal_quantile(level)
        return z + (z**3 + z) / (4 * freedom)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        step = middle / _STEPS
        inner = sum((4 if i % 2 else 2) * math.cos(i * step) ** (freedom - 1) for i in range(1, _STEPS))
        reached = 0.5 + scale * (1 + inner + math.cos(middle) ** (freedom - 1)) * step / 3
        low, high = (middle, high) if reached < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
