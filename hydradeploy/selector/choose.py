"""The choice: a pure function of candidates and a budget.

Candidates are judged in the order of preference, so that what comes first and meets every limit is the answer; cheap
tests pass over those that surely do not. Nothing is interpolated or predicted: only what was measured can be picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal

import msgspec

from hydradeploy.bundle import AccuracyRow
from hydradeploy.selector.budget import DEFAULT_LEVEL, Budget, Preference
from hydradeploy.selector.judge import FLAGS, Candidate, Check, checks, combined, hopeless, possible, too_few
from hydradeploy.stats.proportions import mcnemar

Verdict = Literal["pass", "infeasible", "inconclusive"]

SIGNIFICANT = 0.05

# What slows down each single call; beside other programs the fastest ones are as fast as ever.
_SLOWS_ALL = frozenset({"throttled", "graph-failed"})


@dataclass(frozen=True)
class Rules:
    """How to choose among what meets the budget, and which measurements to believe.

    `accept` are flags that would otherwise refuse a cell, `strict` takes cells without any flag only,
    `larger_is_better` orders by head count instead of accuracy.
    """

    prefer: Preference = "accuracy"
    accept: tuple[str, ...] = ()
    strict: bool = False
    larger_is_better: bool = False

    def needs_accuracy(self, budget: Budget) -> bool:
        """Whether a cell without accuracy cannot be picked."""
        return budget.min_top1 is not None or (self.prefer == "accuracy" and not self.larger_is_better)


@dataclass(frozen=True)
class Choice:
    """The answer. `runner_up` is the next that meets the budget, `cheaper` the fastest that does and is not
    significantly less accurate than the pick; `nearest` comes closest where nothing is picked."""

    verdict: Verdict
    pick: Candidate | None = None
    runner_up: Candidate | None = None
    cheaper: Candidate | None = None
    nearest: Candidate | None = None


def choose(candidates: Sequence[Candidate], budget: Budget, rules: Rules = Rules()) -> Choice:
    """The first candidate in the order of preference that meets every limit with the budget's confidence.

    Without one the verdict is `inconclusive` where more samples might give one, or measuring again undisturbed, else
    `infeasible`.
    """
    needs_accuracy = rules.needs_accuracy(budget)
    usable = [c for c in candidates if c.refused(rules.accept, rules.strict, needs_accuracy) is None]
    likely = [c for c in usable if possible(c, budget)]
    meeting = (c for c in _ranked(likely, rules, budget) if meets(c, budget))
    pick = next(meeting, None)
    if pick is not None:
        return Choice("pass", pick, runner_up=next(meeting, None), cheaper=_cheaper(pick, likely, budget))
    undecided = [c for c in usable if not hopeless(c, budget)]
    is_open = (c for c in sorted(undecided, key=_excess(budget)) if combined(list(checks(c, budget))) == "open")
    nearest = next(is_open, None)
    if nearest is None:
        disturbed = [c for c in candidates if _disturbed(c, rules, needs_accuracy) and _undecided(c, budget)]
        nearest = min(disturbed, key=_excess(budget), default=None)
    if nearest is not None:
        return Choice("inconclusive", nearest=nearest)
    flagged = [c for c in candidates if _disturbed(c, rules, needs_accuracy)]
    return Choice("infeasible", nearest=min(usable or flagged, key=_excess(budget), default=None))


def _disturbed(candidate: Candidate, rules: Rules, needs_accuracy: bool) -> bool:
    """Whether nothing but its flags refuses a cell."""
    return (
        bool(candidate.cell.flags)
        and candidate.refused(rules.accept, rules.strict, needs_accuracy) is not None
        and candidate.refused(FLAGS, False, needs_accuracy) is None
    )


def _undecided(candidate: Candidate, budget: Budget) -> bool:
    """Whether a cell that was measured disturbed may meet the budget: what it takes of time and energy undisturbed is
    not known, unless each single call was too slow and nothing slowed down all of them."""
    if _too_slow(candidate, budget) and not _SLOWS_ALL.intersection(candidate.cell.flags):
        return False
    unmoved = ["memory", "size", "top-1"]
    if candidate.cell.energy_j is None:
        unmoved.append("energy")
    return all(check.status != "missed" for check in checks(candidate, budget) if check.limit in unmoved)


def _too_slow(candidate: Candidate, budget: Budget) -> bool:
    """Whether not even calls as fast as those measured would do."""
    return hopeless(candidate, budget) or too_few(candidate, budget)


def meets(candidate: Candidate, budget: Budget) -> bool:
    """Whether the candidate meets every limit with the budget's confidence."""
    return possible(candidate, budget) and combined(list(checks(candidate, budget))) == "met"


