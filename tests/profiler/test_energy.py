"""Joules per image from meters whose power is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.profiler.energy import energy_j, idle_power_w, mean_power_w
from tests.profiler.readings import every, readings


@given(
    power=st.floats(1, 500),
    idle=st.floats(0, 0.9),
    started=st.floats(0.5, 5),
    length=st.floats(1.01, 20),
    images=st.integers(1, 10_000),
)
def test_a_constant_load_costs_its_power_beyond_idle_by_counter_and_by_gauge(power, idle, started, length, images):
    idle_w, ended = power * idle, started + length
    times = every(0.1, 0.0, 30.0)
    wanted = power * (1 - idle) * length / images
    counter = readings(times, energy_j=lambda at_s: 1e6 + power * at_s)
    gauge = readings(times, power_w=power)
    for found in (counter, gauge):
        value, why_not = energy_j(found, started, ended, idle_w, images)
        assert why_not is None
        assert value == pytest.approx(wanted, rel=1e-6)


def test_a_counter_is_read_between_its_readings_at_the_edges_of_the_window():
    """10 W before 2 s, 40 W after, read every 4 s: half of what was counted in between lies in the window."""
    found = readings([0.0, 4.0, 8.0], energy_j=lambda at_s: 10 * min(at_s, 2) + 40 * max(0, at_s - 2))
    assert mean_power_w(found, 2.0, 4.0).value == pytest.approx((20 + 80) / 4)
    assert mean_power_w(found, 4.0, 6.0).value == pytest.approx(40)


def test_a_gauge_is_integrated_over_unequal_gaps():
    """A power that rises by 1 W per second, read ever more seldom."""
    found = readings([0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3], power_w=lambda at_s: 5 + at_s)
    assert mean_power_w(found, 0.05, 6.0).value == pytest.approx(5 + 6.05 / 2)


def test_a_gauge_that_was_read_only_within_the_window_stays_at_its_ends_what_it_was():
    found = readings(every(0.25, 1.0, 3.0), power_w=7.0)
    assert mean_power_w(found, 0.9, 3.1).value == pytest.approx(7)


def test_the_counter_is_believed_where_there_is_a_gauge_too():
    """A gauge may be an average over the last second."""
    found = readings(every(0.5, 0.0, 4.0), energy_j=lambda at_s: 30 * at_s, power_w=12.0)
    assert mean_power_w(found, 1.0, 3.0).value == pytest.approx(30)


def test_idle_power_is_the_mean_of_all_readings():
    assert idle_power_w(readings(every(0.1, 0.0, 2.0), power_w=4.5)).value == pytest.approx(4.5)
    assert idle_power_w(readings(every(0.5, 0.0, 2.0), energy_j=lambda at_s: 4.5 * at_s)).value == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("times", "values", "window", "why_not"),
    [
        ((0, 5), {"load__gpu": 1.0}, (1, 4), "no meter was read"),
        ((), {}, (1, 4), "no meter was read"),
        ((0, 5), {"energy_j": 1.0}, (1, 1.5), "0.50 s are too short for a meter, it takes 1 s"),
        ((1.1, 5), {"energy_j": 1.0}, (1, 4), "the meter was not read on both sides of the window"),
        ((0, 3.9), {"energy_j": 1.0}, (1, 4), "the meter was not read on both sides of the window"),
        ((0, 2, 5), {"energy_j": lambda at_s: -at_s}, (1, 4), "the meter's counter began anew"),
        ((0, 1, 2, 3, 4.5, 5), {"power_w": 9.0}, (0.5, 4), "3 readings of power in the window, it takes 5"),
    ],
)
def test_what_cannot_be_measured_says_why_and_is_no_number(times, values, window, why_not):
    assert energy_j(readings(times, **values), *window, 1.0, 10) == (None, why_not)


@pytest.mark.parametrize("power", [2.0, 1.5])
def test_a_load_that_does_not_rise_above_idle_is_not_measured_and_not_0(power):
    found = readings(every(0.1, 0.0, 3.0), power_w=power)
    why_not = f"not above idle: {power:.2f} W while measuring, 2.00 W before"
    assert energy_j(found, 0.5, 2.5, 2.0, 10) == (None, why_not)


def test_without_idle_power_or_images_there_is_no_figure():
    found = readings(every(0.1, 0.0, 3.0), power_w=8.0)
    assert energy_j(found, 0.5, 2.5, None, 10) == (None, "the power when idle is not known")
    assert energy_j(found, 0.5, 2.5, 2.0, 0) == (None, "no images")
    assert idle_power_w([]) == (None, "no readings")


@given(st.lists(st.floats(0.01, 2), min_size=8, max_size=60), st.integers(0, 5))
def test_a_figure_lies_between_the_lowest_and_the_highest_power(gaps, phase):
    times = [math.fsum(gaps[:i]) for i in range(len(gaps) + 1)]
    found = readings(times, power_w=lambda at_s: 20 + 10 * math.sin(3 * at_s + phase))
    value, why_not = mean_power_w(found, times[1], times[-1])
    assert (value is None) == (why_not is not None)
    assert value is None or 10 <= value <= 30
