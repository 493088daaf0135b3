"""What a profile run has measured so far, one JSON line per finished round of a cell, so that none of it is lost.

    profiles/NAME.jsonl     while the run goes on, and after it was cut short; removed when the profile is written

The first line says what the run is: device, conditions and plan; a run that goes on must be the same. A line is
appended in one write and synced. A last line without its end is what a killed writer left, and is dropped; a damaged
line before it is refused.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hydradeploy.errors import EnvironmentFailed, ForeignError, IntegrityError, UsageError, environment
from hydradeploy.measurements import Conditions, Device
from hydradeploy.profiler.presets import Preset, Target
from hydradeploy.profiler.sampling import Measured
from hydradeploy.spec import Record, decode

SCHEMA = 4


class Header(Record, frozen=True, kw_only=True):
    """What a run is. `cells` are the keys of its cells, see `Job.key`."""

    schema: int = SCHEMA
    device: Device
    conditions: Conditions
    preset: Preset
    target: Target
    cells: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many measurements a whole run has."""
        return self.preset.rounds * len(self.cells)

    def check(self, now: Header, path: Path) -> None:
        """Raise where a run `now` is not this one, naming what differs: ForeignError for another device or other
        conditions, UsageError for another plan."""
        changed = self.device.differences(now.device) + self.conditions.differences(now.conditions)
        if changed:
            raise ForeignError(
                f"{path} was measured otherwise (there, here): {'; '.join(changed)}",
                hint="put that back as it was and go on, or begin anew with --force",
            )
        others = [name for name in ("preset", "target", "cells") if getattr(self, name) != getattr(now, name)]
        if others:
            raise UsageError(
                f"{path} is of another run: {', '.join(others)} differ",
                hint="repeat the command it was begun with, or begin anew with --force",
            )


class Seen(Record, frozen=True, kw_only=True):
    """What was seen while the samples of a regime were taken: `evidence` has the numbers of the conditions, `energy_j`
    joules per image, `unmetered` why there are none."""

    evidence: dict[str, float] = msgspec.field(default_factory=dict)
    energy_j: float | None = None
    unmetered: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= (self.energy_j or 0.0) < math.inf:
            raise ValueError("energy_j must be finite and not negative")


class Entry(Record, frozen=True, kw_only=True):
    """One finished round of one cell: what its process measured, or why it failed.

    `wall_s` is what it took from start to end, `seen` what was seen of it by regime, `unwatched` why there is no
    evidence.
    """

    round: int
    cell: int
    wall_s: float
    measured: Measured | None = None
    error: str | None = None
    seen: dict[str, Seen] = msgspec.field(default_factory=dict)
    unwatched: str | None = None

    def __post_init__(self) -> None:
        if (self.measured is None) == (self.error is None):
            raise ValueError("it is either measured or has an error")
        found = self.measured
        times = (
            (found.load_s, found.first_s, found.prepare_s, found.unkept_s, *found.switch_s) if found is not None else ()
        )
        if not all(0 <= value < math.inf for value in (*times, self.wall_s)):
            raise ValueError("load_s, first_s, prepare_s, unkept_s, switch_s and wall_s must be finite, not negative")
        if found is not None:
            _check_samples(found)


def _check_samples(found: Measured) -> None:
    """As a profile's file does, so that what is in a journal can be in one."""
    samples = found.latency_s
    if not samples or math.isnan(sum(samples)) or not 0 < min(samples) <= max(samples) < math.inf:
        raise ValueError("latency_s must be positive and finite, at least one")
    if min(found.memory_bytes or 0, found.unkept) < 0 or not 0 <= (found.settled_from or 0) < len(samples):
        raise ValueError("memory_bytes and unkept must not be negative, settled_from one of the samples")


@dataclass(frozen=True)
class Journal:
    """An open journal, locked against a second run; `entries` are those of an earlier run that goes on."""

    path: Path
    entries: tuple[Entry, ...]
    _descriptor: int

    def add(self, entry: Entry) -> None:
        """Append an entry; raises EnvironmentFailed, and then the journal is as it was."""
        _append(self._descriptor, entry, self.path)

    def remove(self) -> None:
        """Its run is done."""
        self.path.unlink(missing_ok=True)


def journal_of(profile: Path) -> Path:
    """The journal beside a profile's file."""
    return profile.with_suffix(profile.suffix + "l")


