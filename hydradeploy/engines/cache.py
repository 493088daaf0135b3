"""Engines that were built, each under the hash of all that decides it.

    engines/
      <fingerprint>/engine.json    schema, artifact, the whole key, the plan's size and SHA-256
      <fingerprint>/plan           what the builder wrote
      timing-<fingerprint>         what TensorRT measured of kernels on one GPU, of use to every build there

An engine is written whole and in one step, by one process at a time. What is read is hashed before anybody gets it, and
nothing is handed out that is not of exactly the key asked for. The hash tells damage and mix-ups; it is no signature:
who can write into the directory can write both. A plan contains code for the GPU, so trust it as you trust a program.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hydradeploy.bundle import FileRecord, write_file
from hydradeploy.errors import IntegrityError, environment
from hydradeploy.files import inside, link_or_copy, locked, sha256_bytes, staged, user_cache, write_atomically
from hydradeploy.spec import Record, decode

SCHEMA = 1
ENGINES = "engines"
RECORD = "engine.json"
PLAN = "plan"

_TIMING = "timing-"
_FINGERPRINT_DIGITS = 32
_SHA256_DIGITS = 64
_REBUILD = "build it again: remove that directory, then hydradeploy profile"

Waiting = Callable[[str], None]


class Key(Record, frozen=True, kw_only=True):
    """All that decides a plan.

    `graph_sha256` and `sha256` are the artifact's, without and with the values of weights. `kind` is the builder,
    `version` its version. What a plan does not depend on is None: an engine built ahead of time is for no one GPU.
    """

    kind: str
    graph_sha256: str
    sha256: str
    version: str
    cuda_runtime: str | None = None
    cuda_driver: str | None = None
    gpu: str | None = None
    compute_capability: str | None = None
    sm_count: int | None = None
    flags: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The name of the engine's directory."""
        return _fingerprint(self)

    @property
    def timing(self) -> str:
        """The name of the timing cache: of the GPU and the versions, whatever is built."""
        device = msgspec.structs.replace(self, graph_sha256="", sha256="", flags={})
        return _TIMING + _fingerprint(device)

    def facts(self) -> dict[str, str | None]:
        """What it consists of, each part by the name to show."""
        parts = msgspec.to_builtins(self)
        flags = parts.pop("flags")
        named = {_SHOWN.get(name, name.replace("_", " ")): None if v is None else str(v) for name, v in parts.items()}
        return named | dict(sorted(flags.items()))

    def differences(self, there: Key) -> tuple[str, ...]:
        """What is another there, a text each: field, here / there."""
        ours, theirs = self.facts(), there.facts()
        return tuple(
            f"{name}: {_short(ours.get(name))} here / {_short(theirs.get(name))} there"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        )


_SHOWN = {
    "graph_sha256": "graph",
    "sha256": "weights",
    "cuda_runtime": "CUDA runtime",
    "cuda_driver": "CUDA driver",
    "gpu": "GPU",
    "sm_count": "SM count",
}


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:12] if len(value) == _SHA256_DIGITS else value


def _fingerprint(key: Key) -> str:
    ordered = msgspec.structs.replace(key, flags=dict(sorted(key.flags.items())))
    return sha256_bytes(msgspec.json.encode(ordered))[:_FINGERPRINT_DIGITS]


