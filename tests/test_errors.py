"""Errors: exit codes, and what a failing system call is turned into."""

from __future__ import annotations

import errno
import os

import pytest

from hydradeploy import errors
from hydradeploy.errors import EXIT_CODES, EnvironmentFailed, ExitCode, HydraError, InputError, environment


def test_every_exit_code_is_documented():
    assert set(EXIT_CODES) == set(ExitCode)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("UsageError", 2),
        ("ParityError", 5),
        ("InvalidError", 6),
        ("ForeignError", 7),
        ("MissingError", 8),
        ("IntegrityError", 10),
        ("InputError", 11),
        ("EnvironmentFailed", 12),
    ],
)
def test_each_error_has_its_exit_code(name, code):
    assert getattr(errors, name)("what").exit_code == code


def test_an_error_carries_message_and_hint():
    error = HydraError("what is wrong", hint="what to do")
    assert (str(error), error.message, error.hint) == ("what is wrong", "what is wrong", "what to do")


def test_a_system_error_says_what_was_done_and_to_which_file(tmp_path):
    with pytest.raises(EnvironmentFailed) as failed, environment("reading the notes"):
        (tmp_path / "absent").read_bytes()
    assert failed.value.message == f"no such file or directory while reading the notes: {tmp_path / 'absent'}"
    assert isinstance(failed.value.__cause__, FileNotFoundError)


def test_a_full_disk_comes_with_a_hint():
    with pytest.raises(EnvironmentFailed) as failed, environment("writing x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failed.value.message == "no space left on device while writing x"
    assert "free some space" in failed.value.hint


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS])
def test_errors_a_user_can_mend_come_with_a_hint(code):
    with pytest.raises(EnvironmentFailed) as failed, environment("writing x"):
        raise OSError(code, os.strerror(code), "x")
    assert failed.value.hint


def test_a_system_error_without_number_keeps_its_text():
    with pytest.raises(EnvironmentFailed, match="the cable is loose while talking"), environment("talking"):
        raise OSError("the cable is loose")


def test_a_system_error_about_a_descriptor_is_translated_too():
    with pytest.raises(EnvironmentFailed, match="bad file descriptor while asking"), environment("asking"):
        os.stat(10**6)


@pytest.mark.parametrize("error", [InputError("refused"), KeyError("bug"), KeyboardInterrupt()])
def test_what_is_no_system_error_passes_through(error):
    with pytest.raises(type(error)) as passed, environment("working"):
        raise error
    assert passed.value is error


def test_a_block_without_error_is_left_alone():
    with environment("working"):
        done = True
    assert done
