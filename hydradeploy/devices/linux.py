"""What every Linux machine tells, whatever else it has: processor time, memory, clocks, heat, limits, processes."""

from __future__ import annotations

import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hydradeploy.devices import cgroups, cpufreq
from hydradeploy.devices.reading import Tree, field_of
from hydradeploy.measurements import Conditions
from hydradeploy.spec import show_heads

_CPUS = "sys/devices/system/cpu"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_NUMBER = "([0-9]{1,20})"
_STAT = re.compile(rf"cpu((?: +{_NUMBER}){{3,}})(?:\s|$)")
# The name in front is in parentheses and may have some itself: parent, nine others, own time, that of ended children.
_PROCESS = re.compile(rf".*\) \S {_NUMBER} (?:\S+ ){{9}}{' '.join([_NUMBER] * 4)}(?:\s|$)", re.DOTALL)
_LOAD = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}(?!\S)")
# Of a package and not of each core: to read a core's own sensor is to interrupt that core.
_PACKAGE_SENSORS = {"coretemp": ("Package",), "k10temp": ("Tctl", "Tdie")}
_SENSOR_OFF_C = -200.0  # some kernels give -256 for one
_CONSTANT_ZONES = ("pmic",)
# What a reading has where the machine tells it, and what is said where it does not: quantity, how the names of its
# values begin, what the paths of its files have in them, the sentence.
_EXPECTED = (
    ("clock", "clock_hz.", "/cpufreq/", f"no cpufreq below /{_CPUS}, as in most virtual machines"),
    ("temperature", "temperature_c.", "/thermal/", "no thermal zone and no hwmon sensor of the processor answers"),
    ("throttling", "throttle_events.", "/thermal_throttle/", "only Intel's processors count it, and few virtual ones"),
    ("quota_throttling", "cgroup_throttled", "/cpu.stat", "no control group of this process counts it in cpu.stat"),
    ("load", "busy_s", "/proc/stat", "/proc/stat has no processor time"),
    ("swap", "swapped_pages", "/proc/vmstat", "/proc/vmstat does not count swapped pages"),
    ("memory", "available_bytes", "/proc/meminfo", "/proc/meminfo has no MemAvailable"),
)


