"""Order statistics against published tables, scipy and their definitions."""

from __future__ import annotations

from fractions import Fraction
from math import nan

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom

from hydradeploy.stats.order import allowed_misses, lower_rank, quantile, samples_needed, upper_rank

# Samples needed for "quantile <= budget" by level and misses, at 95 % and 99 % confidence. 64 and 662 are the constants
# of MLPerf LoadGen's early stopping.
MISSES = (0, 1, 2, 5, 10)
NEEDED = {
    0.9: ((29, 44), (46, 64), (61, 81), (103, 127), (167, 197)),
    0.95: ((59, 90), (93, 130), (124, 165), (208, 259), (336, 398)),
    0.99: ((299, 459), (473, 662), (628, 838), (1049, 1307), (1693, 2010)),
    0.999: ((2995, 4603), (4742, 6636), (6294, 8403), (10511, 13105), (16959, 20140)),
}
CELLS = [
    (level, confidence, misses, needed)
    for level, row in NEEDED.items()
    for misses, pair in zip(MISSES, row, strict=True)
    for confidence, needed in zip((0.95, 0.99), pair, strict=True)
]
# Ranks of the two-sided 95 % interval of a quantile.
INTERVALS = [
    (0.5, 100, 40, 61),
    (0.99, 368, 360, 368),
    (0.99, 500, 490, 500),
    (0.99, 1000, 983, 997),
    (0.99, 2000, 1971, 1989),
    (0.99, 5000, 4936, 4964),
    (0.99, 10000, 9880, 9920),
]

SIZES = st.integers(1, 5000) | st.integers(1, 100)
LEVELS = st.sampled_from([0.5, 0.75, 0.9, 0.95, 0.99, 0.999]) | st.floats(0.5, 0.999)
CONFIDENCES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.999]) | st.floats(0.5, 0.9999)
# Where a probability is equal to what is asked for, floats decide on which side it falls.
ABOUT = 1e-8


@pytest.mark.parametrize(("level", "confidence", "misses", "needed"), CELLS)
def test_samples_needed_are_those_of_the_table(level, confidence, misses, needed):
    assert samples_needed(level, confidence, misses) == needed


@pytest.mark.parametrize(("level", "confidence", "misses", "needed"), CELLS)
def test_allowed_misses_rise_exactly_at_the_sizes_of_the_table(level, confidence, misses, needed):
    assert allowed_misses(needed, level, confidence) == misses
    assert allowed_misses(needed - 1, level, confidence) == (misses - 1 if misses else None)


@pytest.mark.parametrize(("level", "n", "lower", "upper"), INTERVALS)
def test_ranks_of_an_interval_are_those_of_the_table(level, n, lower, upper):
    assert lower_rank(n, level, 0.975) == lower
    assert upper_rank(n, level, 0.975) == upper


def test_fewer_than_368_samples_have_no_upper_rank_for_p99_in_a_two_sided_interval():
    assert [n for n in range(1000) if upper_rank(n, 0.99, 0.975) is None] == list(range(368))


@given(SIZES, LEVELS, CONFIDENCES)
def test_allowed_misses_are_the_most_that_scipy_allows(n, level, confidence):
    most, share = 1 - confidence, 1 - level
    found = allowed_misses(n, level, confidence)
    if found is not None:
        assert binom.cdf(found, n, share) <= most * (1 + ABOUT)
    assert binom.cdf(0 if found is None else found + 1, n, share) > most * (1 - ABOUT)


@given(SIZES, LEVELS, CONFIDENCES)
def test_the_upper_rank_is_the_smallest_that_scipy_gives_the_confidence(n, level, confidence):
    """The quantile is at most the sample of rank r exactly when fewer than r samples lie below it."""
    rank = upper_rank(n, level, confidence)
    miss = 1 - confidence
    if rank is None:
        assert binom.sf(n - 1, n, level) > miss * (1 - ABOUT)
    else:
        assert 1 <= rank <= n
        assert binom.sf(rank - 1, n, level) <= miss * (1 + ABOUT)
        assert rank == 1 or binom.sf(rank - 2, n, level) > miss * (1 - ABOUT)


@given(SIZES, LEVELS, CONFIDENCES)
def test_the_lower_rank_is_the_largest_that_scipy_gives_the_confidence(n, level, confidence):
    """The quantile is at least the sample of rank r exactly when at least r samples lie at or below it."""
    rank = lower_rank(n, level, confidence)
    miss = 1 - confidence
    if rank is None:
        assert binom.cdf(0, n, level) > miss * (1 - ABOUT)
    else:
        assert 1 <= rank <= n
        assert binom.cdf(rank - 1, n, level) <= miss * (1 + ABOUT)
        assert rank == n or binom.cdf(rank, n, level) > miss * (1 - ABOUT)


@given(st.floats(0.5, 0.995), CONFIDENCES, st.integers(0, 12))
def test_samples_needed_are_the_fewest_that_scipy_lets_miss_so_often(level, confidence, misses):
    n = samples_needed(level, confidence, misses)
    assert binom.cdf(misses, n, 1 - level) <= (1 - confidence) * (1 + ABOUT)
    assert binom.cdf(misses, n - 1, 1 - level) > (1 - confidence) * (1 - ABOUT)


@pytest.mark.parametrize("n", [1, 3, 99, 1001, 1203, 4999])
def test_a_probability_equal_to_what_is_asked_for_counts(n):
    """Of an odd number of tosses exactly half the outcomes have fewer heads than tails."""
    assert allowed_misses(n, 0.5, 0.5) == (n - 1) // 2
    assert upper_rank(n, 0.5, 0.5) == (n + 1) // 2 == lower_rank(n, 0.5, 0.5)


