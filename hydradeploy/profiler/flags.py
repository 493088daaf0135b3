"""What readings say about a measurement: numbers of each process, and flags with the numbers they stand on.

    throttled         the device or a quota slowed it down         refuses a cell
    contended         others used what was being measured          refuses a cell
    graph-failed      calls ran without the CUDA graph asked for   refuses a cell
    noisy             processes differ, or were never steady       a remark
    floating-clocks   clocks were free to move                     a remark

A quantity that was not read is absent from the numbers, and never 0; what is absent raises no flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from hydradeploy.devices.reading import Reading
from hydradeploy.stats.basics import mean

# Kernels count processor time in steps of 10 ms per core and kind of time: shares of shorter stretches are noise.
SHORTEST_S = 0.3
# A load on others' account is the worst of stretches this long, so that a long run does not water down a short burst.
STRETCH_S = 5.0

FOREIGN_CORES = 0.1
FOREIGN_SHARE = 0.05
STEAL_CORES = 0.05
# What rounding to steps of the kernel's clock adds up to, in processor seconds.
STEPS_S = 0.03
SWAPPED_PAGES = 16
OVERCURRENTS_PER_S = 20.0
SHORTFALL = 0.03
SPREAD = 0.10

Numbers = Mapping[str, float]


def _foreign_limit(numbers: Numbers, cores: int) -> float:
    return max(FOREIGN_CORES, FOREIGN_SHARE * cores) + STEPS_S / numbers["watched_s"]


def _steal_limit(numbers: Numbers, cores: int) -> float:
    return STEAL_CORES + STEPS_S / numbers["watched_s"]


# Flag, kind of number, the most there may be, and what is said of the worst one. Bursts of over-current are ordinary on
# a Jetson at 1 or 2 per second, each of 1 ms; a quota that was hit, or a sign of protection, is not.
_RULES: tuple[tuple[str, str, float | Callable[[Numbers, int], float], str], ...] = (
    ("throttled", "throttle_events", 0, "the device slowed down to protect itself, {what} rose by {worst:g},"),
    ("throttled", "throttling", 0, "the device was slowing down to protect itself, by {what},"),
    ("throttled", "cgroup_throttled", 0, "a quota of processor time ran out {worst:.0f} times"),
    (
        "throttled",
        "overcurrent_per_s",
        OVERCURRENTS_PER_S,
        "over-current {what} slowed it down {worst:.0f} times a second",
    ),
    ("throttled", "clock_shortfall", SHORTFALL, "the {what} clock was {worst:.0%} below where it is pinned"),
    ("contended", "foreign_cores", _foreign_limit, "other programs kept {worst:.2f} cores busy"),
    ("contended", "steal_cores", _steal_limit, "the host of this virtual machine took {worst:.2f} cores away"),
    ("contended", "swapped_pages", SWAPPED_PAGES, "the machine swapped {worst:.0f} pages"),
    ("contended", "foreign_processes", 0, "other programs had up to {worst:.0f} processes on {what}"),
)


class Flag(NamedTuple):
    """What was wrong with a measurement, and one sentence with its evidence."""

    name: str
    remark: str


def evidence(readings: Sequence[Reading], started_s: float, ended_s: float) -> dict[str, float]:
    """The numbers of one process, whose samples were taken in this window of the monotonic clock.

    Counters are compared over the `watched_s` seconds from the last reading before the window to the first one after
    it, and so are peaks and temperatures; clocks and power are those read within.

        watched_s  foreign_cores  steal_cores               cores kept busy, the most in any stretch of 5 s
        cgroup_throttled  cgroup_throttled_s  swapped_pages  throttle_events.SIGN      rises
        overcurrent_per_s.SIGN                               rise per second
        foreign_processes.WHAT  throttling.SIGN              the most
        clock_hz.WHAT.min  pinned_hz.WHAT  power_w           the lowest, the target, the mean
        clock_shortfall.WHAT  clock_shortfall_brief.WHAT     below the pinned clock, as a fraction: in three readings
                                                             in a row, and throughout a window too short for three
        temperature_c.ZONE.start  .max  .end
    """
    span = _span(readings, started_s, ended_s)
    if not span:
        return {}
    within = [reading for reading in span if started_s <= reading.at_s <= ended_s]
    found = {"watched_s": span[-1].at_s - span[0].at_s}
    found |= _loads(span) | _rises(span) | _peaks(span) | _temperatures(span) | _clocks(within)
    powers = _gauge(within, "power_w")
    return found | ({"power_w": mean(powers)} if powers else {})


def judge(
    found: Sequence[Numbers],
    *,
    cores: int,
    clocks: str | None = None,
    spread: float | None = None,
    steady: Sequence[bool | None] = (),
    graphs_failed: Sequence[str | None] = (),
) -> tuple[Flag, ...]:
    """The flags of a cell: what happened to one of its processes has happened to the cell.

    `found` is the evidence of each process in order, `cores` what the machine has, `clocks` as in the conditions,
    `spread` how much processes differ, as a fraction, `steady` whether each one's warm-up ended steadily,
    `graphs_failed` why each one's calls ran without the CUDA graph that was asked for, None where they had it.
    """
    flags = [*_by_rule(found, cores), *_brief_shortfalls(found), *_graphless(graphs_failed)]
    if spread is not None and spread > SPREAD:
        flags.append(Flag("noisy", f"noisy: processes differ by {spread:.0%}"))
    if 2 * (unsteady := steady.count(False)) > len(steady):
        flags.append(Flag("noisy", f"noisy: warm-up ended unsteadily in {_of(unsteady, len(steady))}"))
    if clocks == "floating":
        flags.append(Flag("floating-clocks", "floating-clocks: nothing kept the clocks where they were"))
    return tuple(flags)


def _span(readings: Sequence[Reading], started_s: float, ended_s: float) -> list[Reading]:
    before = max((reading.at_s for reading in readings if reading.at_s <= started_s), default=started_s)
    after = min((reading.at_s for reading in readings if reading.at_s >= ended_s), default=ended_s)
    return [reading for reading in readings if before <= reading.at_s <= after]


def _loads(span: Sequence[Reading]) -> dict[str, float]:
    """Cores that others kept busy, and that the host of a virtual machine took away."""
    foreign = [
        (reading.at_s, reading.counters["busy_s"] - reading.counters["ours_s"])
        for reading in span
        if {"busy_s", "ours_s"} <= reading.counters.keys()
    ]
    stolen = [(reading.at_s, reading.counters["steal_s"]) for reading in span if "steal_s" in reading.counters]
    worst = {"foreign_cores": _worst(foreign), "steal_cores": _worst(stolen)}
    return {name: max(0.0, value) for name, value in worst.items() if value is not None}


def _worst(points: Sequence[tuple[float, float]]) -> float | None:
    """The largest rise per second in any stretch; None where all of it is too short to tell."""
    if not points or points[-1][0] - points[0][0] < SHORTEST_S:
        return None
    cuts = [points[0]]
    for point in points:
        if point[0] - cuts[-1][0] >= STRETCH_S:
            cuts.append(point)
    # What is left over is no stretch of its own.
    cuts = [*cuts[: max(1, len(cuts) - 1)], points[-1]]
    return max((value - before) / (at_s - then) for (then, before), (at_s, value) in pairwise(cuts))


def _rises(span: Sequence[Reading]) -> dict[str, float]:
    """What counters of events rose by; one that fell began anew and says nothing."""
    found = {}
    for name in _names(reading.counters for reading in span):
        values = [(reading.at_s, reading.counters[name]) for reading in span if name in reading.counters]
        length, rise = values[-1][0] - values[0][0], values[-1][1] - values[0][1]
        if length <= 0 or rise < 0:
            continue
        kind, _, what = name.partition(".")
        if kind == "overcurrent_events":
            found[f"overcurrent_per_s.{what}"] = rise / length
        elif kind in ("cgroup_throttled", "cgroup_throttled_s", "swapped_pages", "throttle_events"):
            found[name] = rise
    return found


def _peaks(span: Sequence[Reading]) -> dict[str, float]:
    names = _names(reading.gauges for reading in span)
    return {name: max(_gauge(span, name)) for name in names if name.startswith(("foreign_processes.", "throttling."))}


def _temperatures(span: Sequence[Reading]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in _names(reading.gauges for reading in span):
        if name.startswith("temperature_c."):
            values = _gauge(span, name)
            found |= {f"{name}.start": values[0], f"{name}.max": max(values), f"{name}.end": values[-1]}
    return found


def _clocks(within: Sequence[Reading]) -> dict[str, float]:
    """The lowest clocks, and how far pinned ones stayed below their target."""
    found = {}
    for name in _names(reading.gauges for reading in within):
        kind, _, what = name.partition(".")
        if kind == "clock_hz":
            found[f"{name}.min"] = min(_gauge(within, name))
        elif kind == "pinned_hz":
            found[name] = _gauge(within, name)[-1]
            found |= _shortfall(within, what)
    return found


def _shortfall(within: Sequence[Reading], what: str) -> dict[str, float]:
    spaced: list[tuple[float, float]] = []
    for reading in within:
        clock, pinned = reading.gauges.get(f"clock_hz.{what}"), reading.gauges.get(f"pinned_hz.{what}")
        if clock is not None and pinned and (not spaced or reading.at_s - spaced[-1][0] >= 1.0):
            spaced.append((reading.at_s, max(0.0, 1 - clock / pinned)))
    values = [value for _, value in spaced]
    if len(values) < 3:
        return {f"clock_shortfall_brief.{what}": min(values)} if values else {}
    return {f"clock_shortfall.{what}": _lasting(values)}


def _lasting(values: Sequence[float]) -> float:
    """The most that any three in a row all reach, 0 for fewer than three."""
    return max((min(values[i : i + 3]) for i in range(len(values) - 2)), default=0.0)


def _gauge(readings: Sequence[Reading], name: str) -> list[float]:
    return [reading.gauges[name] for reading in readings if name in reading.gauges]


def _names(values: Iterable[Numbers]) -> list[str]:
    return sorted(set(chain.from_iterable(values)))


def _by_rule(found: Sequence[Numbers], cores: int) -> Iterator[Flag]:
    for flag, kind, limit, words in _RULES:
        for name in _names(found):
            if name.partition(".")[0] != kind:
                continue
            bad = [
                numbers[name]
                for numbers in found
                if name in numbers and numbers[name] > (limit(numbers, cores) if callable(limit) else limit)
            ]
            if bad:
                said = words.format(what=name.partition(".")[2], worst=max(bad))
                yield Flag(flag, f"{flag}: {said} in {_of(len(bad), len(found))}")


def _brief_shortfalls(found: Sequence[Numbers]) -> Iterator[Flag]:
    """Windows too short for three readings of a clock: three of them in a row are as good."""
    for name in _names(found):
        kind, _, what = name.partition(".")
        values = [numbers.get(name, 0.0) for numbers in found]
        worst = _lasting(values)
        if kind == "clock_shortfall_brief" and worst > SHORTFALL:
            said = f"the {what} clock was {worst:.0%} below where it is pinned in three processes in a row"
            yield Flag("throttled", f"throttled: {said}")


def _graphless(failed: Sequence[str | None]) -> Iterator[Flag]:
    reasons = [reason for reason in failed if reason is not None]
    if reasons:
        said = f"calls ran without a CUDA graph in {_of(len(reasons), len(failed))}, as its capture failed"
        yield Flag(
            "graph-failed", f"graph-failed: {said}: {reasons[0]} (--setting graph=off measures that as what it is)"
        )


def _of(count: int, total: int) -> str:
    return f"{count} of {total} process{'es' if total != 1 else ''}"
