"""Our own processes: which they are, and how much processor time they took, so that the rest is others'."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hydradeploy.devices.linux import descendants, tree_busy_s
from hydradeploy.devices.reading import Tree

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LOOKS = 3


@dataclass
class Family:
    """A process and all that come from it; `numbers` and `busy_s` are those of the last look.

    `busy_s` are processor seconds with those of children that have ended and were waited for, None where they cannot
    be read.
    """

    pid: int
    tree: Tree = field(default_factory=Tree)
    numbers: frozenset[int] = frozenset()
    busy_s: float | None = None

    def look(self) -> None:
        """Look again. A process that ends meanwhile is counted neither as living nor as ended: then look once more."""
        for _ in range(_LOOKS):
            before = self.busy_s or 0.0
            self.numbers, self.busy_s = self._walked() or self._listed()
            if self.busy_s is None or self.busy_s >= before:
                return

    def _walked(self) -> tuple[frozenset[int], float] | None:
        """From parent to children: a tenth of the time that it takes to list all processes, but not on every kernel.

        The parent comes first, so that nobody is counted twice.
        """
        found: dict[int, float] = {}
        waiting = [self.pid]
        while waiting:
            pid = waiting.pop()
            _, closing, rest = (self.tree.text(f"proc/{pid}/stat") or "").rpartition(")")
            tasks = self._tasks(pid)
            if not closing or not tasks:  # ended since
                if pid == self.pid:
                    return None
                continue
            found[pid] = sum(map(int, rest.split()[11:15])) / _TICKS_PER_S
            children = [self.tree.text(f"proc/{pid}/task/{task}/children") for task in tasks]
            if pid == self.pid and all(text is None for text in children):
                return None
            waiting += [int(child) for text in children for child in (text or "").split()]
        return frozenset(found), sum(found.values())

    def _tasks(self, pid: int) -> list[str]:
        try:
            return os.listdir(self.tree.path(f"proc/{pid}/task"))
        except OSError:
            return []

    def _listed(self) -> tuple[frozenset[int], float | None]:
        return frozenset({self.pid, *descendants(self.tree, self.pid)}), tree_busy_s(self.tree, self.pid)
