"""A process that is waited for, blocked: what it said, and how it ended."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydradeploy.devices.reading import Tree
from hydradeploy.errors import MissingError

_TICK_S = 1.0
_MOST_WORDS = 1 << 16


@dataclass(frozen=True)
class Ended:
    """How a process ended; `code` is negative for a signal, None where patience did. `err` are its last words."""

    code: int | None
    out: bytes
    err: bytes

    @property
    def last_words(self) -> str:
        """The last line on stderr that says something."""
        return (self.err.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def run_watched(
    command: Sequence[str],
    request: bytes,
    *,
    env: Mapping[str, str],
    patience_s: float,
    release: Callable[[], bool] | None = None,
) -> Ended:
    """Run a command with `request` on its stdin, which ends there, or once `release` says so.

    `release` is asked once a second. However this is left, by an exception too, the process and those of its group are
    gone. Raises MissingError where it cannot be started.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            # A group of its own: a Ctrl-C on the terminal is for the parent, and what it started is killed with it.
            start_new_session=True,
        )
    except OSError as error:
        raise MissingError(f"{command[0]} cannot be started: {error.strerror}") from error
    with _Pipes(process, request) as pipes:
        try:
            in_time = _wait(process, pipes, time.monotonic() + patience_s, release)
        finally:
            # Before it is waited for: until then its number cannot be another's.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        pipes.move(0.0)
        return Ended(process.returncode if in_time else None, bytes(pipes.out), bytes(pipes.err))


def _wait(process: subprocess.Popen[bytes], pipes: _Pipes, until: float, release: Callable[[], bool] | None) -> bool:
    """Whether it ended in time."""
    pause, ask_at = 0.001, time.monotonic()
    while not _has_ended(process):
        now = time.monotonic()
        if now >= until:
            return False
        if pipes.sent and not pipes.released and now >= ask_at:
            ask_at = now + _TICK_S
            if release is None or release():
                pipes.release()
        # Its pipes end a moment before it does. They stay open where its own children have them: hence the tick.
        pipes.move(min(until - now, _TICK_S if pipes.speaking else pause))
        pause = pause if pipes.speaking else min(_TICK_S, 2 * pause)
    return True


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking note of it: its number stays its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class _Pipes:
    """The three pipes of a process, none of which blocks."""

    def __init__(self, process: subprocess.Popen[bytes], request: bytes) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._stdin, self._out, self._err = process.stdin, process.stdout, process.stderr
        self._request = memoryview(request)
        self.out, self.err = bytearray(), bytearray()
        self._selector = selectors.DefaultSelector()
        for pipe in (self._stdin, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_WRITE if pipe is self._stdin else selectors.EVENT_READ)

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self.release()
        self._out.close()
        self._err.close()

    @property
    def sent(self) -> bool:
        return not self._request

    @property
    def speaking(self) -> bool:
        """Whether the process, or a child of it, may still say something."""
        return any(key.fileobj is not self._stdin for key in self._selector.get_map().values())

    @property
    def released(self) -> bool:
        return self._stdin.closed

    def release(self) -> None:
        """End its stdin."""
        # What a process did not read before it ended is of no use.
        with suppress(OSError):
            self._stdin.close()

    def move(self, timeout_s: float) -> None:
        """Pass on what there is to pass on, after at most that long; all that is there for 0."""
        while ready := self._selector.select(timeout_s):
            for key, _ in ready:
                if key.fileobj is self._stdin:
                    self._send()
                else:
                    self._receive(self._out if key.fileobj is self._out else self._err)
            if timeout_s:
                return

    def _send(self) -> None:
        try:
            self._request = self._request[os.write(self._stdin.fileno(), self._request) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._request = self._request[:0]
        if self.sent:
            self._selector.unregister(self._stdin)

    def _receive(self, pipe: IO[bytes]) -> None:
        try:
            heard = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not heard:
            self._selector.unregister(pipe)
        if pipe is self._out:
            self.out += heard
        else:
            self.err = (self.err + heard)[-_MOST_WORDS:]


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for lack of memory, on the machine and in our control group.

    Of use as a difference only; 0 where nothing counts them.
    """
    tree = Tree(root)
    names = ["proc/vmstat"]
    for line in (tree.text("proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            names.append(f"sys/fs/cgroup{group}/memory.events")
        elif "memory" in controllers.split(","):
            names.append(f"sys/fs/cgroup/memory{group}/memory.oom_control")
    lines = [line.split() for name in names for line in (tree.text(name) or "").splitlines()]
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] == "oom_kill")
