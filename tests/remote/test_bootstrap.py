"""`profile --host --bootstrap`: an environment on a device that has nothing but Python."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from hydradeploy.errors import EnvironmentFailed
from hydradeploy.remote import installing
from hydradeploy.remote.program import Wheel, bootstrap
from hydradeploy.remote.ssh import line_of
from tests.conftest import missing
from tests.remote.conftest import PATIENCE_S, Device

ROOT = Path(__file__).parents[2]
NAME = f"hydradeploy-{version('hydradeploy')}-py3-none-any.whl"


@pytest.fixture
def bare(stopped: Device) -> Device:
    """A device with Python 3.10 or newer, where pip takes packages from where it takes them here."""
    (stopped.bin / "hydradeploy").unlink()
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    (stopped.bin / "python3").write_text(f'#!/bin/sh\nexec {base} "$@"\n')
    (stopped.bin / "python3").chmod(0o755)
    kept = ("PIP_", "XDG_CONFIG")
    stopped.environment |= {name: value for name, value in os.environ.items() if name.startswith(kept)}
    return stopped


def environment(device: Device) -> Path:
    return device.home / ".cache/hydradeploy/remote/venv"


def failed(run: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = run.communicate(timeout=600)
    assert run.returncode == code, out + err
    assert "Traceback" not in err
    error, hint = err.splitlines()[-2:]
    return error, hint


def test_a_device_without_python_says_so(stopped: Device, bundle, tmp_path):
    stopped.environment["PATH"] = str(stopped.bin)
    for program in ("sh", "cat"):
        (stopped.bin / program).symlink_to(f"/usr/bin/{program}")
    stopped.start()
    (tmp_path / NAME).write_bytes(b"")
    error, hint = failed(stopped.profile(bundle, tmp_path / "profiles", "--bootstrap", tmp_path / NAME), 8)
    assert error == "error: orin: no python3 there"
    assert hint == "hint: install Python 3.10 or newer there"


def test_a_python_that_is_too_old_or_makes_no_environments_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(installing, "OLDEST", (3, 99))
    with pytest.raises(SystemExit) as ended:
        installing.main(NAME, "", "ort")
    assert ended.value.code == 8
    assert "error: python3 there is 3." in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        installing.run([sys.executable, "-c", "print('no ensurepip'); exit(1)"], 8, "it cannot", "apt-get")
    assert ended.value.code == 8
    assert capsys.readouterr().err == "error: it cannot: no ensurepip\nhint: apt-get\n"


def test_it_can_be_read_by_a_python_that_is_too_old():
    """No newer syntax than 3.6's, so that it gets to say that."""
    import ast

    ast.parse(Path(installing.__file__).read_text(), feature_version=(3, 6))


def test_no_file_of_the_home_directory_stands_in_for_a_module(tmp_path, monkeypatch):
    """Commands over ssh start there."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    (programs / "python3").symlink_to(sys.executable)
    for name in ("subprocess", "this"):
        (home / f"{name}.py").write_text("raise SystemExit('not this one')\n")

    class Cut:
        host = "orin"

        def run(self, script: str, *arguments: str, data: bytes = b"") -> tuple[int, bytes, str]:
            env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path)}
            command = line_of(script, *arguments)
            ran = subprocess.run(command, shell=True, cwd=home, input=data[1:], capture_output=True, env=env)
            return ran.returncode, ran.stdout, ran.stderr.decode()

    (tmp_path / NAME).write_bytes(b"a wheel")
    with pytest.raises(EnvironmentFailed, match="the wheel did not arrive whole"):
        bootstrap(Cut(), Wheel(tmp_path / NAME, "ort"), lambda text: None)  # type: ignore[arg-type]
    monkeypatch.chdir(home)
    installing.run([sys.executable, "-m", "this"], 8, "it cannot", "apt-get")


@pytest.mark.slow
def test_a_wheel_that_is_none_leaves_nothing_that_would_be_used(bare: Device, bundle, tmp_path):
    bare.start()
    (tmp_path / NAME).write_bytes(b"not a wheel")
    for _ in range(2):
        error, _ = failed(bare.profile(bundle, tmp_path / "profiles", "--bootstrap", tmp_path / NAME), 12)
        assert error.startswith("error: orin: pip could not install it there: ERROR: ")
    assert not environment(bare).exists()


@pytest.mark.slow
def test_with_bootstrap_the_wheel_is_installed_once_and_used_from_then_on(bare: Device, bundle, tmp_path):
    """Where Python has TensorRT, as a JetPack's, the environment sees it, also where it came later."""
    bare.environment["PYTHONPATH"] = str(bare.home / "packages")
    bare.start()
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    profiles = tmp_path / "profiles"
    run = bare.profile(bundle, profiles, "--bootstrap", tmp_path / NAME)
    out, err = run.communicate(timeout=1800)
    assert run.returncode == 0, out + err
    assert "1 cell measured" in out
    first = environment(bare).resolve()
    assert "include-system-site-packages = false" in (first / "pyvenv.cfg").read_text()
    before = (first / "ready").stat().st_mtime_ns
    for more in (("--bootstrap", f"{tmp_path / NAME}[ort]"), ()):
        run = bare.profile(bundle, profiles, "--dry-run", *more)
        out, err = run.communicate(timeout=PATIENCE_S)
        assert run.returncode == 0, out + err
        assert environment(bare).resolve() == first
        assert (first / "ready").stat().st_mtime_ns == before
    (bare.home / "packages" / "tensorrt").mkdir(parents=True)
    (bare.home / "packages" / "tensorrt" / "__init__.py").write_text("")
    run = bare.profile(bundle, profiles, "--dry-run", "--bootstrap", f"{tmp_path / NAME}[ort]")
    out, err = run.communicate(timeout=1800)
    assert run.returncode == 0, out + err
    second = environment(bare).resolve()
    assert "include-system-site-packages = true" in (second / "pyvenv.cfg").read_text()
    assert not first.exists(), "of two, one would only take room"
    run = bare.profile(bundle, profiles, "--dry-run", "--bootstrap", f"{tmp_path / NAME}[openvino]")
    out, err = run.communicate(timeout=1800)
    assert run.returncode == 0, out + err
    assert "openvino" in out
    assert not second.exists()


def test_the_oldest_python_of_a_device_serves_the_newest_here(device: Device, bundle, tmp_path):
    oldest = ROOT / ".venv-device" / "bin" / "python"
    if not oldest.exists():
        missing("python3.10", "no Python 3.10 with the device's packages (make setup)")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    zipfile.ZipFile(tmp_path / NAME).extractall(device.root / "site")
    device.install(f'PYTHONPATH={device.root}/site exec {oldest} -W error -m hydradeploy "$@"')
    run = device.profile(bundle, tmp_path / "profiles", "--backend", "onnxruntime")
    out, err = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, out + err
    (path,) = (tmp_path / "profiles").glob("*.json")
    assert "onnxruntime-1.23" in path.name
