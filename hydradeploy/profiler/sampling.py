"""What happens in one child process: open a model, warm it up, take samples. The only place that holds the clock.

The clock is `time.perf_counter`: on Linux CLOCK_MONOTONIC, which all processes of a machine share, so that instants can
be compared with those of another process's readings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hydradeploy.backends import Backend, Images, Model, Options, prepared
from hydradeploy.profiler.calls import Caller, Calls, Clock, Pixels, Sleep
from hydradeploy.spec import Preprocessing, Record
from hydradeploy.stats.basics import median
from hydradeploy.stats.steady import LEAST_SAMPLES, LEAST_WINDOW, agree, steady

# Calls that take longer than their schedule gives them queue up without end; nobody waits that long for a frame.
MOST_BEHIND_S = 10.0
# Long enough for a fan or a governor to answer, and as close as a budget cares for.
SETTLED_WINDOW_S = 20.0
SETTLED_AGREEMENT = 0.02
_LOOK_S = 0.25
# By how much a warm-up has to have grown before it is tested again: tests then cost less than calls.
_GROWTH = 1.25
_PREPARATIONS = 5


class Sampling(Record, frozen=True, kw_only=True):
    """How much of everything a process does.

    Warm-up lasts until `warmup` calls and `warmup_s` seconds are reached, and then until calls are steady or `settle_s`
    more seconds have passed. Sampling lasts until `samples` and `seconds` are both reached; `at_most` samples are
    taken. `pace_hz` calls on a schedule instead of back to back, `concurrency` from several callers at once; `switches`
    first calls after another model's are timed at the end. Calls go on after the samples, without being kept, until
    they have lasted `metered_s`.

    `sustain` starts as cold as the minimum of warm-up allows, so that the burst is among the samples, and goes on until
    the device is as warm as it gets, `settle_s` seconds at most; `at_most` does not apply.
    """

    warmup: int
    warmup_s: float
    settle_s: float = 0.0
    samples: int
    seconds: float
    at_most: int
    pace_hz: float | None = None
    concurrency: int = 1
    switches: int = 0
    sustain: bool = False
    metered_s: float = 0.0


class Measured(Record, frozen=True, kw_only=True):
    """What one process measured: seconds per call from pixels to logits, in order, and bytes beyond the bare runtime.

    `prepare_s` is what of a call turns pixels into the model's input.
    Of several callers the order is that of completion; of calls on a schedule a latency counts from the intended
    arrival. `warmup` counts calls. `steady` is whether the warm-up ended steadily and calls kept up with their
    schedule, None where the warm-up was too short to tell. `started_s` and `ended_s` are the first sample's begin and
    the last one's end on the monotonic clock. `unkept` calls were made beyond the samples, the last of which was done
    `unkept_s` after the last sample. `settled_from` is the first sample of a `sustain` run that is as slow as
    it gets, None where it never settled. Among the `facts`, `overload` says how a schedule was too fast, `graph_failed`
    why calls ran without the CUDA graph asked for, and `device_s` how long the median call took on the GPU.
    """

    load_s: float
    first_s: float
    prepare_s: float
    warmup: int
    steady: bool | None = None
    latency_s: tuple[float, ...]
    started_s: float = 0.0
    ended_s: float = 0.0
    unkept: int = 0
    unkept_s: float = 0.0
    switch_s: tuple[float, ...] = ()
    settled_from: int | None = None
    memory_bytes: int | None
    facts: dict[str, str]

    @property
    def calls(self) -> int:
        """Samples, and calls beyond them."""
        return len(self.latency_s) + self.unkept

    @property
    def called_until_s(self) -> float:
        """When the last of those was done."""
        return self.ended_s + self.unkept_s


def measure(
    runner: Backend,
    model: Model,
    options: Options,
    batches: Pixels,
    preprocessing: Preprocessing,
    sampling: Sampling,
    clock: Clock = time.perf_counter,
    sleep: Sleep = time.sleep,
    *,
    other: Model | None = None,
    occupied_bytes: Callable[[], int | None] = lambda: None,
    settled: Callable[[], bool] = lambda: True,
) -> Measured:
    """Open the model and time calls over the batches (b, n, s, s, channels) in turn, so that no cache is flattered.

    The first call is a figure of its own. `other` is the model to switch from, `occupied_bytes` what this process
    takes, `settled` whether temperatures have stopped rising. Raises what the backend raises.
    """
    runner.prepare()
    before = occupied_bytes()
    started = clock()
    with runner.open(model, options) as session:
        load_s = clock() - started
        prepare = partial(_prepared, model, preprocessing)
        caller = Caller(session, batches, prepare, clock, sleep, sampling.pace_hz, sampling.concurrency)
        first_s = caller.once()
        warm_up, sampler = _WarmUp(sampling, clock), _Sampler(sampling, clock, settled)
        warmed = caller.call(warm_up.goes_on)
        taken = caller.call(sampler.goes_on, sampling.metered_s)
        after = occupied_bytes()
        overload = _overload(taken, sampling)
        return Measured(
            load_s=load_s,
            first_s=first_s,
            prepare_s=caller.prepare_s(_PREPARATIONS),
            warmup=warmed.begun,
            steady=warm_up.steady(warmed) if overload is None else False,
            latency_s=tuple(taken.latency_s),
            started_s=taken.started_s,
            ended_s=taken.ended_s,
            unkept=taken.unkept,
            unkept_s=max(0.0, taken.until_s - taken.ended_s),
            switch_s=_switches(runner, other, options, caller, preprocessing, sampling.switches),
            settled_from=sampler.settled_from,
            memory_bytes=_grown(before, after),
            facts={**session.facts(), **({} if overload is None else {"overload": overload})},
        )


@dataclass
class _WarmUp:
    """When a warm-up has lasted long enough."""

    sampling: Sampling
    clock: Clock
    began: float | None = None
    least_at: float | None = None
    tested: int = 0
    verdict: bool | None = None

    def goes_on(self, calls: Calls) -> bool:
        now, how = self.clock(), self.sampling
        self.began = now if self.began is None else self.began
        if calls.begun < how.warmup or now < self.began + how.warmup_s:
            return True
        self.least_at = now if self.least_at is None else self.least_at
        if how.sustain or now >= self.least_at + how.settle_s:
            return False
        if len(calls.service_s) >= max(LEAST_SAMPLES, math.ceil(_GROWTH * self.tested)):
            self._test(calls)
        return not self.verdict

    def steady(self, calls: Calls) -> bool | None:
        """Whether it ended steadily, None where it was too short to tell."""
        if not self.verdict:
            self._test(calls)
        return self.verdict

    def _test(self, calls: Calls) -> None:
        # Without the wait for the call before, which says nothing of the device.
        self.tested, self.verdict = len(calls.service_s), steady(calls.service_s)


@dataclass
class _Windows:
    """Long windows of samples, one after the other: where each starts, and the medians of those that are over."""

    starts: list[int] = field(default_factory=lambda: [0])
    medians: list[float] = field(default_factory=list)
    ends_s: float | None = None

    def look(self, now: float, calls: Calls) -> None:
        """End the window whose time is over."""
        done = len(calls.latency_s)
        if self.ends_s is None:
            self.ends_s = now + SETTLED_WINDOW_S
        elif now >= self.ends_s and done >= self.starts[-1] + LEAST_WINDOW:
            self.medians.append(median(calls.latency_s[self.starts[-1] :]))
            self.starts.append(done)
            self.ends_s = now + SETTLED_WINDOW_S

    @property
    def settled_from(self) -> int | None:
        """The first sample of the last three windows, None where they do not agree."""
        if len(self.medians) < 3 or not agree(self.medians[-3:], SETTLED_AGREEMENT):
            return None
        return self.starts[-4]


@dataclass
class _Sampler:
    """When there are samples enough."""

    sampling: Sampling
    clock: Clock
    settled: Callable[[], bool]
    settled_from: int | None = None
    began: float | None = None
    windows: _Windows = field(default_factory=_Windows)
    look_at: float = -math.inf
    warm: bool = False

    def goes_on(self, calls: Calls) -> bool:
        now, how = self.clock(), self.sampling
        self.began = now if self.began is None else self.began
        least = calls.begun >= how.samples and now >= self.began + how.seconds
        if calls.late_s > MOST_BEHIND_S:
            return False
        if not how.sustain:
            return calls.begun < how.at_most and not least
        self.windows.look(now, calls)
        if not least:
            return True
        if not self.warm and now >= self.look_at:
            self.warm, self.look_at = self.settled(), now + _LOOK_S
        self.settled_from = self.windows.settled_from if self.warm else None
        return self.settled_from is None and now < self.began + how.settle_s


def _grown(before: int | None, after: int | None) -> int | None:
    """What the model took; None also where others gave back more of a memory that is counted as a whole."""
    return None if before is None or after is None or after < before else after - before


def _overload(calls: Calls, sampling: Sampling) -> str | None:
    """That calls take longer than their schedule gives them, None where they do not."""
    if sampling.pace_hz is None or not calls.service_s:
        return None
    each = math.fsum(calls.service_s) / len(calls.service_s)
    given = sampling.concurrency / sampling.pace_hz
    return f"a call takes {each:.3g} s, the schedule gives it {given:.3g} s" if each > given else None


def _prepared(model: Model, preprocessing: Preprocessing, pixels: Pixels) -> Images:
    return prepared(pixels, model.input, preprocessing)


def _switches(
    runner: Backend, other: Model | None, options: Options, caller: Caller, preprocessing: Preprocessing, times: int
) -> tuple[float, ...]:
    """The first call after each call of another model, which is open beside this one."""
    if other is None or not times:
        return ()
    size = caller.batches.shape[1] if other.batch == "dynamic" else other.batch
    pixels = np.resize(caller.batches[0], (size, *caller.batches.shape[2:]))
    batch = _prepared(other, preprocessing, pixels)
    with runner.open(other, options) as session:
        found = []
        for _ in range(times):
            session.run(batch)
            found.append(caller.once())
    return tuple(found)
