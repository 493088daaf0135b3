"""What of the entries of a run reaches its cells: samples by regime, flags with their numbers, energy, reasons."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hydradeploy import export
from hydradeploy.devices.reading import Reading
from hydradeploy.errors import InvalidError, MissingError
from hydradeploy.measurements import Cell, read_profile
from hydradeploy.profiler import rounds
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.monitor import Watch as Monitor
from hydradeploy.profiler.monitor import watching
from hydradeploy.profiler.parts import BURST_S
from hydradeploy.profiler.presets import PRESETS
from hydradeploy.profiler.profile import check_clean
from hydradeploy.profiler.sampling import Measured
from hydradeploy.report.cells import remark_lines
from tests.profiler.readings import Value, every, latest, readings
from tests.profiler.toys import SOURCE
from tests.profiler.virtual import Here, Launch, profile

ONE = {"heads": (2,), "precisions": ("fp32",), "threads": (2,)}
Readings = Callable[[int, float, float], Sequence[Reading]]


@dataclass
class Watching:
    """A monitor that has read what `readings` says of each process, by its number and window."""

    readings: Readings = lambda number, started_s, ended_s: ()
    why_not: str | None = None
    interval_s: float = 0.25
    windows: int = 0

    def between(self, started_s: float, ended_s: float) -> tuple[Reading, ...]:
        self.windows += 1
        return tuple(self.readings(self.windows - 1, started_s, ended_s))

    def cores_for(self, threads: int) -> frozenset[int] | None:
        return None

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None: ...


def seen(**values: Value) -> Readings:
    """The same of every process, read a quarter of a second before its window, in it and after it."""
    return lambda number, started_s, ended_s: around(started_s, ended_s, **values)


def around(started_s: float, ended_s: float, **values: Value) -> list[Reading]:
    return readings([*every(0.25, started_s - 0.25, ended_s), ended_s + 0.25], **values)


def in_process(which: int, **values: Value) -> Readings:
    """All is quiet but in one process."""
    quiet = dict.fromkeys(values, 0.0) | {"busy_s": 0.0, "ours_s": 0.0}
    return lambda number, started_s, ended_s: around(started_s, ended_s, **(values if number == which else quiet))


def watched(bundle: Path, directory: Path, look: Readings, **options: Any) -> Cell:
    """The cell of a run that a monitor of such readings watched."""
    options = {"launch": Launch(lambda _: repeat(1 / 16)), "here": Here(), **ONE, **options}
    done = profile(bundle, directory, watch=lambda: Watching(look), **options)
    assert read_profile(done.stored.path).profile.cells == done.cells
    return done.cells[0]


FLAGGED = {
    "foreign load": (
        seen(busy_s=lambda t: 3.5 * t, ours_s=lambda t: 2 * t),
        "contended",
        "contended: other programs kept 1.50 cores busy in 5 of 5 processes",
    ),
    "foreign load once": (
        in_process(3, busy_s=lambda t: 3 * t, ours_s=lambda t: 2 * t),
        "contended",
        "contended: other programs kept 1.00 cores busy in 1 of 5 processes",
    ),
    "quota": (
        lambda number, started_s, ended_s: around(started_s, ended_s, cgroup_throttled=lambda t: 3.0 * (t > started_s)),
        "throttled",
        "throttled: a quota of processor time ran out 3 times in 5 of 5 processes",
    ),
    "steal": (
        seen(steal_s=lambda t: 0.5 * t),
        "contended",
        "contended: the host of this virtual machine took 0.50 cores away in 5 of 5 processes",
    ),
    "swap": (
        seen(swapped_pages=lambda t: 1000.0 * (t > 0.3)),
        "contended",
        "contended: the machine swapped 1000 pages in 5 of 5 processes",
    ),
    "others on the GPU": (
        in_process(0, foreign_processes__cuda=2.0),
        "contended",
        "contended: other programs had up to 2 processes on cuda in 1 of 5 processes",
    ),
    "a sign of the device": (
        in_process(4, throttling__thermal=1.0),
        "throttled",
        "throttled: the device was slowing down to protect itself, by thermal, in 1 of 5 processes",
    ),
    "clocks below where they are pinned": (
        seen(clock_hz__cpu=1.8e9, pinned_hz__cpu=2e9),
        "throttled",
        "throttled: the cpu clock was 10% below where it is pinned in three processes in a row",
    ),
}


@pytest.mark.parametrize("what", FLAGGED)
def test_what_a_monitor_sees_flags_the_cell_with_its_numbers(shared_bundle, tmp_path, what):
    look, flag, remark = FLAGGED[what]
    cell = watched(shared_bundle, tmp_path, look)
    assert cell.flags == (flag,)
    assert cell.remarks == (remark,)
    assert cell.error is None
    with pytest.raises(InvalidError, match=f"h02-fp32: {flag}"):
        check_clean([cell])


def test_a_quiet_machine_flags_nothing(shared_bundle, tmp_path):
    quiet = seen(busy_s=lambda t: 2 * t, ours_s=lambda t: 2 * t, steal_s=3.0, cgroup_throttled=7.0, swapped_pages=9.0)
    cell = watched(shared_bundle, tmp_path, quiet)
    assert (cell.flags, cell.remarks) == ((), ())
    check_clean([cell])


@dataclass
class Graphless(Launch):
    """Processes whose CUDA graph could not be captured, by their number."""

    failed: Collection[int] = ()

    def __call__(self, request: Request, **options: Any) -> Measured:
        number = len(self.requests)
        facts = {"graph_failed": "operation not permitted"} if number in self.failed else {}
        answer = super().__call__(request, **options)
        return msgspec.structs.replace(answer, facts=answer.facts | facts | {"device_s": f"{0.001 * (number + 1):g}"})


@pytest.mark.parametrize(("failed", "evidence"), [((), None), ((1, 3), (0, 1, 0, 1, 0)), (range(5), (1, 1, 1, 1, 1))])
def test_a_graph_that_was_not_captured_flags_the_cell_with_the_reason(shared_bundle, tmp_path, failed, evidence):
    cell = watched(shared_bundle, tmp_path, seen(), launch=Graphless(failed=failed))
    said = (
        f"graph-failed: calls ran without a CUDA graph in {len(failed)} of 5 processes, as its capture failed: "
        "operation not permitted (--setting graph=off measures that as what it is)"
    )
    assert (cell.flags, cell.remarks) == ((("graph-failed",), (said,)) if failed else ((), ()))
    assert cell.evidence.get("graph_failed") == evidence
    assert list(remark_lines([cell])) == ([said] if failed else [])


def test_the_time_on_the_gpu_is_evidence_where_a_backend_tells_it(shared_bundle, tmp_path):
    cell = watched(shared_bundle, tmp_path / "gpu", seen(), launch=Graphless())
    assert cell.evidence["device_s"] == (0.001, 0.002, 0.003, 0.004, 0.005)
    assert "device_s" not in watched(shared_bundle, tmp_path / "cpu", seen()).evidence


def test_evidence_has_a_number_of_each_process_in_order(shared_bundle, tmp_path):
    def look(number: int, started_s: float, ended_s: float) -> list[Reading]:
        return around(started_s, ended_s, temperature_c__soc=40.0 + number, clock_hz__cpu=1e9 + number)

    cell = watched(shared_bundle, tmp_path, look)
    assert cell.evidence["temperature_c.soc.max"] == (40.0, 41.0, 42.0, 43.0, 44.0)
    assert cell.evidence["clock_hz.cpu.min"] == (1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3, 1e9 + 4)
    assert cell.evidence["load_average"] == (0.25, 0.5, 0.75, 1.0, 1.25)
    assert len(cell.evidence["warmup"]) == 5
    assert "foreign_cores" not in cell.evidence, "what was not read is not there, and not 0"


def test_a_throttled_shortfall_counts_within_a_long_process_too(shared_bundle, tmp_path):
    look = in_process(6, clock_hz__cpu=1.5e9, pinned_hz__cpu=2e9)
    cell = watched(shared_bundle, tmp_path, look, preset="standard")
    assert cell.remarks == ("throttled: the cpu clock was 25% below where it is pinned in 1 of 10 processes",)


def test_clocks_that_float_are_a_remark_from_the_conditions(shared_bundle, tmp_path):
    done = profile(shared_bundle, tmp_path, launch=Launch(), here=Here().changed(clocks="floating"), **ONE)
    assert done.cells[0].flags == ("floating-clocks",)
    assert done.cells[0].remarks == ("floating-clocks: nothing kept the clocks where they were",)


def test_processes_that_differ_are_noisy_by_how_much(shared_bundle, tmp_path):
    numbers = count()

    def latencies(_: Request) -> Iterator[float]:
        return repeat((4 + next(numbers)) / 256)

    cell = watched(shared_bundle, tmp_path, seen(), launch=Launch(latencies))
    assert cell.flags == ("noisy",)
    (remark,) = cell.remarks
    assert remark == "noisy: processes differ by 27%"


def test_two_things_wrong_are_two_remarks_and_each_flag_is_there_once(shared_bundle, tmp_path):
    look = seen(
        busy_s=lambda t: 3 * t, ours_s=lambda t: 2 * t, steal_s=lambda t: 0.25 * t, cgroup_throttled=lambda t: t
    )
    cell = watched(shared_bundle, tmp_path, look, here=Here().changed(clocks="floating"))
    assert cell.flags == ("throttled", "contended", "floating-clocks")
    assert len(cell.remarks) == 4
    assert [remark.partition(":")[0] for remark in cell.remarks] == [
        "throttled",
        "contended",
        "contended",
        cell.flags[2],
    ]


def test_a_schedule_that_is_too_fast_says_so(shared_bundle, tmp_path):
    """And not that the warm-up was unsteady, which is but what came of it."""
    cell = watched(shared_bundle, tmp_path, seen(), pace_hz=32.0)
    assert cell.regime == "paced-32hz"
    assert cell.flags == ("noisy",)
    assert cell.remarks == (
        "noisy: calls queued up in 5 of 5 processes, as a call takes 0.0625 s, the schedule gives it 0.0312 s",
    )


# ---------------------------------------------------------------- energy


@dataclass(frozen=True)
class Metered(Here):
    """A machine with a meter."""

    def meter(self) -> str | None:
        return "VDD_IN, module"

    def missing(self) -> dict[str, str]:
        return {"temperature": "no zone answers"}


@dataclass
class Idling:
    """A clock on which idling takes no time."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def idling(monkeypatch: pytest.MonkeyPatch) -> Idling:
    clock = Idling()
    monkeypatch.setattr(rounds.time, "sleep", clock.sleep)
    return clock


