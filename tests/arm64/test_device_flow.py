"""A bundle made here is verified, evaluated, profiled, picked from and run on aarch64, from the wheel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydradeploy import export, open_bundle
from hydradeploy.bundle import Bundle
from hydradeploy.stats.logits import agreement
from tests.arm64 import emulated
from tests.conftest import missing, require

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "arm64"
pytestmark = pytest.mark.arm64
PLATFORMS = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))]

# Through the same public door as `verify`, but it keeps the logits.
LOGITS = """
from pathlib import Path
import numpy as np
from hydradeploy import open_bundle
from hydradeploy.backends import Options, backend, model_of, prepared, run_all

bundle, runner = open_bundle(Path("bundle")), backend("onnxruntime")
golden, found = bundle.golden(), {}
for artifact in bundle.manifest.artifacts:
    model = model_of(bundle, artifact, runner.dialect)
    with runner.open(model, Options()) as session:
        images = prepared(golden.images, model.input, bundle.spec.preprocessing)
        found[artifact.name] = run_all(session, model, images)
np.savez("logits.npz", **found)
"""


@dataclass(frozen=True)
class Arm:
    """The emulated system with a directory of ours in it."""

    root: Path
    work: Path

    def __call__(self, *command: str, codes: tuple[int, ...] = (0,), processor: str = emulated.PROCESSOR) -> str:
        return emulated.shown(emulated.entered(self.root, self.work, *command, processor=processor), codes)

    def hydradeploy(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> dict:
        """A command's JSON."""
        return json.loads(self("hydradeploy", *arguments, "--json", codes=codes))


@pytest.fixture(scope="module")
def arm(tmp_path_factory, supernet_file) -> Iterator[Arm]:
    """aarch64 with the wheel installed, a bundle, labelled images and a photo."""
    reason = emulated.why_not()
    if reason is not None:
        missing("arm64", reason)
    require("onnxruntime")
    work = tmp_path_factory.mktemp("arm64") / "work"
    work.mkdir()
    export(supernet_file, work / "bundle", heads=(2, 4, 6), precisions=("fp32", "int8dyn"))
    export(supernet_file, work / "bundle", heads=(4,), precisions=("fp32",), input="uint8")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(work / "labelled.npz", images=images, labels=np.arange(20) % 10)
    Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(work / "photo.png")
    wheels(work / "wheels")
    with emulated.handler():
        device = Arm(emulated.system(CACHE), work)
        device("python3", "-m", "venv", "venv")
        device("pip", "install", "-q", "--no-index", "--find-links", "wheels", "hydradeploy[ort]")
        yield device


def wheels(directory: Path) -> None:
    """The package's wheel and what it needs with the extra `ort`, for aarch64 and Python 3.11."""
    pip = [sys.executable, "-m", "pip"]
    emulated.shown([*pip, "wheel", "-q", "--no-deps", "--wheel-dir", str(directory), str(ROOT)])
    (ours,) = directory.glob("*.whl")
    tags = [word for tag in PLATFORMS for word in ("--platform", tag)]
    tags += ["--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:"]
    emulated.shown([*pip, "download", "-q", *tags, "--dest", str(directory), f"{ours}[ort]"])


@pytest.fixture(scope="module")
def bundle(arm) -> Bundle:
    return open_bundle(arm.work / "bundle")


@pytest.fixture(scope="module")
def evaluated(arm) -> dict:
    return arm.hydradeploy("evaluate", "--data", "labelled.npz")


@pytest.fixture(scope="module")
def profile(arm, evaluated) -> dict:
    arm("hydradeploy", "profile", "--heads", "2,6", "--threads", "1", "--preset", "quick", "--max-time", "60s")
    (written,) = (arm.work / "profiles").glob("*.json")
    return json.loads(written.read_text())


def test_the_system_is_arm_and_has_neither_torch_nor_onnx(arm):
    assert arm("python", "-c", "import platform; print(platform.machine())") == "aarch64\n"
    code = "from importlib.util import find_spec; print([find_spec(name) for name in ('torch', 'onnx')])"
    assert arm("python", "-c", code) == "[None, None]\n"


def test_help_and_doctor_answer(arm):
    assert "profile" in arm("hydradeploy", "--help")
    told = json.dumps(arm.hydradeploy("doctor", codes=(0, 8)))
    assert "aarch64" in told
    assert "x86_64" not in told


