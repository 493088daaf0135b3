"""What one process measures, on a clock that shows only what the backend took.

Latencies are multiples of 1/1024 s, which a binary clock adds and subtracts without rounding: samples are compared
for equality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, count, pairwise, repeat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.backends import Model, Options
from hydradeploy.backends.null import Null, NullSession, VirtualClock
from hydradeploy.profiler.sampling import Measured, Sampling, measure, peak_bytes
from tests.conftest import missing

TICK = 1 / 1024
MODEL = Model("h02-fp32", Path("h02-fp32.onnx"), 1, (3, 4, 4), 10)
BATCHES = np.arange(4, dtype=np.float32).repeat(48).reshape(4, 1, 3, 4, 4)


def sampling(**changes: float) -> Sampling:
    values = {"warmup": 0, "warmup_s": 0.0, "samples": 1, "seconds": 0.0, "at_most": 1000}
    return Sampling(**(values | changes))  # type: ignore[arg-type]


def measured(latencies: Sequence[float], how: Sampling, load_s: float = 0.125) -> Measured:
    """What is measured of a model whose calls take these seconds, the last of them for ever."""
    clock = VirtualClock(now=1000.0)
    return measure(
        Null(clock, lambda _: chain(latencies, repeat(latencies[-1])), load_s), MODEL, Options(), BATCHES, how, clock
    )


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


@dataclass(frozen=True)
class Witness(Null):
    """Remembers what it was asked to do and with which input."""

    seen: list[object] = field(default_factory=list)

    def prepare(self) -> None:
        self.seen.append("prepare")

    def open(self, model: Model, options: Options) -> NullSession:
        self.seen.append(options)
        return _Watched(self.clock, model.classes, self.latencies(model), {"provider": "none"}, self.seen)


@dataclass
class _Watched(NullSession):
    seen: list[object] = field(default_factory=list)

    def __exit__(self, *_: object) -> None:
        self.seen.append("closed")

    def run(self, images: np.ndarray) -> np.ndarray:
        assert images.shape == (1, 3, 4, 4)
        self.seen.append(int(images[0, 0, 0, 0]))
        return super().run(images)


def witnessed(how: Sampling, batches: np.ndarray = BATCHES) -> tuple[Measured, list[object]]:
    clock = VirtualClock()
    runner = Witness(clock, lambda _: repeat(TICK))
    return measure(runner, MODEL, Options(threads=3), batches, how, clock), runner.seen


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


def test_an_error_of_the_runtime_is_raised_and_the_session_closed():
    clock, seen = VirtualClock(), []

    def three() -> Iterator[float]:
        yield from (TICK, TICK)
        raise ZeroDivisionError("for the test")

    runner = Witness(clock, lambda _: three(), seen=seen)
    with pytest.raises(ZeroDivisionError, match="for the test"):
        measure(runner, MODEL, Options(), BATCHES, sampling(samples=5), clock)
    assert seen[-1] == "closed"


def test_time_is_that_of_the_clock_given_and_by_default_of_the_wall():
    clock = VirtualClock()
    runner = Null(clock, lambda _: repeat(3600.0), load_s=1.0)
    found = measure(runner, MODEL, Options(), BATCHES, sampling(samples=3), clock)
    assert found.latency_s == (3600.0,) * 3
    found = measure(runner, MODEL, Options(), BATCHES, sampling(samples=3))
    assert all(0 <= value < 1 for value in found.latency_s), "a call of the null backend takes no real time"


def test_a_session_that_takes_no_memory_is_not_charged_with_what_was_there():
    """That what is taken counts is shown with real children."""
    found = measured([TICK], sampling(samples=10))
    if found.memory_bytes is None:
        missing("VmHWM", "this kernel tells no peak of resident memory")
    assert 0 <= found.memory_bytes < 4 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t    2096 kB\nVmRSS:\t 1000 kB\n", 2096 * 1024),
        ("Name:\tVmHWM:\nVmRSS:\t 1000 kB\n", None),
        ("", None),
        (None, None),
    ],
)
def test_the_peak_is_read_where_the_kernel_tells_it(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "status").write_text(text)
    assert peak_bytes(tmp_path / "status") == expected


def test_the_peak_survives_a_process_name_that_is_no_text(tmp_path):
    (tmp_path / "status").write_bytes(b"Name:\t\xff\xfe\nVmHWM:\t 8 kB\n")
    assert peak_bytes(tmp_path / "status") == 8192
