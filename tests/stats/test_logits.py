"""Comparing logits with a reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from hydradeploy.stats.logits import agreement

# Whole numbers and tolerances that are powers of two: every sum and product is exact, in fp32 too.
LOGITS = st.tuples(st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        *[st_numpy.arrays(np.float32, shape, elements=st.integers(-64, 64).map(float))] * 2,
        st.sampled_from((0.0, 2.0**-6, 2.0**-4, 0.25, 1.0)),
    )
)


def rows(*values):
    return np.array(values, np.float32)


@given(LOGITS)
def test_agreement_is_what_loops_over_samples_and_classes_find(case):
    reference, logits, tolerance = case
    scale = max(abs(float(value)) for row in reference for value in row)
    largest, same, overturned = 0.0, 0, 0
    for wanted, got in zip(reference.tolist(), logits.tolist(), strict=True):
        largest = max(largest, *(abs(a - b) for a, b in zip(wanted, got, strict=True)))
        first = wanted.index(max(wanted))
        if got.index(max(got)) == first:
            same += 1
            continue
        others = [value for i, value in enumerate(wanted) if i != first]
        overturned += wanted[first] - max(others) > 2 * tolerance * scale

    found = agreement(reference, logits, tolerance)

    assert found.samples == len(reference)
    assert found.max_difference == pytest.approx(largest / scale if scale else largest, rel=1e-12)
    assert found.top1_agreement == pytest.approx(same / len(reference))
    assert found.overturned == overturned
    assert found.within == (found.max_difference <= tolerance and overturned == 0)


def test_equal_logits_agree_without_any_tolerance():
    logits = rows([1, 2, 3], [3, 2, 1])
    found = agreement(logits, logits.copy(), 0.0)
    assert (found.max_difference, found.top1_agreement, found.overturned, found.within) == (0.0, 1.0, 0, True)


def test_a_near_tie_may_turn_within_the_tolerance():
    found = agreement(rows([10, 9.99]), rows([9.99, 10]), 0.01)
    assert found.top1_agreement == 0
    assert found.overturned == 0
    assert found.within


def test_a_clear_decision_overturned_is_not_within_whatever_else_agrees():
    reference = rows([100, 0, 0], [0, 1, 0])
    logits = rows([100, 0, 0], [0, 0, 1])
    found = agreement(reference, logits, 0.001)
    assert found.overturned == 1
    assert not found.within


def test_a_difference_above_the_tolerance_is_not_within_though_every_first_class_is_the_same():
    found = agreement(rows([10, 0]), rows([10.5, 0]), 0.01)
    assert found.top1_agreement == 1
    assert found.max_difference == pytest.approx(0.05)
    assert not found.within


@pytest.mark.parametrize("side", ["reference", "logits", "both"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_difference(side, value):
    reference, logits = rows([1, 2, 3]), rows([1, 2, 3])
    if side != "logits":
        reference[0, 1] = value
    if side != "reference":
        logits[0, 1] = value
    found = agreement(reference, logits, 1.0)
    assert found.max_difference == float("inf")
    assert not found.within


def test_a_reference_of_zeros_gives_the_difference_itself():
    assert agreement(rows([0, 0]), rows([0, 0.5]), 0.1).max_difference == 0.5


def test_a_single_class_is_never_overturned():
    found = agreement(rows([1], [2]), rows([1], [2]), 0.1)
    assert (found.overturned, found.top1_agreement) == (0, 1.0)


@pytest.mark.parametrize(
    ("one", "other"), [((2, 3), (3, 2)), ((2, 3), (2, 4)), ((1, 3), (4, 3)), ((3,), (3,)), ((1, 2, 3), (1, 2, 3))]
)
def test_shapes_that_differ_or_are_no_matrix_are_refused_with_both(one, other):
    with pytest.raises(ValueError, match="shape") as refused:
        agreement(np.ones(one, np.float32), np.ones(other, np.float32), 0.1)
    assert str(one) in str(refused.value)
    assert str(other) in str(refused.value)
