"""OpenVINO's own: what it must not do to the process it runs in, and what it is not trusted with."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from hydradeploy.backends import Options, backend, model_of
from hydradeploy.errors import MissingError
from tests.conftest import require

# Two models in two threads, as the only user of OpenVINO or beside another one; then a signal is handled.
SIGNALLED = """
import ctypes, signal, sys, threading
from pathlib import Path
import numpy as np
from hydradeploy.backends import Options, backend, model_of
from hydradeploy.backends.openvino import _Stack
from hydradeploy.bundle import open_bundle

def stack():
    now = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(now))
    return now.ss_sp, now.ss_flags, now.ss_size

if "faulthandler" in sys.argv:
    import faulthandler
    faulthandler.enable()
before, others = stack(), []
if "others first" in sys.argv:
    sys.modules["openvino_telemetry"] = None
    import openvino
    others.append(openvino.Core())
    others[0].get_property("CPU", "FULL_DEVICE_NAME")
opened, runner = open_bundle(Path(sys.argv[1])), backend("openvino")

def start(name):
    session = runner.open(model_of(opened, opened.artifact(name), "ort"), Options(threads=1))
    session.run(np.zeros((1, 3, 32, 32), np.float32))
    return session

first, second = start("h03-fp32"), start("h04-fp32")
others.clear()
with first:
    pass
if "thread" in sys.argv:
    closing = threading.Thread(target=second.__exit__, args=(None, None, None))
    closing.start()
    closing.join()
else:
    with second:
        pass
del first, second
if "others later" in sys.argv:
    import openvino
    openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
assert stack() == before, (stack(), before)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("handled")
start("h05-fp32").run(np.zeros((1, 3, 32, 32), np.float32))
"""


@pytest.fixture(autouse=True)
def runner():
    require("openvino")
    return backend("openvino")


def python(code: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it leaves the stack alone")
@pytest.mark.parametrize("how", ["", "thread", "faulthandler", "others first", "others later"])
def test_a_signal_is_handled_after_models_were_closed_in_the_order_they_were_opened(shared_bundle, how):
    """Its plugin leaves the stack of signal handlers on memory that is gone; the process dies of the next one."""
    ran = python(SIGNALLED, shared_bundle.resolve(), how)
    assert (ran.returncode, ran.stdout) == (0, "handled\n"), ran.stderr


def test_it_writes_nothing_to_the_home_directory_and_loads_nothing_that_sends(shared_bundle, tmp_path):
    code = """
import sys
from pathlib import Path
from hydradeploy.backends import Options, backend, model_of
from hydradeploy.bundle import open_bundle
opened, runner = open_bundle(Path(sys.argv[1])), backend("openvino")
runner.open(model_of(opened, opened.artifact("h03-fp32"), "ort"), Options()).__exit__(None, None, None)
print([name for name in sys.modules if "openvino_telemetry" in name])
import openvino_telemetry
"""
    require("openvino_telemetry")
    ran = python(code, shared_bundle.resolve(), HOME=str(tmp_path), CI="")
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr
    assert list(tmp_path.rglob("*")) == []


def test_one_that_pip_knows_nothing_of_has_a_version_too(runner, monkeypatch):
    """As Intel's archive has it, whose setupvars.sh puts its directory into PYTHONPATH."""
    told = runner.software()["openvino"]

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert runner.software()["openvino"].startswith(told)


def test_int8_with_ranges_found_at_run_time_is_left_to_others(runner):
    assert runner.compute_types("int8dyn") == ()


@pytest.mark.parametrize(
    ("has", "fp32", "fp16", "bf16", "int8"),
    [
        (("FP32",), ("fp32",), ("fp32",), ("fp32",), ()),
        (("FP32", "INT8"), ("fp32",), ("fp32",), ("fp32",), ("int8",)),
        (("FP32", "BF16", "INT8"), ("fp32", "bf16"), ("fp32",), ("bf16", "fp32"), ("int8",)),
        (("FP32", "FP16", "BF16"), ("fp32", "bf16", "fp16"), ("fp16", "fp32"), ("bf16", "fp32"), ()),
    ],
)
def test_compute_types_are_those_of_the_processor_the_artifacts_own_first(
    runner, monkeypatch, has, fp32, fp16, bf16, int8
):
    monkeypatch.setattr("hydradeploy.backends.openvino._capabilities", lambda: has)
    assert [runner.compute_types(name) for name in ("fp32", "fp16", "bf16", "int8")] == [fp32, fp16, bf16, int8]


def test_a_type_that_it_accepts_and_does_not_compute_in_is_an_error(runner, monkeypatch, everything):
    if "fp16" in runner.compute_types("fp32"):
        pytest.skip("this processor computes in fp16")
    instead = "bf16" if "bf16" in runner.compute_types("fp32") else "f32"
    monkeypatch.setattr("hydradeploy.backends.openvino._capabilities", lambda: ("FP32", "FP16"))
    target = model_of(everything, everything.artifact("h04-fp32"), "ort")
    with pytest.raises(MissingError, match=f"openvino computes h04-fp32 in {instead} here, not in fp16"):
        runner.open(target, Options(compute_type="fp16"))


def test_int8_for_any_number_of_images_is_refused_where_it_would_crash(runner, monkeypatch, everything):
    fixed = model_of(everything, everything.artifact("h04-int8"), "ort")
    monkeypatch.setattr("hydradeploy.backends.openvino._capabilities", lambda: ("FP32", "INT8"))
    monkeypatch.setattr("hydradeploy.backends.openvino.features", lambda: frozenset({"amx_int8"}))
    with pytest.raises(MissingError, match="AMX") as refused:
        runner.open(replace(fixed, batch="dynamic"), Options())
    assert "--batch" in str(refused.value.hint)
    with runner.open(fixed, Options(threads=1)) as session:
        assert session.run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


def test_the_threads_on_record_are_those_that_it_uses(runner, everything):
    target = model_of(everything, everything.artifact("h03-fp32"), "ort")
    with runner.open(target, Options(threads=1)) as session:
        assert session.facts()["threads"] == "1"
    with runner.open(target, Options(threads=10_000)) as session:
        assert 1 <= int(session.facts()["threads"]) <= (os.cpu_count() or 1)


def test_the_hint_decides_about_streams(runner, everything):
    target = model_of(everything, everything.artifact("h03-fp32"), "ort")
    with runner.open(target, Options(settings={"hint": "latency"})) as session:
        assert session.facts()["streams"] == "1"
    with runner.open(target, Options(threads=2, settings={"hint": "throughput"})) as session:
        assert int(session.facts()["streams"]) >= 1
