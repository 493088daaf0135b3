"""Measured cells as tables, and the lines below them: what is wrong with figures, and why some are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from hydradeploy.measurements import Cell, show_settings
from hydradeploy.selector.judge import bounds_of, said_of
from hydradeploy.selector.regime import callers, pace_hz
from hydradeploy.stats.basics import mean, median
from hydradeploy.stats.bootstrap import mean_interval, quantile_interval
from hydradeploy.stats.order import quantile, samples_needed
from hydradeploy.stats.pacing import deadline_misses, frame_age_s
from hydradeploy.units import show_at_most, show_bytes, show_number, show_percent, show_seconds

CONFIDENCE = 0.95
BURST, SUSTAINED = "burst", "sustained"

# What tells cells of one artifact apart, in words.
_FIELDS: dict[str, Callable[[Cell], str]] = {
    "backend": lambda cell: cell.backend,
    "processor": lambda cell: cell.processor,
    "compute_type": lambda cell: cell.compute_type,
    "settings": lambda cell: show_settings(cell.settings) or "default",
    "input": lambda cell: cell.input,
    "batch": lambda cell: f"batch {cell.batch}",
    "threads": lambda cell: show_number(cell.threads, "thread"),
    "regime": lambda cell: cell.regime,
}


class Table(NamedTuple):
    """What all of its rows have in common is in the title."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(cells: Sequence[Cell]) -> Iterator[Table]:
    """Latencies, one table per regime; a long run's first and settled ones side by side; then what else was measured.

    Intervals and bounds are of 95 % confidence, a frame's age its 95th percentile. What was measured of no cell has no
    column; with all of them a table is about 120 characters wide.
    """
    for regime in dict.fromkeys(cell.regime for cell in cells):
        yield _table([cell for cell in cells if cell.regime == regime], _latency_columns)
    pairs = _pairs(cells)
    if pairs:
        yield _side_by_side(pairs)
    measured = [cell for cell in cells if cell.error is None]
    if measured:
        table = _table(measured, _other_columns)
        meters = ", ".join(dict.fromkeys(cell.meter for cell in measured if cell.meter is not None))
        energy = f"; energy by {meters}" if any(cell.energy_j is not None for cell in measured) and meters else ""
        yield table._replace(title=f"also measured: {table.title}{energy}")


def remark_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """Each flag with its evidence, once, and of which cells where it is not all.

    But for how much processes differ, which is a column of the table.
    """
    found = [
        (said, cell)
        for cell in cells
        for flag in cell.flags
        for said in said_of(cell, flag)
        if not said.startswith("noisy: processes differ")
    ]
    yield from _grouped(found, cells)


def missing_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """Why a figure is not there, once, and of which cells where it is not all."""
    found = [(_told(name, why, cell), cell) for cell in cells for name, why in cell.missing.items()]
    for cell in cells:
        if cell.error is None:
            bound = bounds_of(cell, 0.95, CONFIDENCE)
            if bound.why_not is not None:
                found.append((f"p95 has no bound: {bound.why_not}", cell))
            elif bound.assumes is not None:
                found.append((f"the bound of p95 takes {bound.assumes} for granted, samples are worth too few", cell))
    yield from _grouped(found, cells)


def _told(name: str, why: str, cell: Cell) -> str:
    # A remark can stand beside a figure: memory that is of the whole GPU.
    there = name == "memory" and cell.memory_bytes is not None
    return f"{name}: {why}" if there else f"{name} not measured: {why}"


def label(cell: Cell, among: Sequence[Cell]) -> str:
    """The artifact's name and what else tells it from others: `h06-fp32, 2 threads`."""
    return ", ".join((cell.artifact, *(_FIELDS[name](cell) for name in _varying(among))))


# A column is its title and the text per cell, None where there is no figure.
_Column = tuple[str, Callable[[Cell], str | None]]


def _table(cells: Sequence[Cell], columns: Callable[[Sequence[Cell]], Sequence[_Column]]) -> Table:
    varying = _varying(cells)
    first: list[_Column] = [("artifact", lambda cell: cell.artifact)]
    first += [(name.replace("_", " "), lambda cell, name=name: _value(cell, name)) for name in varying]  # type: ignore[misc]
    good = [cell for cell in cells if cell.error is None]
    rest = [column for column in columns(good) if any(column[1](cell) is not None for cell in good)]

    def row(cell: Cell) -> tuple[str, ...]:
        named = tuple(show(cell) or "" for _, show in first)
        if cell.error is not None:
            return (*named, *("failed",) * min(1, len(rest)), *("",) * (len(rest) - 1))
        return (*named, *("" if (text := show(cell)) is None else text for _, show in rest))

    return Table(_common(cells, varying), tuple(name for name, _ in (*first, *rest)), tuple(map(row, cells)))


def _latency_columns(cells: Sequence[Cell]) -> Sequence[_Column]:
    flagged = any(cell.flags for cell in cells)
    return (
        ("p50 (95 %)", _p50),
        ("p95", lambda cell: _percentile(cell, 0.95)),
        ("p99", lambda cell: _percentile(cell, 0.99)),
        ("p95 at most", _at_most),
        ("spread", _spread),
        ("flags", lambda cell: ", ".join(flag.removesuffix("-clocks") for flag in cell.flags) if flagged else None),
    )


