"""How calls of a session arrive, and how long each takes.

A call begins with the pixels and ends with the logits. What turns pixels into the input that a model takes is part of
it, so that models of unlike inputs compare fairly.

Back to back (closed loop): a call starts when the one before is done.

From several callers at once: each is such a loop, all on one session, as servers do it. Throughput is then callers over
mean latency (Little's law). No caller stops before the last call that counts is done, so all of them ran in company.

On a schedule (open loop): call i is due at start + i / pace and its latency counts from then, also where it has to wait
for the one before (no coordinated omission). No call is left out. Until it is due the caller sleeps, so clocks fall and
cores doze off as they do between the frames of a camera, and how late the kernel wakes it counts as it does there.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Session
from hydradeploy.stats.basics import median

Clock = Callable[[], float]
Sleep = Callable[[float], None]
Pixels = NDArray[np.uint8]


@dataclass
class Calls:
    """Calls in order of completion: seconds since each was due, and since it began.

    `begun` counts those that are or will be among them, `late_s` is how long after it was due the last one began.
    `unkept` counts those that were made beyond them, `until_s` is when the last call of all was done.
    """

    started_s: float
    ended_s: float
    latency_s: array[float] = field(default_factory=lambda: array("d"))
    service_s: array[float] = field(default_factory=lambda: array("d"))
    begun: int = 0
    late_s: float = 0.0
    unkept: int = 0
    until_s: float = 0.0

    def add(self, due: float, began: float, ended: float) -> None:
        self.latency_s.append(ended - due)
        self.service_s.append(ended - began)
        self.late_s = began - due
        self.ended_s = max(self.ended_s, ended)


GoesOn = Callable[[Calls], bool]


@dataclass
class Caller:
    """Calls a session with the batches (b, n, s, s, channels) in turn, `concurrency` times at once."""

    session: Session
    batches: Pixels
    prepare: Callable[[Pixels], Images]
    clock: Clock
    sleep: Sleep
    pace_hz: float | None = None
    concurrency: int = 1
    _number: int = 0

    def once(self) -> float:
        """Call once; the seconds it took."""
        batch, run, prepare = self._next(), self.session.run, self.prepare
        began = self.clock()
        run(prepare(batch))
        return self.clock() - began

    def prepare_s(self, times: int) -> float:
        """What of a call is preparing its input: the median of so many without the rest."""
        taken = []
        for place in range(times):
            batch = self.batches[place % len(self.batches)]
            began = self.clock()
            self.prepare(batch)
            taken.append(self.clock() - began)
        return median(taken)

    def call(self, goes_on: GoesOn, least_s: float = 0.0) -> Calls:
        """Call for as long as `goes_on`, which is asked before each call and by one caller at a time.

        Calls go on alike until they have lasted `least_s`, without being kept. The first call on a schedule is due a
        period from now. Raises what the session raises.
        """
        start = self.clock() + (1 / self.pace_hz if self.pace_hz is not None else 0.0)
        run = _Run(self, goes_on, Calls(start, start, until_s=start), least_s)
        if self.concurrency == 1:
            run.loop()
            return run.calls
        # They begin together, for while some are still to come fewer are in flight than are said to be.
        gate = threading.Barrier(self.concurrency, run.begin)
        loop = partial(run.guarded_loop, gate)
        # Daemons: no caller keeps a process that is told to end.
        threads = [threading.Thread(target=loop, daemon=True) for _ in range(self.concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if run.error is not None:
            raise run.error
        return run.calls

    def _next(self) -> Pixels:
        batch: Pixels = self.batches[self._number % len(self.batches)]
        self._number += 1
        return batch


@dataclass
class _Run:
    """What the callers of one run share."""

    caller: Caller
    goes_on: GoesOn
    calls: Calls
    least_s: float
    made: int = 0
    enough: bool = False
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """All callers are there."""
        self.calls.started_s = self.caller.clock()

    def guarded_loop(self, gate: threading.Barrier) -> None:
        try:
            gate.wait()
            self.loop()
        except BaseException as error:
            self.error = error

    def loop(self) -> None:
        """What one caller does; alone, nothing but the call itself is between the two looks at the clock.

        Among others each call counts from the end of the one before: what a caller waits between them it waits because
        of the others, and calls in flight over their mean latency are throughput only if nothing is left out.
        """
        clock, run, prepare = self.caller.clock, self.caller.session.run, self.caller.prepare
        pace, calls = self.caller.pace_hz, self.calls
        free = clock()
        while True:
            with self.lock:
                self.enough = self.enough or not self.goes_on(calls)
                if self._over():
                    return
                counts, place, batch = not self.enough, self.made, self.caller._next()
                calls.begun += counts
                self.made += 1
            due = free if self.caller.concurrency > 1 else None
            if pace is not None:
                due = calls.started_s + place / pace
                self._wait(due)
            began = clock()
            run(prepare(batch))
            free = ended = clock()
            with self.lock:
                calls.until_s = max(calls.until_s, ended)
                calls.unkept += not counts
                if counts:
                    calls.add(began if due is None else due, began, ended)

    def _over(self) -> bool:
        """Whether nothing that counts would miss this caller's company, and calls have lasted long enough."""
        alone = self.caller.pace_hz is not None or len(self.calls.latency_s) == self.calls.begun
        return self.error is not None or (self.enough and alone and self._lasted())

    def _lasted(self) -> bool:
        return not self.least_s or self.caller.clock() >= self.calls.started_s + self.least_s

    def _wait(self, due: float) -> None:
        # Not spinning, which would keep clocks up. A sleep may be too short by what its clock rounds.
        while (left := due - self.caller.clock()) > 0:
            self.caller.sleep(left)
