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

    Warm-up and sampling each last until both their count and their seconds are reached; `at_most` samples are taken.
    """

    warmup: int
    warmup_s: float
    samples: int
    seconds: float
    at_most: int


class Measured(Record, frozen=True, kw_only=True):
    """What one process measured: seconds per call from host to host, in order, and bytes beyond the bare runtime."""

    load_s: float
    first_s: float
    warmup: int
    latency_s: tuple[float, ...]
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