def judged(candidate: Candidate, budget: Budget, rules: Rules) -> list[Check]:
    """Every limit the candidate was held against, for explanation; first why it was not even held."""
    needs_accuracy = rules.needs_accuracy(budget)
    refusal = candidate.refused(rules.accept, rules.strict, needs_accuracy)
    if refusal is None:
        return list(checks(candidate, budget))
    if _disturbed(candidate, rules, needs_accuracy) and (
        _too_slow(candidate, budget) or not _undecided(candidate, budget)
    ):
        # Accepting its flags would not help.
        refusal = candidate.said_of_flags(rules.accept, rules.strict)
        missed = [check for check in checks(candidate, budget) if check.status == "missed"]
        return [Check("measurement", "missed", refusal, math.inf), *missed]
    return [Check("measurement", "missed", refusal, math.inf)]


def significantly_less(one: AccuracyRow | None, other: AccuracyRow | None) -> bool | None:
    """Whether `one` is right less often than `other` on the same images, beyond chance (exact McNemar test).

    None where they were not evaluated on the same images.
    """
    if one is None or other is None or one.right is None or other.right is None:
        return None
    if (one.data_sha256, one.n) != (other.data_sha256, other.n):
        return None
    a, b = int.from_bytes(one.right, "big"), int.from_bytes(other.right, "big")
    only_one, only_other = (a & ~b).bit_count(), (b & ~a).bit_count()
    return only_one < only_other and mcnemar(only_one, only_other) < SIGNIFICANT


def dominated(candidates: Sequence[Candidate], level: float = DEFAULT_LEVEL) -> dict[int, Candidate]:
    """By position, the candidates that another one beats: no slower, no less accurate, and better in one of both.

    On the figures as observed. Those without accuracy or without samples are left out.
    """
    places = [i for i, c in enumerate(candidates) if c.accuracy is not None and c.cell.latency_s]

    def key(i: int) -> tuple[float, float]:
        accuracy = candidates[i].accuracy
        return candidates[i].estimate_s(level), -(accuracy.top1 if accuracy else 0.0)

    found: dict[int, Candidate] = {}
    best: int | None = None
    for i in sorted(places, key=key):
        if best is not None and key(best)[1] <= key(i)[1] and key(best) != key(i):
            found[i] = candidates[best]
        elif best is None or key(i)[1] < key(best)[1]:
            best = i
    return found


def _ranked(candidates: Sequence[Candidate], rules: Rules, budget: Budget) -> Iterator[Candidate]:
    """The best first; among equals the fastest. Those are told apart only when their turn comes: a mean takes time."""

    def accuracy(candidate: Candidate) -> float:
        if rules.larger_is_better:
            return -candidate.artifact.heads
        return -candidate.accuracy.top1 if candidate.accuracy is not None else math.inf

    def amount(value: float | None) -> float:
        return math.inf if value is None else value

    keys: dict[Preference, Callable[[Candidate], float]] = {
        "accuracy": accuracy,
        "latency": lambda c: c.estimate_s(budget.level),
        "energy": lambda c: amount(c.cell.energy_j),
        "memory": lambda c: amount(c.cell.memory_bytes),
        "size": lambda c: c.artifact.size_bytes,
    }
    first = keys[rules.prefer]
    ordered = sorted([(first(c), accuracy(c), place) for place, c in enumerate(candidates)])
    for _, equals in groupby(ordered, key=itemgetter(0, 1)):
        yield from sorted((candidates[place] for _, _, place in equals), key=lambda c: c.mean_s)


def _cheaper(pick: Candidate, likely: Sequence[Candidate], budget: Budget) -> Candidate | None:
    """The fastest that meets the budget and is not significantly less accurate, None where that is the pick."""
    mean_s = pick.mean_s
    verdicts: dict[int, bool | None] = {}

    def comparable(candidate: Candidate) -> bool:
        key = id(candidate.accuracy)  # many cells share one row
        if key not in verdicts:
            verdicts[key] = significantly_less(candidate.accuracy, pick.accuracy)
        return verdicts[key] is False

    means = [(c.mean_s, place) for place, c in enumerate(likely) if comparable(c)]
    faster = (likely[place] for mean, place in sorted(means) if mean < mean_s)
    return next((c for c in faster if meets(c, budget)), None)


def _excess(budget: Budget) -> Callable[[Candidate], float]:
    """How far a candidate's worst figure is over its limit; the mean stands for every percentile, as it is cheap."""
    tightest = min((limit.limit_s for limit in budget.latency), default=math.inf)

    def amounts(candidate: Candidate) -> Iterator[tuple[float | None, float | None]]:
        yield candidate.cell.memory_bytes, budget.memory_bytes
        yield candidate.cell.energy_j, budget.energy_j
        yield candidate.artifact.size_bytes, budget.size_bytes
        if budget.throughput_per_s is not None:
            yield budget.throughput_per_s * candidate.mean_s, candidate.in_flight
        if budget.min_top1 is not None:
            yield 1 - candidate.top1_at_least(budget.confidence), 1 - budget.min_top1

    others = msgspec.structs.replace(budget, latency=()) != Budget(confidence=budget.confidence)

    def excess(candidate: Candidate) -> float:
        found = candidate.mean_s / tightest
        if others:
            for value, most in amounts(candidate):
                if most is not None:
                    found = max(found, value / most if value is not None and most > 0 else math.inf)
        return found

    return excess
