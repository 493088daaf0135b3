"""A process of its own that reads the device's sensors while others measure, and answers what it read when asked.

Its parent writes one JSON line to ask and reads one JSON line; in between it does nothing, so that it can block on the
child that measures. The monitor takes the weakest core and yields to whoever wants it. A child of fewer threads than
there are cores can stay off that core (`Watch.cores_for`); one of as many threads shares it, because to take a core
from it would be to measure something else.

A request to pin the clocks is the monitor's too, because it outlives its parent: at the end of its input, which comes
however the parent ends, it puts them back. Only if itself is killed by force, they stay as they are.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from operator import itemgetter

import msgspec

from hydradeploy.devices import Machine
from hydradeploy.devices.linux import core_kinds
from hydradeploy.devices.reading import Reading, Tree
from hydradeploy.errors import HydraError, MissingError
from hydradeploy.processes import fresh
from hydradeploy.profiler.processes import Family
from hydradeploy.spec import Record

INTERVAL_S = 0.25
# A gauge of power has to be integrated; a counter of energy has not.
POWER_INTERVAL_S = 0.1
# Readings that cost much are taken more seldom: the monitor takes at most this share of a core.
MOST_SHARE = 0.05
KEPT = 1 << 13
_COSTED = 5
_LOWEST_PRIORITY = 19
_PATIENCE_S = 10.0
_PATIENCE_LOCKING_S = 60.0


class Setup(Record, frozen=True, kw_only=True):
    """What the monitor is to watch: `source` is `module:function` that gives the machine of a kind."""

    kind: str
    source: str
    parent: int
    lock_clocks: bool


class Began(Record, frozen=True, kw_only=True):
    """Its first answer. `cost_s` are processor seconds per reading; `core` is None where there is only one."""

    core: int | None = None
    interval_s: float = INTERVAL_S
    cost_s: float = 0.0
    error: str | None = None
    hint: str | None = None


class Window(Record, frozen=True, kw_only=True):
    """Asks for the readings of a window of the monotonic clock."""

    started_s: float
    ended_s: float


@dataclass(frozen=True)
class Cost:
    """What the monitor takes: processor seconds per reading, and the share of a core that comes to."""

    reading_s: float
    share: float


@dataclass
class Watch:
    """The parent's end of a monitor. `why_not` says why it gives no more readings, None while it does."""

    process: subprocess.Popen[bytes]
    core: int | None = None
    interval_s: float = INTERVAL_S
    cost: Cost | None = None
    why_not: str | None = None

    def between(self, started_s: float, ended_s: float) -> tuple[Reading, ...]:
        """The readings of a window, with the last one before it and the first one after it.

        One after it is taken now if there is none. None at all where the monitor has ended (`why_not`).
        """
        line = self._ask(msgspec.json.encode(Window(started_s=started_s, ended_s=ended_s)), _PATIENCE_S)
        return () if line is None else msgspec.json.decode(line, type=tuple[Reading, ...])

    def cores_for(self, threads: int) -> frozenset[int] | None:
        """The cores for a child of so many threads that keep it off the monitor's, None where it needs them all."""
        allowed = os.sched_getaffinity(0)
        return frozenset(allowed - {self.core}) if self.core in allowed and threads < len(allowed) else None

    def _begin(self, setup: Setup) -> None:
        line = self._ask(msgspec.json.encode(setup), _PATIENCE_LOCKING_S)
        if line is None:
            if setup.lock_clocks:
                raise MissingError(f"the clocks cannot be pinned: {self.why_not}")
            return
        began = msgspec.json.decode(line, type=Began)
        if began.error is not None:
            raise MissingError(began.error, hint=began.hint)
        self.core, self.interval_s = began.core, began.interval_s
        self.cost = Cost(began.cost_s, began.cost_s / began.interval_s)

    def _ask(self, line: bytes, patience_s: float) -> bytes | None:
        """The answer, None where there is none and from then on."""
        if self.why_not is not None:
            return None
        self.why_not = "the monitor was interrupted"  # by whatever is raised here
        assert self.process.stdin is not None
        answer: bytes | None = b""
        with suppress(OSError):
            self.process.stdin.write(line + b"\n")
            answer = self._line(time.monotonic() + patience_s)
        if answer is None:
            self.why_not = f"the monitor did not answer within {patience_s:g} s"
        else:
            self.why_not = None if answer else f"the monitor ended with {self._ended()}"
        return answer or None

    def _line(self, until_s: float) -> bytes | None:
        """What the monitor says up to the end of the line; empty where it has ended, None where it takes too long."""
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            if not poll.poll(max(0.0, until_s - time.monotonic()) * 1e3):
                return None
            parts.append(os.read(self.process.stdout.fileno(), 1 << 20))
            if not parts[-1]:
                return b""
        return b"".join(parts)

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(_PATIENCE_S)
            return f"signal {-code}" if code < 0 else f"exit {code}"
        return "its output closed"

    def _close(self, patience_s: float) -> None:
        """Its input ends, and so does it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs holds even a killed process
                self.process.wait(_PATIENCE_S)
        finally:
            self.process.stdout.close()


@contextmanager
def watching(kind: str, *, lock_clocks: bool = False, source: str = "hydradeploy.devices:machine") -> Iterator[Watch]:
    """Read the sensors of this machine, seen as one kind of device, while the block runs.

    With `lock_clocks` its clocks are pinned meanwhile and put back however the block or this process ends. Raises
    MissingError where they cannot be, or where this machine is no such device. A monitor that ends for any other reason
    ends nothing but its readings: `Watch.why_not` tells it.
    """
    command, env = fresh(__name__)
    watch = Watch(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=env,
            start_new_session=True,  # Ctrl-C in a terminal goes to all processes of its session
        )
    )
    try:
        watch._begin(Setup(kind=kind, source=source, parent=os.getpid(), lock_clocks=lock_clocks))
        yield watch
    finally:
        watch._close(_PATIENCE_LOCKING_S if lock_clocks else _PATIENCE_S)


# ---------------------------------------------------------------- in the monitor's process


@dataclass
class History:
    """Encoded readings in order. When there are too many, every other one of the older half is given up."""

    kept: int = KEPT
    lines: list[tuple[float, bytes]] = field(default_factory=list)

    def add(self, reading: Reading) -> None:
        self.lines.append((reading.at_s, msgspec.json.encode(reading)))
        if len(self.lines) > self.kept:
            half = self.kept // 2
            self.lines[:half] = self.lines[:half:2]

    def between(self, window: Window) -> bytes:
        """A JSON array of those within, of the last one before and of the first one after."""
        first = bisect_right(self.lines, window.started_s, key=itemgetter(0)) - 1
        last = bisect_left(self.lines, window.ended_s, key=itemgetter(0))
        return b"[" + b",".join(line for _, line in self.lines[max(0, first) : last + 1]) + b"]"


@dataclass
class _Monitor:
    """Reads a machine on a schedule and answers in between."""

    machine: Machine
    family: Family
    answers: int
    interval_s: float = INTERVAL_S
    history: History = field(default_factory=History)
    stopped: bool = False

    def watch(self) -> None:
        """Until the input ends, the parent is gone, or a signal."""
        core = _step_aside()
        cost_s = self.measure_cost()
        _write(self.answers, msgspec.json.encode(Began(core=core, interval_s=self.interval_s, cost_s=cost_s)))
        poll = select.poll()
        poll.register(0, select.POLLIN)
        due_s = time.monotonic() + self.interval_s
        while not self.stopped and os.getppid() == self.family.pid:
            now = time.monotonic()
            if now >= due_s:
                self.read()
                due_s = max(due_s + self.interval_s, now)
            elif poll.poll((due_s - now) * 1e3):
                asked = os.read(0, 1 << 16)
                if not asked:
                    return
                self.answer(msgspec.json.decode(asked, type=Window))

    def measure_cost(self) -> float:
        """Processor seconds per reading; how often to read follows from them, and from what there is to read."""
        first = self.read()  # which also looks up which sensors there are
        before = time.process_time()
        for _ in range(_COSTED):
            self.read()
        cost_s = (time.process_time() - before) / _COSTED
        integrate = "power_w" in first.gauges and "energy_j" not in first.counters
        self.interval_s = max(POWER_INTERVAL_S if integrate else INTERVAL_S, cost_s / MOST_SHARE)
        return cost_s

    def read(self) -> Reading:
        at_s = time.monotonic()
        self.family.look()
        reading = self.machine.read(at_s, self.family.numbers)
        if self.family.busy_s is not None:
            reading = msgspec.structs.replace(reading, counters=reading.counters | {"ours_s": self.family.busy_s})
        self.history.add(reading)
        return reading

    def answer(self, window: Window) -> None:
        if self.history.lines[-1][0] < window.ended_s:
            self.read()
        _write(self.answers, self.history.between(window))

    def stop(self, *_: object) -> None:
        self.stopped = True


def main() -> int:
    """Watch what the first line of stdin says, and answer the others."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a driver prints is no answer
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as questions:
        line = questions.readline()
    if not line:
        return 0
    setup = msgspec.json.decode(line, type=Setup)
    try:
        with ExitStack() as clocks, suppress(BrokenPipeError):
            monitor = _prepared(setup, answers, clocks)
            if monitor is not None:
                monitor.watch()
    except HydraError as error:  # nobody else may be there to tell it
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    if monitor is not None and monitor.stopped:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return 0


