"""What one cell says of a budget: each limit is met, missed or open, with the number that decides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from hydradeploy.bundle import AccuracyRow, Artifact
from hydradeploy.measurements import Cell, show_settings, show_way
from hydradeploy.selector.budget import Budget, LatencyLimit, percentile_name
from hydradeploy.selector.regime import callers
from hydradeploy.stats.basics import normal_quantile
from hydradeploy.stats.latency import Bounds, bounds, mean_bounds
from hydradeploy.stats.order import allowed_misses, quantile, samples_needed
from hydradeploy.stats.proportions import wilson
from hydradeploy.units import show_at_most, show_bytes, show_confidence, show_percent, show_seconds

Status = Literal["met", "missed", "open"]

# Measurements so flagged do not show what the device does undisturbed, or when run as the cell says.
INVALID_FLAGS = ("throttled", "contended", "graph-failed")
FLAGS = (*INVALID_FLAGS, "noisy", "floating-clocks")

# Beyond that many samples those that are needed are estimated.
MOST_COUNTED = 10_000


@dataclass(frozen=True)
class Check:
    """One limit. `excess` is the figure over the limit, above 1 where it is too much; `more` the further samples it
    would take to tell, None where more of the same would not."""

    limit: str
    status: Status
    text: str
    excess: float
    more: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A cell, the artifact it measured, and that artifact's accuracy, None where nobody measured it."""

    cell: Cell
    artifact: Artifact
    accuracy: AccuracyRow | None

    @property
    def way(self) -> str:
        """How it was run, in words."""
        cell, settings = self.cell, show_settings(self.cell.settings)
        return show_way(self.artifact.name, cell.backend, cell.compute_type, settings, cell.threads, cell.batch)

    @property
    def in_flight(self) -> int:
        """How many images are being worked on at any moment."""
        return self.cell.batch * callers(self.cell.regime)

    @property
    def mean_s(self) -> float:
        samples = self.cell.latency_s
        return sum(samples) / len(samples) if samples else math.inf

    def estimate_s(self, level: float) -> float:
        """The observed percentile."""
        samples = self.cell.latency_s
        return quantile(sorted(samples), level) if samples else math.inf

    def bounds(self, level: float, confidence: float) -> Bounds:
        """What the samples say of a percentile."""
        return bounds_of(self.cell, level, confidence)

    def top1_at_least(self, confidence: float) -> float:
        """The lower end of the interval for its top-1; 0 where nobody measured it."""
        row = self.accuracy
        return 0.0 if row is None else _interval(row.correct, row.n, confidence)[0]

    def refused(self, accept: tuple[str, ...], strict: bool, needs_accuracy: bool) -> str | None:
        """Why the cell cannot be picked whatever the budget, None where it can."""
        cell = self.cell
        if cell.error is not None:
            return f"could not be measured: {cell.error}"
        if cell.flags and (found := self.said_of_flags(accept, strict)):
            wanted = ",".join(flag for flag in cell.flags if flag in INVALID_FLAGS)
            return found + ("" if strict else f" (--accept {wanted} takes it)")
        if needs_accuracy and self.accuracy is None:
            return "no accuracy measured of these weights"
        return None

    def said_of_flags(self, accept: tuple[str, ...], strict: bool) -> str:
        """What is known of the flags that refuse the cell, empty where none does."""
        bad = [flag for flag in self.cell.flags if strict or (flag in INVALID_FLAGS and flag not in accept)]
        return "; ".join(said for flag in bad for said in said_of(self.cell, flag))


def said_of(cell: Cell, flag: str) -> tuple[str, ...]:
    """What is known of one of a cell's flags, in sentences."""
    return tuple(r for r in cell.remarks if r.startswith(f"{flag}:")) or (f"measured while {flag}",)


def bounds_of(cell: Cell, level: float, confidence: float) -> Bounds:
    """What a cell's samples say of a percentile.

    A budget is not met by extrapolation: beyond what as many independent samples would carry nothing is known of a
    tail, and most are not log-normal.
    """
    return _bounds(cell.latency_s, cell.process, level, confidence)


# Kept, because a pick asks several times and each takes milliseconds.
@lru_cache(maxsize=1024)
def _bounds(samples: tuple[float, ...], process: tuple[int, ...], level: float, confidence: float) -> Bounds:
    found = bounds(samples, process, level, confidence)
    needed = samples_needed(level, confidence)
    if found.assumes is None or found.n >= needed:
        return found
    why_not = f"{percentile_name(level)} takes {needed} samples even were they independent"
    return replace(found, upper=None, assumes=None, why_not=why_not)


