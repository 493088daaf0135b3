"""The device side needs neither torch nor onnx, and runs from the wheel on the oldest Python a Jetson has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hydradeploy import export, pack
from tests.conftest import missing, write_supernet

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".venv-device" / "bin" / "python"

WALL = """
import importlib.abc, sys
BANNED = {"torch", "onnx", "safetensors", "sklearn", "matplotlib", "openvino", "tensorrt_rtx"}

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Wall())
sys.argv = ["hydradeploy", *sys.argv[1:]]
from hydradeploy.cli import main
main()
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WALL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module", params=["bundle", "pack"])
def on_device(request, tmp_path_factory, shared_bundle) -> Path:
    if request.param == "bundle":
        return shared_bundle
    return pack(shared_bundle, "h04-fp16", tmp_path_factory.mktemp("packed") / "device").path


def test_verify_and_run_need_neither_torch_nor_onnx(on_device, image):
    verified = without_torch("verify", "--bundle", on_device, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["outputs"]
    ran = without_torch("run", image, "--bundle", on_device, "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["images"][0]["top"]) == 5


@pytest.fixture
def labelled(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(20) % 10)
    return tmp_path / "labelled.npz"


def test_evaluate_needs_neither_torch_nor_onnx(on_device, labelled, tmp_path):
    copy = shutil.copytree(on_device, tmp_path / "copy")
    ran = without_torch("evaluate", "--bundle", copy, "--data", labelled, "--json")
    assert ran.returncode == 0, ran.stderr
    assert all(row["n"] == 20 for row in json.loads(ran.stdout)["rows"])


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["export"], "export"),
        (["import", "x.pth"], "export"),
        (["pack", "h02-fp32", "--out", "x"], "export"),
        (["train", "--data", "digits"], "train"),
    ],
)
def test_workstation_commands_say_what_to_install(command, extra):
    ran = without_torch(*command)
    assert ran.returncode == 8
    assert "is not installed; this command belongs on a workstation" in ran.stderr
    assert f"hint: pip install 'hydradeploy[{extra}]'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "hydradeploy").rglob("*") if p.suffix in (".py", ".typed")
    }
    assert names == expected


@pytest.fixture(scope="module")
def oldest(wheel, tmp_path_factory) -> dict[str, str]:
    """The environment in which the oldest Python finds the wheel's content, its only copy of the package."""
    if not OLDEST.exists():
        missing("python3.10", "no Python 3.10 with the device's packages (make setup)")
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return os.environ | {"PYTHONPATH": str(site)}


def test_verify_evaluate_and_run_work_from_the_wheel_on_python_3_10(on_device, oldest, image, labelled, tmp_path):
    def device(*arguments: object) -> str:
        command = [str(OLDEST), "-W", "error", "-m", "hydradeploy", *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, env=oldest, cwd=image.parent)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    verified = json.loads(device("verify", "--bundle", on_device, "--json"))
    assert all(output["max_difference"] <= output["tolerance"] for output in verified["outputs"])
    assert verified["outputs"]
    copy = shutil.copytree(on_device, tmp_path / "copy")
    assert json.loads(device("evaluate", "--bundle", copy, "--data", labelled, "--json"))["rows"]
    assert device("run", image.name, "--bundle", on_device).startswith(image.name)


@pytest.mark.parametrize("options", [{"batch": "dynamic"}, {"standalone": True}])
def test_the_oldest_onnx_runtime_opens_every_kind_of_graph(tmp_path, oldest, options):
    file = write_supernet(tmp_path / "s.safetensors")
    export(file, tmp_path / "b", **options)
    command = [str(OLDEST), "-m", "hydradeploy", "verify", "--bundle", str(tmp_path / "b")]
    ran = subprocess.run(command, capture_output=True, text=True, env=oldest)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_the_oldest_onnx_runtime_reproduces_every_subnet_of_a_deit_b(deit_b_bundle, oldest):
    command = [str(OLDEST), "-m", "hydradeploy", "verify", "--bundle", str(deit_b_bundle), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=oldest)
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["outputs"]) == 10
