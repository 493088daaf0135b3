"""Bounds of latency: what they are made of, and what they do with few, odd and hostile samples."""

from __future__ import annotations

import math
import random
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import chi2, nct

from hydradeploy.stats import latency
from hydradeploy.stats.latency import (
    LEAST_WORTH,
    MOST_DEPENDENCE,
    MOST_SPREAD,
    Bounds,
    autocorrelation_time,
    bounds,
    n_effective,
    tolerance_factor,
)
from hydradeploy.stats.order import allowed_misses, lower_rank, quantile, upper_rank

LATENCIES = st.floats(1e-6, 10) | st.integers(1, 20).map(lambda ms: ms / 1000)
CELLS = st.lists(st.lists(LATENCIES, min_size=1, max_size=30), min_size=1, max_size=8)
LEVELS = st.sampled_from([0.5, 0.75, 0.9, 0.95, 0.99, 0.999])
CONFIDENCES = st.sampled_from([0.8, 0.9, 0.95, 0.99])
LOG_NORMAL = "log-normal latencies"


def bounds_of(chains, level=0.95, confidence=0.95) -> Bounds:
    samples = [value for chain in chains for value in chain]
    return bounds(samples, [i for i, chain in enumerate(chains) for _ in chain], level, confidence)


def alternating(processes, samples):
    """Chains whose neighbours are as unlike as can be, so that every sample is worth one; all values differ."""
    values = iter(1 + i * 1e-6 for i in range(processes * samples))
    low = [[next(values) for _ in range(samples)] for _ in range(processes)]
    return [[value + 0.01 * (i % 2) for i, value in enumerate(chain)] for chain in low]


def ar1(phi, processes, samples, seed=0):
    """Gaussian AR(1) chains of variance 1, stationary from the first sample on."""
    z = np.random.default_rng(seed).standard_normal((samples, processes))
    for i in range(1, samples):
        z[i] = phi * z[i - 1] + math.sqrt(1 - phi * phi) * z[i]
    return z.T.tolist()


def steady(processes=5, samples=100, sigma=0.05, seed=0):
    """Independent log-normal latencies of processes that do not differ."""
    draw = random.Random(seed)
    return [[draw.lognormvariate(-4, sigma) for _ in range(samples)] for _ in range(processes)]


def words(text):
    return text.replace(",", "").split()


# --- tolerance factors ---


@pytest.mark.parametrize(("content", "confidence"), [*product((0.5, 0.9, 0.95, 0.99), (0.9, 0.95, 0.99))])
def test_tolerance_factors_are_quantiles_of_the_noncentral_t_distribution(content, confidence):
    for n in range(2, 51):
        wanted = nct.ppf(confidence, n - 1, NormalDist().inv_cdf(content) * math.sqrt(n)) / math.sqrt(n)
        assert tolerance_factor(n, content, confidence) == pytest.approx(wanted, rel=1e-5), n


@pytest.mark.parametrize(("n", "factor"), [(3, 7.656), (5, 4.203), (10, 2.911)])
def test_tolerance_factors_are_those_of_the_books(n, factor):
    """ISO 16269-6, one-sided, standard deviation unknown, content 95 %, confidence 95 %."""
    assert tolerance_factor(n, 0.95, 0.95) == pytest.approx(factor, abs=6e-4)


@pytest.mark.parametrize(("n", "t"), [(2, 6.3138), (5, 2.1318), (10, 1.8331), (31, 1.6973)])
def test_the_tolerance_factor_of_a_median_is_students_t(n, t):
    assert tolerance_factor(n, 0.5, 0.95) == pytest.approx(t / math.sqrt(n), rel=1e-4)


@pytest.mark.parametrize("n", [-1, 0, 1])
def test_one_sample_has_no_tolerance_factor(n):
    with pytest.raises(ValueError, match="standard deviation"):
        tolerance_factor(n, 0.95, 0.95)


# --- dependence ---


