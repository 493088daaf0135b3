"""A line of tegrastats, and the kernel's files that would have led to it. Knows nothing of the readers under test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

Files = dict[str, str]
_MEMORY = ("RAM", "SWAP", "IRAM")


@dataclass
class Line:
    """`rail_mw` without channels that are not connected, `temperature_c` with those that are off."""

    rail_mw: dict[str, int] = field(default_factory=dict)
    temperature_c: dict[str, float] = field(default_factory=dict)
    load_percent: int | None = None
    gpu_mhz: int | None = None
    cpu_mhz: int | None = None


def parse(text: str) -> Line:
    """The present values: those behind the slashes are averages and maxima since tegrastats was started."""
    line, words = Line(), text.split()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, at, value = word.partition("@")
        if at and value.split("/")[0].endswith("C"):
            line.temperature_c[name] = float(value.split("/")[0][:-1])
        elif word == "GR3D_FREQ":
            load, _, clocks = following.partition("@")
            line.load_percent = int(load.rstrip("%")) if load else None
            first = clocks.strip("[]").split(",")[0]
            line.gpu_mhz = int(first) if first else None
        elif word == "CPU":
            cores, _, all_of_them = following.rpartition("]")
            first = cores.strip("[").split(",")[0].partition("@")[2] or all_of_them.lstrip("@")
            line.cpu_mhz = int(first)
        elif "/" in following and following[0].isdigit() and word not in (*_MEMORY, "NC") and word.isupper():
            line.rail_mw[word] = int(following.split("/")[0].removesuffix("mW"))
    return line


def files(line: Line) -> Files:
    """What sysfs would have held: rails on the chips of their boards, numbers of hwmon as they come."""
    found: Files = {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n"}
    thor, nano = "VIN" in line.rail_mw, "POM_5V_IN" in line.rail_mw
    found |= _nano_rails(line.rail_mw) if nano else _rails(line.rail_mw)
    for number, (name, celsius) in enumerate(line.temperature_c.items()):
        zone = f"sys/class/thermal/thermal_zone{number}/"
        found |= {zone + "type": zone_type(name), zone + "temp": str(round(celsius * 1000))}
    gpu = "gpu-gpc-0" if thor else "57000000.gpu" if nano else "17000000.gpu"
    if line.gpu_mhz is not None:
        found[f"sys/class/devfreq/{gpu}/cur_freq"] = str(line.gpu_mhz * 1_000_000)
    if line.load_percent is not None:
        found[f"sys/devices/{'' if nano else 'platform/'}gpu.0/load"] = str(line.load_percent * 10)
    found["sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq"] = str((line.cpu_mhz or 0) * 1000)
    return found


def zone_type(name: str) -> str:
    """Newer releases have lower case."""
    return f"{name}-thermal" if name.islower() else f"{name}-therm"


def _rails(rail_mw: dict[str, int]) -> Files:
    found: Files = {}
    channels = [name for name in rail_mw if name != "VIN"]
    for number, start in enumerate(range(0, len(channels), 3)):
        chip = f"sys/class/hwmon/hwmon{9 + number}/"
        found[chip + "name"] = "ina3221"
        found |= {f"{chip}in7_label": "sum of shunt voltages", f"{chip}in7_input": "760"}
        for channel, name in enumerate(channels[start : start + 3], start=1):
            found |= {
                f"{chip}in{channel}_label": name,
                f"{chip}in{channel}_input": "1000",
                f"{chip}curr{channel}_input": str(rail_mw[name]),
                f"{chip}in{channel + 3}_input": "700",
            }
        for channel in range(len(channels[start : start + 3]) + 1, 4):
            found[f"{chip}in{channel}_label"] = "NC"
    if "VIN" in rail_mw:
        chip = "sys/class/hwmon/hwmon2/"
        found |= {chip + "name": "ina238", chip + "in1_label": "VIN", chip + "power1_input": str(rail_mw["VIN"] * 1000)}
    return found


def _nano_rails(rail_mw: dict[str, int]) -> Files:
    chip = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
    found: Files = {}
    for channel, (name, milliwatts) in enumerate(rail_mw.items()):
        found |= {f"{chip}rail_name_{channel}": name, f"{chip}in_power{channel}_input": str(milliwatts)}
    return found


def read(name: str) -> Line:
    """A line among the fixtures."""
    fixtures = Path(__file__).parents[1] / "fixtures" / "devices" / "tegrastats"
    return parse((fixtures / f"{name}.txt").read_text(encoding="ascii"))
