"""Files that are whole or not there: atomic writes, directories exchanged in one step, hashes, locks.

A directory is replaced by staging its successor beside it and exchanging the two, so a kill at any moment leaves the
old one or the new one, never a mixture.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hydradeploy.errors import IntegrityError, UsageError, environment

CHUNK = 1 << 20

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def user_cache() -> Path:
    """Where what can be had again is kept for this user: ~/.cache/hydradeploy, or in XDG_CACHE_HOME."""
    try:
        home = Path.home()
    except RuntimeError:  # the number of nobody, as services and containers have it; those take this for its home
        home = Path("/")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "hydradeploy"


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, by plain reads: mapped pages would count as this process's memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file under a temporary name and rename it; raises OSError and leaves what was there."""
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write whole files that belong together: none is renamed before all are on the disk, so that one that fills up
    leaves all of what was there; raises OSError."""
    temporary: dict[Path, str] = {}
    try:
        for path, data in files.items():
            descriptor, temporary[path] = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o666 & ~_umask())
        for path, name in temporary.items():
            os.replace(name, path)
    except BaseException:
        for name in temporary.values():
            with suppress(OSError):
                os.unlink(name)
        raise


def try_writing(directory: Path) -> None:
    """Make and remove a file in a directory; raises OSError. What cannot be kept is not worth working for."""
    tempfile.TemporaryFile(dir=directory).close()


def inside(root: Path, name: str) -> Path:
    """The path of `name` below `root`.

    Raises IntegrityError when the name or a symbolic link leads out of `root`.
    """
    if not name or os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise IntegrityError(f"{root}: the file name {name!r} leaves the directory")
    path = root / name
    try:
        real = os.path.realpath(path, strict=True)
    except FileNotFoundError:
        real = os.path.realpath(path)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be followed ({error.strerror})") from error
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise IntegrityError(f"{path}: a symbolic link leads out of {root}")
    return path


@contextmanager
def locked(target: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the writers' lock of `target` (a file beside it); `waiting` is told when another process has it.

    The kernel drops the lock with the process, so a killed writer never blocks the next one. What such a one left
    between two renames is put right as soon as the lock is held.
    """
    lock = _beside(target, "lock")
    held: list[int] = []
    try:
        with environment(f"locking {target}"):
            lock.parent.mkdir(parents=True, exist_ok=True)
            _lock(lock, held, lambda: waiting(f"another process is writing {target}; waiting for it"))
        with environment(f"recovering {target}"):
            recover(target)
        yield
    finally:
        # Removed while held: whoever waited on this file sees that it is no longer the lock and takes a new one. Asked
        # for once more, because a signal may have ended the wait for it.
        for descriptor in held:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_the_lock(lock, descriptor):
                    os.unlink(lock)
            os.close(descriptor)


def _lock(lock: Path, held: list[int], waiting: Callable[[], None]) -> None:
    """Hold `lock`; its descriptor is in `held` from the moment it is open, so that no signal comes between."""
    while True:
        held.append(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(held[-1], fcntl.LOCK_EX)
        if _is_the_lock(lock, held[-1]):
            return
        os.close(held.pop())


def _is_the_lock(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False


def check_exchangeable(target: Path) -> None:
    """Raise UsageError where a directory cannot be replaced as a whole, which is how bundles are written."""
    real = _real(target)
    if real.exists() and os.path.ismount(real):
        raise UsageError(f"{target} is where a file system is mounted", hint="name a directory in it")
    if Path.cwd().is_relative_to(real):
        raise UsageError(f"{target} is the directory this runs in", hint="run it from another, or name one in it")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends without an error.

    Call it with the lock of `target` held: what earlier, killed writers left staged is removed first.
    """
    place = _beside(target, "staged-")
    with environment(f"writing {target}"):
        for leftover in place.parent.glob(f"{glob.escape(place.name)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=place.name, dir=place.parent))
    try:
        with environment(f"writing {target}"):
            stage.chmod(0o777 & ~_umask())
            yield stage
            _sync(stage)
            _take_place(stage, _real(target))
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """Another name for a file that is never changed in place; a copy where the file system has no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recover(target: Path) -> None:
    """Finish an exchange by two renames that a kill cut in half: put the old directory back if the new is not there."""
    old = _beside(target, "old")
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.rename(old, _real(target))


def moved_aside(target: Path) -> bool:
    """Whether a kill in the middle of an exchange left `target` under its other name."""
    return not target.exists() and _beside(target, "old").exists()


def _real(target: Path) -> Path:
    """Where a symbolic link leads: what it points to is replaced, not the link."""
    return Path(os.path.realpath(target))


def _beside(target: Path, role: str) -> Path:
    real = _real(target)
    return real.parent / f".{real.name}.{role}"


def _take_place(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
    elif not _exchange(stage, target):
        os.rename(target, _beside(target, "old"))
        os.rename(stage, target)
        shutil.rmtree(_beside(target, "old"), ignore_errors=True)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where kernel, C library or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(directory: Path) -> None:
    """Make a directory's entries durable; the files in it are synced by whoever wrote them."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask, read without a moment in which it is another (Linux 4.7 and newer)."""
    with suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
