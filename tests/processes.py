"""Processes that a test has started, also by way of others."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def alive(variable: str, value: str) -> dict[int, str]:
    """Those with that variable in their environment, which what they start inherits; by what they were started with."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{variable}={value}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found
