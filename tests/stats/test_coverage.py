"""Whether bounds hold as often as they say: drawn many times from distributions whose quantiles are known.

A run draws all processes of one cell, asks for bounds and compares them with the quantile of a fresh process's
latencies. Only runs that give a bound count for it, so a bound that is withheld is neither right nor wrong; one that
takes latencies to be log-normal counts whether they are or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from zlib import crc32

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from hydradeploy.stats.latency import bounds

CONFIDENCE = 0.95
SLOW_RUNS = 2000
# Processes and samples of each.
SMALL, MIDDLE, LARGE = (5, 20), (5, 100), (10, 200)
DESIGNS = (SMALL, MIDDLE, LARGE)


@dataclass(frozen=True)
class Marginal:
    """A distribution of residuals by its quantile and distribution functions."""

    name: str
    ppf: Callable[[np.ndarray], np.ndarray]
    cdf: Callable[[np.ndarray], np.ndarray]


def log_normal(sigma: float) -> Marginal:
    return Marginal(
        f"log-normal {sigma}", lambda u: np.exp(sigma * ndtri(u)), lambda x: ndtr(np.log(np.maximum(x, 1e-300)) / sigma)
    )


def exponential_tail(scale: float) -> Marginal:
    return Marginal(
        f"exponential {scale}", lambda u: 1 - scale * np.log1p(-u), lambda x: -np.expm1(-np.maximum(0, x - 1) / scale)
    )


def spikes(share: float) -> Marginal:
    """Log-normal of sigma 0.05, but for a share that takes at least three times as long."""
    bulk, rest = log_normal(0.05), 1 - share

    def ppf(u):
        spike = np.clip((u - rest) / share, 0, 1 - 1e-12)
        return np.where(u < rest, bulk.ppf(np.minimum(u / rest, 1 - 1e-12)), 3 - np.log1p(-spike))

    def cdf(x):
        return rest * bulk.cdf(x) - share * np.expm1(-np.maximum(0, x - 3))

    return Marginal(f"{share:.0%} spikes", ppf, cdf)


@dataclass(frozen=True)
class Scenario:
    """Residuals that follow each other as a Gaussian AR(1) process does, times a log-normal level per process."""

    residual: Marginal
    phi: float = 0.0
    level_sd: float = 0.0

    def __str__(self) -> str:
        parts = [f"phi {self.phi}"] * (self.phi > 0) + [f"levels {self.level_sd}"] * (self.level_sd > 0)
        return ", ".join([self.residual.name, *parts])

    def draw(self, generator: np.random.Generator, runs: int, processes: int, samples: int) -> np.ndarray:
        """Latencies (runs, processes, samples), stationary from the first on."""
        z = generator.standard_normal((samples, runs, processes))
        for i in range(1, samples):
            z[i] = self.phi * z[i - 1] + (1 - self.phi**2) ** 0.5 * z[i]
        levels = np.exp(self.level_sd * generator.standard_normal((runs, processes)))
        return np.moveaxis(self.residual.ppf(ndtr(z)) * levels, 0, -1)

    def quantile(self, level: float) -> float:
        """The quantile of a fresh process's latencies: its level is drawn too."""
        if not self.level_sd:
            return float(self.residual.ppf(np.float64(level)))
        nodes, weights = np.polynomial.hermite_e.hermegauss(160)
        weights = weights / weights.sum()
        return brentq(lambda x: weights @ self.residual.cdf(x * np.exp(self.level_sd * nodes)) - level, 1e-3, 1e3)


@dataclass(frozen=True)
class Counted:
    """How many runs gave a bound and how many of these were right."""

    runs: int
    upper: int = 0
    upper_right: int = 0
    lower: int = 0
    lower_right: int = 0
    assumed: int = 0

    def __str__(self) -> str:
        def told(name: str, given: int, right: int) -> str:
            return f"{name} given in {given} of {self.runs}" + (f", right in {right / given:.4f}" if given else "")

        upper = told("upper", self.upper, self.upper_right) + f", assumed log-normal in {self.assumed}"
        return f"{upper}; {told('lower', self.lower, self.lower_right)}"


