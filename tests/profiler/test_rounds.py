"""A run that is cut short, anywhere and by anything, and goes on: the same cells as of a run that was not."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hydradeploy import export
from hydradeploy.backends.null import VirtualClock
from hydradeploy.devices.reading import Reading
from hydradeploy.errors import ExitCode, ForeignError, HydraError, MissingError, UsageError
from hydradeploy.measurements import Cell, Conditions, read_profile
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.journal import read
from hydradeploy.profiler.presets import PRESETS, Target
from hydradeploy.profiler.rounds import Unwatched
from hydradeploy.profiler.sampling import Measured
from tests.profiler.virtual import DEVICE, LAWS, Here, Launch, profile

HEADS = (2, 4, 6)
CHOSEN = {"heads": HEADS, "precisions": ("fp32",), "threads": (2,)}


class Steady(Here):
    """A machine whose load does not rise with each look."""

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        return Reading(at_s=at_s, gauges={"load_average": 0.5}, counters={})


@dataclass
class Children:
    """Answers of a process that are the same for the same cell and round, whatever was cut short before.

    `stops` is asked before each answer with how many there have been, `fails` with name and round. Time passes while
    they answer, more for more heads.
    """

    stops: Callable[[int], bool] = lambda answered: False
    fails: Callable[[str, int], bool] = lambda name, number: False
    clock: VirtualClock = field(default_factory=VirtualClock)
    asked: list[Request] = field(default_factory=list)
    rounds: Counter[str] = field(default_factory=Counter)

    def __call__(self, request: Request, **_: object) -> Measured:
        if self.stops(len(self.asked)):
            raise KeyboardInterrupt
        self.asked.append(request)
        number = self.rounds[request.artifact]
        self.rounds[request.artifact] += 1
        if self.fails(request.artifact, number):
            self.clock.advance(0.25)
            raise MissingError(f"{request.artifact}: the measuring process ended with SIGSEGV: it said nothing")
        heads = int(request.artifact[1:3])
        answer = Launch(lambda _: (heads * value for value in LAWS[0].sample(100 * heads + number)))(request)
        self.clock.advance(answer.ended_s + 1.0)
        return answer


def run(bundle: Path, directory: Path, children: Children, **options: Any) -> tuple[Cell, ...]:
    """The cells of a run, without when they were measured."""
    options = {"here": Steady(), **CHOSEN, **options}
    done = profile(bundle, directory, launch=children, clock=children.clock, **options)
    assert done.stored.profile.cells == done.cells
    return tuple(msgspec.structs.replace(cell, measured_at="") for cell in done.cells)


def journals(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def kept(directory: Path) -> int:
    return len(read(*journals(directory))[1])


PLANS = {
    "quick, hurried": {"max_time_s": 41.0},
    "standard, p90": {"preset": "standard", "target": Target(0.9), "max_time_s": 150.0},
    "quick, paced": {"pace_hz": 0.25},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_cut_short_before_any_process_goes_on_to_the_same_cells(shared_bundle, tmp_path, plan):
    options = PLANS[plan]
    whole = run(shared_bundle, tmp_path / "whole", Children(), **options)
    assert len({len(cell.latency_s) for cell in whole}) > 1 or not plan.endswith("hurried"), "the time does cut some"
    total = PRESETS[options.get("preset", "quick")].rounds * len(HEADS)
    for answered in range(0, total, 1 if plan == "quick, hurried" else 4):
        directory, told = tmp_path / f"{answered}", []
        children = Children(stops=lambda count, last=answered: count == last)
        with pytest.raises(KeyboardInterrupt):
            run(shared_bundle, directory, children, say=told.append, **options)
        assert len(children.asked) == answered
        if answered == 0:
            assert os.listdir(directory) == [], "nothing was measured, so there is nothing to go on with"
            with pytest.raises(UsageError, match="nothing to resume"):
                run(shared_bundle, directory, Children(), resume=True, **options)
            continue
        assert told[-1] == f"{journals(directory)[0]}: {answered} of {total} measurements are kept; go on with --resume"
        assert not list(directory.glob("*.json"))
        children.stops = lambda count: False
        assert run(shared_bundle, directory, children, resume=True, **options) == whole
        assert len(children.asked) == total, "nothing is measured twice"
        assert [path.suffix for path in directory.iterdir()] == [".json"]


def test_a_run_cut_short_before_each_process_goes_on_to_the_same_cells(shared_bundle, tmp_path):
    whole = run(shared_bundle, tmp_path / "whole", Children())
    interrupted: set[int] = set()

    def once(answered: int) -> bool:
        if answered in interrupted:
            return False
        interrupted.add(answered)
        return True

    children = Children(stops=once)
    for number in range(15):
        with pytest.raises(KeyboardInterrupt):
            run(shared_bundle, tmp_path / "cut", children, resume=number > 1)
    assert run(shared_bundle, tmp_path / "cut", children, resume=True) == whole
    assert len(children.asked) == 15


@pytest.mark.parametrize("at", range(1, 16))
def test_an_interrupt_while_progress_is_told_loses_nothing(shared_bundle, tmp_path, at):
    def report(what: str, done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    whole = run(shared_bundle, tmp_path / "whole", Children())
    children = Children()
    with pytest.raises(KeyboardInterrupt):
        run(shared_bundle, tmp_path / "cut", children, report=report)
    assert kept(tmp_path / "cut") == at
    assert run(shared_bundle, tmp_path / "cut", children, resume=True) == whole


@pytest.mark.parametrize("answered", range(1, 15))
@pytest.mark.parametrize("failing", [0, 2])
def test_a_cell_that_failed_stays_failed_when_its_run_goes_on(shared_bundle, tmp_path, answered, failing):
    def fails(name: str, number: int) -> bool:
        return name == "h04-fp32" and number == failing

    whole = run(shared_bundle, tmp_path / "whole", Children(fails=fails))
    assert [cell.error is not None for cell in whole] == [False, True, False]
    assert len(set(whole[1].process)) == failing
    children = Children(fails=fails, stops=lambda count: count == answered)
    if answered >= 15 - (4 - failing):
        assert run(shared_bundle, tmp_path / "cut", children) == whole
        return
    with pytest.raises(KeyboardInterrupt):
        run(shared_bundle, tmp_path / "cut", children)
    children.stops = lambda count: False
    assert run(shared_bundle, tmp_path / "cut", children, resume=True) == whole


def test_a_run_that_is_complete_but_for_its_profile_goes_on_to_it_without_measuring(shared_bundle, tmp_path):
    """As a kill between the last process and the profile leaves it."""
    whole = run(shared_bundle, tmp_path / "whole", Children())
    saved: list[bytes] = []

    def report(what: str, done: int, total: int) -> None:
        if done == total:
            saved.append(journals(tmp_path / "cut")[0].read_bytes())

    run(shared_bundle, tmp_path / "cut", Children(), report=report)
    stored = next((tmp_path / "cut").glob("*.json"))
    for profile_is_there in (True, False):
        stored.with_suffix(".jsonl").unlink(missing_ok=True)
        stored.with_suffix(".jsonl").write_bytes(saved[0])
        if not profile_is_there:
            stored.unlink()
        children = Children()
        assert run(shared_bundle, tmp_path / "cut", children, resume=True) == whole
        assert children.asked == []
        assert os.listdir(tmp_path / "cut") == [stored.name]


@pytest.fixture
def cut(shared_bundle, tmp_path) -> Path:
    """Profiles of a machine with a run that was cut short after seven processes."""
    with pytest.raises(KeyboardInterrupt):
        run(shared_bundle, tmp_path / "cut", Children(stops=lambda count: count == 7))
    return tmp_path / "cut"


OTHERS = {
    "governor": Steady().changed(governor="powersave"),
    "power_mode": Steady().changed(power_mode="15W"),
    "quota_cores": Steady().changed(quota_cores=1.5),
    "affinity": Steady().changed(affinity="0"),
    "os": Steady().changed(os="Linux 6.2"),
    "clocks": Steady().changed(clocks="pinned"),
    "name": Here(msgspec.structs.replace(DEVICE, name="Toy Board 4")),
    "cores": Here(msgspec.structs.replace(DEVICE, cores=8)),
    "memory_bytes": Here(msgspec.structs.replace(DEVICE, memory_bytes=8 << 30)),
    "kind": Here(msgspec.structs.replace(DEVICE, kind="jetson")),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_run_does_not_go_on_elsewhere_or_under_other_conditions(shared_bundle, cut, field):
    before, children = journals(cut)[0].read_bytes(), Children()
    with pytest.raises(ForeignError, match=rf"was measured otherwise \(there, here\): {field}: ") as refused:
        run(shared_bundle, cut, children, resume=True, here=OTHERS[field])
    assert refused.value.exit_code is ExitCode.FOREIGN == 7
    assert children.asked == []
    assert journals(cut)[0].read_bytes() == before
    assert len(journals(cut)) == 1


PLANS_OF_OTHERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "preset": ("preset", {"preset": "gate"}),
    "time": ("preset", {"max_time_s": 60.0}),
    "pace": ("preset", {"pace_hz": 30.0}),
    "concurrency": ("preset", {"concurrency": 2}),
    "percentile": ("target", {"target": Target(0.99)}),
    "confidence": ("target", {"target": Target(0.95, 0.99)}),
    "fewer heads": ("cells", {"heads": (2, 4)}),
    "more heads": ("cells", {"heads": (2, 3, 4, 6)}),
    "threads": ("cells", {"threads": (1,)}),
    "precision": ("cells", {"precisions": ("fp16",)}),
}


@pytest.mark.parametrize("change", PLANS_OF_OTHERS)
def test_a_run_goes_on_only_as_it_was_planned(shared_bundle, cut, change):
    named, options = PLANS_OF_OTHERS[change]
    before, children = journals(cut)[0].read_bytes(), Children()
    with pytest.raises(UsageError, match=f"is of another run: {named} differ$") as refused:
        run(shared_bundle, cut, children, resume=True, **options)
    assert refused.value.exit_code is ExitCode.USAGE == 2
    assert "repeat the command" in str(refused.value.hint)
    assert children.asked == []
    assert journals(cut)[0].read_bytes() == before


def test_a_run_does_not_go_on_with_another_bundle(supernet_file, tmp_path, cut):
    """Of the same names, but graphs of another batch size."""
    export(supernet_file, tmp_path / "other", heads=HEADS, batch=2)
    with pytest.raises(UsageError, match="is of another run: cells differ"):
        run(tmp_path / "other", cut, Children(), resume=True)


def test_a_run_cut_short_is_not_begun_anew_unless_that_is_asked_for(shared_bundle, cut):
    children = Children()
    with pytest.raises(UsageError, match="an earlier run was cut short") as refused:
        run(shared_bundle, cut, children)
    assert refused.value.hint == "go on with --resume, or begin anew with --force"
    assert children.asked == []
    assert kept(cut) == 7
    with pytest.raises(UsageError, match="--resume goes on and --force begins anew"):
        run(shared_bundle, cut, children, force=True, resume=True)
    assert kept(cut) == 7
    run(shared_bundle, cut, children, force=True)
    assert len(children.asked) == 15
    assert journals(cut) == []


def test_a_run_of_another_machine_does_not_mind_one_that_was_cut_short(shared_bundle, cut):
    run(shared_bundle, cut, Children(), here=OTHERS["name"])
    assert kept(cut) == 7
    children = Children()
    children.rounds.update({"h02-fp32": 2, "h04-fp32": 2, "h06-fp32": 3})
    run(shared_bundle, cut, children, resume=True)
    assert len(children.asked) == 8
    assert journals(cut) == []


def test_a_run_goes_on_beside_a_profile_of_the_same_name_under_other_conditions(shared_bundle, cut):
    """Whose file takes the name that the run's profile was to have."""
    other = Steady().changed(affinity="0")
    saved = journals(cut)[0].rename(cut / "aside")
    first = profile(shared_bundle, cut, launch=Children(), here=other, **CHOSEN).stored.path
    saved.rename(first.with_suffix(".jsonl"))
    run(shared_bundle, cut, Children(), resume=True)
    assert sorted(os.listdir(cut)) == sorted([first.name, f"{first.stem}-2.json"])


