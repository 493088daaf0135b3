"""Which `hydradeploy` there is on the device, and with --bootstrap, the one that is put there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from hydradeploy.errors import EnvironmentFailed, ExitCode, HydraError, MissingError, UsageError
from hydradeploy.files import sha256_bytes
from hydradeploy.remote.ssh import Connection

_FOUND = "hydradeploy-found "
_CACHE = "${XDG_CACHE_HOME:-$HOME/.cache}/hydradeploy/remote"
_TELL = (
    'v=$("$p" --version 2>/dev/null </dev/null); '
    f'if test -n "$p" && test -f "$p" && test -x "$p"; then printf "{_FOUND}%s at %s\\n" "$v" "$p"; fi'
)
# A command over ssh has not the PATH of a login: where pip --user puts programs is often not in it.
_LOOK = (
    'for p in "$(command -v hydradeploy)" "$HOME/.local/bin/hydradeploy" '
    f'"{_CACHE}/venv/bin/hydradeploy"; do {_TELL}; done'
)
_LOOK_AT = f'p=$(printf %b "$1"); case $p in "~/"*) p=$HOME/${{p#??}};; esac; {_TELL}; true'
START = 'p=$(printf %b "$1"); exec "$p" there'

_WHEEL = re.compile(r"(?P<file>.*?/?hydradeploy-(?P<version>[^-/]+)-[^/]*\.whl)(?:\[(?P<extras>[a-z0-9,_-]+)\])?$")
_BOOTSTRAP = (
    # It starts in the home directory, where a file would stand in for a module of that name.
    'exec python3 -c "import sys; sys.path = list(filter(None, sys.path)); exec(bytes.fromhex(sys.argv[1]))" '
    '"$1" "$(printf %b "$2")" "$3" "$(printf %b "$4")"'
)


@dataclass(frozen=True)
class _Found:
    path: str
    version: str


def find(connection: Connection, program: str | None = None) -> str:
    """The path of the `hydradeploy` there that is of this version: the one named, else one in its PATH, in
    ~/.local/bin, or in the environment that --bootstrap has made.

    Raises MissingError where there is none, or only of another version.
    """
    script, arguments = (_LOOK, ()) if program is None else (_LOOK_AT, (program,))
    code, out, said = connection.run(script, *arguments)
    if code not in (0, 1):
        raise MissingError(
            f"{connection.host}: {said or f'its shell ended with exit {code}'}", hint="it takes a POSIX sh"
        )
    found = [_parsed(line) for line in out.decode(errors="replace").splitlines() if line.startswith(_FOUND)]
    here = version("hydradeploy")
    for candidate in found:
        if candidate.version == here:
            return candidate.path
    if found:
        first = found[0]
        there = f"is {first.version}" if first.version else "does not run"
        raise MissingError(
            f"{connection.host}: {first.path} {there}, and here is {here}; both must be of one version",
            hint=f"install {here} there, or let --bootstrap WHEEL do it",
        )
    where = f"{program} is not there" if program is not None else "no hydradeploy there"
    raise MissingError(
        f"{connection.host}: {where}",
        hint="name it with --host-program, install it there, or let --bootstrap WHEEL do it",
    )


def _parsed(line: str) -> _Found:
    told, _, path = line.removeprefix(_FOUND).partition(" at ")
    return _Found(path, told.removeprefix("hydradeploy ").strip())


@dataclass(frozen=True)
class Wheel:
    """What to put on a device: a wheel of this package, with extras. Made by `wheel`."""

    path: Path
    extras: str


def wheel(text: str) -> Wheel:
    """`hydradeploy-0.1.0-py3-none-any.whl`, or with extras behind it, `[openvino]`; without it is `ort`.

    Raises UsageError where there is no such file, or one of another package or version.
    """
    match = _WHEEL.fullmatch(text)
    here = version("hydradeploy")
    if match is None or match["version"] != here:
        raise UsageError(
            f"--bootstrap {text}: is no wheel of hydradeploy {here}",
            hint=f"hydradeploy-{here}-py3-none-any.whl, which pip wheel --no-deps makes of a checkout",
        )
    path = Path(match["file"])
    if not path.is_file():
        raise UsageError(f"--bootstrap {path}: no such file", hint="pip wheel --no-deps makes one of a checkout")
    return Wheel(path, match["extras"] or "ort")


def bootstrap(connection: Connection, chosen: Wheel, say: Callable[[str], None]) -> str:
    """Make an environment in the device's cache with that wheel and what it needs, unless it is there; the path of its
    `hydradeploy`.

    What it needs comes from the device's own package index. Raises MissingError (no Python 3.10 there, or none that
    makes environments), EnvironmentFailed (pip fails, disk).
    """
    script = files("hydradeploy.remote").joinpath("installing.py").read_bytes()
    data = chosen.path.read_bytes()
    say(f"{connection.host}: seeing to hydradeploy[{chosen.extras}] there; to install it may take minutes")
    code, out, said = connection.run(
        _BOOTSTRAP, script.hex(), chosen.path.name, sha256_bytes(data), chosen.extras, data=data
    )
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(_FOUND):
            return line.removeprefix(_FOUND)
    raise _failed(connection.host, code, said.splitlines())


def _failed(host: str, code: int, said: Sequence[str]) -> HydraError:
    reason = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), None)
    hint = next((line.removeprefix("hint: ") for line in said if line.startswith("hint: ")), None)
    if reason is not None:
        kind = MissingError if code == ExitCode.MISSING else EnvironmentFailed
        return kind(f"{host}: {reason}", hint=hint)
    if code == 127:
        return MissingError(f"{host}: no python3 there", hint="install Python 3.10 or newer there")
    last = said[-1] if said else f"exit {code}"
    return EnvironmentFailed(f"{host}: installing hydradeploy there failed: {last}")
