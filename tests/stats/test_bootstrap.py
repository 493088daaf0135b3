"""Intervals for what is observed: how often they hold where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
import pytest
from scipy.stats import binom
from scipy.stats import t as student

from hydradeploy.stats.basics import student_quantile
from hydradeploy.stats.bootstrap import Interval, mean_interval, quantile_interval
from hydradeploy.stats.order import quantile

FAST_RUNS, SLOW_RUNS = 200, 2000
# What is promised of intervals that are to hold in 95 % of runs.
LEAST, MOST = 0.93, 0.985


@dataclass(frozen=True)
class Scenario:
    """Log-normal calls, each following the last as an AR(1) process does, times a log-normal level per process."""

    processes: int
    samples: int
    spread: float
    phi: float = 0.0
    sigma: float = 0.05

    def draw(self, generator: np.random.Generator) -> tuple[list[float], list[int]]:
        z = generator.standard_normal((self.processes, self.samples))
        for i in range(1, self.samples):
            z[:, i] = self.phi * z[:, i - 1] + (1 - self.phi**2) ** 0.5 * z[:, i]
        levels = self.spread * generator.standard_normal((self.processes, 1))
        process = np.repeat(np.arange(self.processes), self.samples)
        return np.exp(self.sigma * z + levels).ravel().tolist(), process.tolist()

    @property
    def median(self) -> float:
        return 1.0

    @property
    def mean(self) -> float:
        return float(np.exp((self.spread**2 + self.sigma**2) / 2))


SCENARIOS = [
    Scenario(5, 20, 0.0),
    Scenario(5, 20, 0.02, phi=0.5),
    Scenario(5, 20, 0.1),
    Scenario(5, 20, 0.3, phi=0.5),
    Scenario(2, 20, 0.02),
    Scenario(3, 50, 0.1, phi=0.9),
    Scenario(10, 20, 0.3, phi=0.5),
    Scenario(10, 100, 0.02, phi=0.9, sigma=0.2),
]


@lru_cache
def intervals(scenario: Scenario, runs: int) -> tuple[list[Interval], list[Interval]]:
    """Of medians and of means."""
    generator = np.random.default_rng(crc32(str(scenario).encode()))
    found: tuple[list[Interval], list[Interval]] = [], []
    for _ in range(runs):
        samples, process = scenario.draw(generator)
        for kept, interval in zip(
            found, (quantile_interval(samples, process), mean_interval(samples, process)), strict=True
        ):
            assert interval is not None
            kept.append(interval)
    return found


def check(scenario: Scenario, runs: int) -> None:
    for truth, found in zip((scenario.median, scenario.mean), intervals(scenario, runs), strict=True):
        held = sum(low <= truth <= high for low, high in found)
        # What a rightly promised share falls short of once in ten thousand times.
        assert held >= binom.ppf(1e-4, runs, LEAST), (scenario, held / runs)
        assert held <= binom.ppf(1 - 1e-4, runs, MOST), (scenario, held / runs)


@pytest.mark.parametrize("scenario", SCENARIOS[:5], ids=str)
def test_intervals_hold_in_about_95_percent_of_a_few_hundred_runs(scenario):
    check(scenario, FAST_RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_intervals_hold_in_about_95_percent_of_thousands_of_runs(scenario):
    check(scenario, SLOW_RUNS)


def test_one_process_has_no_interval():
    assert quantile_interval([1.0, 2.0, 3.0], [0, 0, 0]) is None
    assert mean_interval([1.0, 2.0, 3.0], [0, 0, 0]) is None


def test_the_same_samples_give_the_same_interval_around_what_is_observed():
    samples, process = SCENARIOS[2].draw(np.random.default_rng(3))
    for level in (0.5, 0.9):
        first = quantile_interval(samples, process, level)
        assert first == quantile_interval(samples, process, level)
        assert first[0] < quantile(sorted(samples), level) < first[1]
    low, high = mean_interval(samples, process)
    assert low < np.mean(samples) < high
    wider = mean_interval(samples, process, 0.99)
    assert wider[0] < low < high < wider[1]


def test_calls_that_never_differ_have_an_interval_of_no_width():
    assert quantile_interval([0.5] * 6, [0, 0, 1, 1, 2, 2]) == (0.5, 0.5)
    assert mean_interval([0.5] * 6, [0, 0, 1, 1, 2, 2]) == (0.5, 0.5)


def test_a_process_of_more_calls_counts_for_more_as_it_does_in_what_is_observed():
    samples = [1.0] * 90 + [2.0] * 10
    low, high = mean_interval(samples, [0] * 90 + [1] * 10)
    assert low < 1.1 < high
    assert quantile_interval(samples, [0] * 90 + [1] * 10)[0] < 1.0


@pytest.mark.parametrize("freedom", [1, 1.7, 2, 4, 9.3, 99, 499, 501, 1e6])
@pytest.mark.parametrize("level", [0.01, 0.5, 0.6, 0.95, 0.975, 0.995])
def test_students_quantile_is_that_of_scipy(level, freedom):
    assert student_quantile(level, freedom) == pytest.approx(student.ppf(level, freedom), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("level", "freedom"), [(0.0, 4), (1.0, 4), (0.5, 0.5)])
def test_students_quantile_refuses_what_it_is_not_made_for(level, freedom):
    with pytest.raises(ValueError, match="no quantile"):
        student_quantile(level, freedom)
