"""A stand-in for nvidia-ml-py (module `pynvml`): GPUs of which every function can be made to fail on its own.

Errors have the names, and answers the shapes, of nvidia-ml-py 13.615.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As there, its text may have to be asked of a library that is gone; `value` is the code."""

    value = 999

    def __str__(self) -> str:
        return {3: "Not Supported", 4: "Insufficient Permissions"}.get(self.value, f"NVML Error with code {self.value}")


def _error(name: str, code: int) -> type[NVMLError]:
    return type(f"NVMLError_{name}", (NVMLError,), {"value": code})


ERRORS = {
    name: _error(name, code)
    for name, code in {
        "NotSupported": 3,
        "NoPermission": 4,
        "DriverNotLoaded": 9,
        "LibraryNotFound": 12,
        "FunctionNotFound": 13,
        "GpuIsLost": 15,
        "Unknown": 999,
    }.items()
}


@dataclass
class Card:
    """An H100 that draws 400 W at 1755 MHz."""

    name: str = "NVIDIA H100 80GB HBM3"
    # Another one in each process: whoever pins its clocks holds its name on the whole machine.
    uuid: str = f"GPU-8932f937-{os.getpid()}"
    capability: tuple[int, int] = (9, 0)
    divided: int = 0
    events: int = 0
    energy_mj: int = 5_000_123
    power_mw: int = 400_500
    instant_power_mw: int = 412_000
    used: int = 3 << 30
    computing: dict[int, int | None] = field(default_factory=dict)
    drawing: dict[int, int | None] = field(default_factory=dict)
    locked: tuple[int, int] | None = None
    violation_ns: dict[int, int] = field(default_factory=lambda: {0: 7_500_000_000, 1: 250_000_000})


@dataclass
class FakeNvml:
    """The module. `failing` maps names of functions to what they raise; `asked` is what was called, in order."""

    cards: list[Card] = field(default_factory=lambda: [Card()])
    failing: dict[str, BaseException] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    nvmlMemory_v2 = 0x02000028

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name != "nvmlMemory_v2":
            self.asked.append(name)
            if name in self.failing:
                error = self.failing[name]
                if isinstance(error, AttributeError):
                    raise error
                return lambda *_, **__: _raise(error)
        return super().__getattribute__(name)

    def NVMLError(self, code: int) -> NVMLError:
        return next((error() for error in ERRORS.values() if error.value == code), NVMLError())

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        return [card.divided, 0]

    def nvmlDeviceGetName(self, card: Card) -> str:
        return card.name

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        return card.capability

    def nvmlDeviceGetNumGpuCores(self, card: Card) -> int:
        return 16896

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(total=80 << 30, used=card.used, free=(80 << 30) - card.used)

    def nvmlDeviceGetPowerManagementLimit(self, card: Card) -> int:
        return 450_000

    def nvmlDeviceGetEnforcedPowerLimit(self, card: Card) -> int:
        return 380_000

    def nvmlSystemGetDriverVersion(self) -> str:
        return "595.78"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13020

    def nvmlDeviceGetClockInfo(self, card: Card, clock: int) -> int:
        return {1: 1755, 2: 2619}[clock]

    def nvmlDeviceGetMaxClockInfo(self, card: Card, clock: int) -> int:
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetTemperatureV(self, card: Card, sensor: int) -> int:
        return {0: 61}[sensor]

    def nvmlDeviceGetTemperature(self, card: Card, sensor: int) -> int:
        return {0: 61}[sensor]

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        return card.energy_mj

    def nvmlDeviceGetPowerUsage(self, card: Card) -> int:
        return card.power_mw

    def nvmlDeviceGetFieldValues(self, card: Card, fields: list[int]) -> list[SimpleNamespace]:
        known = {186: card.instant_power_mw}
        return [
            SimpleNamespace(nvmlReturn=0 if known.get(each) else 3, value=SimpleNamespace(uiVal=known.get(each, 0)))
            for each in fields
        ]

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> SimpleNamespace:
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetCurrentClocksEventReasons(self, card: Card) -> int:
        return card.events

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Card) -> int:
        return card.events

    def nvmlDeviceGetViolationStatus(self, card: Card, policy: int) -> SimpleNamespace:
        return SimpleNamespace(referenceTime=1, violationTime=card.violation_ns[policy])

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.computing.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.drawing.items()]

    def nvmlDeviceSetGpuLockedClocks(self, card: Card, low: int, high: int) -> None:
        card.locked = (low, high)

    def nvmlDeviceResetGpuLockedClocks(self, card: Card) -> None:
        card.locked = None


FUNCTIONS = sorted(name for name in vars(FakeNvml) if name.startswith("nvml") and name != "nvmlMemory_v2")


def _raise(error: BaseException) -> None:
    raise error
