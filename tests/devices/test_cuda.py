"""GPUs through a stand-in for NVML: what they tell, which one it is, and each function failing on its own."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hydradeploy.devices import cuda as cuda_module
from hydradeploy.devices import machine
from hydradeploy.devices import nvml as nvml_module
from hydradeploy.devices.cuda import Cuda
from hydradeploy.devices.nvml import Nvml
from hydradeploy.errors import ExitCode, MissingError
from hydradeploy.profiler.flags import evidence, judge
from tests.conftest import missing
from tests.devices.fake_nvml import ERRORS, FUNCTIONS, Card, FakeNvml
from tests.devices.trees import tree

OURS, OTHERS = os.getpid(), 4_000_001
NECESSARY = {"nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"}


def cuda(library: FakeNvml | None = None, root: Path = Path("/nonexistent"), environment=None) -> Cuda:
    """Below a root where Linux tells nothing, so that every value is the GPU's."""
    return Cuda(Nvml(lambda: library or FakeNvml(), environment or {}), root)


def card(**values) -> Cuda:
    return cuda(FakeNvml([Card(**values)]))


# What it tells


def test_the_identity_is_the_gpus():
    device = cuda().identity()
    assert (device.kind, device.name, device.instruction_set) == ("cuda", "NVIDIA H100 80GB HBM3", "sm_90")
    assert (device.cores, device.memory_bytes) == (16896, 80 << 30)
    assert cuda().why_not() is None
    assert cuda().processors == ("cuda",)


def test_the_limit_of_power_is_the_mode_and_the_driver_is_among_the_software():
    conditions = cuda().conditions({"onnxruntime": "1.30"})
    assert conditions.power_mode == "450 W"
    assert conditions.software == {"onnxruntime": "1.30", "driver": "595.78", "cuda-driver": "13.2"}
    assert conditions.clocks == "floating"


def test_a_reading():
    reading = card(computing={OURS: 1 << 30, OTHERS: 5}, drawing={OTHERS + 1: 7}).read(4.5, ours=(OURS,))
    assert reading.at_s == 4.5
    assert reading.gauges == {
        "clock_hz.sm": 1755e6,
        "clock_hz.memory": 2619e6,
        "load.gpu": 0.87,
        "temperature_c.gpu": 61.0,
        "throttling.hw_slowdown": 0.0,
        "throttling.sw_thermal_slowdown": 0.0,
        "throttling.hw_thermal_slowdown": 0.0,
        "throttling.hw_power_brake": 0.0,
        "power_capped": 0.0,
        "foreign_processes.gpu": 1.0,
        "foreign_graphics.gpu": 1.0,
        "gpu_bytes": float(1 << 30),
    }
    assert reading.counters == {"throttle_events.thermal_s": 0.25, "power_capped_s": 7.5, "energy_j": 5000.123}


def test_the_sensors_of_the_host_are_in_a_reading_too(tmp_path):
    reading = cuda(root=tree(tmp_path, {"proc/meminfo": "MemAvailable: 8 kB\n", "proc/loadavg": "0.5 0 0\n"})).read(0.0)
    assert (reading.gauges["available_bytes"], reading.gauges["load_average"]) == (8192, 0.5)
    assert reading.gauges["clock_hz.sm"] == 1755e6


@pytest.mark.parametrize(
    ("events", "signs"),
    [
        (0x0, set()),
        (0x1, set()),
        (0x2, set()),
        (0x4, {"power_capped"}),
        (0x8, {"throttling.hw_slowdown"}),
        (0x10, set()),
        (0x20, {"throttling.sw_thermal_slowdown"}),
        (0x48, {"throttling.hw_slowdown", "throttling.hw_thermal_slowdown"}),
        (0x88, {"throttling.hw_slowdown", "throttling.hw_power_brake"}),
        (0x104, {"power_capped"}),
        (1 << 40, set()),
    ],
)
def test_events_that_protect_the_card_are_throttling_and_a_cap_of_power_is_not(events, signs):
    gauges = card(events=events).read(0.0).gauges
    assert {name for name, value in gauges.items() if value and name.startswith(("throttling", "power_"))} == signs


