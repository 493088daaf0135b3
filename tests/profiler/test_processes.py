"""Our own processes' time, on process trees that are made up and change while they are looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hydradeploy.devices.reading import Tree
from hydradeploy.profiler.processes import Family

TICKS = 100


@dataclass(frozen=True)
class Proc:
    """A /proc of processes: number, parent, and seconds of its own and of its children that have ended."""

    root: Path
    listed: bool = True

    def __call__(self, *processes: tuple[int, int, float, float]) -> None:
        for old in sorted(self.root.glob("proc/**/*"), reverse=True):
            old.rmdir() if old.is_dir() else old.unlink()
        for pid, parent, own_s, ended_s in processes:
            task = self.root / f"proc/{pid}/task/{pid}"
            task.mkdir(parents=True)
            times = f"{own_s * TICKS / 2:.0f} {own_s * TICKS / 2:.0f} {ended_s * TICKS:.0f} 0"
            (task.parents[1] / "stat").write_text(
                f"{pid} (a ) b) S {parent} 1 1 0 -1 0 1 2 3 4 {times} 20 0 1 0 99 1 2"
            )
            if self.listed:
                (task / "children").write_text(" ".join(str(p) for p, mother, _, _ in processes if mother == pid))


@pytest.fixture(params=[True, False], ids=["children listed", "no lists of children"])
def proc(request, tmp_path) -> Proc:
    return Proc(tmp_path, request.param)


def test_a_family_is_a_process_and_all_that_come_from_it(proc):
    proc((1, 0, 500, 600), (10, 1, 2, 3), (11, 10, 5, 0), (12, 11, 7, 0.5), (13, 10, 0, 0), (20, 1, 100, 0))
    family = Family(10, Tree(proc.root))
    family.look()
    assert family.numbers == {10, 11, 12, 13}
    assert family.busy_s == pytest.approx(2 + 3 + 5 + 7 + 0.5)


def test_a_child_that_has_ended_counts_with_its_parent(proc):
    family = Family(10, Tree(proc.root))
    for processes in (((10, 1, 2, 0), (11, 10, 5, 0)), ((10, 1, 2, 5),)):
        proc(*processes)
        family.look()
        assert family.busy_s == pytest.approx(7)
    assert family.numbers == {10}


def test_a_process_that_is_not_there_has_no_time(proc):
    proc((1, 0, 500, 600))
    family = Family(10, Tree(proc.root))
    family.look()
    assert family.busy_s is None


@dataclass(frozen=True)
class Changing(Tree):
    """Something happens when the first process has been looked at."""

    happens: list[Callable[[], None]] = field(default_factory=list)

    def text(self, name: str | Path) -> str | None:
        found = super().text(name)
        if str(name).endswith("10/task/10/children") and self.happens:
            self.happens.pop()()
        return found


def test_a_child_that_ends_while_it_is_looked_for_is_not_lost(tmp_path):
    """When the parent was looked at, it had not waited; when the child is looked for, it is gone."""
    proc = Proc(tmp_path)
    proc((10, 1, 2, 0), (11, 10, 5, 0))
    tree = Changing(tmp_path)
    family = Family(10, tree)
    family.look()
    tree.happens.append(lambda: proc((10, 1, 2, 5)))
    family.look()
    assert not tree.happens
    assert family.busy_s == pytest.approx(7)


def test_what_an_orphan_took_may_be_lost_for_good(tmp_path):
    proc = Proc(tmp_path)
    family = Family(10, Tree(tmp_path))
    for processes, busy_s in ((((10, 1, 2, 0), (11, 10, 5, 0)), 7), (((10, 1, 2.5, 0),), 2.5), (((10, 1, 3, 0),), 3)):
        proc(*processes)
        family.look()
        assert family.busy_s == pytest.approx(busy_s)
