"""The benchmarks' modules and command lines."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import missing, require

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/, which import each other as scripts do."""
    _all_there()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """Runs a benchmark on the tiny supernet, one round; returns the rows of its CSV."""
    _all_there()

    def run(script: str, *options: str) -> list[dict[str, str]]:
        command = [sys.executable, str(BENCHMARKS / script), "--tiny", "--rounds", "1", "--results", str(tmp_path)]
        ran = subprocess.run([*command, *options], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        (path,) = tmp_path.glob("*.csv")
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def _all_there() -> None:
    for package in ("onnxruntime", "onnxscript", "openvino", "torch", "matplotlib"):
        require(package)
    if not BENCHMARKS.is_dir():
        missing("benchmarks", "not in the source distribution")
