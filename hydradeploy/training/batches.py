"""Which images a step sees and how they come: from memory where they fit and are not cropped, else read as needed.

Every draw comes from the seed with the epoch and the image, or the step: neither the number of readers nor where a
run was stopped changes what a step sees.
"""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from hydradeploy.data.augment import Augmentation, augmented, erase
from hydradeploy.data.datasets import Dataset
from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import InputError
from hydradeploy.processes import die_with
from hydradeploy.spec import Spec
from hydradeploy.training.ranks import told
from hydradeploy.training.recipe import Recipe

_ORDER, _SHIFT, _IMAGE = 1, 2, 4  # streams of random numbers; 3 is that of the head counts
_IN_MEMORY = 1 << 29
_BATCH = 256
_MOST_READERS = 8
# Long enough for a step to end and the state to be saved.
_GRACE_S = 30


Bad = tuple[tuple[int, str], ...]
"""What could not be read: index and reason."""


@dataclass(frozen=True)
class Batch:
    """Normalised images (n, channels, s, s), labels (n,), and what could not be read."""

    images: Tensor
    labels: Tensor
    bad: Bad = ()

    def pin_memory(self) -> Batch:
        """In memory that the GPU copies from beside what the processor does; torch asks for it by this name."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


# Closed when it is no longer read, which ends those that read for it.
Batches = Generator[Batch, None, None]


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process takes, in `parts` pieces one after the other."""

    rank: int = 0
    world: int = 1
    parts: int = 1

    def pieces(self, chosen: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """This process's pieces of the places 0 .. n - 1 of a batch, or of what lies there."""
        pieces = np.array_split(chosen, self.world * self.parts)
        return pieces[self.rank * self.parts : (self.rank + 1) * self.parts]


@dataclass(frozen=True)
class Order:
    """The order in which `count` images come, `batch_size` a step, every epoch another; an incomplete batch is left."""

    count: int
    batch_size: int
    seed: int
    _shuffled: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.count // self.batch_size

    def of(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a step and the images it sees."""
        epoch, place = divmod(step, self.steps)
        if epoch not in self._shuffled:
            self._shuffled.clear()
            self._shuffled[epoch] = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.count)
        return epoch, self._shuffled[epoch][place * self.batch_size : (place + 1) * self.batch_size]


class Source(Protocol):
    """Images to train on or to test with."""

    @property
    def sha256(self) -> str:
        """Tells whether a run that goes on sees the same images."""

    def steps(self, order: Order, first: int, last: int, share: Share) -> Batches:
        """One process's batches of the steps first .. last - 1, in their pieces, varied as the recipe says."""

    def plainly(self, places: Sequence[int]) -> Iterator[Batch]:
        """The images at those places as evaluation sees them; raises InputError for one that cannot be read."""

    def __len__(self) -> int:
        """The number of images."""


def readers() -> int:
    """How many processes that read images each of this machine's training processes has by default."""
    here = told("LOCAL_WORLD_SIZE", 1)
    return max(1, min(_MOST_READERS, len(os.sched_getaffinity(0)) // here))


def source(dataset: Dataset, spec: Spec, recipe: Recipe, workers: int, bad_images: int = 0) -> Source:
    """The images of a data set: in memory where that is small and the recipe takes whole images.

    In training an image that cannot be read is the next one that can; after more than `bad_images` in a row none is
    looked for, and black stands there.
    """
    bytes_ = len(dataset) * spec.geometry.image_size**2 * spec.geometry.channels
    if bytes_ <= _IN_MEMORY and recipe.augment == Augmentation(
        shift=recipe.augment.shift, mixup=recipe.augment.mixup, cutmix=recipe.augment.cutmix
    ):
        return InMemory(dataset, spec, recipe, bad_images)
    return Streamed(dataset, spec, recipe, workers, bad_images)


_Read = TypeVar("_Read")


def _first_good(read: Callable[[int], _Read], index: int, count: int, bad_images: int) -> tuple[_Read | None, int, Bad]:
    """What `read` gives of the first of `count` images, from `index` on and round, that can be read; which one it is;
    and those before it. None where more than `bad_images` come first: looking on for each image of a set that is gone
    altogether would take hours."""
    bad: list[tuple[int, str]] = []
    while len(bad) <= min(bad_images, count - 1):
        place = (index + len(bad)) % count
        try:
            return read(place), place, tuple(bad)
        except InputError as error:
            bad.append((place, error.message))
    return None, index, tuple(bad)


class InMemory:
    """All images in memory, as uint8 (n, s, s, channels)."""

    def __init__(self, dataset: Dataset, spec: Spec, recipe: Recipe, bad_images: int = 0) -> None:
        g, count = spec.geometry, len(dataset)
        self._spec, self._recipe = spec, recipe
        self._pixels = np.zeros((count, g.image_size, g.image_size, g.channels), np.uint8)
        self._labels = dataset.labels.copy()
        bad: dict[int, str] = {}
        for i in range(count):
            pixels, found, before = _first_good(lambda place: dataset.pixels(place, spec), i, count, bad_images)
            bad |= before
            if pixels is None:
                break
            self._pixels[i], self._labels[i] = pixels, dataset.labels[found]
        self._bad = tuple(bad.items())

    @cached_property
    def sha256(self) -> str:
        """See Source."""
        digest = hashlib.sha256(self._pixels.data)
        digest.update(self._labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def steps(self, order: Order, first: int, last: int, share: Share) -> Batches:
        """See Source."""
        most = round(self._recipe.augment.shift * self._pixels.shape[1])
        bad = self._bad
        for step in range(first, last):
            _, chosen = order.of(step)
            moves = _moves(most, len(chosen), self._recipe.seed, step)
            for piece in share.pieces(np.arange(len(chosen))):
                pixels = _moved(self._pixels[chosen[piece]], most, moves[piece])
                yield replace(self._batch(pixels, chosen[piece]), bad=bad)
                bad = ()

    def plainly(self, places: Sequence[int]) -> Iterator[Batch]:
        """See Source."""
        for _, reason in self._bad:
            raise InputError(reason)
        for start in range(0, len(places), _BATCH):
            chosen = np.asarray(places[start : start + _BATCH], np.int64)
            yield self._batch(self._pixels[chosen], chosen)

    def _batch(self, pixels: NDArray[np.uint8], chosen: NDArray[np.int64]) -> Batch:
        images = torch.from_numpy(normalise(pixels, self._spec.preprocessing))
        return Batch(images, torch.from_numpy(self._labels[chosen]))


class Streamed:
    """Images read and varied by worker processes as they are needed."""

    def __init__(self, dataset: Dataset, spec: Spec, recipe: Recipe, workers: int, bad_images: int = 0) -> None:
        self._dataset, self._spec, self._recipe, self._workers = dataset, spec, recipe, workers
        self._bad_images = bad_images

    @cached_property
    def sha256(self) -> str:
        """See Source."""
        labels = self._dataset.labels.astype("<i8").tobytes()
        return hashlib.sha256(labels + self._dataset.identity()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def steps(self, order: Order, first: int, last: int, share: Share) -> Batches:
        """See Source."""
        return self._read(_Keys(order, first, last, share), self._recipe)

    def plainly(self, places: Sequence[int]) -> Iterator[Batch]:
        """See Source."""
        keys = [[(0, int(i)) for i in places[start : start + _BATCH]] for start in range(0, len(places), _BATCH)]
        for batch in self._read(keys, None):
            for _, reason in batch.bad:
                raise InputError(reason)
            yield batch

    def _read(self, keys: _Keys | list[list[_Key]], recipe: Recipe | None) -> Batches:
        reading = _Reading(self._dataset, self._spec, recipe, self._bad_images)
        # More workers than cores are what was asked for, and no reason for a warning of torch's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loader: DataLoader[Any] = DataLoader(
                reading,
                batch_sampler=keys,
                num_workers=self._workers,
                collate_fn=_collated,
                worker_init_fn=partial(_quiet, os.getpid()),
                pin_memory=torch.cuda.is_available(),
                # A reader is a closure, which only a forked process has.
                multiprocessing_context="fork" if self._workers else None,
            )
            batches = iter(loader)
        yield from batches


_Key = tuple[int, int]  # epoch and image
_Item = tuple[NDArray[np.float32], int, Bad]


@dataclass(frozen=True)
class _Keys:
    """The keys of each piece of each step, one list after the other."""

    order: Order
    first: int
    last: int
    share: Share

    def __iter__(self) -> Iterator[list[_Key]]:
        for step in range(self.first, self.last):
            epoch, chosen = self.order.of(step)
            for piece in self.share.pieces(chosen):
                yield [(epoch, int(i)) for i in piece]


class _Reading(TorchDataset[_Item]):
    """What a worker does for a key; without a recipe, nothing is put in the place of an image that cannot be read."""

    def __init__(self, dataset: Dataset, spec: Spec, recipe: Recipe | None, bad_images: int) -> None:
        self._dataset, self._spec, self._recipe = dataset, spec, recipe
        self._bad_images = 0 if recipe is None else bad_images

    def __getitem__(self, key: _Key) -> _Item:
        """An error that crosses to another process loses its words, so it travels as a value."""
        epoch, index = key
        image, found, bad = _first_good(partial(self._image, epoch), index, len(self._dataset), self._bad_images)
        if image is None:
            g = self._spec.geometry
            image = np.zeros((g.channels, g.image_size, g.image_size), np.float32)
        return image, int(self._dataset.labels[found]), bad

    def _image(self, epoch: int, index: int) -> NDArray[np.float32]:
        if self._recipe is None:
            pixels = self._dataset.pixels(index, self._spec)
            return normalise(pixels[None], self._spec.preprocessing).squeeze(0)
        random = np.random.default_rng([self._recipe.seed, _IMAGE, epoch, index])
        where = self._dataset.where(index)
        pixels = augmented(self._dataset.read(index), self._spec, self._recipe.augment, random, where)
        image = normalise(pixels[None], self._spec.preprocessing).squeeze(0)
        erase(image, self._recipe.augment, random)
        return image


def _collated(items: list[_Item]) -> Batch:
    images, labels, bad = zip(*items, strict=True)
    return Batch(
        torch.from_numpy(np.stack(images)), torch.tensor(labels), tuple(entry for entries in bad for entry in entries)
    )


def _quiet(parent: int, worker: int) -> None:
    """Signals that end a run often go to all its processes; its own answer to them ends the workers.

    Where it has none, because it is at its end already, SIGTERM is torch's way to be rid of them. They do not outlive a
    run that is killed, whose lock they have too.
    """
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))


@lru_cache(1)
def _moves(most: int, count: int, seed: int, step: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, _SHIFT, step]).integers(0, 2 * most + 1, (count, 2))


def _moved(pixels: NDArray[np.uint8], most: int, moves: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Each image moved by up to `most` pixels in both directions, the border repeated."""
    if most == 0:
        return pixels
    size = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    return np.stack([padded[i, y : y + size, x : x + size] for i, (y, x) in enumerate(moves)])