@contextmanager
def opened(path: Path, header: Header, *, resume: bool, force: bool) -> Iterator[Journal]:
    """The journal of a run that begins, or with `resume` goes on.

    Raises UsageError where there is one already and neither `resume` nor `force` is given, where there is nothing to
    resume, where it is of another plan, and where another process writes it; ForeignError where device or conditions
    have changed; IntegrityError for a damaged one; EnvironmentFailed when the disk fails.
    """
    with environment(f"opening {path}"):
        descriptor = _open(path, make=not resume)
    try:
        with environment(f"reading {path}"):
            data = _whole(descriptor)
        if resume:
            entries = _resumed(descriptor, data, header, path)
        else:
            _begun(descriptor, data, header, path, force)
            entries = ()
        yield Journal(path, entries, descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[Header, tuple[Entry, ...]]:
    """Header and entries of a journal; raises IntegrityError for a damaged one, OSError where it cannot be read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _parse(_whole(descriptor), path)[:2]
    finally:
        os.close(descriptor)


def _open(path: Path, *, make: bool) -> int:
    """The file, locked; not one that its own run has removed meanwhile. Raises UsageError where there is none and it is
    not to be made, or where another process has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o666)
        except FileNotFoundError as error:
            if make:
                raise
            raise _nothing(path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(
                f"{path}: another process is measuring", hint="wait for it; two would only disturb each other"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _nothing(path: Path) -> UsageError:
    return UsageError(f"{path}: nothing to resume", hint="measure without --resume")


def _resumed(descriptor: int, data: bytes, header: Header, path: Path) -> tuple[Entry, ...]:
    """The entries of a run that goes on; the file is cut to its last whole line."""
    if b"\n" not in data:  # killed before it had a first line
        raise _nothing(path)
    before, entries, length = _parse(data, path)
    before.check(header, path)
    with environment(f"writing {path}"):
        os.ftruncate(descriptor, length)
    return entries


def _begun(descriptor: int, data: bytes, header: Header, path: Path, force: bool) -> None:
    """Write the first line."""
    if b"\n" in data and not force:
        raise UsageError(
            f"{path}: an earlier run was cut short", hint="go on with --resume, or begin anew with --force"
        )
    with environment(f"writing {path}"):
        os.ftruncate(descriptor, 0)
    try:
        _append(descriptor, header, path)
    except EnvironmentFailed:
        path.unlink(missing_ok=True)
        raise


def _whole(descriptor: int) -> bytes:
    parts = []
    os.lseek(descriptor, 0, os.SEEK_SET)
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _parse(data: bytes, path: Path) -> tuple[Header, tuple[Entry, ...], int]:
    """Header, entries, and how many bytes their whole lines take."""
    length = data.rfind(b"\n") + 1
    if not length:
        raise IntegrityError(f"{path}: not even its first line is whole", hint="begin anew with --force")
    first, *lines = data[: length - 1].split(b"\n")
    try:
        header = decode(first, Header, f"{path}, line 1", SCHEMA)
    except IntegrityError as error:
        raise IntegrityError(error.message, hint="begin anew with --force") from error
    entries: list[Entry] = []
    seen: set[tuple[int, int]] = set()
    for number, line in enumerate(lines, 2):
        try:
            entry = msgspec.json.decode(line, type=Entry)
            _check_place(header, entry, seen)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise IntegrityError(
                f"{path}, line {number}: {error}", hint="remove that line, or begin anew with --force"
            ) from error
        entries.append(entry)
        seen.add((entry.round, entry.cell))
    return header, tuple(entries), length


def _check_place(header: Header, entry: Entry, seen: Collection[tuple[int, int]]) -> None:
    known = 0 <= entry.round < header.preset.rounds and 0 <= entry.cell < len(header.cells)
    if not known or (entry.round, entry.cell) in seen:
        raise ValueError(f"round {entry.round} of cell {entry.cell} is {'double' if known else 'none of this run'}")


def _append(descriptor: int, record: Record, path: Path) -> None:
    line = msgspec.json.encode(record) + b"\n"
    end = os.lseek(descriptor, 0, os.SEEK_END)
    with environment(f"writing {path}"):
        try:
            # A disk that is almost full takes a part; trying the rest gives the error that says so.
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
