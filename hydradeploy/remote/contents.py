"""What of a bundle goes to a device: its own files, and engines that were built ahead of time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hydradeploy.bundle import MANIFEST, Bundle, FileRecord
from hydradeploy.engines.cache import ENGINES, PLAN, RECORD, Cache, Key
from hydradeploy.errors import IntegrityError, environment
from hydradeploy.files import CHUNK, inside, sha256_bytes, sha256_file


def contents(bundle: Bundle) -> dict[str, FileRecord]:
    """Every file to be copied, by its name. Accuracy stays here, and so do engines of one GPU, which are of no use to
    another; raises EnvironmentFailed where a file cannot be read."""
    with environment(f"reading {bundle.path}"):
        own = bundle.manifest.files | {MANIFEST: _record(bundle.path / MANIFEST)}
        return own | dict(_engines(bundle))


def place_of(bundle: Path) -> str:
    """The name of a bundle's place on any device: its directory's name, and eight digits that tell it from others of
    that name on this machine."""
    real = Path(os.path.realpath(bundle))
    letters = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in real.name)
    return f"{letters[:40]}-{sha256_bytes(os.fsencode(real))[:8]}"


def chunks(path: Path, offset: int, size_bytes: int) -> Iterator[bytes]:
    """So many bytes of a file; fewer where it has become shorter are made up with zeros, and then its hash tells."""
    with environment(f"reading {path}"), path.open("rb") as file:
        file.seek(offset)
        while size_bytes:
            chunk = file.read(min(CHUNK, size_bytes)) or bytes(min(CHUNK, size_bytes))
            size_bytes -= len(chunk)
            yield chunk


def begins_with(path: Path, size_bytes: int, sha256: str) -> bool:
    """Whether that is the hash of the file's first bytes."""
    import hashlib

    digest = hashlib.sha256()
    for chunk in chunks(path, 0, size_bytes):
        digest.update(chunk)
    return digest.hexdigest() == sha256


def _engines(bundle: Bundle) -> Iterator[tuple[str, FileRecord]]:
    artifacts, cache = {artifact.sha256 for artifact in bundle.manifest.artifacts}, Cache(bundle.path / ENGINES)
    for name, record in cache.records().items():
        if record.key.gpu is None and record.key.sha256 in artifacts and _is_whole(cache, record.key):
            place = f"{ENGINES}/{name}"
            yield f"{place}/{RECORD}", _record(inside(bundle.path, f"{place}/{RECORD}"))
            yield f"{place}/{PLAN}", record.plan


def _is_whole(cache: Cache, key: Key) -> bool:
    """A damaged one is as good as none: who needs it builds it again."""
    try:
        return cache.find(key) is not None
    except IntegrityError:
        return False


def _record(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256_file(path), size_bytes=path.stat().st_size)
