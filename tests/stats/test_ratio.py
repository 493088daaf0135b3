"""The ratio of two sets of processes: how often its interval holds, and what it is."""

from __future__ import annotations

import math
from zlib import crc32

import numpy as np
import pytest
from scipy.stats import binom, ttest_ind

from hydradeploy.stats.basics import mean, median
from hydradeploy.stats.order import quantile
from hydradeploy.stats.ratio import ratio
from tests.stats.test_bootstrap import Scenario

FAST_RUNS, SLOW_RUNS = 300, 2000
LEAST = 0.925
FIGURES = {"median": median, "mean": mean, "p95": lambda block: quantile(sorted(block), 0.95)}
# Before, after.
PAIRS = [
    (Scenario(5, 20, 0.0), Scenario(5, 20, 0.0)),
    (Scenario(5, 20, 0.02, phi=0.9), Scenario(5, 20, 0.02, phi=0.9)),
    (Scenario(5, 20, 0.3, phi=0.5), Scenario(5, 20, 0.3, phi=0.5)),
    (Scenario(3, 20, 0.1), Scenario(3, 20, 0.1)),
    (Scenario(5, 20, 0.1, phi=0.5), Scenario(10, 100, 0.1, phi=0.5)),
    (Scenario(10, 100, 0.0, phi=0.9), Scenario(5, 20, 0.0, phi=0.9)),
]


def chains(scenario: Scenario, generator: np.random.Generator) -> list[list[float]]:
    return np.reshape(scenario.draw(generator)[0], (scenario.processes, scenario.samples)).tolist()


def check(pair: tuple[Scenario, Scenario], runs: int) -> None:
    generator = np.random.default_rng(crc32(str(pair).encode()))
    held = dict.fromkeys(FIGURES, 0)
    for _ in range(runs):
        before, after = (chains(scenario, generator) for scenario in pair)
        for name, figure in FIGURES.items():
            found = ratio(before, after, figure)
            held[name] += found.lower <= 1 <= found.upper
    for name, count in held.items():
        assert count >= binom.ppf(1e-4, runs, LEAST), (name, count / runs)
        # Three processes have few degrees of freedom, and fewer are reckoned with.
        assert count <= binom.ppf(1 - 1e-4, runs, 0.98), (name, count / runs)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_interval_holds_in_about_95_percent_of_a_few_hundred_runs_where_nothing_differs(pair):
    check(pair, FAST_RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_interval_holds_in_about_95_percent_of_thousands_of_runs_where_nothing_differs(pair):
    check(pair, SLOW_RUNS)


def test_the_interval_is_welchs_for_the_logarithms():
    before, after = [[1.0], [1.1], [1.3], [1.2]], [[1.5], [2.5], [2.0]]
    found = ratio(before, after, max)
    low, high = ttest_ind(
        *([math.log(chain[0]) for chain in side] for side in (after, before)), equal_var=False
    ).confidence_interval()
    assert (found.lower, found.upper) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)
    assert found.ratio == pytest.approx(math.exp((low + high) / 2))
    assert found.before == pytest.approx((1.0 * 1.1 * 1.3 * 1.2) ** 0.25)
    assert found.ratio == pytest.approx(found.after / found.before)


def test_a_longer_process_is_not_slower_for_having_seen_more_of_its_tail():
    draw = np.random.default_rng(0)
    short = [draw.lognormal(0, 0.3, 20).tolist() for _ in range(300)]
    long = [draw.lognormal(0, 0.3, 400).tolist() for _ in range(300)]
    found = ratio(short, long, max)
    assert found.ratio == pytest.approx(1.0, abs=0.04)
    # The slowest of all of them would be far above.
    assert mean([max(chain) for chain in long]) > 1.3 * mean([max(chain) for chain in short])


def test_every_call_counts_though_blocks_do_not_come_out_even():
    short = [[1.0, 1.0, 1.0]] * 3
    assert ratio(short, [[1.0, 1.0, 1.0, 9.0]] * 3, max).ratio == pytest.approx(3.0)
    assert ratio(short, [[9.0, 1.0, 1.0, 1.0]] * 3, max).ratio == pytest.approx(3.0)


def test_processes_that_never_differ_have_an_interval_of_no_width():
    found = ratio([[2.0]] * 3, [[3.0]] * 3, max)
    assert (found.lower, found.upper) == pytest.approx((1.5, 1.5))


def test_processes_of_which_nothing_can_be_said_have_an_interval_without_end():
    """A damaged profile can hold any positive number."""
    found = ratio([[1e-300], [1.0], [1e300]], [[1.0], [1.0], [1.0]], median)
    assert (found.lower, found.ratio, found.upper) == (0.0, pytest.approx(1.0), math.inf)


@pytest.mark.parametrize("before", [[], [[1.0]], [[1.0], []]])
def test_fewer_than_two_processes_of_samples_are_refused(before):
    for sides in ((before, [[1.0], [1.0]]), ([[1.0], [1.0]], before)):
        with pytest.raises(ValueError, match="two processes"):
            ratio(*sides, max)
