"""How the machine is set up: clocks, power mode, and the cores this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hydradeploy.devices.linux import core_kinds
from hydradeploy.doctor.patient import AS_ROOT, Patient, Row
from hydradeploy.spec import show_heads
from hydradeploy.units import show_number

_PIN = {
    "cpu": f"{AS_ROOT} --lock-clocks",
    "cuda": f"{AS_ROOT} --lock-clocks, or sudo nvidia-smi -lgc LOWEST,HIGHEST",
    "jetson": f"{AS_ROOT} --lock-clocks, or sudo jetson_clocks",
}


def clocks(patient: Patient) -> Iterator[Row]:
    found = patient.conditions.clocks
    if found == "pinned":
        yield Row("clocks", "clocks", "ok", found)
    elif found is None:
        yield Row("clocks", "clocks", "remark", "whether they are pinned cannot be read here")
    else:
        why = f"{found}: what is measured now may be faster or slower later"
        yield Row("clocks", "clocks", "remark", why, _PIN.get(patient.here.kind))


def governor(patient: Patient) -> Iterator[Row]:
    """That of the processor; it matters where nothing else pins its clocks."""
    found = patient.conditions.governor
    if found is None:
        yield Row("clocks", "governor", "ok", "none here")
    elif found == "performance" or patient.conditions.clocks == "pinned" or patient.here.kind == "jetson":
        yield Row("clocks", "governor", "ok", found)
    else:
        yield Row(
            "clocks",
            "governor",
            "remark",
            f"{found}: lowers clocks between calls",
            "sudo cpupower frequency-set -g performance",
        )


def power_mode(patient: Patient) -> Iterator[Row]:
    """Only where the device has such a thing; one that cannot be read is among the sensors."""
    found = patient.conditions.power_mode
    if found is not None:
        yield Row("clocks", "power mode", "ok", found)


def affinity(patient: Patient) -> Iterator[Row]:
    threads = show_number(patient.here.cores(), "thread")
    found = f"{patient.conditions.affinity} of {patient.cores} cores, so {threads} unless --threads is given"
    yield Row("cores", "affinity", "ok", found)


def quota(patient: Patient) -> Iterator[Row]:
    found = patient.conditions.quota_cores
    if found is None:
        yield Row("cores", "quota", "ok", "none")
        return
    why = f"{found:g} cores: what takes more is stopped until the next period, and flagged throttled"
    fewer = f"hydradeploy profile --threads {int(found)}"
    yield Row("cores", "quota", "remark", why, fewer if found >= 1 else "raise cpu.max of the control group")


def kinds(patient: Patient) -> Iterator[Row]:
    """Where cores are unlike, it matters on which of them a thread lands."""
    allowed = os.sched_getaffinity(0)
    used = [show_heads(mine) for cores in core_kinds(patient.tree).values() if (mine := allowed.intersection(cores))]
    if len(used) < 2:
        yield Row("cores", "kinds", "ok", "all alike, as far as the kernel says")
    else:
        found = f"unlike, fastest first: {'; '.join(used)}"
        yield Row("cores", "kinds", "remark", found, f"taskset -c {used[0]} hydradeploy profile")


def virtual(patient: Patient) -> Iterator[Row]:
    flags = next((line for line in (patient.tree.text("proc/cpuinfo") or "").splitlines() if "hypervisor" in line), "")
    if flags.startswith("flags") or patient.tree.text("sys/hypervisor/type"):
        found = "a virtual machine: neighbours take time, and processes differ by more"
        yield Row("cores", "hypervisor", "remark", found, "hydradeploy profile --preset standard")
    else:
        yield Row("cores", "hypervisor", "ok", "none seen")
