"""Programs of the system, as small scripts: what they say, how they fail, and that they cannot ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydradeploy.devices import command
from hydradeploy.errors import MissingError
from tests.devices.test_jetson import program


def test_a_program_runs_without_a_terminal_and_its_words_come_back(tmp_path):
    assert command.run([program(tmp_path, "p", 'cat; echo "said $1"'), "a b"]) == "said a b\n"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo first; echo run as root >&2; exit 3", "exit 3"),
        ("exit 1", "exit 1: no word"),
        ("kill -9 $$", "exit -9: no word"),
    ],
)
def test_a_program_that_fails_is_told(tmp_path, script, told):
    with pytest.raises(MissingError, match=told):
        command.run([program(tmp_path, "p", script)])


def test_a_program_that_is_not_there_or_not_one_is_told(tmp_path):
    with pytest.raises(MissingError, match="there is no program"):
        command.run([str(tmp_path / "none")])
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="cannot be run: permission denied"):
        command.run([str(tmp_path / "file")])


def test_what_is_for_administrators_is_found_too(tmp_path, monkeypatch):
    """In a job of cron, nvpmodel is not in the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    own = Path(program(tmp_path, "ldconfig", "echo mine"))
    assert command.run(["ldconfig", "--version"]) == "mine\n"
    own.unlink()
    assert "ldconfig" in command.run(["ldconfig", "--version"])


def test_a_program_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_PATIENCE_S", 0.2)
    with pytest.raises(MissingError, match="no answer within"):
        command.run([program(tmp_path, "p", "exec sleep 60")])
