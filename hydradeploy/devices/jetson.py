"""A Jetson, from the kernel's files alone: no daemon, and no NVML, which on Orin answers nothing or zeros."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from hydradeploy.devices import command as programs
from hydradeploy.devices import tegra
from hydradeploy.devices.command import Command
from hydradeploy.devices.cpu import instruction_set
from hydradeploy.devices.linux import Linux
from hydradeploy.devices.namespaces import in_first_pid_namespace
from hydradeploy.devices.reading import Reading, Tree, field_of
from hydradeploy.errors import MissingError
from hydradeploy.measurements import Conditions, Device

_RELEASE = "etc/nv_tegra_release"
_MODEL = "proc/device-tree/model"
_L4T = re.compile(r"# R([0-9]+) \(release\), REVISION: ([0-9]+(?:\.[0-9]+)*)")
_MODULE = re.compile(r"\bJetson\b|\bNVIDIA\b.*\b(Nano|TX[12]|Xavier|Orin|Thor)\b", re.IGNORECASE)
_MODE = re.compile(r"^NV Power Mode:[ \t]*(\S[^\r\n]*?)[ \t\r]*$", re.MULTILINE)
_ARCHITECTURE = "aarch64"
_HINT = "run as root, as in sudo -E, or leave pinning out: the cells then say that clocks float"


@dataclass(frozen=True)
class Jetson:
    """The Jetson below `root`; `command` runs nvpmodel and jetson_clocks."""

    root: Path = Path("/")
    command: Command = programs.run
    kind: str = "jetson"
    processors: tuple[str, ...] = ("cpu", "cuda")

    def why_not(self) -> str | None:
        model = self._tree.text(_MODEL)
        if self._l4t() or _MODULE.search(model or ""):
            return None
        told = f", which says {model!r}" if model else ""
        return f"looked for /{_RELEASE} and for a Jetson, Xavier, Orin or Thor in /{_MODEL}{told}"

    def identity(self) -> Device:
        """The module by its name in the device tree. `cores` are all it has, of which a power mode may use fewer."""
        return Device(
            kind=self.kind,
            name=self._tree.text(_MODEL) or "Jetson",
            architecture=_ARCHITECTURE,
            instruction_set=_ARCHITECTURE + instruction_set(self.root).removeprefix(platform.machine()),
            cores=self._cores_present(),
            memory_bytes=self._linux.memory_bytes(),
        )

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        """Clocks are `pinned` where those of every cluster and of the GPU are; the release is part of `os`."""
        found = self._linux.conditions(software, self._power_mode()[0])
        release = self._l4t()
        return msgspec.structs.replace(
            found, clocks=self._clocks(), os=f"{found.os}, L4T {release}" if release else found.os
        )

    def cores(self) -> int:
        return self._linux.cores()

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        """Temperatures have their zone's name in lower case, for releases differ in it."""
        gauges = {
            name.lower() if name.startswith("temperature_c.") else name: value
            for name, value in self._linux.gauges().items()
        }
        return Reading(
            at_s=at_s,
            gauges={**gauges, **self._sensors.gauges()},
            counters={**self._linux.counters(), **self._sensors.counters()},
        )

    def missing(self) -> Mapping[str, str]:
        linux = self._linux.missing()
        linux.pop("throttling", None)
        power_mode = self._power_mode()[1]
        memory = self._why_no_memory()
        return {
            **linux,
            **self._silent_zones(),
            **self._sensors.missing(),
            **({"power_mode": power_mode} if power_mode else {}),
            **({"memory": memory} if memory else {}),
        }

    def meter(self) -> str | None:
        return self._sensors.meter()

    def occupied_bytes(self) -> int | None:
        """The largest resident memory this process has had, and the GPU's buffers, which are not resident in it.

        Memory is one for both, and only root is told whose buffers are whose. Without that table, buffers are what the
        machine has in use beyond the anonymous memory of this process: what others use is in it, and leaves a
        difference of two calls as long as they take and free nothing in between. Mapped files count once, as resident,
        for what is in use according to MemAvailable does not have them. One process is told by one way throughout.
        """
        status, meminfo = self._tree.text("proc/self/status"), self._tree.text("proc/meminfo")
        peak = field_of(status, "VmHWM")
        if self._nvmap_tells:
            buffers = tegra.nvmap_bytes(self._tree, os.getpid())
            return None if peak is None or buffers is None else peak * 1024 + buffers
        total, available = field_of(meminfo, "MemTotal"), field_of(meminfo, "MemAvailable")
        own, shared = field_of(status, "RssAnon"), field_of(status, "RssShmem")
        if peak is None or total is None or available is None or own is None or shared is None:
            return None
        return (peak + total - available - own - shared) * 1024

    def lock_clocks(self) -> AbstractContextManager[None]:
        return self._pinned()

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        # The program asks before it overwrites a file, so there is none yet.
        directory = Path(tempfile.mkdtemp(prefix="hydradeploy-clocks-"))
        before = str(directory / "before")
        try:
            self._run("--store", before)
        except MissingError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        try:
            self._run()
            self._forget_pinned()
            yield
        finally:
            self._run("--restore", before, hint=f"sudo jetson_clocks --restore {before}")
            self._forget_pinned()
            shutil.rmtree(directory, ignore_errors=True)

    def _run(self, *arguments: str, hint: str = _HINT) -> None:
        try:
            self.command(("jetson_clocks", *arguments))
        except MissingError as error:
            doing = "put back" if "--restore" in arguments else "pinned"
            raise MissingError(f"the clocks could not be {doing}: {error.message}", hint=hint) from error

    def _forget_pinned(self) -> None:
        self._sensors.forget_pinned()
        self.__dict__.pop("_linux", None)

    @cached_property
    def _tree(self) -> Tree:
        return Tree(self.root)

    @cached_property
    def _linux(self) -> Linux:
        return Linux(self._tree)

    @cached_property
    def _sensors(self) -> tegra.Sensors:
        return tegra.Sensors(self._tree)

    @cached_property
    def _nvmap_tells(self) -> bool:
        """As at the first call. The table has the numbers of the first namespace, so that a container is not in it."""
        return in_first_pid_namespace(self._tree) and tegra.nvmap_bytes(self._tree, os.getpid()) is not None

    def _l4t(self) -> str | None:
        """`R36.4.3`."""
        found = _L4T.match(self._tree.text(_RELEASE) or "")
        return f"R{found[1]}.{found[2]}" if found else None

    def _cores_present(self) -> int:
        """0 where the tree does not tell."""
        ranges = re.findall(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", self._tree.text("sys/devices/system/cpu/present") or "")
        told = sum(int(last or first) - int(first) + 1 for first, last in ranges)
        return told or (os.cpu_count() or 0 if self.root == Path("/") else 0)

    def _clocks(self) -> str | None:
        states = (self._linux.clocks(), {True: "pinned", False: "floating", None: None}[self._sensors.pinned()])
        return "floating" if "floating" in states else None if None in states else "pinned"

    def _power_mode(self) -> tuple[str | None, str | None]:
        """The mode's name, for its number means another mode on each board; else why it is not known."""
        try:
            said = self.command(("nvpmodel", "-q"))
        except MissingError as error:
            return None, error.message
        found = _MODE.search(said)
        return (found[1], None) if found else (None, "nvpmodel -q names no mode")

    def _silent_zones(self) -> dict[str, str]:
        """Thermal zones that do not answer, as those of engines without power."""
        there = self._linux.gauges()
        zones = {
            f"temperature_c.{kind}": zone
            for zone in self._tree.glob("sys/class/thermal/thermal_zone*")
            if (kind := self._tree.text(zone / "type"))
        }
        paths = {name: self._tree.shown(zone / "temp") for name, zone in zones.items() if name not in there}
        problems = self._tree.problems
        return {name.lower(): f"{problems[path]} ({path})" for name, path in paths.items() if path in problems}

    def _why_no_memory(self) -> str | None:
        if self.occupied_bytes() is not None:
            return None
        return "neither NvMap's table nor MemAvailable and this process's status can be read"


MACHINE = Jetson()
