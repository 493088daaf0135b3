"""What happens to an image before the supernet is trained on it, seeded by whoever asks.

The order and the parameters are those of timm 1.0.7's training transform (timm/data/transforms_factory.py): crop, flip,
RandAugment, then, on the normalised image, random erasing.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from hydradeploy.data import randaugment
from hydradeploy.data.preprocess import RESAMPLING, in_channels, pixels_of, prepare
from hydradeploy.spec import Record, Spec

_ATTEMPTS = 10  # at a box that fits, for crops and for erasing
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


class Augmentation(Record, frozen=True, kw_only=True):
    """How training images are varied; by default not at all.

    `shift` is the largest random translation as a fraction of the image. `crop_scale` is the range of the area of a
    random resized crop (None: the crop that evaluation takes), `crop_ratio` that of its width over its height. `flip`
    is the probability of a horizontal flip. `randaugment` is a policy in timm's words, such as rand-m9-mstd0.5-inc1.
    `erasing` is the probability that a rectangle is replaced by noise (timm's mode `pixel`). `mixup` and `cutmix` are
    the parameters of their Beta distributions; 0 turns either off, and with both on each has half of the batches.

    Raises ValueError for a value that none of this could mean, and for a shift of random crops, which have none.
    """

    shift: float = 0.0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    randaugment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 0.5:
            raise ValueError(f"shift must be at least 0 and below 0.5, got {self.shift}")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must ascend and be above 0 and at most 1, got {self.crop_scale}")
        if self.crop_scale is not None and self.shift:
            raise ValueError(f"shift must be 0 with a crop_scale, whose crops are anywhere already, got {self.shift}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise ValueError(f"crop_ratio must ascend, be above 0 and finite, got {self.crop_ratio}")
        for field in ("flip", "erasing"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is a probability, 0 to 1, got {getattr(self, field)}")
        for field in ("mixup", "cutmix"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be at least 0 and finite, got {getattr(self, field)}")
        if self.randaugment is not None:
            try:
                randaugment.parse(self.randaugment)
            except ValueError as error:
                raise ValueError(f"randaugment: {error}") from error


def augmented(image: Image.Image, spec: Spec, how: Augmentation, random: Generator, where: str) -> NDArray[np.uint8]:
    """A decoded image as training shows it: (image_size, image_size, channels).

    Nothing but `random` decides what is drawn. Raises InputError as `prepare` does, saying `where` the image is from.
    """
    size = spec.geometry.image_size
    if how.crop_scale is None:
        shown = _image(_shifted(prepare(image, spec, where), how.shift, random))
    else:
        converted = in_channels(image, spec.geometry.channels, where)
        box = crop_box(converted.size, how.crop_scale, how.crop_ratio, random)
        # Cropped first: the filter must not reach beyond the crop.
        shown = converted.crop(box).resize((size, size), RESAMPLING[spec.preprocessing.interpolation])
    if how.flip and random.random() < how.flip:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how.randaugment is not None:
        shown = randaugment.randaugment(shown, randaugment.parse(how.randaugment), _canvas(spec), random)
    return pixels_of(shown)


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], random: Generator
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop of an image of `size` (width, height), at least a pixel.

    `scale` is the range of its share of the area, uniform, and `ratio` that of its width over its height, uniform in
    its logarithm. After ten that do not fit, the largest crop in the middle whose ratio is allowed.
    """
    width, height = size
    for _ in range(_ATTEMPTS):
        across, down = _sides(width * height, scale, ratio, random)
        if 0 < across <= width and 0 < down <= height:
            top = int(random.integers(height - down, endpoint=True))
            left = int(random.integers(width - across, endpoint=True))
            return left, top, left + across, top + down
    across = min(width, max(1, round(height * ratio[1])))
    down = min(height, max(1, round(width / ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def erase(image: NDArray[np.float32], how: Augmentation, random: Generator) -> None:
    """With the probability `how.erasing`, put standard normal noise into a box of a normalised image (channels, s, s).

    In place, a box of 2 % to a third of the area, 0.3 to 3.3 times as high as wide (arXiv 1708.04896).
    """
    if random.random() >= how.erasing:
        return
    channels, height, width = image.shape
    for _ in range(_ATTEMPTS):
        down, across = _sides(width * height, _ERASED_AREA, _ERASED_RATIO, random)
        if across < width and down < height:
            top = int(random.integers(height - down, endpoint=True))
            left = int(random.integers(width - across, endpoint=True))
            noise = random.standard_normal((channels, down, across), np.float32)
            image[:, top : top + down, left : left + across] = noise
            return


def _sides(area: int, scale: tuple[float, float], ratio: tuple[float, float], random: Generator) -> tuple[int, int]:
    """Two sides of a random box, the first `ratio` times the second, in whole pixels."""
    wanted = random.uniform(*scale) * area
    aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))


def _shifted(pixels: NDArray[np.uint8], shift: float, random: Generator) -> NDArray[np.uint8]:
    """An image (s, s, channels) moved by up to `shift` of its size in both directions, the border repeated."""
    size = len(pixels)
    most = round(shift * size)
    if most == 0:
        return pixels
    padded = np.pad(pixels, ((most, most), (most, most), (0, 0)), mode="edge")
    top, left = random.integers(2 * most, size=2, endpoint=True)
    return padded[top : top + size, left : left + size]


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _canvas(spec: Spec) -> randaugment.Canvas:
    """The mean colour, and the filter of the crop where it can move images too, as timm chooses them."""
    fill = tuple(min(255, max(0, round(255 * mean))) for mean in spec.preprocessing.mean)
    wanted = RESAMPLING[spec.preprocessing.interpolation]
    # Pillow shrinks and enlarges with Lanczos's filter, but neither turns nor shears.
    return randaugment.Canvas(fill, Image.Resampling.BICUBIC if wanted is Image.Resampling.LANCZOS else wanted)
