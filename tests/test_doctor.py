"""doctor: what is right, what is wrong and how it is put right, on machines that were never built and on this one."""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from hydradeploy.backends import BACKEND_MODULES, REMEDIES
from hydradeploy.devices import DEVICE_MODULES
from hydradeploy.devices.cuda import Cuda
from hydradeploy.devices.jetson import Jetson
from hydradeploy.devices.reading import Reading
from hydradeploy.doctor import Diagnosis, diagnose, lines, load
from hydradeploy.doctor.patient import Row
from hydradeploy.errors import ExitCode, MissingError, UsageError
from hydradeploy.measurements import Cell, Conditions, Device, Profile, add_profile
from hydradeploy.profiler import flags

AREAS = ("package", "backends", "device", "sensors", "rights", "clocks", "cores", "load", "disk", "profiles")
GB = 10**9


@dataclass
class Toy:
    """A machine that is what it is told to be; each reading is half a second later than the one before."""

    gauges: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    rises: Mapping[str, float] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    clocks: str | None = "pinned"
    governor: str | None = "performance"
    power_mode: str | None = None
    quota_cores: float | None = None
    kind: str = "cpu"
    processors: tuple[str, ...] = ("cpu",)
    now_s: float = 1000.0
    cores_told: int = 4
    memory_told: int = 4 << 30
    threads: int = 4

    def why_not(self) -> str | None:
        return None

    def identity(self) -> Device:
        return Device(
            kind=self.kind,
            name="Toy",
            architecture="x",
            instruction_set="x-y",
            cores=self.cores_told,
            memory_bytes=self.memory_told,
        )

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        return Conditions(
            power_mode=self.power_mode,
            governor=self.governor,
            affinity="0-3",
            quota_cores=self.quota_cores,
            clocks=self.clocks,
            os="Linux",
            software=dict(software),
        )

    def cores(self) -> int:
        return self.threads

    def read(self, at_s: float, ours=()) -> Reading:
        self.now_s += 0.5
        for name, rise in self.rises.items():
            self.counters[name] = self.counters.get(name, 0.0) + rise
        return Reading(at_s=self.now_s, gauges=dict(self.gauges), counters=dict(self.counters))

    def missing(self) -> Mapping[str, str]:
        return self.unread

    def meter(self) -> str | None:
        return "VDD_IN, module"

    def occupied_bytes(self) -> int | None:
        return None

    def lock_clocks(self) -> AbstractContextManager[None]:
        return nullcontext()


class Broken(Toy):
    """Whatever it is asked, it fails."""

    def fail(self, *_: object) -> None:
        raise RuntimeError("the sensor hub is on fire")

    why_not = identity = conditions = cores = read = missing = meter = fail  # type: ignore[assignment]


class Runtime:
    """A backend that is usable, unless it is told why not."""

    name = "toy"
    processor = "cpu"

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    def why_not(self) -> str | None:
        return self.reason

    def software(self) -> Mapping[str, str]:
        return {"toy": "1.2.3"}


@pytest.fixture
def backends(monkeypatch):
    """Sets the table of backends; a value that is no backend is a module that cannot be imported."""

    def give(**runtimes: Runtime | None) -> None:
        monkeypatch.setattr("hydradeploy.doctor.BACKEND_MODULES", {name: f"toy_{name}" for name in runtimes})
        for name, runtime in runtimes.items():
            module = types.ModuleType(f"toy_{name}")
            module.BACKEND = runtime
            monkeypatch.setitem(sys.modules, f"toy_{name}", module if runtime else None)

    give(toy=Runtime())
    return give


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
CPUINFO = "".join(f"processor\t: {number}\nflags\t\t: fpu avx2\n\n" for number in range(4))
QUIET = {"proc/meminfo": MEMINFO, "proc/loadavg": "0.05 0.1 0.2 1/100 7\n", "proc/cpuinfo": CPUINFO}


