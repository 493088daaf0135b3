"""The processor, on Linux. Every reader works below a root, so that recorded trees test it."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from hydradeploy.devices.reading import Reading
from hydradeploy.errors import MissingError
from hydradeploy.measurements import Conditions, Device
from hydradeploy.spec import show_heads

# Widest first: the kernels of the widest one present are those that run, and they decide how sums are rounded.
_SETS = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "avx", "sse4_2", "i8mm", "asimddp", "asimd", "neon")


def instruction_set(root: Path = Path("/")) -> str:
    """Architecture and widest instruction set that arithmetic depends on: `x86_64-avx2`, `aarch64-asimddp`."""
    machine = platform.machine()
    flags = {
        flag
        for line in (_read(root / "proc/cpuinfo") or "").splitlines()
        if line.startswith(("flags", "Features"))
        for flag in line.split()
    }
    widest = next((name for name in _SETS if name in flags), None)
    return machine if widest is None else f"{machine}-{widest}"


@dataclass(frozen=True)
class Cpu:
    """The processor of the machine below `root`."""

    root: Path = Path("/")
    kind: str = "cpu"
    processors: tuple[str, ...] = ("cpu",)

    def why_not(self) -> str | None:
        return None

    def identity(self) -> Device:
        """Who it is; a name that cannot be read is the architecture's."""
        return Device(
            kind=self.kind,
            name=self._name() or platform.machine(),
            architecture=platform.machine(),
            instruction_set=instruction_set(self.root),
            cores=os.cpu_count() or 1,
            memory_bytes=self._memory_bytes(),
        )

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        """Governor, the cores this process may use, its control group's quota, the kernel."""
        return Conditions(
            power_mode=None,
            governor=self._governor(),
            affinity=show_heads(os.sched_getaffinity(0)),
            quota_cores=self._quota_cores(),
            clocks=None,
            os=f"{platform.system()} {platform.release()}",
            software=dict(software),
        )

    def cores(self) -> int:
        """The cores of the affinity mask, fewer where the quota is less than that."""
        allowed = len(os.sched_getaffinity(0))
        quota = self._quota_cores()
        return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        """The load average over a minute."""
        with suppress(ValueError, IndexError):
            load = float((_read(self.root / "proc/loadavg") or "").split()[0])
            return Reading(at_s=at_s, gauges={"load_average": load}, counters={})
        return Reading(at_s=at_s, gauges={}, counters={})

    def missing(self) -> Mapping[str, str]:
        return {"energy": "not read yet"}

    def meter(self) -> str | None:
        return None

    def occupied_bytes(self) -> int | None:
        """The largest resident memory this process has had.

        Not `getrusage`: what that gives includes the parent's memory from before exec.
        """
        for line in (_read(self.root / "proc/self/status") or "").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None

    def lock_clocks(self) -> AbstractContextManager[None]:
        raise MissingError("the clocks of this processor cannot be pinned")

    def _name(self) -> str | None:
        lines = (_read(self.root / "proc/cpuinfo") or "").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        # ARM kernels give numbers for the core, and boards their name in the device tree.
        board = _read(self.root / "proc/device-tree/model")
        arm = fields.get("CPU part") and f"ARM {fields.get('CPU implementer')} {fields['CPU part']}"
        return fields.get("model name") or (board and board.rstrip("\0")) or fields.get("Model") or arm or None

    def _memory_bytes(self) -> int:
        for line in (_read(self.root / "proc/meminfo") or "").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
        return 0

    def _governor(self) -> str | None:
        files = (self.root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        return "+".join(sorted({name for text in map(_read, files) if text and (name := text.strip())})) or None

    def _quota_cores(self) -> float | None:
        """The tightest limit from this process's control group up to the root, of version 2 or 1."""
        found = []
        for line in (_read(self.root / "proc/self/cgroup") or "").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = self.root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            here = top / group.lstrip("/")
            for directory in (here, *here.parents):
                found.append(_quota(directory))
                if directory == top:
                    break
        return min((quota for quota in found if quota is not None), default=None)


def _quota(directory: Path) -> float | None:
    unified = _read(directory / "cpu.max")
    parts = unified.split() if unified else [_read(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    with suppress(ValueError, TypeError, IndexError, ZeroDivisionError):  # "max", or no such file
        cores = float(parts[0]) / float(parts[1])  # type: ignore[arg-type]
        return cores if cores > 0 else None
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


MACHINE = Cpu()