def test_golden_outputs_are_reproduced(arm, bundle):
    """`verify` gates them there; here the logits themselves are compared with those that x86 gave."""
    verified = arm.hydradeploy("verify")
    names = {artifact.name for artifact in bundle.manifest.artifacts}
    assert len(names) == 7
    assert {output["artifact"] for output in verified["outputs"]} == names
    assert verified["failed"] == []
    (arm.work / "logits.py").write_text(LOGITS)
    arm("python", "logits.py")
    golden = bundle.golden()
    with np.load(arm.work / "logits.npz") as there:
        assert set(there) == names
        for artifact in bundle.manifest.artifacts:
            found = agreement(golden.logits[artifact.name], there[artifact.name], artifact.parity.tolerance)
            print(f"{artifact.name}: {found.max_difference:.2e} of the largest |logit|, cosine {found.cosine:.6f}")
            assert found.within
            assert found.cosine >= artifact.parity.least_cosine
            assert not np.array_equal(there[artifact.name], np.zeros_like(there[artifact.name]))


def test_a_processor_with_more_instructions_reproduces_them_too(arm, bundle):
    outputs = json.loads(arm("hydradeploy", "verify", "--json", processor=emulated.WIDER))["outputs"]
    assert len(outputs) == len(bundle.manifest.artifacts)


def test_accuracy_is_kept_as_measured_on_arm(evaluated, bundle):
    assert {row["artifact"] for row in evaluated["rows"]} == {artifact.name for artifact in bundle.manifest.artifacts}
    assert {row["instruction_set"] for row in evaluated["rows"]} == {"aarch64-asimddp"}
    assert {row["n"] for row in evaluated["rows"]} == {20}


def test_the_profile_is_of_an_arm_device(profile, bundle):
    assert profile["device"]["architecture"] == "aarch64"
    assert profile["device"]["instruction_set"] == "aarch64-asimddp"
    cells = {cell["artifact"]: cell for cell in profile["cells"]}
    assert set(cells) == {"h02-fp32", "h06-fp32", "h02-int8dyn", "h06-int8dyn"}
    for cell in cells.values():
        assert cell["error"] is None
        assert len(cell["latency_s"]) >= 20
        assert cell["graph_sha256"] == bundle.artifact(cell["artifact"]).graph_sha256


def test_a_pick_is_made_there_and_run_there(arm, profile):
    measured = {cell["artifact"] for cell in profile["cells"]}
    # What else this machine does meanwhile is no fault of what is tested.
    picked = arm.hydradeploy("pick", "--latency", "100s", "--accept", "contended")
    assert picked["verdict"] == "pass"
    assert picked["device_here"]
    assert picked["pick"]["artifact"] in measured
    (answer,) = arm.hydradeploy("run", "photo.png", "--artifact", picked["pick"]["artifact"])["images"]
    assert len(answer["top"]) == 5
    assert sum(guess["probability"] for guess in answer["top"]) <= 1 + 1e-6


def test_nothing_of_this_machine_shows_in_what_the_device_wrote(arm, profile):
    for path in [*(arm.work / "profiles").iterdir(), arm.work / "bundle" / "accuracy.json"]:
        for foreign in (str(ROOT), str(arm.work), str(arm.root), "x86_64"):
            assert foreign not in path.read_text(), f"{path.name}: {foreign}"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_who_is_cut_short_leaves_no_process_and_no_mount(arm, end):
    """Ctrl-C reaches everything in the terminal, a kill one process; the seconds to sleep are what it is found by."""
    mark = str(60000 + os.getpid() + end)
    code = "from pathlib import Path; from tests.arm64.emulated import entered, shown; import sys; "
    code += "shown(entered(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))"
    command = [sys.executable, "-c", code, str(arm.root), str(arm.work), "/usr/bin/sleep", mark]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _until(lambda: any("qemu" in words[0] and "/usr/bin/sleep" in words for words in _processes(mark)))
        assert str(arm.root) not in Path("/proc/self/mounts").read_text()
        (os.killpg if end is signal.SIGINT else os.kill)(running.pid, end)
        running.wait(60)
        _until(lambda: not _processes(mark))
    finally:
        running.kill()
        running.wait()
    assert str(arm.root) not in Path("/proc/self/mounts").read_text()


def _processes(mark: str) -> list[list[str]]:
    """The command lines that have it in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace").split("\0"))
    return [words for words in found if mark in words]


def _until(holds: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
