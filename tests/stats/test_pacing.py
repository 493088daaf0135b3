"""What a fixed rate of arrivals makes of responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.stats.pacing import deadline_misses, frame_age_s

TICKS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("latency_s", "share"), [([0.01], 0.0), ([0.125], 0.0), ([0.126], 1.0), ([0.1, 0.2, 0.125, 0.3], 0.5)]
)
def test_a_deadline_of_one_period_is_missed_by_what_takes_longer(latency_s, share):
    assert deadline_misses(latency_s, 8.0) == share


def test_a_frame_is_as_old_as_the_next_one_takes_to_come_and_to_be_finished():
    assert frame_age_s([0.5, 0.125, 0.25], 8.0) == (0.25, 0.375)
    assert frame_age_s([0.5], 8.0) == ()
    assert frame_age_s([], 8.0) == ()


def test_frames_of_different_processes_do_not_follow_each_other():
    assert frame_age_s([0.5, 0.125, 0.25, 1.0], 8.0, [0, 0, 1, 1]) == (0.25, 1.125)


@given(TICKS)
def test_the_age_is_that_seen_by_who_looks_at_finished_frames(ticks):
    """Frames that arrive every eighth of a second and are finished one after the other."""
    latency_s, done = [], 0.0
    for place, tick in enumerate(ticks):
        done = max(done, place / 8) + tick / 64
        latency_s.append(done - place / 8)
    finished = [place / 8 + value for place, value in enumerate(latency_s)]
    seen = tuple(finished[place + 1] - place / 8 for place in range(len(ticks) - 1))
    assert frame_age_s(latency_s, 8.0) == seen
