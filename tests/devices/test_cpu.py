"""The processor from recorded files: who it is, how it is set up, what it is doing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from hydradeploy.devices import DEVICE_MODULES, machine
from hydradeploy.devices.cpu import MACHINE, Cpu, instruction_set
from hydradeploy.devices.reading import Reading
from hydradeploy.errors import MissingError, UsageError
from hydradeploy.spec import show_heads
from tests.devices.trees import tree


def cpu(root: Path, files: Mapping[str, str | bytes]) -> Cpu:
    return Cpu(tree(root, files))


@pytest.mark.parametrize(
    ("text", "widest"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 fma\n", "-avx2"),
        ("flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni\n", "-avx512_vnni"),
        ("flags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni amx_int8\n", "-amx_int8"),
        ("processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimdhp asimddp\n", "-asimddp"),
        ("Features\t: fp asimd aes asimddp i8mm bf16\n", "-i8mm"),
        ("flags\t\t: fpu\n", ""),
        ("model name\t: avx512f in the name of a processor\n", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_widest_instruction_set_is_named(tmp_path, text, widest):
    files = {} if text is None else {"proc/cpuinfo": text}
    assert instruction_set(tree(tmp_path, files)) == platform.machine() + widest
    assert Cpu(tmp_path).identity().instruction_set == platform.machine() + widest


def test_this_machine_has_one():
    assert instruction_set().startswith(platform.machine())


X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx2\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
JETSON = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n\n"
PI = "\nHardware\t: BCM2835\nRevision\t: c03111\nSerial\t\t: 10\nModel\t\t: Raspberry Pi 4 Model B Rev 1.1\n"
TREE = "proc/device-tree/model"


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"proc/cpuinfo": X86 * 8}, "AMD EPYC 7B13"),
        ({"proc/cpuinfo": X86, TREE: "Board\0"}, "AMD EPYC 7B13"),
        ({"proc/cpuinfo": "model name\t: a: b\n"}, "a: b"),
        ({"proc/cpuinfo": ARM * 4}, "ARM 0x41 0xd0c"),
        ({"proc/cpuinfo": ARM * 4 + PI}, "Raspberry Pi 4 Model B Rev 1.1"),
        ({"proc/cpuinfo": ARM, TREE: "NVIDIA Jetson Orin Nano\0"}, "NVIDIA Jetson Orin Nano"),
        ({"proc/cpuinfo": ARM + PI, TREE: "Raspberry Pi 4 in the tree\0"}, "Raspberry Pi 4 in the tree"),
        ({TREE: "Board without cpuinfo\0"}, "Board without cpuinfo"),
        ({"proc/cpuinfo": ARM, TREE: "\0"}, "ARM 0x41 0xd0c"),
        ({"proc/cpuinfo": ARM, TREE: ""}, "ARM 0x41 0xd0c"),
        ({"proc/cpuinfo": JETSON, TREE: "NVIDIA Jetson Orin Nano\0"}, "NVIDIA Jetson Orin Nano"),
        ({"proc/cpuinfo": JETSON}, "ARM 0x41 0xd42"),
        ({"proc/cpuinfo": "model name\t: ARMv7 Processor rev 3 (v7l)\n"}, "ARMv7 Processor rev 3 (v7l)"),
        ({"proc/cpuinfo": "model name\t:\n"}, platform.machine()),
        ({"proc/cpuinfo": ""}, platform.machine()),
        ({"proc/cpuinfo": "no colon in this line\n"}, platform.machine()),
        ({"proc/cpuinfo": b"model name\t: caf\xe9\n"}, "caf\N{REPLACEMENT CHARACTER}"),
        ({}, platform.machine()),
    ],
)
def test_the_name_is_the_models_else_the_boards_else_the_cores_else_the_architectures(tmp_path, files, name):
    assert cpu(tmp_path, files).identity().name == name


def test_the_identity_is_read_below_the_root(tmp_path):
    found = cpu(tmp_path, {"proc/cpuinfo": X86, "proc/meminfo": "MemTotal:        4045212 kB\nMemFree: 1 kB\n"})
    device = found.identity()
    assert (device.kind, device.name, device.memory_bytes) == ("cpu", "AMD EPYC 7B13", 4045212 * 1024)
    assert device.architecture == platform.machine()
    assert device.cores == os.cpu_count()
    assert device == found.identity()


@pytest.mark.parametrize("text", [None, "", "MemFree: 12 kB\n", "NoMemTotal: 12 kB\n"])
def test_memory_that_is_not_told_is_zero(tmp_path, text):
    assert cpu(tmp_path, {} if text is None else {"proc/meminfo": text}).identity().memory_bytes == 0


def governors(*names: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor": f"{name}\n" for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("files", "governor"),
    [
        (governors("performance"), "performance"),
        (governors(*["schedutil"] * 12), "schedutil"),
        (governors("powersave", "performance", "powersave"), "performance+powersave"),
        (governors(""), None),
        (governors("", "ondemand"), "ondemand"),
        ({"sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "x", "sys/devices/system/cpu/online": "0"}, "x"),
        ({"sys/devices/system/cpu/cpuidle/cpufreq/scaling_governor": "menu"}, None),
        ({}, None),
    ],
)
def test_the_governor_is_that_of_every_core(tmp_path, files, governor):
    assert cpu(tmp_path, files).conditions({}).governor == governor


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/cpu/"


def v1(quota: object, period: object, group: str = "") -> dict[str, str]:
    return {f"{V1}{group}cpu.cfs_quota_us": f"{quota}\n", f"{V1}{group}cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {V2 + "cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {V2 + "cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {V2 + "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {V2 + "a/b/cpu.max": "200000 100000\n", V2 + "a/cpu.max": "100000 100000\n"}, 1.0),
        ("0::/a/b\n", {V2 + "a/b/cpu.max": "max 100000\n", V2 + "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {V2 + "a/b/cpu.max": "100000 100000\n", V2 + "a/cpu.max": "300000 100000\n"}, 1.0),
        ("0::/a/b\n", {V2 + "a/cpu.max": "max 100000\n", V2 + "cpu.max": "25000 50000\n"}, 0.5),
        ("0::/a\n", {V2 + "a/b/cpu.max": "50000 100000\n", V2 + "c/cpu.max": "50000 100000\n"}, None),
        ("0::/a\n", {"sys/fs/cpu.max": "50000 100000\n", "cpu.max": "50000 100000\n"}, None),
        ("0::/../../other\n", {V2 + "cpu.max": "50000 100000\n"}, 0.5),
        ("0::/x:y\n", {V2 + "x:y/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {}, None),
        ("0::/\n", {V2 + "cpu.max": ""}, None),
        ("0::/\n", {V2 + "cpu.max": "50000\n"}, None),
        ("0::/\n", {V2 + "cpu.max": "50000 0\n"}, None),
        ("0::/\n", {V2 + "cpu.max": "many few\n"}, None),
        ("4:cpu,cpuacct:/\n", v1(-1, 100000), None),
        ("4:cpu,cpuacct:/\n", v1(250000, 100000), 2.5),
        ("2:cpuacct,cpu:/d/x\n1:name=systemd:/\n", v1(-1, 100000) | v1(80000, 40000, "d/x/"), 2.0),
        ("4:cpu,cpuacct:/d/x\n", v1(100000, 100000) | v1(200000, 100000, "d/x/"), 1.0),
        ("4:cpu:/gone/in/this/namespace\n", v1(100000, 100000), 1.0),
        ("4:cpu:/\n", {V1 + "cpu.cfs_quota_us": "100000\n"}, None),
        ("3:cpuset:/a\n2:cpuacct:/\n", v1(100000, 100000), None),
        ("4:cpu:/\n0::/a\n", v1(300000, 100000) | {V2 + "a/cpu.max": "200000 100000\n"}, 2.0),
        ("", {V2 + "cpu.max": "50000 100000\n"}, None),
        (None, {V2 + "cpu.max": "50000 100000\n"}, None),
    ],
)
def test_the_quota_is_the_tightest_of_the_control_group_and_those_above_it(tmp_path, cgroup, files, quota):
    own = {} if cgroup is None else {"proc/self/cgroup": cgroup}
    found = cpu(tmp_path, {**own, **files})
    assert found.conditions({}).quota_cores == quota


@pytest.mark.parametrize(
    ("quota", "affinity", "cores"),
    [
        ("max 100000", {0, 1, 2, 3}, 4),
        ("50000 100000", {0, 1, 2, 3}, 1),
        ("100000 100000", {0, 1, 2, 3}, 1),
        ("150000 100000", {0, 1, 2, 3}, 2),
        ("900000 100000", {0, 1, 2, 3}, 4),
        ("1 100000", {0, 1}, 1),
        ("max 100000", {7}, 1),
    ],
)
def test_cores_are_those_of_the_affinity_mask_as_far_as_the_quota_goes(tmp_path, monkeypatch, quota, affinity, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity)
    found = cpu(tmp_path, {"proc/self/cgroup": "0::/\n", V2 + "cpu.max": f"{quota}\n"})
    assert found.cores() == cores


@pytest.mark.parametrize(("affinity", "shown"), [({0}, "0"), ({0, 1, 2, 3}, "0-3"), ({5, 1, 2, 0}, "0-2,5")])
def test_the_affinity_is_shown_as_ranges(tmp_path, monkeypatch, affinity, shown):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity)
    assert Cpu(tmp_path).conditions({}).affinity == shown


def test_the_affinity_is_that_of_this_process():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(allowed)})
        assert MACHINE.conditions({}).affinity == str(max(allowed))
        assert MACHINE.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_conditions_have_the_kernel_and_a_copy_of_the_versions(tmp_path):
    software = {"onnxruntime": "1.30.0"}
    found = Cpu(tmp_path).conditions(software)
    assert found.os == f"Linux {platform.release()}"
    assert found.power_mode is None
    software["onnxruntime"] = "2"
    assert found.software == {"onnxruntime": "1.30.0"}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("4.06 4.05 3.49 2/107 5160\n", {"load_average": 4.06}),
        ("0.00 0.00 0.00 0/0 0\n", {"load_average": 0.0}),
        ("", {}),
        ("\n", {}),
        ("much\n", {}),
        (None, {}),
    ],
)
def test_the_load_is_that_of_the_last_minute_or_left_out(tmp_path, text, seen):
    assert cpu(tmp_path, {} if text is None else {"proc/loadavg": text}).read(0.0).gauges == seen


def test_files_that_cannot_be_read_are_as_good_as_none(tmp_path):
    """Directories in their places: a read fails for root too."""
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/loadavg", "proc/self/cgroup", TREE, *governors("x")):
        (tmp_path / name).mkdir(parents=True)
    found = Cpu(tmp_path)
    assert found.identity().name == platform.machine()
    assert found.identity().memory_bytes == 0
    assert (found.conditions({}).governor, found.conditions({}).quota_cores) == (None, None)
    assert found.read(0.0).gauges == {}
    assert found.why_not() is None


RAPL = {"name": "package-0", "energy_uj": 2000000, "max_energy_range_uj": 65532610987}


def test_a_reading_has_every_sensor_and_the_energy_of_its_meter(tmp_path):
    files = {
        "proc/stat": "cpu  100 20 30 4000 50 6 7 8 0 0\n",
        "proc/vmstat": "pswpin 1\npswpout 2\noom_kill 0\n",
        "proc/meminfo": "MemAvailable: 8 kB\n",
        "proc/loadavg": "1.50 1 1 1/1 1\n",
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/cpu.stat": "nr_throttled 3\nthrottled_usec 5000000\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4\n",
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
        "sys/class/thermal/thermal_zone0/temp": "45000\n",
        **{f"sys/class/powercap/intel-rapl:0/{name}": f"{value}\n" for name, value in RAPL.items()},
    }
    found = cpu(tmp_path, files)
    reading = found.read(12.5)
    assert reading.at_s == 12.5
    assert reading.gauges == {
        "available_bytes": 8192.0,
        "load_average": 1.5,
        "clock_hz.policy0": 1.5e9,
        "temperature_c.x86_pkg_temp": 45.0,
    }
    ticks = os.sysconf("SC_CLK_TCK")
    assert reading.counters == {
        "busy_s": 163 / ticks,
        "steal_s": 8 / ticks,
        "swapped_pages": 3.0,
        "oom_kills": 0.0,
        "cgroup_throttled": 3.0,
        "cgroup_throttled_s": 5.0,
        "throttle_events.core": 4.0,
        "energy_j": 2.0,
    }
    assert found.missing() == {}
    assert found.meter() == "RAPL package-0 (without memory)"


def test_energy_never_goes_back_from_one_reading_to_the_next(tmp_path):
    found = cpu(tmp_path, {f"sys/class/powercap/intel-rapl:0/{name}": f"{value}\n" for name, value in RAPL.items()})
    seen = []
    for microjoules in (2000000, 65000000000, 1000000, 3000000, 3000000, 10):
        (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text(f"{microjoules}\n")
        seen.append(found.read(0.0).counters["energy_j"])
    assert seen == sorted(seen)
    assert seen[0] == 2.0


def test_a_machine_that_tells_nothing_gives_an_empty_reading_and_a_reason_for_each_quantity(tmp_path):
    found = Cpu(tmp_path)
    assert (found.read(1.0).gauges, found.read(1.0).counters, found.meter()) == ({}, {}, None)
    missing = found.missing()
    assert set(missing) >= {"energy", "clock", "temperature", "throttling"}
    assert all(len(reason.split()) > 3 for reason in missing.values())
    assert found.occupied_bytes() is None
    with pytest.raises(MissingError, match="cannot be pinned"):
        found.lock_clocks().__enter__()


def test_readings_of_this_machine_go_forward_and_through_json():
    before, after = MACHINE.read(1.0), MACHINE.read(2.0)
    assert msgspec.json.decode(msgspec.json.encode(before), type=Reading) == before
    assert before.counters.keys() == after.counters.keys()
    assert all(after.counters[name] >= value for name, value in before.counters.items())
    assert after.counters["busy_s"] > 0
    assert ("energy_j" in after.counters) == (MACHINE.meter() is not None) == ("energy" not in MACHINE.missing())
    occupied = MACHINE.occupied_bytes()
    assert occupied is not None
    assert occupied > 1 << 20


def test_this_machine_is_one_and_tells_what_it_is():
    found = machine("cpu")
    device, conditions = found.identity(), found.conditions({})
    assert device.name
    assert device.memory_bytes > 1 << 28
    assert 1 <= found.cores() <= device.cores
    assert conditions.affinity == show_heads(os.sched_getaffinity(0))
    assert found.read(0.0).gauges["load_average"] >= 0
    assert machine().kind in DEVICE_MODULES


def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(UsageError, match="no device kind 'toaster'") as refused:
        machine("toaster")
    assert refused.value.hint == f"one of {', '.join(DEVICE_MODULES)}"


@pytest.mark.parametrize("kind", ["cpu", None])
def test_a_machine_that_is_of_no_kind_says_why(monkeypatch, kind):
    monkeypatch.setattr(Cpu, "why_not", lambda self: "no processor is plugged in")
    with pytest.raises(MissingError, match="cpu: no processor is plugged in"):
        machine(kind)
