"""`doctor`: is this machine fit to be measured? A row per thing, each ok, or what is wrong and what puts it right.

Every probe stands alone: one that fails says so in a row, and the others go on.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

from hydradeploy.backends import BACKEND_MODULES, Backend
from hydradeploy.devices import Machine, machine
from hydradeploy.devices.reading import Tree
from hydradeploy.doctor import load, sensors, setting, software, storage
from hydradeploy.doctor.patient import Absent, Patient, Row, said
from hydradeploy.errors import ExitCode, MissingError
from hydradeploy.spec import Record

_Probe = Callable[[Patient], Iterator[Row]]

_PROBES: tuple[tuple[str, _Probe], ...] = (
    ("package", software.package),
    ("backends", software.backends),
    ("device", software.kinds),
    ("device", software.device),
    ("sensors", sensors.values),
    ("sensors", sensors.missing),
    ("rights", sensors.rights),
    ("clocks", setting.clocks),
    ("clocks", setting.governor),
    ("clocks", setting.power_mode),
    ("cores", setting.affinity),
    ("cores", setting.quota),
    ("cores", setting.kinds),
    ("cores", setting.virtual),
    ("load", load.average),
    ("load", load.others),
    ("disk", storage.profiles_disk),
    ("disk", storage.temporary_disk),
    ("disk", storage.memory),
    ("profiles", storage.journals),
    ("profiles", storage.stored),
)

# What a wrong row of an area makes of the exit code; in other areas nothing is wrong, only remarkable.
_CODES = {
    "backends": ExitCode.MISSING,
    "device": ExitCode.MISSING,
    "disk": ExitCode.ENVIRONMENT,
    "profiles": ExitCode.INTEGRITY,
}


class Diagnosis(Record, frozen=True, kw_only=True):
    """Everything that was looked at; `device` is the kind that the rows are about."""

    device: str
    rows: tuple[Row, ...]

    @property
    def exit_code(self) -> ExitCode:
        """OK where nothing is wrong, else what the first wrong row amounts to; remarks do not count."""
        return next((_CODES[row.area] for row in self.rows if row.status == "wrong"), ExitCode.OK)


def diagnose(
    profiles: Path,
    *,
    device: str | None = None,
    here: Machine | None = None,
    root: Path = Path("/"),
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    rest: Callable[[float], None] = time.sleep,
) -> Diagnosis:
    """Look at backends, device, sensors, rights, clocks, cores, load, disk and profiles; takes about a second.

    Where this machine is not the `device` asked for, the rows are about what it is. Nothing is changed. Raises
    UsageError for an unknown kind of device; whatever else is wrong is a row.
    """
    backends = {name: _backend(module) for name, module in BACKEND_MODULES.items()}
    refused = None
    if here is None:
        here, refused = _choose(device, backends)
    patient = Patient(here, refused, backends, profiles, Tree(root), free_bytes, rest)
    rows = tuple(row for area, probe in _PROBES for row in _safely(area, probe, patient))
    return Diagnosis(device=here.kind, rows=rows)


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """The table for people and what it comes to. A fix stands below its row, whole, so that it can be copied."""
    table = [(row.status, row.area, row.name) for row in diagnosis.rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row, cells in zip(diagnosis.rows, table, strict=True):
        yield "  ".join((*(text.ljust(width) for text, width in zip(cells, widths, strict=True)), row.found))
        if row.fix is not None:
            yield " " * (sum(widths) + 2 * len(widths)) + f"fix: {row.fix}"
    count = Counter(row.status for row in diagnosis.rows)
    wrong = {0: "nothing is wrong", 1: "1 thing is wrong"}.get(count["wrong"], f"{count['wrong']} things are wrong")
    yield f"{wrong}, {count['remark']} " + ("remark" if count["remark"] == 1 else "remarks")


def _safely(area: str, probe: _Probe, patient: Patient) -> Iterator[Row]:
    try:
        yield from probe(patient)
    # Whatever one probe meets on a machine that nobody has seen yet, the other rows are still wanted.
    except Exception as error:
        yield Row(area, probe.__name__.replace("_", " "), "remark", f"could not be looked at: {said(error)}")


def _backend(module: str) -> Backend | Absent:
    """A backend, or why it is not usable."""
    processor = None
    try:
        found: Backend = import_module(module).BACKEND
        processor = found.processor
        reason = found.why_not()
    except Exception as error:  # a runtime that is half installed may raise anything
        reason = said(error)
    else:
        if reason is None:
            return found
    return Absent(reason, processor)


def _choose(device: str | None, backends: Mapping[str, Backend | Absent]) -> tuple[Machine, str | None]:
    """The machine that `profile` would take; where there is none, what this one is and why it is not that."""
    usable = [found for found in backends.values() if not isinstance(found, Absent)]
    try:
        return machine(device, usable[0].processor if usable else "cpu"), None
    except MissingError as error:
        return machine(), error.message
