"""What options are given as text, parsed; raises UsageError with an example of what is possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydradeploy.bundle import Batch
from hydradeploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from hydradeploy.selector.budget import Budget


def flags(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between them, None where none are given; raises UsageError for an empty list."""
    if text is None:
        return None
    found = flags(text)
    if not found:
        raise UsageError(f"{text!r} names nothing", hint="one name, or several with commas")
    return found


def settings(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, values = (part.strip() for part in text.partition("="))
        if not name or not flags(values):
            raise UsageError(f"--setting {text!r} is not possible", hint="write for example hint=throughput,latency")
        found[name] = (*found.get(name, ()), *flags(values))
    return found


def floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers", hint="write for example 0.485,0.456,0.406") from error


def counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of counts", hint="write for example 1,2") from error


def batch(text: str) -> Batch:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal():
        raise UsageError(f"--batch {text!r} is not possible", hint="a number of images, or dynamic")
    return int(text)


def lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    # Not splitlines, for which a name may hold what ends a line; the last lines of a file may be empty.
    return text.rstrip("\n").split("\n") if text.strip() else []


def budget(
    latency: Sequence[str],
    memory: str | None = None,
    energy: str | None = None,
    size: str | None = None,
    throughput: str | None = None,
    min_top1: str | None = None,
    confidence: str = "95%",
) -> Budget:
    from hydradeploy.selector.budget import Budget, parse_latency
    from hydradeploy.units import ENERGY, FRACTION, RATE, SIZE, parse

    return Budget(
        latency=tuple(map(parse_latency, latency)),
        memory_bytes=None if memory is None else parse(memory, SIZE),
        energy_j=None if energy is None else parse(energy, ENERGY),
        size_bytes=None if size is None else parse(size, SIZE),
        throughput_per_s=None if throughput is None else parse(throughput, RATE),
        min_top1=None if min_top1 is None else parse(min_top1, FRACTION),
        confidence=parse(confidence, FRACTION),
    )
