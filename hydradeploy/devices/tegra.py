"""The sensors of a Jetson: files of the kernel, found by the names they give themselves, for their numbers move.

Power, on a chip named `ina3221` (three channels, mV and mA) or `ina238` (one, uW), JetPack 4 having mW of its own; the
GPU's clock and load; the memory's clock; and three kinds of signs that the device slows itself down. Sources: the
kernel's documentation of ina3221; Platform Power and Performance in NVIDIA's Jetson Linux Developer Guide.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from hydradeploy.devices.reading import Tree

_HWMON = "sys/class/hwmon"
_DEVFREQ = "sys/class/devfreq"
_THOR_GPU = "gpu-gpc-0"
_GPU = re.compile(rf"{_THOR_GPU}|[0-9a-f]+\.(gpu|g[a-z][0-9]+[a-z])")
_GPU_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/gpu.0/load",
)
_MEMORY_CLOCKS = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", f"{_DEVFREQ}/bwmgr/cur_freq")
_ALERT = "-throttle-alert"
_SURFACE = "hot-surface-alert"
_NVMAP = "sys/kernel/debug/nvmap/iovmm/clients"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NOT_CONNECTED = "NC"


class Total(NamedTuple):
    """Rails that together are all of the power, without overlap. A module is less than the board that carries it."""

    rails: tuple[str, ...]
    scope: str


# Inputs before sums. VDDQ_VDD2_1V8AO of the AGX Orin is left out: VIN_SYS_5V0 feeds it.
_TOTALS = (
    Total(("VIN",), "board"),  # Thor
    Total(("VDD_IN",), "module"),  # Orin Nano, Orin NX, Xavier NX, TX2
    Total(("POM_5V_IN",), "board"),  # Nano
    Total(("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "module"),  # AGX Orin
    Total(("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), "module"),  # Thor
    Total(("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), "module"),  # AGX Xavier
)


class Sensor(NamedTuple):
    """A quantity: the product of what its files say, divided by `per`; none where that is not in `least` to `most`."""

    name: str
    files: tuple[Path, ...]
    per: float = 1.0
    least: float = -math.inf
    most: float = math.inf

    def value(self, tree: Tree) -> float | None:
        numbers = [tree.number(file) for file in self.files]
        told = [number for number in numbers if number is not None]
        value = math.prod(told) / self.per
        return value if len(told) == len(numbers) and self.least <= value <= self.most else None

    def why_not(self, tree: Tree) -> str:
        """Why it gave nothing."""
        shown = [tree.shown(file) for file in self.files]
        found = (f"{tree.problems[path]} ({path})" for path in shown if path in tree.problems)
        return next(found, f"no measurement in {', '.join(shown)}")


class Located(NamedTuple):
    rails: tuple[Sensor, ...]
    gauges: tuple[Sensor, ...]
    counters: tuple[Sensor, ...]

    @property
    def all(self) -> tuple[Sensor, ...]:
        return (*self.rails, *self.gauges, *self.counters)


@dataclass
class Sensors:
    """All of them. They are looked for once, and again for as long as one is gone that had answered."""

    tree: Tree
    _answered: set[str] = field(default_factory=set)
    _lost: bool = False
    _total: Total | None = None

    def gauges(self) -> dict[str, float]:
        """`power_w.RAIL` and all of it, `power_w`; `load.gpu`, `clock_hz.*` and `pinned_hz.gpu`, `throttling.*`."""
        self._look_again()
        rails = self._values(self._located.rails)
        found = rails | self._values(self._located.gauges) | self._pinned_hz
        total = self._trusted(rails)
        parts = [rails.get(f"power_w.{rail}") for rail in total.rails] if total else [None]
        told = [part for part in parts if part is not None]
        return {**found, "power_w": sum(told)} if len(told) == len(parts) else found

    def counters(self) -> dict[str, float]:
        """`throttle_events.*`, `overcurrent_events.oc3`."""
        return self._values(self._located.counters)

    def meter(self) -> str | None:
        """What `power_w` covers, as `VDD_IN, module`; None where the rails do not add up to anything known."""
        total = self._trusted(self._values(self._located.rails))
        return f"{' + '.join(total.rails)}, {total.scope}" if total else None

    def missing(self) -> dict[str, str]:
        """Why a sensor gives nothing, by the name of its value, and why there is no `energy` or `throttling`."""
        there = {**self.gauges(), **self.counters()}
        silent = {sensor.name: sensor.why_not(self.tree) for sensor in self._located.all if sensor.name not in there}
        for name, otherwise in (
            ("clock_hz.gpu", f"no GPU below /{_DEVFREQ}"),
            ("load.gpu", "no load file of the GPU; Thor has none"),
        ):
            if name not in there:
                silent.setdefault(name, otherwise)
        if "power_w" not in there:
            silent["energy"] = self._why_no_power(there)
        if not any(name.startswith(("throttle_events.", "throttling.")) for name in there):
            silent["throttling"] = f"no soctherm_oc below /{_HWMON}, and none of *{_ALERT} answers"
        return silent

    def pinned(self) -> bool | None:
        """Whether the GPU's clock is; None where nothing tells."""
        low, high = self._limits_hz()
        return low == high if low and high else None

    def forget_pinned(self) -> None:
        """Look again which clock the GPU is pinned to."""
        self.__dict__.pop("_pinned_hz", None)

    @cached_property
    def _located(self) -> Located:
        return Located(tuple(_rails(self.tree)), tuple(_gauges(self.tree)), tuple(_counters(self.tree)))

    @cached_property
    def _pinned_hz(self) -> dict[str, float]:
        """Of the first reading: a device that protects itself lowers both limits, and would seem pinned to that."""
        low, high = self._limits_hz()
        return {"pinned_hz.gpu": float(low)} if low and low == high else {}

    def _limits_hz(self) -> tuple[int | None, int | None]:
        gpu = _gpu(self.tree)
        return (self.tree.number(gpu / "min_freq"), self.tree.number(gpu / "max_freq")) if gpu else (None, None)

    def _values(self, sensors: Sequence[Sensor]) -> dict[str, float]:
        found = {}
        for sensor in sensors:
            value = sensor.value(self.tree)
            if value is not None:
                found[sensor.name] = value
            elif sensor.name in self._answered and not all(os.path.exists(file) for file in sensor.files):
                self._lost = True
        self._answered.update(found)
        return found

    def _look_again(self) -> None:
        if self._lost:
            self.__dict__.pop("_located", None)
            self._lost = not self._answered.issubset(sensor.name for sensor in self._located.all)

    def _trusted(self, rails: dict[str, float]) -> Total | None:
        """The first total that was complete once: afterwards a rail that fails makes no other total of it."""
        if self._total is None:
            names = {name.partition(".")[2] for name in rails}
            self._total = next((total for total in _TOTALS if names.issuperset(total.rails)), None)
        return self._total

    def _why_no_power(self, there: dict[str, float]) -> str:
        silent = [sensor.why_not(self.tree) for sensor in self._located.rails if sensor.name not in there]
        known = [sensor.name.partition(".")[2] for sensor in self._located.rails]
        if silent:
            return silent[0]
        if known:
            return f"the rails {', '.join(known)} are not known to add up to the whole"
        return f"no ina3221 and no ina238 below /{_HWMON}"


