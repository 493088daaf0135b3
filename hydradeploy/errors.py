"""What can go wrong, and the exit code each of it has.

    HydraError
    ├── UsageError        2   the command line or a call does not make sense
    ├── ParityError       5   an artifact does not compute what the supernet computes
    ├── InvalidError      6   measurements exist, but none is clean
    ├── ForeignError      7   no measurement of this device or of these graphs
    ├── MissingError      8   a backend, device or sensor is not here
    ├── IntegrityError   10   one of our own files is missing, damaged or tampered with
    ├── InputError       11   data given to us is refused
    └── EnvironmentFailed 12  disk, memory, permission, connection

Each carries one sentence that says what is wrong and where, and a hint that says what to do about it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of the command line; they do not change their meaning."""

    OK = 0
    BUG = 1
    USAGE = 2
    INFEASIBLE = 3
    INCONCLUSIVE = 4
    PARITY = 5
    INVALID = 6
    FOREIGN = 7
    MISSING = 8
    REGRESSION = 9
    INTEGRITY = 10
    INPUT = 11
    ENVIRONMENT = 12
    INTERRUPTED = 130


EXIT_CODES: dict[ExitCode, str] = {
    ExitCode.OK: "ok",
    ExitCode.BUG: "a bug in hydradeploy",
    ExitCode.USAGE: "the command line does not make sense",
    ExitCode.INFEASIBLE: "nothing meets the budget",
    ExitCode.INCONCLUSIVE: "inconclusive, more samples are needed",
    ExitCode.PARITY: "an artifact does not compute what the supernet computes",
    ExitCode.INVALID: "measurement invalid under --strict",
    ExitCode.FOREIGN: "no profile for this device or bundle, or an engine of another one",
    ExitCode.MISSING: "a backend, device or sensor is missing",
    ExitCode.REGRESSION: "regression",
    ExitCode.INTEGRITY: "a file is missing, damaged or tampered with",
    ExitCode.INPUT: "input data refused (image, labels, weights)",
    ExitCode.ENVIRONMENT: "the environment failed (disk, memory, permission, connection)",
    ExitCode.INTERRUPTED: "interrupted",
}


class HydraError(Exception):
    """An error a user can act on: `message` says what and where, `hint` what to do."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HydraError):
    exit_code = ExitCode.USAGE


class ParityError(HydraError):
    exit_code = ExitCode.PARITY


class InvalidError(HydraError):
    exit_code = ExitCode.INVALID


class ForeignError(HydraError):
    exit_code = ExitCode.FOREIGN


class MissingError(HydraError):
    exit_code = ExitCode.MISSING


class IntegrityError(HydraError):
    exit_code = ExitCode.INTEGRITY


class InputError(HydraError):
    exit_code = ExitCode.INPUT


class EnvironmentFailed(HydraError):
    exit_code = ExitCode.ENVIRONMENT


_HINTS = {
    errno.ENOSPC: "free some space or write to another disk; nothing that was there before is lost",
    errno.EDQUOT: "the disk quota is used up; nothing that was there before is lost",
    errno.EFBIG: "the file is larger than the file system or a limit (ulimit -f) allows",
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "the file system is mounted read-only",
}


@contextmanager
def environment(doing: str) -> Iterator[None]:
    """Turn an OSError of the block into an EnvironmentFailed that says what was being done and to which file.

    `doing` completes "while ...", for example "writing the bundle".
    """
    try:
        yield
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        reason = error.strerror or str(error)
        raise EnvironmentFailed(f"{reason.lower()} while {doing}{named}", hint=_HINTS.get(error.errno or 0)) from error
