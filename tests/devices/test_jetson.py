"""Jetsons from recorded and constructed files, whole and damaged, and the programs that pin their clocks."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydradeploy.devices import machine
from hydradeploy.devices.jetson import Jetson
from hydradeploy.errors import ExitCode, MissingError
from tests.devices import tegrastats
from tests.devices.trees import refuse, tree

FIXTURES = Path(__file__).parents[1] / "fixtures" / "devices"
BOARDS = ("orin-nano", "agx-orin", "thor")
HWMON = "sys/class/hwmon"
ZONE = "sys/class/thermal/thermal_zone"
COOLING = "sys/class/thermal/cooling_device"
NVMAP = "sys/kernel/debug/nvmap/iovmm/clients"


class Programs:
    """Answers for nvpmodel and jetson_clocks; those in `failing`, by their first argument, fail. Keeps what was run."""

    def __init__(self, mode: str | None = None, failing: Sequence[str] = ()) -> None:
        self.mode, self.failing, self.ran = mode, failing, []

    def __call__(self, words: Sequence[str]) -> str:
        self.ran.append(list(words))
        program, *arguments = words
        if program == "nvpmodel" and self.mode is not None:
            return self.mode
        if program == "nvpmodel" or (arguments or ["set"])[0] in self.failing:
            raise MissingError(f"there is no program {program} here")
        return ""


def board(name: str, **programs) -> Jetson:
    root = FIXTURES / "jetson" / name
    told = root / "nvpmodel-q.txt"
    programs.setdefault("mode", told.read_text() if told.exists() else None)
    return Jetson(root, Programs(**programs))


def copied(name: str, to: Path) -> Path:
    return shutil.copytree(FIXTURES / "jetson" / name, to / name)


def bare(root: Path, files=None) -> Jetson:
    return Jetson(tree(root, files or {}), Programs())


def gauges(jetson: Jetson, start: str) -> dict[str, float]:
    return {name: value for name, value in jetson.read(1.0).gauges.items() if name.startswith(start)}


# Who it is


@pytest.mark.parametrize(
    ("name", "module", "release", "mode", "bytes_"),
    [
        (
            "orin-nano",
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            "R36.4.3",
            "MAXN_SUPER",
            7803016 * 1024,
        ),
        ("agx-orin", "NVIDIA Jetson AGX Orin Developer Kit", "R36.4.3", "MAXN", 64324608 * 1024),
        ("thor", "NVIDIA Jetson AGX Thor Developer Kit", "R38.4.0", None, 128790092 * 1024),
    ],
)
def test_each_board_tells_its_module_its_release_and_its_mode(name, module, release, mode, bytes_):
    found = board(name)
    device, conditions = found.identity(), found.conditions({"onnxruntime": "1.30"})
    assert found.why_not() is None
    assert (device.kind, device.name, device.memory_bytes) == ("jetson", module, bytes_)
    assert (device.architecture, device.instruction_set) == ("aarch64", "aarch64")
    assert conditions.os.endswith(f", L4T {release}")
    assert (conditions.power_mode, conditions.governor, conditions.clocks) == (mode, "schedutil", "floating")
    assert conditions.software == {"onnxruntime": "1.30"}
    assert found.processors == ("cpu", "cuda")


def test_the_instruction_set_and_the_cores_are_those_of_the_tree(tmp_path):
    found = bare(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\n",
            "sys/devices/system/cpu/present": "0-3,6,8-11\n",
        },
    ).identity()
    assert found.instruction_set == "aarch64-asimddp"
    assert found.cores == 9


@pytest.mark.parametrize(
    ("files", "is_one"),
    [
        ({"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref\n"}, True),
        ({"etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref\n"}, True),
        ({"proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0"}, True),
        ({"proc/device-tree/model": "NVIDIA IGX Orin Developer Kit\0"}, True),
        ({"proc/device-tree/model": "NVIDIA DGX Spark\0"}, False),
        ({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}, False),
        ({"proc/device-tree/model": "FriendlyElec NanoPi Nano\0"}, False),
        ({"etc/nv_tegra_release": "something else\n"}, False),
        ({"etc/nv_tegra_release": ""}, False),
        ({}, False),
    ],
)
def test_what_is_not_a_jetson_says_what_was_looked_for(tmp_path, files, is_one):
    reason = bare(tmp_path, files).why_not()
    assert (reason is None) is is_one
    if reason is not None:
        assert "/etc/nv_tegra_release" in reason
        assert "/proc/device-tree/model" in reason
        assert files.get("proc/device-tree/model", "").rstrip("\0") in reason


def test_another_machine_is_refused_with_what_was_looked_for(monkeypatch):
    monkeypatch.setattr("hydradeploy.devices.jetson.MACHINE", Jetson(Path("/nonexistent")))
    with pytest.raises(MissingError, match="jetson: looked for /etc/nv_tegra_release") as refused:
        machine("jetson")
    assert refused.value.exit_code == ExitCode.MISSING == 8


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER"),
        ("NV Power Mode: MAXN_SUPER\nMODE ID: 2\n", "MAXN_SUPER"),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_15W\n0\n", "MODE_15W"),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_20W_6CORE \r\n8\n", "MODE_20W_6CORE"),
        ("NV Power Mode: 15W\n", "15W"),
        ("NV Power Mode:\n2\n", None),
        ("2\n", None),
        ("", None),
    ],
)
def test_the_power_mode_is_a_name_and_never_a_number(tmp_path, said, mode):
    found = Jetson(tmp_path, Programs(said))
    assert found.conditions({}).power_mode == mode
    assert ("power_mode" in found.missing()) is (mode is None)


def test_without_nvpmodel_there_is_no_power_mode_and_the_reason_is_told(tmp_path):
    found = bare(tmp_path)
    assert found.conditions({}).power_mode is None
    assert found.missing()["power_mode"] == "there is no program nvpmodel here"


def limits(low: int, high: int, gpu_low: int | None = None, gpu_high: int | None = None) -> dict[str, str]:
    files = {f"sys/devices/system/cpu/cpufreq/policy0/scaling_{end}_freq": "1728000" for end in ("min", "max")}
    files |= {
        "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq": str(low),
        "sys/devices/system/cpu/cpufreq/policy4/scaling_max_freq": str(high),
    }
    for end, value in (("min", gpu_low), ("max", gpu_high)):
        if value is not None:
            files[f"sys/class/devfreq/17000000.ga10b/{end}_freq"] = str(value)
    return files


@pytest.mark.parametrize(
    ("files", "clocks", "pinned"),
    [
        (limits(1728000, 1728000, 1020000000, 1020000000), "pinned", {"policy0", "policy4", "gpu"}),
        (limits(729600, 1728000, 1020000000, 1020000000), "floating", {"policy0", "gpu"}),
        (limits(1728000, 1728000, 306000000, 1020000000), "floating", {"policy0", "policy4"}),
        (limits(1728000, 1728000), None, {"policy0", "policy4"}),
        (limits(1728000, 1728000, 1020000000), None, {"policy0", "policy4"}),
        (limits(1728000, 1728000, 0, 0), None, {"policy0", "policy4"}),
        (limits(729600, 1728000), "floating", {"policy0"}),
        ({}, None, set()),
    ],
)
def test_clocks_are_pinned_only_where_those_of_every_cluster_and_of_the_gpu_are(tmp_path, files, clocks, pinned):
    found = bare(tmp_path, files)
    assert found.conditions({}).clocks == clocks
    assert {name.partition(".")[2] for name in gauges(found, "pinned_hz.")} == pinned


def test_the_gpu_stays_pinned_to_what_it_was_pinned_to_when_a_hot_device_lowers_both_limits(tmp_path):
    found = bare(tmp_path, limits(1728000, 1728000, 1020000000, 1020000000))
    assert gauges(found, "pinned_hz.gpu") == {"pinned_hz.gpu": 1020e6}
    tree(tmp_path, limits(1728000, 1728000, 510000000, 510000000))
    assert gauges(found, "pinned_hz.gpu") == {"pinned_hz.gpu": 1020e6}


# What each board reads


def test_orin_nano():
    found = board("orin-nano")
    reading = found.read(3.5)
    assert reading.at_s == 3.5
    assert gauges(found, "power_w") == pytest.approx(
        {
            "power_w.VDD_IN": 5.016 * 1.520,
            "power_w.VDD_CPU_GPU_CV": 5.016 * 0.104,
            "power_w.VDD_SOC": 5.008 * 0.288,
            "power_w": 5.016 * 1.520,
        }
    )
    assert found.meter() == "VDD_IN, module"
    assert gauges(found, "temperature_c.") == {
        "temperature_c.cpu-thermal": 48.468,
        "temperature_c.gpu-thermal": 48.562,
        "temperature_c.soc0-thermal": 48.062,
        "temperature_c.soc1-thermal": 49.156,
        "temperature_c.soc2-thermal": 47.531,
        "temperature_c.tj-thermal": 49.156,
    }
    assert gauges(found, "load.") == {"load.gpu": 0.345}
    assert gauges(found, "clock_hz.") == {
        "clock_hz.policy0": 729.6e6,
        "clock_hz.policy4": 729.6e6,
        "clock_hz.gpu": 1020e6,
        "clock_hz.emc": 3199e6,
    }
    signs = gauges(found, "throttling.")
    assert len(signs) == 9
    assert not any(signs.values())
    assert reading.gauges["available_bytes"] == 5000000 * 1024
    events = {name: value for name, value in reading.counters.items() if "events." in name}
    assert {name: value for name, value in events.items() if ".oc" in name} == {
        "throttle_events.oc1": 0,
        "throttle_events.oc2": 15,
        "overcurrent_events.oc3": 37,
    }
    domains = {"cpu", "gpu", "cv0", "cv1", "cv2", "soc0", "soc1", "soc2"}
    assert {name for name in events if ".oc" not in name} == {
        f"throttle_events.{each}-throttle-alert" for each in domains
    }


def test_agx_orin_leaves_out_the_rail_that_another_feeds():
    found = board("agx-orin")
    assert gauges(found, "power_w.").keys() == {
        "power_w.VDD_GPU_SOC",
        "power_w.VDD_CPU_CV",
        "power_w.VIN_SYS_5V0",
        "power_w.VDDQ_VDD2_1V8AO",
    }
    assert found.read(0.0).gauges["power_w"] == pytest.approx(12.008 * 0.428 + 12.016 * 0.272 + 5.0 * 1.1)
    assert found.meter() == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0, module"
    assert "clock_hz.emc" not in gauges(found, "clock_hz.")


def test_thor_is_measured_at_the_board_and_has_no_load_file():
    found = board("thor")
    assert found.read(0.0).gauges["power_w"] == 19.78
    assert found.meter() == "VIN, board"
    assert gauges(found, "load.") == {}
    assert "load file" in found.missing()["load.gpu"]
    assert "temperature_c.gpu-thermal" not in gauges(found, "temperature_c.")
    # 18 of 169 on devfreq-gpu-gpc-0 is ordinary clock scaling.
    assert gauges(found, "throttling.").keys() == {
        f"throttling.{each}-throttle-alert" for each in ("cpu", "gpu", "soc012", "soc345")
    }
    assert gauges(found, "clock_hz.") == {"clock_hz.policy0": 972e6, "clock_hz.gpu": 314e6, "clock_hz.emc": 2750e6}
    assert found.read(0.0).counters["overcurrent_events.oc3"] == 179


def test_thor_without_its_boards_chip_is_measured_at_the_module(tmp_path):
    root = copied("thor", tmp_path)
    shutil.rmtree(root / HWMON / "hwmon2")
    found = Jetson(root, Programs())
    assert found.meter() == "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0, module"
    assert found.read(0.0).gauges["power_w"] == pytest.approx(13.484435)


def test_a_board_that_is_measured_as_a_whole_is_not_measured_as_a_module_when_its_chip_fails(tmp_path):
    root = copied("thor", tmp_path)
    found = Jetson(root, Programs())
    assert found.read(0.0).gauges["power_w"] == 19.78
    (root / HWMON / "hwmon2/power1_input").write_text("")
    assert gauges(found, "power_w").keys() == {"power_w.VDD_GPU", "power_w.VDD_CPU_SOC_MSS", "power_w.VIN_SYS_5V0"}
    assert found.meter() == "VIN, board"
    assert "power1_input" in found.missing()["energy"]


# All lines of tegrastats: rails, total in mW, temperatures in Celsius, load in per cent, clock of the GPU in MHz

LINES = [
    ("nano-r32-user", 3, 933, {"pll": 20.5, "cpu": 23, "gpu": 22.5, "ao": 27, "thermal": 22.5}, 7, None),
    (
        "nano-r32-root-recorded",
        3,
        1057,
        {"pll": 26, "cpu": 29.5, "iwlwifi": 33, "gpu": 29, "ao": 38.5, "thermal": 29.5},
        0,
        76,
    ),
    (
        "orin-nano-jp6-user",
        3,
        4761,
        {"cpu": 48.468, "soc2": 47.531, "soc0": 48.062, "gpu": 48.562, "tj": 49.156, "soc1": 49.156},
        0,
        None,
    ),
    (
        "orin-nano-jp6-root",
        2,
        4428,
        {"cpu": 56.281, "soc2": 55.843, "soc0": 54.093, "gpu": 55.843, "tj": 56.281, "soc1": 56.187},
        0,
        305,
    ),
    (
        "agx-orin-jp5-root-recorded",
        4,
        2399 + 400 + 4032,
        {
            "cpu": 42.593,
            "tboard": 32,
            "soc2": 39.343,
            "tdiode": 33.25,
            "soc0": 39.375,
            "tj": 42.593,
            "soc1": 40.468,
        },
        0,
        0,
    ),
    (
        "agx-orin-jp7.2-root",
        3,
        5139 + 3268 + 5500,
        {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625},
        12,
        1300,
    ),
    (
        "thor-r38.4-idle-recorded",
        4,
        19780,
        {"cpu": 37.343, "tj": 38.875, "soc012": 37.468, "gpu": 38.875, "soc345": 37.406},
        None,
        314,
    ),
    ("thor-r39-idle", 2, 28906, {"cpu": 49.75, "tj": 51.218, "gpu": 51.218}, None, 1574),
    (
        "thor-r39-loaded",
        4,
        124486,
        {"cpu": 58.25, "tj": 66.625, "gpu": 56.937, "soc012": 55.375, "soc345": 55.812},
        87,
        1574,
    ),
    (
        "thor-r39.2-loaded-recorded",
        4,
        87426,
        {"cpu": 60.406, "tj": 63.281, "soc012": 58.468, "gpu": 62.906, "soc345": 63.281},
        None,
        None,
    ),
]


def test_every_line_is_among_those_tested():
    assert {line[0] for line in LINES} == {path.stem for path in (FIXTURES / "tegrastats").iterdir()}


@pytest.mark.parametrize(("name", "rails", "total_mw", "celsius", "load", "mhz"), LINES)
def test_the_files_behind_a_line_of_tegrastats_read_as_the_line_says(
    tmp_path, name, rails, total_mw, celsius, load, mhz
):
    line = tegrastats.read(name)
    found = bare(tmp_path, tegrastats.files(line))
    each = {f"power_w.{rail}": milliwatts / 1000 for rail, milliwatts in line.rail_mw.items()}
    assert len(each) == rails
    assert gauges(found, "power_w") == pytest.approx({**each, "power_w": total_mw / 1000})
    assert found.meter() is not None
    read = gauges(found, "temperature_c.")
    assert {
        zone.removeprefix("temperature_c.").rpartition("-therm")[0]: value for zone, value in read.items()
    } == celsius
    assert gauges(found, "load.") == ({} if load is None else {"load.gpu": load / 100})
    # 0 MHz is a GPU without power.
    assert found.read(0.0).gauges.get("clock_hz.gpu") == (mhz * 1e6 if mhz else None)
    assert found.read(0.0).gauges["clock_hz.policy0"] == line.cpu_mhz * 1e6


# What boards do besides


def test_rails_that_are_not_known_to_add_up_make_no_total(tmp_path):
    chip = f"{HWMON}/hwmon4/"
    files = {chip + "name": "ina3221"}
    for channel, label in ((1, "VDD_A"), (2, "VDD_B")):
        files |= {f"{chip}in{channel}_label": label, f"{chip}in{channel}_input": "5000"}
        files |= {f"{chip}curr{channel}_input": "100"}
    found = bare(tmp_path, files)
    assert gauges(found, "power_w") == {"power_w.VDD_A": 0.5, "power_w.VDD_B": 0.5}
    assert found.meter() is None
    assert found.missing()["energy"] == "the rails VDD_A, VDD_B are not known to add up to the whole"


def test_a_chip_without_a_label_is_the_input_on_thor_and_unknown_elsewhere(tmp_path):
    chip = {f"{HWMON}/hwmon1/name": "ina238", f"{HWMON}/hwmon1/power1_input": "12500000"}
    elsewhere = bare(tmp_path / "elsewhere", chip)
    assert gauges(elsewhere, "power_w") == {"power_w.ina238": 12.5}
    assert elsewhere.meter() is None
    thor = bare(tmp_path / "thor", chip | {"sys/class/devfreq/gpu-gpc-0/cur_freq": "314000000"})
    assert gauges(thor, "power_w") == {"power_w.VIN": 12.5, "power_w": 12.5}


def test_a_channel_with_a_label_and_nothing_to_read_is_missing_with_the_reason(tmp_path):
    root = copied("orin-nano", tmp_path)
    (root / HWMON / "hwmon1/in1_input").unlink()
    found = Jetson(root, Programs())
    assert gauges(found, "power_w").keys() == {"power_w.VDD_CPU_GPU_CV", "power_w.VDD_SOC"}
    assert found.meter() is None
    assert "/sys/class/hwmon/hwmon1/in1_input" in found.missing()["energy"]
    assert "power_w.VDD_IN" in found.missing()


def test_a_rail_may_read_0_or_less_and_is_not_missing_for_that(tmp_path):
    root = copied("thor", tmp_path)
    (root / HWMON / "hwmon1/curr1_input").write_text("-4\n")
    assert gauges(Jetson(root, Programs()), "power_w.VDD_GPU") == {"power_w.VDD_GPU": pytest.approx(-0.07848)}


def test_a_sensor_that_is_off_or_a_constant_is_no_temperature(tmp_path):
    files = {}
    for number, (kind, value) in enumerate(
        [("cv0-thermal", "-256000"), ("PMIC-Die", "100000"), ("CPU-therm", "42593"), ("gpu-thermal", ""), ("", "41000")]
    ):
        files |= {f"{ZONE}{number}/type": kind, f"{ZONE}{number}/temp": value}
    assert gauges(bare(tmp_path, files), "temperature_c.") == {"temperature_c.cpu-therm": 42.593}


def test_only_alerts_are_throttling(tmp_path):
    files = {}
    for number, (kind, state) in enumerate(
        [
            ("pwm-fan", 2),
            ("devfreq-gpu-gpc-0", 18),
            ("gpu-throttle-alert", 1),
            ("hot-surface-alert", 1),
            ("cpufreq-cpu0", 3),
        ]
    ):
        files |= {f"{COOLING}{number}/type": f"{kind}\n", f"{COOLING}{number}/cur_state": f"{state}\n"}
    assert gauges(bare(tmp_path, files), "throttling.") == {
        "throttling.gpu-throttle-alert": 1,
        "throttling.hot-surface-alert": 1,
    }


@pytest.mark.parametrize(("text", "load"), [("0", 0.0), ("1000", 1.0), ("1001", None), ("-1", None), ("busy", None)])
def test_a_load_is_a_fraction_or_none(tmp_path, text, load):
    found = bare(tmp_path, {"sys/devices/gpu.0/load": text})
    assert found.read(0.0).gauges.get("load.gpu") == load
    assert ("load.gpu" in found.missing()) is (load is None)


# Damage


def eagain(path: Path) -> int:
    """A file whose read answers EAGAIN, as that of a sensor without power; returns what to close."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


