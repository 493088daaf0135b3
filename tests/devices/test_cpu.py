"""The processor's identity from recorded files."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from hydradeploy.devices.cpu import instruction_set


def root(tmp_path: Path, text: str | None) -> Path:
    (tmp_path / "proc").mkdir()
    if text is not None:
        (tmp_path / "proc" / "cpuinfo").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "widest"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 fma\n", "-avx2"),
        ("flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni\n", "-avx512_vnni"),
        ("flags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni amx_int8\n", "-amx_int8"),
        ("processor\t: 0\nFeatures\t: fp asimd evtstrm aes asimdhp asimddp\n", "-asimddp"),
        ("Features\t: fp asimd aes asimddp i8mm bf16\n", "-i8mm"),
        ("flags\t\t: fpu\n", ""),
        ("model name\t: avx512f in the name of a processor\n", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_widest_instruction_set_is_named(tmp_path, text, widest):
    assert instruction_set(root(tmp_path, text)) == platform.machine() + widest


def test_this_machine_has_one():
    assert instruction_set().startswith(platform.machine())
