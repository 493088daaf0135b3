"""Where a bundle from another machine lies on the device, and how it gets there.

~/.cache/hydradeploy/remote/NAME-1a2b3c4d/     (XDG_CACHE_HOME, where it is set)
  bundle/       whole or not there: staged beside and exchanged in one step
  incoming/     by their SHA-256, files that have arrived and parts of such, while a copy is not complete
  profiles/     profiles that did not get home, and journals of runs that were cut short
  lock          of the one who works with it
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hydradeploy.bundle import FileRecord, read_manifest
from hydradeploy.engines.cache import ENGINES, carry_over
from hydradeploy.errors import IntegrityError, UsageError, environment
from hydradeploy.files import inside, link_or_copy, locked, sha256_file, staged, user_cache, write_atomically
from hydradeploy.remote.channel import Part

_PART = ".part"


def root() -> Path:
    """Where such places are, and the environment that --bootstrap makes."""
    return user_cache() / "remote"


@dataclass
class Place:
    """A place and what was found in it: the hashes of files, and a file for each hash. Made by `opened`."""

    path: Path
    _hashes: dict[Path, str] = field(default_factory=dict)
    _held: dict[str, Path] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    @property
    def incoming(self) -> Path:
        return self.path / "incoming"

    @property
    def profiles(self) -> Path:
        return self.path / "profiles"

    def missing(self, files: Mapping[str, FileRecord]) -> dict[str, Part]:
        """What of a bundle is to be sent, by SHA-256, with the part that is here; the rest is hashed, not believed."""
        wanted = {record.sha256: record.size_bytes for record in files.values()}
        with environment(f"reading {self.path}"):
            self._hashes = dict(self._whole(wanted))
            self._held = {sha256: path for path, sha256 in self._hashes.items()}
            if self.incoming.exists():
                kept = {*wanted, *(sha256 + _PART for sha256 in wanted)}
                for entry in self.incoming.iterdir():
                    if entry.name not in kept or self._held.get(entry.name, entry) != entry:
                        entry.unlink()
            return {sha256: self._part(sha256) for sha256 in wanted if sha256 not in self._held}

    def put(self, sha256: str, offset: int, chunks: Iterable[bytes]) -> None:
        """Write what is missing of a content.

        Raises IntegrityError where it is then another one, EnvironmentFailed where the disk fails; what has arrived
        until then is kept.
        """
        part = inside(self.incoming, sha256 + _PART)
        with environment(f"writing {part}"):
            self.incoming.mkdir(exist_ok=True)
            with part.open("r+b" if part.exists() else "wb", buffering=0) as file:
                file.truncate(offset)
                file.seek(offset)
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) or 0 :]
                os.fsync(file.fileno())
            if sha256_file(part) != sha256:
                part.unlink()
                raise IntegrityError(
                    f"{part}: arrived with another sha256",
                    hint="the bundle was changed meanwhile, or damaged: run it again",
                )
            self._held[sha256] = part.rename(self.incoming / sha256)

    def take(self, files: Mapping[str, FileRecord]) -> None:
        """Make the bundle of what is here, and let it take the place of the one before, whose engines it keeps."""
        if not self._is_up_to_date(files):
            with locked(self.bundle, lambda text: None), staged(self.bundle) as stage:
                for name, record in files.items():
                    if not name.startswith(f"{ENGINES}/"):
                        self._link(record.sha256, inside(stage, name))
                if (self.bundle / ENGINES).is_dir():
                    artifacts = {artifact.sha256 for artifact in read_manifest(stage).artifacts}
                    carry_over(self.bundle / ENGINES, stage / ENGINES, artifacts)
                for name, record in files.items():
                    if name.startswith(f"{ENGINES}/"):
                        self._link(record.sha256, inside(stage, name))
        shutil.rmtree(self.incoming, ignore_errors=True)

    def journals(self) -> tuple[str, ...]:
        """The names of runs that were cut short."""
        return tuple(sorted(path.name for path in self.profiles.glob("*.jsonl")))

    def keep(self, name: str, data: bytes) -> None:
        """Write a journal to go on with."""
        with environment(f"writing into {self.profiles}"):
            self.profiles.mkdir(exist_ok=True)
            write_atomically(inside(self.profiles, name), data)

    def results(self) -> list[Path]:
        """Profiles and journals."""
        return sorted(path for path in self.profiles.glob("*.json*") if path.suffix in (".json", ".jsonl"))

    def drop(self) -> None:
        """Remove profiles, which are kept elsewhere by now."""
        for path in self.profiles.glob("*.json"):
            with environment(f"removing {path}"):
                path.unlink()

    def _whole(self, wanted: Mapping[str, int]) -> Iterator[tuple[Path, str]]:
        """Files that have arrived, and then such of the bundle, that are wanted."""
        for directory in (self.incoming, self.bundle):
            for path in directory.rglob("*"):
                if path.is_file() and not path.is_symlink() and path.stat().st_size in wanted.values():
                    found = sha256_file(path)
                    if found in wanted and (directory != self.incoming or path.name == found):
                        yield path, found

    def _part(self, sha256: str) -> Part:
        part = self.incoming / (sha256 + _PART)
        if not part.exists():
            return Part(size_bytes=0, sha256="")
        return Part(size_bytes=part.stat().st_size, sha256=sha256_file(part))

    def _is_up_to_date(self, files: Mapping[str, FileRecord]) -> bool:
        """Whether each file is where it belongs. Then there is nothing else either, but what others keep in a bundle:
        its manifest is among them."""
        return all(self._hashes.get(self.bundle / name) == record.sha256 for name, record in files.items())

    def _link(self, sha256: str, target: Path) -> None:
        if sha256 not in self._held:
            raise IntegrityError(f"{target}: was never sent")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(str(self._held[sha256]), str(target))


@contextmanager
def opened(name: str, within: Callable[[], Path] = root) -> Iterator[Place]:
    """The place of that name, of nobody else meanwhile; raises UsageError where somebody else has it,
    EnvironmentFailed where it cannot be made."""
    with environment("making a place for the bundle"):
        above = within()
        above.mkdir(parents=True, exist_ok=True)
        path = inside(above, name)
        path.mkdir(exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{path}: another run works with it", hint="wait for it; two would only disturb each other"
            ) from error
        yield Place(path)
    finally:
        os.close(descriptor)
