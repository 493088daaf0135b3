"""`hydradeploy profile` as people use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hydradeploy.devices import machine
from hydradeploy.measurements import read_profile
from tests.conftest import Cli


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.exists() else []


def test_a_profile_end_to_end_is_one_json_document_and_then_a_table(shared_bundle, tmp_path, cli: Cli):
    """The second run, as a table, replaces the one cell it measures and keeps the other."""
    common = ("profile", "--bundle", shared_bundle, "--profiles", tmp_path, "--threads", 1, "--heads", 2)
    ran = cli(*common, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    stored = read_profile(Path(found["profile"]))
    assert files(tmp_path) == [stored.path.name]
    assert found["device"]["name"] == machine().identity().name == stored.profile.device.name
    assert [cell["artifact"] for cell in found["cells"]] == [cell.artifact for cell in stored.profile.cells]
    assert sorted(cell.artifact for cell in stored.profile.cells) == ["h02-fp16", "h02-fp32"]
    for cell in stored.profile.cells:
        assert cell.error is None
        assert 100 <= len(cell.latency_s) <= 1000
        assert sorted(set(cell.process)) == [0, 1, 2, 3, 4]
        assert len(cell.load_s) == len(cell.first_s) == 5
        assert min(cell.load_s) > 0
        assert cell.memory_bytes is not None
        assert cell.memory_bytes > 0
    assert "measuring 0/10" in ran.err
    assert "Traceback" not in ran.err
    again = cli(*common, "--precision", "fp16")
    assert again.code == 0, again.err
    lines = list(filter(None, map(str.strip, again.out.splitlines())))
    assert lines[0] == "saturated, onnxruntime, cpu, 1 thread, batch 1"
    assert lines[1].split()[:4] == ["artifact", "p50", "(95", "%)"]
    assert [line.split()[0] for line in lines if line.startswith("h0")] == ["h02-fp16"] * 2
    assert lines[-1].startswith(f"{stored.path}: ")
    assert lines[-1].endswith("1 cell measured")
    now = {cell.artifact: cell for cell in read_profile(stored.path).profile.cells}
    before = {cell.artifact: cell for cell in stored.profile.cells}
    assert now["h02-fp32"] == before["h02-fp32"]
    assert now["h02-fp16"].latency_s != before["h02-fp16"].latency_s


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--preset", "gentle"), 2, "error: no preset 'gentle'\nhint: one of quick, standard, gate, sustained"),
        (("--device", "toaster"), 2, "error: no device kind 'toaster'\nhint: one of jetson, cuda, cpu"),
        (("--backend", "abacus"), 2, "error: no backend 'abacus'\nhint: one of onnxruntime"),
        (("--threads", "0"), 2, "error: threads must be 1 to"),
        (("--threads", "two"), 2, "error: 'two' is not a list of counts"),
        (("--threads", ""), 2, "error: "),
        (("--heads", "7"), 2, "no artifact of 7 heads\nhint: it has h02-fp32"),
        (("--heads", "six"), 2, "error: 'six' is not a list of head counts"),
        (("--precision", "int8"), 2, "no artifact of int8\nhint: it has h02-fp32"),
        (("--ssh", "ssh -v"), 2, "error: --ssh is about another device\nhint: name it with --host"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    shared_bundle, tmp_path, cli: Cli, arguments, code, said
):
    ran = cli("profile", "--bundle", shared_bundle, "--profiles", tmp_path / "profiles", *arguments)
    assert ran.code == code
    assert said in ran.err
    assert ran.out == ""
    assert "measuring" not in ran.err
    assert not (tmp_path / "profiles").exists()


@pytest.mark.parametrize("command", [("profile",), ("profile", "--dry-run"), ("pick", "--latency", "5ms")])
def test_a_file_in_the_place_of_the_directory_of_profiles_is_named(shared_bundle, tmp_path, cli: Cli, command):
    (tmp_path / "cpu.json").write_text("{}")
    ran = cli(command[0], "--bundle", shared_bundle, "--profiles", tmp_path / "cpu.json", *command[1:])
    assert ran.code == 2
    assert f"{tmp_path / 'cpu.json'}: this is a file, profiles lie in a directory\nhint: name {tmp_path}" in ran.err


def test_how_another_device_is_reached_may_be_said_for_good(shared_bundle, tmp_path, cli: Cli, monkeypatch):
    monkeypatch.setenv("HYDRADEPLOY_SSH", "ssh -v")
    ran = cli("profile", "--bundle", shared_bundle, "--profiles", tmp_path / "profiles", "--dry-run")
    assert ran.code == 0, ran.err


def test_no_bundle_is_a_usage_error_that_says_how_to_make_one(tmp_path, cli: Cli):
    ran = cli("profile", "--bundle", tmp_path / "gone", "--profiles", tmp_path / "profiles")
    assert ran.code == 2
    assert f"error: {tmp_path / 'gone'}: no bundle here\nhint: write one with hydradeploy export" in ran.err
    assert files(tmp_path) == []


def test_a_damaged_bundle_is_exit_10(bundle, tmp_path, cli: Cli):
    (bundle / "h04-fp32.onnx").write_bytes(b"not a graph")
    ran = cli("profile", "--bundle", bundle, "--profiles", tmp_path / "profiles")
    assert ran.code == 10
    assert "h04-fp32.onnx" in ran.err


STAND_IN = """
    import os, sys, time
    import numpy as np

    class SessionOptions:
        def add_session_config_entry(self, name, value):
            pass

    class GraphOptimizationLevel:
        ORT_ENABLE_ALL = ORT_DISABLE_ALL = ORT_ENABLE_BASIC = ORT_ENABLE_EXTENDED = 0

    class InferenceSession:
        def __init__(self, graph, settings, providers):
            self.graph = graph

        def run(self, names, inputs):
            {running}
            return [np.zeros((1, 10), np.float32)]

    __version__ = "0"