def batches(runs: int, size: int = 200) -> Iterator[int]:
    yield from [size] * (runs // size)
    if runs % size:
        yield runs % size


def count(scenario: Scenario, design: tuple[int, int], runs: int, level: float = 0.95) -> Counted:
    processes, samples = design
    generator = np.random.default_rng(crc32(f"{scenario} {design} {level}".encode()))
    process = np.repeat(np.arange(processes), samples).tolist()
    truth = scenario.quantile(level)
    counted = Counted(runs)
    for size in batches(runs):
        for latencies in scenario.draw(generator, size, processes, samples).reshape(size, -1).tolist():
            found = bounds(latencies, process, level, CONFIDENCE)
            if found.upper is not None:
                right = truth <= found.upper
                counted = replace(counted, upper=counted.upper + 1, upper_right=counted.upper_right + right)
                counted = replace(counted, assumed=counted.assumed + (found.assumes is not None))
            if found.lower is not None:
                right = found.lower <= truth
                counted = replace(counted, lower=counted.lower + 1, lower_right=counted.lower_right + right)
    return counted


NORMAL, WIDE, EXPONENTIAL, SPIKES = log_normal(0.05), log_normal(0.2), exponential_tail(0.2), spikes(0.04)
INDEPENDENT = [Scenario(residual) for residual in (NORMAL, EXPONENTIAL, SPIKES)]
DEPENDENT = [Scenario(NORMAL, phi) for phi in (0.3, 0.5, 0.7, 0.9)]
DEPENDENT += [Scenario(EXPONENTIAL, 0.7), Scenario(SPIKES, 0.5), Scenario(SPIKES, 0.9)]
SPREAD = [Scenario(residual, 0.0, sd) for residual, sd in product((NORMAL, WIDE), (0.02, 0.1, 0.2, 0.3))]
MIXED = [Scenario(NORMAL, 0.5, 0.02), Scenario(WIDE, 0.5, 0.1), Scenario(WIDE, 0.9, 0.3)]
MIXED += [Scenario(EXPONENTIAL, 0.7, 0.2), Scenario(SPIKES, 0.5, 0.1)]
WITHIN = INDEPENDENT + DEPENDENT + SPREAD + MIXED
P95 = [*product(WITHIN, DESIGNS)]
# Few samples of strong dependence, which then hardly shows, and tails heavier than log-normal.
P95 += [(Scenario(EXPONENTIAL, phi), SMALL) for phi in (0.8, 0.9)]
P95 += [(Scenario(exponential_tail(0.5), 0.8), SMALL), (Scenario(NORMAL, 0.9), (5, 40))]

BEYOND = [(Scenario(NORMAL, phi), design) for phi, design in product((0.95, 0.97, 0.99), DESIGNS)]
BEYOND += [(Scenario(NORMAL, 0.0, sd), design) for sd, design in product((0.5, 0.6, 1.0), DESIGNS)]
# Where most runs must give an upper bound, so that coverage says something.
ANSWERED = [(scenario, LARGE) for scenario in WITHIN if scenario.phi < 0.9]
ANSWERED += [(scenario, MIDDLE) for scenario in WITHIN if scenario.phi < 0.6]
ANSWERED += [(scenario, SMALL) for scenario in WITHIN if scenario.phi == 0]
# Worth less than the 299 that p99 takes, and log-normal within a process and between them.
ASSUMING = product([Scenario(NORMAL), Scenario(WIDE), Scenario(NORMAL, 0.5), SPREAD[5], MIXED[1]], [SMALL])
ASSUMING = [*ASSUMING, *product([Scenario(NORMAL, 0.5), Scenario(NORMAL, 0.7), MIXED[1]], [MIDDLE])]


@pytest.mark.parametrize("scenario", [*INDEPENDENT, DEPENDENT[2], SPREAD[5], *MIXED], ids=str)
def test_the_quantile_that_coverage_is_measured_by_has_its_share_of_what_is_drawn(scenario):
    """400,000 processes, so that the share is within five standard deviations of the level or quadrature is wrong."""
    drawn = scenario.draw(np.random.default_rng(1), 4000, 100, 2)[..., 1]
    for level in (0.5, 0.95, 0.99):
        share = (drawn <= scenario.quantile(level)).mean()
        assert abs(share - level) < 5 * (level * (1 - level) / drawn.size) ** 0.5


@pytest.mark.parametrize("phi", [0.3, 0.9])
def test_what_is_drawn_is_autocorrelated_as_said_from_the_first_sample_on(phi):
    drawn = np.log(Scenario(NORMAL, phi).draw(np.random.default_rng(1), 20_000, 1, 4)[:, 0, :]) / 0.05
    assert drawn.std(axis=0) == pytest.approx([1] * 4, abs=0.03)
    assert np.corrcoef(drawn.T)[0] == pytest.approx([phi**lag for lag in range(4)], abs=0.03)


def holds(right: int, given: int) -> bool:
    """Whether so few right ones are likelier than one in ten thousand where each is right with the confidence."""
    return not given or binom.cdf(right, given, CONFIDENCE) > 1e-4


FAST = [(INDEPENDENT[0], LARGE, 200), (INDEPENDENT[1], MIDDLE, 400), (INDEPENDENT[2], SMALL, 1000)]
FAST += [(DEPENDENT[1], MIDDLE, 400), (DEPENDENT[3], LARGE, 150), (DEPENDENT[5], LARGE, 150)]
FAST += [(Scenario(SPIKES, 0.5), SMALL, 800), (Scenario(EXPONENTIAL, 0.8), SMALL, 800), (DEPENDENT[3], (5, 40), 400)]
FAST += [(SPREAD[2], SMALL, 800), (SPREAD[5], MIDDLE, 300), (SPREAD[3], LARGE, 150), (MIXED[1], MIDDLE, 300)]


@pytest.mark.parametrize(("scenario", "design", "runs"), FAST, ids=str)
def test_bounds_hold_with_their_confidence_in_a_few_hundred_runs(scenario, design, runs):
    counted = count(scenario, design, runs)
    assert holds(counted.upper_right, counted.upper), str(counted)
    assert holds(counted.lower_right, counted.lower), str(counted)
    assert counted.upper > runs / 4, str(counted)
    assert counted.lower > runs / 4, str(counted)


@pytest.mark.parametrize(
    ("scenario", "design"),
    [
        *product([Scenario(NORMAL, 0.97), Scenario(NORMAL, 0.99)], (SMALL, MIDDLE)),
        *product([Scenario(NORMAL, 0.0, 1.0)], (SMALL, LARGE)),
    ],
    ids=str,
)
def test_beyond_what_the_bounds_are_made_for_there_are_mostly_none(scenario, design):
    counted = count(scenario, design, 100)
    assert counted.upper < 50, str(counted)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "design"), P95, ids=str)
