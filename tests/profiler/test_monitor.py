"""The monitor's process: what it reads, what it costs, and that it leaves no clock pinned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.devices.reading import Reading
from hydradeploy.errors import MissingError
from hydradeploy.profiler import monitor
from hydradeploy.profiler.monitor import History, Watch, Window, watching
from tests.profiler.readings import latest
from tests.profiler.toys import SOURCE

ROOT = Path(__file__).parents[2]
Make = Callable[..., str]


@pytest.fixture
def toy(tmp_path) -> Make:
    """Makes the kind of a machine that does so."""

    def make(**behaviour: object) -> str:
        (tmp_path / "toy.json").write_text(json.dumps(behaviour))
        return str(tmp_path)

    return make


def comes_true(what: Callable[[], bool], within_s: float = 20.0) -> bool:
    until = time.monotonic() + within_s
    while not what() and time.monotonic() < until:
        time.sleep(0.01)
    return what()


def lives(pid: int) -> bool:
    """Whether a process is there and not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


# ---------------------------------------------------------------- readings


def test_a_window_has_the_readings_in_it_the_last_before_it_and_the_first_after_it(toy):
    with watching(toy(gauges={"clock_hz.toy": 5.0}, counters={"busy_s": 3.0}), source=SOURCE) as watch:
        time.sleep(0.3)
        started = time.monotonic()
        time.sleep(1.2)
        ended = time.monotonic()
        found = watch.between(started, ended)
        assert watch.between(started, ended) == found
        assert watch.why_not is None
    times = [reading.at_s for reading in found]
    assert times == sorted(times)
    assert times[0] <= started < times[1]
    assert times[-2] < ended <= times[-1]
    assert 1 <= len(times) - 2 <= 6
    assert all(reading.gauges == {"clock_hz.toy": 5} and reading.counters["busy_s"] == 3 for reading in found)


def test_the_latest_reading_is_of_now(toy):
    with watching(toy(), source=SOURCE) as watch:
        for _ in range(3):
            before = time.monotonic()
            found = latest(watch)
            assert found is not None
            assert before <= found.at_s <= time.monotonic()


BUSY = """
import time
def work():
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
"""


def test_the_time_our_own_processes_took_is_counted_living_or_ended(toy, tmp_path):
    """A child that works and has a child that works; then both have ended."""
    child = f"{BUSY}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY + 'work()'!r}])\nwork()\n"
    child += "print(flush=True)\nsys.stdin.read()"
    with watching(toy(), source=SOURCE) as watch:
        before = latest(watch)
        with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
            running.stdout.readline()
            during = latest(watch)
            seen = set(map(int, (tmp_path / "reads").read_text().splitlines()[-1].split()))
            assert {os.getpid(), running.pid, watch.process.pid} <= seen
        after = latest(watch)
    assert during.counters["ours_s"] - before.counters["ours_s"] >= 0.58
    assert after.counters["ours_s"] >= during.counters["ours_s"]
    assert after.counters["ours_s"] - before.counters["ours_s"] < 5


@pytest.mark.parametrize(
    ("behaviour", "interval_s"),
    [
        ({}, 0.25),
        ({"gauges": {"power_w": 5.0}}, 0.1),
        ({"gauges": {"power_w": 5.0}, "counters": {"energy_j": 5.0}}, 0.25),
    ],
)
def test_power_that_must_be_integrated_is_read_more_often(toy, behaviour, interval_s):
    with watching(toy(**behaviour), source=SOURCE) as watch:
        assert watch.interval_s == interval_s


def test_what_a_reading_costs_is_measured_and_expensive_ones_are_taken_seldom(toy):
    with watching(toy(reading_s=0.05), source=SOURCE) as watch:
        assert 0.05 <= watch.cost.reading_s < 0.15
        assert watch.interval_s == pytest.approx(watch.cost.reading_s / 0.05)
        assert watch.cost.share == pytest.approx(0.05)


def test_watching_takes_less_than_a_hundredth_of_the_parents_core():
    with watching("cpu") as watch:
        before, started = time.process_time(), time.monotonic()
        time.sleep(1.5)
        found = watch.between(started, time.monotonic())
        taken = time.process_time() - before
    assert len(found) > 3
    assert taken < 0.01 * 1.5


