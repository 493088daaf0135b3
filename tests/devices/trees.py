"""Directories that stand for a machine, and files in them that refuse."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """A root directory with these files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def below(directory: str, files: Mapping[str, object]) -> dict[str, str]:
    """Files of one directory, each of one line."""
    return {f"{directory}/{name}": f"{content}\n" for name, content in files.items()}


def refuse(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Let the kernel answer with this errno to whoever opens the file; tests run as root, whom no permission stops."""
    open_ = os.open

    def refusing(file, *rest, **named):
        if Path(os.fspath(file)) == path:
            raise OSError(number, os.strerror(number), str(path))
        return open_(file, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