class EngineRecord(Record, frozen=True, kw_only=True):
    """engine.json. `artifact` is the name it had when it was built, for people; `warnings` are the builder's."""

    schema: int
    artifact: str
    key: Key
    plan: FileRecord
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cache:
    """The engines below one directory, which need not exist."""

    root: Path

    def find(self, key: Key) -> bytes | None:
        """The plan of exactly that key, its hash verified; None where there is none.

        Raises IntegrityError where plan or record are damaged, incomplete or of another key.
        """
        place = self.root / key.fingerprint
        if not os.path.lexists(place):
            return None
        record = self._record(key.fingerprint)
        if record.key != key:
            raise IntegrityError(
                f"{place}: holds the engine of something else ({'; '.join(key.differences(record.key))})", hint=_REBUILD
            )
        return self._verified(place, record)

    def store(self, key: Key, plan: bytes, *, artifact: str = "", warnings: tuple[str, ...] = ()) -> None:
        """Keep a plan in place of what is under its key; to be called with the `lock` of that key held.

        Raises EnvironmentFailed where the disk fails; what was there before is then whole.
        """
        place = self.root / key.fingerprint
        if place.is_symlink() or place.is_file():  # would be followed, or be in the way
            with environment(f"removing {place}"):
                place.unlink()
        with environment(f"writing into {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)  # an export may have replaced the bundle since it was locked
        with staged(place) as stage:
            record = EngineRecord(
                schema=SCHEMA, artifact=artifact, key=key, plan=write_file(stage / PLAN, plan), warnings=warnings
            )
            write_file(stage / RECORD, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")

    @contextmanager
    def lock(self, key: Key, waiting: Waiting) -> Iterator[None]:
        """Be the only one who builds the engine of that key; `waiting` is told when somebody else is."""
        with locked(self.root / key.fingerprint, waiting):
            yield

    def timing_cache(self, key: Key) -> bytes:
        """What is known of kernels on that GPU with those versions; empty where nothing is, or where it is damaged."""
        try:
            sealed = inside(self.root, key.timing).read_bytes()
        except (OSError, IntegrityError):
            return b""
        digest, data = sealed[:_SHA256_DIGITS], sealed[_SHA256_DIGITS:]
        return data if digest == sha256_bytes(data).encode() else b""

    @contextmanager
    def timing(self, key: Key, waiting: Waiting) -> Iterator[TimingCache]:
        """The timing cache of that GPU, of nobody else meanwhile, kept as it is left at the end.

        One build per GPU at a time: two would each time the other's kernels, and the later would undo what the earlier
        added.
        """
        with locked(self.root / key.timing, waiting):
            before = self.timing_cache(key)
            timings = TimingCache(before)
            yield timings
            if timings.data and timings.data != before:
                with environment(f"writing into {self.root}"):
                    sealed = sha256_bytes(timings.data).encode() + timings.data
                    write_atomically(self.root / key.timing, sealed)

    def records(self) -> dict[str, EngineRecord]:
        """Every whole record by its fingerprint; plans are not looked at."""
        found = {}
        for name in self._names():
            with suppress(IntegrityError):
                found[name] = self._record(name)
        return found

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in self.root.iterdir() if _is_fingerprint(entry.name))
        except OSError:
            return []

    def _record(self, name: str) -> EngineRecord:
        file = inside(self.root, f"{name}/{RECORD}")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{file}: cannot be read ({error.strerror})", hint=_REBUILD) from error
        return decode(data, EngineRecord, str(file), SCHEMA)

    def _verified(self, place: Path, record: EngineRecord) -> bytes:
        file = inside(self.root, f"{place.name}/{PLAN}")
        try:
            size = file.stat().st_size
            if size != record.plan.size_bytes:
                raise IntegrityError(f"{file}: {size} bytes, its record says {record.plan.size_bytes}", hint=_REBUILD)
            plan = file.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{file}: cannot be read ({error.strerror})", hint=_REBUILD) from error
        if sha256_bytes(plan) != record.plan.sha256:  # of the bytes that are handed out, not of a file that may change
            raise IntegrityError(f"{file}: changed, its sha256 is not its record's", hint=_REBUILD)
        return plan


@dataclass
class TimingCache:
    """Bytes of a timing cache, to be replaced by what a build makes of them."""

    data: bytes


def _is_fingerprint(name: str) -> bool:
    return len(name) == _FINGERPRINT_DIGITS and set(name) <= set("0123456789abcdef")


def user_root() -> Path:
    """Where engines of bundles are kept that cannot be written to."""
    return user_cache() / ENGINES


def roots(bundle: Path) -> tuple[Path, ...]:
    """Where engines of a bundle are looked for, the first being where new ones go."""
    own, user = bundle / ENGINES, user_root()
    place = own if os.path.lexists(own) else bundle
    return (own, user) if os.access(place, os.W_OK | os.X_OK) else (user, own)


def carry_over(old: Path, new: Path, artifacts: Collection[str]) -> None:
    """Bring into the directory `new` the engines of `old` whose artifact's sha256 is among `artifacts`, and the timing
    caches; of artifacts that are gone nobody will ask again. An engine that is being replaced meanwhile stays behind.
    """
    wanted = [name for name, record in Cache(old).records().items() if record.key.sha256 in artifacts]
    timings = [entry.name for entry in old.iterdir() if entry.name.startswith(_TIMING)]
    if not wanted and not timings:
        return
    new.mkdir()
    for name in wanted:
        with suppress(FileNotFoundError):
            shutil.copytree(old / name, new / name, copy_function=link_or_copy)
    for name in timings:
        with suppress(FileNotFoundError):
            link_or_copy(str(old / name), str(new / name))