"""


@pytest.fixture
def stand_in(tmp_path):
    """The environment in which a package of our own takes the place of onnxruntime, in the children alone."""

    def make(running: str) -> dict[str, str]:
        package = tmp_path / "packages" / "onnxruntime"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(textwrap.dedent(STAND_IN).format(running=running))
        return {"PYTHONPATH": str(package.parent)}

    return make


def test_a_cell_that_fails_is_told_and_the_others_are_kept(shared_bundle, tmp_path, cli: Cli, monkeypatch, stand_in):
    environment = stand_in("time.sleep(0.001) if 'h02' in self.graph else os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    ran = cli(
        "profile", "--bundle", shared_bundle, "--profiles", tmp_path / "p", "--heads", "2,3", "--precision", "fp32"
    )
    assert ran.code == 0, ran.err
    assert "not measured: h03-fp32: the measuring process ended with SIGKILL: it said nothing\n" in ran.err
    row = next(line for line in ran.out.splitlines() if "h03-fp32" in line)
    assert "failed" in row
    assert ran.out.rstrip().endswith("1 cell measured, 1 failed")
    cells = {cell.artifact: cell for cell in read_profile(next((tmp_path / "p").glob("*.json"))).profile.cells}
    assert cells["h02-fp32"].error is None
    assert cells["h03-fp32"].error is not None


def test_where_every_cell_fails_it_is_exit_8_with_the_reason(shared_bundle, tmp_path, cli: Cli, monkeypatch, stand_in):
    monkeypatch.setenv("PYTHONPATH", stand_in("os.kill(os.getpid(), 9)")["PYTHONPATH"])
    ran = cli("profile", "--bundle", shared_bundle, "--profiles", tmp_path / "p", "--heads", "2")
    assert ran.code == 8
    assert "error: no cell could be measured: h02-fp" in ran.err
    assert "SIGKILL" in ran.err
    assert "Traceback" not in ran.err
    assert files(tmp_path / "p") == []


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "to_group", "background"),
    [
        (signal.SIGINT, False, False),
        (signal.SIGINT, True, False),
        (signal.SIGTERM, False, False),
        (signal.SIGTERM, False, True),
    ],
    ids=["SIGINT", "Ctrl-C", "SIGTERM", "SIGTERM in the background"],
)
def test_an_interrupted_run_exits_with_130_and_leaves_no_profile_half_written_and_no_child(
    shared_bundle, tmp_path, stand_in, number, to_group, background
):
    """It comes when the first child is in the middle of a call that never ends; in the background of a script a shell
    has Ctrl-C ignored."""
    marker, profiles = tmp_path / "pid", tmp_path / "profiles"
    running = f"open({str(marker) + '.new'!r}, 'w').write(str(os.getpid()))"
    running += f"; os.rename({str(marker) + '.new'!r}, {str(marker)!r}); time.sleep(600)"
    command = [sys.executable, "-m", "hydradeploy", "profile", "--bundle", shared_bundle, "--profiles", profiles]
    (tmp_path / "tmp").mkdir()
    parent = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | stand_in(running) | {"TMPDIR": str(tmp_path / "tmp")},
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None,
    )
    child = None
    try:
        for _ in range(600):
            if marker.exists() or parent.poll() is not None:
                break
            time.sleep(0.05)
        assert marker.exists(), parent.communicate(timeout=10)
        child = int(marker.read_text())
        os.killpg(parent.pid, number) if to_group else parent.send_signal(number)
        out, err = parent.communicate(timeout=30)
        assert parent.returncode == 130, err
        assert err.rstrip().endswith("interrupted")
        assert "Traceback" not in err
        assert out == ""
        assert gone(child)
        assert files(profiles) == []
        assert files(tmp_path / "tmp") == [], "the images to measure with are gone"
    finally:
        for pid in filter(None, (parent.pid if parent.poll() is None else None, child)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()
