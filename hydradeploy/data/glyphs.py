"""Generated images of printed characters: 36 classes, 24 x 24 grey pixels, as many as a data set needs.

Digits and letters in the fonts that come with matplotlib, light on dark at various contrasts: turned, slanted, scaled
and moved, with neighbours and strokes around them, a bar or patch over them, shade and noise. No font and no random
number is shared between the splits.

Image i of a split depends on nothing but the split and i, and is drawn when it is read. Its pixels are the same in
every process, but outlines are rasterised by the FreeType inside Pillow and random numbers drawn by numpy: other
versions of them may shift grey levels.

Light on dark only: shown both, a supernet as small as the preset's stays at chance for several times as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hydradeploy.errors import MissingError

if TYPE_CHECKING:
    from hydradeploy.data.datasets import Split

# No capital O and I, which look like 0 and 1; two small letters that look like no capital stand in for them.
CLASSES = tuple("0123456789ABCDEFGHJKLMNPQRSTUVWXYZae")
SIZE = 24
"""Height and width of an image in pixels."""

PER_CLASS: Mapping[Split, int] = {"train": 1000, "val": 50, "test": 300}
"""Images of each class in each split."""

# The text fonts that matplotlib 3.9 and later bring. Left out: fonts of symbols, which have no letters or have symbols
# in their places (cmex, cmsy, STIXNonUni, DejaVu's Display fonts), and cmmi, whose digits hang below the line.
# Each split has upright and slanted, light and bold ones of the same few families, so that what a subnet gets wrong
# is mostly what it is too small for, and not what it has never seen.
_FONTS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-BoldOblique",
        "DejaVuSerif",
        "DejaVuSerif-BoldItalic",
        "STIXGeneral",
        "STIXGeneralBolIta",
        "cmb10",
        "cmss10",
        "cmti10",
        "cmtt10",
    ),
    "val": ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic"),
    "test": ("DejaVuSans-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmr10"),
}
_SEED = 20261122
_STREAMS: Mapping[Split, int] = {"train": 0, "val": 1, "test": 2}

# A capital in a mask is about as high as in an image: transforming it neither skips pixels nor blurs.
_MASK = 32  # height and width of a mask in pixels
_CAPITAL = 16  # height of an H in it
_BAR = (28, 2)  # width and height of the bar in its mask
_PATCH = (12, 12)
_FINE = 4  # characters are rasterised this many times as large, where hinting hardly moves outlines
_AXIS = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)  # pixels from the middle


def fonts(split: Split) -> tuple[Path, ...]:
    """The font files of a split; raises MissingError where matplotlib or one of its fonts is not installed."""
    spec = find_spec("matplotlib")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise MissingError(
            "glyphs are drawn in matplotlib's fonts, and it is not installed", hint="pip install matplotlib"
        )
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    files = tuple(folder / f"{name}.ttf" for name in _FONTS[split])
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MissingError(
            f"{folder}: lacks {', '.join(missing)}, in which glyphs are drawn", hint="pip install matplotlib"
        )
    return files


def labels(split: Split) -> NDArray[np.int64]:
    """The class of each image (n,), sorted, as many of each."""
    return np.repeat(np.arange(len(CLASSES), dtype=np.int64), PER_CLASS[split])


def draw(split: Split, files: tuple[Path, ...], index: int) -> Image.Image:
    """Image `index` of a split, grey, 24 x 24, in one of the split's font `files`.

    Raises MissingError where a file is no font.
    """
    generator = np.random.default_rng([_SEED, _STREAMS[split], index])
    dice = _Dice(generator)
    font = files[dice.below(len(files))]
    contrast = dice.between(80, 200)
    ground = dice.between(0, 255 - contrast)
    ink = ground + contrast
    image = Image.new("L", (SIZE, SIZE), round(ground))
    _clutter(image, dice, font, ground, ink)
    _write(image, dice, mask(font, CLASSES[index // PER_CLASS[split]]), (0.0, 0.0), ink)
    _occlude(image, dice)
    return _lit(image, dice, generator, contrast)


@cache
def mask(font: Path, character: str) -> Image.Image:
    """A character in ink 255 on 0, centred in 32 x 32, as large as makes a capital 16 pixels high; not to be changed.

    Raises MissingError where the file is no font.
    """
    drawn, size = _font(font), _MASK * _FINE
    left, top, right, bottom = drawn.getbbox(character)
    image = Image.new("L", (size, size))
    place = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, character, fill=255, font=drawn)
    return image.reduce(_FINE)


class _Dice:
    """Random numbers one at a time, drawn many at a time: a generator takes microseconds to give a single one."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._values = self._drawn(generator)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def below(self, count: int) -> int:
        return int(count * next(self._values))

    @staticmethod
    def _drawn(generator: np.random.Generator) -> Iterator[float]:
        while True:
            yield from generator.random(64).tolist()