@pytest.mark.parametrize("phi", [0.3, 0.5, 0.7, 0.9])
def test_the_autocorrelation_time_of_long_ar1_chains_is_the_known_one(phi):
    found = autocorrelation_time(ar1(phi, 5, 8000))
    assert found == pytest.approx((1 + phi) / (1 - phi), rel=0.15)


@pytest.mark.parametrize("phi", [0.5, 0.8])
@pytest.mark.parametrize("samples", [20, 50, 100])
def test_short_chains_do_not_hide_their_dependence(phi, samples):
    """Centring short chains biases autocorrelations downwards; on average less than a quarter of the time is lost."""
    found = [autocorrelation_time(ar1(phi, 10, samples, seed)) for seed in range(60)]
    assert sum(found) / len(found) > 0.75 * (1 + phi) / (1 - phi)


def test_independent_samples_are_mostly_worth_all_of_themselves():
    times = [autocorrelation_time(ar1(0, 5, 100, seed)) for seed in range(200)]
    assert sum(time == 1 for time in times) >= 160
    assert max(times) < 2


def test_a_correlation_of_more_than_one_standard_error_is_no_noise():
    """Chains of 500 samples in all: the first autocorrelation counts from 1 / sqrt(500) on."""
    seen = set()
    for seed in range(200):
        chains = np.array(ar1(0, 5, 100, seed))
        chains -= chains.mean(axis=1, keepdims=True)
        first = (chains[:, 1:] * chains[:, :-1]).mean() / (chains**2).mean()
        time = autocorrelation_time(chains.tolist())
        assert (time > 1) == (first > 1 / math.sqrt(500))
        seen.add((time > 1, first * math.sqrt(500) < 1.96))
    assert seen == {(False, True), (True, True), (True, False)}


@pytest.mark.parametrize("phi", [-0.3, -0.9])
def test_samples_that_alternate_are_worth_no_more_than_independent_ones(phi):
    assert autocorrelation_time(ar1(phi, 5, 500)) == 1


@given(CELLS.map(lambda chains: [[chain[0]] * len(chain) for chain in chains]))
def test_constant_chains_have_no_dependence_whatever_their_levels(chains):
    """Their centred values are zeros or the last bit of a mean."""
    assert autocorrelation_time(chains) == pytest.approx(1)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12), min_size=1, max_size=12))
@example([[0.0, 0.0, 1.0, 1.0], *[[5.0]] * 8])
@example([[0.0] * 3 + [1.0] * 3, *[[5.0]] * 30])
def test_the_autocorrelation_time_is_finite_and_at_least_one_whatever_the_lengths(chains):
    assert 1 <= autocorrelation_time(chains) < math.inf


@given(CELLS, st.floats(-5, 5))
def test_the_level_of_a_process_is_no_dependence(chains, shift):
    """Powers of two and whole numbers: every sum is exact."""
    whole = [[float(round(1000 * value)) for value in chain] for chain in chains]
    moved = [[value + 1024 * round(shift) * i for value in chain] for i, chain in enumerate(whole)]
    assert autocorrelation_time(moved) == pytest.approx(autocorrelation_time(whole), rel=1e-6)


@pytest.mark.parametrize("transform", [lambda v: v**3, lambda v: 2.0**v, lambda v: -1 / v, lambda v: 7 * v - 1000])
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=40), min_size=1, max_size=5), LEVELS)
def test_what_samples_are_worth_depends_on_their_order_only(transform, chains, level):
    transformed = [[float(transform(value)) for value in chain] for chain in chains]
    assert n_effective(transformed, level) == n_effective([[float(v) for v in chain] for chain in chains], level)


@pytest.mark.parametrize(("phi", "most"), [(0.5, 0.45), (0.9, 0.1)])
def test_dependent_samples_are_worth_the_fewer_the_more_dependent(phi, most):
    chains = [[math.exp(0.05 * value) for value in chain] for chain in ar1(phi, 5, 1000)]
    assert n_effective(chains, 0.95) < most * 5000


