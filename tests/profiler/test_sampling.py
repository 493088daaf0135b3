"""What one process measures, on a clock that shows only what the backend took.

Latencies are multiples of 1/1024 s, which a binary clock adds and subtracts without rounding: samples are compared
for equality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, count, pairwise, repeat
from math import exp
from pathlib import Path
from threading import Barrier, Event, Lock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy import backends
from hydradeploy.backends import Model, Options
from hydradeploy.backends.null import Null, NullSession, VirtualClock
from hydradeploy.profiler import sampling as module
from hydradeploy.profiler.sampling import MOST_BEHIND_S, Measured, Sampling, measure
from hydradeploy.spec import Preprocessing

TICK = 1 / 1024
MODEL = Model("h02-fp32", Path("h02-fp32.onnx"), 1, (3, 4, 4), 10)
BATCHES = np.arange(4, dtype=np.uint8).repeat(48).reshape(4, 1, 4, 4, 3)
# A pixel's value as it is.
PLAIN = Preprocessing(mean=(0.0,) * 3, std=(1 / 255,) * 3, crop_pct=1.0, interpolation="bicubic")


def sampling(**changes: float | None) -> Sampling:
    values = {"warmup": 0, "warmup_s": 0.0, "samples": 1, "seconds": 0.0, "at_most": 1000}
    return Sampling(**(values | changes))  # type: ignore[arg-type]


def measured(latencies: Sequence[float], how: Sampling, load_s: float = 0.125) -> Measured:
    """What is measured of a model whose calls take these seconds, the last of them for ever."""
    return endless(chain(latencies, repeat(latencies[-1])), how, load_s)


def endless(latencies: Iterator[float], how: Sampling, load_s: float = 0.125, **watched: object) -> Measured:
    """What is measured of a model whose calls take these seconds."""
    clock = VirtualClock(now=1000.0)
    runner = Null(clock, lambda _: latencies, load_s)
    return measure(runner, MODEL, Options(), BATCHES, PLAIN, how, clock, clock.sleep, **watched)


def test_load_first_run_warm_up_and_samples_are_told_apart():
    calls = [number * TICK for number in range(1, 100)]
    found = measured(calls, sampling(warmup=3, samples=5))
    assert found.load_s == 0.125
    assert found.first_s == calls[0]
    assert found.warmup == 3
    assert found.latency_s == tuple(calls[4:9])


@pytest.mark.parametrize(
    ("how", "warmup", "samples"),
    [
        (sampling(warmup=7), 7, 1),
        (sampling(warmup_s=0.5), 8, 1),
        (sampling(warmup=7, warmup_s=0.5), 8, 1),
        (sampling(warmup=9, warmup_s=0.5), 9, 1),
        (sampling(warmup_s=0.501), 9, 1),
        (sampling(samples=20), 0, 20),
        (sampling(seconds=1.0), 0, 16),
        (sampling(samples=20, seconds=1.0), 0, 20),
        (sampling(samples=10, seconds=1.0), 0, 16),
        (sampling(samples=10, seconds=1.0, at_most=12), 0, 12),
        (sampling(samples=10, at_most=3), 0, 3),
        (sampling(samples=10, seconds=1.001), 0, 17),
    ],
    ids=lambda value: str(value).removeprefix("Sampling"),
)
def test_warm_up_and_sampling_last_until_count_and_seconds_are_reached(how, warmup, samples):
    """Each call takes a sixteenth of a second."""
    found = measured([1 / 16], how)
    assert (found.warmup, len(found.latency_s)) == (warmup, samples)


def needed(ticks: Sequence[int], least: int, seconds: float) -> int:
    """After how many calls both their count and their seconds are reached."""
    ends = [0, *accumulate(ticks)]
    return next(done for done in count() if done >= least and ends[done] * TICK >= seconds)


@given(
    st.builds(
        Sampling,
        warmup=st.integers(0, 12),
        warmup_s=st.integers(0, 40).map(lambda ticks: ticks * TICK),
        samples=st.integers(0, 30),
        seconds=st.integers(0, 60).map(lambda ticks: ticks * TICK),
        at_most=st.integers(1, 40),
    ),
    st.lists(st.integers(1, 9), min_size=200, max_size=200),
    st.integers(0, 100),
)
def test_every_sample_is_a_call_in_order_after_first_run_and_warm_up(how, ticks, load):
    found = measured([tick * TICK for tick in ticks], how, load * TICK)
    warmup = needed(ticks[1:], how.warmup, how.warmup_s)
    samples = min(how.at_most, needed(ticks[1 + warmup :], how.samples, how.seconds))
    assert found.load_s == load * TICK
    assert found.first_s == ticks[0] * TICK
    assert found.warmup == warmup
    assert found.latency_s == tuple(tick * TICK for tick in ticks[1 + warmup : 1 + warmup + samples])


@pytest.mark.parametrize(
    ("how", "samples", "calls"),
    [
        (sampling(samples=5, metered_s=1.0), 5, 16),
        (sampling(samples=5, at_most=5, metered_s=1.001), 5, 17),
        (sampling(samples=20, metered_s=1.0), 20, 20),
        (sampling(samples=5, seconds=1.0, metered_s=1.0), 16, 16),
        (sampling(samples=5, concurrency=2, metered_s=0.5), 5, None),
        (sampling(samples=5, pace_hz=8.0, metered_s=1.5), 5, 13),
        (sampling(samples=20, pace_hz=8.0, metered_s=1.5), 20, 20),
    ],
    ids=lambda value: str(value).removeprefix("Sampling"),
)
def test_calls_go_on_unkept_until_they_have_lasted_as_long_as_a_meter_takes(how, samples, calls):
    """Each call takes a sixteenth of a second."""
    found = measured([1 / 16], how)
    assert len(found.latency_s) == samples
    assert found.calls == calls or calls is None
    assert found.called_until_s - found.started_s >= how.metered_s
    plain = measured([1 / 16], msgspec.structs.replace(how, metered_s=0.0))
    assert found.latency_s == plain.latency_s or how.concurrency > 1
    assert plain.calls == samples or how.concurrency > 1


def test_what_is_unkept_ends_with_its_last_call():
    found = measured([1 / 16], sampling(samples=5, metered_s=0.99))
    assert (found.ended_s - found.started_s, found.unkept, found.unkept_s) == (5 / 16, 11, 11 / 16)


def test_the_window_of_the_samples_is_told_on_the_clock():
    found = measured([3 * TICK], sampling(warmup=10, samples=20))
    assert found.started_s == 1000 + 0.125 + 11 * 3 * TICK
    assert found.ended_s == found.started_s + 20 * 3 * TICK


@dataclass(frozen=True)
class Witness(Null):
    """Remembers what it was asked to do and with which input."""

    seen: list[object] = field(default_factory=list)

    def prepare(self) -> None:
        self.seen.append("prepare")

    def open(self, model: Model, options: Options) -> NullSession:
        self.seen.append(options if model is MODEL else model.name)
        return _Watched(self.clock, model.classes, self.latencies(model), {"provider": "none"}, self.seen)


@dataclass
class _Watched(NullSession):
    seen: list[object] = field(default_factory=list)

    def __exit__(self, *_: object) -> None:
        self.seen.append("closed")

    def run(self, images: np.ndarray) -> np.ndarray:
        assert images.shape == (1, 3, 4, 4)
        self.seen.append(round(float(images[0, 0, 0, 0])))
        return super().run(images)


def witnessed(how: Sampling, batches: np.ndarray = BATCHES) -> tuple[Measured, list[object]]:
    clock = VirtualClock()
    runner = Witness(clock, lambda _: repeat(TICK))
    return measure(runner, MODEL, Options(threads=3), batches, PLAIN, how, clock), runner.seen


def test_the_runtime_is_loaded_before_the_model_and_the_session_closed_after_the_last_call():
    found, seen = witnessed(sampling())
    assert seen[:2] == ["prepare", Options(threads=3)]
    assert seen[-1] == "closed"
    assert found.facts == {"provider": "none"}


@pytest.mark.parametrize("batches", [2, 3, 4])
def test_inputs_take_turns_and_each_is_used_as_often_as_the_others(batches):
    _, seen = witnessed(sampling(warmup=5, samples=24), BATCHES[:batches])
    inputs = [number for number in seen if isinstance(number, int)]
    assert len(inputs) == 1 + 5 + 24
    sampled = inputs[6:]
    assert all((later - earlier) % batches == 1 for earlier, later in pairwise(sampled))
    assert {sampled.count(number) for number in range(batches)} == {24 // batches}
    assert inputs[:6] == [number % batches for number in range(6)]


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_a_call_is_from_pixels_to_logits_and_how_long_preparing_takes_is_told(monkeypatch, kind):
    """Preparing takes three ticks and the call itself one; of models that take pixels nothing is prepared."""
    clock, seen = VirtualClock(), []

    def normalise(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        assert (pixels.dtype, preprocessing) == (np.uint8, PLAIN)
        clock.advance(3 * TICK)
        return np.zeros((1, 3, 4, 4), np.float32)

    class Takes(NullSession):
        def run(self, images: np.ndarray) -> np.ndarray:
            seen.append((images.dtype.name, images.shape))
            return super().run(images)

    class Runner(Null):
        def open(self, model: Model, options: Options) -> NullSession:
            return Takes(self.clock, 10, self.latencies(model))

    monkeypatch.setattr(backends, "normalise", normalise)
    model = replace(MODEL, input=kind)
    runner = Runner(clock, lambda _: repeat(TICK))
    found = measure(runner, model, Options(), BATCHES, PLAIN, sampling(warmup=2, samples=4), clock, clock.sleep)
    assert set(seen) == {("float32", (1, 3, 4, 4)) if kind == "float32" else ("uint8", (1, 4, 4, 3))}
    prepare_s = 3 * TICK if kind == "float32" else 0.0
    assert found.prepare_s == prepare_s
    assert found.first_s == prepare_s + TICK
    assert set(found.latency_s) == {prepare_s + TICK}


def test_an_error_of_the_runtime_is_raised_and_the_session_closed():
    clock, seen = VirtualClock(), []

    def three() -> Iterator[float]:
        yield from (TICK, TICK)
        raise ZeroDivisionError("for the test")

    runner = Witness(clock, lambda _: three(), seen=seen)
    with pytest.raises(ZeroDivisionError, match="for the test"):
        measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(samples=5), clock)
    assert seen[-1] == "closed"


def test_time_is_that_of_the_clock_given_and_by_default_of_the_wall():
    clock = VirtualClock()
    runner = Null(clock, lambda _: repeat(3600.0), load_s=1.0)
    found = measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(samples=3), clock)
    assert found.latency_s == (3600.0,) * 3
    found = measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(samples=3))
    assert all(0 <= value < 1 for value in found.latency_s), "a call of the null backend takes no real time"


# Warm-up until steady.


def test_warm_up_goes_on_until_calls_have_stopped_getting_faster():
    ticks = [max(64, 300 - number) * TICK for number in range(400)]
    found = measured(ticks, sampling(warmup=3, settle_s=1000.0, samples=50))
    assert found.steady is True
    assert 236 <= found.warmup < 3 * 236
    assert set(found.latency_s) == {64 * TICK}


@pytest.mark.parametrize("settle_s", [0.0, 1.0, 7.25])
def test_a_warm_up_that_never_gets_steady_is_bounded_and_told(settle_s):
    """Each call is a thousandth faster than the one before, from a sixteenth of a second on."""
    found = endless((exp(-number / 1000) / 16 for number in count()), sampling(warmup=40, settle_s=settle_s))
    least = 40 / 16
    assert found.steady is False
    assert settle_s / 0.0625 <= found.warmup - 40 <= settle_s / (exp(-(least + settle_s) * 16 / 900) / 16) + 1
    assert len(found.latency_s) == 1


def test_without_time_to_settle_warm_up_is_the_minimum_and_steady_is_what_the_test_says_of_it():
    assert [measured([TICK], sampling(warmup=n)).steady for n in (0, 29, 30, 100)] == [None, None, True, True]
    assert measured([n * TICK for n in range(200, 1, -1)], sampling(warmup=60)).steady is False


def test_a_warm_up_of_too_few_calls_to_tell_is_told_as_such():
    """Two calls a second, for five seconds."""
    found = measured([0.5], sampling(warmup=2, settle_s=5.0))
    assert found.warmup == 12
    assert found.steady is None


def test_no_more_calls_are_spent_on_what_is_steady_from_the_start_than_the_test_needs():
    assert measured([TICK], sampling(warmup=3, settle_s=100.0)).warmup == 30
    assert measured([TICK], sampling(warmup=300, settle_s=100.0)).warmup == 300


def test_the_change_test_is_put_only_when_the_warm_up_has_grown(monkeypatch):
    seen = []

    def never(samples: Sequence[float]) -> bool:
        seen.append(len(samples))
        return False

    monkeypatch.setattr(module, "steady", never)
    found = measured([TICK], sampling(settle_s=20.0))
    assert found.warmup > 20000
    assert len(seen) < 35
    assert all(after >= 1.25 * before for before, after in pairwise(seen[:-1]))


# On a schedule.


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.sampled_from([1.0, 8.0, 64.0, 512.0]))
def test_a_call_on_a_schedule_begins_when_it_is_due_and_the_one_before_is_done_and_counts_from_when_it_was_due(
    ticks, pace
):
    """After Lindley's recursion; no call is left out."""
    calls = [tick * TICK for tick in ticks]
    found = measured([TICK, *calls], sampling(samples=len(calls), pace_hz=pace))
    start = 1000 + 0.125 + TICK + 1 / pace
    done, expected = start, []
    for place, taken in enumerate(calls):
        due = start + place / pace
        done = max(done, due) + taken
        expected.append(done - due)
    assert found.latency_s == tuple(expected)
    assert (found.started_s, found.ended_s) == (start, done)


