"""A comparison of two profiles: rows for a terminal, and Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydradeploy.selector.compare import Comparison, Line
from hydradeploy.units import show_bytes, show_percent, show_seconds

HEADER = ("cell", "figure", "before", "after", "change", "interval", "allowed", "verdict")


def rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """One row below HEADER per cell and rule."""
    for line in comparison.lines:
        yield (
            str(line.cell),
            line.rule.figure,
            _amount(line, line.before),
            _amount(line, line.after),
            _change(line.ratio),
            "" if line.lower is None else f"{_change(line.lower)} .. {_change(line.upper)}",
            _change(1 + line.rule.limit),
            line.outcome,
        )


def lines(comparison: Comparison) -> Iterator[str]:
    """What a reader must know beside the rows, and the answer in one sentence last."""
    for version in comparison.software:
        yield f"software differs (before, after): {version}"
    changed = dict.fromkeys(str(line.cell) for line in comparison.lines if line.graph_changed)
    if changed:
        yield f"the graph is another one: {', '.join(changed)}"
    for line in comparison.lines:
        if line.reason is not None:
            yield f"{line.cell}: {line.rule.figure}: {line.reason}"
    for one in comparison.unmatched:
        yield f"{one.cell}: not compared: {one.reason}"
    yield summary(comparison)


def summary(comparison: Comparison) -> str:
    """The answer in one sentence."""
    counts = {
        "regression": "over the limit and not by chance",
        "inconclusive": "inconclusive",
        "improved": "better than before",
        "ok": "within the limit",
    }
    outcomes = [line.outcome for line in comparison.lines]
    told = [f"{count} {said}" for outcome, said in counts.items() if (count := outcomes.count(outcome))]  # type: ignore[arg-type]
    if comparison.unmatched:
        told.append(f"{len(comparison.unmatched)} not compared")
    return f"{comparison.outcome} on {comparison.device}: {', '.join(told)}"


def markdown(comparison: Comparison) -> str:
    """A heading with the answer, a table, and the remarks as a list."""
    *remarks, answer = lines(comparison)
    table = [HEADER, ("---",) * 2 + ("---:",) * 5 + ("---",), *map(_stressed, rows(comparison))]
    return "\n".join(
        (
            f"**{answer}**",
            "",
            *(f"| {' | '.join(map(_escaped, row))} |" for row in table),
            "",
            *(f"- {_escaped(remark)}" for remark in remarks),
            *([""] if remarks else []),
            f"Before: `{comparison.before}`, after: `{comparison.after}`.",
            "All intervals together hold in 95 % of comparisons.",
            "",
        )
    )


def _stressed(row: Sequence[str]) -> tuple[str, ...]:
    """A regression stands out."""
    return (*row[:-1], f"**{row[-1]}**" if row[-1] == "regression" else row[-1])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _change(ratio: float | None) -> str:
    return "" if ratio is None else ("+" if ratio >= 1 else "") + show_percent(ratio - 1)


def _amount(line: Line, value: float | None) -> str:
    if value is None:
        return "n/a"
    if line.rule.figure == "energy":
        return f"{value:.3g} J"
    return show_bytes(value) if line.rule.figure == "memory" else show_seconds(value)
