"""Evaluation preprocessing: resize the shorter side, centre crop, scale to 0..1, normalise.

The same steps and the same rounding as timm's evaluation transform (`scale_size = floor(image_size / crop_pct)`, then
torchvision's Resize and CenterCrop on Pillow images), so accuracy carries over. Like them it does not turn images by
their EXIF tag.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hydradeploy.errors import InputError
from hydradeploy.spec import Interpolation, Preprocessing, Spec

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the image files that are looked for, in small letters; any that Pillow reads can be opened by name."""

RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {1: "L", 3: "RGB"}


def load_image(path: Path, spec: Spec) -> NDArray[np.uint8]:
    """One image file, resized and cropped: (image_size, image_size, channels).

    Raises InputError for what is not there, not an image, truncated, or for a supernet of neither 1 nor 3 channels.
    """
    return prepare(open_image(path), spec, str(path))


def open_image(path: Path) -> Image.Image:
    """One image file, decoded; raises InputError for what is not there, not an image or truncated."""
    return _decoded(path, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The bytes of one image file, decoded; raises InputError, with its name, for no image and a truncated one."""
    return _decoded(io.BytesIO(data), name)


def _decoded(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with _FILTERS.set(), Image.open(source) as file:
            # A PGM of 16 bits, which Pillow scales to all of them and opens with 32.
            if file.mode == "I" and file.format == "PPM":
                return file.convert("I;16")
            # By way of RGBA, a palette's transparent colours keep their colour; Pillow warns of the direct way. With 16
            # bits, all above 255 would be white.
            if "transparency" in file.info and not file.mode.startswith("I;16"):
                return file.convert("RGBA")
            return file.copy()
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such image") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that Pillow can read") from error
    except MemoryError:
        raise
    # Pillow's decoders raise whatever damaged bytes lead them to: struct.error, zlib.error, IndexError and more.
    except Exception as error:
        raise InputError(f"{name}: cannot be read as an image ({error})") from error


class _Filters:
    """Warnings of odd metadata unheard, and that of an image that unpacks to gigabytes an error, while anyone reads.

    The filters belong to the process: the first thread to come sets them, and the last to go puts them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._kept = warnings.catch_warnings()

    @contextmanager
    def set(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._kept = warnings.catch_warnings()
                self._kept.__enter__()
                warnings.simplefilter("ignore")
                # Pillow only warns of it; here it is refused.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._kept.__exit__(None, None, None)


_FILTERS = _Filters()


def _renew_filters() -> None:
    """In a forked process, where the lock may be held by a thread that is not there."""
    global _FILTERS
    _FILTERS = _Filters()


os.register_at_fork(after_in_child=_renew_filters)


def prepare(image: Image.Image, spec: Spec, name: str) -> NDArray[np.uint8]:
    """A decoded image, resized and cropped: (image_size, image_size, channels).

    Raises InputError, with the image's name, for one too thin to resize and for a supernet of neither 1 nor 3 channels.
    """
    converted = in_channels(image, spec.geometry.channels, name)
    try:
        return crop(converted, spec.geometry.image_size, spec.preprocessing)
    except ValueError as error:
        raise InputError(f"{name}: cannot be prepared ({error})") from error


def in_channels(image: Image.Image, channels: int, name: str) -> Image.Image:
    """A decoded image in grey (1) or RGB (3).

    Raises InputError, with the image's name, for another number of channels and for an image that cannot be converted.
    """
    if channels not in _MODES:
        raise InputError(f"{name}: images have 1 or 3 channels, this supernet wants {channels}")
    try:
        return _in_bytes(image, name).convert(_MODES[channels])
    except ValueError as error:
        raise InputError(f"{name}: cannot be prepared ({error})") from error


def _in_bytes(image: Image.Image, name: str) -> Image.Image:
    """16 bits a pixel scaled to 8, which Pillow would cut off; raises InputError where pixels have no known range."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: has pixels of 32 bits, whose range is not known", hint="save it with 8 or 16 bits")
    return image


def crop(image: Image.Image, size: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side to floor(size / crop_pct) and cut the centre: (size, size, channels).

    Raises ValueError where that makes more pixels than Pillow takes for a decompression bomb.
    """
    shorter = math.floor(size / preprocessing.crop_pct)
    width, height = image.size
    scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    if scaled[0] * scaled[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{width}x{height} pixels are so thin that they would be resized to {scaled[0]}x{scaled[1]}")
    if scaled != image.size:
        image = image.resize(scaled, RESAMPLING[preprocessing.interpolation])
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return pixels_of(image.crop((left, top, left + size, top + size)))


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """A grey or RGB image's pixels (height, width, channels)."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def normalise(images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """uint8 (n, s, s, channels) in 0..255 to float32 (n, channels, s, s) of the network's scale, contiguous."""
    scale, shift = _scale_and_shift(preprocessing)
    planes = images.transpose(0, 3, 1, 2)
    scaled = np.empty(planes.shape, np.float32)
    # Planes first, then in place: a twentieth of what whole arrays with the channels last take.
    scaled[...] = planes
    scaled *= scale
    scaled -= shift
    return scaled


@lru_cache
def _scale_and_shift(preprocessing: Preprocessing) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel (channels, 1, 1)."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.float32(1) / (np.float32(255) * std), mean / std