def test_calls_on_a_schedule_last_until_count_and_seconds_are_reached_too():
    found = measured([TICK], sampling(warmup=5, samples=10, seconds=2.0, pace_hz=8.0))
    assert found.warmup == 5
    assert len(found.latency_s) == 16
    assert found.latency_s == (TICK,) * 16
    assert found.ended_s - found.started_s == 15 / 8 + TICK


def test_one_slow_call_makes_those_behind_it_late_and_the_run_stays_a_steady_one():
    found = measured([*[TICK] * 41, 5 / 8, TICK], sampling(warmup=40, samples=10, pace_hz=8.0))
    late = [place / 8 + (5 - place) * TICK for place in range(4, -1, -1)]
    assert found.latency_s == (5 / 8, *late, TICK, TICK, TICK, TICK)
    assert found.steady is True
    assert found.facts == {}


def test_a_schedule_faster_than_the_calls_is_told_and_the_run_bounded():
    """A call takes two periods: the run ends when the next one would be late by more than anyone waits."""
    found = measured([1 / 4], sampling(warmup=40, samples=10000, at_most=10000, pace_hz=8.0))
    late = [value - 1 / 4 for value in found.latency_s]
    assert late == [place / 8 for place in range(len(late))]
    assert late[-2] <= MOST_BEHIND_S < late[-1]
    assert found.steady is False
    assert found.facts["overload"] == "a call takes 0.25 s, the schedule gives it 0.125 s"


