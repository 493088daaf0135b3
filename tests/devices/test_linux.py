"""What every Linux machine tells, from constructed trees, garbage, and this machine itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.devices.linux import Linux, core_kinds, descendants, tree_busy_s
from hydradeploy.devices.reading import Tree, field_of
from tests.devices.trees import below, refuse, tree

CPUS = "sys/devices/system/cpu"
TICKS = os.sysconf("SC_CLK_TCK")
QUANTITIES = {"clock", "temperature", "throttling", "quota_throttling", "load", "swap", "memory"}


def linux(root: Path, files) -> Linux:
    return Linux(Tree(tree(root, files)))


@pytest.mark.parametrize(
    ("text", "busy", "steal"),
    [
        ("cpu  100 20 30 4000 50 6 7 8 60 70\ncpu0 1 1 1 1 1 1 1 1 1 1\n", 163, 8),
        ("cpu  100 20 30 4000 50 6 7 8\n", 163, 8),
        ("cpu  100 20 30 4000 50 6 7\n", 163, None),
        ("cpu  100 20 30 4000\n", 150, None),
        ("cpu  0 0 0 0 0 0 0 0 0 0\n", 0, 0),
        ("cpu0 100 20 30 4000 50 6 7 8\n", None, None),
        ("cpu  100 -20 30 4000 50 6 7 8\n", None, None),
        ("cpu  much\n", None, None),
        ("cpu", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_busy_time_has_interrupts_in_it_but_not_idling_stolen_time_or_guests_twice(tmp_path, text, busy, steal):
    found = linux(tmp_path, {} if text is None else {"proc/stat": text}).counters()
    assert found.get("busy_s") == (None if busy is None else busy / TICKS)
    assert found.get("steal_s") == (None if steal is None else steal / TICKS)


def test_swapping_and_killing_are_counted(tmp_path):
    text = "pswpin 12\npswpout 30\npswpout_more 5\noom_kill 2\nxoom_kill 9\n"
    found = linux(tmp_path, {"proc/vmstat": text}).counters()
    assert found == {"swapped_pages": 42.0, "oom_kills": 2.0}


def test_half_of_the_swapping_is_not_told_as_the_whole(tmp_path):
    assert linux(tmp_path, {"proc/vmstat": "pswpout 30\n"}).counters() == {}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("MemTotal:        100 kB\nMemFree: 1 kB\nMemAvailable:   64 kB\n", 64 * 1024.0),
        ("MemAvailable: 0 kB\n", 0.0),
        ("MemTotal: 100 kB\n", None),
        ("", None),
    ],
)
def test_memory_is_what_the_kernel_calls_available(tmp_path, text, seen):
    assert linux(tmp_path, {"proc/meminfo": text}).gauges().get("available_bytes") == seen


def zones(*pairs: tuple[str, object]) -> dict[str, str]:
    files: dict[str, str] = {}
    for number, (kind, milli) in enumerate(pairs):
        files |= below(f"sys/class/thermal/thermal_zone{number}", {"type": kind, "temp": milli})
    return files


def test_temperatures_go_by_the_type_of_the_zone(tmp_path):
    files = zones(("acpitz", 27800), ("x86_pkg_temp", 41000), ("acpitz", -3000), ("cv0-thermal", -256000))
    files |= zones() | below("sys/class/thermal/thermal_zone9", {"type": "PMIC-Die", "temp": 100000})
    files |= below("sys/class/thermal/thermal_zone10", {"type": "no-temp"})
    assert linux(tmp_path, files).gauges() == {
        "temperature_c.acpitz": 27.8,
        "temperature_c.x86_pkg_temp": 41.0,
        "temperature_c.acpitz-2": -3.0,
    }


def test_a_zone_that_is_off_is_left_out_and_is_back_when_it_is_on(tmp_path):
    """A pipe that nobody fills answers EAGAIN, as such a zone does."""
    found = linux(tmp_path, zones(("cpu-thermal", 40000), ("gpu-thermal", 0)))
    file = tmp_path / "sys/class/thermal/thermal_zone1/temp"
    file.unlink()
    os.mkfifo(file)
    held = os.open(file, os.O_RDWR)
    try:
        assert found.gauges() == {"temperature_c.cpu-thermal": 40.0}
        assert found.tree.problems == {"/sys/class/thermal/thermal_zone1/temp": "the sensor is off"}
    finally:
        os.close(held)
    file.unlink()
    file.write_text("39000\n")
    assert found.gauges()["temperature_c.gpu-thermal"] == 39.0


def test_hwmon_gives_the_temperature_of_a_package_but_not_of_each_core(tmp_path):
    files = below("sys/class/hwmon/hwmon3", {"name": "coretemp", "temp1_label": "Package id 0", "temp1_input": 45000})
    files |= below("sys/class/hwmon/hwmon3", {"temp2_label": "Core 0", "temp2_input": 44000})
    files |= below("sys/class/hwmon/hwmon10", {"name": "k10temp", "temp1_label": "Tctl", "temp1_input": 50500})
    files |= below("sys/class/hwmon/hwmon4", {"name": "nvme", "temp1_label": "Tctl", "temp1_input": 30000})
    files |= below("sys/class/hwmon/hwmon5", {"name": "k10temp", "temp1_label": "Tctl", "temp1_input": 51000})
    assert linux(tmp_path, files).gauges() == {
        "temperature_c.Package id 0": 45.0,
        "temperature_c.Tctl": 51.0,
        "temperature_c.Tctl-2": 50.5,
    }


def intel(*cpus: tuple[str, str, object, object]) -> dict[str, str]:
    """Cores by their siblings, package, and counts of the core and the package."""
    files: dict[str, str] = {}
    for number, (siblings, package, core, whole) in enumerate(cpus):
        counts = {"core_throttle_count": core, "package_throttle_count": whole, "core_throttle_total_time_ms": 7}
        files |= below(f"{CPUS}/cpu{number}/thermal_throttle", counts)
        files |= below(f"{CPUS}/cpu{number}/topology", {"core_cpus_list": siblings, "physical_package_id": package})
    return files


def test_throttling_is_added_over_cores_but_siblings_and_packages_count_once(tmp_path):
    files = intel(("0,2", "0", 3, 10), ("1,3", "1", 4, 20), ("0,2", "0", 5, 12), ("1,3", "1", 4, 20))
    assert linux(tmp_path, files).counters() == {"throttle_events.core": 9.0, "throttle_events.package": 32.0}


def test_without_a_topology_each_core_stands_alone_in_one_package(tmp_path):
    files = {name: text for name, text in intel(("", "", 3, 10), ("", "", 4, 11)).items() if "topology" not in name}
    assert linux(tmp_path, files).counters() == {"throttle_events.core": 7.0, "throttle_events.package": 11.0}


def test_kinds_of_cores_are_told_apart_by_capacity(tmp_path):
    files = {f"{CPUS}/cpu{number}/cpu_capacity": f"{446 if number < 4 else 1024}\n" for number in range(12)}
    files[f"{CPUS}/cpuidle/cpu_capacity"] = "1\n"
    assert core_kinds(Tree(tree(tmp_path, files))) == {1024: tuple(range(4, 12)), 446: (0, 1, 2, 3)}
    assert core_kinds(Tree(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("capacities", "allowed", "shown"),
    [
        ([446] * 4 + [1024] * 4, {0, 1, 2, 3, 4, 5, 6, 7}, "4-7 (capacity 1024); 0-3 (capacity 446)"),
        ([446] * 4 + [1024] * 4, {4, 6}, "4,6 (capacity 1024)"),
        ([446, 1024], {0, 1, 9}, "1 (capacity 1024); 0 (capacity 446); 9"),
        ([1024] * 4, {0, 1, 3}, "0-1,3"),
        ([], {0, 1, 3}, "0-1,3"),
    ],
)
def test_the_affinity_names_the_kind_where_kinds_differ(tmp_path, monkeypatch, capacities, allowed, shown):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    files = {f"{CPUS}/cpu{number}/cpu_capacity": f"{value}\n" for number, value in enumerate(capacities)}
    assert linux(tmp_path, files).conditions({}).affinity == shown


def process(pid: int, parent: int, own: tuple[int, int], ended: tuple[int, int] = (0, 0), name="python") -> dict:
    fields = f"{pid} ({name}) S {parent} 1 1 0 -1 4194304 10 0 0 0 {own[0]} {own[1]} {ended[0]} {ended[1]} 20 0 1 0 9\n"
    return {f"proc/{pid}/stat": fields}


def test_a_tree_of_processes_has_its_descendants_and_those_that_ended(tmp_path):
    files = process(1, 0, (1000, 1000))
    files |= process(10, 1, (5, 6), (7, 8)) | process(11, 10, (100, 0), name="a b) S 1 (c") | process(12, 11, (0, 200))
    files |= process(20, 1, (9000, 0)) | {"proc/13/stat": "", "proc/self/stat": "10 (x) S 1"}
    files |= process(14, 10, (1, 1), name="two\nlines")
    found = Tree(tree(tmp_path, files))
    assert descendants(found, 10) == {11, 12, 14}
    assert tree_busy_s(found, 10) == pytest.approx((26 + 100 + 200 + 2) / TICKS)
    assert descendants(found, 12) == set()
    assert descendants(found, 1) == {10, 11, 12, 14, 20}


def test_a_process_that_is_not_there_has_used_nothing_that_is_known(tmp_path):
    found = Tree(tree(tmp_path, process(10, 1, (1, 1))))
    assert tree_busy_s(found, 11) is None
    assert descendants(found, 11) == set()
    assert tree_busy_s(Tree(tmp_path / "none"), 1) is None


def test_processes_that_are_each_others_parents_do_not_go_round_for_ever(tmp_path):
    found = Tree(tree(tmp_path, process(10, 11, (1, 0)) | process(11, 10, (2, 0))))
    assert descendants(found, 10) == {11}
    assert tree_busy_s(found, 10) == pytest.approx(3 / TICKS)


def test_a_process_that_ends_while_it_is_read_is_none_and_no_problem(tmp_path, monkeypatch):
    found = Tree(tree(tmp_path, process(10, 1, (1, 0)) | process(11, 10, (2, 0))))
    refuse(monkeypatch, tmp_path / "proc/11/stat", errno.ESRCH)
    assert descendants(found, 10) == set()
    assert found.problems == {}


def test_time_that_this_process_burns_is_counted():
    before = tree_busy_s(Tree(), os.getpid())
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    after = tree_busy_s(Tree(), os.getpid())
    assert before is not None
    assert after is not None
    assert after - before >= 0.15


def test_a_child_of_this_process_is_found_and_its_time_stays_when_it_has_ended():
    burn = "import time\nwhile time.process_time() < 0.2: pass\ninput()"
    before = tree_busy_s(Tree(), os.getpid()) or 0.0
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants(Tree(), os.getpid())
        child.communicate(b"\n")
    assert child.pid not in descendants(Tree(), os.getpid())
    assert (tree_busy_s(Tree(), os.getpid()) or 0.0) - before >= 0.15


def test_this_machine_counts_its_time_and_memory():
    found = Linux()
    assert found.counters()["busy_s"] > 0
    assert 0 < found.gauges()["available_bytes"] <= found.memory_bytes()
    assert not {"load", "memory"} & set(found.missing())


def test_what_is_missing_says_why_in_a_sentence(tmp_path, monkeypatch):
    missing = Linux(Tree(tmp_path)).missing()
    assert set(missing) == QUANTITIES
    assert missing["clock"] == "no cpufreq below /sys/devices/system/cpu, as in most virtual machines"
    found = linux(tmp_path, below(f"{CPUS}/cpufreq/policy0", {"scaling_cur_freq": 1000}) | zones(("cpu", 1000)))
    refuse(monkeypatch, tmp_path / CPUS / "cpufreq/policy0/scaling_cur_freq", errno.EACCES)
    missing = found.missing()
    assert missing["clock"] == f"/{CPUS}/cpufreq/policy0/scaling_cur_freq: no permission"
    assert "temperature" not in missing


# What is read, by any name it may have; garbage goes into each of them.
FILES = (
    *("proc/stat", "proc/vmstat", "proc/meminfo", "proc/loadavg", "proc/self/cgroup", "proc/self/status"),
    *("proc/10/stat", "sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu.max", f"{CPUS}/cpu0/cpu_capacity"),
    *(f"{CPUS}/cpufreq/policy0/scaling_{name}" for name in ("cur_freq", "min_freq", "max_freq", "governor")),
    *(f"{CPUS}/cpu0/thermal_throttle/core_throttle_count", f"{CPUS}/cpu0/topology/core_cpus_list"),
    *("sys/class/thermal/thermal_zone0/type", "sys/class/thermal/thermal_zone0/temp"),
    *("sys/class/hwmon/hwmon0/name", "sys/class/hwmon/hwmon0/temp1_label", "sys/class/hwmon/hwmon0/temp1_input"),
)
WORDS = st.sampled_from(
    [
        "cpu",
        "cpu ",
        "0::/",
        "1:cpu:/",
        "coretemp",
        "Package",
        "MemAvailable:",
        "pswpin",
        ") S",
        "max",
        "-1",
        "\0",
        "/",
        "\n",
    ]
)
DIGITS = st.integers(0, 6000).map(lambda count: "9" * count)
GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(WORDS, DIGITS, st.text(max_size=5)), max_size=12).map(lambda parts: " ".join(parts).encode()),
)


@given(st.lists(GARBAGE, min_size=len(FILES), max_size=len(FILES)))
def test_no_garbage_in_any_file_raises(tmp_path_factory, texts):
    found = linux(tmp_path_factory.mktemp("root"), dict(zip(FILES, texts, strict=True)))
    values = {**found.gauges(), **found.counters()}
    assert all(isinstance(value, float) and abs(value) < 1e30 for value in values.values())
    assert found.missing().keys() <= QUANTITIES
    assert found.conditions({}).clocks in ("pinned", "floating", None)
    assert found.cores() >= 1
    assert found.memory_bytes() >= 0
    assert (found.occupied_bytes() or 0) >= 0
    assert descendants(found.tree, 10) == set()
    assert (tree_busy_s(found.tree, 10) or 0.0) >= 0.0


@given(st.text(), st.text(min_size=1, max_size=4))
def test_a_field_of_garbage_is_none_or_a_number(text, name):
    found = field_of(text, name)
    assert found is None or 0 <= found < 10**20