def powers(*watts: float, idle_w: float | None = 5.0, counted: bool = True) -> Readings:
    """The watts of each process in turn, after those of idling: by a counter of joules, else by a gauge."""

    def look(number: int, started_s: float, ended_s: float) -> list[Reading]:
        power = idle_w if number == 0 else watts[(number - 1) % len(watts)]
        if power is None:
            return []
        if counted:
            return around(started_s, ended_s, energy_j=lambda t: 700.0 + power * t)
        return around(started_s, ended_s, power_w=power)

    return look


def metered(bundle: Path, directory: Path, idling: Idling, look: Readings, **options: Any) -> Cell:
    """Of calls that take a 32nd of a second."""
    options = {"preset": "standard", "launch": Launch(lambda _: repeat(1 / 32)), "here": Metered(), **ONE, **options}
    return watched(bundle, directory, look, clock=idling, **options)


@pytest.mark.parametrize("counted", [True, False])
def test_energy_is_per_image_and_beyond_idling(supernet_file, tmp_path, idling, counted):
    """12 W less 5 W for a 32nd of a second, in which eight images are done."""
    export(supernet_file, tmp_path / "bundle", heads=(2,), batch=8)
    cell = metered(tmp_path / "bundle", tmp_path / "p", idling, powers(12.0, counted=counted))
    assert cell.batch == 8
    assert cell.energy_j == pytest.approx(7 / 32 / 8)
    assert cell.evidence["energy_j"] == pytest.approx([7 / 32 / 8] * 10)
    assert cell.meter == "VDD_IN, module"
    assert "energy" not in cell.missing
    assert cell.missing["temperature"] == "no zone answers"
    assert idling.slept == [3.0]