def test_a_hopeless_schedule_still_has_samples():
    found = measured([60.0], sampling(samples=100, pace_hz=32.0))
    assert found.latency_s == (60.0, 120 - 1 / 32)
    assert "overload" in found.facts


def test_the_warm_up_keeps_to_the_schedule_and_is_judged_by_what_calls_take():
    clock, begins = VirtualClock(), []

    def calls() -> Iterator[float]:
        for number in count():
            begins.append(clock.now)
            yield 1 / 16 if number % 50 else 1.0

    runner = Null(clock, lambda _: calls(), load_s=0.0)
    found = measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(warmup=80, pace_hz=4.0), clock, clock.sleep)
    assert found.steady is True, "the wait behind the slow one is no change of the device"
    assert begins[1] == 1.25
    assert {after - before for before, after in pairwise(begins[1:40])} == {0.25}


# Several callers.


@dataclass
class Threads:
    """A backend whose calls do what they are told, given their number."""

    run: object
    name: str = "threads"
    dialect: str = "ort"
    processor: str = "cpu"
    numbers: Iterator[int] = field(default_factory=count)
    lock: object = field(default_factory=Lock)

    def prepare(self) -> None: ...

    def open(self, model: Model, options: Options) -> _Told:
        return _Told(self)


class _Told(NullSession):
    def __init__(self, runner: Threads) -> None:
        super().__init__(VirtualClock(), 10, repeat(0.0))
        self.runner = runner

    def run(self, images: np.ndarray) -> np.ndarray:
        with self.runner.lock:
            number = next(self.runner.numbers)
        self.runner.run(number)
        return np.zeros((1, 10), np.float32)


