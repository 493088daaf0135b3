"""RandAugment as timm means it: a few random operations per image, each of a random strength.

The operations, the ranges of their parameters and the way both are drawn are those of timm 1.0.7
(timm/data/auto_augment.py) for policies such as rand-m9-mstd0.5-inc1; the method is that of arXiv 1909.13719.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

PROBABILITY = 0.5
"""Of each chosen operation to be applied."""

_STRONGEST = 10  # the magnitude at which an operation is at the end of its range
_KNOWN = re.compile(r"(?P<key>mstd|inc|m|n)(?P<value>\d+(\.\d+)?)")
_HELP = "known are m (magnitude), mstd (its spread), n (operations per image) and inc1, as in rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Policy:
    """`count` operations per image, of `magnitude` (10 is the end of the range) with normal noise of `spread` on it.

    With `increasing`, all operations are the stronger the larger the magnitude is; without, some are the weaker.
    """

    magnitude: int = 10
    spread: float = 0.0
    count: int = 2
    increasing: bool = False


@dataclass(frozen=True)
class Canvas:
    """What is seen where an image was moved away, a grey level per channel, and the filter that moves it."""

    fill: tuple[int, ...]
    resampling: Image.Resampling


@dataclass(frozen=True)
class Operation:
    """One way to change an image.

    `level` draws the parameter for a strength of 0 to 1, `apply` changes an L or RGB image by it and gives a new one.
    """

    level: Callable[[float, Generator], float]
    apply: Callable[[Image.Image, float, Canvas], Image.Image]


@cache
def parse(text: str) -> Policy:
    """A policy from timm's words; raises ValueError where it has a part that is not known here."""
    first, *parts = text.split("-")
    if first != "rand":
        raise ValueError(f"{text!r} does not begin with rand; {_HELP}")
    found: dict[str, str] = {}
    for part in parts:
        match = _KNOWN.fullmatch(part)
        if match is None or match["key"] in found:
            raise ValueError(f"{part!r} in {text!r} is unknown or there twice; {_HELP}")
        found[match["key"]] = match["value"]
    # timm takes inc0 for inc1, and a spread above 100 for something else altogether.
    if found.get("inc", "1") != "1" or float(found.get("mstd", 0)) > 100:
        raise ValueError(f"{text!r} has another inc than inc1 or mstd above 100; {_HELP}")
    if any("." in found.get(key, "") for key in ("m", "n")):
        raise ValueError(f"m and n are whole numbers, not as in {text!r}; {_HELP}")
    return Policy(
        magnitude=int(found.get("m", _STRONGEST)),
        spread=float(found.get("mstd", 0)),
        count=int(found.get("n", 2)),
        increasing="inc" in found,
    )


def randaugment(image: Image.Image, policy: Policy, canvas: Canvas, random: Generator) -> Image.Image:
    """An L or RGB image after operations that are drawn with replacement, each applied with `PROBABILITY`."""
    known = tuple(operations(policy.increasing).values())
    for chosen in random.integers(len(known), size=policy.count):
        if random.random() > PROBABILITY:
            continue
        magnitude = random.normal(policy.magnitude, policy.spread) if policy.spread else policy.magnitude
        strength = min(max(float(magnitude), 0.0), float(_STRONGEST)) / _STRONGEST
        operation = known[chosen]
        image = operation.apply(image, operation.level(strength, random), canvas)
    return image


