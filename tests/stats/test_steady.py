"""When a run of latencies counts as one that has stopped changing."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.stats.steady import AGREEMENT, LEAST_SAMPLES, NEGLIGIBLE, agree, steady

COUNTS = [LEAST_SAMPLES, 61, 200, 1000]


def noise(n: int, sigma: float, seed: int, phi: float = 0.0) -> np.ndarray:
    """Log-normal and around 1; with `phi` each follows the one before as AR(1) does."""
    z = np.random.default_rng([seed, n]).standard_normal(n)
    for i in range(1, n):
        z[i] = phi * z[i - 1] + math.sqrt(1 - phi * phi) * z[i]
    return np.exp(sigma * z)


def share(runs: int, draw) -> float:
    """Of so many draws by their seed, how many are called steady."""
    return sum(bool(steady(draw(seed).tolist())) for seed in range(runs)) / runs


@pytest.mark.parametrize("n", range(LEAST_SAMPLES))
def test_too_few_samples_say_neither(n):
    assert steady([1.0] * n) is None


@given(st.integers(LEAST_SAMPLES, 500), st.floats(1e-6, 1e3))
def test_constants_are_steady(n, value):
    assert steady([value] * n) is True


@given(st.integers(LEAST_SAMPLES, 500), st.floats(1.5 * NEGLIGIBLE, 3.0), st.booleans())
def test_a_ramp_is_never_steady(n, rise, down):
    """Of which the outer windows are two thirds of the latest half apart: of `rise`, so much of the value there."""
    ramp = [1 + 3.2 * rise * place / n for place in range(n)]
    assert steady(ramp[::-1] if down else ramp) is False


@given(st.integers(LEAST_SAMPLES, 500), st.floats(0, 0.5 * NEGLIGIBLE))
def test_a_drift_too_slow_to_matter_is_steady(n, rise):
    assert steady([1 + rise * place / n for place in range(n)]) is True


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("to", [0.8, 0.9, 1.1, 2.0])
def test_a_step_is_a_change_until_it_is_in_the_first_half(n, to):
    for at in (0.6, 0.7, 0.8):
        values = noise(n, 0.005, 0)
        values[round(n * at) :] *= to
        assert steady(values.tolist()) is False
    values = noise(n, 0.005, 0)
    values[: n // 2 - 3] *= to
    assert steady(values.tolist()) is True


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.1, 0.3])
def test_noise_is_steady_most_of_the_time(n, sigma):
    assert share(200, lambda seed: noise(n, sigma, seed)) > 0.75


@pytest.mark.parametrize("n", COUNTS)
def test_spikes_and_long_tails_are_steady_most_of_the_time(n):
    def spiky(seed: int) -> np.ndarray:
        values = noise(n, 0.02, seed)
        return np.where(np.random.default_rng(seed).random(n) < 0.05, 35 * values, values)

    assert share(200, spiky) > 0.85
    assert share(200, lambda seed: 1 + 0.3 * np.random.default_rng(seed).exponential(size=n)) > 0.7


@pytest.mark.parametrize("n", COUNTS)
def test_what_follows_the_call_before_is_steady_in_some_test_of_a_warm_up_that_grows(n):
    """Which is put again whenever it is a quarter longer."""
    lengths = [round(n * 1.25**times) for times in range(10)]
    for phi, sigma in ((0.5, 0.05), (0.9, 0.02)):
        drawn = [noise(lengths[-1], sigma, seed, phi).tolist() for seed in range(30)]
        assert sum(any(steady(run[:length]) for length in lengths) for run in drawn) > 27


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("sigma", [0.0, 0.02])
def test_a_process_that_still_speeds_up_is_not_steady(n, sigma):
    """By a fifth over the latest half, evenly or slower and slower."""
    assert share(200, lambda seed: np.linspace(1.4, 1.0, n) * noise(n, sigma, seed)) < 0.03
    falling = 1 + 0.6 * np.exp(-3 * np.arange(n) / n)
    assert share(200, lambda seed: falling * noise(n, sigma, seed)) < 0.1


def test_a_slow_start_is_forgotten_once_the_warm_up_is_long_enough():
    """A clock that takes 100 calls to come up, e-fold after e-fold."""
    run = (noise(3000, 0.005, 1) * (1 + np.exp(-np.arange(3000) / 100))).tolist()
    assert not any(steady(run[:n]) for n in range(LEAST_SAMPLES, 500, 10))
    assert steady(run[:1500]) is True


@given(st.lists(st.floats(1e-6, 10), min_size=LEAST_SAMPLES, max_size=200), st.integers(-8, 8))
def test_it_does_not_depend_on_the_unit_or_on_how_samples_are_kept(samples, power):
    assert steady([value * 2.0**power for value in samples]) == steady(samples) == steady(array("d", samples))


def test_medians_agree_within_a_fraction_of_the_middle_one():
    assert agree([1.0], 0.0)
    assert agree([1.0, 1.0 + AGREEMENT, 1.0], AGREEMENT + 1e-9)
    assert not agree([1.0, 1.03, 1.06], AGREEMENT)
    assert not agree([1.0, 1.0, 1.03], 0.02)