@pytest.fixture
def look(tmp_path, backends):
    """diagnose on a toy, with a quiet system around it."""

    def diagnosed(
        here: Toy | None = None,
        files: Mapping[str, str] = QUIET,
        free: int = 50 * GB,
        rest=lambda seconds: None,
    ) -> Diagnosis:
        (tmp_path / "profiles").mkdir(exist_ok=True)
        return diagnose(
            tmp_path / "profiles",
            here=here or Toy(counters={"busy_s": 0.0}),
            root=tree(tmp_path / "root", files),
            free_bytes=lambda path: free,
            rest=rest,
        )

    return diagnosed


def row(diagnosis: Diagnosis, area: str, name: str) -> Row:
    (found,) = [row for row in diagnosis.rows if (row.area, row.name) == (area, name)]
    return found


def test_nothing_is_found_on_a_machine_where_all_is_right(look):
    found = look()
    assert {row.status for row in found.rows} == {"ok"}
    assert {row.fix for row in found.rows} == {None}
    assert found.exit_code is ExitCode.OK
    assert tuple(dict.fromkeys(row.area for row in found.rows)) == tuple(a for a in AREAS)


SICK = {
    "proc/meminfo": "MemAvailable: 50000 kB\nSwapTotal: 1000 kB\nSwapFree: 400 kB\n",
    "proc/loadavg": "9.50 8 7 1/100 7\n",
    "proc/cpuinfo": "flags\t\t: fpu hypervisor avx2\n",
    "sys/devices/system/cpu/cpu0/cpu_capacity": "446\n",
    "sys/devices/system/cpu/cpu1/cpu_capacity": "1024\n",
}


def test_everything_is_found_on_a_machine_where_all_is_wrong(look, backends, tmp_path, monkeypatch):
    backends(onnxruntime=Runtime("the package onnxruntime is not installed"), torch=None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "half.json").write_text("{")
    (tmp_path / "profiles" / "orin.jsonl").write_text("{}\n")
    here = Toy(
        clocks="floating",
        governor="powersave",
        quota_cores=1.5,
        gauges={"throttling.cpu": 1.0, "foreign_processes.cuda0": 2.0},
        rises={"busy_s": 1.0, "steal_s": 0.1, "swapped_pages": 40.0, "throttle_events.core": 3.0},
        unread={"energy": "/sys/class/powercap/intel-rapl:0/energy_uj: no permission"},
    )
    found = look(here, SICK, free=50 * 10**6)
    bad = {(row.area, row.name): row for row in found.rows if row.status != "ok"}
    assert {key: row.status for key, row in bad.items()} == {
        ("backends", "onnxruntime"): "wrong",
        ("backends", "torch"): "wrong",
        ("sensors", "energy"): "remark",
        ("rights", "root"): "remark",
        ("clocks", "clocks"): "remark",
        ("clocks", "governor"): "remark",
        ("cores", "quota"): "remark",
        ("cores", "kinds"): "remark",
        ("cores", "hypervisor"): "remark",
        ("load", "average"): "remark",
        ("load", "others"): "remark",
        ("load", "steal"): "remark",
        ("load", "swap"): "remark",
        ("load", "throttling"): "remark",
        ("load", "cuda0"): "remark",
        ("disk", "profiles"): "wrong",
        ("disk", "temporary"): "wrong",
        ("disk", "memory"): "wrong",
        ("profiles", "orin.jsonl"): "remark",
        ("profiles", "half.json"): "wrong",
    }
    assert [key for key, row in bad.items() if row.fix is None] == []
    assert bad["sensors", "energy"].fix == "sudo chmod a+r /sys/class/powercap/intel-rapl:0/energy_uj"
    assert bad["cores", "kinds"].fix == "taskset -c 1 hydradeploy profile"
    assert bad["cores", "quota"].fix == "hydradeploy profile --threads 1"
    assert bad["clocks", "governor"].fix == "sudo cpupower frequency-set -g performance"
    assert bad["profiles", "orin.jsonl"].fix == f"hydradeploy profile --resume --profiles {tmp_path / 'profiles'}"
    assert "half.json" in bad["profiles", "half.json"].found
    assert found.exit_code is ExitCode.MISSING


