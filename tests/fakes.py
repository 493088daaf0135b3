"""Backends that are onnxruntime under other names, with precisions, types and settings of their own."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from hydradeploy.backends import BACKEND_MODULES, Model, Options, Session, check_options
from hydradeploy.backends.onnxruntime import BACKEND
from hydradeploy.bundle import Dialect
from hydradeploy.errors import MissingError


@dataclass
class Fake:
    """Computes in the first of `types` of each precision by default; `breaks` on some artifacts. Remembers what it
    opened, and how."""

    name: str
    types: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    breaks: Collection[str] = ()
    dialect: Dialect | None = "ort"
    processor: str = "cpu"
    opened: list[tuple[str, Options]] = field(default_factory=list)

    def why_not(self) -> str | None:
        return None

    def compute_types(self, precision: str) -> tuple[str, ...]:
        return self.types.get(precision, ())

    def software(self) -> Mapping[str, str]:
        return {self.name: "1.0"}

    def prepare(self) -> None: ...

    def open(self, model: Model, options: Options) -> Session:
        check_options(self, options, model.precision)
        self.opened.append((model.name, options))
        if model.name in self.breaks:
            raise MissingError(f"{self.name} cannot open {model.name}: no kernel for it")
        return BACKEND.open(model, Options(options.threads))


def install(monkeypatch: pytest.MonkeyPatch, *backends: Fake, alone: bool = False) -> None:
    """Let these be found by name, `alone` or beside onnxruntime, which comes first."""
    # What was deleted last is put back first, and so all of them in their order, which decides whom a user gets.
    for name in reversed(list(BACKEND_MODULES)):
        if alone or name != "onnxruntime":
            monkeypatch.delitem(BACKEND_MODULES, name)
    for one in backends:
        module = ModuleType(f"tests.fake_{one.name}")
        module.BACKEND = one  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(BACKEND_MODULES, one.name, module.__name__)
