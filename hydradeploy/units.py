"""Quantities with units: read from people, shown to people. Inside, everything is SI.

A bare number is refused, because peers mix milliseconds, seconds and microseconds and nobody can tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hydradeploy.errors import UsageError


@dataclass(frozen=True)
class Quantity:
    """A kind of quantity: its name for people, an example, and what one of each unit is in SI."""

    name: str
    example: str
    units: Mapping[str, float]


def _quantity(name: str, example: str, units: dict[str, float]) -> Quantity:
    return Quantity(name, example, MappingProxyType(units))


_BINARY = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_DECIMAL = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}

DURATION = _quantity(
    "a duration", "20ms", {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
)
SIZE = _quantity("a size", "1.5GiB", _DECIMAL | _BINARY)
ENERGY = _quantity("an energy", "0.4J", {"uJ": 1e-6, "µJ": 1e-6, "mJ": 1e-3, "J": 1.0, "kJ": 1e3})
FRACTION = _quantity("a percentage", "78%", {"%": 0.01, "pp": 0.01})
RATE = _quantity("a rate", "50/s", {"/s": 1.0, "hz": 1.0, "Hz": 1.0, "/min": 1 / 60})

_NUMBER = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*(\S*)\s*")


def parse(text: str, quantity: Quantity) -> float:
    """The SI value of `text`, for example 0.02 for "20ms" as a DURATION.

    Raises UsageError for a bare number, an unknown unit, a negative or an infinite value.
    """
    # Two letters look like that sign: the Greek one is what keyboards have.
    match = _NUMBER.fullmatch(text.replace("\N{GREEK SMALL LETTER MU}", "\N{MICRO SIGN}"))
    known = ", ".join(quantity.units)
    if match is None:
        raise UsageError(f"{text!r} is not {quantity.name}", hint=f"write for example {quantity.example}")
    number, unit = match.groups()
    if not unit:
        suggestion = number + re.sub(r"[-+.0-9]", "", quantity.example)
        raise UsageError(f"{text!r} has no unit", hint=f"{quantity.name} needs one of {known}: {suggestion}?")
    if unit not in quantity.units:
        raise UsageError(f"{text!r}: {unit!r} is not a unit of {quantity.name[2:].strip()}", hint=f"one of {known}")
    # 95 * 0.01 is 0.9500000000000001; fifteen digits are what a float keeps of what was written.
    value = float(f"{float(number.replace('_', '')) * quantity.units[unit]:.15g}")
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is not a finite number", hint=f"write for example {quantity.example}")
    return value


def parse_percentile(text: str) -> float:
    """The level of `p95` or `p99.9`, 0 to 1; raises UsageError."""
    match = re.fullmatch(r"\s*p([0-9]{1,2}(?:\.[0-9]+)?)\s*", text)
    level = 0.0 if match is None else round(float(match[1]) / 100, 9)
    if not 0 < level < 1:
        raise UsageError(f"{text!r} is not a percentile", hint="write for example p95")
    return level


def show_bytes(size_bytes: float) -> str:
    """Binary units with three significant digits: 22.9 MiB."""
    return _scaled(size_bytes, _BINARY) or f"{size_bytes:.0f} B"


def show_seconds(seconds: float) -> str:
    """Seconds in the unit that gives a number from 1 to 999, three significant digits: 17.4 ms."""
    return _scaled(seconds, {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}) or f"{seconds * 1e9:.3g} ns"


def show_at_most(seconds: float) -> str:
    """Like `show_seconds`, but never less than it is, as nothing else is true of a bound: 219.2 us is 220 us."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    shown = [show_seconds((round(seconds / step) + more) * step) for more in (0, 1)]
    return shown[0] if parse(shown[0], DURATION) >= seconds else shown[1]


def show_duration(seconds: float) -> str:
    """How long people wait: `8 s`, `2 min 5 s`, `1 h 20 min`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def show_count(count: float) -> str:
    """A large count of things: 17.6 G, 86.6 M."""
    return _scaled(count, {"G": 1e9, "M": 1e6, "k": 1e3}) or f"{count:.0f}"


def show_percent(fraction: float, digits: int = 1) -> str:
    """A fraction as per cent: 0.784 is 78.4%."""
    return f"{100 * fraction:.{digits}f}%"


def show_confidence(level: float) -> str:
    """A level as per cent with all of its digits: 0.999 is 99.9%, and nothing but 1 is 100%."""
    return f"{100 * level:.9g}%"


def show_points(fraction: float) -> str:
    """A difference of percentages: 0.005 is 0.50pp."""
    return f"{100 * fraction:.2f}pp"


def show_number(count: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def _scaled(value: float, units: Mapping[str, float]) -> str:
    """Three significant digits in the largest unit that leaves at least 1 after rounding; empty where none does."""
    for name, factor in sorted(units.items(), key=lambda unit: unit[1], reverse=True):
        rounded = float(f"{value / factor:.3g}")
        if rounded >= 1:
            return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f} {name}"
    return ""


def show_cuda_version(number: int) -> str:
    """12060, as CUDA counts its versions, is 12.6."""
    return f"{number // 1000}.{number % 1000 // 10}"