@dataclass(frozen=True)
class Turning(Steady):
    """A machine whose conditions are others from one answer on."""

    children: Children = field(default_factory=Children)
    after: int = 0
    change: Mapping[str, object] = field(default_factory=dict)

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        now = super().conditions(software)
        return msgspec.structs.replace(now, **self.change) if len(self.children.asked) > self.after else now


@pytest.mark.parametrize("after", range(15))
def test_conditions_that_change_on_the_way_end_the_run_with_what_was_measured_before(shared_bundle, tmp_path, after):
    """The process under which they changed is not kept."""
    whole, children = run(shared_bundle, tmp_path / "whole", Children()), Children()
    here = Turning(children=children, after=after, change={"governor": "powersave"})
    said = r"conditions changed while measuring \(before, now\): governor: schedutil, powersave"
    with pytest.raises(ForeignError, match=said) as refused:
        run(shared_bundle, tmp_path / "cut", children, here=here)
    assert "put them back and go on with --resume" in str(refused.value.hint)
    assert len(children.asked) == after + 1
    assert not list((tmp_path / "cut").glob("*.json"))
    if after == 0:
        assert journals(tmp_path / "cut") == []
        return
    assert kept(tmp_path / "cut") == after
    children.rounds[children.asked[-1].artifact] -= 1
    assert run(shared_bundle, tmp_path / "cut", children, resume=True) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"power_mode": "MAXN"}, "power_mode: none, MAXN"),
        ({"quota_cores": 1.5}, "quota_cores: none, 1.5"),
        ({"affinity": "0"}, "affinity: 0-3, 0"),
        ({"clocks": "pinned"}, "clocks: none, pinned"),
        ({"governor": None, "affinity": "1"}, "governor: schedutil, none; affinity: 0-3, 1"),
    ],
    ids=str,
)
def test_whatever_changes_on_the_way_is_named(shared_bundle, tmp_path, change, named):
    children = Children()
    with pytest.raises(ForeignError, match=named):
        run(shared_bundle, tmp_path, children, here=Turning(children=children, after=7, change=change))
    assert kept(tmp_path) == 7