def test_a_machine_on_which_every_probe_fails_still_has_its_table(look, tmp_path):
    found = look(Broken(), {})
    assert {row.area for row in found.rows} == set(AREAS)
    failed = [row for row in found.rows if row.found == "could not be looked at: the sensor hub is on fire"]
    assert len(failed) >= 10
    assert {row.status for row in failed} == {"remark"}
    assert row(found, "profiles", "whole ones").status == "ok"
    assert row(found, "disk", "profiles").status == "ok"
    assert found.exit_code is ExitCode.OK


def test_a_probe_that_fails_midway_keeps_what_it_found_before(look):
    here = Toy(rises={"busy_s": 0.25})
    here.counters["swapped_pages"] = "many"  # type: ignore[assignment]
    found = look(here)
    assert [(row.name, row.status) for row in found.rows if row.area == "load"] == [
        ("average", "ok"),
        ("others", "remark"),
        ("others", "remark"),
    ]


def test_a_backend_whose_version_cannot_be_told_hides_no_other(look, backends):
    second = Runtime()
    second.software = lambda: 1 / 0
    backends(first=Runtime(), second=second, third=Runtime())
    found = look()
    assert [(row.name, row.status) for row in found.rows if row.area == "backends"] == [
        ("first", "ok"),
        ("second", "remark"),
        ("third", "ok"),
    ]
    assert "division by zero" in row(found, "backends", "second").found


@pytest.mark.parametrize(
    ("reason", "status", "code"), [("not installed", "wrong", ExitCode.MISSING), (None, "ok", ExitCode.OK)]
)
def test_a_missing_backend_is_wrong_only_where_there_is_no_other(look, backends, reason, status, code):
    backends(onnxruntime=Runtime("the package onnxruntime is not installed"), other=Runtime(reason))
    found = look()
    missing = row(found, "backends", "onnxruntime")
    assert missing.status == ("wrong" if reason else "remark")
    assert missing.fix == "pip install 'hydradeploy[ort]'"
    assert row(found, "backends", "other").status == status
    assert found.exit_code is code


