"""Where artifacts run: one file per kind of device, with its identity, its conditions and its sensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

from hydradeploy.errors import MissingError, UsageError
from hydradeploy.measurements import Conditions, Device

# In the order in which one is chosen when nobody names one.
DEVICE_MODULES = {"cpu": "hydradeploy.devices.cpu"}


class Machine(Protocol):
    """This machine, seen as one kind of device."""

    @property
    def kind(self) -> str: ...

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

    def observe(self) -> Mapping[str, float]:
        """What changes from moment to moment, such as the load; what cannot be read is left out."""
        ...


def machine(kind: str | None = None) -> Machine:
    """This machine as that kind of device, or as the first kind it is.

    Raises UsageError for an unknown kind, MissingError where this machine is none of that kind.
    """
    if kind is not None and kind not in DEVICE_MODULES:
        raise UsageError(f"no device kind {kind!r}", hint=f"one of {', '.join(DEVICE_MODULES)}")
    reasons = []
    for candidate in [kind] if kind is not None else DEVICE_MODULES:
        found: Machine = import_module(DEVICE_MODULES[candidate]).MACHINE
        reason = found.why_not()
        if reason is None:
            return found
        reasons.append(f"{candidate}: {reason}")
    raise MissingError(f"this machine is no such device ({'; '.join(reasons)})")
