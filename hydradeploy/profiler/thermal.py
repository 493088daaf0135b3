"""Whether a device is as warm as it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydradeploy.devices.reading import Reading

# A heat sink answers within minutes; a degree is what most sensors resolve.
WINDOW_S = 60.0
WITHIN_C = 1.0
_ASK_S = 5.0


def settled(readings: Sequence[Reading], window_s: float = WINDOW_S) -> bool:
    """Whether no temperature has moved by more than a degree in a window that these readings cover.

    True where there is no thermometer: then latencies alone must tell.
    """
    zones: dict[str, list[float]] = {}
    for reading in readings:
        for name, value in reading.gauges.items():
            if name.startswith("temperature_c."):
                zones.setdefault(name, []).append(value)
    if not zones:
        return True
    covered = readings[-1].at_s - readings[0].at_s >= window_s
    return covered and all(max(values) - min(values) <= WITHIN_C for values in zones.values())


@dataclass
class Settling:
    """Asks a monitor now and then, because asking costs the parent time."""

    between: Callable[[float, float], Sequence[Reading]]
    clock: Callable[[], float]
    _asked_s: float = float("-inf")

    def __call__(self) -> bool:
        """Whether temperatures have settled; False also where it was asked a moment ago."""
        now = self.clock()
        if now - self._asked_s < _ASK_S:
            return False
        self._asked_s = now
        return settled(self.between(now - WINDOW_S, now))
