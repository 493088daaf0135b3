"""The processor, on Linux. Every reader works below a root, so that recorded trees test it."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydradeploy.devices.linux import Linux
from hydradeploy.devices.rapl import Rapl
from hydradeploy.devices.reading import Reading, Tree
from hydradeploy.measurements import Conditions, Device

# Widest first: the kernels of the widest one present are those that run, and they decide how sums are rounded.
_SETS = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "avx", "sse4_2", "i8mm", "asimddp", "asimd", "neon")


def features(root: Path = Path("/")) -> frozenset[str]:
    """What the processor has, in the kernel's words (`avx2`, `bf16`); nothing where it does not tell."""
    lines = (Tree(root).text("proc/cpuinfo") or "").splitlines()
    return frozenset(flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split())


def instruction_set(root: Path = Path("/")) -> str:
    """Architecture and widest instruction set that arithmetic depends on: `x86_64-avx2`, `aarch64-asimddp`."""
    machine, flags = platform.machine(), features(root)
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
            memory_bytes=self._linux.memory_bytes(),
        )

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        return self._linux.conditions(software)

    def cores(self) -> int:
        return self._linux.cores()

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        """Every sensor of the processor; what is foreign is not told apart here (`linux.tree_busy_s`)."""
        energy_j = self._rapl.energy_j()
        energy = {} if energy_j is None else {"energy_j": energy_j}
        return Reading(at_s=at_s, gauges=self._linux.gauges(), counters={**self._linux.counters(), **energy})

    def missing(self) -> Mapping[str, str]:
        energy = self._rapl.why_not()
        return {**({"energy": energy} if energy else {}), **self._linux.missing()}

    def meter(self) -> str | None:
        return self._rapl.meter()

    def occupied_bytes(self) -> int | None:
        return self._linux.occupied_bytes()

    def lock_clocks(self) -> AbstractContextManager[None]:
        return self._linux.lock_clocks()

    @cached_property
    def _linux(self) -> Linux:
        return Linux(Tree(self.root))

    @cached_property
    def _rapl(self) -> Rapl:
        return Rapl(self._linux.tree)

    def _name(self) -> str | None:
        tree = self._linux.tree
        lines = (tree.text("proc/cpuinfo") or "").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        model = fields.get("model name")
        # `ARMv8 Processor rev 1 (v8l)`, of Jetsons and of 32-bit kernels, is no name.
        if model and not model.startswith("ARMv"):
            return model
        # ARM kernels give numbers for the core, and boards their name in the device tree.
        board = tree.text("proc/device-tree/model") or fields.get("Model")
        arm = fields.get("CPU part") and f"ARM {fields.get('CPU implementer')} {fields['CPU part']}"
        return board or arm or model or None


MACHINE = Cpu()