def test_energy_is_that_of_all_calls_and_not_of_all_processes(shared_bundle, tmp_path, idling):
    """The first process makes 60 calls at 9 W above idling, each of the nine others 105 at 3 W above it."""
    cell = metered(shared_bundle, tmp_path, idling, powers(14.0, *[8.0] * 9))
    assert [cell.process.count(number) for number in (0, 1, 9)] == [60, 105, 105]
    assert cell.energy_j == pytest.approx((60 * 9 + 9 * 105 * 3) / (60 + 9 * 105) / 32)
    assert cell.evidence["energy_j"] == pytest.approx([9 / 32] + [3 / 32] * 9)


def test_processes_whose_energy_is_not_known_do_not_count(shared_bundle, tmp_path, idling):
    """The counter began anew in one of them, and one stayed below idling."""
    good = powers(12.0, 12.0, 12.0, 4.0, *[12.0] * 6)

    def look(number: int, started_s: float, ended_s: float) -> Sequence[Reading]:
        if number == 2:
            return around(started_s, ended_s, energy_j=lambda t: 700.0 - t)
        return good(number, started_s, ended_s)

    cell = metered(shared_bundle, tmp_path, idling, look)
    assert cell.energy_j == pytest.approx(7 / 32)
    assert cell.evidence["energy_j"] == pytest.approx([7 / 32] * 8)
    assert "energy" not in cell.missing