@pytest.mark.parametrize("name", BOARDS)
def test_zones_that_answer_eagain_are_missing_with_the_reason_and_the_others_stay(tmp_path, name):
    root = copied(name, tmp_path)
    before = Jetson(root, Programs()).read(0.0)
    held = [eagain(path.parent / "temp") for path in root.glob(f"{ZONE}*/type") if path.read_text()[:2] in ("gp", "cv")]
    try:
        found = Jetson(root, Programs())
        after, missing = found.read(0.0), found.missing()
    finally:
        for file in held:
            os.close(file)
    assert before.gauges.items() - after.gauges.items() <= {
        ("temperature_c.gpu-thermal", before.gauges.get("temperature_c.gpu-thermal"))
    }
    assert after.counters == before.counters
    assert held
    assert missing["temperature_c.gpu-thermal"].startswith("the sensor is off (/sys/class/thermal/thermal_zone1/temp")


@pytest.mark.parametrize("name", BOARDS)
def test_numbers_of_hwmon_zones_and_cooling_devices_may_be_any(tmp_path, name):
    root = copied(name, tmp_path)
    before = Jetson(root, Programs())
    reading, meter = before.read(0.0), before.meter()
    for pattern in (f"{HWMON}/hwmon*", f"{ZONE}*", f"{COOLING}*"):
        paths = sorted(root.glob(pattern))
        for path in paths:
            path.rename(path.with_name("aside-" + path.name))
        for path, other in zip(paths, reversed(paths), strict=True):
            path.with_name("aside-" + path.name).rename(other.with_name(other.name.replace("device", "device1")))
    after = Jetson(root, Programs())
    assert (after.read(0.0), after.meter()) == (reading, meter)


