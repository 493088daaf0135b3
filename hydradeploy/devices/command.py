"""Programs of the system that tell or set what no file does, behind a function that a test can stand in for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence

from hydradeploy.errors import MissingError

# What a program wrote; raises MissingError.
Command = Callable[[Sequence[str]], str]

_PATIENCE_S = 30
# Where nvpmodel is, which not every service and no job of cron has in its PATH.
_ALSO_IN = ("/usr/sbin", "/sbin")


def run(words: Sequence[str]) -> str:
    """Run a program and return what it wrote; raises MissingError where there is none or it fails, with its last words.

    It gets no terminal, so that it cannot ask, and no Ctrl-C, so that it is not stopped half way.
    """
    program = words[0]
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_ALSO_IN))
    try:
        ran = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE_S,
            env=os.environ | {"PATH": path},
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise MissingError(f"there is no program {program} here") from error
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{program} gave no answer within {_PATIENCE_S} s") from error
    except OSError as error:
        raise MissingError(f"{program} cannot be run: {(error.strerror or str(error)).lower()}") from error
    if ran.returncode:
        said = (ran.stderr.decode(errors="replace") + ran.stdout.decode(errors="replace")).strip().splitlines()
        raise MissingError(f"{' '.join(words)} ended with exit {ran.returncode}: {said[-1] if said else 'no word'}")
    return ran.stdout.decode(errors="replace")
