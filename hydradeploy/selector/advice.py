"""What a reader must know beside the answer: measured changes that would give a pick, and how far the numbers carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from hydradeploy.measurements import Conditions, Stored
from hydradeploy.selector.budget import Budget, percentile_name
from hydradeploy.selector.choose import Choice, Rules, choose, meets
from hydradeploy.selector.judge import INVALID_FLAGS, Candidate, said_of
from hydradeploy.stats.latency import mean_bounds
from hydradeploy.units import show_bytes, show_percent, show_seconds


def knobs(
    found: Sequence[Candidate],
    budget: Budget,
    rules: Rules,
    elsewhere: Sequence[tuple[Stored, Sequence[Candidate]]],
) -> Iterator[str]:
    """One sentence per single change that would give a pick, from measured cells only.

    `elsewhere` are profiles of the same device under other conditions.
    """
    usable = [c for c in found if c.refused(rules.accept, rules.strict, rules.needs_accuracy(budget)) is None]
    for knob in _knobs(budget):
        needs = [
            (need, i)
            for i, c in enumerate(usable)
            if meets(c, knob.rest) and (need := knob.needs(c, budget.confidence)) is not None
        ]
        if needs:
            need, place = min(needs)
            yield f"{_label(usable[place])} fits with {knob.show(need)}"
    for flag in INVALID_FLAGS:
        if flag not in rules.accept:
            accepting = Rules(rules.prefer, (*rules.accept, flag), rules.strict, rules.larger_is_better)
            chosen = choose(found, budget, accepting).pick
            if chosen is not None:
                yield f"{_label(chosen)} fits with --accept {','.join(accepting.accept)}"
    for stored, others in elsewhere:
        chosen = choose(others, budget, rules).pick
        if chosen is not None:
            yield f"{_label(chosen)} fits under the conditions of {stored.path}"


def notes(
    found: Sequence[Candidate],
    choice: Choice,
    stored: Stored,
    now: Conditions | None,
    budget: Budget,
    rules: Rules,
) -> Iterator[str]:
    """One sentence per reservation. `now` are this device's present conditions, None where it is not here."""
    needs_accuracy = rules.needs_accuracy(budget)
    if rules.larger_is_better and not needs_accuracy:
        yield "accuracy was not looked at: more heads are assumed to be better"
    if now is not None:
        present = msgspec.structs.replace(now, software=stored.profile.conditions.software)
        different = stored.profile.conditions.differences(present)
        if different:
            yield f"measured under other conditions (then, now): {'; '.join(different)}"
    chosen = choice.pick
    if chosen is None:
        return
    amounts = {"energy": chosen.cell.energy_j, "memory": chosen.cell.memory_bytes}
    if rules.prefer in amounts and amounts[rules.prefer] is None:
        why = chosen.cell.missing.get(rules.prefer)
        decided = "the number of heads" if rules.larger_is_better else "accuracy"
        yield f"{rules.prefer} was not measured, so that {decided} decided" + ("" if why is None else f": {why}")
    for level in dict.fromkeys(limit.percentile for limit in budget.latency) or (budget.level,):
        assumed = chosen.bounds(level, budget.confidence).assumes
        if assumed is not None:
            name = percentile_name(level)
            yield f"too few samples for a bound of {name} without assumptions: {assumed} (--preset standard takes more)"
    row = chosen.accuracy
    if row is not None and row.source == "declared":
        yield f"the accuracy on {row.dataset} was declared, not measured"
    elif row is not None:
        cell, device = chosen.cell, stored.profile.device.instruction_set
        ways = (row.backend, row.compute_type, row.instruction_set), (cell.backend, cell.compute_type, device)
        if ways[0] != ways[1]:
            accuracy, latency = (f"{backend} in {kind} on {where}" for backend, kind, where in ways)
            yield f"accuracy was measured with {accuracy}, latency with {latency}"
    for flag in chosen.cell.flags:
        yield from said_of(chosen.cell, flag)
    if needs_accuracy and any(candidate.accuracy is None for candidate in found):
        yield "some cells have no accuracy and were left out"


@dataclass(frozen=True)
class _Knob:
    """One limit that could be another: the rest of the budget, and what a candidate needs, the smaller the better."""

    rest: Budget
    needs: Callable[[Candidate, float], float | None]
    show: Callable[[float], str]


def _knobs(budget: Budget) -> Iterator[_Knob]:
    for limit in budget.latency:
        rest = tuple(other for other in budget.latency if other != limit)
        yield _Knob(
            msgspec.structs.replace(budget, latency=rest),
            lambda c, confidence, limit=limit: c.bounds(limit.percentile, confidence).upper,  # type: ignore[misc]
            lambda need, limit=limit: f"--latency '{limit.name}<={_short(show_seconds, need)}'",  # type: ignore[misc]
        )
    for field, needs, show in _LIMITS:
        if getattr(budget, field) is not None:
            yield _Knob(msgspec.structs.replace(budget, **{field: None}), needs, show)


# Three digits must not turn what fits into what just does not.
_ROUNDING = 1.006


def _short(show: Callable[[float], str], need: float) -> str:
    return show(need * _ROUNDING).replace(" ", "")


def _rate(candidate: Candidate, confidence: float) -> float | None:
    found = mean_bounds(candidate.cell.latency_s, candidate.cell.process, confidence)
    return None if found is None else -candidate.in_flight / found[1]


_LIMITS: tuple[tuple[str, Callable[[Candidate, float], float | None], Callable[[float], str]], ...] = (
    ("memory_bytes", lambda c, _: c.cell.memory_bytes, lambda need: f"--memory {_short(show_bytes, need)}"),
    ("energy_j", lambda c, _: c.cell.energy_j, lambda need: f"--energy {need * _ROUNDING:.3g}J"),
    ("size_bytes", lambda c, _: c.artifact.size_bytes, lambda need: f"--size {_short(show_bytes, need)}"),
    ("throughput_per_s", _rate, lambda need: f"--throughput {-need / _ROUNDING:.3g}/s"),
    (
        "min_top1",
        lambda c, confidence: None if c.accuracy is None else -c.top1_at_least(confidence),
        lambda need: f"--min-top1 {show_percent(math.floor(-need * 10000) / 10000, 2)}",
    ),
)


def _label(candidate: Candidate) -> str:
    return f"{candidate.artifact.name} ({candidate.way})"
