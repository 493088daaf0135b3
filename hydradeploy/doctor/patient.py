"""What doctor looks at, and what it says about one thing."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from hydradeploy.backends import Backend
from hydradeploy.devices import Machine
from hydradeploy.devices.reading import Tree
from hydradeploy.measurements import Conditions, Device
from hydradeploy.spec import Record

Status = Literal["ok", "remark", "wrong"]

# As root under the Python that runs now: sudo finds no virtual environment.
AS_ROOT = f"sudo {shlex.quote(sys.executable)} -m hydradeploy profile"


class Row(Record, frozen=True):
    """One thing that was looked at. `fix` is a command, or a sentence where no command does it."""

    area: str
    name: str
    status: Status
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class Absent:
    """Why a backend does not run here, and what it would compute on: cpu or cuda, None where it does not even say."""

    why: str
    processor: str | None


@dataclass(frozen=True)
class Patient:
    """This machine as `here`; `refused` is why it is not the device asked for. `backends` are those usable or not.

    `tree` is where small files of the kernel are read, `free_bytes` what a disk has left, `rest` waits some seconds.
    """

    here: Machine
    refused: str | None
    backends: Mapping[str, Backend | Absent]
    profiles: Path
    tree: Tree
    free_bytes: Callable[[Path], int]
    rest: Callable[[float], None]

    @cached_property
    def conditions(self) -> Conditions:
        return self.here.conditions({})

    @cached_property
    def device(self) -> Device:
        return self.here.identity()

    @cached_property
    def missing(self) -> Mapping[str, str]:
        return self.here.missing()

    @cached_property
    def cores(self) -> int:
        """Logical ones of the host that are on, as a GPU has others; those of this process where none is told."""
        told = (self.tree.text("proc/cpuinfo") or "").splitlines()
        return sum(line.startswith("processor\t") for line in told) or self.here.cores()

    @cached_property
    def has_nvidia(self) -> bool:
        """Whether there is an NVIDIA GPU with its driver: a Jetson, any in Linux, any that Windows lends."""
        if self.here.kind != "cpu" or self.tree.text("proc/driver/nvidia/version") is not None:
            return True
        return self.tree.path("dev/dxg").exists()

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0


def several(values: Mapping[str, str], at_most: int = 4) -> str:
    """Each with its name, `cpu 48.5 °C, gpu 49.2 °C`; of many the first ones and how many more."""
    shown = [f"{name} {value}".strip() for name, value in list(values.items())[:at_most]]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def said(error: BaseException) -> str:
    """The first line of what an exception says, its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
