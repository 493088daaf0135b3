"""What else runs, from two readings half a second apart."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from hydradeploy.devices.reading import Reading, field_of
from hydradeploy.doctor.patient import Patient, Row, several
from hydradeploy.units import show_bytes

# What flags stand on; profiler/flags.py has the same numbers, and a test holds them together.
FOREIGN_CORES = 0.1
FOREIGN_SHARE = 0.05
STEAL_CORES = 0.05
STEPS_S = 0.03
SWAPPED_PAGES = 16
OVERCURRENTS_PER_S = 20.0

_WINDOW_S = 0.5
_LOOK = "top -o %CPU"
_QUOTA = "cgroup_throttled"
_COOL = "let it cool, look at fan and supply, or choose another power mode"
_FEWER = "stop what else runs in this control group, or raise its cpu.max: a quota of processor time ran out"


def average(patient: Patient) -> Iterator[Row]:
    words = (patient.tree.text("proc/loadavg") or "").split()
    cores = patient.cores
    if not words:
        yield Row("load", "average", "remark", "cannot be read")
    elif float(words[0]) > cores:
        yield Row("load", "average", "remark", f"{words[0]} over a minute, more than {cores} cores can serve", _LOOK)
    else:
        yield Row("load", "average", "ok", f"{words[0]} over a minute, {cores} cores")


def others(patient: Patient) -> Iterator[Row]:
    """Processor time of others, stolen time, swapping, throttling and processes on an accelerator."""
    before = patient.here.read(time.monotonic(), (os.getpid(),))
    ours = time.process_time()
    patient.rest(_WINDOW_S)
    ours = time.process_time() - ours
    after = patient.here.read(time.monotonic(), (os.getpid(),))
    yield from _busy(before, after, ours, patient.cores)
    yield from _stolen(before, after)
    yield from _swapping(before, after, patient)
    yield from _throttling(before, after)
    yield from _accelerator(after)


def _busy(before: Reading, after: Reading, ours_s: float, cores: int) -> Iterator[Row]:
    rise = _rise(before, after, "busy_s")
    if rise is None:
        yield Row("load", "others", "remark", "what others compute cannot be read")
        return
    window_s = after.at_s - before.at_s
    busy = max(0.0, rise - ours_s) / window_s
    if busy > max(FOREIGN_CORES, FOREIGN_SHARE * cores) + STEPS_S / window_s:
        found = f"{busy:.2f} cores busy with others: cells are flagged contended"
        yield Row("load", "others", "remark", found, f"{_LOOK}, and stop what need not run")
    else:
        yield Row("load", "others", "ok", f"{busy:.2f} cores busy with others")


def _stolen(before: Reading, after: Reading) -> Iterator[Row]:
    rise = _rise(before, after, "steal_s")
    if rise is None:
        return
    window_s = after.at_s - before.at_s
    stolen = rise / window_s
    if stolen > STEAL_CORES + STEPS_S / window_s:
        found = f"{stolen:.2f} cores taken by other virtual machines: cells are flagged contended"
        yield Row("load", "steal", "remark", found, "measure when the host is quiet, or on another one")
    else:
        yield Row("load", "steal", "ok", f"{stolen:.2f} cores taken by other virtual machines")


def _swapping(before: Reading, after: Reading, patient: Patient) -> Iterator[Row]:
    used = _swapped_bytes(patient)
    shown = "use not known" if used is None else f"{show_bytes(used)} used"
    if (_rise(before, after, "swapped_pages") or 0) > SWAPPED_PAGES:
        found = f"{shown}, and pages move now: memory is short"
        yield Row("load", "swap", "remark", found, "stop what need not run: ps aux --sort=-rss")
    else:
        yield Row("load", "swap", "ok", shown)


def _swapped_bytes(patient: Patient) -> int | None:
    """What is swapped out, 0 without a swap; None where the kernel does not say."""
    text = patient.tree.text("proc/meminfo")
    total, free = field_of(text, "SwapTotal"), field_of(text, "SwapFree")
    return None if total is None or free is None else (total - free) * 1024


def _throttling(before: Reading, after: Reading) -> Iterator[Row]:
    """Signs that stand now or came up in this moment; those since boot may be a month old."""
    now = {key: value for key, value in after.gauges.items() if key.startswith("throttling.") and value > 0}
    bearable = {"overcurrent_events": OVERCURRENTS_PER_S * (after.at_s - before.at_s)}
    for key in after.counters:
        quantity = key.partition(".")[0]
        if quantity not in ("throttle_events", _QUOTA, "overcurrent_events"):
            continue
        if (rise := _rise(before, after, key) or 0) > bearable.get(quantity, 0):
            now[key] = rise
    if now:
        signs = several({key.partition(".")[2] or key.replace("_", " "): f"{value:g}" for key, value in now.items()})
        yield Row("load", "throttling", "remark", f"now: {signs}", _COOL if now.keys() - {_QUOTA} else _FEWER)
    else:
        yield Row("load", "throttling", "ok", "no sign now")


def _accelerator(after: Reading) -> Iterator[Row]:
    for key, count in after.gauges.items():
        quantity, _, what = key.partition(".")
        if quantity == "foreign_processes":
            found = f"{count:.0f} other processes on it"
            yield Row("load", what, *(("remark", found, "nvidia-smi, and stop them") if count else ("ok", found)))


def _rise(before: Reading, after: Reading, counter: str) -> float | None:
    if counter not in before.counters or counter not in after.counters:
        return None
    return after.counters[counter] - before.counters[counter]
