"""A handful of images to check artifacts with: from a folder, from an .npz file, or made from a seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hydradeploy.data.datasets import (
    BUILT_IN,
    SUFFIXES,
    image_files,
    name_of,
    open_dataset,
    path_of,
    read_arrays,
    spread,
)
from hydradeploy.data.preprocess import load_image
from hydradeploy.errors import InputError, UsageError
from hydradeploy.spec import Spec

_SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Samples:
    """uint8 images (n, s, s, channels), resized and cropped, and where they come from."""

    images: NDArray[np.uint8]
    source: str


def synthetic(spec: Spec, count: int, seed: int = 0) -> Samples:
    """Smooth random images, the same for the same seed; they show that graphs agree, nothing about accuracy."""
    generator, g = np.random.default_rng(seed), spec.geometry
    coarse = generator.integers(0, 256, (count, 8, 8, g.channels), dtype=np.uint8)
    size = (g.image_size, g.image_size)
    planes = [
        [np.asarray(Image.fromarray(image[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(g.channels)]
        for image in coarse
    ]
    smooth = np.moveaxis(np.array(planes), 1, -1).astype(np.int16)
    noisy = smooth + generator.integers(-16, 17, smooth.shape, dtype=np.int16)
    return Samples(np.clip(noisy, 0, 255).astype(np.uint8), f"{_SYNTHETIC}, seed {seed}")


def is_synthetic(source: str) -> bool:
    """Whether samples of that source are made from a seed."""
    return re.fullmatch(rf"{_SYNTHETIC}, seed \d+", source) is not None


def read(source: str | Path, spec: Spec, count: int) -> Samples:
    """Up to `count` images spread evenly over a data set, a folder (searched through) or an .npz file's `images`.

    Of splits `val` is taken, for nothing is to be calibrated on what will be tested with. Labels are not needed, but
    for shards and for an .npz file of splits; other .npz files have images (n, s, s, channels) of the network's size.
    Raises UsageError when `source` is not there, InputError for an empty one and for images that do not fit.
    """
    path = path_of(source)
    if source in BUILT_IN:
        return _of_dataset(str(source), str(source), spec, count)
    if path.is_dir():
        files = image_files(path / "val" if (path / "val").is_dir() else path)
        if not files and any(path.rglob("*.tar")):
            return _of_dataset(str(source), name_of(path), spec, count)
        if not files:
            raise InputError(f"{path}: no image in it ({', '.join(SUFFIXES)})")
        return Samples(np.stack([load_image(files[i], spec) for i in spread(len(files), count)]), name_of(path))
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder", hint="--data takes a folder of images or an .npz file")
    arrays = read_arrays(path)
    if "images" not in arrays and "val_images" in arrays:  # what it was trained with
        return _of_dataset(str(source), name_of(path), spec, count)
    images = _images(path, arrays, spec)
    return Samples(images[spread(len(images), count)], name_of(path))


def _of_dataset(source: str, name: str, spec: Spec, count: int) -> Samples:
    dataset = open_dataset(source, "val")
    return Samples(np.stack([dataset.pixels(int(i), spec) for i in spread(len(dataset), count)]), name)


def _images(path: Path, arrays: Mapping[str, NDArray[Any]], spec: Spec) -> NDArray[np.uint8]:
    g = spec.geometry
    expected = f"(n, {g.image_size}, {g.image_size}, {g.channels})"
    if "images" not in arrays:
        raise InputError(f"{path}: holds no array `images`, expected uint8 {expected}")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (g.image_size, g.image_size, g.channels):
        raise InputError(f"{path}: `images` is {images.dtype} {images.shape}, expected uint8 {expected}")
    if not len(images):
        raise InputError(f"{path}: `images` is empty")
    return images