NO_ENERGY = {
    "idle power not known": (powers(12.0, idle_w=None), {}, "no readings"),
    "below idling": (powers(4.0), {}, "not above idle: 4.00 W while measuring, 5.00 W before"),
    "no meter read while idling": (
        lambda number, started_s, ended_s: around(started_s, ended_s, busy_s=1.0),
        {},
        "no meter was read",
    ),
    "no meter read while measuring": (
        lambda number, started_s, ended_s: around(started_s, ended_s, **({} if number else {"energy_j": lambda t: t})),
        {},
        "no meter was read",
    ),
}


@pytest.mark.parametrize("why", NO_ENERGY)
def test_where_there_is_no_energy_there_is_the_reason_and_no_meter(shared_bundle, tmp_path, idling, why):
    look, options, reason = NO_ENERGY[why]
    cell = metered(shared_bundle, tmp_path, idling, look, **options)
    assert (cell.energy_j, cell.meter) == (None, None)
    assert cell.missing["energy"] == reason
    assert "energy_j" not in cell.evidence
    assert cell.error is None


@pytest.mark.parametrize("counted", [True, False])
def test_calls_go_on_beyond_few_samples_for_as_long_as_the_meter_takes(shared_bundle, tmp_path, idling, counted):
    """48 calls of a 32nd of a second are 1.5 s, of which the samples are those there are without a meter."""
    launch = Launch(lambda _: repeat(1 / 32))
    cell = metered(shared_bundle, tmp_path / "m", idling, powers(12.0, counted=counted), preset="quick", launch=launch)
    assert cell.energy_j == pytest.approx(7 / 32)
    assert cell.evidence["energy_j"] == pytest.approx([7 / 32] * 5)
    assert [answer.calls for answer in launch.answers] == [48] * 5
    other = metered(shared_bundle, tmp_path / "o", idling, powers(12.0), preset="quick", here=Here())
    assert (cell.latency_s, cell.process) == (other.latency_s, other.process)


def test_the_energy_of_calls_beyond_the_samples_counts_by_all_calls(shared_bundle, tmp_path, idling):
    """A process of calls twice as long makes half as many in the same time, at 9 W above idling."""
    numbers = count()
    launch = Launch(lambda _: repeat((2 - (next(numbers) > 0)) / 32))
    cell = metered(shared_bundle, tmp_path, idling, powers(14.0, *[8.0] * 4), preset="quick", launch=launch)
    assert [answer.calls for answer in launch.answers] == [24, 48, 48, 48, 48]
    assert cell.energy_j == pytest.approx((24 * 9 * 2 + 4 * 48 * 3) / (24 + 4 * 48) / 32)