@pytest.mark.parametrize("name", BOARDS)
def test_chips_that_come_back_under_another_number_are_found_again(tmp_path, name):
    root = copied(name, tmp_path)
    found = Jetson(root, Programs())
    before = found.read(0.0)
    for chip in list((root / HWMON).iterdir()):
        chip.rename(chip.with_name(f"gone-{chip.name}"))
    for reading in (found.read(1.0), found.read(2.0), found.read(3.0)):
        assert not any(name.startswith("power_w") for name in reading.gauges)
    for number, chip in enumerate(sorted((root / HWMON).iterdir())):
        chip.rename(chip.with_name(f"hwmon{40 + number}"))
    after = found.read(0.0)
    assert (after.gauges, after.counters) == (before.gauges, before.counters)


@pytest.mark.parametrize(
    ("path", "quantity", "lost"),
    [
        (f"{HWMON}/hwmon1/in1_input", "energy", {"power_w", "power_w.VDD_IN"}),
        (f"{HWMON}/hwmon3/oc3_event_cnt", "overcurrent_events.oc3", {"overcurrent_events.oc3"}),
        ("sys/class/devfreq/17000000.gpu/cur_freq", "clock_hz.gpu", {"clock_hz.gpu"}),
        ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "clock_hz.emc", {"clock_hz.emc"}),
        (f"{COOLING}3/cur_state", "throttling.gpu-throttle-alert", {"throttling.gpu-throttle-alert"}),
        ("proc/meminfo", "memory", {"available_bytes"}),
    ],
)
def test_what_needs_permission_is_missing_with_that_reason_and_is_never_0(tmp_path, monkeypatch, path, quantity, lost):
    root = copied("orin-nano", tmp_path)
    before = Jetson(root, Programs()).read(0.0)
    refuse(monkeypatch, root / path, errno.EACCES)
    found = Jetson(root, Programs())
    after = found.read(0.0)
    assert {**before.gauges, **before.counters}.keys() - {**after.gauges, **after.counters}.keys() == lost
    assert (after.gauges.items() | after.counters.items()) <= (before.gauges.items() | before.counters.items())
    if quantity != "memory":
        assert found.missing()[quantity] == f"no permission (/{path})"
    else:
        assert quantity in found.missing()


