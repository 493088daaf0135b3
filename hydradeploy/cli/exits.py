"""Every way out of a command is a documented exit code, and only a bug shows a traceback."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import typer

from hydradeploy.cli.app import app_for
from hydradeploy.cli.output import say, silence
from hydradeploy.errors import EnvironmentFailed, ExitCode, HydraError, MissingError, UsageError


def main() -> None:
    """Run the command line and exit with one of the documented codes."""
    _open_streams()
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, _interrupted)
    sys.exit(_guarded(sys.argv[1:], lambda: bool(interrupts)))


def _open_streams() -> None:
    """A stream that was closed before we started takes what is written to it, to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.set_inheritable(sink, True)  # what we start has it too
            setattr(sys, name, os.fdopen(sink, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("hydradeploy", _printed)
        sys.stdout.reconfigure(errors="hydradeploy")


def _printed(error: UnicodeError) -> tuple[str | bytes, int]:
    """Names of files need not be text and are printed as they are; what a stream has no letter for is escaped as in
    JSON, which it may be."""
    import json  # which few starts need

    assert isinstance(error, UnicodeEncodeError)
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _interrupted(number: int, frame: FrameType | None) -> None:
    """What is told to end does what it does on Ctrl-C, also where a shell has that ignored in the background."""
    answer = signal.getsignal(signal.SIGINT)
    (answer if callable(answer) else signal.default_int_handler)(number, frame)


def _guarded(arguments: list[str], interrupted: Callable[[], bool]) -> int:
    """Run a command; every way out is an exit code, and only a bug shows a traceback.

    Libraries in C may make another error of a KeyboardInterrupt that comes while they call back: `interrupted` knows.
    """
    try:
        code = app_for(arguments)(args=arguments or ["--help"], standalone_mode=False, prog_name="hydradeploy")
        sys.stdout.flush()
        if code == ExitCode.INTERRUPTED:  # typer's answer to KeyboardInterrupt
            say("interrupted")
        return code if isinstance(code, int) else ExitCode.OK
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt) or interrupted():
            say("interrupted")
            return ExitCode.INTERRUPTED
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Say what went wrong, and give its exit code."""
    from importlib.metadata import PackageNotFoundError  # which only errors need

    try:
        raise error
    except HydraError as known:
        return _fail(known)
    except _CLICK_ERROR as wrong:
        return _fail(UsageError(_sentence(wrong), hint=_help_hint(wrong)))
    except (BrokenPipeError, SystemExit):  # the second is typer's answer to the first
        silence(sys.stdout)  # the reader of our output has left; so do we
        return ExitCode.OK
    except PackageNotFoundError as absent:
        why = f"the package {absent.name} is not installed, so its version cannot be told"
        return _fail(MissingError(why, hint="pip install -e . in a checkout"))
    except MemoryError:
        return _fail(EnvironmentFailed("out of memory", hint="close other programs, or choose fewer heads"))
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        return _fail(EnvironmentFailed(f"{(error.strerror or str(error)).lower()}{named}"))
    except Exception:
        traceback.print_exc()
        say("error: this is a bug in hydradeploy\nhint: please report it with the lines above")
        return ExitCode.BUG


# typer carries its own copy of click, under a private name; its errors are reached by a public heir.
_CLICK_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[2])


def _sentence(error: Exception) -> str:
    message = str(cast("Any", error).format_message()).strip()
    return message.rstrip(".") or "usage"


def _help_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else 'hydradeploy'} --help"


def _fail(error: HydraError) -> int:
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    return error.exit_code