def test_the_monitor_keeps_to_one_core_and_lets_others_go_first(toy):
    with watching(toy(), source=SOURCE) as watch:
        allowed = os.sched_getaffinity(0)
        assert os.getpriority(os.PRIO_PROCESS, watch.process.pid) == 19
        if len(allowed) > 1:
            assert os.sched_getaffinity(watch.process.pid) == {watch.core}
            assert watch.core in allowed


def test_a_child_with_cores_to_spare_can_stay_off_the_monitors_and_another_gives_none_up():
    allowed = os.sched_getaffinity(0)
    watch = Watch(process=None, core=max(allowed))
    assert watch.cores_for(len(allowed)) is None
    assert watch.cores_for(len(allowed) + 1) is None
    assert watch.cores_for(len(allowed) - 1) == (allowed - {max(allowed)} if len(allowed) > 1 else None)
    assert Watch(process=None).cores_for(1) is None


def test_the_monitor_does_without_numpy(toy, tmp_path):
    with watching(toy(), source=SOURCE):
        modules = (tmp_path / "modules").read_text().split()
    assert "hydradeploy.profiler.monitor" in modules
    assert not {"numpy", "hydradeploy.backends", "psutil", "rich", "typer"} & set(modules)


@pytest.mark.parametrize("name", ["select.py", "msgspec.py", "hydradeploy.py"])
def test_a_file_in_the_working_directory_does_not_stand_in_for_a_module(toy, tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path / "work")
    with watching(toy(), source=SOURCE) as watch:
        assert latest(watch) is not None


# ---------------------------------------------------------------- what is kept


def reading_at(at_s: float) -> Reading:
    return Reading(at_s=at_s, gauges={"x": at_s}, counters={})


@given(st.integers(1, 400), st.floats(-5, 450), st.floats(-5, 450))
def test_what_is_kept_is_bounded_and_answers_with_one_reading_on_each_side(count, one, other):
    history = History(kept=64)
    for number in range(count):
        history.add(reading_at(float(number)))
        assert len(history.lines) <= 64
    kept = [at_s for at_s, _ in history.lines]
    started, ended = sorted((one, other))
    answer = msgspec.json.decode(history.between(Window(started_s=started, ended_s=ended)), type=list[Reading])
    inside = [at_s for at_s in kept if started < at_s < ended]
    before = [at_s for at_s in kept if at_s <= started][-1:]
    after = [at_s for at_s in kept if at_s >= ended][:1]
    assert [reading.at_s for reading in answer] == list(dict.fromkeys([*before, *inside, *after]))
    assert all(reading == reading_at(reading.at_s) for reading in answer)