@pytest.mark.parametrize("n", range(1, 40))
def test_the_largest_of_n_exceeds_the_median_with_a_confidence_that_counts_when_met_exactly(n):
    assert upper_rank(n, 0.5, 1 - 0.5**n) == n
    assert lower_rank(n, 0.5, 1 - 0.5**n) == 1
    assert samples_needed(0.5, 1 - 0.5**n) == n


@given(SIZES, CONFIDENCES)
def test_the_ranks_around_a_median_mirror_each_other(n, confidence):
    lower, upper = lower_rank(n, 0.5, confidence), upper_rank(n, 0.5, confidence)
    assert (lower is None) == (upper is None)
    assert lower is None or lower + upper == n + 1


@given(SIZES, LEVELS, CONFIDENCES)
def test_a_bound_from_below_is_never_above_the_bound_from_above(n, level, confidence):
    lower, upper = lower_rank(n, level, confidence), upper_rank(n, level, confidence)
    assume(lower is not None and upper is not None)
    assert lower <= upper


@given(st.integers(1, 1500), LEVELS, CONFIDENCES, st.integers(1, 200))
def test_more_samples_may_miss_more_often(n, level, confidence, more):
    assert (allowed_misses(n, level, confidence) or 0) <= (allowed_misses(n + more, level, confidence) or 0)
    if upper_rank(n, level, confidence) is not None:
        assert upper_rank(n + more, level, confidence) is not None


@given(SIZES, LEVELS, CONFIDENCES, CONFIDENCES)
def test_more_confidence_moves_both_ranks_outwards(n, level, one, other):
    less, more = sorted((one, other))
    assert (upper_rank(n, level, less) or n + 1) <= (upper_rank(n, level, more) or n + 1)
    assert (lower_rank(n, level, less) or 0) >= (lower_rank(n, level, more) or 0)


@given(SIZES, LEVELS, LEVELS, CONFIDENCES)
def test_a_higher_level_has_no_smaller_ranks(n, one, other, confidence):
    low, high = sorted((one, other))
    assert (upper_rank(n, low, confidence) or n + 1) <= (upper_rank(n, high, confidence) or n + 1)
    assert (lower_rank(n, low, confidence) or 0) <= (lower_rank(n, high, confidence) or 0)


@given(st.floats(0.5, 0.99), st.floats(0.5, 0.99), st.floats(0.5, 0.99), st.integers(0, 10))
def test_samples_needed_rise_with_level_confidence_and_misses(one, other, confidence, misses):
    low, high = sorted((one, other))
    assert samples_needed(low, confidence, misses) <= samples_needed(high, confidence, misses)
    assert samples_needed(confidence, low, misses) <= samples_needed(confidence, high, misses)
    assert samples_needed(low, confidence, misses) < samples_needed(low, confidence, misses + 1)


def test_no_samples_bound_nothing():
    assert (allowed_misses(0, 0.9, 0.9), upper_rank(0, 0.9, 0.9), lower_rank(0, 0.9, 0.9)) == (None, None, None)


@pytest.mark.parametrize("function", [allowed_misses, upper_rank, lower_rank])
@pytest.mark.parametrize(
    ("n", "level", "confidence"),
    [(-1, 0.9, 0.9)]
    + [(10, bad, 0.9) for bad in (0, 1, -0.1, 95, nan)]
    + [(10, 0.9, bad) for bad in (0, 1, 2, 95, nan)],
)
def test_there_are_no_ranks_without_samples_a_level_and_a_confidence(function, n, level, confidence):
    with pytest.raises(ValueError, match="no ranks"):
        function(n, level, confidence)


@pytest.mark.parametrize(("level", "confidence"), [(0, 0.9), (1, 0.9), (95, 0.9), (0.9, 0), (0.9, 1), (0.9, 95)])
def test_no_number_of_samples_gives_what_is_no_level_or_no_confidence(level, confidence):
    with pytest.raises(ValueError, match="no ranks"):
        samples_needed(level, confidence)


@given(st.integers(1, 100_000) | st.integers(1, 1000), st.integers(1, 99_999))
def test_the_rank_of_a_quantile_is_the_smallest_that_reaches_the_level(n, thousandths):
    """Percentages of up to three decimals, in exact arithmetic: no rounding of n * level moves the rank."""
    exact = Fraction(thousandths, 100_000)
    rank = quantile(range(1, n + 1), thousandths / 100_000)
    assert Fraction(rank, n) >= exact
    assert rank == 1 or Fraction(rank - 1, n) < exact


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=60), st.integers(1, 100))
def test_a_quantile_is_the_first_sample_that_so_many_do_not_exceed(values, percent):
    wanted = next(v for v in sorted(values) if 100 * sum(other <= v for other in values) >= percent * len(values))
    assert quantile(sorted(values), percent / 100) == wanted


@given(st.lists(st.floats(0.001, 10), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_quantile_is_a_sample_and_rises_with_the_level(values, one, other):
    ordered = sorted(values)
    low, high = sorted((one, other))
    assert quantile(ordered, low) in values
    assert quantile(ordered, low) <= quantile(ordered, high)


@pytest.mark.parametrize(
    ("n", "level", "rank"),
    [
        (100, 0.95, 95),
        (100, 0.99, 99),
        (1000, 0.999, 999),
        (20, 0.95, 19),
        (300, 0.07, 21),
        (7, 0.5, 4),
        (7, 1, 7),
        (7, 0, 1),
    ],
)
def test_no_rounding_moves_the_rank_of_a_quantile(n, level, rank):
    assert quantile(range(1, n + 1), level) == rank