@dataclass(frozen=True)
class Watching(Unwatched):
    """A monitor that sits on core 3, and is asked for what it has read."""

    why_not: str | None = None
    threads: list[int] = field(default_factory=list)
    asked: list[tuple[float, float]] = field(default_factory=list)

    def between(self, started_s: float, ended_s: float) -> tuple[Reading, ...]:
        self.asked.append((started_s, ended_s))
        return ()

    def cores_for(self, threads: int) -> frozenset[int] | None:
        self.threads.append(threads)
        return frozenset({2, 0, 1}) if threads < 4 else None

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("options", "threads", "cores"),
    [
        ({"threads": (2,)}, 2, (0, 1, 2)),
        ({"threads": (4,)}, 4, None),
        ({"threads": (1,), "concurrency": 3}, 3, (0, 1, 2)),
        ({"threads": (2,), "concurrency": 2}, 4, None),
    ],
    ids=str,
)
def test_a_process_stays_off_the_core_of_the_monitor_where_all_its_threads_fit_on_the_others(
    shared_bundle, tmp_path, options, threads, cores
):
    launch, watch = Launch(), Watching()
    order = {"heads": (2,), "precisions": ("fp32",), **options}
    profile(shared_bundle, tmp_path, launch=launch, here=Steady(), watch=lambda: watch, **order)
    assert set(watch.threads) == {threads}
    assert {request.cores for request in launch.requests} == {cores}
    assert watch.asked == [(answer.started_s, answer.called_until_s) for answer in launch.answers]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_process_has_the_time_it_takes_and_much_more(shared_bundle, tmp_path, preset):
    """And is told when temperatures have settled where it waits for that."""
    asked: list[Mapping[str, Any]] = []
    answers = Launch()

    def launch(request: Request, **how: Any) -> Measured:
        asked.append(how)
        return answers(request, **how)

    profile(shared_bundle, tmp_path, heads=(2,), preset=preset, launch=launch, here=Steady())
    lasted = [answer.ended_s for answer in answers.answers]
    assert all(how["patience_s"] > 600 + last for how, last in zip(asked, lasted, strict=True))
    assert {how["settled"] is not None for how in asked} == {preset == "sustained"}