def test_as_many_callers_as_asked_for_call_one_session_at_the_same_time():
    """The first call of each waits for those of all the others."""
    barrier = Barrier(4, timeout=30)
    runner = Threads(lambda number: barrier.wait() if 1 <= number <= 4 else None)
    found = measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(samples=40, concurrency=4))
    assert len(found.latency_s) == 40
    assert found.started_s <= found.ended_s


def test_the_warm_up_of_several_callers_is_by_all_of_them():
    barrier = Barrier(3, timeout=30)
    runner = Threads(lambda number: barrier.wait() if 1 <= number <= 3 else None)
    assert measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(warmup=30, concurrency=3)).warmup == 30


def test_no_caller_stops_while_a_call_that_counts_still_runs():
    """The last of 20 samples waits for a call after it, which is none."""
    another = Event()

    def run(number: int) -> None:
        if number == 20:
            assert another.wait(timeout=30)
        elif number > 20:
            another.set()

    found = measure(Threads(run), MODEL, Options(), BATCHES, PLAIN, sampling(samples=20, concurrency=2))
    assert len(found.latency_s) == 20


def test_an_error_of_one_caller_is_raised_and_ends_the_others():
    def run(number: int) -> None:
        if number == 10:
            raise ZeroDivisionError("for the test")

    with pytest.raises(ZeroDivisionError, match="for the test"):
        measure(
            Threads(run), MODEL, Options(), BATCHES, PLAIN, sampling(samples=1 << 40, at_most=1 << 40, concurrency=3)
        )


