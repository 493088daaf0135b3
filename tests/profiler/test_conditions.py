"""Conditions that are really there: another program on the cores, and a quota of processor time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hydradeploy.devices import machine
from hydradeploy.devices.cgroups import cpu_groups
from hydradeploy.devices.reading import Tree
from hydradeploy.profiler.flags import evidence, judge
from hydradeploy.profiler.monitor import watching
from tests.conftest import missing

ROOT = Path(__file__).parents[2]
CORES = os.cpu_count() or 1
SPIN = "import sys, time; until = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < until: pass"
WORK = "import sys, time\nwhile time.process_time() < float(sys.argv[1]): pass"
QUOTA_CORES = 0.1
PERIOD_US = 50_000


def spinning(seconds: float) -> list[str]:
    return [sys.executable, "-c", SPIN, str(seconds)]


@contextmanager
def foreign(command: list[str]) -> Iterator[None]:
    """Runs it as somebody else's: whoever started it has ended, so that it does not come from this process."""
    quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    script = f"import subprocess; print(subprocess.Popen({command!r}, {quiet}).pid)"
    pid = int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)


def test_a_program_on_the_other_core_contends():
    """Whatever else runs here only adds to it; where there is one core, it takes half."""
    with watching("cpu") as watch, foreign(spinning(60)):
        time.sleep(0.3)
        started = time.monotonic()
        subprocess.run(spinning(1.5), check=True)
        ended = time.monotonic()
        found = evidence(watch.between(started, ended), started, ended)
    assert found["foreign_cores"] > 0.3
    flags = dict(judge([found], cores=CORES))
    assert flags["contended"] == (
        f"contended: other programs kept {found['foreign_cores']:.2f} cores busy in 1 of 1 process"
    )


def test_our_own_work_is_not_foreign():
    """On every core one of ours, for as long as it takes on a busy machine: others had what ours did not."""
    with watching("cpu") as watch:
        started = time.monotonic()
        ours = [subprocess.Popen([sys.executable, "-c", WORK, "0.7"]) for _ in range(CORES)]
        for process in ours:
            assert process.wait() == 0
        ended = time.monotonic()
        readings = watch.between(started, ended)
    found = evidence(readings, started, ended)
    taken_s = readings[-1].counters["ours_s"] - readings[0].counters["ours_s"]
    assert taken_s > 0.65 * CORES
    assert found["foreign_cores"] * found["watched_s"] + taken_s < 1.1 * CORES * found["watched_s"]


@dataclass(frozen=True)
class Group:
    """A control group of the cpu controller below our own, and what to write where for a limit."""

    path: Path

    @property
    def limits(self) -> dict[str, str]:
        quota_us = f"{QUOTA_CORES * PERIOD_US:.0f}"
        if (self.path / "cpu.max").exists():
            return {"cpu.max": f"{quota_us} {PERIOD_US}"}
        return {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": quota_us}


@contextmanager
def grouped() -> Iterator[Group]:
    """A group that processes can be moved to and that can be limited; skips where the kernel forbids it."""
    reasons = []
    for above in cpu_groups(Tree()):
        path = above / f"hydradeploy-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError as error:
            reasons.append(f"{above}: {error.strerror}")
            continue
        try:
            if reason := refusal(Group(path)):
                reasons.append(reason)
                continue
            yield Group(path)
            return
        finally:
            removed(path)
    missing("cgroup", f"no quota can be set ({'; '.join(reasons) or 'no group of the cpu controller'})")


def refusal(group: Group) -> str | None:
    """Why it cannot be used, tried out with a process that does nothing."""
    try:
        for name in group.limits:
            os.close(os.open(group.path / name, os.O_WRONLY))
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as idle:
            (group.path / "cgroup.procs").write_text(str(idle.pid))
    except OSError as error:
        return f"{group.path}: {error.strerror}"
    return None


def removed(group: Path) -> None:
    """A group can be removed only when its last process is gone."""
    for _ in range(100):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


LIMITED = """
import json, pathlib, subprocess, sys, time
from hydradeploy.devices import machine
from hydradeploy.profiler.flags import evidence
from hydradeploy.profiler.monitor import watching
group, limits = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
(group / "cgroup.procs").write_text("0")
with watching("cpu") as watch:
    for name, value in limits.items():
        (group / name).write_text(value)
    granted = machine("cpu").conditions({}).quota_cores
    started = time.monotonic()
    subprocess.run(sys.argv[3:], check=True)
    ended = time.monotonic()
    found = evidence(watch.between(started, ended), started, ended)
print(json.dumps([found, granted]))
"""


def test_a_quota_of_processor_time_throttles():
    """The process that measures is in the limited group, and so are its child, which wants a core, and the monitor."""
    with grouped() as group:
        ran = subprocess.run(
            [sys.executable, "-c", LIMITED, group.path, json.dumps(group.limits), sys.executable, "-c", WORK, "0.2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert ran.returncode == 0, ran.stderr
    found, granted = json.loads(ran.stdout)
    assert granted == pytest.approx(QUOTA_CORES)
    assert found["cgroup_throttled"] >= 3
    assert found["cgroup_throttled_s"] > 0.05
    flags = dict(judge([found], cores=CORES))
    assert flags["throttled"] == (
        f"throttled: a quota of processor time ran out {found['cgroup_throttled']:.0f} times in 1 of 1 process"
    )


def test_where_no_quota_limits_us_none_ran_out():
    with watching("cpu") as watch:
        started = time.monotonic()
        time.sleep(0.5)
        ended = time.monotonic()
        found = evidence(watch.between(started, ended), started, ended)
    assert {"watched_s", "foreign_cores"} <= found.keys()
    if machine("cpu").conditions({}).quota_cores is not None:
        missing("cgroup", "there is a quota here")
    assert found.get("cgroup_throttled", 0) == 0