def test_an_empty_root_tells_nothing_but_why(tmp_path):
    found = bare(tmp_path)
    reading = found.read(0.0)
    assert (reading.gauges, reading.counters) == ({}, {})
    assert (found.meter(), found.occupied_bytes()) == (None, None)
    assert found.identity().cores == 0
    assert found.identity().name == "Jetson"
    wanted = {"energy", "clock_hz.gpu", "load.gpu", "throttling", "temperature", "memory", "power_mode"}
    assert wanted <= found.missing().keys()
    assert found.missing()["energy"] == "no ina3221 and no ina238 below /sys/class/hwmon"


ALL_FILES = {
    name: sorted(str(path.relative_to(FIXTURES / "jetson" / name)) for path in (FIXTURES / "jetson" / name).rglob("*"))
    for name in BOARDS
}
TOTALS_W = {"orin-nano": {7.62432}, "agx-orin": {13.907776}, "thor": {19.78, 13.484435}}
# No digits: those might be a value as well as any.
GARBAGE = st.one_of(
    (st.binary(max_size=40) | st.text(max_size=40).map(str.encode)).map(
        lambda content: content.translate(None, b"0123456789")
    ),
    st.sampled_from(
        [b"", b"\0", b"N/A\n", b"-", b"nan", b"inf", b"0x10", b"1e3", b"CLIENT PROCESS PID SIZE\n", b"9" * 30]
    ),
)
DAMAGE = st.sampled_from(BOARDS).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.tuples(st.sampled_from(ALL_FILES[name]), st.none() | GARBAGE), min_size=1, max_size=12),
    )
)


