"""The device side needs neither torch nor onnx, and runs from the wheel on the oldest Python a Jetson has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from hydradeploy import export, open_bundle, pack
from tests.conftest import missing, write_supernet

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".venv-device" / "bin" / "python"

WALL = """
import importlib.abc, importlib.util, sys
BANNED = {"torch", "onnx", "safetensors", "sklearn", "matplotlib", "openvino", "tensorrt_rtx"}

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Wall())
# Of a package that is not there it says None and raises nothing.
there = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in BANNED else there(name, *rest)
"""
START = """
sys.argv = ["hydradeploy", *sys.argv[1:]]
from hydradeploy.cli import main
main()
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WALL + START, *map(str, arguments)], capture_output=True, text=True)


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


def profiled_and_picked(start: list[str], environment: Mapping[str, str], bundle: Path, directory: Path) -> str:
    """Declare accuracy, profile and pick, with profiles in a directory; return the artifact named, picked or nearest.

    The budget is so large that only noise between processes can keep the answer from being a pick.
    """

    def device(*arguments: object, codes: tuple[int, ...] = (0,)) -> dict:
        command = [*start, *map(str, arguments), "--bundle", str(bundle), "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory)
        assert ran.returncode in codes, ran.stderr
        return json.loads(ran.stdout)

    artifacts = [artifact.name for artifact in open_bundle(bundle).manifest.artifacts]
    rows = [f"{name},imagenet,0.8,50000" for name in artifacts]
    (directory / "declared.csv").write_text("\n".join(["artifact,dataset,top1,n", *rows]) + "\n")
    assert len(device("evaluate", "--declared", directory / "declared.csv")["rows"]) == len(artifacts)
    chosen = ("--heads", artifacts[0][1:3].lstrip("0"), "--precision", artifacts[0].split("-")[1], "--threads", 1)
    (cell,) = device("profile", *chosen)["cells"]
    assert cell["error"] is None
    assert len(cell["latency_s"]) >= 100
    answer = device("pick", "--latency", "100s", codes=(0, 4))
    assert answer["device_here"]
    return (answer["pick"] or answer["nearest"])["artifact"]


def test_profile_and_pick_need_neither_torch_nor_onnx(shared_bundle, tmp_path):
    """The wall stands in the measuring processes too: Python imports sitecustomize at every start."""
    (tmp_path / "wall").mkdir()
    (tmp_path / "wall" / "sitecustomize.py").write_text(WALL)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "wall")}
    walled = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "No module named 'torch'" in walled.stderr
    copy = shutil.copytree(shared_bundle, tmp_path / "copy")
    found = profiled_and_picked([sys.executable, "-m", "hydradeploy"], environment, copy, tmp_path)
    assert found == "h02-fp32"


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


def test_profile_and_pick_work_from_the_wheel_on_python_3_10(shared_bundle, oldest, tmp_path):
    packed = pack(shared_bundle, "h04-fp16", tmp_path / "packed").path
    start = [str(OLDEST), "-W", "error", "-m", "hydradeploy"]
    assert profiled_and_picked(start, oldest, packed, tmp_path) == "h04-fp16"


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