@dataclass(frozen=True)
class Linux:
    """The machine below the root of a tree. Which sensors there are is looked up once, at the first reading."""

    tree: Tree = field(default_factory=Tree)

    def gauges(self) -> dict[str, float]:
        """`available_bytes`, `load_average`, `clock_hz.*`, `pinned_hz.*`, `temperature_c.*`; never raises."""
        found = {f"clock_hz.{name}": hz for name, hz in cpufreq.clocks_hz(self.tree, self._policies).items()}
        found |= {f"pinned_hz.{name}": hz for name, hz in self._pinned_hz.items()}
        found |= self._temperatures_c()
        available = field_of(self.tree.text("proc/meminfo"), "MemAvailable")
        if available is not None:
            found["available_bytes"] = available * 1024.0
        load = _LOAD.match(self.tree.text("proc/loadavg") or "")
        if load:
            found["load_average"] = float(load[0])
        return found

    def counters(self) -> dict[str, float]:
        """`busy_s`, `steal_s`, `swapped_pages`, `oom_kills`, `cgroup_throttled*`, `throttle_events.*`; never raises."""
        return {
            **_processor_time_s(self.tree.text("proc/stat")),
            **_memory_events(self.tree.text("proc/vmstat")),
            **cgroups.throttled(self.tree, self._groups),
            **self._throttle_events(),
        }

    def missing(self) -> dict[str, str]:
        """Why a quantity of a reading is not there, by name: `clock`, `temperature`, `throttling` and so on."""
        there = (*self.gauges(), *self.counters())
        return {
            quantity: why(self.tree, part, otherwise)
            for quantity, start, part, otherwise in _EXPECTED
            if not any(name.startswith(start) for name in there)
        }

    def conditions(self, software: Mapping[str, str], power_mode: str | None = None) -> Conditions:
        """Governor, the cores this process may use, its control group's quota, clocks, the kernel."""
        return Conditions(
            power_mode=power_mode,
            governor=cpufreq.governor(self.tree, self._policies),
            affinity=self.affinity(),
            quota_cores=self.quota_cores(),
            clocks=self.clocks(),
            os=f"{platform.system()} {platform.release()}",
            software=dict(software),
        )

    def clocks(self) -> str | None:
        """`pinned`, `floating`, None where nothing tells."""
        return cpufreq.state(self.tree, self._policies)

    @contextmanager
    def lock_clocks(self) -> Iterator[None]:
        """Every policy at its highest clock while the block runs, and then as it was.

        Raises MissingError where there is nothing to pin or no right to, EnvironmentFailed where a file that was
        changed cannot be put back.
        """
        try:
            with cpufreq.pinned(self.tree, self._policies):
                self.__dict__.pop("_pinned_hz", None)
                yield
        finally:
            self.__dict__.pop("_pinned_hz", None)

    def affinity(self) -> str:
        """The cores this process may use; where kinds differ, by kind: `0-3 (capacity 1024); 4-7 (capacity 446)`."""
        allowed = os.sched_getaffinity(0)
        kinds = core_kinds(self.tree)
        if len(kinds) < 2:
            return show_heads(allowed)
        shown = [
            f"{show_heads(mine)} (capacity {capacity})"
            for capacity, cores in kinds.items()
            if (mine := allowed.intersection(cores))
        ]
        rest = allowed.difference(*kinds.values())
        return "; ".join([*shown, show_heads(rest)] if rest else shown)

    def quota_cores(self) -> float | None:
        """The cores that the tightest control group grants; None for no limit."""
        return cgroups.quota_cores(self.tree, self._groups)

    def cores(self) -> int:
        """The cores of the affinity mask, fewer where the quota is less than that."""
        allowed, quota = len(os.sched_getaffinity(0)), self.quota_cores()
        return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))

    def memory_bytes(self) -> int:
        """What the kernel has, 0 where it does not tell."""
        return (field_of(self.tree.text("proc/meminfo"), "MemTotal") or 0) * 1024

    def occupied_bytes(self) -> int | None:
        """The largest resident memory this process has had.

        Not `getrusage`: what that gives includes the parent's memory from before exec.
        """
        peak = field_of(self.tree.text("proc/self/status"), "VmHWM")
        return None if peak is None else peak * 1024

    @cached_property
    def _policies(self) -> tuple[Path, ...]:
        return cpufreq.policies(self.tree)

    @cached_property
    def _pinned_hz(self) -> dict[str, float]:
        """Of the first reading: a device that protects itself lowers both limits, and would seem pinned to those."""
        return cpufreq.pinned_hz(self.tree, self._policies)

    @cached_property
    def _groups(self) -> tuple[Path, ...]:
        return cgroups.cpu_groups(self.tree)

    def _temperatures_c(self) -> dict[str, float]:
        found = {name: self.tree.number(file) for name, file in self._thermometers.items()}
        return {
            f"temperature_c.{name}": milli / 1000
            for name, milli in found.items()
            if milli is not None and milli / 1000 > _SENSOR_OFF_C
        }

    @cached_property
    def _thermometers(self) -> dict[str, Path]:
        """Files by name; the second of a name is `acpitz-2`."""
        found: dict[str, Path] = {}
        times: Counter[str] = Counter()
        for name, file in (*_zones(self.tree), *_package_sensors(self.tree)):
            times[name] += 1
            found[name if times[name] == 1 else f"{name}-{times[name]}"] = file
        return found

    def _throttle_events(self) -> dict[str, float]:
        """Times that a core or package became too hot: over cores added up, of a package what its cores agree on."""
        found: dict[str, float] = {}
        for sign, together in self._throttle_files.items():
            counts = [
                max(values)
                for files in together
                if (values := [value for file in files if (value := self.tree.number(file)) is not None])
            ]
            if counts:
                found[f"throttle_events.{sign}"] = float(sum(counts))
        return found

    @cached_property
    def _throttle_files(self) -> dict[str, list[list[Path]]]:
        """By sign, the files that count the same events: one per core, all of a package."""
        found: dict[str, list[list[Path]]] = {}
        for sign, shared_by in (("core", "core_cpus_list"), ("package", "physical_package_id")):
            together: dict[str, list[Path]] = {}
            for file in self.tree.glob(f"{_CPUS}/cpu[0-9]*/thermal_throttle/{sign}_throttle_count"):
                cpu = file.parents[1]
                apart = cpu.name if sign == "core" else ""
                together.setdefault(self.tree.text(cpu / "topology" / shared_by) or apart, []).append(file)
            found[sign] = list(together.values())
        return found