def test_bursts_of_slow_calls_are_dependence_though_the_ranks_hardly_show_it():
    """Independent but for one burst of five slow calls per process: few ranks move, slow calls follow each other."""
    chains = steady(5, 100)
    for chain in chains:
        chain[40:45] = [value * 3 for value in chain[40:45]]
    ordered = sorted(value for chain in chains for value in chain)
    ranks = [[ordered.index(value) for value in chain] for chain in chains]
    assert autocorrelation_time(ranks) < 1.5
    assert n_effective(chains, 0.95) < 100
    for i, chain in enumerate(chains):
        random.Random(i).shuffle(chain)
    assert n_effective(chains, 0.95) > 400


def test_weak_but_lasting_dependence_counts_in_full():
    """AR(1) of 0.9 under as much white noise: autocorrelations 0.5 * 0.9^k, of which the first alone tells little."""
    chains = np.array(ar1(0.9, 5, 8000)) + np.random.default_rng(1).standard_normal((5, 8000))
    assert autocorrelation_time(chains.tolist()) == pytest.approx(1 + 2 * 0.5 * 9, rel=0.2)


def summed_lag_by_lag(chains):
    """The time of equally long chains by its definition: each lag counts up to the first one of noise."""
    z = np.array(chains, dtype=float)
    z -= z.mean(axis=1, keepdims=True)
    n, length = z.size, z.shape[1]
    found = []
    for lag in range(1, length):
        found.append((z[:, lag:] * z[:, :-lag]).mean() / (z**2).mean())
        if found[-1] <= 1 / math.sqrt(n):
            break
    first = min(0.999, (found[0] * length + 1) / (length - 3))
    return max(1, 1 + 2 * sum(found[:-1]), (1 + first) / (1 - first) if len(found) > 1 else 1)


