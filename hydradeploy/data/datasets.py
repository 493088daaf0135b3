"""Labelled images: scikit-learn's digits, generated glyphs, image folders, shards, .npz files.

digits            1,797 scans of handwritten digits, 8 x 8 pixels, grey; in the `train` extra
glyphs            48,600 generated images of printed characters in 36 classes, 24 x 24 pixels, grey, drawn in the fonts
                  of matplotlib; in the `train` extra
FOLDER            one folder per class, below FOLDER/train, FOLDER/val, FOLDER/test or in FOLDER itself; or the images
                  of ImageNet's validation without folders, with Kaggle's LOC_val_solution.csv beside or above them
FOLDER            WebDataset shards: FOLDER/train-0000.tar, FOLDER/imagenet1k-validation-00.tar, FOLDER/train/0000.tar
                  and the like (hydradeploy.data.shards)
FILE.npz          images uint8 (n, h, w) or (n, h, w, channels), labels (n,), optional class_names; for several
                  splits train_images, train_labels and so on
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hydradeploy.data import glyphs, shards
from hydradeploy.data.preprocess import SUFFIXES as SUFFIXES
from hydradeploy.data.preprocess import open_image, prepare
from hydradeploy.errors import InputError, MissingError, UsageError, environment
from hydradeploy.files import sha256_bytes
from hydradeploy.spec import Spec

BUILT_IN = ("digits", "glyphs")
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SOLUTION = "LOC_val_solution.csv"
"""Kaggle's table of ImageNet's validation labels, columns ImageId and PredictionString."""

_LABELS = ("labels", *(f"{split}_labels" for split in SPLITS))

# Of 1,797 digits; the test part is a fifth, large enough to tell 96 % from 93 %.
_DIGITS_SPLITS: Mapping[Split, tuple[int, int]] = {"train": (0, 1257), "val": (1257, 1437), "test": (1437, 1797)}


@dataclass(frozen=True)
class Dataset:
    """Images with labels 0 .. len(class_names) - 1.

    `read(i)` gives image i as it is stored, decoded, and raises InputError that says where it is from if it is damaged.
    It may be called by several threads, and by processes forked since. `places(i)` is where image i is from; None where
    it has no place of its own. `identity()` differs where the images or their order do, wherever the data set lies and
    as far as can be told without reading images from disk.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    read: Callable[[int], Image.Image]
    places: Callable[[int], str] | None = None
    identity: Callable[[], bytes] = bytes

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """What errors call image `index`: its file, its shard and key, or its number."""
        return f"{self.name}: image {index}" if self.places is None else self.places(index)

    def pixels(self, index: int, spec: Spec) -> NDArray[np.uint8]:
        """Image `index`, resized and cropped as the spec says: (image_size, image_size, channels)."""
        return prepare(self.read(index), spec, self.where(index))

    def labels_for(self, spec: Spec) -> NDArray[np.int64]:
        """The labels as the supernet numbers its classes: by name where both have the same names, each once, else by
        position.

        Raises InputError where the number of classes differs.
        """
        if len(self.class_names) != spec.geometry.classes:
            raise InputError(
                f"{self.name} has {len(self.class_names)} classes, the supernet {spec.geometry.classes}",
                hint="evaluate on the classes it was trained for",
            )
        names = spec.class_names
        # ImageNet's classes in words have two cranes and two maillots.
        if names is None or set(names) != set(self.class_names) or len(set(names)) < len(names):
            return self.labels
        places = np.array([names.index(name) for name in self.class_names])
        return np.asarray(places[self.labels])


def open_dataset(source: str, split: Split) -> Dataset:
    """Open one split of a data set.

    A folder or file without splits serves as `test`, and so does the `val` of one without that split. Raises UsageError
    when there is no such thing, InputError when it holds no usable images and labels, MissingError when the package
    that brings it is not installed.
    """
    if source == "digits":
        return _digits(split)
    if source == "glyphs":
        return _glyphs(split)
    path = path_of(source)
    if path.is_dir():
        found = shards.find(path)
        if (serving := _serving(split, found, path)) is not None:
            return _sharded(path, split, found, serving)
        return _folder(path, split)
    if path.is_file():
        return _npz(path, split)
    raise UsageError(
        f"{source}: no such data set",
        hint=f"{', '.join(BUILT_IN)}, a folder with a folder per class or with shards, or an .npz file",
    )


