"""Accuracy against latency: every measured subnet with its intervals, the front, and what was picked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydradeploy.errors import MissingError, environment
from hydradeploy.measurements import Cell
from hydradeploy.selector.answer import Answer, Picked
from hydradeploy.selector.budget import DEFAULT_LEVEL, percentile_name
from hydradeploy.selector.choose import dominated
from hydradeploy.selector.judge import Candidate

_CONFIDENCE = 0.95


def draw(candidates: Sequence[Candidate], answers: Sequence[Answer], path: Path, title: str) -> None:
    """Write a PNG of the candidates that have an accuracy, and of the picks of the answers.

    Across: the observed 95th percentile and its bounds with 95 % confidence; up: top-1 and its 95 % interval. Hollow
    ones are dominated: another is no slower and no less accurate. Raises MissingError without matplotlib,
    EnvironmentFailed when the disk fails.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, StrMethodFormatter
    except ModuleNotFoundError as error:
        raise MissingError("pictures are drawn by matplotlib", hint="pip install 'hydradeploy[plot]'") from error

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    shown = [c for c in candidates if c.accuracy is not None and c.cell.latency_s]
    beaten = dominated(shown)
    for place, candidate in enumerate(shown):
        _point(axes, candidate, hollow=place in beaten)
    front = sorted((_at(c) for place, c in enumerate(shown) if place not in beaten), key=lambda at: at[0])
    axes.plot([x for x, _ in front], [y for _, y in front], color="C0", linewidth=1, zorder=1, label="front")
    if beaten:
        axes.plot([], [], "o", color="C0", markerfacecolor="white", label="dominated")
    for number, answer in enumerate(answers):
        _pick(axes, answer, shown, f"C{number + 1}")
    axes.set(
        xlabel=f"{percentile_name(DEFAULT_LEVEL)} latency in ms, with its 95 % bounds",
        ylabel="top-1 in %, with its 95 % interval",
        title=title,
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="lower right")
    with environment("writing the picture"):
        figure.savefig(path, dpi=120, metadata={"Software": None})


def _at(candidate: Candidate) -> tuple[float, float]:
    top1 = candidate.accuracy.top1 if candidate.accuracy is not None else 0.0
    return 1e3 * candidate.estimate_s(DEFAULT_LEVEL), 100 * top1


def _point(axes: Any, candidate: Candidate, *, hollow: bool) -> None:
    x, y = _at(candidate)
    found = candidate.bounds(DEFAULT_LEVEL, _CONFIDENCE)
    row = candidate.accuracy
    left = x - 1e3 * found.lower if found.lower is not None else 0.0
    right = 1e3 * found.upper - x if found.upper is not None else 0.0
    up_down = [[0.0], [0.0]] if row is None else [[y - 100 * row.lower], [100 * row.upper - y]]
    axes.errorbar(
        x,
        y,
        xerr=[[max(0.0, left)], [max(0.0, right)]],
        yerr=up_down,
        fmt="o",
        color="C0",
        markerfacecolor="white" if hollow else "C0",
        elinewidth=0.8,
        alpha=0.9,
        zorder=2,
    )
    name = candidate.artifact.name.partition("-")[0]
    axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)


def _pick(axes: Any, answer: Answer, shown: Sequence[Candidate], colour: str) -> None:
    """The budget as a line, what was picked as a ring."""
    for limit in answer.budget.latency:
        outcome = answer.verdict if answer.pick is None else answer.pick.artifact
        label = f"{limit.name} <= {1e3 * limit.limit_s:.3g} ms: {outcome}"
        axes.axvline(1e3 * limit.limit_s, color=colour, linestyle="--", linewidth=1, label=label, zorder=1)
    if answer.pick is not None:
        own = _identity(answer.pick)
        chosen = [c for c in shown if c.artifact.name == answer.pick.artifact and _identity(c.cell) == own]
        for candidate in chosen:
            axes.plot(*_at(candidate), "o", markersize=14, markerfacecolor="none", markeredgecolor=colour, zorder=3)


def _identity(cell: Cell | Picked) -> tuple[object, ...]:
    """What tells a cell from others of its artifact and regime."""
    return cell.backend, cell.compute_type, cell.settings, cell.threads
