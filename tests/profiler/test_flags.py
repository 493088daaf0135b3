"""Numbers from readings and flags from numbers, for conditions that are made up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.profiler.flags import evidence, judge
from tests.profiler.readings import every, reading, readings

QUARTERS = every(0.25, 0.0, 3.0)


def names(flags) -> list[str]:
    return [flag.name for flag in flags]


def flagged(*found, cores: int = 2) -> list[str]:
    return names(judge(found, cores=cores))


# ---------------------------------------------------------------- who else kept cores busy


@given(foreign=st.floats(0, 30), ours=st.floats(0, 30), ended=st.floats(0.4, 40))
def test_foreign_load_is_what_all_kept_busy_but_for_ourselves(foreign, ours, ended):
    found = readings(
        every(0.25, 0.0, 41.0), busy_s=lambda at_s: 5e4 + (foreign + ours) * at_s, ours_s=lambda at_s: 7 + ours * at_s
    )
    numbers = evidence(found, 0.1, ended)
    assert numbers["foreign_cores"] == pytest.approx(foreign, abs=1e-6)
    assert flagged(numbers) == (["contended"] if foreign > 0.1 + 0.03 / numbers["watched_s"] else [])


def test_counters_are_compared_from_the_reading_before_the_window_to_the_one_after_it():
    busy = {0.0: 0, 1.0: 0, 1.25: 0, 2.25: 1, 2.5: 1, 3.0: 1.5}
    found = readings(list(busy), busy_s=busy.__getitem__, ours_s=0.0)
    numbers = evidence(found, 1.3, 2.3)
    assert numbers["watched_s"] == 1.25
    assert numbers["foreign_cores"] == pytest.approx(1 / 1.25)


@pytest.mark.parametrize("ended", [0.2, 0.26])
def test_a_window_too_short_for_the_kernels_clock_has_no_load(ended):
    found = readings([0.0, 0.25, 0.29], busy_s=lambda at_s: 2 * at_s, ours_s=0.0, steal_s=lambda at_s: at_s)
    numbers = evidence(found, 0.0, ended)
    assert numbers.keys() == {"watched_s"}
    assert flagged(numbers) == []


def test_a_load_that_seems_negative_is_none():
    found = readings(QUARTERS, busy_s=lambda at_s: 0.9 * at_s, ours_s=lambda at_s: at_s)
    assert evidence(found, 0.1, 2.9)["foreign_cores"] == 0


def test_a_short_burst_in_a_long_run_is_not_watered_down():
    """Ten minutes, both cores taken for 10 s."""
    found = readings(every(0.25, 0, 600), busy_s=lambda at_s: 2 * min(10, max(0, at_s - 300)), ours_s=0.0)
    numbers = evidence(found, 1, 599)
    assert numbers["foreign_cores"] == pytest.approx(2)
    assert flagged(numbers) == ["contended"]


@pytest.mark.parametrize(("cores", "flags"), [(2, ["contended"]), (8, []), (16, [])])
def test_what_counts_as_load_depends_on_how_many_cores_there_are(cores, flags):
    assert flagged({"watched_s": 10.0, "foreign_cores": 0.35}, cores=cores) == flags


def test_rounding_of_short_windows_is_no_load():
    """Steps of 10 ms, rounded each their own way, over a third of a second."""
    assert flagged({"watched_s": 0.3, "foreign_cores": 0.05 / 0.3, "steal_cores": 0.02 / 0.3}) == []


def test_stolen_time_is_contention():
    found = readings(QUARTERS, steal_s=lambda at_s: 100 + 0.2 * at_s)
    numbers = evidence(found, 0.3, 2.8)
    assert numbers["steal_cores"] == pytest.approx(0.2)
    (flag,) = judge([numbers], cores=2)
    assert flag == ("contended", "contended: the host of this virtual machine took 0.20 cores away in 1 of 1 process")


# ---------------------------------------------------------------- counters of events


@given(rise=st.integers(0, 1000), before=st.integers(0, 10**9))
def test_a_quota_that_ran_out_is_throttling(rise, before):
    found = readings(
        QUARTERS,
        cgroup_throttled=lambda at_s: before + (rise if at_s > 1 else 0),
        cgroup_throttled_s=lambda at_s: 3 + (0.01 * rise if at_s > 1 else 0),
    )
    numbers = evidence(found, 0.5, 2.5)
    assert numbers["cgroup_throttled"] == rise
    assert numbers["cgroup_throttled_s"] == pytest.approx(0.01 * rise)
    assert flagged(numbers) == (["throttled"] if rise else [])


def test_what_happened_before_the_window_does_not_count():
    found = readings(QUARTERS, throttle_events__oc1=lambda at_s: float(at_s > 0.6), swapped_pages=lambda at_s: -at_s)
    numbers = evidence(found, 1.1, 2.5)
    assert numbers["throttle_events.oc1"] == 0
    assert flagged(numbers) == []


def test_one_event_of_protection_in_one_process_of_five_throttles_the_cell():
    clean, hit = {"watched_s": 1.0, "throttle_events.oc1": 0.0}, {"watched_s": 1.0, "throttle_events.oc1": 2.0}
    (flag,) = judge([clean, clean, hit, clean, clean], cores=6)
    assert flag.name == "throttled"
    assert flag.remark == ("throttled: the device slowed down to protect itself, oc1 rose by 2, in 1 of 5 processes")


@pytest.mark.parametrize(("per_s", "flags"), [(1.5, []), (7.6, []), (19.0, []), (25.0, ["throttled"])])
def test_over_current_is_ordinary_until_there_is_much_of_it(per_s, flags):
    numbers = evidence(readings(QUARTERS, overcurrent_events__oc3=lambda at_s: 179 + per_s * at_s), 0.5, 2.5)
    assert numbers["overcurrent_per_s.oc3"] == pytest.approx(per_s)
    assert flagged(numbers) == flags


def test_a_counter_that_began_anew_says_nothing():
    found = readings(QUARTERS, throttle_events__oc1=lambda at_s: 5 if at_s < 1 else 0, busy_s=0.0, ours_s=0.0)
    assert "throttle_events.oc1" not in evidence(found, 0.5, 2.5)


@pytest.mark.parametrize(("pages", "flags"), [(0, []), (16, []), (17, ["contended"])])
def test_swapping_is_contention(pages, flags):
    numbers = evidence(readings(QUARTERS, swapped_pages=lambda at_s: pages if at_s > 1 else 0), 0.5, 2.5)
    assert numbers["swapped_pages"] == pages
    assert flagged(numbers) == flags


# ---------------------------------------------------------------- gauges


def test_a_sign_of_throttling_and_a_foreign_process_count_even_if_seen_once():
    found = readings(
        QUARTERS,
        **{"throttling__gpu-throttle-alert": lambda at_s: float(at_s == 1.5)},
        foreign_processes__cuda=lambda at_s: 2.0 * (at_s == 1.0),
    )
    numbers = evidence(found, 0.5, 2.5)
    assert [flag.remark for flag in judge([numbers], cores=2)] == [
        "throttled: the device was slowing down to protect itself, by gpu-throttle-alert, in 1 of 1 process",
        "contended: other programs had up to 2 processes on cuda in 1 of 1 process",
    ]


def test_temperatures_are_told_from_before_to_after_and_clocks_while_measuring():
    at = [0.0, 1.0, 2.0, 3.0]
    heat = dict(zip(at, (40.0, 61.0, 72.5, 70.0), strict=True))
    clock = dict(zip(at, (3e8, 1.2e9, 1.1e9, 2e8), strict=True))
    found = readings(at, **{"temperature_c__gpu-thermal": heat.__getitem__, "clock_hz__gpu": clock.__getitem__})
    numbers = evidence(found, 0.5, 2.5)
    assert numbers["temperature_c.gpu-thermal.start"] == 40
    assert numbers["temperature_c.gpu-thermal.max"] == 72.5
    assert numbers["temperature_c.gpu-thermal.end"] == 70
    assert numbers["clock_hz.gpu.min"] == 1.1e9


def test_power_is_the_mean_while_measuring():
    assert evidence(readings([0, 1, 2, 3], power_w=lambda at_s: 5 + 10 * at_s), 0.5, 2.5)["power_w"] == 20


LONG = every(0.25, 0.0, 6.0)


@pytest.mark.parametrize(
    ("clock", "flags"),
    [
        (lambda at_s: 1.0e9, []),
        (lambda at_s: 0.98e9, []),
        (lambda at_s: 0.9e9, ["throttled"]),
        (lambda at_s: 0.9e9 if 1 <= at_s < 3.7 else 1e9, ["throttled"]),
        (lambda at_s: 0.5e9 if 1 <= at_s < 2.2 else 1e9, []),
    ],
)
def test_a_pinned_clock_that_stays_below_its_target_is_throttling(clock, flags):
    numbers = evidence(readings(LONG, clock_hz__gpu=clock, pinned_hz__gpu=1e9), 0.1, 5.9)
    assert numbers["pinned_hz.gpu"] == 1e9
    assert flagged(numbers) == flags


def test_a_clock_that_nothing_pins_may_be_anywhere():
    assert flagged(evidence(readings(LONG, clock_hz__gpu=lambda at_s: 3e8 + 1e8 * (at_s % 2)), 0.1, 5.9)) == []


@pytest.mark.parametrize(("low", "flags"), [((0, 1, 2), ["throttled"]), ((0, 1, 3), []), ((), [])])
def test_windows_too_short_for_three_readings_tell_it_together(low, flags):
    found = [
        evidence(readings(every(0.25, 0, 1), clock_hz__cpu0=0.8e9 if i in low else 1e9, pinned_hz__cpu0=1e9), 0.1, 0.9)
        for i in range(5)
    ]
    assert [numbers["clock_shortfall_brief.cpu0"] for numbers in found] == pytest.approx(
        [0.2 if i in low else 0 for i in range(5)]
    )
    assert flagged(*found) == flags


# ---------------------------------------------------------------- what was not read


def test_what_was_not_read_is_absent_and_raises_no_flag():
    assert evidence([], 1, 2) == {}
    assert evidence([reading(5.0, busy_s=1.0)], 5, 6) == {"watched_s": 0}
    assert evidence(readings(QUARTERS), 0.5, 2.5) == {"watched_s": 2.0}
    assert evidence(readings(QUARTERS, busy_s=lambda at_s: 2 * at_s), 0.5, 2.5) == {"watched_s": 2.0}
    assert flagged({}, {"watched_s": 1.0}) == []


def test_a_sensor_that_answers_at_times_only_tells_what_it_told():
    found = [
        reading(at_s, temperature_c__gpu=50 + at_s, steal_s=0.5 * at_s) if at_s in (0.5, 1.0, 1.5) else reading(at_s)
        for at_s in QUARTERS
    ]
    numbers = evidence(found, 0.3, 2.5)
    assert numbers["temperature_c.gpu.max"] == 51.5
    assert numbers["steal_cores"] == pytest.approx(0.5)


# ---------------------------------------------------------------- the cell


def test_a_remark_has_the_worst_number_and_in_how_many_processes():
    clean = {"watched_s": 1.0, "foreign_cores": 0.02}
    found = [clean | {"foreign_cores": cores} for cores in (0.3, 0.02, 0.92, 0.0, 0.5)]
    (flag,) = judge(found, cores=2)
    assert flag == ("contended", "contended: other programs kept 0.92 cores busy in 3 of 5 processes")


@pytest.mark.parametrize(("spread", "flags"), [(None, []), (0.0, []), (0.1, []), (0.11, ["noisy"])])
def test_processes_that_differ_are_noisy(spread, flags):
    assert names(judge([{}], cores=2, spread=spread)) == flags


@pytest.mark.parametrize(
    ("steady", "flags"),
    [
        ((), []),
        ((True, None, True), []),
        ((None, None, None), []),
        ((False, False, True, True), []),
        ((False, False, False, True, None), ["noisy"]),
    ],
)
def test_warm_ups_that_mostly_never_became_steady_are_noisy(steady, flags):
    assert names(judge([{}], cores=2, steady=steady)) == flags


@pytest.mark.parametrize(("clocks", "flags"), [(None, []), ("pinned", []), ("floating", ["floating-clocks"])])
def test_clocks_that_float_are_remarked(clocks, flags):
    assert names(judge([{}], cores=2, clocks=clocks)) == flags


def test_all_that_was_wrong_is_told():
    found = [{"watched_s": 1.0, "foreign_cores": 1.0, "steal_cores": 0.5, "cgroup_throttled": 4.0}]
    flags = judge(found, cores=2, clocks="floating", spread=0.2, steady=(False,))
    assert names(flags) == ["throttled", "contended", "contended", "noisy", "noisy", "floating-clocks"]
    assert all(remark.startswith(f"{name}: ") for name, remark in flags)
