"""WebDataset shards: uncompressed tar files that are read by the number of a sample, in any order.

The members of a shard that share a name up to its first dot are one sample: an image, and its label as a number in a
text member `cls` or as `label` in a member `json`. Samples are numbered by the names of the shards and, in a shard, by
their place. Opening reads nothing but the headers and labels; where each image lies is kept in the user's cache, and a
shard that has changed since is read again.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hydradeploy.data.preprocess import SUFFIXES, decode_image
from hydradeploy.errors import InputError, environment
from hydradeploy.files import sha256_bytes, user_cache, write_atomically

if TYPE_CHECKING:
    from hydradeploy.data.datasets import Split

CLASS_FILES = ("classes.txt", "synset_words.txt")
"""Beside shards or one folder up: one class a line, in the order of the labels; of the second the first word counts."""

MOST_CLASSES = 1_000_000
"""A damaged label should not make billions of names."""

_NAMED = re.compile(r"(?:.*[-_.])?(train|validation|valid|val|test)([-_.]?\d+(?:-of-\d+)?)?\.tar")
_WORDS = re.compile(r"[a-z]+")
_SPLITS: Mapping[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_COMPRESSED = (".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tgz")
_IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES)
_FORMAT = "2"  # of the cached index
_MOST_SMALL_BYTES = 1 << 20  # of a label, a name
_MOST_OPEN = 128  # a process may have 1,024 files open, and ImageNet has as many shards
_BLOCK = 512  # of a tar file
_END = bytes(_BLOCK)


def find(folder: Path) -> dict[Split, tuple[Path, ...]]:
    """The shards of each split in a folder, by name; an empty dictionary where there are none.

    A split's shards are named after it (train-0000.tar, imagenet1k-validation-00.tar, or val.tar, where no folder may
    have been unpacked from it) or are all of those in a folder that is (train/0000.tar). Where neither is so, all of
    the folder's are the test split. A folder with folders in it holds images by class; archives beside them are what
    these were unpacked from. Raises InputError where there are compressed shards only, and where the names speak of
    several splits in another way.
    """
    found: dict[Split, tuple[Path, ...]] = {}
    here, alone = _tar_files(folder)
    for path in here:
        match = _NAMED.fullmatch(path.name)
        if match is not None and (match[2] or alone):
            split = _SPLITS[match[1]]
            found[split] = (*found.get(split, ()), path)
    for word, split in _SPLITS.items():
        if split not in found and (folder / word).is_dir():
            below, only = _tar_files(folder / word)
            if below and only:
                found[split] = below
    if found or not (here and alone):
        return found
    _check_one_split(here)
    return {"test": here}


def _check_one_split(paths: Sequence[Path]) -> None:
    """Training images must not be tested with because their shards are called train_full.tar or Train.tar."""
    of = {split: path for path in paths for word in _WORDS.findall(path.name.lower()) if (split := _SPLITS.get(word))}
    if len(of) > 1:
        raise InputError(
            f"{', '.join(map(str, of.values()))}: shards of several splits, but which are whose is not certain",
            hint="name them train-0000.tar, val-0000.tar and so on",
        )


def _tar_files(folder: Path) -> tuple[tuple[Path, ...], bool]:
    """A folder's tar files by name, and whether there is no folder beside them."""
    names: list[str] = []
    alone = True
    with environment(f"listing {folder}"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                alone = False
            elif entry.name.endswith((".tar", *_COMPRESSED)):
                names.append(entry.name)
    names.sort()
    if names and alone and not any(name.endswith(".tar") for name in names):
        raise InputError(
            f"{folder / names[0]}: a compressed shard cannot be read from its middle", hint="unpack it to a .tar"
        )
    return tuple(folder / name for name in names if name.endswith(".tar")), alone


class Shards:
    """The samples of some shards, numbered by the shards' order and their place in them.

    `labels` are (n,). Raises InputError, naming the shard and the key of the sample, for what is no uncompressed tar
    file or a truncated one, for a shard without samples and for a sample without an image or a label.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._stamps = [_stamp(path) for path in paths]
        indices = _indexed(self._paths, self._stamps)
        self._first = np.cumsum([0, *(len(index.keys) for index in indices)])
        self._places = np.concatenate([index.places for index in indices])
        self._keys = np.concatenate([index.keys for index in indices])
        self.labels: NDArray[np.int64] = np.concatenate([index.labels for index in indices])
        # Not a cached method: that would keep every data set for as long as the process runs.
        self._file = lru_cache(_MOST_OPEN)(self._opened)

    def where(self, sample: int) -> str:
        """The shard and the key of a sample."""
        key = bytes(self._keys[sample]).decode(errors="replace")
        return f"{self._paths[self._shard(sample)]}: {key}"

    def identity(self) -> bytes:
        """The samples by name, place and length; not by time, which a copy of the shards does not keep."""
        names = (os.fsencode(path.name) for path in self._paths)
        return b"\0".join((*names, *(part.tobytes() for part in (self._first, self._keys, self._places))))

    def read(self, sample: int) -> Image.Image:
        """A sample's image, decoded; by any thread, and by processes that were forked since.

        Raises InputError, naming shard and key, where it cannot be, and where the shard has changed meanwhile.
        """
        offset, length = self._places[sample].tolist()
        file = self._file(self._shard(sample))
        data = bytearray()
        try:
            while len(data) < length and (more := os.pread(file.descriptor, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise InputError(f"{self.where(sample)}: cannot be read ({error.strerror})") from error
        if len(data) < length:
            raise InputError(f"{self.where(sample)}: the shard ends in this image")
        return decode_image(bytes(data), self.where(sample))

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._first, sample, "right")) - 1

    def _opened(self, shard: int) -> _File:
        path = self._paths[shard]
        try:
            file = _File(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror})") from error
        if _stamp_of(os.fstat(file.descriptor)) != self._stamps[shard]:
            raise InputError(f"{path}: has changed since it was opened", hint="start again")
        return file


class _File:
    """A file that is closed when nobody holds it any more, though others may have replaced it in a cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The names of the classes from the file that lies beside shards or one folder up, if there is one.

    Raises InputError where it has a name twice or none.
    """
    for path in (place / name for place in (folder, folder.parent) for name in CLASS_FILES):
        if path.is_file():
            return _names(path)
    return None


def _names(path: Path) -> tuple[str, ...]:
    try:
        # Some editors put a byte order mark in front.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    names = [line.split()[0] if path.name == "synset_words.txt" else line for line in lines if line]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise InputError(
            f"{path}: {f'has the class {twice[0]!r} twice' if twice else 'holds no class'}",
            hint="one class a line, each of another name, such as ImageNet's n01440764",
        )
    return tuple(names)


@dataclass(frozen=True)
class _Index:
    """The samples of one shard: `places` (n, 2) offset and length of the image in bytes, labels (n,), keys (n,)."""

    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    keys: NDArray[np.bytes_]


_Stamp = tuple[int, int]  # size in bytes, time of the last change in nanoseconds


def _stamp(path: Path) -> _Stamp:
    try:
        return _stamp_of(path.stat())
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from error


def _stamp_of(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns


def _indexed(paths: Sequence[Path], stamps: Sequence[_Stamp]) -> list[_Index]:
    """The index of each shard, from the cache where it has not changed."""
    cache = _cache_file(paths)
    cached = _load(cache)
    known = [cached.get((path.name, *stamp)) for path, stamp in zip(paths, stamps, strict=True)]
    indices = [index or _scan(path) for index, path in zip(known, paths, strict=True)]
    if None in known or len(cached) > len(known):
        # What is kept only spares time: a disk that is full or may not be written to is no reason to stop.
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, _dumped(paths, stamps, indices))
    return indices


def _cache_file(paths: Sequence[Path]) -> Path:
    """One file for the shards of a split; what is in it says which state of them it is of."""
    kind = _NAMED.fullmatch(paths[0].name)
    named = "\n".join((_FORMAT, os.path.realpath(paths[0].parent), kind[1] if kind else ""))
    return user_cache() / "shards" / f"{sha256_bytes(os.fsencode(named))}.npz"


def _load(cache: Path) -> dict[tuple[str, int, int], _Index]:
    """What is cached, by name and stamp; nothing where it is not there or damaged."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names, stamps, counts = arrays["names"], arrays["stamps"], arrays["counts"]
            places, labels, keys = arrays["places"], arrays["labels"], arrays["keys"]
        ends = np.cumsum(counts)
        if not len(places) == len(labels) == len(keys) == ends[-1]:
            return {}
        return {
            (str(name), int(stamp[0]), int(stamp[1])): _Index(
                places[end - count : end], labels[end - count : end], keys[end - count : end]
            )
            for name, stamp, count, end in zip(names, stamps, counts, ends, strict=True)
        }
    # A damaged archive raises whatever its bytes lead zipfile and numpy to, a MemoryError for an absurd size too.
    except Exception:
        return {}


def _dumped(paths: Sequence[Path], stamps: Sequence[_Stamp], indices: Sequence[_Index]) -> bytes:
    out = io.BytesIO()
    np.savez(
        out,
        names=np.array([path.name for path in paths]),
        stamps=np.array(stamps, np.int64),
        counts=np.array([len(index.keys) for index in indices], np.int64),
        places=np.concatenate([index.places for index in indices]),
        labels=np.concatenate([index.labels for index in indices]),
        keys=np.concatenate([index.keys for index in indices]),
    )
    return out.getvalue()


@dataclass
class _Sample:
    """What was seen so far of the members of one key: offset and length in the shard."""

    key: bytes
    image: tuple[int, int] | None = None
    others: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.key.decode(errors="replace")


class _Described(msgspec.Struct):
    """All that is read of a sample's json."""

    label: int


def _scan(path: Path) -> _Index:
    """Read a shard's headers and labels."""
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    keys: list[bytes] = []
    with environment(f"reading {path}"), path.open("rb", buffering=0) as file:
        for sample in _samples(path, file.fileno()):
            if sample.image is None:
                raise InputError(f"{path}: {sample}: has no image ({', '.join(SUFFIXES)})")
            places.append(sample.image)
            labels.append(_label(path, sample, file.fileno()))
            keys.append(sample.key)
    if not keys:
        raise InputError(f"{path}: holds no sample", hint="a sample is an image and a member .cls or .json of its name")
    return _Index(np.array(places, np.int64), np.array(labels, np.int64), np.array(keys))


def _samples(path: Path, descriptor: int) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for name, *place in _members(path, descriptor):
        folder, slash, base = name.rpartition(b"/")
        stem, _, suffix = base.partition(b".")
        # Folders, what macOS packs beside each file, and WebDataset's own notes.
        if not stem or stem.startswith(b"__"):
            continue
        key = folder + slash + stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        offset, length = place
        if suffix.lower() not in _IMAGES:
            if suffix.lower() in _LABELS and suffix.lower() in sample.others:
                raise InputError(f"{path}: {sample}: has two labels (.{suffix.decode()})")
            sample.others[suffix.lower()] = (offset, length)
        elif sample.image is None:
            sample.image = (offset, length)
        else:
            raise InputError(f"{path}: {sample}: has two images")
    if sample is not None:
        yield sample


def _members(path: Path, descriptor: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and length of each file in a tar file (POSIX.1-2001 ustar and pax, GNU's long names).

    Python's tarfile takes several times as long, and a truncated or damaged file for one that ends there.
    """
    end, offset = os.fstat(descriptor).st_size, 0
    extended: dict[bytes, bytes] = {}  # what precedes a member and is of it
    while (header := os.pread(descriptor, _BLOCK, offset)) != _END:
        try:
            kind, size = header[156:157], _size(header)
            if kind not in _GIVEN:
                size = int(extended.get(b"size", size))
            data, offset = offset + _BLOCK, offset + _BLOCK + (0 if kind in _EMPTY else -(-size // _BLOCK) * _BLOCK)
            if size < 0 or offset > end or (kind in _GIVEN and size > _MOST_SMALL_BYTES):
                raise ValueError(f"{size} bytes of {header[:100]!r}")
            if kind in _GIVEN:
                extended |= _GIVEN[kind](os.pread(descriptor, size, data))
                continue
        except ValueError as error:
            where = f"truncated or damaged at byte {offset}" if offset else "not a readable tar file"
            raise InputError(f"{path}: {where}", hint="a shard is a whole tar file without compression") from error
        if kind in _FILES:
            yield extended.get(b"path") or _name(header), data, size
        extended = {}
    _check_end(path, descriptor, offset, end)


def _check_end(path: Path, descriptor: int, offset: int, end: int) -> None:
    """Raise InputError unless there are but zeros from the end of the archive to that of the file."""
    while offset < end:
        block = os.pread(descriptor, _BLOCK, offset)
        if block != _END[: len(block)]:
            raise InputError(
                f"{path}: goes on after its end, at byte {offset}",
                hint="cat does not make one shard of several; leave them apart, or join them with tar --concatenate",
            )
        offset += _BLOCK


def _size(header: bytes) -> int:
    """The bytes of a member, once the header's own sum is right; raises ValueError where it is not."""
    if len(header) < _BLOCK or sum(header) - sum(header[148:156]) + 8 * ord(" ") != _number(header[148:156]):
        raise ValueError("no header")
    return _number(header[124:136])


def _number(digits: bytes) -> int:
    """Octal digits, or GNU's binary for what has too many of them."""
    if digits[0] & 0x80:
        return int.from_bytes(digits[1:], "big")
    return int(digits.partition(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    folder = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return folder + b"/" + name if folder else name


def _records(data: bytes) -> dict[bytes, bytes]:
    """Of pax: each its length in digits, a space, name=value and a line feed."""
    found: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        name, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise ValueError(f"no record: {record!r}")
        found[name] = value
    return found


# By the kind of a member: the parser of what is said there of the next one.
_GIVEN: Mapping[bytes, Callable[[bytes], dict[bytes, bytes]]] = {
    b"x": _records,
    b"L": lambda data: {b"path": data.partition(b"\0")[0]},
    b"K": lambda data: {},  # of a link's target
    b"g": lambda data: {},  # of all members: dates and owners
}
_FILES = (b"0", b"\0", b"7")
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes


def _label(path: Path, sample: _Sample, descriptor: int) -> int:
    """From `cls`, or else from `json`."""
    for suffix, parse in _LABELS.items():
        if suffix not in sample.others:
            continue
        offset, length = sample.others[suffix]
        text = os.pread(descriptor, min(length, _MOST_SMALL_BYTES), offset)
        try:
            label = parse(text)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise InputError(f"{path}: {sample}.{suffix.decode()}: holds no label ({error})") from error
        if not 0 <= label < MOST_CLASSES:
            raise InputError(f"{path}: {sample}.{suffix.decode()}: the label {label} is none, they count from 0")
        return label
    raise InputError(f"{path}: {sample}: has no label", hint="a member .cls or .json of the image's name")


def _described(text: bytes) -> int:
    return msgspec.json.decode(text, type=_Described).label


_LABELS: Mapping[bytes, Callable[[bytes], int]] = {b"cls": int, b"json": _described}