def is_thor(tree: Tree) -> bool:
    return os.path.isdir(tree.path(f"{_DEVFREQ}/{_THOR_GPU}"))


def nvmap_bytes(tree: Tree, pid: int) -> int | None:
    """Memory that a process holds as buffers of the GPU and other engines; None without the table, which is root's.

    The lines are client, process, its number, on older kernels a share, and the size; a process may have several.
    """
    text = tree.text(_NVMAP)
    if not text or text.split()[:3] != ["CLIENT", "PROCESS", "PID"]:
        return None
    rows = re.findall(rf"\s{pid}[ \t]+(?:[0-9]+[KMG][ \t]+)?([0-9]{{1,18}})([KMG])[ \t]*$", text, re.MULTILINE)
    return sum(int(size) * _UNITS[unit] for size, unit in rows)


def _rails(tree: Tree) -> Iterator[Sensor]:
    """Channels 1 to 3 of an ina3221: 4 to 6 are voltages across shunts, 7 is their sum."""
    found: dict[str, Sensor] = {}
    for chip in tree.glob(f"{_HWMON}/hwmon*"):
        kind = tree.text(chip / "name") or ""
        if kind == "ina3221":
            for n in (1, 2, 3):
                files = (chip / f"in{n}_input", chip / f"curr{n}_input")
                _add(found, tree.text(chip / f"in{n}_label"), files, 1e6)
        elif kind.startswith("ina2"):
            # Mainline's driver gives no label; on Thor this chip is at the board's input.
            label = tree.text(chip / "in1_label") or ("VIN" if is_thor(tree) else kind)
            _add(found, label, (chip / "power1_input",), 1e6)
    for file in tree.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-2]"):
        _add(found, tree.text(file), (file.with_name(f"in_power{file.name[-1]}_input"),), 1e3)
    yield from found.values()


def _add(found: dict[str, Sensor], label: str | None, files: tuple[Path, ...], per: float) -> None:
    if label and label != _NOT_CONNECTED and label.isprintable():
        found.setdefault(label, Sensor(f"power_w.{label}", files, per))


def _gpu(tree: Tree) -> Path | None:
    return next((path for path in tree.glob(f"{_DEVFREQ}/*") if _GPU.fullmatch(path.name)), None)


def _gauges(tree: Tree) -> Iterator[Sensor]:
    gpu = _gpu(tree)
    # A clock of 0 is an engine without power, not a slow one.
    if gpu:
        yield Sensor("clock_hz.gpu", (gpu / "cur_freq",), least=1)
    loads = [*([gpu / "device/load"] if gpu else []), *map(tree.path, _GPU_LOADS)]
    for name, files, per, least, most in (
        ("load.gpu", loads, 1000.0, 0.0, 1.0),
        ("clock_hz.emc", [*map(tree.path, _MEMORY_CLOCKS)], 1.0, 1.0, math.inf),
    ):
        there = [file for file in files if os.path.exists(file)]
        answering = [file for file in there if tree.number(file) is not None]
        if there:
            yield Sensor(name, ((answering or there)[0],), per, least, most)
    for device in tree.glob("sys/class/thermal/cooling_device*"):
        # A fan or a clock's limit at work is ordinary operation.
        kind = tree.text(device / "type") or ""
        if kind == _SURFACE or (kind.endswith(_ALERT) and kind.isprintable()):
            yield Sensor(f"throttling.{kind}", (device / "cur_state",), least=0)


def _counters(tree: Tree) -> Iterator[Sensor]:
    """Since boot. oc1 is under-voltage, oc2 average over-current, oc3 short peaks, which are ordinary in fast modes."""
    for chip in tree.glob(f"{_HWMON}/hwmon*"):
        if tree.text(chip / "name") == "soctherm_oc":
            for name in ("throttle_events.oc1", "throttle_events.oc2", "overcurrent_events.oc3"):
                yield Sensor(name, (chip / f"{name[-3:]}_event_cnt",), least=0)
    for file in tree.glob(f"sys/devices/platform/*{_ALERT}/thermal_trip_event"):
        yield Sensor(f"throttle_events.{file.parent.name}", (file,), least=0)