def path_of(source: str | Path) -> Path:
    """Where a data set lies; raises UsageError for an empty name, which would be the directory that this runs in."""
    if not str(source):
        raise UsageError("'' is no data set", hint="--data . is this directory; a variable of the shell may be empty")
    return Path(source)


def name_of(path: Path) -> str:
    """What records call a file or folder: its name, also where `path` is `.`; bytes that are no text are replaced."""
    return os.path.basename(os.fsencode(os.path.abspath(path))).decode(errors="replace")


def spread(total: int, count: int) -> NDArray[np.int64]:
    """`count` indices evenly over `total`, all of them at most: a set sorted by class gives many classes."""
    count = min(total, count)
    return np.arange(count, dtype=np.int64) * total // count


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, in a fixed order."""
    return [Path(name) for name in _image_names(folder)]


def _image_names(folder: str | Path) -> Iterator[str]:
    """As paths are sorted: by the names of folders and files on the way, each by itself.

    What an entry is tells the directory itself, so that no file is asked for; links to folders are not followed. Hidden
    ones are what macOS packs beside each file, and copies that notebooks and viewers keep.
    """
    with environment(f"listing {folder}"), os.scandir(folder) as entries:
        shown = (entry for entry in entries if not entry.name.startswith("."))
        found = sorted(shown, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _image_names(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
            yield entry.path


def _digits(split: Split) -> Dataset:
    if find_spec("sklearn") is None:
        raise MissingError("digits come with scikit-learn, which is not installed", hint="pip install scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    first, last = _DIGITS_SPLITS[split]
    order = np.random.default_rng(0).permutation(len(digits.target))[first:last]
    images = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    labels = np.asarray(digits.target[order], np.int64)
    return Dataset("digits", split, tuple("0123456789"), labels, lambda i: Image.fromarray(images[i]))


def _glyphs(split: Split) -> Dataset:
    fonts = glyphs.fonts(split)
    return Dataset("glyphs", split, glyphs.CLASSES, glyphs.labels(split), lambda i: glyphs.draw(split, fonts, i))


def _folder(path: Path, split: Split) -> Dataset:
    root = _split_folder(path, split)
    with environment(f"listing {root}"), os.scandir(root) as entries:
        classes = sorted(root / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        return _flat(path, root, split)
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        before = len(files)
        files += _image_names(folder)
        if len(files) == before:
            raise InputError(f"{folder}: no image in this class folder ({', '.join(SUFFIXES)})")
        labels += [label] * (len(files) - before)
    return _of_files(path, root, split, tuple(map(name_of, classes)), labels, files)


def _of_files(
    path: Path, root: Path, split: Split, names: tuple[str, ...], labels: list[int], files: list[str]
) -> Dataset:
    def read(index: int) -> Image.Image:
        return open_image(Path(files[index]))

    def identity() -> bytes:
        above = len(str(root / "x")) - 1
        return b"\0".join(os.fsencode(file[above:]) for file in files)

    return Dataset(name_of(path), split, names, np.array(labels, np.int64), read, files.__getitem__, identity)


def _flat(path: Path, root: Path, split: Split) -> Dataset:
    """Images without class folders, labelled by Kaggle's table in `root` or above it."""
    above = root.absolute().parents[:4]  # Kaggle's images are in ILSVRC/Data/CLS-LOC/val
    table = next((place / SOLUTION for place in (root, *above) if (place / SOLUTION).is_file()), None)
    files = list(_image_names(root))
    if table is None or not files:
        raise InputError(
            f"{root}: no class folders in it", hint=f"one folder of images per class, or ImageNet's {SOLUTION} beside"
        )
    classes = _solution(table)
    names = tuple(sorted(set(classes.values())))
    numbers = {name: number for number, name in enumerate(names)}
    labels = []
    for file in files:
        name = classes.get(Path(file).stem)
        if name is None:
            raise InputError(f"{file}: {table} has no label for it", hint="it labels the images of val, not of test")
        labels.append(numbers[name])
    return _of_files(path, root, split, names, labels, files)