def damage(root: Path, path: str, content: bytes | None) -> None:
    """Remove it, a directory with all below it, or put this there instead."""
    target = root / path
    if not target.exists():
        return
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    if content is not None:
        target.write_bytes(content)


@settings(max_examples=40, deadline=None)
@given(DAMAGE)
def test_no_damage_ends_a_run_or_invents_a_value(case):
    name, damages = case
    with tempfile.TemporaryDirectory() as directory:
        root = copied(name, Path(directory))
        reading_on = Jetson(root, Programs(""))
        whole = reading_on.read(0.0)
        for path, content in damages:
            damage(root, path, content)
        true = {(kind(gauge), value) for gauge, value in (*whole.gauges.items(), *whole.counters.items())}
        for found in (reading_on, reading_on, Jetson(root, Programs(""))):
            reading = found.read(0.0)
            assert found.why_not() is None or isinstance(found.why_not(), str)
            assert found.identity().kind == "jetson"
            assert found.conditions({}).clocks in ("floating", None)
            assert all(found.missing().values())
            assert found.meter() is None or found.meter()[0] == "V"
            assert found.occupied_bytes() is None
            told = {**reading.gauges, **reading.counters}
            power_w = told.pop("power_w", None)
            assert {(kind(gauge), value) for gauge, value in told.items()} <= true
            assert power_w is None or any(math.isclose(power_w, total) for total in TOTALS_W[name])