def _prepared(setup: Setup, answers: int, clocks: ExitStack) -> _Monitor | None:
    """A monitor of the machine, its clocks pinned if that is wanted; None where its parent was told why not."""
    module, _, name = setup.source.partition(":")
    try:
        monitor = _Monitor(getattr(import_module(module), name)(setup.kind), Family(setup.parent), answers)
        signal.signal(signal.SIGTERM, monitor.stop)  # not before what is pinned is put back
        if setup.lock_clocks:
            clocks.enter_context(monitor.machine.lock_clocks())
    except HydraError as error:
        _write(answers, msgspec.json.encode(Began(error=error.message, hint=error.hint)))
        return None
    return monitor


def _step_aside() -> int | None:
    """Take the last one of the weakest cores and the lowest priority; None where there is one core only."""
    allowed = os.sched_getaffinity(0)
    kinds = [allowed.intersection(cores) for cores in core_kinds(Tree()).values()]
    core = max(next(filter(None, reversed(kinds)), allowed))
    with suppress(OSError):
        os.nice(_LOWEST_PRIORITY)
    if len(allowed) < 2:
        return None
    with suppress(OSError):
        os.sched_setaffinity(0, {core})
    return core


def _write(file: int, line: bytes) -> None:
    rest = memoryview(line + b"\n")
    while rest:
        rest = rest[os.write(file, rest) :]
