"""What can be read here with its present value, what cannot and why, and what root would add."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator

from hydradeploy.doctor.patient import AS_ROOT, Patient, Row, several
from hydradeploy.units import show_bytes, show_count, show_percent

_UNITS = {"bytes": "B", "c": "°C", "hz": "Hz", "j": "J", "s": "s", "w": "W"}
_NAMES = {
    "available_bytes": "memory available",
    "busy_s": "processor time",
    "cgroup_throttled": "stops by a quota",
    "cgroup_throttled_s": "stopped by a quota",
    "steal_s": "stolen time",
}
_NO_PERMISSION = "no permission"  # as reading.Tree says it
_REFUSED = re.compile(rf"(/\S+): {_NO_PERMISSION}")


def values(patient: Patient) -> Iterator[Row]:
    """One row per quantity that a reading gave."""
    reading = patient.here.read(time.monotonic(), (os.getpid(),))
    counted = {key.partition(".")[0] for key in reading.counters}
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key, value in {**reading.gauges, **reading.counters}.items():
        quantity, _, what = key.partition(".")
        found[quantity][what] = _amount(quantity, value)
    for quantity, amounts in found.items():
        since = " since boot" if quantity in counted - {"energy_j"} else ""
        by = patient.here.meter() if quantity in ("energy_j", "power_w") else None
        yield Row("sensors", _name(quantity), "ok", several(amounts) + since + (f" ({by})" if by else ""))


def missing(patient: Patient) -> Iterator[Row]:
    """One row per quantity that cannot be read."""
    for quantity, reason in patient.here.missing().items():
        yield Row("sensors", _name(quantity), "remark", reason, _permit(patient, reason))


def rights(patient: Patient) -> Iterator[Row]:
    bought = ", ".join(_root_buys(patient))
    if patient.is_root:
        yield Row("rights", "root", "ok", "yes")
    elif bought:
        yield Row("rights", "root", "remark", f"no; it would give {bought}", AS_ROOT)
    else:
        yield Row("rights", "root", "ok", "no, and it would give nothing more here")


def _root_buys(patient: Patient) -> Iterator[str]:
    yield from (_name(what) for what, reason in patient.here.missing().items() if _NO_PERMISSION in reason)
    if patient.here.kind == "jetson":
        yield "memory held through NvMap"
    if patient.here.kind != "cpu" or patient.tree.glob("sys/devices/system/cpu/cpu*/cpufreq"):
        yield "pinning of clocks"


def _permit(patient: Patient, reason: str) -> str | None:
    """What makes a quantity readable that only lacks permission."""
    if _NO_PERMISSION not in reason:
        return None
    refused = _REFUSED.match(reason)
    if refused is None or refused[1].startswith("/sys/kernel/debug/"):
        return AS_ROOT
    # Of counters that belong together the reason names the first.
    alike = patient.tree.glob(re.sub(r"\d+", "*", refused[1])) or [patient.tree.path(refused[1])]
    return "sudo chmod a+r " + " ".join(map(patient.tree.shown, alike))


def _name(quantity: str) -> str:
    """`clock_hz` is the clock."""
    words = quantity.split("_")
    return _NAMES.get(quantity) or " ".join(words[:-1] if words[-1] in _UNITS else words)


def _amount(quantity: str, value: float) -> str:
    unit = _UNITS.get(quantity.rpartition("_")[2], "")
    if unit == "B":
        return show_bytes(value)
    if unit == "Hz":
        return f"{show_count(value)}Hz" if value >= 1e3 else f"{value:.0f} Hz"
    if quantity == "load":
        return show_percent(value)
    return f"{value:.6g} {unit}".strip()
