"""The processor."""

from __future__ import annotations

import platform
from pathlib import Path

# Widest first: the kernels of the widest one present are those that run, and they decide how sums are rounded.
_SETS = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "avx", "sse4_2", "i8mm", "asimddp", "asimd", "neon")


def instruction_set(root: Path = Path("/")) -> str:
    """Architecture and widest instruction set that arithmetic depends on: `x86_64-avx2`, `aarch64-asimddp`."""
    machine = platform.machine()
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return machine
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    widest = next((name for name in _SETS if name in flags), None)
    return machine if widest is None else f"{machine}-{widest}"
