"""From the entries of a journal to the cells of a profile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone

from hydradeploy.devices import Machine
from hydradeploy.measurements import Cell, Conditions, Device
from hydradeploy.profiler.flags import Flag, judge
from hydradeploy.profiler.journal import Entry, Seen
from hydradeploy.profiler.parts import part_of
from hydradeploy.profiler.plan import Job, batch_of
from hydradeploy.profiler.presets import regimes
from hydradeploy.profiler.sampling import Measured
from hydradeploy.stats.latency import by_process, n_effective, spread_of


def cells_of(job: Job, entries: Sequence[Entry], here: Machine, device: Device, began: Conditions) -> tuple[Cell, ...]:
    """The cell of a job; of a sustained run two, the burst and what it settles at."""
    return tuple(_cell(job, entries, regime, here, device, began) for regime in regimes(job.request.sampling))


def _cell(job: Job, entries: Sequence[Entry], regime: str, here: Machine, device: Device, began: Conditions) -> Cell:
    good = [entry for entry in entries if entry.measured is not None]
    measured = [entry.measured for entry in good if entry.measured is not None]
    parts = [part_of(found, regime) for found in measured]
    seen = [entry.seen.get(regime, Seen()) for entry in good]
    samples = [(value, number) for number, part in enumerate(parts) for value in part.samples]
    latency_s, process = tuple(value for value, _ in samples), tuple(number for _, number in samples)
    memory = [found.memory_bytes for found in measured if found.memory_bytes is not None]
    flags = _flags(measured, seen, latency_s, process, regime, device, began) if samples else ()
    energy_j = _mean_energy([(one.energy_j, part.calls) for one, part in zip(seen, parts, strict=True)])
    return Cell(
        artifact=job.artifact.name,
        graph_sha256=job.artifact.graph_sha256,
        backend=job.request.backend,
        processor=job.processor,
        compute_type=job.request.compute_type,
        settings=job.request.settings,
        input=job.artifact.input,
        batch=batch_of(job.artifact),
        threads=job.request.threads,
        regime=regime,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        latency_s=latency_s,
        process=process,
        load_s=tuple(found.load_s for found in measured),
        first_s=tuple(found.first_s for found in measured),
        switch_s=tuple(value for found in measured for value in found.switch_s),
        memory_bytes=max(memory, default=None),
        energy_j=energy_j,
        meter=here.meter() if energy_j is not None else None,
        flags=tuple(dict.fromkeys(flag.name for flag in flags)),
        remarks=tuple(flag.remark for flag in flags),
        evidence=_evidence(seen, measured),
        missing=_missing(good, seen, here, memory_known=bool(memory), energy_known=energy_j is not None),
        error=next((entry.error for entry in entries if entry.error is not None), None),
    )


def _flags(
    measured: Sequence[Measured],
    seen: Sequence[Seen],
    latency_s: Sequence[float],
    process: Sequence[int],
    regime: str,
    device: Device,
    began: Conditions,
) -> tuple[Flag, ...]:
    chains = by_process(latency_s, process)
    spread = spread_of(chains, n_effective(chains, 0.95))
    overloads = [found.facts["overload"] for found in measured if "overload" in found.facts]
    # A burst is measured before anything is steady, on purpose; what queues up never is, for a reason of its own.
    steady = [found.settled_from is not None if regime == "sustained" else found.steady for found in measured]
    flags = judge(
        [one.evidence for one in seen],
        cores=_host_cores(device),
        clocks=began.clocks,
        spread=spread,
        steady=() if regime == "burst" or overloads else steady,
        graphs_failed=[found.facts.get("graph_failed") for found in measured],
    )
    if overloads:
        where = f"{len(overloads)} of {len(measured)} processes"
        flags = (*flags, Flag("noisy", f"noisy: calls queued up in {where}, as {overloads[0]}"))
    return flags


def _host_cores(device: Device) -> int:
    """Those that others can keep busy; a GPU's are not."""
    return device.cores if device.kind != "cuda" and device.cores else os.cpu_count() or 1


def _mean_energy(energies: Sequence[tuple[float | None, int]]) -> float | None:
    """Joules per image over all processes that could tell, each by its calls."""
    told = [(value, count) for value, count in energies if value is not None]
    calls = sum(count for _, count in told)
    return sum(value * count for value, count in told) / calls if told else None


def _evidence(seen: Sequence[Seen], measured: Sequence[Measured]) -> dict[str, tuple[float, ...]]:
    """The numbers by name, in the order of the processes; one that could not tell a number has no place in it."""
    found: dict[str, list[float]] = {
        "warmup": [float(m.warmup) for m in measured],
        "prepare_s": [m.prepare_s for m in measured],
    }
    steady = [m.steady for m in measured if m.steady is not None]
    if steady:
        found["steady"] = [float(value) for value in steady]
    failed = ["graph_failed" in m.facts for m in measured]
    if any(failed):
        found["graph_failed"] = [float(value) for value in failed]
    on_device = [float(m.facts["device_s"]) for m in measured if "device_s" in m.facts]
    if on_device:
        found["device_s"] = on_device
    energies = [one.energy_j for one in seen if one.energy_j is not None]
    if energies:
        found["energy_j"] = energies
    for one in seen:
        for name, value in one.evidence.items():
            found.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in found.items()}


def _missing(
    good: Sequence[Entry], seen: Sequence[Seen], here: Machine, *, memory_known: bool, energy_known: bool
) -> dict[str, str]:
    found = dict(here.missing())
    if not memory_known:
        found.setdefault("memory", "it could not be read, or others gave back more than was taken")
    elif here.occupied_bytes() is None:  # else it says which figure stands in for the process's own
        found.pop("memory", None)
    if not energy_known:
        told = [one.unmetered for one in seen if one.unmetered is not None]
        found["energy"] = told[0] if told else found.get("energy", "not measured")
    if told := [entry.unwatched for entry in good if entry.unwatched is not None]:
        found["conditions"] = told[0]
    return found
