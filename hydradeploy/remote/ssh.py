"""OpenSSH's client: one connection, over which every command of a run goes.

The connection is one process of ours, started first. It asks for passwords where there is a terminal, checks the host's
key, and lives until our end of its stdin closes, which it does however we end.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydradeploy.errors import EnvironmentFailed, HydraError, MissingError, UsageError

_READY = b"hydradeploy-connected"
_LONGEST_SOCKET = 80  # sockaddr_un takes 108 bytes, and ssh adds 17 while it makes one
_ENDING_S = 5.0
_WAIT = f"echo {_READY.decode()}; exec cat"
# A terminal sends Ctrl-C to ssh as well, which would end before the device has been told.
_IGNORING_CTRL_C = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
_OPTIONS = {
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "30",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    # What a configuration may have for people who log in.
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "LogLevel": "ERROR",
}
# Single quotes keep everything else in every login shell: sh, bash, zsh, fish, csh.
_UNQUOTABLE = re.compile(r"['!\n]|\\\\")


@dataclass(frozen=True)
class Connection:
    """An open connection to `host`. Made by `connected`."""

    host: str
    _command: tuple[str, ...]
    _master: subprocess.Popen[bytes]

    def start(self, script: str, *arguments: str) -> Session:
        """Run a script of POSIX sh there. `arguments` are `$1`, ... as `printf %b` reads them, whatever is in them."""
        command = [*self._command, "--", self.host, line_of(script, *arguments)]
        # A client of a shared connection does not ignore Ctrl-C, but it never asks for anything: no terminal for it.
        return Session(_started(command, own_session=True))

    def run(self, script: str, *arguments: str, data: bytes = b"") -> tuple[int, bytes, str]:
        """Run a script with `data` on its stdin; its exit code, stdout and stderr. Raises where the connection is
        lost."""
        session = self.start(script, *arguments)
        try:
            out, _ = session.process.communicate(data)
        finally:
            session.close()
        if session.process.returncode == 255:
            raise self.lost("run it again")
        return session.process.returncode, out, session.last_words()

    def is_there(self) -> bool:
        """Whether the connection still stands, given a moment to end."""
        with suppress(subprocess.TimeoutExpired):
            self._master.wait(timeout=1.0)
        return self._master.poll() is None

    def lost(self, hint: str) -> HydraError:
        """What to raise where a command there has ended without telling how."""
        if self.is_there():
            return EnvironmentFailed(f"{self.host}: the program there was killed", hint=hint)
        return EnvironmentFailed(f"{self.host}: the connection was lost", hint=hint)


class Session:
    """A command that runs there; what it writes to stderr is kept."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._said: deque[str] = deque(maxlen=100)
        # No longer the process's, whose `communicate` would read it too.
        self._stderr, process.stderr = process.stderr, None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def last_words(self) -> str:
        """What it wrote to stderr, as far as it ended with it."""
        self._listener.join(timeout=_ENDING_S)
        return "\n".join(self._said)

    def close(self) -> None:
        """Close its stdin, which tells it to end, and wait for that; a process that does not is killed here."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        _ended(self.process)

    def _listen(self) -> None:
        assert self._stderr is not None
        with self._stderr as stderr:
            for line in stderr:
                self._said.append(line.decode(errors="replace").rstrip())


@contextmanager
def connected(host: str, ssh: str | None = None) -> Iterator[Connection]:
    """A connection to `host`: `user@host`, `ssh://user@host:port`, or a name of ~/.ssh/config. `ssh` is the command to
    use, with options: `ssh -F FILE`.

    Raises UsageError (no such host name or command line), MissingError (no ssh here), EnvironmentFailed (no connection,
    or one that was refused; a host key that is not known or has changed).
    """
    command = _client(host, ssh)
    with _directory() as directory:
        options = _OPTIONS | {"ControlPath": str(directory / "socket"), "BatchMode": "no" if _terminal() else "yes"}
        # The first value that ssh meets holds: what the user's command line says comes before ours.
        base = [*command, "-T", *(f"-o{name}={value}" for name, value in options.items())]
        master = Session(_started([*_IGNORING_CTRL_C, *base, "-oControlMaster=yes", "--", host, line_of(_WAIT)]))
        try:
            if (heard := _until_ready(master.process.stdout)) is not None:
                raise _refused(host, shlex.join(command), master, heard)
            # Should it be lost, ssh would make another one of its own, and ask for passwords again.
            yield Connection(host, (*base, "-oControlMaster=no", "-oProxyCommand=false"), master.process)
        finally:
            master.close()


def line_of(script: str, *arguments: str) -> str:
    """The command line for a login shell of any kind that runs a script of POSIX sh."""
    if _UNQUOTABLE.search(script):
        raise ValueError(f"not to be quoted for every shell: {script}")
    return " ".join((f"sh -c '{script}' hydradeploy", *map(_escaped, arguments)))


def _escaped(argument: str) -> str:
    """An argument in letters that no shell cares for; `printf %b` makes it what it was."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._"
    return "'" + "".join(chr(byte) if byte in plain else f"\\0{byte:03o}" for byte in argument.encode()) + "'"