@pytest.mark.parametrize("phi", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("samples", [20, 200, 4000])
def test_every_lag_of_moderate_dependence_counts(phi, samples):
    for seed in range(5):
        chains = ar1(phi, 5, samples, seed)
        assert autocorrelation_time(chains) == pytest.approx(summed_lag_by_lag(chains), rel=1e-9)


def drifting(processes, samples, seed=0):
    """A rise by five times the noise, and a wave on it."""
    noise = np.random.default_rng(seed).standard_normal((processes, samples))
    at = np.linspace(0, 1, samples)
    return (noise + 5 * at + np.sin(7 * at)).tolist()


@pytest.mark.parametrize("samples", [300, 1000, 5000])
def test_lags_left_out_of_a_drift_change_its_time_by_some_hundredths_at_most(samples):
    chains = drifting(2, samples)
    found = autocorrelation_time(chains)
    assert found > MOST_DEPENDENCE
    assert found == pytest.approx(summed_lag_by_lag(chains), rel=0.03)


class Counted(float):
    """A number that counts products."""

    products = 0

    def __sub__(self, other):
        return Counted(float(self) - other)

    def __mul__(self, other):
        Counted.products += 1
        return float(self) * float(other)


def test_a_drift_takes_hardly_more_lags_the_longer_it_is(monkeypatch):
    """Sixteen times as many products for four times as many samples, were all lags summed."""
    taken = {}
    for samples in (1500, 6000):
        monkeypatch.setattr(Counted, "products", 0)
        assert autocorrelation_time([list(map(Counted, chain)) for chain in drifting(1, samples)]) > MOST_DEPENDENCE
        taken[samples] = Counted.products
    assert taken[1500] > 100 * 1500
    assert taken[6000] < 6 * taken[1500]


def test_samples_are_worth_one_per_process_at_least():
    """One step in each: dependence that lasts as long as they do."""
    chains = [[1.0] * 15 + [2.0] * 15] * 3
    assert autocorrelation_time(chains) > 90
    assert n_effective(chains, 0.95) == 3


def test_bursts_are_seen_at_levels_that_leave_no_sample_above():
    """500 samples, the slowest ten of them in pairs: the quantile of 0.999 is the maximum and nothing exceeds it."""
    chains = steady(5, 100)
    for chain in chains:
        chain[40:42] = [value * 3 for value in chain[40:42]]
    assert n_effective(chains, 0.999) < 250


# --- bounds ---


@pytest.mark.parametrize(
    ("samples", "process"),
    [
        ([], []),
        ([0.01], []),
        ([], [0]),
        ([0.01, 0.02], [0]),
        ([0.01], [0, 0]),
        ([0.0], [0]),
        ([0.01, -0.01], [0, 0]),
        ([0.01, math.nan], [0, 0]),
        ([math.inf, 0.01], [0, 0]),
        ([-math.inf], [0]),
    ],
)
def test_there_are_no_bounds_of_what_is_no_sample_of_latencies(samples, process):
    with pytest.raises(ValueError, match="latencies must be positive and finite"):
        bounds(samples, process, 0.95, 0.95)


@pytest.mark.parametrize(("level", "confidence"), [(0, 0.95), (1, 0.95), (0.95, 0), (0.95, 1), (95, 0.95), (0.95, 95)])
def test_several_processes_have_no_bounds_at_what_is_no_level_or_no_confidence(level, confidence):
    with pytest.raises((ValueError, IndexError)):
        bounds_of(steady(), level, confidence)


@given(CELLS, LEVELS, CONFIDENCES)
def test_whatever_the_samples_the_bounds_are_in_order_and_tell_why_one_is_missing(chains, level, confidence):
    found = bounds_of(chains, level, confidence)
    samples = [value for chain in chains for value in chain]
    assert found.level == level
    assert found.estimate == quantile(sorted(samples), level)
    assert (found.n, found.processes) == (len(samples), len(chains))
    assert 0 < found.n_effective <= found.n
    assert (found.spread is None) == (found.processes == 1)
    assert (found.why_not is None) == (found.upper is not None)
    too_few = allowed_misses(math.floor(found.n_effective), level, confidence) is None
    assert found.assumes == (LOG_NORMAL if too_few and found.upper is not None else None)
    if found.why_not is not None:
        assert (found.lower, found.upper) == (None, None)
    if found.lower is not None:
        assert 0 < found.lower <= found.estimate
    if found.upper is not None:
        assert found.estimate <= found.upper < math.inf
        assert found.processes > 1
        assert found.n_effective >= LEAST_WORTH
        assert found.n / found.n_effective <= MOST_DEPENDENCE
    if found.assumes is not None:
        assert found.upper >= max(samples)


@given(
    st.integers(0, 1000), st.integers(2, 8), st.integers(1, 120), st.sampled_from([0, 0.05, 0.2]), LEVELS, CONFIDENCES
)
def test_bounds_of_plausible_latencies_are_in_order(seed, processes, samples, spread, level, confidence):
    draw = random.Random(seed)
    chains = [
        [draw.lognormvariate(move, 0.1) for _ in range(samples)]
        for move in [draw.gauss(0, spread) for _ in range(processes)]
    ]
    found = bounds_of(chains, level, confidence)
    lower = -math.inf if found.lower is None else found.lower
    upper = math.inf if found.upper is None else found.upper
    assert lower <= found.estimate <= upper
    assert (found.why_not is None) == (found.upper is not None)


@example(2, 2, 148, 0)
@given(st.integers(0, 1000), st.integers(2, 8), st.integers(20, 150), st.sampled_from([0, 0.05, 0.2, 0.5]))
def test_the_bound_of_a_higher_percentile_is_not_lower(seed, processes, samples, spread):
    draw = random.Random(seed)
    chains = [
        [draw.lognormvariate(move, 0.1) for _ in range(samples)]
        for move in [draw.gauss(0, spread) for _ in range(processes)]
    ]
    common = [(level, bounds_of(chains, level, 0.95).upper) for level in (0.5, 0.9, 0.95, 0.99)]
    known = [bound for _, bound in common if bound is not None]
    assert known == sorted(known)
    for level in (0.8, 0.97, 0.98, 0.999):
        upper = bounds_of(chains, level, 0.95).upper
        under = [bound for lower, bound in common if bound is not None and lower < level]
        assert upper is None or upper >= max(under, default=0)


STEPS = [(0.95, 0.95, (2, 2, 29)), (0.9, 0.9, (2, 2, 29)), (0.9, 0.8, (2, 2, 29)), (0.5, 0.5, (1, 21))]


@pytest.mark.parametrize(("level", "confidence", "steps"), STEPS)
def test_samples_worth_one_per_process_bound_nothing(level, confidence, steps):
    """Chains of 30 that rise in one step."""
    rise = [i * 1e-3 for i in range(30)]
    chains = [[1 + rise[i] if i < step else 1.1 + rise[i - step] for i in range(30)] for step in steps]
    found = bounds_of(chains, level, confidence)
    assert found.n_effective == len(steps)
    assert (found.lower, found.upper, found.assumes) == (None, None, None)
    n, worth = len(steps) * 30, f"{found.n_effective:.0f}"
    assert found.why_not == f"calls depend on each other too much: {n} are worth {worth} independent ones"


@pytest.mark.parametrize("level", [0.95, 0.99, 0.999])
def test_the_lower_bound_of_samples_worth_few_is_not_above_the_estimate(monkeypatch, level):
    """Of ten independent samples even the largest is a lower bound of half a chance, of a hundred worth ten it is
    above the estimate."""
    assert lower_rank(10, level, 0.5) == 10
    monkeypatch.setattr(latency, "worths", lambda chains, levels: [10.0] * len(levels))
    found = bounds_of(alternating(5, 20), level, 0.5)
    assert found.lower == found.estimate


@given(st.integers(0, 1000), st.lists(st.integers(-5, 99), min_size=5, max_size=5, unique=True))
def test_the_numbers_of_the_processes_do_not_matter(seed, numbers):
    samples = [value for chain in steady(5, 30, 0.2, seed) for value in chain]
    process = [i // 30 for i in range(150)]
    assert bounds(samples, [numbers[i] for i in process], 0.9, 0.95) == bounds(samples, process, 0.9, 0.95)


def test_the_order_of_the_processes_does_not_matter():
    chains = [[value * (1 + i / 50) for value in chain] for i, chain in enumerate(steady())]
    forwards, backwards = bounds_of(chains), bounds_of(chains[::-1])
    assert forwards.upper == pytest.approx(backwards.upper, rel=1e-12)
    assert forwards.lower == pytest.approx(backwards.lower, rel=1e-12)
    assert forwards.n_effective == pytest.approx(backwards.n_effective, rel=1e-12)


def test_samples_of_processes_that_take_turns_belong_to_their_processes():
    """Interleaved, each process's samples in order: as if the processes had run one after the other."""
    chains = [[value * (1 + i / 50) for value in chain] for i, chain in enumerate(steady(5, 40))]
    turns = [value for values in zip(*chains, strict=True) for value in values]
    assert bounds(turns, [0, 1, 2, 3, 4] * 40, 0.95, 0.95) == bounds_of(chains)


@given(st.integers(0, 1000), st.sampled_from([0, 0.05, 0.2]), st.floats(1e-4, 1e4))
def test_bounds_scale_with_the_latencies(seed, spread, factor):
    draw = random.Random(seed)
    moves = [draw.gauss(0, spread) for _ in range(6)]
    chains = [[draw.lognormvariate(move, 0.1) for _ in range(30)] for move in moves]
    one, other = bounds_of(chains), bounds_of([[value * factor for value in chain] for chain in chains])
    assert other.estimate == pytest.approx(factor * one.estimate, rel=1e-9)
    assert other.lower == (None if one.lower is None else pytest.approx(factor * one.lower, rel=1e-6))
    assert other.upper == (None if one.upper is None else pytest.approx(factor * one.upper, rel=1e-6))
    assert other.n_effective == one.n_effective


@pytest.mark.parametrize(("level", "confidence"), [*product((0.5, 0.9, 0.95), (0.9, 0.95))])
@pytest.mark.parametrize("samples", [20, 40, 100])
def test_of_processes_that_do_not_differ_the_bounds_are_the_order_statistics(level, confidence, samples):
    chains = alternating(5, samples)
    ordered = sorted(value for chain in chains for value in chain)
    found = bounds_of(chains, level, confidence)
    assert (found.n_effective, found.spread) == (5 * samples, 0)
    assert found.upper == ordered[upper_rank(5 * samples, level, confidence) - 1]
    assert found.lower == ordered[lower_rank(5 * samples, level, confidence) - 1]


@pytest.mark.parametrize(("level", "needed"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_one_sample_too_few_for_order_statistics_takes_latencies_to_be_log_normal(level, needed):
    chains = alternating(2, needed // 2)
    too_few = bounds_of(chains, level)
    assert too_few.n_effective == needed - 1
    assert (too_few.assumes, too_few.why_not) == (LOG_NORMAL, None)
    assert too_few.upper >= max(value for chain in chains for value in chain)
    chains[0].append(1.001)
    enough = bounds_of(chains, level)
    assert (enough.assumes, enough.why_not) == (None, None)
    assert enough.upper == max(value for chain in chains for value in chain)


def factor(n, content, confidence):
    """The one-sided normal tolerance factor."""
    return nct.ppf(confidence, n - 1, NormalDist().inv_cdf(content) * math.sqrt(n)) / math.sqrt(n)


@pytest.mark.parametrize(("level", "confidence"), [(0.95, 0.95), (0.99, 0.95), (0.99, 0.99)])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("worth", [10.0, 26.9, 48.0])
def test_the_bound_that_assumes_log_normal_latencies_is_the_tolerance_bound_of_a_third(
    monkeypatch, level, confidence, spread, worth
):
    """Of a third of what samples are worth, moved by the tolerance bound of a fresh process's level."""
    monkeypatch.setattr(latency, "worths", lambda chains, levels: [worth] * len(levels))
    chains = [
        [value**10 * math.exp(spread * (i - 1.5)) for value in chain] for i, chain in enumerate(alternating(4, 12))
    ]
    found = bounds_of(chains, level, confidence)
    assert found.assumes == LOG_NORMAL
    assert (found.spread > 0) == (spread > 0)
    logs = np.log([value for chain in chains for value in chain])
    of_samples = factor(math.floor(worth / 3), level, confidence) * logs.std(ddof=1)
    of_levels = factor(4, level, confidence) * found.spread
    assert found.upper == pytest.approx(math.exp(logs.mean() + of_samples + of_levels), rel=1e-4)
    assert found.upper > max(value for chain in chains for value in chain)


@pytest.mark.parametrize(("n", "beyond"), [((2, 5), True), ((5, 2), True), ((5, 6), False), ((4, 14), False)])
@pytest.mark.parametrize("times", [3.0, 100.0])
def test_the_bound_that_assumes_log_normal_latencies_is_not_below_the_slowest_call(n, beyond, times):
    """One slow call: of thirty samples and more the tolerance bound does not reach it."""
    chains = alternating(*n)
    chains[1][1] *= times
    found = bounds_of(chains)
    assert found.assumes == LOG_NORMAL
    assert found.upper > chains[1][1] if beyond else found.upper == chains[1][1]


@pytest.mark.parametrize(
    ("n", "worth", "why_not"),
    [
        ((4, 100), 20.0, None),
        ((4, 100), 19.99, "calls depend on each other too much: 400 are worth 20 independent ones"),
        ((4, 100), 5.0, "calls depend on each other too much: 400 are worth 5 independent ones"),
        ((5, 200), 50.0, None),
        ((5, 200), 49.9, "calls depend on each other too much: 1000 are worth 50 independent ones"),
        ((4, 20), 10.0, None),
        ((4, 20), 9.4, "80 samples are worth 9 independent ones, a bound takes 10"),
        ((4, 20), 4.0, "80 samples are worth 4 independent ones, a bound takes 10"),
        ((2, 5), 10.0, None),
    ],
)
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_bounds_end_at_so_much_dependence_and_so_little_worth(monkeypatch, n, worth, why_not, level):
    assert (MOST_DEPENDENCE, LEAST_WORTH) == (20, 10)
    monkeypatch.setattr(latency, "worths", lambda chains, levels: [worth] * len(levels))
    found = bounds_of(alternating(*n), level)
    assert (found.n_effective, found.why_not) == (worth, why_not)
    assert (found.upper is None, found.lower is None) == (why_not is not None,) * 2


def test_dependence_ends_beyond_an_ar1_process_of_nine_tenths():
    assert (1 + 0.9) / (1 - 0.9) < MOST_DEPENDENCE < (1 + 0.91) / (1 - 0.91)


def test_ten_samples_of_two_processes_are_the_fewest_that_give_a_bound():
    few = bounds_of(alternating(3, 3))
    assert (few.lower, few.upper, few.assumes) == (None, None, None)
    assert few.why_not == "9 samples are worth 9 independent ones, a bound takes 10"
    assert bounds_of(alternating(2, 5)).assumes == LOG_NORMAL


def test_many_samples_that_depend_on_each_other_too_much_give_no_bound():
    chains = [[math.exp(0.05 * value) for value in chain] for chain in ar1(0.97, 5, 100)]
    found = bounds_of(chains)
    assert found.n == 500 > MOST_DEPENDENCE * found.n_effective
    assert (found.lower, found.upper, found.assumes) == (None, None, None)
    assert "500" in words(found.why_not)
    assert f"{found.n_effective:.0f}" in words(found.why_not)


@pytest.mark.parametrize("samples", [1, 2, 59, 1000])
def test_one_process_gives_no_bound_and_says_that_it_is_one(samples):
    found = bounds_of(steady(1, samples))
    assert (found.lower, found.upper, found.spread, found.processes) == (None, None, None, 1)
    assert "one process" in found.why_not


def test_a_single_sample_is_its_own_estimate_and_bounds_nothing():
    assert bounds([0.02], [7], 0.95, 0.95) == Bounds(
        level=0.95,
        estimate=0.02,
        lower=None,
        upper=None,
        n=1,
        n_effective=1,
        processes=1,
        spread=None,
        assumes=None,
        why_not="one process says nothing about the next one",
    )


@pytest.mark.parametrize("processes", [2, 3, 5, 10])
def test_however_few_the_processes_enough_samples_take_nothing_for_granted(processes):
    found = bounds_of(alternating(processes, 30))
    assert found.upper is not None
    assert found.assumes is None


@pytest.mark.parametrize("processes", [2, 5, 10])
def test_processes_too_far_apart_give_no_bound_and_say_so(processes):
    """Levels a factor of 4 apart from one to the next."""
    chains = [[value * 4**i for value in chain] for i, chain in enumerate(steady(processes))]
    found = bounds_of(chains)
    assert (found.lower, found.upper, found.assumes) == (None, None, None)
    assert found.spread > 2 * MOST_SPREAD
    assert f"{processes} processes differ by {found.spread:.0%}" in found.why_not


def test_the_spread_is_the_deviation_of_the_levels_not_of_the_samples():
    levels = [-0.2, -0.1, 0, 0.1, 0.2]
    chains = [[math.exp(level) * value for value in alternating(1, 200)[0]] for level in levels]
    assert bounds_of(chains).spread == pytest.approx(np.std(levels, ddof=1), rel=1e-3)
    assert bounds_of(steady(10, 20, sigma=0.3)).spread < 0.1


def test_a_wider_spread_of_the_processes_gives_a_wider_interval():
    def at(spread):
        levels = [1 + spread * i for i in (-2, -1, 0, 1, 2)]
        return bounds_of([[level * value for value in chain] for level, chain in zip(levels, steady(), strict=True)])

    none, little, much = at(0), at(0.02), at(0.1)
    assert none.upper < little.upper < much.upper
    assert none.lower > little.lower > much.lower


def test_the_bound_for_the_next_process_is_beyond_every_process_seen_when_they_differ():
    chains = [[(1 + i / 10) * value for value in chain] for i, chain in enumerate(alternating(5, 40))]
    found = bounds_of(chains)
    assert found.upper > max(max(chain) for chain in chains)
    assert found.lower < quantile(sorted(chains[2]), 0.95)


@given(LATENCIES, st.integers(2, 8), st.integers(5, 60))
def test_constant_samples_are_bounded_by_themselves(value, processes, samples):
    """As a coarse timer gives them: the interval has no width, whatever the distribution is taken to be."""
    found = bounds_of([[value] * samples] * processes)
    assert found.assumes == (LOG_NORMAL if processes * samples < 59 else None)
    assert found.n_effective == processes * samples
    assert found.estimate == value
    assert found.spread == pytest.approx(0, abs=1e-12)
    assert found.lower == pytest.approx(value, rel=1e-9)
    assert found.upper == pytest.approx(value, rel=1e-9)


@given(st.integers(0, 1000))
def test_a_timer_that_knows_two_values_gives_bounds_among_them(seed):
    draw = random.Random(seed)
    chains = [[draw.choice((0.001, 0.001, 0.002)) for _ in range(40)] for _ in range(6)]
    found = bounds_of(chains)
    assert found.estimate == 0.002
    assert found.upper is None or found.upper >= 0.002
    assert found.lower is None or found.lower <= 0.002


@pytest.mark.parametrize("factor", [2, 10, 1e3, 1e9])
@pytest.mark.parametrize("place", range(12))
def test_one_huge_outlier_is_within_the_upper_bound(factor, place):
    """60 samples leave no miss to p95: the bound is at least the largest of them, whatever it is."""
    chains = alternating(5, 12)
    chains[3][place] *= factor
    found = bounds_of(chains)
    assert found.n_effective == 60
    assert found.upper >= chains[3][place]


@pytest.mark.parametrize("factor", [10, 1e9])
def test_outliers_in_every_call_of_one_process_leave_no_bound(factor):
    chains = alternating(5, 12)
    chains[3] = [value * factor for value in chains[3]]
    assert (bounds_of(chains).lower, bounds_of(chains).upper) == (None, None)


@pytest.mark.parametrize("level", [0.999, 0.9999])
def test_an_estimate_near_the_maximum_is_the_maximum_even_where_it_is_an_outlier(level):
    chains = steady(5, 100)
    chains[2][17] = 60.0
    assert bounds_of(chains, level).estimate == 60


@given(st.integers(0, 300), st.integers(0, 4), st.floats(1.01, 100))
def test_slower_samples_give_no_smaller_estimate(seed, which, factor):
    chains = steady(5, 30, 0.1, seed)
    before = bounds_of(chains).estimate
    chains[which] = [value * factor for value in chains[which]]
    assert bounds_of(chains).estimate >= before


@pytest.mark.parametrize("processes", [3, 5, 10])
def test_bounds_end_where_nine_of_ten_cells_of_the_largest_spread_do(processes):
    """The sample variance of levels is chi-squared: a spread of 0.3 is refused in one case of ten."""
    limit = MOST_SPREAD * math.sqrt(chi2.ppf(0.9, processes - 1) / (processes - 1))
    grid = np.arange(processes) - (processes - 1) / 2
    for factor, given_ in ((0.97, True), (1.03, False)):
        levels = np.exp(factor * limit * grid / grid.std(ddof=1))
        found = bounds_of(
            [[level * value for value in chain] for level, chain in zip(levels, steady(processes), strict=True)]
        )
        assert found.spread == pytest.approx(factor * limit, rel=0.02)
        assert (found.upper is not None) == given_
