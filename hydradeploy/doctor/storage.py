"""Room on disks and in memory, and what earlier runs left."""

from __future__ import annotations

import fcntl
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hydradeploy.devices.cgroups import memory_left_bytes
from hydradeploy.devices.reading import field_of
from hydradeploy.doctor.patient import Patient, Row, Status, said
from hydradeploy.errors import HydraError
from hydradeploy.files import try_writing
from hydradeploy.measurements import read_profile
from hydradeploy.units import show_bytes

_TOO_LITTLE_BYTES = 100e6
_LITTLE_BYTES = 1e9


def profiles_disk(patient: Patient) -> Iterator[Row]:
    """Where profiles are kept; the directory is made when the first one is."""
    yield _disk(patient, "profiles", patient.profiles)


def temporary_disk(patient: Patient) -> Iterator[Row]:
    yield _disk(patient, "temporary", Path(tempfile.gettempdir()))


def memory(patient: Patient) -> Iterator[Row]:
    free, left = field_of(patient.tree.text("proc/meminfo"), "MemAvailable"), memory_left_bytes(patient.tree)
    if left is not None and (free is None or left < free * 1024):
        found, fix = (
            f"{show_bytes(left)} left of what its control group grants",
            "raise memory.max of the control group",
        )
        yield _room("memory", left, found, f"{fix}, or stop what else runs in it")
    elif free is None:
        yield Row("disk", "memory", "remark", "what is available cannot be read")
    else:
        fix = "stop what need not run: ps aux --sort=-rss"
        yield _room("memory", free * 1024, f"{show_bytes(free * 1024)} available", fix)


def journals(patient: Patient) -> Iterator[Row]:
    """Runs that go on, or were cut short; the profiler holds a lock on the journal of one that goes on."""
    for path in sorted(patient.profiles.glob("*.jsonl")):
        kept = max(0, path.read_bytes().count(b"\n") - 1)  # the first line says what the run is
        if _is_locked(path):
            found, fix = f"a run goes on, {kept} measurements so far", "wait for it: two would disturb each other"
        else:
            found = f"{kept} measurements of a run that was cut short; repeat its command to go on"
            fix = f"hydradeploy profile --resume --profiles {shlex.quote(str(patient.profiles))}"
        yield Row("profiles", path.name, "remark", found, fix)


def stored(patient: Patient) -> Iterator[Row]:
    """Each damaged profile, and how many are whole."""
    whole = 0
    for path in sorted(patient.profiles.glob("*.json")):
        try:
            read_profile(path)
            whole += 1
        except HydraError as error:
            fix = f"mv {shlex.quote(str(path))} {shlex.quote(str(path))}.damaged"
            yield Row("profiles", path.name, "wrong", said(error), fix)
    yield Row("profiles", "whole ones", "ok", f"{whole} in {patient.profiles}")


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _disk(patient: Patient, name: str, directory: Path) -> Row:
    if directory.exists() and not directory.is_dir():
        return Row("disk", name, "wrong", f"{directory}: not a directory", "name another directory")
    place = next((path for path in (directory, *directory.absolute().parents) if path.is_dir()), Path("/"))
    try:
        try_writing(place)
    except OSError as error:
        fix = f"sudo chown $USER {shlex.quote(str(place))}, or name another directory"
        return Row("disk", name, "wrong", f"{place}: cannot be written ({error.strerror})", fix)
    free = patient.free_bytes(place)
    return _room(name, free, f"{place}: {show_bytes(free)} free", f"df -h {shlex.quote(str(place))}, and free some")


def _room(name: str, free_bytes: int, found: str, fix: str) -> Row:
    status: Status = "wrong" if free_bytes < _TOO_LITTLE_BYTES else "remark" if free_bytes < _LITTLE_BYTES else "ok"
    return Row("disk", name, status, found, None if status == "ok" else fix)
