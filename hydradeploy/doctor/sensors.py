"""What can be read here with its present value, what cannot and why, and what root would add."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator

from hydradeploy.doctor.patient import AS_ROOT, Patient, Row, Status, several
from hydradeploy.units import show_bytes, show_count, show_percent

_UNITS = {"bytes": "B", "c": "°C", "hz": "Hz", "j": "J", "s": "s", "w": "W"}
_DIGITS = {"°C": 1, "J": 1, "W": 2}
_NAMES = {
    "available_bytes": "memory available",
    "busy_s": "processor time",
    "cgroup_throttled": "stops by a quota",
    "cgroup_throttled_s": "stopped by a quota",
    "gpu_bytes": "memory on the GPU",
    "steal_s": "stolen time",
}
# As reading.Tree says it; with the file before it, or behind it in parentheses.
_NO_PERMISSION = "no permission"
_REFUSED = re.compile(rf"(/\S+): {_NO_PERMISSION}|{_NO_PERMISSION} \((/\S+)\)")
_OFF = "the sensor is off"


def values(patient: Patient) -> Iterator[Row]:
    """One row per quantity that a reading gave, with the largest values first, and a total before its parts."""
    reading = patient.here.read(time.monotonic(), (os.getpid(),))
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, value in {**reading.gauges, **reading.counters}.items():
        quantity, _, what = key.partition(".")
        found[quantity][what] = value
    counted = {key.partition(".")[0] for key in reading.counters} - {"energy_j"}
    for quantity, each in found.items():
        ordered = sorted(each.items(), key=lambda item: (item[0] != "", -item[1]))
        shown = several({what: _amount(quantity, value) for what, value in ordered})
        by = patient.here.meter() if quantity in ("energy_j", "power_w") else None
        since = " since boot" if quantity in counted else ""
        yield Row("sensors", _name(quantity), "ok", shown + since + (f" ({by})" if by else ""))


def missing(patient: Patient) -> Iterator[Row]:
    """One row per quantity that cannot be read. A sensor that is off with its engine is in order."""
    for quantity, reason in patient.missing.items():
        status: Status = "ok" if _OFF in reason else "remark"
        yield Row("sensors", _name(quantity), status, reason, _permit(patient, reason))


def rights(patient: Patient) -> Iterator[Row]:
    bought = ", ".join(_root_buys(patient))
    if patient.is_root:
        yield Row("rights", "root", "ok", "yes")
    elif bought:
        yield Row("rights", "root", "remark", f"no; it would give {bought}", AS_ROOT)
    else:
        yield Row("rights", "root", "ok", "no, and it would give nothing more here")


def _root_buys(patient: Patient) -> Iterator[str]:
    yield from (_name(what) for what, reason in patient.missing.items() if _NO_PERMISSION in reason)
    if patient.here.kind == "jetson":
        yield "memory held through NvMap"
    if patient.here.kind != "cpu" or patient.tree.glob("sys/devices/system/cpu/cpu*/cpufreq"):
        yield "pinning of clocks"


def _permit(patient: Patient, reason: str) -> str | None:
    """What makes a quantity readable that only lacks permission."""
    if _NO_PERMISSION not in reason:
        return None
    refused = _REFUSED.search(reason)
    path = next(filter(None, refused.groups())) if refused else ""
    if path.startswith("/sys/class/"):
        return "sudo chmod a+r " + " ".join(_alike(patient, path))
    return AS_ROOT


def _alike(patient: Patient, path: str) -> list[str]:
    """A reason names the first of the files that are read together: the inputs of a chip, or of all packages."""
    if path.startswith("/sys/class/hwmon/"):
        return [path.rpartition("/")[0] + "/*_input"]
    like = re.compile(re.sub(r"\d+", r"\\d+", re.escape(path)))
    found = map(patient.tree.shown, patient.tree.glob(re.sub(r"\d+", "*", path)))
    return [other for other in found if like.fullmatch(other)] or [path]


def _name(quantity: str) -> str:
    """`clock_hz` is the clock, `clock_hz.gpu` that of the gpu."""
    kind, _, what = quantity.partition(".")
    words = kind.split("_")
    name = _NAMES.get(kind) or " ".join(words[:-1] if words[-1] in _UNITS else words)
    return f"{name} {what}".strip()


def _amount(quantity: str, value: float) -> str:
    unit = _UNITS.get(quantity.rpartition("_")[2], "")
    if unit == "B":
        return show_bytes(value)
    if unit == "Hz":
        return f"{show_count(value)}Hz" if value >= 1e3 else f"{value:.0f} Hz"
    if quantity == "load":
        return show_percent(value, 0)
    if quantity == "load_average":
        return f"{value:.2f}"
    return f"{value:.{_DIGITS.get(unit, 0)}f} {unit}".strip()
