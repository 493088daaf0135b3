"""What sensors say at one moment, and the small files they say it in.

Names are `quantity.what`, in SI units. A value that cannot be read is missing, with a reason, and never 0.

    gauges                           counters, since boot
    clock_hz.WHAT                    busy_s, steal_s         processor seconds, of all cores together
    pinned_hz.WHAT                   cgroup_throttled_s, cgroup_throttled   by a quota: seconds and periods
    temperature_c.ZONE               throttle_events.SIGN    the device slowed down to protect itself
    power_w.RAIL, power_w            overcurrent_events.SIGN short peaks; many of them slow a device down
    load.WHAT (0 to 1)               swapped_pages
    load_average                     oom_kills               processes killed for want of memory
    throttling.SIGN (above 0: now)   energy_j                what `Machine.meter` names
    available_bytes
    foreign_processes.WHAT           processes of others on an accelerator

`pinned_hz.WHAT` is the clock that `clock_hz.WHAT` should not fall below. The profiler's monitor adds a counter of its
own, `ours_s`: processor seconds of its family.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from hydradeploy.spec import Record

# No more digits than 64 bits have: longer ones are garbage, and would overflow a float.
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(?!\S)")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESRCH)
_REASONS = {errno.EACCES: "no permission", errno.EPERM: "no permission", errno.EAGAIN: "the sensor is off"}


class Reading(Record, frozen=True, kw_only=True):
    """Every sensor that answered. `at_s` is on the monotonic clock, which all processes of a machine share."""

    at_s: float
    gauges: dict[str, float]
    counters: dict[str, float]


@dataclass(frozen=True)
class Tree:
    """Small files below a root, so that a recorded tree stands for a device; `problems` says why a read gave nothing.

    A file that is not there is no problem: which files exist is how devices differ, and processes end.
    """

    root: Path = Path("/")
    problems: dict[str, str] = field(default_factory=dict, compare=False)

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def glob(self, pattern: str) -> list[Path]:
        """Sorted as people count: cooling_device2 before cooling_device10; empty where nothing can be listed."""

        def key(path: Path) -> list[tuple[bool, int, str]]:
            parts = re.split(r"(\d+)", str(path))
            return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

        try:
            return sorted(self.root.glob(pattern.lstrip("/")), key=key)
        except OSError:
            return []

    def text(self, name: str | Path) -> str | None:
        """The stripped content, None where it cannot be read."""
        path = self.path(name) if isinstance(name, str) else name
        try:
            return _content(path).decode("utf-8", "replace").strip("\0\n\t ")
        except OSError as error:
            if error.errno not in _GONE:
                reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
                self.problems[self.shown(path)] = reason
        except ValueError as error:  # a path with a NUL in it, from another file
            self.problems[repr(path)] = str(error)
        return None

    def number(self, name: str | Path) -> int | None:
        """The leading whole number; some kernels add a unit, as in `32760 ma`."""
        found = _NUMBER.match(self.text(name) or "")
        return int(found[0]) if found else None

    def shown(self, path: Path) -> str:
        """The path as it is on the device itself."""
        return "/" + os.path.relpath(path, self.root)


def field_of(text: str | None, name: str) -> int | None:
    """The number in the line `name 12` or `name: 12 kB` of a file such as /proc/vmstat; None without one."""
    found = re.search(rf"^{re.escape(name)}:?[ \t]+([0-9]{{1,20}})(?!\S)", text or "", re.MULTILINE)
    return int(found[1]) if found else None


def _content(path: Path) -> bytes:
    """The bytes of a file, without Python's file objects: those make None or a TypeError of EAGAIN, and take longer."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(file, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(file)