def _solution(table: Path) -> dict[str, str]:
    """The class of each image by the name of its file without the suffix."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            # After the class come the corners of boxes and, for several, more of the same class.
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError, IndexError) as error:
        raise InputError(
            f"{table}: cannot be read as a table of labels ({error!r})",
            hint="its columns are ImageId and PredictionString, a class first",
        ) from error


def _serving(split: Split, found: Mapping[Split, tuple[Path, ...]], path: Path) -> Split | None:
    """The split whose shards serve as `split`; None where there are none, or a folder of images does."""
    if split in found:
        return split
    if not found or (path / split).is_dir():
        return None
    if split == "test" and "val" in found:  # ImageNet's labelled test images are called so
        return "val"
    raise InputError(f"{path}: no shards of the split {split}", hint=f"the folder has {', '.join(found)}")


def _sharded(path: Path, split: Split, found: Mapping[Split, tuple[Path, ...]], serving: Split) -> Dataset:
    opened = shards.Shards(found[serving])
    names = shards.class_names(found[serving][0].parent)
    if names is None:
        # Numbers, as many as any of the splits has: a small one may lack the last classes.
        others = (shards.Shards(found[other]) for other in found if other != serving)
        most = max(int(one.labels.max()) for one in (opened, *others))
        names = tuple(map(str, range(most + 1)))
    beyond = np.flatnonzero(opened.labels >= len(names))
    if len(beyond):
        first = int(beyond[0])
        raise InputError(
            f"{opened.where(first)}: its label is {opened.labels[first]}, but there are {len(names)} classes",
            hint=f"see {' or '.join(shards.CLASS_FILES)} beside the shards",
        )
    return Dataset(name_of(path), split, names, opened.labels, opened.read, opened.where, opened.identity)


def _split_folder(path: Path, split: Split) -> Path:
    if (path / split).is_dir():
        return path / split
    others = [other for other in SPLITS if (path / other).is_dir()]
    if split == "test" and "val" in others:  # ImageNet's labelled test images are called so
        return path / "val"
    if others or split != "test":
        raise InputError(f"{path / split}: no such split", hint=f"the folder has {', '.join(others) or 'no splits'}")
    return path


def _npz(path: Path, split: Split) -> Dataset:
    arrays = read_arrays(path)
    serving = "val" if split == "test" and not arrays.keys() & {"images", "test_images"} else split
    prefix = f"{serving}_" if f"{serving}_images" in arrays else ""
    if not prefix and split != "test":
        raise InputError(f"{path}: holds no array `{split}_images`", hint=f"it has {', '.join(arrays) or 'nothing'}")
    images, labels = (_array(path, arrays, prefix + name) for name in ("images", "labels"))
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3))
        or 0 in images.shape[1:]
    ):
        raise InputError(
            f"{path}: `{prefix}images` is {images.dtype} {images.shape}, expected uint8 (n, h, w[, 1 or 3])"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
        raise InputError(
            f"{path}: `{prefix}labels` is {labels.dtype} {labels.shape}, "
            f"expected integers ({len(images)},), at least one"
        )
    class_names = _class_names(path, arrays)
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise InputError(
            f"{path}: `{prefix}labels` must be 0 to {len(class_names) - 1}, found {labels.min()} to {labels.max()}"
        )
    squeezed = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    return Dataset(
        name_of(path),
        split,
        class_names,
        labels.astype(np.int64),
        lambda i: Image.fromarray(squeezed[i]),
        identity=lambda: sha256_bytes(np.ascontiguousarray(squeezed).data).encode(),
    )


def _class_names(path: Path, arrays: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """Those given, else numbers, as many as any of the splits has: a small one may lack the last classes."""
    names = arrays.get("class_names")
    if names is None:
        labels = [
            array for name, array in arrays.items() if name in _LABELS and array.dtype.kind in "iu" and array.size
        ]
        most = max(int(array.max()) for array in labels)
        return tuple(map(str, range(min(most, shards.MOST_CLASSES - 1) + 1)))
    try:
        if names.ndim != 1:
            raise ValueError(f"its shape is {names.shape}, expected (n,)")
        return tuple(map(str, names.astype(str)))
    except ValueError as error:  # bytes that are no text too
        raise InputError(f"{path}: `class_names` are no names ({error})") from error


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file, nothing unpickled; raises InputError where it cannot be read."""
    try:
        # Not np.load, which takes whatever is no archive for a pickle and advises to run it.
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except MemoryError:
        raise
    # A damaged archive raises whatever its bytes lead zipfile, zlib and numpy to.
    except Exception as error:
        hint = "numpy.savez writes one; images and shards are given by their folder"
        raise InputError(f"{path}: not a readable .npz file ({error})", hint=hint) from error


def _array(path: Path, arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in arrays:
        raise InputError(f"{path}: holds no array `{name}`", hint=f"it has {', '.join(arrays) or 'nothing'}")
    return arrays[name]