def kind(name: str) -> str:
    """A label may be damaged too: then the value has another name, and is still true."""
    return name.partition(".")[0]


# Memory


def status(peak: int, anonymous: int, shared: int = 0) -> str:
    return f"Name:\tx\nVmHWM:\t{peak} kB\nVmRSS:\t{peak} kB\nRssAnon:\t{anonymous} kB\nRssShmem:\t{shared} kB\n"


def meminfo(total: int, available: int) -> str:
    return f"MemTotal: {total} kB\nMemFree: 5 kB\nMemAvailable: {available} kB\n"


def table(*rows: str) -> str:
    return "\n".join(["CLIENT                        PROCESS      PID        SIZE", *rows, "total   123756K", ""])


@pytest.mark.parametrize(
    ("rows", "kib"),
    [
        (["user   gem  {pid}  118372K"], 118372),
        (["user   gem  {pid}  118372K", "user  gem  {pid}  2M"], 118372 + 2048),
        (["user   gem  {pid}  4000K  1G"], 1 << 20),
        (["user   my program  {pid}  7K", "user x {pid}1 9K", "user x 1{pid} 9K"], 7),
        (["user   other  1  118372K", "user {pid}  2  5K"], 0),
        ([], 0),
    ],
)
def test_where_nvmap_tells_whose_buffers_are_whose_memory_is_they_and_the_peak_of_the_resident(tmp_path, rows, kib):
    files = {
        NVMAP: table(*(row.format(pid=os.getpid()) for row in rows)),
        "proc/self/status": status(1000, 600),
        "proc/meminfo": meminfo(10**6, 10),
    }
    assert bare(tmp_path, files).occupied_bytes() == (1000 + kib) * 1024