@pytest.mark.parametrize(
    ("here", "files", "helps"),
    [
        (Toy(), {}, False),
        (Toy(), {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95\n"}, True),
        (Toy(), {"dev/dxg": ""}, True),
        (Toy(kind="jetson"), {}, True),
    ],
)
def test_nothing_is_to_be_installed_for_a_gpu_that_is_not_there(look, backends, here, files, helps):
    on_gpu = {name: Runtime("no CUDA device") for name in ("onnxruntime-cuda", "torch-cuda")}
    for runtime in on_gpu.values():
        runtime.processor = "cuda"
    backends(toy=Runtime(), openvino=Runtime("the package openvino is not installed"), **on_gpu)
    found = look(here, {**QUIET, **files})
    assert row(found, "backends", "openvino").fix == "pip install 'hydradeploy[openvino]'"
    fixes = {name: row(found, "backends", name).fix for name in on_gpu}
    assert fixes == {
        "onnxruntime-cuda": "pip install 'hydradeploy[cuda]'" if helps else None,
        "torch-cuda": "a build of torch for the GPU: https://pytorch.org/get-started/locally" if helps else None,
    }


def test_every_backend_has_a_remedy_and_every_extra_in_one_exists():
    from importlib.metadata import metadata

    named = re.findall(r"hydradeploy\[([\w-]+)\]", " ".join(REMEDIES.values()))
    assert len(named) >= 5
    assert set(named) <= set(metadata("hydradeploy").get_all("Provides-Extra") or [])
    assert list(REMEDIES) == list(BACKEND_MODULES)


def test_a_device_that_is_not_here_is_wrong_and_the_rest_is_about_what_is(tmp_path, monkeypatch):
    class Absent(Toy):
        def why_not(self) -> str | None:
            return "no /etc/board_release"

    module = types.ModuleType("toy_board")
    module.MACHINE = Absent(kind="board")
    monkeypatch.setitem(sys.modules, "toy_board", module)
    monkeypatch.setitem(DEVICE_MODULES, "board", "toy_board")
    found = diagnose(tmp_path, device="board", rest=lambda seconds: None)
    asked = row(found, "device", "asked for")
    assert asked.status == "wrong"
    assert "no /etc/board_release" in asked.found
    assert (asked.fix or "").startswith(f"hydradeploy profile --device {found.device}, ")
    assert found.device != "board"
    assert found.exit_code is ExitCode.MISSING
    unasked = diagnose(tmp_path, rest=lambda seconds: None)
    assert row(unasked, "device", "board") == Row("device", "board", "ok", "no: no /etc/board_release")
    assert unasked.exit_code is ExitCode.OK


def test_a_gpu_whose_library_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("hydradeploy.devices.cuda.MACHINE", Cuda())
    asked = row(diagnose(tmp_path, device="cuda", rest=lambda seconds: None), "device", "asked for")
    assert (asked.status, asked.fix) == ("wrong", "pip install nvidia-ml-py")


def test_an_unknown_kind_of_device_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(UsageError, match="no device kind 'toaster'"):
        diagnose(tmp_path, device="toaster")


@pytest.mark.parametrize(
    ("free", "status", "code"),
    [
        (99 * 10**6, "wrong", ExitCode.ENVIRONMENT),
        (100 * 10**6, "remark", ExitCode.OK),
        (GB - 1, "remark", ExitCode.OK),
        (GB, "ok", ExitCode.OK),
    ],
)
def test_room_on_the_disk(look, free, status, code):
    found = look(free=free)
    assert row(found, "disk", "profiles").status == status
    assert row(found, "disk", "temporary").status == status
    assert found.exit_code is code


@pytest.mark.parametrize(
    ("most", "found", "status"),
    [
        (99 * 10**6, "94.4 MiB left of what its control group grants", "wrong"),
        (600 * 10**6, "572 MiB left of what its control group grants", "remark"),
        (1 << 40, "available", "ok"),
    ],
)
def test_memory_is_what_a_container_may_have_of_it(look, most, found, status):
    group = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(most), "sys/fs/cgroup/memory.current": "0"}
    memory = row(look(files=QUIET | group), "disk", "memory")
    assert memory.status == status
    assert found in memory.found
    assert ("memory.max" in str(memory.fix)) == (status != "ok")


def test_a_directory_of_profiles_that_is_not_there_yet_is_fine_and_is_not_made(tmp_path):
    found = diagnose(tmp_path / "not" / "yet", here=Toy(), rest=lambda seconds: None)
    assert row(found, "disk", "profiles").status == "ok"
    assert row(found, "profiles", "whole ones").found.startswith("0 in ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_is_told_from_one_that_was_cut_short(look, tmp_path):
    (tmp_path / "profiles").mkdir()
    journal = tmp_path / "profiles" / "orin.jsonl"
    journal.write_text('{"schema":1}\n{"round":0}\n{"round":1}\n{"roun')
    cut = row(look(), "profiles", "orin.jsonl")
    assert cut.found == "2 measurements of a run that was cut short; repeat its command to go on"
    assert cut.fix == f"hydradeploy profile --resume --profiles {tmp_path / 'profiles'}"
    with journal.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        going = row(look(), "profiles", "orin.jsonl")
    assert going.found == "a run goes on, 2 measurements so far"
    assert "--resume" not in (going.fix or "")


def test_whole_profiles_are_counted(look, tmp_path):
    cell = Cell(
        artifact="h03-fp32",
        graph_sha256="0" * 64,
        backend="toy",
        processor="cpu",
        compute_type="fp32",
        input="float32",
        batch=1,
        threads=1,
        regime="saturated",
        measured_at="2026-01-01T00:00:00Z",
        latency_s=(0.001,),
        process=(0,),
    )
    here = Toy()
    add_profile(tmp_path / "profiles", Profile(device=here.identity(), conditions=here.conditions({}), cells=(cell,)))
    assert row(look(), "profiles", "whole ones").found == f"1 in {tmp_path / 'profiles'}"


def test_profiles_cannot_be_kept_in_a_file(tmp_path):
    (tmp_path / "profiles").write_text("")
    found = diagnose(tmp_path / "profiles", here=Toy(), rest=lambda seconds: None)
    assert row(found, "disk", "profiles").status == "wrong"
    assert found.exit_code is ExitCode.ENVIRONMENT


def test_a_directory_that_cannot_be_written_is_wrong(look, monkeypatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = look()
    assert row(found, "disk", "profiles").status == "wrong"
    assert "Permission denied" in row(found, "disk", "profiles").found
    assert (row(found, "disk", "profiles").fix or "").startswith("sudo chown $USER ")


@pytest.mark.parametrize(
    ("counter", "rise", "name", "status"),
    [
        ("busy_s", 0.09, "others", "ok"),
        ("busy_s", 0.15, "others", "remark"),  # 0.3 cores in half a second; four cores bear 0.2, and rounding
        ("steal_s", 0.05, "steal", "ok"),
        ("steal_s", 0.06, "steal", "remark"),
        ("swapped_pages", 16, "swap", "ok"),
        ("swapped_pages", 17, "swap", "remark"),
        ("overcurrent_events.oc3", 10, "throttling", "ok"),
        ("overcurrent_events.oc3", 11, "throttling", "remark"),
        ("throttle_events.core", 1, "throttling", "remark"),
        ("cgroup_throttled", 1, "throttling", "remark"),
    ],
)
def test_what_others_do_is_a_remark_from_where_cells_are_flagged(look, counter, rise, name, status):
    assert row(look(Toy(rises={counter: rise})), "load", name).status == status


def test_a_quota_that_runs_out_is_no_matter_of_heat(look):
    assert "cpu.max" in str(row(look(Toy(rises={"cgroup_throttled": 1})), "load", "throttling").fix)
    both = Toy(rises={"cgroup_throttled": 1, "throttle_events.core": 1})
    assert "let it cool" in str(row(look(both), "load", "throttling").fix)


def test_what_this_process_does_itself_is_not_others_work(look):
    def work(seconds: float) -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass

    assert row(look(Toy(rises={"busy_s": 0.25})), "load", "others").status == "remark"
    assert row(look(Toy(rises={"busy_s": 0.25}), rest=work), "load", "others").status == "ok"


@pytest.mark.parametrize(
    ("here", "cpuinfo"),
    [
        (Toy(threads=2), CPUINFO),
        (Toy(threads=2, kind="cuda", cores_told=16896), CPUINFO),
        (Toy(cores_told=0), "no processor is listed\n"),
    ],
)
@pytest.mark.parametrize(("average", "status"), [("3.90", "ok"), ("4.10", "remark")])
def test_a_load_beyond_the_four_cores_of_the_host_is_a_remark(look, here, cpuinfo, average, status):
    files = {**QUIET, "proc/loadavg": f"{average} 1 1 1/100 7\n", "proc/cpuinfo": cpuinfo}
    assert row(look(here, files), "load", "average").status == status


@pytest.mark.parametrize(
    ("cores", "memory", "found"),
    [(16896, 80 << 30, "cuda: Toy, x-y, 16896 cores, 80.0 GiB"), (0, 0, "cuda: Toy, x-y")],
)
def test_a_device_that_does_not_tell_its_size_is_not_of_size_0(look, cores, memory, found):
    here = Toy(kind="cuda", cores_told=cores, memory_told=memory)
    assert row(look(here), "device", "profile takes").found == found


@pytest.mark.parametrize(
    "name", ["FOREIGN_CORES", "FOREIGN_SHARE", "STEAL_CORES", "STEPS_S", "SWAPPED_PAGES", "OVERCURRENTS_PER_S"]
)
def test_the_thresholds_are_those_of_the_flags(name):
    assert getattr(load, name) == getattr(flags, name)


def test_a_throttling_of_last_month_is_no_remark(look):
    found = look(Toy(counters={"busy_s": 0.0, "throttle_events.core": 12345.0}))
    assert row(found, "load", "throttling").status == "ok"
    assert row(found, "sensors", "throttle events").found == "core 12345 since boot"


def test_sensors_are_shown_with_their_unit_and_their_meter(look):
    gauges = {"clock_hz.gpu": 1.02e9, "clock_hz.idle": 0.0, "load.gpu": 0.34, "available_bytes": 2.0**30}
    zones = {f"temperature_c.zone{number}": 40.0 + number for number in range(9)}
    found = look(Toy(gauges={**gauges, **zones, "power_w.VDD_SOC": 1.25, "power_w": 7.5}, counters={"energy_j": 12.5}))
    shown = {row.name: row.found for row in found.rows if row.area == "sensors"}
    assert shown == {
        "clock": "gpu 1.02 GHz, idle 0 Hz",
        "load": "gpu 34%",
        "memory available": "1.00 GiB",
        "temperature": "zone8 48.0 °C, zone7 47.0 °C, zone6 46.0 °C, zone5 45.0 °C and 5 more",
        "power": "7.50 W, VDD_SOC 1.25 W (VDD_IN, module)",
        "energy": "12.5 J (VDD_IN, module)",
    }


RAPL = "sys/class/powercap/intel-rapl:{}/energy_uj"


@pytest.mark.parametrize(
    ("reason", "files", "fix"),
    [
        ("/" + RAPL.format(0) + ": no permission", [RAPL.format(0)], "sudo chmod a+r /" + RAPL.format(0)),
        (
            "/" + RAPL.format(0) + ": no permission",
            [RAPL.format(0), RAPL.format(1)],
            f"sudo chmod a+r /{RAPL.format(0)} /{RAPL.format(1)}",
        ),
        (
            "/" + RAPL.format(0) + ": no permission; run as root",
            [RAPL.format(0), RAPL.format("0:0"), RAPL.format(12)],
            f"sudo chmod a+r /{RAPL.format(0)} /{RAPL.format(12)}",
        ),
        ("no permission (/sys/class/hwmon/hwmon1/in1_input)", [], "sudo chmod a+r /sys/class/hwmon/hwmon1/*_input"),
        ("/sys/kernel/debug/nvmap: no permission", [], f"sudo {sys.executable} -m hydradeploy profile"),
        ("NVML: no permission", [], f"sudo {sys.executable} -m hydradeploy profile"),
        ("no RAPL below /sys/class/powercap, as in most virtual machines", [], None),
    ],
)
def test_what_only_lacks_permission_says_how_it_is_given(look, reason, files, fix):
    found = look(Toy(unread={"energy": reason}), {**QUIET, **dict.fromkeys(files, "1")})
    assert row(found, "sensors", "energy") == Row("sensors", "energy", "remark", reason, fix)


def test_a_sensor_that_is_off_with_its_engine_is_in_order(look):
    found = look(Toy(unread={"temperature_c.cv0-thermal": "the sensor is off (/sys/x/temp)"}))
    assert row(found, "sensors", "temperature cv0-thermal").status == "ok"


@pytest.mark.parametrize("kind", ["cpu", "cuda", "jetson"])
def test_root_is_offered_for_what_it_gives_on_this_device(look, monkeypatch, kind):
    here = Toy(kind=kind, unread={"energy": "/sys/x: no permission"})
    files = {**QUIET, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave"}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refused = row(look(here, files), "rights", "root")
    assert refused.status == "remark"
    assert "energy" in refused.found
    assert "pinning of clocks" in refused.found
    assert ("NvMap" in refused.found) == (kind == "jetson")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert row(look(here, files), "rights", "root").status == "ok"


def test_root_is_not_asked_for_where_it_gives_nothing(look, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert row(look(), "rights", "root").status == "ok"


JETSONS = Path(__file__).parent / "fixtures" / "devices" / "jetson"


@pytest.mark.parametrize(
    ("board", "mode", "power"),
    [
        ("orin-nano", "MAXN_SUPER", "(VDD_IN, module)"),
        ("agx-orin", "MAXN", "(VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0, module)"),
        ("thor", None, "(VIN, board)"),
    ],
)
def test_the_recorded_jetsons(tmp_path, backends, board, mode, power):
    def command(words) -> str:
        if mode is None:
            raise MissingError("there is no program nvpmodel here")
        return (JETSONS / board / "nvpmodel-q.txt").read_text()

    root = JETSONS / board
    found = diagnose(tmp_path, here=Jetson(root, command), root=root, rest=lambda seconds: None)
    assert [row for row in found.rows if "could not be looked at" in row.found] == []
    assert found.device == "jetson"
    assert row(found, "device", "jetson").found == "this machine is one"
    assert row(found, "sensors", "power").found.endswith(power)
    assert "thermal" in row(found, "sensors", "temperature").found
    assert row(found, "clocks", "clocks").status == "remark"
    assert "jetson_clocks" in (row(found, "clocks", "clocks").fix or "")
    assert row(found, "load", "throttling").status == "ok"
    if mode is None:
        assert row(found, "sensors", "power mode").found == "there is no program nvpmodel here"
    else:
        assert row(found, "clocks", "power mode").found == mode
    assert found.exit_code is ExitCode.OK


def test_overcurrent_of_a_whole_uptime_is_shown_and_is_no_remark(tmp_path, backends):
    root = JETSONS / "orin-nano"
    found = diagnose(tmp_path, here=Jetson(root, lambda words: ""), root=root, rest=lambda seconds: None)
    assert row(found, "sensors", "throttle events").found.startswith("oc2 15, ")
    assert row(found, "sensors", "overcurrent events") == Row(
        "sensors", "overcurrent events", "ok", "oc3 37 since boot"
    )


@pytest.mark.parametrize(
    ("kind", "command"), [("cpu", "--lock-clocks"), ("cuda", "nvidia-smi -lgc"), ("jetson", "sudo jetson_clocks")]
)
def test_floating_clocks_are_a_remark_with_what_pins_them(look, kind, command):
    found = row(look(Toy(kind=kind, clocks="floating")), "clocks", "clocks")
    assert found.status == "remark"
    assert command in (found.fix or "")


@pytest.mark.parametrize(
    ("here", "status"),
    [
        (Toy(governor="schedutil", clocks="pinned"), "ok"),
        (Toy(governor="schedutil", clocks="floating"), "remark"),
        (Toy(governor="performance", clocks="floating"), "ok"),
        (Toy(governor="schedutil", clocks="floating", kind="jetson"), "ok"),
        (Toy(governor=None, clocks=None), "ok"),
    ],
)
def test_a_governor_matters_where_nothing_else_pins_the_clocks(look, here, status):
    assert row(look(here), "clocks", "governor").status == status


def test_clocks_that_cannot_be_read_are_a_remark_without_a_fix(look):
    found = row(look(Toy(clocks=None)), "clocks", "clocks")
    assert (found.status, found.fix) == ("remark", None)


def test_a_quota_below_one_core_is_not_met_by_fewer_threads(look):
    assert row(look(Toy(quota_cores=0.5)), "cores", "quota").fix == "raise cpu.max of the control group"


def test_the_power_mode_is_told_by_name(look):
    assert row(look(Toy(power_mode="MAXN_SUPER")), "clocks", "power mode").found == "MAXN_SUPER"


def test_the_table_is_aligned_and_a_fix_stands_whole_below_its_row():
    long = "sudo chmod a+r " + " ".join(f"/sys/class/powercap/intel-rapl:{number}/energy_uj" for number in range(8))
    rows = (Row("disk", "memory", "ok", "much"), Row("sensors", "energy", "remark", "closed", long))
    assert list(lines(Diagnosis(device="cpu", rows=rows))) == [
        "ok      disk     memory  much",
        "remark  sensors  energy  closed",
        f"                         fix: {long}",
        "nothing is wrong, 1 remark",
    ]


@pytest.mark.parametrize(
    ("statuses", "last"),
    [
        (["ok"], "nothing is wrong, 0 remarks"),
        (["wrong", "remark", "remark"], "1 thing is wrong, 2 remarks"),
        (["wrong", "wrong", "remark"], "2 things are wrong, 1 remark"),
    ],
)
def test_the_last_line_sums_up(statuses, last):
    rows = tuple(Row("disk", "memory", status, "") for status in statuses)
    assert list(lines(Diagnosis(device="cpu", rows=rows)))[-1] == last


def test_a_diagnosis_goes_through_json(look):
    found = look()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Diagnosis) == found


def test_this_machine_can_be_looked_at(tmp_path):
    found = diagnose(tmp_path)
    assert {row.area for row in found.rows} == set(AREAS)
    assert [row for row in found.rows if "could not be looked at" in row.found] == []
    assert row(found, "device", "profile takes").found.startswith(found.device)
    assert "cores busy with others" in row(found, "load", "others").found