def _clutter(image: Image.Image, dice: _Dice, font: Path, ground: float, ink: float) -> None:
    """Up to two neighbours that reach in from the sides, and up to two strokes."""
    side = dice.below(4)
    for _ in range(dice.below(3)):
        side += 1 + dice.below(2)
        away, angle = dice.between(13, 17), side * math.pi / 2
        neighbour = mask(font, CLASSES[dice.below(len(CLASSES))])
        _write(image, dice, neighbour, (away * math.cos(angle), away * math.sin(angle)), ink)
    for _ in range(dice.below(3)):
        level = ground + (ink - ground) * dice.between(0.3, 0.9)
        scale = (dice.between(0.3, 0.9), dice.between(0.5, 1.2))
        _stamp(image, _block(_BAR), _anywhere(dice), dice.between(0, math.pi), 0.0, scale, level)


def _write(image: Image.Image, dice: _Dice, glyph: Image.Image, place: tuple[float, float], level: float) -> None:
    """A character about `place`, in pixels from the middle: turned, slanted, scaled, stretched and moved."""
    size, stretch = dice.between(12.5, 16.5) / _CAPITAL, math.exp(dice.between(-0.15, 0.15))
    centre = (SIZE / 2 + place[0] + dice.between(-1.2, 1.2), SIZE / 2 + place[1] + dice.between(-1.2, 1.2))
    scale = (size * stretch, size / stretch)
    _stamp(image, glyph, centre, dice.between(-0.2, 0.2), dice.between(-0.25, 0.25), scale, level)


def _occlude(image: Image.Image, dice: _Dice) -> None:
    """On two images of three, a bar right across or a patch, in a grey of its own."""
    kind, level, angle = dice.below(3), dice.between(0, 255), dice.between(0, math.pi)
    if kind == 1:
        _stamp(image, _block(_BAR), _anywhere(dice), angle, 0.0, (2.5, dice.between(1.0, 2.0)), level)
    elif kind == 2:
        scale = (dice.between(0.4, 0.9), dice.between(0.4, 0.9))
        _stamp(image, _block(_PATCH), _anywhere(dice), angle, 0.0, scale, level)


def _lit(image: Image.Image, dice: _Dice, generator: np.random.Generator, contrast: float) -> Image.Image:
    """With shade that changes across the image, and noise of up to an eighth of the contrast."""
    light = generator.standard_normal((SIZE, SIZE), np.float32)
    light *= np.float32(dice.between(0.02, 0.12) * contrast)
    light += np.float32(dice.between(-1.2, 1.2)) * _AXIS
    light += np.float32(dice.between(-1.2, 1.2)) * _AXIS[:, None]
    light += np.asarray(image)
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def _stamp(
    image: Image.Image,
    stamp: Image.Image,
    centre: tuple[float, float],
    angle: float,
    slant: float,
    scale: tuple[float, float],
    level: float,
) -> None:
    """Put a mask on an image in one grey level: scaled, then slanted, then turned by `angle` radians about `centre`."""
    cos, sin, (x, y) = math.cos(angle), math.sin(angle), centre
    # Pillow asks where in the mask a pixel of the image comes from: the inverse of all that.
    a, b = (cos - slant * sin) / scale[0], (sin + slant * cos) / scale[0]
    c, d = -sin / scale[1], cos / scale[1]
    matrix = (a, b, _MASK / 2 - a * x - b * y, c, d, _MASK / 2 - c * x - d * y)
    placed = stamp.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    image.paste(round(level), mask=placed)


def _anywhere(dice: _Dice) -> tuple[float, float]:
    return dice.between(0, SIZE), dice.between(0, SIZE)


@cache
def _block(size: tuple[int, int]) -> Image.Image:
    """A mask of a rectangle in the middle, its width and height in pixels."""
    image = Image.new("L", (_MASK, _MASK))
    image.paste(255, ((_MASK - size[0]) // 2, (_MASK - size[1]) // 2, (_MASK + size[0]) // 2, (_MASK + size[1]) // 2))
    return image


@cache
def _font(file: Path) -> ImageFont.FreeTypeFont:
    """A font in which an H is `_CAPITAL` pixels high in a mask."""
    try:
        # The basic layout is always there; the other depends on how Pillow was built.
        font = ImageFont.truetype(file, 100, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise MissingError(f"{file}: not a font ({error})", hint="pip install matplotlib") from error
    _, top, _, bottom = font.getbbox("H")
    return font.font_variant(size=100 * _CAPITAL * _FINE / (bottom - top))