def test_sensors_that_are_read_seldom_take_longer(shared_bundle, tmp_path, idling):
    launch = Launch(lambda _: repeat(1 / 32))
    watch = Watching(powers(12.0), interval_s=0.5)
    options = {"launch": launch, "here": Metered(), "clock": idling, **ONE}
    profile(shared_bundle, tmp_path, watch=lambda: watch, **options)
    assert [answer.calls for answer in launch.answers] == [96] * 5


@pytest.mark.parametrize(("here", "why_not"), [(Here(), None), (Metered(), "the monitor did not answer within 10 s")])
def test_without_readings_of_a_meter_no_calls_go_on(shared_bundle, tmp_path, idling, here, why_not):
    launch = Launch(lambda _: repeat(1 / 32))
    watch = Watching(why_not=why_not)
    profile(shared_bundle, tmp_path, watch=lambda: watch, launch=launch, here=here, clock=idling, **ONE)
    assert {answer.unkept for answer in launch.answers} == {0}


def test_what_happens_beyond_the_samples_flags_nothing(shared_bundle, tmp_path, idling):
    """Sixteen samples last half a second, what the others do begins a quarter of a second later."""

    def look(number: int, started_s: float, ended_s: float) -> list[Reading]:
        late = started_s + 0.75
        return around(
            started_s,
            ended_s,
            energy_j=lambda t: (5.0 if number == 0 else 12.0) * t,
            cgroup_throttled=lambda t: t > late,
        )

    cell = metered(shared_bundle, tmp_path, idling, look, preset="quick")
    assert cell.energy_j is not None
    assert cell.flags == ()


def test_a_run_goes_on_where_sensors_take_longer_than_when_it_began(shared_bundle, tmp_path, idling):
    launch = Launch(lambda _: repeat(1 / 32))

    def cut_short(request: Request, **options: Any) -> Measured:
        if len(launch.requests) == 2:
            raise KeyboardInterrupt
        return launch(request, **options)

    options = {"here": Metered(), "clock": idling, **ONE}
    with pytest.raises(KeyboardInterrupt):
        profile(shared_bundle, tmp_path, watch=lambda: Watching(powers(12.0)), launch=cut_short, **options)
    slower = Watching(powers(12.0), interval_s=0.5)
    cell = profile(shared_bundle, tmp_path, watch=lambda: slower, launch=launch, resume=True, **options).cells[0]
    assert [answer.calls for answer in launch.answers] == [48, 48, 96, 96, 96]
    assert cell.energy_j == pytest.approx(7 / 32)


def test_a_machine_without_a_meter_gives_its_own_reason_and_does_not_idle(shared_bundle, tmp_path, idling):
    cell = metered(shared_bundle, tmp_path, idling, powers(12.0), here=Here())
    assert cell.energy_j is None
    assert cell.missing == {"energy": "a toy has no meter", "memory": cell.missing["memory"]}
    assert idling.slept == []


def test_idling_is_told(shared_bundle, tmp_path, idling):
    told: list[str] = []
    metered(shared_bundle, tmp_path, idling, powers(12.0), say=told.append)
    assert "idle power: 3 s" in told


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize(("taken", "known"), [(None, False), (0, True), (5 << 20, True)])
def test_memory_that_is_known_is_not_missing(shared_bundle, tmp_path, taken, known):
    class Forgetful(Here):
        def missing(self) -> dict[str, str]:
            return {"memory": "a toy forgets"}

    def launch(request: Request, **_: Any) -> Measured:
        return msgspec.structs.replace(Launch()(request), memory_bytes=taken)

    cell = profile(shared_bundle, tmp_path / "a", launch=launch, here=Forgetful(), **ONE).cells[0]
    assert cell.memory_bytes == taken
    assert cell.missing.get("memory") == (None if known else "a toy forgets")
    other = profile(shared_bundle, tmp_path / "b", launch=launch, here=Here(), **ONE).cells[0]
    assert ("memory" in other.missing) is not known