# Many cells share one row.
_interval = lru_cache(maxsize=1024)(wilson)


def possible(candidate: Candidate, budget: Budget) -> bool:
    """Whether the cell might meet every limit: cheap, and never False for one that does."""
    cell = candidate.cell
    if budget.memory_bytes is not None and not _within(cell.memory_bytes, budget.memory_bytes):
        return False
    if budget.energy_j is not None and not _within(cell.energy_j, budget.energy_j):
        return False
    if budget.size_bytes is not None and candidate.artifact.size_bytes > budget.size_bytes:
        return False
    if budget.min_top1 is not None and (
        candidate.accuracy is None or candidate.top1_at_least(budget.confidence) < budget.min_top1
    ):
        return False
    samples = cell.latency_s
    for limit in budget.latency:
        # No dependence and no spread would make the bound any lower than this; of too few samples it is the slowest.
        most = allowed_misses(len(samples), limit.percentile, budget.confidence) or 0
        if max(samples) > limit.limit_s and _more_over(samples, limit.limit_s, most):
            return False
    return True


def _within(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _more_over(samples: tuple[float, ...], limit_s: float, most: int) -> bool:
    """Whether more than `most` samples are over a limit; where many are, soon known."""
    over = 0
    for value in samples:
        if value > limit_s:
            over += 1
            if over > most:
                return True
    return False


def hopeless(candidate: Candidate, budget: Budget) -> bool:
    """Whether the cell surely misses a limit: cheap, and never True for one that is met or open."""
    return any(_all_over(candidate, limit, budget.confidence) for limit in budget.latency)


def too_few(candidate: Candidate, budget: Budget) -> bool:
    """Whether not even calls that are all as fast as the fastest would make the throughput."""
    wanted = budget.throughput_per_s
    return wanted is not None and candidate.in_flight / min(candidate.cell.latency_s) < wanted


def checks(candidate: Candidate, budget: Budget) -> Iterator[Check]:
    """Every limit of the budget, judged."""
    cell, artifact = candidate.cell, candidate.artifact
    for limit in budget.latency:
        yield _latency(candidate, limit, budget.confidence)
    if budget.throughput_per_s is not None:
        yield _throughput(candidate, budget.throughput_per_s, budget.confidence)
    if budget.memory_bytes is not None:
        yield _amount("memory", cell.memory_bytes, budget.memory_bytes, show_bytes)
    if budget.energy_j is not None:
        yield _amount("energy", cell.energy_j, budget.energy_j, "{:.3g} J".format)
    if budget.size_bytes is not None:
        yield _amount("size", artifact.size_bytes, budget.size_bytes, show_bytes)
    if budget.min_top1 is not None:
        yield _floor(candidate.accuracy, budget.min_top1, budget.confidence)


def combined(found: list[Check]) -> Status:
    """Met where all are, missed where one is, else open."""
    if any(check.status == "missed" for check in found):
        return "missed"
    return "open" if any(check.status == "open" for check in found) else "met"


def _all_over(candidate: Candidate, limit: LatencyLimit, confidence: float) -> bool:
    """Whether every call was over the limit, which is proof enough however dependent they are.

    Were the percentile within the limit, already the first call would be over it with no more than the probability
    that the confidence leaves for an error.
    """
    samples = candidate.cell.latency_s
    return 1 - limit.percentile <= 1 - confidence + 1e-9 and min(samples) > limit.limit_s


def _latency(candidate: Candidate, limit: LatencyLimit, confidence: float) -> Check:
    samples, name = candidate.cell.latency_s, limit.name
    excess = candidate.estimate_s(limit.percentile) / limit.limit_s
    most = f"over {show_seconds(limit.limit_s)}"
    if _all_over(candidate, limit, confidence):
        fastest = f"the fastest of {len(samples)} calls took {show_seconds(min(samples))}"
        return Check(
            name, "missed", f"{name} {most}: {show_seconds(candidate.estimate_s(limit.percentile))}, {fastest}", excess
        )
    found = candidate.bounds(limit.percentile, confidence)
    if found.upper is not None and found.upper <= limit.limit_s:
        return Check(name, "met", f"{name} at most {show_at_most(found.upper)}", found.upper / limit.limit_s)
    if found.lower is not None and found.lower > limit.limit_s:
        shown = f"{show_seconds(found.estimate)}, at least {show_seconds(found.lower)}"
        return Check(name, "missed", f"{name} {most}: {shown}", excess)
    return _open(candidate, limit, found, confidence)


def _open(candidate: Candidate, limit: LatencyLimit, found: Bounds, confidence: float) -> Check:
    """A percentile that may be on either side of its limit."""
    samples, name = candidate.cell.latency_s, limit.name
    over = sum(value > limit.limit_s for value in samples)
    text = f"{name} {show_seconds(found.estimate)}, {over} of {len(samples)} calls over {show_seconds(limit.limit_s)}"
    excess = (found.upper or found.estimate) / limit.limit_s
    if found.why_not is not None:
        text += f"; {found.why_not}"
    elif found.upper is not None:
        text += f"; with {show_confidence(confidence)} confidence no more than {show_at_most(found.upper)}"
    if found.spread:
        text += f" (processes differ by {show_percent(found.spread)})"
    return Check(name, "open", text, excess, _more(found, over / len(samples), confidence))


def _more(found: Bounds, share: float, confidence: float) -> int | None:
    """How many more samples would settle it if as many of them were slow; None where they would not."""
    tail = 1 - found.level
    # 1 - 0.95 is a little more than 0.05: the last bit must not promise an answer after 1e30 samples.
    if share > tail - 1e-9:
        return None
    # The binomial distribution of so many is normal, and counting them exactly would take minutes.
    needed = math.ceil((normal_quantile(confidence) / (tail - share)) ** 2 * tail * found.level)
    if needed <= MOST_COUNTED:
        misses, needed = 0, samples_needed(found.level, confidence)
        while share * needed > misses:
            misses += max(1, misses // 8)
            needed = samples_needed(found.level, confidence, misses)
    more = math.ceil(needed * found.n / found.n_effective) - found.n
    # Enough samples, too few processes: their spread is known no better than twice as many of them would tell.
    return more if more > 0 else found.n


def _throughput(candidate: Candidate, limit: float, confidence: float) -> Check:
    cell, images = candidate.cell, candidate.in_flight
    found = mean_bounds(cell.latency_s, cell.process, confidence)
    # Little's law: what is in flight over how long it is.
    rate = images / candidate.mean_s
    text, excess = f"throughput {rate:.3g}/s", limit / rate
    if found is None:
        return Check("throughput", "open", f"{text}, from one process", excess, len(cell.latency_s))
    fastest = images / found[0] if found[0] > 0 else math.inf
    slowest = images / found[1]
    if slowest >= limit:
        return Check("throughput", "met", f"{text}, at least {slowest:.3g}/s", excess)
    if fastest < limit:
        return Check("throughput", "missed", f"{text}, at most {fastest:.3g}/s, below {limit:.3g}/s", excess)
    return Check("throughput", "open", f"{text}, {slowest:.3g} to {fastest:.3g}/s", excess, len(cell.latency_s))


def _amount(name: str, value: float | None, limit: float, show: Callable[[float], str]) -> Check:
    if value is None:
        return Check(name, "missed", f"{name} was not measured", math.inf)
    status: Status = "met" if value <= limit else "missed"
    relation = "within" if status == "met" else "over"
    excess = value / limit if limit > 0 else math.inf
    return Check(name, status, f"{name} {show(value)}, {relation} {show(limit)}", excess)


def _floor(accuracy: AccuracyRow | None, floor: float, confidence: float) -> Check:
    if accuracy is None:
        return Check("top-1", "missed", "no accuracy measured of these weights", math.inf)
    lower, upper = _interval(accuracy.correct, accuracy.n, confidence)
    interval = f"{show_percent(lower)} .. {show_percent(upper)}"
    text, excess = f"top-1 {show_percent(accuracy.top1)} ({interval})", (1 - lower) / max(1e-9, 1 - floor)
    if lower >= floor:
        return Check("top-1", "met", text, excess)
    if upper < floor:
        return Check("top-1", "missed", f"{text}, below {show_percent(floor)}", excess)
    text += f", not surely {show_percent(floor)} on {accuracy.n} images"
    return Check("top-1", "open", text, excess)
