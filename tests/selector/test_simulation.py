"""How often an answer is wrong, when latencies are drawn from distributions whose percentiles are known.

A run has a ladder of cells, each wider one slower and more accurate, five fresh processes of forty samples each. What
the budget is about is the percentile over all processes that could have been, so a process's level is drawn, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from hydradeploy.selector.budget import Budget
from hydradeploy.selector.choose import Choice, choose
from hydradeploy.selector.judge import Candidate
from tests.selector.build import candidate, limit, share

LEVEL = 0.95
WRONG = 0.05
PROCESSES, SAMPLES = 5, 40
# Latencies of a ladder's cells relative to its first.
LADDER = (1.0, 1.35, 1.8)
FAST_RUNS, SLOW_RUNS = 400, 2000
RIGHT = [share(100 + 20 * rung) for rung in range(len(LADDER))]


@dataclass(frozen=True)
class Law:
    """Residuals by quantile and distribution function, the first autocorrelation, and the levels' spread.

    Limits are drawn up to a factor of `reach` around the truth: what spreads more can be told only from farther away.
    """

    name: str
    ppf: Callable[[np.ndarray], np.ndarray]
    cdf: Callable[[np.ndarray], np.ndarray]
    follow: float = 0.0
    spread: float = 0.0
    reach: float = 1.3

    def draw(self, generator: np.random.Generator, scale: float) -> list[list[float]]:
        normal = generator.standard_normal((PROCESSES, SAMPLES))
        for i in range(1, SAMPLES):
            normal[:, i] = self.follow * normal[:, i - 1] + math.sqrt(1 - self.follow**2) * normal[:, i]
        levels = np.exp(self.spread * generator.standard_normal((PROCESSES, 1)))
        return (scale * levels * self.ppf(ndtr(normal))).tolist()


def log_normal(name: str, **changes: float) -> Law:
    return Law(name, lambda u: np.exp(0.1 * ndtri(u)), lambda x: ndtr(np.log(np.maximum(x, 1e-9)) / 0.1), **changes)


def tailed(name: str, **changes: float) -> Law:
    return Law(name, lambda u: 1 - 0.1 * np.log1p(-u), lambda x: -np.expm1(-np.maximum(0.0, x - 1) / 0.1), **changes)


LAWS = (
    log_normal("independent"),
    tailed("independent with a tail"),
    log_normal("each follows the last", follow=0.5, reach=1.5),
    log_normal("processes differ by 5 %", spread=0.05, reach=1.5),
    log_normal("processes differ by 20 %", spread=0.2, reach=2.5),
    tailed("everything", follow=0.5, spread=0.1, reach=2),
)


@lru_cache
def percentile_s(law: Law) -> float:
    """The true one, of a call in a process that is drawn, too."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    levels, weights = np.exp(law.spread * nodes), weights / weights.sum()
    return brentq(lambda x: float(weights @ law.cdf(x / levels)) - LEVEL, 1e-3, 100.0, xtol=1e-9)


def runs(law: Law, count: int, rungs: Sequence[float]) -> Iterator[tuple[float, Choice, Sequence[Candidate]]]:
    """The limit, the answer and the ladder of each run."""
    generator = np.random.default_rng([count, *law.name.encode()])
    truth = percentile_s(law)
    for _ in range(count):
        most = truth * law.reach ** generator.uniform(-1, 1)
        ladder = [candidate(2 + rung, law.draw(generator, factor), RIGHT[rung]) for rung, factor in enumerate(rungs)]
        yield most, choose(ladder, Budget(latency=(limit(100 * LEVEL, most),))), ladder


def tolerated(count: int) -> int:
    """So many wrong ones of `count` are no proof, at one in ten thousand, that more than WRONG are."""
    return int(binom.ppf(1 - 1e-4, count, WRONG))


def check(law: Law, count: int) -> None:
    truth = percentile_s(law)
    passed = false_passes = too_slow = infeasible = false_refusals = fits = 0
    for most, choice, ladder in runs(law, count, LADDER):
        meets = [truth * factor <= most for factor in LADDER]
        fits += meets[0]
        too_slow += not meets[0]
        if choice.verdict == "pass":
            passed += 1
            false_passes += not meets[next(i for i, one in enumerate(ladder) if one is choice.pick)]
        if choice.verdict == "infeasible":
            infeasible += 1
            false_refusals += meets[0]
    # A test that nothing ever passes proves nothing.
    assert passed >= count / 12
    assert infeasible >= count / 12
    assert false_passes <= tolerated(passed)
    assert false_passes <= tolerated(too_slow)
    assert false_refusals <= tolerated(infeasible)
    assert false_refusals <= tolerated(fits)


def check_at_the_limit(law: Law, count: int) -> None:
    """The worst case: one cell whose percentile is a hair above the limit, then one a hair below."""
    truth, passes, refusals = percentile_s(law), 0, 0
    generator = np.random.default_rng([7, count, *law.name.encode()])
    for _ in range(count):
        one = candidate(2, law.draw(generator, 1.0), RIGHT[0])
        passes += choose([one], Budget(latency=(limit(100 * LEVEL, truth * (1 - 1e-9)),))).verdict == "pass"
        refusals += choose([one], Budget(latency=(limit(100 * LEVEL, truth * (1 + 1e-9)),))).verdict == "infeasible"
    assert passes <= tolerated(count)
    assert refusals <= tolerated(count)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_answers_are_wrong_no_more_often_than_the_confidence_allows(law: Law):
    check(law, FAST_RUNS)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_so_they_are_at_the_very_limit(law: Law):
    check_at_the_limit(law, FAST_RUNS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_answers_are_wrong_no_more_often_over_thousands_of_runs(law: Law):
    check(law, SLOW_RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_so_they_are_at_the_very_limit_over_thousands_of_runs(law: Law):
    check_at_the_limit(law, SLOW_RUNS)
