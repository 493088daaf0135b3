"""The packages that build and run engines, imported when they are needed and not before."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hydradeploy.errors import MissingError

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
# Compute capabilities that TensorRT for RTX 1.7 has kernels for: the members of its ComputeCapability. Neither Orin nor
# Thor, H100 or H200. Of these it builds unasked for 8.0 and later.
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
RTX_BY_NAME_ALONE = ("7.5",)

_PACKAGES = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}
# What brings them.
HINTS = {
    TENSORRT: "JetPack has it, for a venv with --system-site-packages; elsewhere: pip install 'hydradeploy[tensorrt]'",
    RTX: "pip install 'hydradeploy[tensorrt-rtx]'",
}


def why_not(kind: str) -> str | None:
    """None where the package of that kind is installed, else the sentence to show. Imports nothing, asks no GPU."""
    package = _PACKAGES[kind]
    return None if find_spec(package) else f"the package {package} is not installed"


def module(kind: str) -> Any:
    """The package of that kind, imported; raises MissingError where it, or a library it needs, is not here."""
    reason = why_not(kind)
    if reason is not None:
        raise MissingError(reason, hint=HINTS[kind])
    package = _PACKAGES[kind]
    try:
        return import_module(package)
    except (ImportError, OSError) as error:  # the package can be here without its libraries
        raise MissingError(f"the package {package} cannot be imported: {error}", hint=HINTS[kind]) from error


def version(kind: str) -> str:
    """The version the package gives itself, for example 10.3.0; raises MissingError."""
    return str(module(kind).__version__)
