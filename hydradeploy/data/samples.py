"""A handful of images to check artifacts with: from a folder, from an .npz file, or made from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hydradeploy.data.preprocess import load_image
from hydradeploy.errors import InputError, UsageError
from hydradeploy.spec import Spec

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    return Samples(np.clip(noisy, 0, 255).astype(np.uint8), f"synthetic, seed {seed}")


def read(source: Path, spec: Spec, count: int) -> Samples:
    """Up to `count` images spread evenly over a folder (searched through) or an .npz file's `images` (n, s, s, c).

    Raises UsageError when `source` is not there, InputError for an empty one and for images that do not fit.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise InputError(f"{source}: no image in it ({', '.join(SUFFIXES)})")
        images = np.stack([load_image(files[i], spec) for i in _spread(len(files), count)])
        return Samples(images, source.name)
    if not source.is_file():
        raise UsageError(f"{source}: no such file or folder", hint="--data takes a folder of images or an .npz file")
    images = _images(source, spec)
    return Samples(images[_spread(len(images), count)], source.name)


def _images(path: Path, spec: Spec) -> NDArray[np.uint8]:
    g = spec.geometry
    expected = f"(n, {g.image_size}, {g.image_size}, {g.channels})"
    try:
        # Opened here: np.load leaves a file it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = np.asarray(arrays["images"])
    except KeyError as error:
        raise InputError(f"{path}: holds no array `images`, expected uint8 {expected}") from error
    except MemoryError:
        raise
    # A damaged archive raises whatever its bytes lead zipfile, zlib and numpy to.
    except Exception as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (g.image_size, g.image_size, g.channels):
        raise InputError(f"{path}: `images` is {images.dtype} {images.shape}, expected uint8 {expected}")
    if not len(images):
        raise InputError(f"{path}: `images` is empty")
    return images


def _spread(total: int, count: int) -> list[int]:
    """`count` indices evenly over `total`, so that a folder sorted by class gives many classes."""
    count = min(total, count)
    return [i * total // count for i in range(count)]