def test_memory_that_is_not_the_processes_own_says_so_beside_the_figure(shared_bundle, tmp_path):
    class Shared(Here):
        def occupied_bytes(self) -> int | None:
            return 7 << 20

        def missing(self) -> dict[str, str]:
            return {"memory": "of the whole toy, not of the process"}

    def launch(request: Request, **_: Any) -> Measured:
        return msgspec.structs.replace(Launch()(request), memory_bytes=5 << 20)

    cell = profile(shared_bundle, tmp_path, launch=launch, here=Shared(), **ONE).cells[0]
    assert cell.memory_bytes == 5 << 20
    assert cell.missing["memory"] == "of the whole toy, not of the process"


def test_nobody_who_watches_is_missing_conditions(shared_bundle, tmp_path):
    done = profile(shared_bundle, tmp_path, launch=Launch(), here=Here(), **ONE)
    assert done.cells[0].missing["conditions"] == "nobody watched"


def test_a_monitor_that_falls_silent_midway_is_told_and_the_run_goes_on(shared_bundle, tmp_path):
    watch = Watching(seen(temperature_c__soc=40.0))

    def launch(request: Request, **_: Any) -> Measured:
        if watch.windows == 3:
            watch.readings, watch.why_not = seen(), "the monitor did not answer within 10 s"
        return Launch()(request)

    cell = profile(shared_bundle, tmp_path, launch=launch, here=Here(), watch=lambda: watch, **ONE).cells[0]
    assert cell.missing["conditions"] == "the monitor did not answer within 10 s"
    assert cell.evidence["temperature_c.soc.max"] == (40.0,) * 3
    assert len(set(cell.process)) == 5
    assert cell.error is None


def test_a_real_monitor_that_is_killed_midway_is_told_and_the_run_goes_on(shared_bundle, tmp_path):
    (tmp_path / "toy.json").write_text('{"gauges": {"temperature_c.soc": 41.5}, "counters": {}}')
    monitors: list[Monitor] = []
    told: list[str] = []

    @contextmanager
    def watch() -> Iterator[Monitor]:
        with watching(str(tmp_path), source=SOURCE) as found:
            monitors.append(found)
            yield found

    calls = count()

    def launch(request: Request, **_: Any) -> Measured:
        if next(calls) == 2:
            monitors[0].process.send_signal(signal.SIGKILL)
            monitors[0].process.wait()
        # Of now, so that there are readings of then.
        now = latest(monitors[0])
        answer = Launch()(request)
        moved = {} if now is None else {"started_s": now.at_s, "ended_s": now.at_s + 0.001}
        return msgspec.structs.replace(answer, **moved)

    options = {"launch": launch, "here": Here(), "watch": watch, "say": told.append, **ONE}
    cell = profile(shared_bundle, tmp_path / "p", **options).cells[0]
    assert cell.missing["conditions"] == "the monitor ended with signal 9"
    assert cell.evidence["temperature_c.soc.max"] == (41.5, 41.5)
    assert len(set(cell.process)) == 5
    assert told[0].startswith("sensors: read every ")
    assert " core" in told[0]


def test_a_monitor_that_never_answered_is_told_at_once(shared_bundle, tmp_path):
    told: list[str] = []
    (tmp_path / "toy.json").write_text("no toy")
    options = {"launch": Launch(), "here": Here(), "say": told.append, **ONE}
    done = profile(shared_bundle, tmp_path / "p", watch=lambda: watching(str(tmp_path), source=SOURCE), **options)
    assert told[0] == "conditions are not watched: the monitor ended with exit 1"
    assert done.cells[0].missing["conditions"] == "the monitor ended with exit 1"