def test_without_nvmap_the_difference_is_what_the_model_takes_each_part_once(tmp_path):
    """300 of buffers, 50 anonymous and 20 of a mapped file, which MemAvailable still has as available."""
    found = bare(tmp_path, {"proc/self/status": status(1000, 600, 7), "proc/meminfo": meminfo(8000, 5000)})
    before = found.occupied_bytes()
    tree(tmp_path, {"proc/self/status": status(1070, 650, 7), "proc/meminfo": meminfo(8000, 5000 - 350)})
    after = found.occupied_bytes()
    assert after - before == (300 + 50 + 20) * 1024


def test_a_passing_peak_of_resident_memory_counts(tmp_path):
    found = bare(tmp_path, {"proc/self/status": status(1000, 600), "proc/meminfo": meminfo(8000, 5000)})
    before = found.occupied_bytes()
    tree(tmp_path, {"proc/self/status": status(1500, 600)})
    assert found.occupied_bytes() - before == 500 * 1024


def test_one_process_is_told_by_one_way(tmp_path):
    """A table that appears or goes between two calls would make the difference mean nothing."""
    files = {"proc/self/status": status(1000, 600), "proc/meminfo": meminfo(8000, 5000)}
    late = bare(tmp_path / "late", files)
    before = late.occupied_bytes()
    tree(tmp_path / "late", {NVMAP: table()})
    assert late.occupied_bytes() == before
    gone = bare(tmp_path / "gone", files | {NVMAP: table()})
    assert gone.occupied_bytes() == 1000 * 1024
    (tmp_path / "gone" / NVMAP).unlink()
    assert gone.occupied_bytes() is None