def _other_columns(cells: Sequence[Cell]) -> Sequence[_Column]:
    return (
        ("throughput (95 %)", _throughput),
        ("missed", _missed),
        ("frame age", _age),
        ("samples", lambda cell: str(len(cell.latency_s))),
        ("worth", lambda cell: f"{bounds_of(cell, 0.95, CONFIDENCE).n_effective:.0f}"),
        ("load", lambda cell: _middle(cell.load_s)),
        ("prepare", lambda cell: _middle(cell.evidence.get("prepare_s", ()))),
        ("first run", lambda cell: _middle(cell.first_s)),
        ("switch", lambda cell: _middle(cell.switch_s)),
        ("memory", lambda cell: None if cell.memory_bytes is None else show_bytes(cell.memory_bytes)),
        ("energy", lambda cell: None if cell.energy_j is None else f"{cell.energy_j:.3g} J"),
    )


def _side_by_side(pairs: Sequence[tuple[Cell, Cell]]) -> Table:
    settled = [late for _, late in pairs]
    varying = _varying(settled)

    def row(early: Cell, late: Cell) -> tuple[str, ...]:
        one, other = (bounds_of(cell, 0.5, CONFIDENCE).estimate for cell in (early, late))
        tails = (_percentile(cell, 0.95) for cell in (early, late))
        named = (late.artifact, *(_value(late, name) for name in varying))
        return (*named, show_seconds(one), show_seconds(other), f"{100 * (other / one - 1):+.1f}%", *tails)

    header = ("p50 burst", "p50 sustained", "slower by", "p95 burst", "p95 sustained")
    title = f"first and settled calls of a long run: {_common(settled, (*varying, 'regime'))}"
    return Table(title, ("artifact", *varying, *header), tuple(row(*pair) for pair in pairs))


def _pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Burst and sustained figures of the same."""
    good = [cell for cell in cells if cell.error is None]
    first = {cell.key[:-1]: cell for cell in good if cell.regime == BURST}
    return [(first[cell.key[:-1]], cell) for cell in good if cell.regime == SUSTAINED and cell.key[:-1] in first]


def _varying(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The fields in which cells of one artifact differ, and a compute type that its name does not tell."""
    found = list(cells)
    inputs = {cell.artifact: cell.input for cell in found}
    differing = {name for name in _FIELDS if len({_value(cell, name) for cell in found}) > 1}
    shown = {
        "compute_type": any(cell.compute_type not in cell.artifact.split("-") for cell in found),
        "input": any(cell.input != inputs[cell.artifact] for cell in found),
    }
    return tuple(name for name in _FIELDS if shown.get(name, name in differing))


def _common(cells: Sequence[Cell], but: Sequence[str]) -> str:
    """What all of them are."""
    names = ["regime", "backend", "processor", "threads", "batch"]
    if cells[0].settings:
        names.insert(2, "settings")
    return ", ".join(_FIELDS[name](cells[0]) for name in names if name not in but)


def _value(cell: Cell, name: str) -> str:
    """A field below its own title."""
    return _FIELDS[name](cell) if name == "settings" else str(getattr(cell, name))


def _p50(cell: Cell) -> str:
    middle = show_seconds(bounds_of(cell, 0.5, CONFIDENCE).estimate)
    interval = quantile_interval(cell.latency_s, cell.process, 0.5, CONFIDENCE)
    if interval is None:
        return middle
    # Without the unit that stands beside them already.
    unit = middle[middle.index(" ") :]
    low, high = (show_seconds(end).removesuffix(unit) for end in interval)
    return f"{middle} ({low}..{high})"


def _percentile(cell: Cell, level: float) -> str:
    """The observed one, or how many samples it takes to see it; what they are worth stands beside it."""
    found, needed = bounds_of(cell, level, CONFIDENCE), samples_needed(level, CONFIDENCE)
    return f"n/a (n<{needed})" if found.n < needed else show_seconds(found.estimate)


def _at_most(cell: Cell) -> str:
    upper = bounds_of(cell, 0.95, CONFIDENCE).upper
    return "n/a" if upper is None else show_at_most(upper)


def _spread(cell: Cell) -> str | None:
    spread = bounds_of(cell, 0.95, CONFIDENCE).spread
    return None if spread is None else show_percent(spread)


def _throughput(cell: Cell) -> str | None:
    images = cell.batch * callers(cell.regime)
    if callers(cell.regime) == 1:
        return None
    interval = mean_interval(cell.latency_s, cell.process, CONFIDENCE)
    shown = f"{images / mean(cell.latency_s):.3g}/s"
    return shown if interval is None else f"{shown} ({images / interval[1]:.3g}..{images / interval[0]:.3g})"


def _missed(cell: Cell) -> str | None:
    pace = pace_hz(cell.regime)
    if pace is None:
        return None
    share = deadline_misses(cell.latency_s, pace)
    # One of thousands is not none.
    return "<0.1%" if 0 < share < 0.001 else show_percent(share)


def _age(cell: Cell) -> str | None:
    pace = pace_hz(cell.regime)
    ages = () if pace is None else frame_age_s(cell.latency_s, pace, cell.process)
    return show_seconds(quantile(sorted(ages), 0.95)) if ages else None


def _middle(values: Sequence[float]) -> str | None:
    return show_seconds(median(values)) if values else None


def _grouped(found: Sequence[tuple[str, Cell]], cells: Sequence[Cell]) -> Iterator[str]:
    """Each text once, with the cells it is about unless that is all that were measured."""
    measured = sum(cell.error is None for cell in cells)
    for text in dict.fromkeys(text for text, _ in found):
        about = list(dict.fromkeys(label(cell, cells) for said, cell in found if said == text))
        yield text if len(about) >= measured else f"{text} ({'; '.join(about)})"