def test_old_readings_are_thinned_out_and_new_ones_are_not():
    history = History(kept=64)
    for number in range(10_000):
        history.add(reading_at(float(number)))
    times = [at_s for at_s, _ in history.lines]
    assert times[0] == 0
    assert times[-32:] == list(range(9968, 10_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) > 100


# ---------------------------------------------------------------- monitors that fail


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_monitor_that_ends_ends_nothing_else(toy, number):
    with watching(toy(), source=SOURCE) as watch:
        assert latest(watch) is not None
        watch.process.send_signal(number)
        assert comes_true(lambda: latest(watch) is None)
        assert watch.why_not == f"the monitor ended with signal {number}"
        assert watch.between(0, 1e9) == ()
        assert watch.why_not == f"the monitor ended with signal {number}"


def test_a_sensor_that_kills_the_monitor_at_its_start_ends_nothing_else(toy):
    with watching(toy(breaks_after=1), source=SOURCE) as watch:
        assert watch.why_not == f"the monitor ended with signal {signal.SIGSEGV}"
        assert watch.cost is None
        assert latest(watch) is None


def test_a_monitor_that_hangs_is_given_up(toy, monkeypatch):
    monkeypatch.setattr(monitor, "_PATIENCE_S", 0.2)
    with watching(toy(), source=SOURCE) as watch:
        watch.process.send_signal(signal.SIGSTOP)
        assert watch.between(0, 1) == ()
        assert watch.why_not == "the monitor did not answer within 0.2 s"
        assert latest(watch) is None
    assert watch.process.returncode == -signal.SIGKILL


def test_a_machine_that_is_none_is_an_error_before_anything_is_measured(tmp_path):
    with pytest.raises(MissingError, match="no toy in ") as error, watching(str(tmp_path / "no"), source=SOURCE):
        pytest.fail("the block must not run")
    assert error.value.hint == "look below the bed"


def test_the_monitor_is_gone_after_the_block_however_that_ended(toy):
    with watching(toy(), source=SOURCE) as first:
        pass
    with pytest.raises(ZeroDivisionError), watching(toy(), source=SOURCE) as second:
        raise ZeroDivisionError
    assert first.process.returncode == second.process.returncode == 0


# ---------------------------------------------------------------- clocks


def test_clocks_are_pinned_in_the_block_only_and_only_on_request(toy, tmp_path):
    with watching(toy(), source=SOURCE):
        assert not (tmp_path / "locked").exists()
    with watching(toy(), source=SOURCE, lock_clocks=True):
        assert (tmp_path / "locked").exists()
    assert not (tmp_path / "locked").exists()
    with pytest.raises(ZeroDivisionError), watching(toy(), source=SOURCE, lock_clocks=True):
        raise ZeroDivisionError
    assert not (tmp_path / "locked").exists()


def test_clocks_that_cannot_be_pinned_are_an_error_before_anything_is_measured(toy, tmp_path):
    kind = toy(locks=False)
    with watching(kind, source=SOURCE) as watch:
        assert watch.why_not is None
    refused = pytest.raises(MissingError, match=r"^the clocks of a toy cannot be pinned$")
    with refused as error, watching(kind, source=SOURCE, lock_clocks=True):
        pytest.fail("the block must not run")
    assert error.value.hint == "get a grown-up's"


def test_a_monitor_that_dies_before_it_pinned_the_clocks_is_an_error(toy):
    refused = pytest.raises(MissingError, match=r"^the clocks cannot be pinned: the monitor ended with signal 11$")
    with refused, watching(toy(breaks_after=1), source=SOURCE, lock_clocks=True):
        pytest.fail("the block must not run")


def test_clocks_that_cannot_be_put_back_are_told_by_whoever_is_left(toy, capfd):
    with watching(toy(unlocks=False), source=SOURCE, lock_clocks=True):
        pass
    assert capfd.readouterr().err == "error: the clocks of this toy stay as they are\nhint: wind it up\n"


def test_signals_to_the_monitor_itself_leave_no_clock_pinned(toy, tmp_path):
    with watching(toy(), source=SOURCE, lock_clocks=True) as watch:
        for ignored in (signal.SIGINT, signal.SIGHUP):
            watch.process.send_signal(ignored)
        assert latest(watch) is not None
        assert (tmp_path / "locked").exists()
        watch.process.send_signal(signal.SIGTERM)
        assert comes_true(lambda: not (tmp_path / "locked").exists())
        assert latest(watch) is None
        assert watch.why_not == "the monitor ended with signal 15"


PARENT = """
import sys, time
from hydradeploy.profiler.monitor import watching
with watching({kind!r}, source={source!r}, lock_clocks=True) as watch:
    print(watch.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_however_the_parent_is_ended_its_clocks_are_put_back(toy, tmp_path, number, group):
    text = textwrap.dedent(PARENT).format(kind=toy(), source=SOURCE)
    with subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as parent:
        pid = int(parent.stdout.readline())
        assert (tmp_path / "locked").exists()
        (os.killpg if group else os.kill)(parent.pid, number)
        assert parent.wait(20) in (-number, 130)
    assert comes_true(lambda: not (tmp_path / "locked").exists())
    assert comes_true(lambda: not lives(pid))


FORK = """
    import os
    if not os.fork():
        time.sleep(60)
"""


def test_a_fork_of_the_parent_that_keeps_its_pipes_open_does_not_keep_the_clocks_pinned(toy, tmp_path):
    text = textwrap.dedent(PARENT).format(kind=toy(), source=SOURCE)
    text = text.replace("    print(", f"{FORK}    print(")
    with subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as parent:
        try:
            assert parent.stdout.readline()
            parent.kill()
            assert comes_true(lambda: not (tmp_path / "locked").exists())
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