def test_one_process_that_computes_and_draws_counts_once_with_the_larger_figure():
    gauges = card(computing={OURS: 100, OTHERS: 9}, drawing={OURS: 70, OTHERS: 9}).read(0.0, ours=(OURS, 2)).gauges
    assert gauges["gpu_bytes"] == 100
    assert (gauges["foreign_processes.gpu"], gauges["foreign_graphics.gpu"]) == (1, 1)


def test_a_process_without_its_memory_is_missing_and_not_0():
    found = card(computing={OURS: None})
    assert "gpu_bytes" not in found.read(0.0, ours=(OURS,)).gauges
    assert found.nvml.problems["gpu_bytes"] == "the driver lists the process without its memory"


def test_in_a_container_nobody_is_called_foreign(tmp_path):
    library = FakeNvml([Card(computing={77: 5})])
    found = cuda(library, tmp_path)
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026532201]")
    gauges = found.read(0.0, ours=(OURS,)).gauges
    assert not {"foreign_processes.gpu", "foreign_graphics.gpu", "gpu_bytes"} & gauges.keys()
    assert "container" in found.missing()["foreign_processes.gpu"]
    assert found.occupied_bytes() == 3 << 30
    assert found.missing()["memory"].startswith("of the whole GPU, not of the process: ")


@pytest.mark.parametrize(
    ("values", "failing", "power_w", "meter"),
    [
        ({}, (), None, "NVML energy counter, whole card"),
        ({}, ("nvmlDeviceGetTotalEnergyConsumption",), 412.0, "NVML power, whole card"),
        ({"energy_mj": 0}, (), 412.0, "NVML power, whole card"),
        ({"energy_mj": 0, "instant_power_mw": 0}, (), 400.5, "NVML power, whole card"),
        ({"energy_mj": 0}, ("nvmlDeviceGetFieldValues",), 400.5, "NVML power, whole card"),
        ({"energy_mj": 0, "instant_power_mw": 0, "power_mw": 0}, (), None, None),
    ],
)
def test_power_is_read_only_where_there_is_no_energy_counter_and_0_is_no_measurement(values, failing, power_w, meter):
    library = FakeNvml([Card(**values)], {name: ERRORS["NotSupported"]() for name in failing})
    found = cuda(library)
    reading = found.read(0.0)
    assert reading.gauges.get("power_w") == power_w
    assert ("energy_j" in reading.counters) is (meter is not None and "energy" in meter)
    assert found.meter() == meter
    assert ("energy" in found.missing()) is (meter is None)


def test_older_functions_answer_where_newer_ones_are_missing():
    newer = {
        "nvmlDeviceGetTemperatureV": AttributeError("no nvmlDeviceGetTemperatureV"),
        "nvmlDeviceGetCurrentClocksEventReasons": ERRORS["FunctionNotFound"](),
        "nvmlSystemGetCudaDriverVersion_v2": ERRORS["FunctionNotFound"](),
        "nvmlDeviceGetPowerManagementLimit": ERRORS["NotSupported"](),
    }
    found = cuda(FakeNvml([Card(events=0x40)], dict(newer)))
    gauges = found.read(0.0).gauges
    assert (gauges["temperature_c.gpu"], gauges["throttling.hw_thermal_slowdown"]) == (61, 1)
    conditions = found.conditions({})
    assert (conditions.software["cuda-driver"], conditions.power_mode) == ("12.8", "380 W")
    assert not {"temperature_c.gpu", "throttling", "cuda-driver", "power_mode"} & found.missing().keys()


