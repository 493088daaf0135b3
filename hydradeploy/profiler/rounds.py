"""The rounds of a run: each cell once per round, in a fresh process, the next round the other way round.

So a machine that warms up or slows down touches all head counts alike. The first round says how many samples the later
ones take. Every finished process is an entry of the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from hydradeploy.bundle import open_bundle
from hydradeploy.devices import Machine
from hydradeploy.devices.reading import Reading
from hydradeploy.errors import ForeignError, MissingError
from hydradeploy.measurements import Conditions
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.energy import Metered, energy_j, idle_power_w
from hydradeploy.profiler.flags import evidence
from hydradeploy.profiler.journal import Entry, Journal, Seen
from hydradeploy.profiler.parts import Part, part_of
from hydradeploy.profiler.plan import Job, batch_of
from hydradeploy.profiler.presets import Pilot, Preset, Target, regimes, samples_after, with_samples
from hydradeploy.profiler.sampling import Measured
from hydradeploy.profiler.thermal import Settling
from hydradeploy.units import show_duration

Report = Callable[[str, int, int], None]
Clock = Callable[[], float]

# A process that takes this many times as long as it should hangs; 60 calls of half a minute each do not.
_PATIENCE = 20
_PATIENCE_S = 1800.0
_IDLE_S = 3.0


class Launch(Protocol):
    """Answers a request in a fresh process; raises MissingError where that fails."""

    def __call__(
        self, request: Request, *, patience_s: float, settled: Callable[[], bool] | None = None
    ) -> Measured: ...


class Watch(Protocol):
    """Readings of what happens meanwhile."""

    @property
    def why_not(self) -> str | None: ...

    @property
    def interval_s(self) -> float: ...

    def between(self, started_s: float, ended_s: float) -> tuple[Reading, ...]: ...

    def cores_for(self, threads: int) -> frozenset[int] | None: ...


@dataclass(frozen=True)
class Unwatched:
    """Nobody looks at the device meanwhile."""

    why_not: str | None = "nobody watched"
    interval_s: float = 0.0

    def between(self, started_s: float, ended_s: float) -> tuple[Reading, ...]:
        return ()

    def cores_for(self, threads: int) -> frozenset[int] | None:
        return None


Watching = Callable[[], AbstractContextManager[Watch]]


@dataclass(frozen=True)
class Rounds:
    """A run that is set up. `began` are the conditions that must not change."""

    jobs: Sequence[Job]
    preset: Preset
    target: Target
    here: Machine
    launch: Launch
    watch: Watch
    began: Conditions
    report: Report
    say: Callable[[str], None]
    clock: Clock = time.perf_counter

    def measure(self, journal: Journal) -> list[list[Entry]]:
        """Measure what the journal has not yet; the entries of each job, in order of the rounds.

        Raises ForeignError where conditions change on the way, EnvironmentFailed when the disk fails, UsageError where
        the bundle is no longer there; what was measured is in the journal then.
        """
        entries = {(entry.round, entry.cell): entry for entry in journal.entries}
        total = self.preset.rounds * len(self.jobs)
        idle = self._idle_power() if self.here.meter() is not None else Metered(None, None)
        requests = [job.request for job in self.jobs]
        for number in range(self.preset.rounds):
            if number == 1:
                requests = self._after_the_pilot([entries.get((0, cell)) for cell in range(len(self.jobs))])
            for cell in self._order(number):
                self.report("measuring", len(entries), total)
                if (number, cell) in entries:
                    continue
                entry = self._failed_before(entries, number, cell)
                if entry is None:
                    entry = self._one(number, cell, requests[cell], idle)
                    self._check_conditions()  # what they changed during is not kept
                    journal.add(entry)
                entries[number, cell] = entry
        self.report("measuring", total, total)
        return [[entries[number, cell] for number in range(self.preset.rounds)] for cell in range(len(self.jobs))]

    def _order(self, number: int) -> Iterator[int]:
        cells = range(len(self.jobs))
        return iter(cells if number % 2 == 0 else reversed(cells))

    def _failed_before(self, entries: Mapping[tuple[int, int], Entry], number: int, cell: int) -> Entry | None:
        """A cell whose process failed once is not tried again."""
        before = entries.get((number - 1, cell))
        if before is None or before.error is None:
            return None
        return msgspec.structs.replace(before, round=number, wall_s=0.0)

    def _one(self, number: int, cell: int, request: Request, idle: Metered) -> Entry:
        load = self.here.read(self.clock()).gauges.get("load_average")
        settled = Settling(self.watch.between, self.clock) if request.sampling.sustain else None
        cores = self.watch.cores_for(request.threads * request.sampling.concurrency)
        request = msgspec.structs.replace(request, cores=None if cores is None else tuple(sorted(cores)))
        began = self.clock()
        try:
            measured = self.launch(request, patience_s=self._patience_s(request), settled=settled)
        except MissingError as error:
            open_bundle(Path(request.bundle), "manifest")  # else nobody could be measured any more
            return Entry(round=number, cell=cell, wall_s=self.clock() - began, error=error.message)
        wall_s = self.clock() - began
        readings = self.watch.between(measured.started_s, measured.called_until_s)
        before = {} if load is None else {"load_average": load}
        parts = {regime: part_of(measured, regime) for regime in regimes(request.sampling)}
        batch = batch_of(self.jobs[cell].artifact)
        return Entry(
            round=number,
            cell=cell,
            wall_s=wall_s,
            measured=measured,
            seen={regime: _seen(part, readings, before, idle, batch) for regime, part in parts.items()},
            unwatched=self.watch.why_not,
        )

    def _idle_power(self) -> Metered:
        self.say(f"idle power: {_IDLE_S:g} s")
        began = self.clock()
        time.sleep(_IDLE_S)
        return idle_power_w(self.watch.between(began, self.clock()))

    def _after_the_pilot(self, first: Sequence[Entry | None]) -> list[Request]:
        pilots = [
            None if entry is None or entry.measured is None else Pilot(entry.measured, entry.wall_s) for entry in first
        ]
        counts = samples_after(self.preset, self.target, pilots)
        told = [
            (self.preset.rounds - 1) * pilot.process_s(self.preset.sampling, count)
            for pilot, count in zip(pilots, counts, strict=True)
            if pilot is not None
        ]
        if sum(told) > 1:
            few, many = min(counts), max(counts)
            amount = f"{few}" if few == many else f"{few} to {many}"
            self.say(f"after the first round: {amount} samples a process, about {show_duration(sum(told))} to go")
        return [
            msgspec.structs.replace(job.request, sampling=with_samples(job.request.sampling, count))
            for job, count in zip(self.jobs, counts, strict=True)
        ]

    def _patience_s(self, request: Request) -> float:
        sampling = request.sampling
        slowest = sampling.samples / sampling.pace_hz if sampling.pace_hz else 0.0
        return _PATIENCE_S + _PATIENCE * max(slowest, sampling.seconds) + sampling.settle_s

    def _check_conditions(self) -> None:
        changed = self.began.differences(self.here.conditions(self.began.software))
        if changed:
            raise ForeignError(
                f"conditions changed while measuring (before, now): {'; '.join(changed)}",
                hint="put them back and go on with --resume, or begin anew with --force",
            )


def _seen(part: Part, readings: Sequence[Reading], before: Mapping[str, float], idle: Metered, batch: int) -> Seen:
    metered = idle
    if idle.value is not None:
        metered = energy_j(readings, part.started_s, part.called_until_s, idle.value, part.calls * batch)
    return Seen(
        evidence={**before, **evidence(readings, part.started_s, part.ended_s)},
        energy_j=metered.value if idle.value is not None else None,
        unmetered=metered.why_not,
    )
