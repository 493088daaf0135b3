"""Where artifacts run: one file per kind of device, with its identity, its conditions and its sensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Protocol

from hydradeploy.devices.reading import Reading
from hydradeploy.errors import MissingError, UsageError
from hydradeploy.measurements import Conditions, Device

# In the order in which one is chosen when nobody names one.
DEVICE_MODULES = {
    "jetson": "hydradeploy.devices.jetson",
    "cuda": "hydradeploy.devices.cuda",
    "cpu": "hydradeploy.devices.cpu",
}


class Machine(Protocol):
    """This machine, seen as one kind of device."""

    @property
    def kind(self) -> str: ...

    @property
    def processors(self) -> tuple[str, ...]:
        """What computes on it: `cpu`, `cuda`."""
        ...

    def why_not(self) -> str | None:
        """None where this machine is such a device, else the sentence to show."""
        ...

    def identity(self) -> Device: ...

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        """The present conditions, with the versions of the runtimes."""
        ...

    def cores(self) -> int:
        """How many cores this process may keep busy."""
        ...

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        """Every sensor that answers, now; never raises. `ours` are process numbers that are not foreign."""
        ...

    def missing(self) -> Mapping[str, str]:
        """Why a quantity cannot be read here, by name: `energy`, `clock`, `temperature`, `power_mode` and so on."""
        ...

    def meter(self) -> str | None:
        """What `energy_j` or `power_w` of a reading covers, such as `VDD_IN, module`; None without either."""
        ...

    def occupied_bytes(self) -> int | None:
        """Memory that this process occupies, as a budget counts it; None where it cannot be read."""
        ...

    def lock_clocks(self) -> AbstractContextManager[None]:
        """Pin clocks while the block runs, then put back what was there. Raises MissingError where that fails."""
        ...


def machine(kind: str | None = None, processor: str = "cpu") -> Machine:
    """This machine as that kind of device, or as the first kind it is that computes on this processor.

    Raises UsageError for an unknown kind, MissingError where this machine is none of that kind.
    """
    if kind is not None and kind not in DEVICE_MODULES:
        raise UsageError(f"no device kind {kind!r}", hint=f"one of {', '.join(DEVICE_MODULES)}")
    reasons = []
    for candidate in [kind] if kind is not None else DEVICE_MODULES:
        found: Machine = import_module(DEVICE_MODULES[candidate]).MACHINE
        if kind is None and processor not in found.processors:
            continue
        reason = found.why_not()
        if reason is None:
            return found
        reasons.append(f"{candidate}: {reason}")
    instead = ", --device cpu measures the processor" if kind is None and processor != "cpu" else ""
    raise MissingError(
        f"this machine is no such device ({'; '.join(reasons)})",
        hint=f"hydradeploy doctor says what would help{instead}",
    )