def test_bytes_of_older_releases_are_read_as_text():
    library = FakeNvml([Card(name=b"Tesla T4", uuid=b"GPU-11")])
    assert cuda(library, environment={"CUDA_VISIBLE_DEVICES": "GPU-1"}).identity().name == "Tesla T4"


# Every function failing


def everything(found: Cuda) -> dict[str, object]:
    """All that the machine tells, by name."""
    device, conditions, reading = found.identity(), found.conditions({}), found.read(1.0, ours=(OURS,))
    return {
        **{f"device.{name}": getattr(device, name) for name in device.__struct_fields__},
        **{f"conditions.{name}": getattr(conditions, name) for name in conditions.__struct_fields__},
        **reading.gauges,
        **reading.counters,
        "meter": found.meter(),
        "occupied": found.occupied_bytes(),
    }


# What is gone or other without a function, where no other function answers in its place.
LOST = {
    "nvmlDeviceGetName": {"device.name"},
    "nvmlDeviceGetCudaComputeCapability": {"device.instruction_set"},
    "nvmlDeviceGetNumGpuCores": {"device.cores"},
    "nvmlDeviceGetMemoryInfo": {"device.memory_bytes"},
    "nvmlDeviceGetPowerManagementLimit": {"conditions.power_mode"},
    "nvmlSystemGetDriverVersion": {"conditions.software"},
    "nvmlSystemGetCudaDriverVersion_v2": {"conditions.software"},
    "nvmlDeviceGetClockInfo": {"clock_hz.sm", "clock_hz.memory"},
    "nvmlDeviceGetTotalEnergyConsumption": {"energy_j", "power_w", "meter"},
    "nvmlDeviceGetUtilizationRates": {"load.gpu"},
    "nvmlDeviceGetViolationStatus": {"throttle_events.thermal_s", "power_capped_s"},
    "nvmlDeviceGetComputeRunningProcesses": {"foreign_processes.gpu", "gpu_bytes", "occupied"},
    "nvmlDeviceGetGraphicsRunningProcesses": {"foreign_graphics.gpu"},
}


