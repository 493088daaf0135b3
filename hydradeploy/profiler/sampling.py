"""What happens in one child process: open a model, warm it up, take samples. The only place that holds the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Backend, Model, Options
from hydradeploy.spec import Record

Clock = Callable[[], float]


class Sampling(Record, frozen=True, kw_only=True):
    """How much of everything a process does.

    Warm-up lasts until `warmup` calls and `warmup_s` seconds are reached, and then until calls are steady or `settle_s`
    more seconds have passed. Sampling lasts until `samples` and `seconds` are both reached; `at_most` samples are
    taken. `pace_hz` calls on a schedule instead of back to back, `concurrency` from several callers at once; `switches`
    first calls after another model's are timed at the end. `sustain` goes on until the device is as warm as it gets.
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


class Measured(Record, frozen=True, kw_only=True):
    """What one process measured: seconds per call from host to host, in order, and bytes beyond the bare runtime.

    `steady` is whether the warm-up ended steadily, None where it was too short to tell. `started_s` and `ended_s` are
    the first sample's begin and the last one's end on the monotonic clock. `settled_from` is the first sample of a
    `sustain` run that is as slow as it gets.
    """

    load_s: float
    first_s: float
    warmup: int
    steady: bool | None = None
    latency_s: tuple[float, ...]
    started_s: float = 0.0
    ended_s: float = 0.0
    switch_s: tuple[float, ...] = ()
    settled_from: int | None = None
    memory_bytes: int | None
    facts: dict[str, str]


def measure(
    runner: Backend,
    model: Model,
    options: Options,
    batches: NDArray[np.float32],
    sampling: Sampling,
    clock: Clock = time.perf_counter,
) -> Measured:
    """Open the model and time calls over the batches (b, n, channels, s, s) in turn, so that no cache is flattered.

    The first call is a figure of its own. Raises what the backend raises.
    """
    runner.prepare()
    before = peak_bytes()
    started = clock()
    with runner.open(model, options) as session:
        load_s = clock() - started

        def call(number: int) -> float:
            batch = batches[number % len(batches)]
            begun = clock()
            session.run(batch)
            return clock() - begun

        first_s = call(0)
        warmed = 0
        until = clock() + sampling.warmup_s
        while warmed < sampling.warmup or clock() < until:
            warmed += 1
            call(warmed)
        latency_s: list[float] = []
        until = clock() + sampling.seconds
        while len(latency_s) < sampling.at_most and (len(latency_s) < sampling.samples or clock() < until):
            latency_s.append(call(len(latency_s)))
        after = peak_bytes()
        return Measured(
            load_s=load_s,
            first_s=first_s,
            warmup=warmed,
            latency_s=tuple(latency_s),
            memory_bytes=None if before is None or after is None else after - before,
            facts=dict(session.facts()),
        )


def peak_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """The largest resident memory this process has had, None where the kernel does not say.

    Not `getrusage`: what that gives includes the parent's memory from before exec.
    """
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
