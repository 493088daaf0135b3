"""Intervals of proportions, and whether two classifiers differ on the same cases."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from hydradeploy.stats.proportions import mcnemar, wilson

COUNTS = st.integers(0, 3000) | st.integers(0, 12)


@given(total=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_of_a_proportion_is_scipys(total, share, confidence):
    correct = round(total * share)
    expected = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    low, high = wilson(correct, total, confidence)
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= low <= correct / total <= high <= 1


def test_the_interval_of_a_proportion_is_that_of_the_books():
    """Brown, Cai and DasGupta, Statistical Science 16 (2001): five of ten is 0.2366 to 0.7634."""
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=5e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=5e-6)


@pytest.mark.parametrize(("correct", "total", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_there_is_no_interval_for_what_is_no_proportion(correct, total, confidence):
    with pytest.raises(ValueError, match="no interval"):
        wilson(correct, total, confidence)


@given(total=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_what_is_wrong_has_the_mirrored_interval_of_what_is_right(total, share, confidence):
    correct = round(total * share)
    low, high = wilson(correct, total, confidence)
    assert wilson(total - correct, total, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(COUNTS, COUNTS)
@example(0, 0)
@example(3000, 3000)
@example(0, 3000)
def test_the_paired_test_is_scipys_binomial_test_of_a_fair_coin(one, other):
    expected = binomtest(one, one + other).pvalue if one + other else 1.0
    assert mcnemar(one, other) == pytest.approx(expected, rel=1e-8, abs=1e-300)


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_paired_test_is_the_exact_fraction_of_all_outcomes_at_least_as_uneven(one, other):
    total = one + other
    outcomes = sum(comb(total, i) for i in range(min(one, other) + 1))
    exact = min(Fraction(1), Fraction(2 * outcomes, 2**total))
    assert mcnemar(one, other) == pytest.approx(float(exact), rel=1e-8, abs=1e-300)


@given(COUNTS, COUNTS)
def test_the_paired_test_does_not_care_which_classifier_comes_first(one, other):
    assert mcnemar(one, other) == mcnemar(other, one)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_more_uneven_split_of_as_many_cases_is_less_likely(fewer, more):
    fewer, more = sorted((fewer, more))
    even = mcnemar(fewer, more)
    uneven = mcnemar(fewer - 1, more + 1)
    assert uneven < even if more > fewer else uneven <= even == 1


@pytest.mark.parametrize(
    ("fewer", "total", "one_tailed"), [(1, 8, 0.035), (1, 10, 0.011), (3, 15, 0.018), (7, 25, 0.022)]
)
def test_the_paired_test_is_that_of_the_books(fewer, total, one_tailed):
    """Siegel, Nonparametric Statistics (1956), table D: one-tailed probabilities of the sign test."""
    assert mcnemar(fewer, total - fewer) / 2 == pytest.approx(one_tailed, abs=5e-4)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 1), (3, 4), (1500, 1500)])
def test_an_even_split_says_nothing(one, other):
    assert mcnemar(one, other) == 1


@pytest.mark.parametrize(("one", "other"), [(-1, 0), (0, -1), (-3, 7)])
def test_there_is_no_paired_test_of_negative_counts(one, other):
    with pytest.raises(ValueError, match="negative"):
        mcnemar(one, other)
