"""The device's end: what `hydradeploy there` does, started over ssh. The profiler is not in this process: it starts
`hydradeploy profile`, and ends that when the other end is gone."""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version

from hydradeploy import bundle, measurements
from hydradeploy.bundle import FileRecord
from hydradeploy.engines import cache
from hydradeploy.errors import EnvironmentFailed, ExitCode, HydraError, IntegrityError, environment
from hydradeploy.files import CHUNK
from hydradeploy.processes import signal_name
from hydradeploy.remote.channel import (
    PROTOCOL,
    Alive,
    Bring,
    Channel,
    Done,
    Drop,
    Ended,
    Failed,
    Hangup,
    Hello,
    Here,
    Keep,
    Line,
    Message,
    Missing,
    Put,
    Run,
    Stop,
    Take,
    Want,
)
from hydradeploy.remote.place import Place, opened

SILENCE_S = 60.0
_ENDING_S = 30.0
_LOOK_S = 1.0
# Dies with this process, however that ends; what it has started dies with it. It starts in the home directory, where a
# file would stand in for a module of that name.
_PROFILE = """
import sys
sys.path = list(filter(None, sys.path))
import signal
from hydradeploy.processes import die_with
die_with(int(sys.argv.pop(1)), signal.SIGTERM)
from hydradeploy.cli import main
main()
"""


def main(silence_s: float = SILENCE_S) -> int:
    """Serve one run on stdin and stdout, until the other end closes them or says nothing for `silence_s`; the exit
    code."""
    # Whatever anybody prints goes to stderr.
    sink = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    channel = Channel(sys.stdin.fileno(), sink, silence_s)
    with suppress(Hangup), _environment_in_use():
        try:
            channel.greet(hello())
            _serve(channel, silence_s)
        except HydraError as error:
            channel.send(Failed(code=error.exit_code, message=error.message, hint=error.hint))
            return error.exit_code
    return 0


@contextmanager
def _environment_in_use() -> Iterator[None]:
    """Keep the environment that --bootstrap has made, where this runs in it, from being removed by the next one."""
    with ExitStack() as held:
        with suppress(OSError):
            ready = held.enter_context(open(os.path.join(sys.prefix, "ready")))
            fcntl.flock(ready, fcntl.LOCK_SH)
        yield


def hello() -> Hello:
    """What this installation speaks, reads and writes."""
    schemas = {"bundle": bundle.SCHEMA, "profile": measurements.SCHEMA, "engine": cache.SCHEMA}
    return Hello(protocol=PROTOCOL, version=version("hydradeploy"), schemas=schemas)


def _serve(channel: Channel, silence_s: float) -> None:
    want = channel.receive()
    if not isinstance(want, Want):
        raise _unexpected(want)
    with opened(want.place) as place:
        channel.send(Missing(contents=place.missing(want.files), journals=place.journals()))
        while True:
            _answer(channel, place, want.files, channel.receive(), silence_s)


def _answer(channel: Channel, place: Place, files: Mapping[str, FileRecord], asked: Message, silence_s: float) -> None:
    if isinstance(asked, Put):
        place.put(asked.sha256, asked.offset, channel.payload(asked.size_bytes))
    elif isinstance(asked, Take):
        place.take(files)
        channel.send(Done())
    elif isinstance(asked, Keep):
        place.keep(asked.name, b"".join(channel.payload(asked.size_bytes)))
    elif isinstance(asked, Run):
        code, out = _Running(channel, place, asked.arguments, silence_s).to_the_end()
        channel.send(Ended(code=code, size_bytes=len(out)), [out])
    elif isinstance(asked, Bring):
        for path in place.results():
            with environment(f"reading {path}"):
                data = path.read_bytes()
            channel.send(Here(name=path.name, size_bytes=len(data)), [data])
        channel.send(Done())
    elif isinstance(asked, Drop):
        place.drop()
        channel.send(Done())
    elif not isinstance(asked, Stop):  # which may come when the run has ended by itself
        raise _unexpected(asked)


def _unexpected(message: Message) -> HydraError:
    return IntegrityError(f"the other end says {type(message).__name__} out of turn")


class _Running:
    """A profile that runs, and who wants it."""

    def __init__(self, channel: Channel, place: Place, arguments: Sequence[str], silence_s: float) -> None:
        where = ("--bundle", str(place.bundle), "--profiles", str(place.profiles))
        self._channel, self._silence_s = channel, silence_s
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROFILE, str(os.getpid()), "profile", *where, "--json", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._out, self._said = bytearray(), bytearray()
        self._heard = time.monotonic()
        self._told: float | None = None
        self._over: float | None = None
        self._gone = False

    def to_the_end(self) -> tuple[int, bytes]:
        """Tell what it says, end it when it is told to or nobody is there any more; its exit code and its answer.

        Raises Hangup where nobody is there when it has ended.
        """
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        outputs = {self._child.stdout.fileno(): self._out, self._child.stderr.fileno(): self._said}
        with selectors.DefaultSelector() as selector, self._child.stdout, self._child.stderr:
            for descriptor in (*outputs, self._channel.source):
                selector.register(descriptor, selectors.EVENT_READ)
            try:
                while outputs and not self._is_over():
                    for key, _ in selector.select(_LOOK_S):
                        if key.fd == self._channel.source:
                            self._listen()
                        elif data := os.read(key.fd, CHUNK):
                            outputs[key.fd] += data
                            self._tell()
                        else:
                            selector.unregister(key.fd)
                            del outputs[key.fd]
                    if self._gone and self._channel.source in selector.get_map():
                        selector.unregister(self._channel.source)
                    self._look_at_the_clock()
            finally:
                code = self._ended()
        self._tell(last=True)
        if self._gone:
            raise Hangup
        if code == -signal.SIGTERM and self._told is not None:  # before it could take that for Ctrl-C
            code = int(ExitCode.INTERRUPTED)
        if code < 0:
            raise EnvironmentFailed(
                f"the profile there was killed by {signal_name(-code)}",
                hint="what was measured is kept there; go on with --resume",
            )
        return code, bytes(self._out)

    def _ended(self) -> int:
        """Its exit code; it is still alive only where something has gone wrong here."""
        if self._child.poll() is None:
            self._interrupt()
            with suppress(subprocess.TimeoutExpired):
                return self._child.wait(_ENDING_S)
            self._child.kill()
        return self._child.wait()

    def _listen(self) -> None:
        try:
            for message in self._channel.waiting():
                if isinstance(message, Stop):
                    self._interrupt()
                elif not isinstance(message, Alive):
                    raise _unexpected(message)
            self._heard = time.monotonic()
        except Hangup:
            self._leave()

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if not self._gone and now - self._heard > self._silence_s:
            self._leave()
        if self._told is not None and now - self._told > _ENDING_S:
            self._child.kill()

    def _is_over(self) -> bool:
        """Its pipes close when it ends, unless something it has started holds them."""
        if self._child.poll() is None:
            return False
        self._over = self._over or time.monotonic()
        return time.monotonic() - self._over > _LOOK_S

    def _leave(self) -> None:
        self._gone = True
        self._interrupt()

    def _interrupt(self) -> None:
        if self._told is None and self._child.poll() is None:
            self._told = time.monotonic()
            self._child.send_signal(signal.SIGTERM)

    def _tell(self, *, last: bool = False) -> None:
        *lines, rest = self._said.split(b"\n")
        if last and rest:
            lines, rest = [*lines, rest], bytearray()
        self._said[:] = rest
        for line in lines:
            if self._gone:
                return
            try:
                self._channel.send(Line(text=line.decode(errors="replace")))
            except Hangup:
                self._leave()