# Switches and memory.

OTHER = Model("h06-fp32", Path("h06-fp32.onnx"), 1, (3, 4, 4), 10)


def test_a_switch_is_the_first_call_after_one_of_the_other_model():
    """The other model's calls take 100 ticks, which are no switch."""
    clock = VirtualClock()
    ticks = {MODEL.name: count(1), OTHER.name: repeat(100)}
    runner = Witness(clock, lambda model: (tick * TICK for tick in ticks[model.name]))
    how = sampling(samples=5, switches=3)
    found = measure(runner, MODEL, Options(), BATCHES, PLAIN, how, clock, clock.sleep, other=OTHER)
    assert found.latency_s == tuple(tick * TICK for tick in range(2, 7))
    assert found.switch_s == (7 * TICK, 8 * TICK, 9 * TICK)
    assert runner.seen[8:] == ["h06-fp32", 0, 2, 0, 3, 0, 0, "closed", "closed"]


@pytest.mark.parametrize(("other", "switches"), [(None, 3), (OTHER, 0)])
def test_without_another_model_or_when_not_asked_for_no_switch_is_measured(other, switches):
    clock = VirtualClock()
    runner = Witness(clock, lambda _: repeat(TICK))
    how = sampling(samples=5, switches=switches)
    assert measure(runner, MODEL, Options(), BATCHES, PLAIN, how, clock, clock.sleep, other=other).switch_s == ()
    assert "h06-fp32" not in runner.seen


@pytest.mark.parametrize("batch", [3, "dynamic"])
def test_the_other_model_gets_batches_of_its_own_size(batch):
    shapes = []

    class Shapes(NullSession):
        def run(self, images: np.ndarray) -> np.ndarray:
            shapes.append(images.shape)
            return super().run(images)

    class Runner(Null):
        def open(self, model: Model, options: Options) -> NullSession:
            return Shapes(self.clock, 10, self.latencies(model))

    clock, other = VirtualClock(), Model("h06-fp32", Path("h06-fp32.onnx"), batch, (3, 4, 4), 10)
    runner = Runner(clock, lambda _: repeat(TICK))
    measure(runner, MODEL, Options(), BATCHES, PLAIN, sampling(switches=1), clock, clock.sleep, other=other)
    assert shapes[-2:] == [(3 if batch == 3 else 1, 3, 4, 4), (1, 3, 4, 4)]


