"""`compare`: whether a second profile of a device is slower than a first, by how much, and how surely.

A gate must not fail on noise: byte-identical runs of one machine have differed by 15 %. So a regression is both an
effect, the ratio is over the limit, and an interval that has no room for "nothing changed". Medians and means suit
kernels, bounded tails suit budgets (Chen and Revels, Robust benchmarking in noisy environments, 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import msgspec

from hydradeploy.errors import ExitCode, ForeignError, UsageError
from hydradeploy.measurements import Cell, Profile, Stored, read_profile, show_settings, show_way
from hydradeploy.selector.judge import FLAGS, INVALID_FLAGS, said_of
from hydradeploy.selector.regime import SATURATED
from hydradeploy.spec import Record
from hydradeploy.stats.basics import mean
from hydradeploy.stats.latency import by_process
from hydradeploy.stats.order import quantile, samples_needed
from hydradeploy.stats.ratio import ratio
from hydradeploy.units import FRACTION, parse, parse_percentile

CONFIDENCE = 0.95
# Two say nothing of how processes differ.
FEWEST_PROCESSES = 3

Outcome = Literal["ok", "improved", "regression", "inconclusive"]


class Rule(Record, frozen=True, kw_only=True):
    """A figure may grow by at most `limit`, a fraction. `percentile` is set where the figure is one."""

    figure: str
    percentile: float | None
    limit: float


class CellName(Record, frozen=True, kw_only=True):
    """What a cell is, whatever its graph was. `settings` are in one text, empty for the defaults."""

    artifact: str
    backend: str
    processor: str
    compute_type: str
    settings: str
    input: str
    batch: int
    threads: int
    regime: str

    def __str__(self) -> str:
        regime = "" if self.regime == SATURATED else f", {self.regime}"
        way = show_way(self.artifact, self.backend, self.compute_type, self.settings, self.threads, self.batch)
        return f"{self.artifact} ({way}{regime})"


class Line(Record, frozen=True, kw_only=True):
    """One cell held against one rule.

    `before` and `after` are the figures in SI units, of latencies the geometric mean over processes; `ratio` is after
    over before with its two-sided interval, null where a cell has one figure only. `graph_changed` is whether the two
    measured different graphs, `reason` why there is no answer.
    """

    cell: CellName
    graph_changed: bool
    rule: Rule
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    lower: float | None = None
    upper: float | None = None
    outcome: Outcome
    reason: str | None = None


class Unmatched(Record, frozen=True, kw_only=True):
    """A cell that only one side has measured; `reason` says what the other one has instead."""

    cell: CellName
    measured: Literal["before", "after", "neither"]
    reason: str


class Comparison(Record, frozen=True, kw_only=True):
    """Two profiles. `outcome` is the worst of all lines; a cell that was measured before and failed after is no less
    than inconclusive. `software` says which versions differ, as `name: before, after`.

    Of `confidence` is each interval, so that all of them hold together in 95 % of comparisons (Bonferroni): a gate over
    many cells must not fail more often than one over few.
    """

    before: str
    after: str
    device: str
    software: tuple[str, ...]
    confidence: float
    outcome: Literal["ok", "regression", "inconclusive"]
    lines: tuple[Line, ...]
    unmatched: tuple[Unmatched, ...]


def parse_rule(text: str) -> Rule:
    """A rule from `p95:+5%`, `mean:+2%`, `memory:+10%`, `energy:+5%` or `load:+20%`; raises UsageError."""
    name, colon, limit = (part.strip() for part in text.partition(":"))
    if not colon:
        raise UsageError(f"{text!r} is no rule", hint="write for example p95:+5%")
    known = ", ".join(("p50", "p95", *_AMOUNTS))
    if name not in _AMOUNTS and not name.startswith("p"):
        raise UsageError(f"no figure {name!r} to compare", hint=f"one of {known}")
    percentile = None if name in _AMOUNTS else parse_percentile(name)
    return Rule(figure=name, percentile=percentile, limit=parse(limit.removeprefix("+"), FRACTION))


def compare(before: Path, after: Path, fail_on: Sequence[Rule], *, accept: Sequence[str] = ()) -> Comparison:
    """Hold the cells of a second profile against those of a first, both of one device under the same conditions.

    Versions of software may differ: they are what one compares. `accept` are flags that would otherwise leave a cell
    without an answer. Raises UsageError (no rule, no such flag or file), ForeignError (unlike devices or conditions,
    no cell in common), IntegrityError (a damaged file).
    """
    if not fail_on:
        raise UsageError("nothing to compare by", hint="for example --fail-on p95:+5%")
    unknown = [flag for flag in accept if flag not in FLAGS]
    if unknown:
        raise UsageError(f"no flag {unknown[0]!r} to accept", hint=f"one or more of {','.join(FLAGS)}")
    return compared(read_profile(before), read_profile(after), fail_on, accept=accept)


def compared(before: Stored, after: Stored, fail_on: Sequence[Rule], *, accept: Sequence[str] = ()) -> Comparison:
    """What `compare` says of two profiles that are read already."""
    software = _only_software_differs(before, after)
    old, new = _by_name(before.profile), _by_name(after.profile)
    common = [name for name in old if name in new]
    if not common:
        raise ForeignError(
            f"{before.path} and {after.path} have no cell in common",
            hint=f"measured before: {_names(old)}; after: {_names(new)}",
        )
    both = [name for name in common if old[name].error is None and new[name].error is None]
    pairs = list(product(both, fail_on))
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(pairs))
    lines = tuple(_line(name, old[name], new[name], rule, accept, confidence) for name, rule in pairs)
    unmatched = tuple(_unmatched(old, new))
    lost = any(one.measured == "before" and one.cell in new for one in unmatched)
    return Comparison(
        before=str(before.path),
        after=str(after.path),
        device=after.profile.device.name,
        software=software,
        confidence=confidence,
        outcome=_worst([line.outcome for line in lines], lost=lost or not lines),
        lines=lines,
        unmatched=unmatched,
    )


def exit_code(comparison: Comparison) -> ExitCode:
    """9 where something is a regression, else 4 where that cannot be told, else 0."""
    codes = {"regression": ExitCode.REGRESSION, "inconclusive": ExitCode.INCONCLUSIVE}
    return codes.get(comparison.outcome, ExitCode.OK)


def _only_software_differs(before: Stored, after: Stored) -> tuple[str, ...]:
    one, other = before.profile, after.profile
    same = msgspec.structs.replace(other.conditions, software=one.conditions.software)
    unlike = (*one.device.differences(other.device), *one.conditions.differences(same))
    if unlike:
        raise ForeignError(
            f"unlike measurements cannot be compared; what differs (before, after): {'; '.join(unlike)}",
            hint="measure both on one device under the same conditions",
        )
    versions = one.conditions.software, other.conditions.software
    names = sorted(versions[0].keys() | versions[1].keys())
    shown = {name: tuple(v.get(name, "none") for v in versions) for name in names}
    return tuple(f"{name}: {old}, {new}" for name, (old, new) in shown.items() if old != new)


def _by_name(profile: Profile) -> dict[CellName, Cell]:
    """Each cell by what it is; of several graphs of one name the one measured last."""
    fields = [field for field in CellName.__struct_fields__ if field != "settings"]
    return {
        CellName(settings=show_settings(cell.settings), **{field: getattr(cell, field) for field in fields}): cell
        for cell in sorted(profile.cells, key=lambda cell: cell.measured_at)
    }


def _names(cells: Iterable[CellName]) -> str:
    return ", ".join(str(name) for name in cells) or "nothing"


def _unmatched(old: Mapping[CellName, Cell], new: Mapping[CellName, Cell]) -> Iterator[Unmatched]:
    def why_not(cells: Mapping[CellName, Cell], name: CellName) -> str | None:
        return "not measured" if name not in cells else None if (cell := cells[name]).error is None else cell.error

    for name in dict.fromkeys((*old, *new)):
        before, after = why_not(old, name), why_not(new, name)
        if before is not None and after is not None:
            yield Unmatched(cell=name, measured="neither", reason=f"before: {before}; after: {after}")
        elif before is not None:
            yield Unmatched(cell=name, measured="after", reason=f"before: {before}")
        elif after is not None:
            yield Unmatched(cell=name, measured="before", reason=f"after: {after}")


def _worst(outcomes: Sequence[Outcome], *, lost: bool) -> Literal["ok", "regression", "inconclusive"]:
    if "regression" in outcomes:
        return "regression"
    if "inconclusive" in outcomes or lost:
        return "inconclusive"
    return "ok"


def _line(name: CellName, old: Cell, new: Cell, rule: Rule, accept: Sequence[str], confidence: float) -> Line:
    line = Line(
        cell=name,
        graph_changed=old.graph_sha256 != new.graph_sha256,
        rule=rule,
        outcome="inconclusive",
        reason=_unfit(old, new, rule, accept),
    )
    if line.reason is not None:
        return line
    before, after = _chains(old, rule), _chains(new, rule)
    if rule.figure == "memory":
        figures = before[0][0], after[0][0]
        found, lower, upper = figures[1] / figures[0], None, None
    else:
        measured = ratio(before, after, _figure(rule), confidence)
        figures = measured.before, measured.after
        found, lower, upper = measured.ratio, measured.lower, measured.upper
    outcome = _outcome(found, lower, upper, rule.limit)
    return msgspec.structs.replace(
        line,
        before=figures[0],
        after=figures[1],
        ratio=found,
        lower=lower,
        upper=upper,
        outcome=outcome,
        reason="that may be chance, more processes would tell" if outcome == "inconclusive" else None,
    )


def _outcome(found: float, lower: float | None, upper: float | None, limit: float) -> Outcome:
    """Where there is no interval the figure is taken for exact."""
    if found > 1 + limit:
        return "regression" if lower is None or lower > 1 else "inconclusive"
    return "improved" if (found if upper is None else upper) < 1 else "ok"


def _unfit(old: Cell, new: Cell, rule: Rule, accept: Sequence[str]) -> str | None:
    """Why two cells cannot be compared by that figure, None where they can."""
    for side, cell in (("before", old), ("after", new)):
        for flag in cell.flags:
            if flag in INVALID_FLAGS and flag not in accept:
                return f"{side}: {said_of(cell, flag)[0]} (--accept {flag} takes it)"
        if rule.figure == "energy" and old.meter != new.meter:
            return f"by unlike meters: {old.meter or 'none'}, {new.meter or 'none'}"
        chains = _chains(cell, rule)
        if not chains:
            return f"{side}: {cell.missing.get(rule.figure, f'{rule.figure} was not measured')}"
        if min(map(min, chains)) <= 0:
            return f"{side}: {rule.figure} of 0"
        if rule.figure == "memory":
            continue  # one figure per cell, the largest of all processes
        if len(chains) < FEWEST_PROCESSES:
            processes = "1 process" if len(chains) == 1 else f"{len(chains)} processes"
            return f"{side}: {processes}, a comparison takes {FEWEST_PROCESSES}"
        needed = 1 if rule.percentile is None else samples_needed(rule.percentile, CONFIDENCE)
        if sum(map(len, chains)) < needed:
            return f"{side}: {rule.figure} takes {needed} samples, there are {sum(map(len, chains))}"
    return None


# What one process says of a cell: its calls, or a single value.
_AMOUNTS: dict[str, Callable[[Cell], Sequence[Sequence[float]]]] = {
    "mean": lambda cell: by_process(cell.latency_s, cell.process),
    "load": lambda cell: [[value] for value in cell.load_s],
    "energy": lambda cell: [[value] for value in cell.evidence.get("energy_j", ())],
    "memory": lambda cell: () if cell.memory_bytes is None else [[cell.memory_bytes]],
}


def _chains(cell: Cell, rule: Rule) -> Sequence[Sequence[float]]:
    return _AMOUNTS["mean" if rule.percentile is not None else rule.figure](cell)


def _figure(rule: Rule) -> Callable[[Sequence[float]], float]:
    level = rule.percentile
    return mean if level is None else lambda block: quantile(sorted(block), level)