@cache
def operations(increasing: bool) -> Mapping[str, Operation]:
    """All fifteen by name, with the ranges that timm gives them with and without inc1."""
    enhance = _enhance_away if increasing else _enhance_from_least
    return {
        "AutoContrast": Operation(_none, lambda image, level, canvas: ImageOps.autocontrast(image)),
        "Equalize": Operation(_none, lambda image, level, canvas: ImageOps.equalize(image)),
        "Invert": Operation(_none, lambda image, level, canvas: ImageOps.invert(image)),
        "Rotate": Operation(_either_way(30.0), _rotate),
        "Posterize": Operation(_fewer_bits if increasing else _more_bits, _posterize),
        "Solarize": Operation(_lower_threshold if increasing else _higher_threshold, _solarize),
        "SolarizeAdd": Operation(lambda strength, random: int(strength * 110), _solarize_add),
        "Color": Operation(enhance, lambda image, level, canvas: ImageEnhance.Color(image).enhance(level)),
        "Contrast": Operation(enhance, lambda image, level, canvas: ImageEnhance.Contrast(image).enhance(level)),
        "Brightness": Operation(enhance, lambda image, level, canvas: ImageEnhance.Brightness(image).enhance(level)),
        "Sharpness": Operation(enhance, lambda image, level, canvas: ImageEnhance.Sharpness(image).enhance(level)),
        "ShearX": Operation(
            _either_way(0.3), lambda image, level, canvas: _moved(image, (1, level, 0, 0, 1, 0), canvas)
        ),
        "ShearY": Operation(
            _either_way(0.3), lambda image, level, canvas: _moved(image, (1, 0, 0, level, 1, 0), canvas)
        ),
        "TranslateX": Operation(_either_way(0.45), _translate_x),
        "TranslateY": Operation(_either_way(0.45), _translate_y),
    }


def _none(strength: float, random: Generator) -> float:
    return 0.0


def _either_way(most: float) -> Callable[[float, Generator], float]:
    return lambda strength, random: strength * most * _sign(random)


def _sign(random: Generator) -> float:
    return -1.0 if random.random() > 0.5 else 1.0


def _enhance_away(strength: float, random: Generator) -> float:
    """0.1 to 1.9, away from 1, which changes nothing."""
    return max(0.1, 1.0 + strength * 0.9 * _sign(random))


def _enhance_from_least(strength: float, random: Generator) -> float:
    return strength * 1.8 + 0.1


def _more_bits(strength: float, random: Generator) -> float:
    return int(strength * 4)


def _fewer_bits(strength: float, random: Generator) -> float:
    return 4 - int(strength * 4)


def _higher_threshold(strength: float, random: Generator) -> float:
    return int(strength * 256)


def _lower_threshold(strength: float, random: Generator) -> float:
    return 256 - int(strength * 256)


def _posterize(image: Image.Image, bits: float, canvas: Canvas) -> Image.Image:
    """The leading bits kept; none of them, which newer versions of Pillow refuse to do, leaves black."""
    mask = 256 - 2 ** (8 - int(bits))
    return _looked_up(image, [value & mask for value in range(256)])


def _solarize(image: Image.Image, threshold: float, canvas: Canvas) -> Image.Image:
    return ImageOps.solarize(image, int(threshold))


def _solarize_add(image: Image.Image, added: float, canvas: Canvas) -> Image.Image:
    """Dark pixels, below 128, lighter by `added` grey levels."""
    return _looked_up(image, [min(255, value + int(added)) if value < 128 else value for value in range(256)])


def _looked_up(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _rotate(image: Image.Image, degrees: float, canvas: Canvas) -> Image.Image:
    return image.rotate(degrees, canvas.resampling, fillcolor=_colour(canvas))


def _translate_x(image: Image.Image, share: float, canvas: Canvas) -> Image.Image:
    return _moved(image, (1, 0, share * image.width, 0, 1, 0), canvas)


def _translate_y(image: Image.Image, share: float, canvas: Canvas) -> Image.Image:
    return _moved(image, (1, 0, 0, 0, 1, share * image.height), canvas)


def _moved(image: Image.Image, matrix: tuple[float, ...], canvas: Canvas) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, canvas.resampling, fillcolor=_colour(canvas))


def _colour(canvas: Canvas) -> int | tuple[int, ...]:
    """Pillow wants a number, not a tuple, for one channel."""
    return canvas.fill[0] if len(canvas.fill) == 1 else canvas.fill