def test_clocks_that_are_to_be_pinned_and_cannot_end_the_run_before_it_begins(shared_bundle, tmp_path):
    (tmp_path / "toy.json").write_text('{"locks": false}')
    launch = Launch()
    with pytest.raises(MissingError, match="the clocks of a toy cannot be pinned"):
        profile(
            shared_bundle,
            tmp_path / "p",
            launch=launch,
            here=Here(),
            watch=lambda: watching(str(tmp_path), lock_clocks=True, source=SOURCE),
            **ONE,
        )
    assert launch.requests == []
    assert list((tmp_path / "p").iterdir()) == []


# ---------------------------------------------------------------- sustained runs


def slowing(after_s: float) -> Launch:
    """Calls of a 64th of a second, and of a 32nd once a device is warm."""
    return Launch(lambda _: chain(repeat(1 / 64, round(64 * after_s)), repeat(1 / 32)))


def test_a_sustained_run_is_two_cells_of_the_same_processes(shared_bundle, tmp_path):
    """Ten seconds of calls are the burst; the windows of 20 s from the first on that are all slow the other."""
    done = profile(shared_bundle, tmp_path, preset="sustained", launch=slowing(30.0), here=Here(), **ONE)
    burst, sustained = done.cells
    assert (burst.regime, sustained.regime) == ("burst", "sustained")
    assert burst.latency_s == (1 / 64,) * 640 * 3
    assert set(sustained.latency_s) == {1 / 32}
    for cell in done.cells:
        assert sorted(set(cell.process)) == [0, 1, 2]
        assert cell.process.count(0) == cell.process.count(1) == cell.process.count(2)
        assert cell.load_s == (0.125,) * 3
        assert cell.flags == ()
        assert sum(cell.latency_s) / 3 >= BURST_S
    assert burst.key != sustained.key
    assert read_profile(done.stored.path).profile.cells == done.cells


@pytest.mark.parametrize(
    ("busy", "flags"),
    [
        (lambda s: min(s, 5.0), [("contended",), ()]),
        (lambda s: max(0.0, s - 60.0), [(), ("contended",)]),
        (lambda s: min(max(0.0, s - 15.0), 5.0), [(), ()]),
    ],
    ids=["at first", "in the end", "on the way"],
)
def test_what_disturbs_a_part_of_a_sustained_run_flags_the_cell_of_that_part(shared_bundle, tmp_path, busy, flags):
    def look(number: int, started_s: float, ended_s: float) -> Sequence[Reading]:
        return around(started_s, ended_s, busy_s=lambda t: busy(t - started_s), ours_s=0.0, cgroup_throttled=0.0)

    options = {"launch": slowing(30.0), "here": Here(), "watch": lambda: Watching(look), **ONE}
    cells = profile(shared_bundle, tmp_path, preset="sustained", **options).cells
    assert [cell.flags for cell in cells] == flags
    assert [len(cell.evidence["watched_s"]) for cell in cells] == [3, 3]
    for seconds in cells[0].evidence["watched_s"]:
        assert BURST_S <= seconds <= BURST_S + 1
    longest = max(cells[1].evidence["watched_s"])
    assert sum(cells[1].latency_s) / 3 <= longest <= sum(cells[1].latency_s) / 3 + 1


def test_burst_and_sustained_have_energies_of_their_own(shared_bundle, tmp_path, idling):
    """16 W beyond idling for the first ten seconds, and 8 W from then on."""

    def look(number: int, started_s: float, ended_s: float) -> Sequence[Reading]:
        if number == 0:
            return around(started_s, ended_s, power_w=5.0)
        return around(started_s, ended_s, energy_j=lambda t: 13.0 * t + 8.0 * min(t - started_s, BURST_S))

    options = {"launch": slowing(30.0), "here": Metered(), "watch": lambda: Watching(look), "clock": idling, **ONE}
    burst, sustained = profile(shared_bundle, tmp_path, preset="sustained", **options).cells
    assert (burst.energy_j, sustained.energy_j) == (pytest.approx(16 / 64, rel=1e-3), pytest.approx(8 / 32, rel=1e-3))
    assert len(burst.evidence["energy_j"]) == len(sustained.evidence["energy_j"]) == 3