def test_a_container_is_not_in_nvmaps_table(tmp_path):
    files = {NVMAP: table(), "proc/self/status": status(1000, 600), "proc/meminfo": meminfo(8000, 5000)}
    found = bare(tmp_path, files)
    (tmp_path / "proc/self/ns").mkdir()
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026532201]")
    assert found.occupied_bytes() == (1000 + 3000 - 600) * 1024


@pytest.mark.parametrize("gone", ["proc/self/status", "proc/meminfo"])
def test_memory_that_cannot_be_told_is_none_with_a_reason(tmp_path, gone):
    files = {"proc/self/status": status(1000, 600), "proc/meminfo": meminfo(8000, 5000)}
    found = bare(tmp_path, {**files, gone: "garbage"})
    assert found.occupied_bytes() is None
    assert "memory" in found.missing()
    assert "memory" not in bare(tmp_path / "whole", files).missing()


# Pinning clocks


def steps(programs: Programs) -> list[str]:
    return [" ".join(words[1:2]) or "set" for words in programs.ran]


def test_clocks_are_stored_pinned_and_put_back(tmp_path):
    found = bare(tmp_path)
    with found.lock_clocks():
        assert steps(found.command) == ["--store", "set"]
    assert steps(found.command) == ["--store", "set", "--restore"]
    stored, _, restored = found.command.ran
    assert stored[2] == restored[2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_clocks_are_put_back_on_every_way_out(tmp_path, error):
    found = bare(tmp_path)
    with pytest.raises(error), found.lock_clocks():
        raise error
    assert steps(found.command) == ["--store", "set", "--restore"]


@pytest.mark.parametrize(("failing", "ran"), [("--store", ["--store"]), ("set", ["--store", "set", "--restore"])])
def test_clocks_that_cannot_be_pinned_are_told_with_a_hint(tmp_path, failing, ran):
    found = Jetson(tmp_path, Programs(failing=[failing]))
    with (
        pytest.raises(MissingError, match="could not be pinned: there is no program jetson_clocks here") as refused,
        found.lock_clocks(),
    ):
        pytest.fail("entered")
    assert "root" in refused.value.hint
    assert steps(found.command) == ran


def test_clocks_that_cannot_be_put_back_are_told_with_the_command_that_does(tmp_path):
    found = Jetson(tmp_path, Programs(failing=["--restore"]))
    with pytest.raises(MissingError, match="could not be put back") as refused, found.lock_clocks():
        pass
    stored = found.command.ran[0][2]
    assert refused.value.hint == f"sudo jetson_clocks --restore {stored}"
    assert Path(stored).parent.is_dir()
    Path(stored).parent.rmdir()


def test_pinning_is_seen_by_readings_within_and_gone_after(tmp_path):
    tree(tmp_path, limits(729600, 1728000, 306000000, 1020000000))

    def jetson_clocks(words: Sequence[str]) -> str:
        if words[1:] == ():
            tree(tmp_path, limits(1728000, 1728000, 1020000000, 1020000000))
        elif words[1] == "--restore":
            tree(tmp_path, limits(729600, 1728000, 306000000, 1020000000))
        return ""

    found = Jetson(tmp_path, jetson_clocks)
    assert gauges(found, "pinned_hz.") == {"pinned_hz.policy0": 1728e6}
    with found.lock_clocks():
        assert gauges(found, "pinned_hz.").keys() == {"pinned_hz.policy0", "pinned_hz.policy4", "pinned_hz.gpu"}
        assert found.conditions({}).clocks == "pinned"
    assert gauges(found, "pinned_hz.") == {"pinned_hz.policy0": 1728e6}
    assert found.conditions({}).clocks == "floating"


def program(directory: Path, name: str, script: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_programs_of_the_system_are_what_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "log"
    program(tmp_path, "nvpmodel", 'echo "NV Power Mode: 25W"; echo 1')
    program(
        tmp_path,
        "jetson_clocks",
        f'[ -e "$2" ] && [ "$1" = --store ] && read x && exit 1; touch "$2"; echo "$1" >> {log}',
    )
    found = Jetson(tmp_path / "root")
    assert found.conditions({}).power_mode == "25W"
    with found.lock_clocks():
        pass
    assert log.read_text().split("\n") == ["--store", "", "--restore", ""]