def test_a_slow_schedule_gets_the_patience_it_takes(shared_bundle, tmp_path):
    asked: list[float] = []

    def launch(request: Request, *, patience_s: float, **_: Any) -> Measured:
        asked.append(patience_s)
        return Launch()(request)

    order = {"heads": (2,), "precisions": ("fp32",), "pace_hz": 0.01}
    profile(shared_bundle, tmp_path, launch=launch, here=Steady(), **order)
    assert asked[0] > 12 / 0.01


def test_what_is_still_to_come_is_told_after_the_first_round(shared_bundle, tmp_path):
    told: dict[str, float] = {}
    children = Children()

    def say(text: str) -> None:
        told[text] = children.clock.now

    cells = run(shared_bundle, tmp_path, children, max_time_s=41.0, say=say)
    (after,) = (text for text in told if text.startswith("after the first round: "))
    few, many, seconds = map(int, re.findall(r"(\d+) to (\d+) samples a process, about (\d+) s to go", after)[0])
    counts = {cell.process.count(1) for cell in cells}
    assert (few, many) == (min(counts), max(counts))
    assert children.clock.now - told[after] == pytest.approx(seconds, abs=1.5)
    assert children.clock.now == pytest.approx(41, abs=1.5)


def test_a_refusal_on_the_way_is_a_known_error_and_keeps_the_journal(shared_bundle, tmp_path):
    """Whatever else a process may raise."""
    calls = itertools.count()

    def launch(request: Request, **_: Any) -> Measured:
        if next(calls) == 4:
            raise HydraError("the roof is on fire")
        return Launch()(request)

    told: list[str] = []
    with pytest.raises(HydraError, match="the roof"):
        profile(shared_bundle, tmp_path, launch=launch, here=Steady(), say=told.append, **CHOSEN)
    assert kept(tmp_path) == 4
    assert "4 of 15 measurements are kept" in told[-1]


def test_a_bundle_that_is_moved_on_the_way_ends_the_run_which_goes_on_where_it_is_now(bundle, tmp_path):
    """Else what was measured before would be lost with what could not be."""
    moved, calls = tmp_path / "elsewhere", itertools.count()

    def launch(request: Request, **_: Any) -> Measured:
        if next(calls) == 4:
            bundle.rename(moved)
            raise MissingError(f"{request.artifact}: the measuring process ended with exit 2: {bundle}: no bundle here")
        return Launch()(request)

    told: list[str] = []
    with pytest.raises(UsageError, match="no bundle here"):
        profile(bundle, tmp_path / "p", launch=launch, here=Steady(), say=told.append, **CHOSEN)
    assert "4 of 15 measurements are kept; go on with --resume" in told[-1]
    assert all(cell.error is None for cell in run(moved, tmp_path / "p", Children(), resume=True))


def test_a_finished_run_leaves_its_profile_and_nothing_else(shared_bundle, tmp_path):
    run(shared_bundle, tmp_path, Children())
    (stored,) = tmp_path.iterdir()
    assert len(read_profile(stored).profile.cells) == len(HEADS)
