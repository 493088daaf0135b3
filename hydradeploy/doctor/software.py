"""This package, the runtimes, and which device this machine is."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version

from hydradeploy.backends import REMEDIES, Backend
from hydradeploy.devices import DEVICE_MODULES
from hydradeploy.doctor.patient import Absent, Patient, Row, Status, said
from hydradeploy.units import show_bytes


def package(patient: Patient) -> Iterator[Row]:
    yield Row("package", "hydradeploy", "ok", f"{version('hydradeploy')} on Python {platform.python_version()}")


def backends(patient: Patient) -> Iterator[Row]:
    """What cannot run here is wrong only where nothing else can; what no package would make run has no fix."""
    absent: Status = "wrong" if all(isinstance(found, Absent) for found in patient.backends.values()) else "remark"
    for name, found in patient.backends.items():
        if isinstance(found, Absent):
            helps = found.processor != "cuda" or patient.has_nvidia
            yield Row("backends", name, absent, found.why, REMEDIES.get(name) if helps else None)
        else:
            yield _usable(name, found)


def _usable(name: str, found: Backend) -> Row:
    try:
        versions = ", ".join(f"{what} {number}" for what, number in found.software().items())
    except Exception as error:  # a runtime that is half installed may raise anything
        return Row("backends", name, "remark", f"its version cannot be told: {said(error)}", REMEDIES.get(name))
    return Row("backends", name, "ok", f"{versions}, on {found.processor}")


def kinds(patient: Patient) -> Iterator[Row]:
    """Each kind of device: whether this machine is one, else what was looked for."""
    for kind, module in DEVICE_MODULES.items():
        try:
            reason = (patient.here if kind == patient.here.kind else import_module(module).MACHINE).why_not()
        except Exception as error:  # a driver that is half installed may raise anything
            reason = said(error)
        yield Row("device", kind, "ok", "this machine is one" if reason is None else f"no: {reason}")


def device(patient: Patient) -> Iterator[Row]:
    """The one that `profile` takes."""
    if patient.refused is not None:
        fix = f"hydradeploy profile --device {patient.here.kind}, which this machine is and the other rows are about"
        if "nvidia-ml-py" in patient.refused:
            fix = "pip install nvidia-ml-py"
        yield Row("device", "asked for", "wrong", patient.refused, fix)
        return
    who = patient.device
    size = [f"{who.cores} cores"] * (who.cores > 0) + [show_bytes(who.memory_bytes)] * (who.memory_bytes > 0)
    found = f"{who.kind}: {', '.join([who.name, who.instruction_set, *size])}"
    yield Row("device", "profile takes", "ok", found)
