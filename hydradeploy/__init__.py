"""hydradeploy: puts an elastic vision transformer on a fleet of unlike devices.

Public names are loaded when they are first used, so importing the package costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydradeploy.bundle import open_bundle
    from hydradeploy.errors import HydraError
    from hydradeploy.evaluator.evaluate import declare, evaluate
    from hydradeploy.exporter.export import export
    from hydradeploy.exporter.pack import pack
    from hydradeploy.profiler.profile import profile
    from hydradeploy.runtime.predict import run
    from hydradeploy.runtime.verify import verify
    from hydradeploy.selector.pick import pick
    from hydradeploy.supernet.importer import import_checkpoint
    from hydradeploy.training.train import train

__all__ = [
    "HydraError",
    "declare",
    "evaluate",
    "export",
    "import_checkpoint",
    "open_bundle",
    "pack",
    "pick",
    "profile",
    "run",
    "train",
    "verify",
]

_MODULES = {
    "HydraError": "hydradeploy.errors",
    "declare": "hydradeploy.evaluator.evaluate",
    "evaluate": "hydradeploy.evaluator.evaluate",
    "export": "hydradeploy.exporter.export",
    "import_checkpoint": "hydradeploy.supernet.importer",
    "open_bundle": "hydradeploy.bundle",
    "pack": "hydradeploy.exporter.pack",
    "pick": "hydradeploy.selector.pick",
    "profile": "hydradeploy.profiler.profile",
    "run": "hydradeploy.runtime.predict",
    "train": "hydradeploy.training.train",
    "verify": "hydradeploy.runtime.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
