"""Joules per image, from the readings of a meter: a counter where there is one, else a gauge of power over time.

What the device takes when idle is subtracted, so that a figure is of the inferences and not of the board. Calls go on
for as long as the meter needs (`window_s`); a shorter window has no figure, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hydradeploy.devices.reading import Reading

# A counter moves every 20 to 100 ms: over a shorter window, where it stands between two steps is a tenth of the figure.
SHORTEST_S = 1.0
FEWEST_POWERS = 5

_Points = Sequence[tuple[float, float]]


class Metered(NamedTuple):
    """A figure, or why there is none; one of the two is None."""

    value: float | None
    why_not: str | None


def energy_j(
    readings: Sequence[Reading], started_s: float, ended_s: float, idle_w: float | None, images: int
) -> Metered:
    """Joules per image in a window of the monotonic clock beyond idling at `idle_w` watts.

    A result of 0 or below is none: then the meter, or what it was idle with, cannot resolve the load.
    """
    if idle_w is None:
        return Metered(None, "the power when idle is not known")
    if images < 1:
        return Metered(None, "no images")
    power, why_not = mean_power_w(readings, started_s, ended_s)
    if power is None:
        return Metered(None, why_not)
    if power <= idle_w:
        return Metered(None, f"not above idle: {power:.2f} W while measuring, {idle_w:.2f} W before")
    return Metered((power - idle_w) * (ended_s - started_s) / images, None)


def window_s(interval_s: float) -> float:
    """How long a window has to be for a figure, of a meter that is read every so many seconds; one reading of the
    fewest may come late."""
    return max(SHORTEST_S, FEWEST_POWERS * interval_s) + interval_s


def idle_power_w(readings: Sequence[Reading]) -> Metered:
    """Mean power over all of these readings, taken while nothing runs."""
    if not readings:
        return Metered(None, "no readings")
    return mean_power_w(readings, readings[0].at_s, readings[-1].at_s)


def mean_power_w(readings: Sequence[Reading], started_s: float, ended_s: float) -> Metered:
    """Mean power in a window, from the counter `energy_j`, else from the gauge `power_w`."""
    length = ended_s - started_s
    counted = [(reading.at_s, reading.counters["energy_j"]) for reading in readings if "energy_j" in reading.counters]
    powers = [(reading.at_s, reading.gauges["power_w"]) for reading in readings if "power_w" in reading.gauges]
    if not counted and not powers:
        return Metered(None, "no meter was read")
    if length < SHORTEST_S:
        return Metered(None, f"{length:.2f} s are too short for a meter, it takes {SHORTEST_S:g} s")
    if counted:
        return _from_counter(counted, started_s, ended_s)
    within = sum(started_s <= at_s <= ended_s for at_s, _ in powers)
    if within < FEWEST_POWERS:
        return Metered(None, f"{within} readings of power in the window, it takes {FEWEST_POWERS}")
    return Metered(_integral(powers, started_s, ended_s) / length, None)


def _from_counter(counted: _Points, started_s: float, ended_s: float) -> Metered:
    if counted[0][0] > started_s or counted[-1][0] < ended_s:
        return Metered(None, "the meter was not read on both sides of the window")
    if any(later < earlier for (_, earlier), (_, later) in pairwise(counted)):
        return Metered(None, "the meter's counter began anew")
    return Metered((_at(counted, ended_s) - _at(counted, started_s)) / (ended_s - started_s), None)


def _integral(points: _Points, started_s: float, ended_s: float) -> float:
    """By trapezoids, from edge to edge of the window."""
    inner = [point for point in points if started_s < point[0] < ended_s]
    whole = [(started_s, _at(points, started_s)), *inner, (ended_s, _at(points, ended_s))]
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(whole))


def _at(points: _Points, at_s: float) -> float:
    """The value at a moment, on the line between its neighbours; beyond the ends, that of the end."""
    before = [point for point in points if point[0] <= at_s]
    after = [point for point in points if point[0] >= at_s]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (a, x), (b, y) = before[-1], after[0]
    return x if a == b else x + (y - x) * (at_s - a) / (b - a)