@pytest.mark.parametrize(
    "error",
    [
        *(pytest.param(ERRORS[name](), id=name) for name in ("NotSupported", "NoPermission", "FunctionNotFound")),
        *(pytest.param(ERRORS[name](), id=name) for name in ("GpuIsLost", "Unknown")),
        pytest.param(AttributeError("module 'pynvml' has no such function"), id="older-package"),
        pytest.param(TypeError("of ctypes"), id="ctypes"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_fails_takes_what_it_tells_and_nothing_else(function, error):
    whole = everything(card(computing={OURS: 100}))
    found = cuda(FakeNvml([Card(computing={OURS: 100})], {function: error}))
    told, reasons = everything(found), found.missing()
    if function in NECESSARY:
        assert found.why_not()
        assert {name for name in told if "." in name and "device" not in name and "conditions" not in name} == set()
        assert (told["meter"], told["occupied"]) == (None, None)
    else:
        assert found.why_not() is None
        other = {name for name in {**whole, **told} if whole.get(name) != told.get(name)}
        assert other == LOST.get(function, set())
    assert all(reasons.values())
    # Nothing became 0 that was not, but in the identity, where 0 is a driver that is silent.
    assert not [name for name in told if told[name] == 0 and whole[name] != 0 and not name.startswith("device.")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ERRORS["NotSupported"](), "this GPU or its driver does not support it"),
        (ERRORS["NoPermission"](), "no permission"),
        (ERRORS["FunctionNotFound"](), "the driver is too old for it"),
        (ERRORS["GpuIsLost"](), "NVML Error with code 15"),
        (ERRORS["Unknown"](), "NVML Error with code 999"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_reason_of_a_failure_is_told(error, reason):
    found = cuda(FakeNvml(failing={"nvmlDeviceGetUtilizationRates": error}))
    assert found.missing()["load.gpu"] == reason


def test_a_question_that_is_answered_again_is_missing_no_more():
    library = FakeNvml(failing={"nvmlDeviceGetUtilizationRates": ERRORS["Unknown"]()})
    found = cuda(library)
    found.read(0.0)
    assert "load.gpu" in found.nvml.problems
    library.failing.clear()
    assert found.read(0.0).gauges["load.gpu"] == 0.87
    assert "load.gpu" not in found.missing()


def test_every_function_of_the_library_that_is_called_is_among_those_that_fail_here():
    sources = inspect.getsource(cuda_module) + inspect.getsource(nvml_module)
    called = set(re.findall(r"\.(nvml(?:Init|Device|System)\w*)", sources))
    assert called == set(FUNCTIONS)


def test_the_functions_are_those_of_the_package():
    try:
        import pynvml
    except ImportError:
        missing("pynvml", "nvidia-ml-py is not installed")
    assert not [name for name in (*FUNCTIONS, "nvmlMemory_v2") if not hasattr(pynvml, name)]
    assert {name for name in ERRORS if not issubclass(getattr(pynvml, f"NVMLError_{name}"), pynvml.NVMLError)} == set()


# Which GPU

TWO = [Card(uuid=f"GPU-aaaa-{OURS}"), Card(uuid=f"GPU-aabb-{OURS}")]
UNLIKE = [Card(name="T400", uuid=f"GPU-1-{OURS}"), Card(name="RTX 4090", uuid=f"GPU-2-{OURS}")]


@pytest.mark.parametrize(
    ("cards", "environment", "chosen"),
    [
        (TWO, {}, 0),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1"}, 1),
        (TWO, {"CUDA_VISIBLE_DEVICES": " 1 ,0"}, 1),
        (TWO, {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 0),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-aabb"}, 1),
        (TWO, {"CUDA_VISIBLE_DEVICES": f"GPU-aaaa-{OURS},GPU-aabb"}, 0),
        (UNLIKE, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 0),
        (UNLIKE, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}, 1),
        (UNLIKE, {"CUDA_VISIBLE_DEVICES": "GPU-2"}, 1),
    ],
)
def test_the_gpu_is_the_one_that_cuda_calls_0(cards, environment, chosen):
    found = cuda(FakeNvml(cards), environment=environment)
    assert found.why_not() is None
    assert found.identity().name == cards[chosen].name
    with found.lock_clocks():
        assert [each.locked is not None for each in cards] == [index == chosen for index in range(len(cards))]


@pytest.mark.parametrize(
    ("cards", "environment", "told"),
    [
        ([], {}, "has none"),
        (TWO, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is '', which makes none of 2 GPUs visible"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "2"}, "none of 2 GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "-1,0"}, "none of 2 GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "none"}, "none of 2 GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-aa"}, "fits 2 of 2 GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "GPU-cc"}, "fits 0 of 2 GPUs"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "MIG-GPU-aaaa/1/0"}, "MIG"),
        ([Card(divided=1)], {}, "MIG"),
        (UNLIKE, {}, "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (UNLIKE, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
    ],
)
def test_where_no_gpu_can_be_read_it_is_told_why_and_nothing_else_is(cards, environment, told):
    found = cuda(FakeNvml(cards), environment=environment)
    assert told in found.why_not()
    assert found.read(0.0).gauges == {}
    assert found.missing()["load.gpu"] == found.why_not()
    assert (found.identity().name, found.identity().memory_bytes) == ("NVIDIA GPU", 0)


def test_what_was_looked_for_is_the_package_then_the_library_then_a_gpu():
    def no_package():
        raise ModuleNotFoundError("No module named 'pynvml'")

    def another_package():
        raise SyntaxError("invalid syntax")

    assert "package nvidia-ml-py, which is not installed" in Cuda(Nvml(no_package)).why_not()
    assert "package nvidia-ml-py, which fails: invalid syntax" in Cuda(Nvml(another_package)).why_not()
    for name, told in (("LibraryNotFound", "libnvidia-ml.so.1 is not here"), ("DriverNotLoaded", "is not loaded")):
        assert told in cuda(FakeNvml(failing={"nvmlInit": ERRORS[name]()})).why_not()


def test_a_jetson_is_not_read_through_nvml(tmp_path):
    root = tree(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"})
    library = FakeNvml()
    assert "jetson" in cuda(library, root).why_not()
    assert library.asked == []


def test_a_machine_without_a_gpu_is_refused_with_what_was_looked_for(monkeypatch):
    absent = cuda(FakeNvml(failing={"nvmlInit": ERRORS["LibraryNotFound"]()}))
    monkeypatch.setattr(cuda_module, "MACHINE", absent)
    with pytest.raises(
        MissingError, match=r"cuda: looked for a GPU through NVML: the driver's libnvidia-ml"
    ) as refused:
        machine("cuda")
    assert refused.value.exit_code == ExitCode.MISSING == 8
    assert refused.value.hint == "hydradeploy doctor says what would help"
    with pytest.raises(MissingError, match="cuda: looked for") as unasked:
        machine(processor="cuda")
    assert unasked.value.hint.endswith("--device cpu measures the processor")


def test_the_library_is_started_at_the_first_question_and_once():
    library = FakeNvml()
    found = cuda(library)
    assert library.asked == []
    everything(found)
    everything(found)
    assert library.asked.count("nvmlInit") == 1


def test_a_forked_process_starts_the_library_anew(monkeypatch):
    library = FakeNvml()
    found = cuda(library)
    found.read(0.0)
    monkeypatch.setattr(os, "getpid", lambda: OTHERS)
    found.read(0.0)
    assert library.asked.count("nvmlInit") == 2


# Memory


def occupied(library: FakeNvml, *steps) -> list[int | None]:
    """What the same object says after each change of the card."""
    found, told = cuda(library), []
    for step in steps:
        for name, value in step.items():
            setattr(library.cards[0], name, value)
        told.append(found.occupied_bytes())
    return told


def test_memory_is_that_of_the_process_which_is_listed_from_its_first_use_on():
    before, after = occupied(FakeNvml(), {"computing": {OTHERS: 9}}, {"computing": {OTHERS: 9, OURS: 500}, "used": 1})
    assert (before, after) == (0, 500)


@pytest.mark.parametrize("listed", [None, 0])
def test_memory_that_turns_out_not_to_be_told_is_what_the_whole_gpus_rose_by(listed):
    before, after = occupied(FakeNvml(), {"used": 1000}, {"used": 1700, "computing": {OURS: listed}})
    assert (before, after) == (0, 700)


def test_where_processes_are_not_listed_memory_is_the_whole_gpus():
    library = FakeNvml(failing={"nvmlDeviceGetComputeRunningProcesses": ERRORS["NotSupported"]()})
    assert occupied(library, {"used": 1000}, {"used": 1700}) == [1000, 1700]
    assert cuda(library).missing()["memory"].startswith("of the whole GPU, not of the process: this GPU or its driver")


def test_memory_is_none_where_nothing_tells():
    names = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMemoryInfo")
    library = FakeNvml(failing={name: ERRORS["NoPermission"]() for name in names})
    assert occupied(library, {}, {}) == [None, None]
    assert cuda(library).missing()["memory"] == "no permission"


def test_memory_whose_first_version_is_not_supported_is_asked_for_by_the_second():
    class Spark(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, card, version=None):
            if version is None:
                raise ERRORS["NotSupported"]()
            return super().nvmlDeviceGetMemoryInfo(card, version)

    assert cuda(Spark()).identity().memory_bytes == 80 << 30


# Pinning clocks


def test_clocks_are_locked_at_the_highest_and_free_after():
    library = FakeNvml()
    found = cuda(library)
    with found.lock_clocks():
        assert library.cards[0].locked == (1980, 1980)
        assert found.conditions({}).clocks == "pinned"
    assert library.cards[0].locked is None
    assert found.conditions({}).clocks == "floating"


def test_a_clock_below_where_it_is_locked_is_seen_while_it_is():
    """The card does 1755 MHz of 1980."""
    found = cuda(FakeNvml())
    assert "pinned_hz.sm" not in found.read(0.0).gauges
    with found.lock_clocks():
        looked = [found.read(at_s) for at_s in (0.0, 1.0, 2.0, 3.0)]
    numbers = evidence(looked, 0.0, 3.0)
    assert numbers["pinned_hz.sm"] == 1980e6
    assert numbers["clock_shortfall.sm"] == pytest.approx(1 - 1755 / 1980)
    (flag,) = (flag for flag in judge([numbers], cores=1 << 10) if "clock" in flag.remark)
    assert flag.remark == "throttled: the sm clock was 11% below where it is pinned in 1 of 1 process"
    assert "pinned_hz.sm" not in found.read(4.0).gauges


@pytest.mark.parametrize("function", ["nvmlDeviceSetGpuLockedClocks", "nvmlDeviceResetGpuLockedClocks"])
def test_a_clock_that_could_not_be_locked_or_freed_has_no_target_any_more(function):
    found = cuda(FakeNvml(failing={function: ERRORS["NoPermission"]()}))
    with pytest.raises(MissingError), found.lock_clocks():
        pass
    assert "pinned_hz.sm" not in found.read(0.0).gauges


def test_clocks_that_another_process_of_ours_pins_are_known_to_be_pinned_until_it_ends_somehow():
    found = cuda()
    script = f"""
import sys, time
from hydradeploy.devices.claims import claimed
with claimed("the clocks of {Card().uuid}"):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            assert found.conditions({}).clocks == "pinned"
            assert cuda(FakeNvml([Card(uuid="GPU-another")])).conditions({}).clocks == "floating"
            with pytest.raises(MissingError, match="another process holds the clocks of GPU-"), found.lock_clocks():
                pytest.fail("entered")
        finally:
            other.kill()
    assert found.conditions({}).clocks == "floating"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_clocks_are_free_after_every_way_out(error):
    library = FakeNvml()
    with pytest.raises(error), cuda(library).lock_clocks():
        raise error
    assert library.cards[0].locked is None


def test_an_interrupt_while_locking_leaves_nothing_locked():
    class Interrupted(FakeNvml):
        def nvmlDeviceSetGpuLockedClocks(self, card, low, high):
            super().nvmlDeviceSetGpuLockedClocks(card, low, high)
            raise KeyboardInterrupt

    library = Interrupted()
    with pytest.raises(KeyboardInterrupt), cuda(library).lock_clocks():
        pytest.fail("entered")
    assert library.cards[0].locked is None


@pytest.mark.parametrize("function", ["nvmlDeviceGetMaxClockInfo", "nvmlDeviceSetGpuLockedClocks"])
@pytest.mark.parametrize(("name", "told"), [("NoPermission", "no permission"), ("NotSupported", "does not support it")])
def test_clocks_that_cannot_be_locked_are_told_with_a_hint_and_nothing_is_changed(function, name, told):
    library = FakeNvml([Card(locked=(1000, 1000))], {function: ERRORS[name]()})
    with pytest.raises(MissingError, match=f"cannot be pinned: .*{told}") as refused, cuda(library).lock_clocks():
        pytest.fail("entered")
    assert "root" in refused.value.hint
    assert library.cards[0].locked == (1000, 1000)


def test_clocks_that_stay_locked_are_told_with_the_command_that_frees_them():
    library = FakeNvml(failing={"nvmlDeviceResetGpuLockedClocks": ERRORS["Unknown"]()})
    with pytest.raises(MissingError, match="still locked") as refused, cuda(library).lock_clocks():
        pass
    assert refused.value.hint == "sudo nvidia-smi --reset-gpu-clocks"