def test_what_never_settles_is_the_later_half_and_noisy(shared_bundle, tmp_path):
    """Calls become slower as long as anybody looks."""
    launch = Launch(lambda _: (1 / 64 + i / 2**17 for i in count()))
    burst, sustained = profile(shared_bundle, tmp_path, preset="sustained", launch=launch, here=Here(), **ONE).cells
    samples = launch.answers[0].latency_s
    assert sum(samples) >= PRESETS["sustained"].sampling.settle_s
    assert sustained.latency_s[: sustained.process.count(0)] == samples[len(samples) // 2 :]
    assert sustained.flags == ("noisy",)
    assert sustained.remarks == ("noisy: warm-up ended unsteadily in 3 of 3 processes",)
    assert burst.flags == (), "a burst is what comes before anything is steady"


def test_a_device_that_goes_on_warming_up_has_not_settled(shared_bundle, tmp_path):
    """Though its calls take the same all the time."""
    warming = seen(temperature_c__soc=lambda t: 40 + t / 20)
    cells = profile(
        shared_bundle,
        tmp_path,
        preset="sustained",
        launch=Launch(),
        here=Here(),
        watch=lambda: Watching(warming),
        **ONE,
    ).cells
    assert sum(cells[1].latency_s) / 3 >= PRESETS["sustained"].sampling.settle_s / 2
    assert cells[1].flags == ("noisy",)


def test_a_call_longer_than_a_burst_is_a_burst_of_its_own(shared_bundle, tmp_path):
    burst, sustained = profile(
        shared_bundle, tmp_path, preset="sustained", launch=Launch(lambda _: repeat(16.0)), here=Here(), **ONE
    ).cells
    assert burst.latency_s == (16.0,) * 3
    assert sustained.latency_s


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("preset", ["quick", "sustained"])
def test_an_error_after_good_rounds_keeps_their_samples_in_every_regime(shared_bundle, tmp_path, preset):
    calls = count()

    def launch(request: Request, **_: Any) -> Measured:
        if next(calls) == 2:
            raise MissingError("h02-fp32: the measuring process was killed for lack of memory: it said nothing")
        return Launch()(request)

    cells = profile(shared_bundle, tmp_path, preset=preset, launch=launch, here=Here(), **ONE).cells
    assert len(cells) == (2 if preset == "sustained" else 1)
    for cell in cells:
        assert cell.error == "h02-fp32: the measuring process was killed for lack of memory: it said nothing"
        assert sorted(set(cell.process)) == [0, 1]
        assert len(cell.load_s) == len(cell.evidence["warmup"]) == 2
        with pytest.raises(InvalidError, match="killed for lack of memory") as error:
            check_clean([cell])
        assert error.value.message.count(cell.artifact) == 1
    assert next(calls) == 3, "it is not tried again"


def test_a_cell_that_never_worked_has_neither_figures_nor_flags(shared_bundle, tmp_path):
    def launch(request: Request, **_: Any) -> Measured:
        if request.artifact == "h03-fp32":
            raise MissingError("h03-fp32: no answer within 600 s")
        return Launch()(request)

    here = Here().changed(clocks="floating")
    cells = profile(shared_bundle, tmp_path, launch=launch, here=here, **ONE | {"heads": (2, 3)}).cells
    good, bad = cells
    assert good.flags == ("floating-clocks",)
    assert (bad.latency_s, bad.load_s, bad.flags, bad.memory_bytes) == ((), (), (), None)
    assert bad.error == "h03-fp32: no answer within 600 s"


def test_what_switching_costs_is_of_all_processes_where_there_is_something_to_switch_from(shared_bundle, tmp_path):
    cells = profile(
        shared_bundle, tmp_path, preset="standard", launch=Launch(), here=Here(), **ONE | {"heads": (2, 3)}
    ).cells
    for cell in cells:
        assert cell.switch_s == (1 / 64,) * 30
    alone = profile(shared_bundle, tmp_path / "p", preset="standard", launch=Launch(), here=Here(), **ONE).cells
    assert alone[0].switch_s == ()