def test_bounds_of_p95_hold_with_their_confidence(scenario, design, record_property):
    counted = count(scenario, design, SLOW_RUNS)
    record_property("counted", str(counted))
    assert counted.upper_right >= CONFIDENCE * counted.upper, str(counted)
    assert counted.lower_right >= CONFIDENCE * counted.lower, str(counted)
    if (scenario, design) in ANSWERED:
        assert counted.upper > SLOW_RUNS / 2, str(counted)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*INDEPENDENT, Scenario(NORMAL, 0.5)], ids=str)
def test_bounds_of_p99_hold_with_their_confidence(scenario, record_property):
    counted = count(scenario, LARGE, SLOW_RUNS, level=0.99)
    record_property("counted", str(counted))
    assert counted.upper_right >= CONFIDENCE * counted.upper, str(counted)
    assert counted.lower_right >= CONFIDENCE * counted.lower, str(counted)
    assert counted.upper > SLOW_RUNS / 2, str(counted)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "design"), ASSUMING, ids=str)
def test_bounds_of_p99_that_assume_log_normal_latencies_hold_where_they_are(scenario, design, record_property):
    counted = count(scenario, design, SLOW_RUNS, level=0.99)
    record_property("counted", str(counted))
    assert counted.upper_right >= CONFIDENCE * counted.upper, str(counted)
    assert counted.assumed > SLOW_RUNS / 2, str(counted)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "design"), BEYOND, ids=str)
def test_too_much_dependence_or_spread_gives_no_upper_bound_in_most_runs(scenario, design, record_property):
    counted = count(scenario, design, SLOW_RUNS)
    record_property("counted", str(counted))
    assert counted.upper <= SLOW_RUNS / 2, str(counted)