def _client(host: str, ssh: str | None) -> list[str]:
    if not host or host.startswith("-") or any(letter.isspace() for letter in host):
        raise UsageError(
            f"--host {host!r} is no host", hint="user@host, ssh://user@host:port, or a name of ~/.ssh/config"
        )
    try:
        command = shlex.split("ssh" if ssh is None else ssh)
    except ValueError as error:
        raise UsageError(f"--ssh {ssh!r}: {error}", hint="--ssh 'ssh -F FILE'") from error
    if not command:
        raise UsageError("--ssh names no command", hint="--ssh 'ssh -F FILE'")
    if shutil.which(command[0]) is None:
        raise MissingError(f"there is no {command[0]} on this machine", hint="install OpenSSH's client")
    return command


@contextmanager
def _directory() -> Iterator[Path]:
    """For the socket, whose path must be short."""
    place = None if len(tempfile.gettempdir()) < _LONGEST_SOCKET - len("/hydradeploy-12345678/socket") else "/tmp"
    with tempfile.TemporaryDirectory(prefix="hydradeploy-", dir=place) as directory:
        yield Path(directory)


def _terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _started(command: list[str], *, own_session: bool = False) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=own_session)


def _until_ready(stdout: IO[bytes] | None) -> str | None:
    """None when the other end answers; before that a login shell may print anything. Else the last that was printed."""
    assert stdout is not None
    last = b""
    for line in stdout:
        if line.rstrip() == _READY:
            return None
        last = line.strip() or last
    return last.decode(errors="replace")


def _refused(host: str, client: str, master: Session, heard: str) -> EnvironmentFailed:
    """What ssh, or else the device, says in one line, and what to do."""
    _ended(master.process)
    said = master.last_words() or heard
    by_hand = f"{client} {host}"
    if "HOST IDENTIFICATION HAS CHANGED" in said:
        return EnvironmentFailed(
            f"{host}: its host key is not the one that is known here",
            hint="someone may be listening in, or the device was set up anew: find out, then remove the old key with "
            f"ssh-keygen -R, and run {by_hand} once",
        )
    if "host key is known for" in said or "Host key verification failed" in said:
        return EnvironmentFailed(
            f"{host}: its host key is not known here",
            hint=f"run {by_hand} once and compare the fingerprint it shows with the device's",
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("ssh: ") if lines else "ssh ended without a word"
    hint = f"{by_hand} must work first"
    if "Permission denied" in reason and not _terminal():
        hint += ", without asking: with a key (ssh-copy-id)"
    return EnvironmentFailed(f"{host}: {reason.removeprefix(f'{host}: ')}", hint=hint)


def _ended(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=_ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
