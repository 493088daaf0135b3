"""What can be read here with its present value, what cannot and why, and what root would add."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator

from hydradeploy.doctor.patient import AS_ROOT, Patient, Row, several
from hydradeploy.units import show_bytes, show_count, show_percent

_UNITS = {"bytes": "B", "c": "°C", "hz": "Hz", "j": "J", "s": "s", "w": "W"}
_RAPL = "sys/class/powercap/intel-rapl:*/energy_uj"


def values(patient: Patient) -> Iterator[Row]:
    """One row per quantity that a reading gave."""
    reading = patient.here.read(time.monotonic(), (os.getpid(),))
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key, value in {**reading.gauges, **reading.counters}.items():
        quantity, _, what = key.partition(".")
        found[quantity][what] = _amount(quantity, value)
    for quantity, amounts in found.items():
        by = patient.here.meter() if quantity in ("energy_j", "power_w") else None
        yield Row("sensors", _name(quantity), "ok", several(amounts) + (f" ({by})" if by else ""))


def missing(patient: Patient) -> Iterator[Row]:
    """One row per quantity that cannot be read."""
    for quantity, reason in patient.here.missing().items():
        yield Row("sensors", _name(quantity), "remark", reason, _permit(patient, quantity, reason))


def rights(patient: Patient) -> Iterator[Row]:
    bought = ", ".join(_root_buys(patient))
    if patient.is_root:
        yield Row("rights", "root", "ok", "yes")
    elif bought:
        yield Row("rights", "root", "remark", f"no; it would give {bought}", AS_ROOT)
    else:
        yield Row("rights", "root", "ok", "no, and it would give nothing more here")


def _root_buys(patient: Patient) -> Iterator[str]:
    kind, tree = patient.here.kind, patient.tree
    if kind == "jetson":
        yield "what a process holds through NvMap, the memory clock of debugfs"
    elif tree.glob(_RAPL):
        yield "the energy counter"
    if kind != "cpu" or tree.glob("sys/devices/system/cpu/cpu*/cpufreq"):
        yield "pinning of clocks"


def _permit(patient: Patient, quantity: str, reason: str) -> str | None:
    """What makes a quantity readable that only lacks permission."""
    if "permission" not in reason:
        return None
    counters = [patient.tree.shown(path) for path in patient.tree.glob(_RAPL)]
    if quantity == "energy" and counters:
        return "sudo chmod a+r " + " ".join(counters)
    return AS_ROOT


def _name(quantity: str) -> str:
    """`clock_hz` is the clock."""
    words = quantity.split("_")
    return " ".join(words[:-1] if words[-1] in _UNITS else words)


def _amount(quantity: str, value: float) -> str:
    unit = _UNITS.get(quantity.rpartition("_")[2], "")
    if unit == "B":
        return show_bytes(value)
    if unit == "Hz":
        return f"{show_count(value)}Hz" if value >= 1000 else f"{value:.0f} Hz"
    if quantity == "load":
        return show_percent(value)
    return f"{value:.6g} {unit}".strip()
