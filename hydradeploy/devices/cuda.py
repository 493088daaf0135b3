"""A desktop or data-centre GPU through NVML, with what Linux tells of its host. Jetsons have a module of their own."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from hydradeploy.devices.claims import claimed, is_claimed
from hydradeploy.devices.jetson import Jetson
from hydradeploy.devices.linux import Linux
from hydradeploy.devices.namespaces import in_first_pid_namespace
from hydradeploy.devices.nvml import Nvml, Untold, text
from hydradeploy.devices.reading import Reading, Tree
from hydradeploy.errors import MissingError
from hydradeploy.measurements import Conditions, Device
from hydradeploy.units import show_cuda_version

# Numbers of nvml.h. The module has names for them, some of which changed from release to release.
_TEMPERATURE_OF_GPU = 0
_SM, _MEMORY = 1, 2
_POWER, _THERMAL = 0, 1
_INSTANT_POWER = 186
# A cap of power is where cards work at full load, and no protection.
_EVENTS = {
    "throttling.hw_slowdown": 0x8,
    "throttling.sw_thermal_slowdown": 0x20,
    "throttling.hw_thermal_slowdown": 0x40,
    "throttling.hw_power_brake": 0x80,
    "power_capped": 0x4,
}

_UNPINNED = "run as root, as in sudo -E, or leave pinning out: the cells then say that clocks float"

_Way = Callable[[Any, Any], float]


def _above_0(value: float) -> float:
    if value > 0:
        return value
    raise Untold("it answers 0")


def _instant_power(nvml: Any, gpu: Any) -> float:
    """What `nvmlDeviceGetPowerUsage` averages over a second on most cards."""
    answer = nvml.nvmlDeviceGetFieldValues(gpu, [_INSTANT_POWER])[0]
    if answer.nvmlReturn:
        raise nvml.NVMLError(answer.nvmlReturn)
    return _above_0(answer.value.uiVal / 1e3)


def _violation(policy: int) -> _Way:
    return lambda nvml, gpu: nvml.nvmlDeviceGetViolationStatus(gpu, policy).violationTime / 1e9


_GAUGES: dict[str, tuple[_Way, ...]] = {
    "clock_hz.sm": (lambda nvml, gpu: _above_0(nvml.nvmlDeviceGetClockInfo(gpu, _SM) * 1e6),),
    "clock_hz.memory": (lambda nvml, gpu: _above_0(nvml.nvmlDeviceGetClockInfo(gpu, _MEMORY) * 1e6),),
    "load.gpu": (lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,),
    "temperature_c.gpu": (
        lambda nvml, gpu: float(nvml.nvmlDeviceGetTemperatureV(gpu, _TEMPERATURE_OF_GPU)),
        lambda nvml, gpu: float(nvml.nvmlDeviceGetTemperature(gpu, _TEMPERATURE_OF_GPU)),
    ),
}
# Seconds since the driver was loaded.
_COUNTERS: dict[str, tuple[_Way, ...]] = {
    "throttle_events.thermal_s": (_violation(_THERMAL),),
    "power_capped_s": (_violation(_POWER),),
}


@dataclass
class Cuda:
    """The GPU that CUDA calls 0, in the machine below `root`."""

    nvml: Nvml = field(default_factory=Nvml)
    root: Path = Path("/")
    kind: str = "cuda"
    processors: tuple[str, ...] = ("cuda",)
    _occupied_at_first: tuple[int, int | None] | None = None
    _pinned_hz: dict[str, float] = field(default_factory=dict)

    def why_not(self) -> str | None:
        if Jetson(self.root).why_not() is None:
            return "this is a Jetson, where NVML answers nothing or zeros; take jetson"
        return self.nvml.why_not()

    def identity(self) -> Device:
        """The GPU. `cores` are its CUDA cores and `memory_bytes` its memory; either is 0 where the driver is silent."""
        ask = self.nvml.ask
        name = ask("name", lambda nvml, gpu: text(nvml.nvmlDeviceGetName(gpu)))
        capability = ask(
            "instruction_set",
            lambda nvml, gpu: "sm_" + "".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(gpu))),
        )
        return Device(
            kind=self.kind,
            name=name or "NVIDIA GPU",
            architecture=platform.machine(),
            instruction_set=capability or "cuda",
            cores=ask("cores", lambda nvml, gpu: int(nvml.nvmlDeviceGetNumGpuCores(gpu))) or 0,
            memory_bytes=self._memory_bytes("total") or 0,
        )

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        """The power mode is the limit of power, as `450 W`; the governor is that of the host's cores.

        Clocks are `pinned` while a process of ours pins them: NVML tells nobody whether somebody else did.
        """
        limit = self.nvml.ask(
            "power_mode",
            lambda nvml, gpu: f"{_above_0(nvml.nvmlDeviceGetPowerManagementLimit(gpu)) / 1e3:g} W",
            lambda nvml, gpu: f"{_above_0(nvml.nvmlDeviceGetEnforcedPowerLimit(gpu)) / 1e3:g} W",
        )
        found = self._linux.conditions({**software, **self._driver()}, limit)
        return msgspec.structs.replace(found, clocks="pinned" if is_claimed(self._clocks()) else "floating")

    def cores(self) -> int:
        return self._linux.cores()

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        """Sensors of the GPU and of its host. Programs that draw on the GPU are not foreign, for most screens are one.

        Beyond the common names: `power_capped`, whether a limit of power holds the clocks down, and `power_capped_s`,
        for how long it did; `gpu_bytes`, memory of `ours` on the GPU; `foreign_graphics.gpu`, programs that draw.
        """
        gpu = {**self._answers(_GAUGES), **self._pinned_hz, **self._events(), **self._processes(ours)}
        gauges = {**self._linux.gauges(), **gpu}
        counters = {**self._linux.counters(), **self._answers(_COUNTERS)}
        energy_j = self._energy_j()
        power_w = self._power_w() if energy_j is None else None
        return Reading(
            at_s=at_s,
            gauges=gauges if power_w is None else {**gauges, "power_w": power_w},
            counters=counters if energy_j is None else {**counters, "energy_j": energy_j},
        )

    def missing(self) -> Mapping[str, str]:
        """For `memory` also which figure stands in for that of the process."""
        self.nvml.problems.clear()
        self.identity()
        self.conditions({})
        reading = self.read(0.0)
        self.occupied_bytes()
        found = {**self._linux.missing(), **self.nvml.problems}
        for quantity, value in (("temperature", "temperature_c.gpu"), ("throttling", "throttling.hw_slowdown")):
            if value in reading.gauges:
                found.pop(quantity, None)
        energy, power = found.pop("energy_j", None), found.pop("power_w", None)
        return {**found, "energy": f"{energy}; power: {power}"} if energy and power else found

    def meter(self) -> str | None:
        if self._energy_j() is not None:
            return "NVML energy counter, whole card"
        return "NVML power, whole card" if self._power_w() is not None else None

    def occupied_bytes(self) -> int | None:
        """Memory on the GPU that this process holds, else that all processes hold.

        A process appears in the driver's list with its first use of CUDA. Where it turns out then that the list does
        not tell its memory, what the whole GPU's rose by since the first call is added to what that said.
        """
        own, all_of_it = self._own_bytes(), self._memory_bytes("used")
        before = self._occupied_at_first
        found = own
        if own is None:
            why = self.nvml.problems["memory_of_process"]
            self.nvml.problems["memory"] = why if all_of_it is None else f"of the whole GPU, not of the process: {why}"
        if own is None and all_of_it is not None:
            found = all_of_it if before is None or before[1] is None else before[0] + all_of_it - before[1]
        if before is None and found is not None:
            self._occupied_at_first = (found, all_of_it)
        return found

    def lock_clocks(self) -> AbstractContextManager[None]:
        """At the highest while the block runs, then free: what was locked before cannot be asked for.

        What this machine reads meanwhile has that as `pinned_hz.sm`, for NVML tells nobody where clocks are locked.
        """
        return self._pinned()

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        ask, problems = self.nvml.ask, self.nvml.problems
        highest = ask("lock", lambda nvml, gpu: int(_above_0(nvml.nvmlDeviceGetMaxClockInfo(gpu, _SM))))
        with claimed(self._clocks()):
            refused = highest is None
            try:
                if not refused:
                    refused = not ask(
                        "lock", lambda nvml, gpu: not nvml.nvmlDeviceSetGpuLockedClocks(gpu, highest, highest)
                    )
                if refused:
                    raise MissingError(f"the GPU's clocks cannot be pinned: {problems.pop('lock')}", hint=_UNPINNED)
                assert highest is not None
                self._pinned_hz["pinned_hz.sm"] = highest * 1e6
                yield
            finally:
                self._pinned_hz.clear()
                if not refused and not ask("unlock", lambda nvml, gpu: not nvml.nvmlDeviceResetGpuLockedClocks(gpu)):
                    still = f"the GPU's clocks are still locked: {problems.pop('unlock')}"
                    raise MissingError(still, hint="sudo nvidia-smi --reset-gpu-clocks")

    def _clocks(self) -> str:
        """The name that whoever pins the clocks of this GPU holds."""
        return f"the clocks of {self.nvml.ask('uuid', lambda nvml, gpu: text(nvml.nvmlDeviceGetUUID(gpu)))}"

    @cached_property
    def _linux(self) -> Linux:
        return Linux(Tree(self.root))

    def _driver(self) -> dict[str, str]:
        driver = self.nvml.ask("driver", lambda nvml, gpu: text(nvml.nvmlSystemGetDriverVersion()))
        cuda = self.nvml.ask(
            "cuda-driver",
            lambda nvml, gpu: int(nvml.nvmlSystemGetCudaDriverVersion_v2()),
            lambda nvml, gpu: int(nvml.nvmlSystemGetCudaDriverVersion()),
        )
        told = {"driver": driver, "cuda-driver": show_cuda_version(cuda) if cuda else None}
        return {name: version for name, version in told.items() if version}

    def _answers(self, questions: Mapping[str, tuple[_Way, ...]]) -> dict[str, float]:
        found = {name: self.nvml.ask(name, *ways) for name, ways in questions.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _events(self) -> dict[str, float]:
        bits = self.nvml.ask(
            "throttling",
            lambda nvml, gpu: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)),
            lambda nvml, gpu: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
        )
        return {} if bits is None else {name: float(bool(bits & bit)) for name, bit in _EVENTS.items()}

    def _energy_j(self) -> float | None:
        return self.nvml.ask(
            "energy_j", lambda nvml, gpu: _above_0(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)
        )

    def _power_w(self) -> float | None:
        return self.nvml.ask(
            "power_w", _instant_power, lambda nvml, gpu: _above_0(nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
        )

    def _memory_bytes(self, which: str) -> int | None:
        """`total` or `used` of the whole GPU; some have the second version of the question only."""
        return self.nvml.ask(
            f"memory_{which}",
            lambda nvml, gpu: int(getattr(nvml.nvmlDeviceGetMemoryInfo(gpu), which)),
            lambda nvml, gpu: int(getattr(nvml.nvmlDeviceGetMemoryInfo(gpu, version=nvml.nvmlMemory_v2), which)),
        )

    def _processes(self, ours: Collection[int]) -> dict[str, float]:
        computing, drawing = self._holders("foreign_processes.gpu"), self._holders("foreign_graphics.gpu")
        found = {
            name: float(len(holders.keys() - set(ours)))
            for name, holders in (("foreign_processes.gpu", computing), ("foreign_graphics.gpu", drawing))
            if holders is not None
        }
        used = self._used_bytes(ours, computing, drawing, "gpu_bytes")
        return found if used is None else {**found, "gpu_bytes": float(used)}

    def _own_bytes(self) -> int | None:
        computing, drawing = self._holders("foreign_processes.gpu"), self._holders("foreign_graphics.gpu")
        return self._used_bytes((os.getpid(),), computing, drawing, "memory_of_process")

    def _holders(self, what: str) -> dict[int, int | None] | None:
        """Memory by process number, of programs that compute or that draw."""
        drawing = "graphics" in what

        def listed(nvml: Any, gpu: Any) -> dict[int, int | None]:
            if not in_first_pid_namespace(self._linux.tree):
                raise Untold("the driver tells process numbers of the host, and this is a container")
            asked = nvml.nvmlDeviceGetGraphicsRunningProcesses if drawing else nvml.nvmlDeviceGetComputeRunningProcesses
            return {int(process.pid): process.usedGpuMemory for process in asked(gpu)}

        return self.nvml.ask(what, listed)

    def _used_bytes(
        self,
        pids: Collection[int],
        computing: Mapping[int, int | None] | None,
        drawing: Mapping[int, int | None] | None,
        what: str,
    ) -> int | None:
        """Of these processes; one that both computes and draws is in both lists, with all of its memory in either."""

        def added(nvml: Any, gpu: Any) -> int:
            if computing is None:
                raise Untold(self.nvml.problems["foreign_processes.gpu"])
            total = 0
            for pid in pids:
                told = [holders[pid] for holders in (computing, drawing or {}) if pid in holders]
                if told and not any(told):
                    raise Untold("the driver lists the process without its memory")
                total += max((value or 0 for value in told), default=0)
            return total

        return self.nvml.ask(what, added)


MACHINE = Cuda()