@pytest.mark.parametrize(
    ("told", "expected"), [([100, 350], 250), ([None, 350], None), ([100, None], None), ([7, 7], 0)]
)
def test_memory_is_what_is_occupied_after_sampling_beyond_what_was_before_opening(told, expected):
    clock, answers = VirtualClock(), iter(told)
    runner = Witness(clock, lambda _: repeat(TICK))

    def occupied() -> int | None:
        runner.seen.append("memory")
        return next(answers)

    how = sampling(samples=2, switches=1)
    found = measure(
        runner, MODEL, Options(), BATCHES, PLAIN, how, clock, clock.sleep, other=OTHER, occupied_bytes=occupied
    )
    assert found.memory_bytes == expected
    assert runner.seen[:2] == ["prepare", "memory"]
    assert runner.seen[3:8] == [0, 1, 2, "memory", "h06-fp32"], "the other model does not count"


# Until the device is as warm as it gets.


def heating(seconds: float, call: float = 1 / 16) -> Iterator[float]:
    """Calls get slower by half for so many seconds."""
    now = 0.0
    while True:
        taken = call * (1 + 0.5 * min(1.0, now / seconds))
        yield taken
        now += taken


SUSTAIN = {"samples": 10, "seconds": 30.0, "at_most": 50, "sustain": True}


def test_a_sustained_run_has_the_burst_and_goes_on_until_calls_get_no_slower():
    found = endless(heating(300.0), sampling(**SUSTAIN, settle_s=3600.0))
    assert found.latency_s[0] < 1.01 / 16
    start = found.settled_from
    assert start is not None
    settled = found.latency_s[start:]
    assert max(settled) <= 1.03 * min(settled), "medians of windows are within 1.02"
    assert sum(settled) >= 60
    assert 300 <= found.ended_s - found.started_s < 300 + 4 * 20 + 1
    assert found.latency_s[-1] == 1.5 / 16


def test_temperatures_that_still_rise_keep_a_sustained_run_going():
    asked = []

    def settled() -> bool:
        asked.append(None)
        return len(asked) > 1000

    found = endless(repeat(1 / 16), sampling(**SUSTAIN, settle_s=3600.0), settled=settled)
    took = found.ended_s - found.started_s
    assert took > 1000 * 0.25, "it asks a few times a second"
    assert found.settled_from is not None
    assert sum(found.latency_s[found.settled_from :]) < 3 * 20 + 20 + 1, "the last three windows"


@pytest.mark.parametrize(
    ("latencies", "settled"),
    [(lambda: heating(500.0), True), (lambda: repeat(1 / 16), False)],
    ids=["calls get slower", "temperatures rise"],
)
def test_a_sustained_run_that_never_settles_is_bounded_and_told(latencies, settled):
    found = endless(latencies(), sampling(**SUSTAIN, settle_s=400.0), settled=lambda: settled)
    assert found.settled_from is None
    assert 400 <= found.ended_s - found.started_s < 401
    assert sum(found.latency_s) == pytest.approx(400, abs=1), "every sample is kept"


def test_a_sustained_run_lasts_at_least_its_seconds_and_three_windows():
    for seconds, least in ((30.0, 60), (500.0, 500)):
        how = sampling(**(SUSTAIN | {"seconds": seconds}), settle_s=3600.0)
        found = endless(repeat(1 / 16), how)
        assert least <= found.ended_s - found.started_s < least + 2
        assert found.settled_from is not None


def test_windows_of_very_slow_calls_have_calls_enough_to_speak_of_a_median():
    found = endless(repeat(30.0), sampling(**(SUSTAIN | {"samples": 1}), settle_s=3600.0))
    assert (len(found.latency_s), found.settled_from) == (15, 0)


def test_a_sustained_run_does_not_warm_the_device_up_beforehand():
    """Though calls are not steady."""
    found = endless(heating(300.0), sampling(**SUSTAIN, warmup=35, settle_s=3600.0))
    assert found.warmup == 35


def test_a_sustained_run_on_a_schedule_keeps_to_it():
    found = endless(repeat(1 / 64), sampling(**SUSTAIN, settle_s=3600.0, pace_hz=8.0))
    assert found.settled_from is not None
    assert set(found.latency_s) == {1 / 64}
    assert len(found.latency_s) == pytest.approx(60 * 8, abs=10)