def why(tree: Tree, part: str, otherwise: str) -> str:
    """The first file with this in its path that could not be read, and why not; else the other sentence."""
    found = (f"{path}: {reason}" for path, reason in tree.problems.items() if part in path)
    return next(found, otherwise)


def core_kinds(tree: Tree) -> dict[int, tuple[int, ...]]:
    """The numbers of cores by their capacity, fastest first, 1024 for the fastest; empty where the kernel has none."""
    found: dict[int, list[int]] = {}
    for file in tree.glob(f"{_CPUS}/cpu[0-9]*/cpu_capacity"):
        capacity, number = tree.number(file), file.parent.name[3:]
        if capacity is not None and number.isdecimal():
            found.setdefault(capacity, []).append(int(number))
    return {capacity: tuple(found[capacity]) for capacity in sorted(found, reverse=True)}


def descendants(tree: Tree, pid: int) -> set[int]:
    """The living processes that come from one, without itself."""
    return _below(_processes(tree), pid)


def tree_busy_s(tree: Tree, pid: int) -> float | None:
    """Processor seconds that a process, its living descendants and those they waited for have used; None without it."""
    processes = _processes(tree)
    if pid not in processes:
        return None
    return sum(processes[each][1] for each in {pid} | _below(processes, pid))


def _processes(tree: Tree) -> dict[int, tuple[int, float]]:
    """Parent and processor seconds of every process, with those of its children that have ended."""
    top = tree.path("proc")
    try:
        numbers = [name for name in os.listdir(top) if name.isascii() and name.isdigit()]
    except OSError:
        return {}
    found = {}
    for number in numbers:
        fields = _PROCESS.match(tree.text(top / number / "stat") or "")
        if fields:
            parent, *ticks = map(int, fields.groups())
            found[int(number)] = (parent, sum(ticks) / _TICKS_PER_S)
    return found


def _below(processes: Mapping[int, tuple[int, float]], pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for number, (parent, _) in processes.items():
        children.setdefault(parent, []).append(number)
    found: set[int] = set()
    waiting = children.get(pid, [])
    while waiting:
        found.update(waiting)
        waiting = [child for each in waiting for child in children.get(each, []) if child not in found]
    return found - {pid}


def _processor_time_s(text: str | None) -> dict[str, float]:
    """Busy and stolen seconds of all cores together, from the first line of /proc/stat; guests are in user time."""
    line = _STAT.match(text or "")
    if not line:
        return {}
    user, nice, system, *others = map(int, line[1].split())
    found = {"busy_s": (user + nice + system + sum(others[2:4])) / _TICKS_PER_S}
    if len(others) > 4:
        found["steal_s"] = others[4] / _TICKS_PER_S
    return found


def _memory_events(text: str | None) -> dict[str, float]:
    swapped = [field_of(text, "pswpin"), field_of(text, "pswpout")]
    killed = field_of(text, "oom_kill")
    found = {} if None in swapped else {"swapped_pages": float(sum(filter(None, swapped)))}
    return found if killed is None else {**found, "oom_kills": float(killed)}


def _zones(tree: Tree) -> Iterator[tuple[str, Path]]:
    for zone in tree.glob("sys/class/thermal/thermal_zone*"):
        kind = tree.text(zone / "type")
        if kind and not kind.lower().startswith(_CONSTANT_ZONES):
            yield kind, zone / "temp"


def _package_sensors(tree: Tree) -> Iterator[tuple[str, Path]]:
    for sensor in tree.glob("sys/class/hwmon/hwmon*"):
        wanted = _PACKAGE_SENSORS.get(tree.text(sensor / "name") or "")
        for file in tree.glob(f"sys/class/hwmon/{sensor.name}/temp*_label") if wanted else ():
            label = tree.text(file)
            if label and wanted and label.startswith(wanted):
                yield label, file.with_name(file.name.replace("_label", "_input"))
