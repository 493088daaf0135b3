"""What control groups grant this process of processor and memory, and what they withheld; version 1, 2 or both."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hydradeploy.devices.reading import Tree, field_of

# Version 1 is mounted under the names of its controllers, some systems linking the short name to the long one.
_MOUNTS = {"cpu": ("cpu,cpuacct", "cpuacct,cpu", "cpu"), "memory": ("memory",)}
_MOUNTS_OF_2 = ("unified",)
_CPU_MAX = re.compile("([0-9]{1,20}) ([0-9]{1,20})")


def cpu_groups(tree: Tree) -> tuple[Path, ...]:
    """The directories that may limit the processor."""
    return _groups(tree, "cpu")


def memory_left_bytes(tree: Tree) -> int | None:
    """What the tightest limit of memory leaves, with what can be given up at once; None for no limit."""
    told = [_left(tree, group) for group in _groups(tree, "memory")]
    return min((left for left in told if left is not None), default=None)


def _groups(tree: Tree, controller: str) -> tuple[Path, ...]:
    """The directories of this process's own group and of all above it, each of which may have a limit.

    Some may not exist: a container may see the path that its host gives the group, and have its limit at the root.
    """
    found: dict[Path, None] = {}
    for line in (tree.text("proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if not colon or not (number == "0" if not controllers else controller in controllers.split(",")):
            continue
        top = _mounted(tree, _MOUNTS[controller] if controllers else _MOUNTS_OF_2)
        parts = [part for part in group.split("/") if part]
        # Beside this namespace, not below it.
        below = [] if ".." in parts else parts
        found.update((top.joinpath(*below[:depth]), None) for depth in range(len(below), -1, -1))
    return tuple(found)


def quota_cores(tree: Tree, groups: Iterable[Path]) -> float | None:
    """The tightest limit among groups, in cores; None for no limit."""
    return min((cores for group in groups if (cores := _quota(tree, group)) is not None), default=None)


def throttled(tree: Tree, groups: Iterable[Path]) -> dict[str, float]:
    """Periods in which a quota stopped processes, and the processor seconds that took, as the counters of a reading.

    Each group counts what its own quota stopped and not what one above it did, so they add up.
    """
    found: dict[str, float] = {}
    for group in groups:
        text = tree.text(group / "cpu.stat")
        for name, key, unit in (
            ("cgroup_throttled", "nr_throttled", 1.0),
            ("cgroup_throttled_s", "throttled_usec", 1e-6),
            ("cgroup_throttled_s", "throttled_time", 1e-9),
        ):
            value = field_of(text, key)
            if value is not None:
                found[name] = found.get(name, 0.0) + value * unit
    return found


def _mounted(tree: Tree, names: Iterable[str]) -> Path:
    top = tree.path("sys/fs/cgroup")
    return next((top / name for name in names if os.path.isdir(top / name)), top)


def _left(tree: Tree, group: Path) -> int | None:
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, taken = tree.number(group / limit), tree.number(group / used)
        if most is not None and taken is not None:
            return max(0, most - taken + (field_of(tree.text(group / "memory.stat"), cache) or 0))
    return None


def _quota(tree: Tree, group: Path) -> float | None:
    unified = _CPU_MAX.fullmatch(tree.text(group / "cpu.max") or "")
    if unified:
        quota, period = map(int, unified.groups())
    else:
        quota, period = (tree.number(group / f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
    return quota / period if min(quota, period) > 0 else None
