"""Packages of engines are imported when they are asked for, and say what is missing."""

from __future__ import annotations

import sys

import pytest

from hydradeploy.engines import module
from hydradeploy.engines.module import RTX, TENSORRT
from hydradeploy.errors import ExitCode, MissingError
from tests.conftest import require


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory of packages in which neither is, in front of the real ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", [TENSORRT, RTX])
def test_an_absent_package_is_said_with_where_it_comes_from(kind, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    package = kind.replace("-", "_")
    assert module.why_not(kind) == f"the package {package} is not installed"
    with pytest.raises(MissingError, match=f"the package {package} is not installed") as refused:
        module.version(kind)
    assert refused.value.exit_code is ExitCode.MISSING
    assert refused.value.hint


@pytest.mark.parametrize("kind", [TENSORRT, RTX])
def test_asking_imports_nothing(kind, site):
    package = kind.replace("-", "_")
    (site / f"{package}.py").write_text("raise SystemExit('imported')")
    assert module.why_not(kind) is None


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_package_without_its_libraries_is_said(site, error):
    (site / "tensorrt.py").write_text(f"raise {error}('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(MissingError, match=r"tensorrt cannot be imported: libnvinfer\.so\.10") as refused:
        module.module(TENSORRT)
    assert refused.value.hint


def test_the_version_is_the_packages_own(site):
    (site / "tensorrt.py").write_text("__version__ = '10.3.0'")
    assert module.version(TENSORRT) == "10.3.0"


def test_the_real_package_is_found():
    require("tensorrt_rtx")
    assert module.why_not(RTX) is None
    assert module.version(RTX) == module.module(RTX).__version__
