"""Bounds for a percentile of latencies that are neither independent nor from one process.

Samples of one process follow each other: what slows one call often slows the next, so n of them are worth fewer
(`effective`). Processes differ: where memory landed, what else ran. Each is one draw from all the processes that could
have been, so a bound for the next one must allow for their spread. The model is a level per process, log-normal
between processes, times a residual of any distribution; where processes do not differ it is the distribution-free
bound of `stats.order` at the effective sample size. Where the samples are worth too few for that, an upper bound takes
the residuals to be log-normal too, and `assumes` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import mul

from hydradeploy.stats.basics import mean, median, normal_quantile, variance
from hydradeploy.stats.order import allowed_misses, lower_rank, quantile

# What the bounds are tested for. Beyond it levels are no longer a little noise around one value.
MOST_SPREAD = 0.3
# Samples per independent one: an AR(1) process of 0.9 has 19.
MOST_DEPENDENCE = 20.0
# Lags up to twice as many are summed one by one, later ones a part in so many apart: what depends that long is smooth.
_EACH_LAG = 50
# From so many samples on their products are summed by numpy.
_MANY = 10_000
# Fewer say too little of any distribution.
LEAST_WORTH = 10.0
# No upper bound is below that of one of these under it.
_COMMON_LEVELS = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Bounds:
    """One percentile of a sample of latencies, in seconds.

    `lower` and `upper` are one-sided bounds, each with the confidence asked for; None where the samples cannot carry
    one, and `why_not` says why. `assumes` is what `upper` takes for granted, None where it is nothing about the shape
    of the distribution. `n_effective` is what the samples are worth if they were independent; `spread` the
    standard deviation of the processes' levels beyond what their samples explain, as a fraction, None for one process.
    """

    level: float
    estimate: float
    lower: float | None
    upper: float | None
    n: int
    n_effective: float
    processes: int
    spread: float | None
    assumes: str | None
    why_not: str | None


def bounds(samples: Sequence[float], process: Sequence[int], level: float, confidence: float) -> Bounds:
    """Bounds for the `level` quantile (0 to 1) of a fresh process's latencies.

    `samples` are in seconds and in order, `process` tells the child each comes from. The upper bound is not below that
    of the median, p90, p95 or p99 where they are lower levels. Raises ValueError for none, for values that are no
    positive numbers, and where the two differ in length.
    """
    if (
        not samples
        or len(samples) != len(process)
        or not (0 < min(samples) <= max(samples) < math.inf)
        or math.isnan(sum(samples))
    ):
        raise ValueError("latencies must be positive and finite, at least one, with a process each")
    chains = by_process(samples, process)
    ordered = sorted(samples)
    logs = [[math.log(value) for value in chain] for chain in chains]

    def alone(level: float, worth: float) -> Bounds:
        spread = spread_of(chains, worth)
        lower = upper = None
        why_not = _why_not(len(ordered), worth, spread, len(chains))
        ranks = _Ranks(ordered, logs, worth, level, confidence)
        if why_not is None and spread is not None:
            lower, upper = ranks.lower(spread), ranks.upper(spread)
        return Bounds(
            level=level,
            estimate=quantile(ordered, level),
            lower=lower,
            upper=upper,
            n=len(ordered),
            n_effective=worth,
            processes=len(chains),
            spread=spread,
            assumes="log-normal latencies" if upper is not None and ranks.misses is None else None,
            why_not=why_not,
        )

    levels = (level, *(lower for lower in _COMMON_LEVELS if lower < level))
    found, *under = map(alone, levels, worths(chains, levels))
    if found.upper is None:
        return found
    # Each level has its own estimate of dependence: a lower one can be worth less, and bounded by more.
    widest = max([found, *under], key=lambda each: each.upper or 0.0)
    return replace(found, upper=widest.upper, assumes=widest.assumes)


def by_process(samples: Sequence[float], process: Sequence[int]) -> list[list[float]]:
    """The samples of each process, in order."""
    chains: dict[int, list[float]] = {}
    for number, value in zip(process, samples, strict=True):
        chains.setdefault(number, []).append(value)
    return list(chains.values())


def n_effective(chains: Sequence[Sequence[float]], level: float) -> float:
    """What samples of several processes, each in order, are worth for a quantile if they were independent."""
    return worths(chains, [level])[0]


def worths(chains: Sequence[Sequence[float]], levels: Sequence[float]) -> list[float]:
    """The `n_effective` of each level.

    n over the integrated autocorrelation time, the larger one of the ranks (which no outlier distorts) and of being
    among the slowest (bursts of slow calls are dependence that ranks hardly see). At least one for each process.
    """
    ordered = sorted(value for chain in chains for value in chain)
    n = len(ordered)
    place = {value: rank for rank, value in enumerate(ordered)}
    of_ranks = autocorrelation_time([[place[value] for value in chain] for chain in chains])

    def worth(level: float) -> float:
        # At the level itself, but with ten samples above it.
        slow = quantile(ordered, max(0.5, min(level, 1 - 10 / n)))
        of_slow = autocorrelation_time([[float(value > slow) for value in chain] for chain in chains])
        return max(float(len(chains)), n / max(of_ranks, of_slow))

    return [worth(level) for level in levels]


def autocorrelation_time(chains: Sequence[Sequence[float]]) -> float:
    """How many samples of a chain are worth one independent one, at least 1 (Sokal 1989, section 3).

    One plus twice the sum of the autocorrelations up to the first that noise alone would explain; at least that of an
    AR(1) process with the first of them, corrected for the bias of short chains (Kendall 1954).
    """
    centred = [[value - centre for value in chain] for chain in chains for centre in [mean(chain)]]
    n = sum(map(len, centred))
    total = sum(sum(map(mul, chain, chain)) for chain in centred)
    # A mean can be off by its last bit, which would leave constants perfectly dependent.
    if total == 0 or all(min(chain) == max(chain) for chain in chains):
        return 1.0
    # One standard error of no correlation at all: rather too much dependence seen than too little.
    noise = 1 / math.sqrt(n)
    found = list(_autocorrelations(centred, total / n, noise))
    if not found:
        return 1.0
    area = sum(value * width for value, width in found)
    length = n / len(centred)
    # Chains of unlike lengths can show a correlation above 1.
    first = min(0.999, (found[0][0] * length + 1) / (length - 3) if length > 6 else found[0][0])
    return max(1 + 2 * area, (1 + first) / (1 - first))


def _autocorrelations(centred: Sequence[Sequence[float]], power: float, noise: float) -> Iterator[tuple[float, int]]:
    """Each autocorrelation above the noise, and for how many lags it stands."""
    lag, longest = 1, max(map(len, centred))
    product = _products(centred)
    while lag < longest:
        pairs = sum(max(0, len(chain) - lag) for chain in centred)
        value = product(lag) / pairs / power
        if value <= noise:
            return
        width = min(max(1, lag // _EACH_LAG), longest - lag)
        yield value, width
        lag += width


def _products(centred: Sequence[Sequence[float]]) -> Callable[[int], float]:
    """The sum of the products of all pairs so many samples apart, by that lag."""
    if sum(map(len, centred)) < _MANY:
        return lambda lag: sum(sum(map(mul, chain, chain[lag:])) for chain in centred)
    import numpy as np  # which takes longer to import than few samples take without it

    arrays = [np.array(chain) for chain in centred]
    return lambda lag: sum(float(chain[:-lag] @ chain[lag:]) for chain in arrays)


@dataclass(frozen=True)
class _Ranks:
    """The order statistics that bound one quantile, of the samples and of what is left of them without their levels."""

    ordered: Sequence[float]
    logs: Sequence[Sequence[float]]
    worth: float
    level: float
    confidence: float

    @property
    def misses(self) -> int | None:
        """How many independent samples may exceed the bound, None where there are too few for any."""
        return allowed_misses(math.floor(self.worth), self.level, self.confidence)

    def upper(self, spread: float) -> float:
        n = len(self.ordered)
        margin = tolerance_factor(len(self.logs), self.level, self.confidence) * spread if spread else 0.0
        if self.misses is None:
            return max(self.ordered[-1], self._of_log_normals(margin), self._of_a_fresh_process(n - 1, margin))
        place = n - 1 - math.floor(self.misses * n / self.worth)
        return max(quantile(self.ordered, self.level), self.ordered[place], self._of_a_fresh_process(place, margin))

    def lower(self, spread: float) -> float | None:
        rank = lower_rank(math.floor(self.worth), self.level, self.confidence)
        if rank is None:
            return None
        place = max(1, math.floor(rank * len(self.ordered) / self.worth)) - 1
        margin = tolerance_factor(len(self.logs), 0.5, self.confidence) * spread if spread else 0.0
        # Of very few independent ones even the largest bounds from below; it may lie above the estimate.
        return min(quantile(self.ordered, self.level), self.ordered[place], self._of_a_fresh_process(place, -margin))

    def _of_log_normals(self, margin: float) -> float:
        """The tolerance bound of a third as many normal logarithms as the samples are worth, moved by a margin.

        A third, because few dependent samples hide how dependent they are, and tails are heavier than that.
        """
        logs = [value for chain in self.logs for value in chain]
        factor = tolerance_factor(max(2, math.floor(self.worth / 3)), self.level, self.confidence)
        return math.exp(mean(logs) + factor * math.sqrt(variance(logs)) + margin)

    def _of_a_fresh_process(self, place: int, margin: float) -> float:
        """The mean level, moved by a margin, times the residual of that place."""
        if margin == 0:
            return self.ordered[place]
        levels = [median(chain) for chain in self.logs]
        residuals = sorted(value - centre for chain, centre in zip(self.logs, levels, strict=True) for value in chain)
        return math.exp(mean(levels) + margin + residuals[place])


def spread_of(chains: Sequence[Sequence[float]], worth: float) -> float | None:
    """How much processes differ: the standard deviation of their mean log latency beyond what their samples explain.

    `worth` is the `n_effective` of all samples, which are positive. None for one process.
    """
    if len(chains) < 2:
        return None
    logs = [[math.log(value) for value in chain] for chain in chains]
    time = sum(map(len, chains)) / worth
    within = mean([variance(chain) * time / len(chain) for chain in logs])
    return math.sqrt(max(0.0, variance([mean(chain) for chain in logs]) - within))


def _believable(processes: int) -> float:
    """The largest spread that so many processes of MOST_SPREAD show in nine of ten cases.

    By the chi-square quantile of Wilson and Hilferty (1931).
    """
    weight = 2 / (9 * (processes - 1))
    return MOST_SPREAD * math.pow(1 - weight + normal_quantile(0.9) * math.sqrt(weight), 1.5)


def _why_not(n: int, worth: float, spread: float | None, processes: int) -> str | None:
    if spread is None:
        return "one process says nothing about the next one"
    if spread > _believable(processes):
        return f"{processes} processes differ by {spread:.0%}, too much for a statement about the next one"
    if n / worth > MOST_DEPENDENCE:
        return f"calls depend on each other too much: {n} are worth {worth:.0f} independent ones"
    if worth < LEAST_WORTH:
        return f"{n} samples are worth {worth:.0f} independent ones, a bound takes {LEAST_WORTH:.0f}"
    return None


@lru_cache(maxsize=256)
def tolerance_factor(n: int, content: float, confidence: float) -> float:
    """k such that mean + k * standard deviation of n normal samples exceeds their `content` quantile with `confidence`.

    The one-sided normal tolerance factor (ISO 16269-6, annex C): with S the sample's standard deviation in units of
    the true one, the mean over S of Phi(sqrt(n) * (k * S - z)) is the confidence. For content 0.5 it is Student's t
    over sqrt(n). Raises ValueError for n < 2.
    """
    if n < 2:
        raise ValueError(f"{n} samples have no standard deviation")
    z, root = normal_quantile(content), math.sqrt(n)
    points = _chi(n - 1)

    def reached(k: float) -> tuple[float, float]:
        """The confidence of that factor, and its derivative."""
        confidence = slope = 0.0
        for s, weight in points:
            at = root * (k * s - z)
            confidence += weight * 0.5 * math.erfc(-at / math.sqrt(2))
            slope += weight * root * s * math.exp(-at * at / 2) / math.sqrt(2 * math.pi)
        return confidence, slope

    low, high = 0.0, 1.0
    while reached(high)[0] < confidence:
        low, high = high, 2 * high
    # Newton's step where it stays between the two ends, else half of the way.
    k = high
    for _ in range(100):
        found, slope = reached(k)
        low, high = (k, high) if found < confidence else (low, k)
        step = k - (found - confidence) / slope if slope > 0 else low
        following = step if low < step < high else (low + high) / 2
        if abs(following - k) <= 1e-10 * high:
            break
        k = following
    return k


def _chi(freedom: int) -> list[tuple[float, float]]:
    """Points and weights (Simpson) of the distribution of a sample's standard deviation over the true one."""
    # Squares, because a large factor is decided close to zero.
    steps = 400
    last = 1 + 9 / math.sqrt(2 * freedom)
    log_scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    points = []
    for i in range(1, steps + 1):
        root = i / steps
        s = last * root * root
        density = math.exp(log_scale + (freedom - 1) * math.log(s) - freedom * s * s / 2)
        simpson = 1 if i == steps else 4 if i % 2 else 2
        weight = density * 2 * last * root * simpson / steps / 3
        if weight > 1e-14:
            points.append((s, weight))
    return points


def mean_bounds(samples: Sequence[float], process: Sequence[int], confidence: float) -> tuple[float, float] | None:
    """One-sided bounds, below and above, for the mean latency over processes, each with that confidence.

    Student's interval over the processes' means: what varies between processes and what drags on within one are both
    in their scatter. None for fewer than two processes.
    """
    chains = by_process(samples, process)
    if len(chains) < 2:
        return None
    means = [mean(chain) for chain in chains]
    half = tolerance_factor(len(means), 0.5, confidence) * math.sqrt(variance(means))
    return mean(means) - half, mean(means) + half
