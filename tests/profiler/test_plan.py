"""What a run will take, told before it is begun; and the command line of what is to be measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hydradeploy import export, open_bundle
from hydradeploy.backends.null import VirtualClock
from hydradeploy.errors import ExitCode, InvalidError, MissingError
from hydradeploy.measurements import read_profiles
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.plan import Plan, process_s, sentence
from hydradeploy.profiler.presets import PRESETS, Target
from hydradeploy.profiler.profile import Order, check_clean
from hydradeploy.profiler.profile import plan as plan_of
from hydradeploy.profiler.profile import profile as real_profile
from hydradeploy.profiler.sampling import Measured
from hydradeploy.stats.order import samples_needed
from hydradeploy.units import show_duration
from tests.conftest import Cli
from tests.profiler.virtual import DEVICE, Here, Launch, profile

FP32 = {"heads": (2, 4), "precisions": ("fp32",), "threads": (2,)}
QUICK = PRESETS["quick"]
THEM = f"2 cells (saturated) in {QUICK.rounds} rounds of fresh processes"


def refuse(request: Request, **_: Any) -> Measured:
    raise AssertionError(f"{request.artifact} is measured")


def plan(bundle: Path, profiles: Path, launch: Any = refuse, here: Here | None = None, **options: Any) -> Plan:
    return plan_of(bundle, profiles, Order(**FP32 | options), launch=launch, here=here or Here())


def by_heads(request: Request) -> Iterator[float]:
    """A 64th of a second per head."""
    return repeat(int(request.artifact[1:3]) / 64)


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with what changes when it is written."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


# ---------------------------------------------------------------- expected times


def test_a_plan_expects_what_was_measured_before(shared_bundle, tmp_path):
    """Of processes: 0.6 s to start, three calls to load, 50 ms or a call of warm-up, and samples."""
    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), **FP32)
    found = plan(shared_bundle, tmp_path)
    assert [cell.call_s for cell in found.cells] == [2 / 64, 4 / 64]
    (warmup_s, count) = (QUICK.sampling.warmup_s, math.ceil(QUICK.samples / QUICK.rounds))
    assert 2 / 64 < warmup_s < 4 / 64
    assert count > QUICK.sampling.samples
    processes = (0.6 + (3 + count) * 2 / 64 + warmup_s) + (0.6 + (3 + 1 + count) * 4 / 64)
    assert found.expected_s == pytest.approx(QUICK.rounds * processes)
    assert found.at_most_s == QUICK.wall_s


def test_a_plan_counts_what_calls_last_for_a_meter(shared_bundle, tmp_path):
    """1.5 s a process where a meter is read four times a second."""

    class Metered(Here):
        def meter(self) -> str | None:
            return "VDD_IN, module"

    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), **FP32)
    found, plain = (plan(shared_bundle, tmp_path, here=here) for here in (Metered(), Here()))
    shorter = [max(0.0, 1.5 - math.ceil(QUICK.samples / QUICK.rounds) * call_s) for call_s in (2 / 64, 4 / 64)]
    assert shorter[0] > 0.5
    assert found.expected_s == pytest.approx(plain.expected_s + QUICK.rounds * sum(shorter))
    assert found.cells == plain.cells


def test_a_run_says_what_it_expects_before_it_measures(shared_bundle, tmp_path):
    told: list[str] = []
    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), say=told.append, **FP32)
    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), say=told.append, **FP32)
    planned = [text for text in told if "rounds of fresh processes" in text]
    assert planned == [
        f"{THEM}, within {show_duration(QUICK.wall_s)} or what the fewest samples take",
        f"{THEM}, about {show_duration(plan(shared_bundle, tmp_path).expected_s)}",
    ]


def test_the_newest_of_several_profiles_tells(shared_bundle, tmp_path):
    old, new = Here().changed(affinity="0"), Here()
    profile(shared_bundle, tmp_path, launch=Launch(lambda _: repeat(1.0)), here=old, **FP32)
    stored = read_profiles(tmp_path)[0]
    aged = [msgspec.structs.replace(cell, measured_at="2020-01-01T00:00:00+00:00") for cell in stored.profile.cells]
    stored.path.write_bytes(msgspec.json.encode(msgspec.structs.replace(stored.profile, cells=tuple(aged))))
    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=new, **FP32)
    for here in (old, new):
        assert [cell.call_s for cell in plan(shared_bundle, tmp_path, here=here).cells] == [2 / 64, 4 / 64]


def probe(bundle: Path, profiles: Path, **options: Any) -> tuple[Plan, list[Request]]:
    launch = Launch(by_heads)
    return plan(bundle, profiles, launch, **options), launch.requests


def test_what_was_never_measured_is_judged_by_a_probe_of_the_smallest_and_multiplications(shared_bundle, tmp_path):
    found, requests = probe(shared_bundle, tmp_path)
    macs = {artifact.name: artifact.macs for artifact in open_bundle(shared_bundle).manifest.artifacts}
    assert [request.artifact for request in requests] == ["h02-fp32"]
    assert requests[0].sampling.samples == 3
    assert [cell.call_s for cell in found.cells] == pytest.approx(
        [2 / 64, 2 / 64 * macs["h04-fp32"] / macs["h02-fp32"]]
    )
    assert found.expected_s is not None


def test_a_probe_accounts_for_the_images_of_a_call(supernet_file, tmp_path):
    export(supernet_file, tmp_path / "bundle", heads=(2, 4), batch=8)
    found, _ = probe(tmp_path / "bundle", tmp_path / "p")
    macs = {artifact.name: artifact.macs for artifact in open_bundle(tmp_path / "bundle").manifest.artifacts}
    assert [cell.batch for cell in found.cells] == [8, 8]
    assert found.cells[1].call_s == pytest.approx(2 / 64 * macs["h04-fp32"] / macs["h02-fp32"])


@pytest.mark.parametrize(
    "other",
    [
        {"here": Here(msgspec.structs.replace(DEVICE, name="Toy Board 4"))},
        {"threads": (1,)},
        {"heads": (2, 3)},
        {"precisions": ("fp16",)},
    ],
    ids=["another device", "other threads", "another artifact", "another precision"],
)
def test_what_was_measured_of_another_is_no_basis(shared_bundle, tmp_path, other):
    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), **FP32)
    assert len(probe(shared_bundle, tmp_path, **other)[1]) == 1


def test_a_failed_measurement_and_one_on_a_schedule_are_no_basis(shared_bundle, tmp_path):
    def launch(request: Request, **_: Any) -> Measured:
        if request.artifact == "h04-fp32":
            raise MissingError("h04-fp32: gone")
        return Launch(by_heads)(request)

    profile(shared_bundle, tmp_path, launch=launch, here=Here(), **FP32)
    profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), pace_hz=8.0, **FP32)
    assert len(probe(shared_bundle, tmp_path)[1]) == 1


def test_a_probe_that_fails_is_the_error_of_the_plan(shared_bundle, tmp_path):
    def launch(request: Request, **_: Any) -> Measured:
        raise MissingError(f"{request.artifact}: it said nothing")

    with pytest.raises(MissingError, match="h02-fp32: it said nothing"):
        plan(shared_bundle, tmp_path, launch)


@pytest.fixture
def measured(shared_bundle, tmp_path) -> Path:
    """Profiles in which all of FP32 has been measured."""
    profile(shared_bundle, tmp_path / "profiles", launch=Launch(by_heads), here=Here(), **FP32)
    return tmp_path / "profiles"


def test_a_percentile_further_out_takes_longer(shared_bundle, measured):
    usual, further = plan(shared_bundle, measured), plan(shared_bundle, measured, target=Target(0.99))
    counts = [math.ceil(n / QUICK.rounds) for n in (QUICK.samples, samples_needed(0.99, 0.95, QUICK.misses))]
    assert usual.expected_s is not None
    assert further.expected_s == pytest.approx(usual.expected_s + QUICK.rounds * (counts[1] - counts[0]) * (2 + 4) / 64)


@pytest.mark.parametrize("max_time_s", [30.0, 1.0, 3600.0])
def test_a_plan_expects_the_time_there_is_but_never_less_than_the_least(shared_bundle, measured, max_time_s):
    found = plan(shared_bundle, measured, max_time_s=max_time_s, target=Target(0.99))
    counts = (QUICK.sampling.samples, math.ceil(samples_needed(0.99, 0.95, QUICK.misses) / QUICK.rounds))
    least, most = (QUICK.rounds * sum(process_s(QUICK, call_s, n) for call_s in (2 / 64, 4 / 64)) for n in counts)
    assert least < 30 < most
    assert found.expected_s == pytest.approx({30.0: 30.0, 1.0: least, 3600.0: most}[max_time_s])
    assert found.at_most_s == max_time_s


def test_a_schedule_takes_its_period_for_each_sample(shared_bundle, measured):
    found = plan(shared_bundle, measured, pace_hz=4.0)
    assert found.regimes == ("paced-4hz",)
    assert found.expected_s is not None
    assert found.expected_s > QUICK.rounds * 2 * QUICK.sampling.samples / 4


def test_a_sustained_run_tells_what_it_takes_at_most_without_a_probe(shared_bundle, tmp_path):
    found, how = plan(shared_bundle, tmp_path, preset="sustained"), PRESETS["sustained"]
    assert found.regimes == ("burst", "sustained")
    assert (found.expected_s, found.at_most_s) == (None, 2 * how.rounds * how.sampling.settle_s)
    assert sentence(found).startswith(f"4 cells (burst, sustained) in {how.rounds} rounds of fresh processes, within ")


def test_the_expected_time_is_about_what_a_run_then_takes(shared_bundle, measured):
    """A child's process takes its 0.6 s to start, and time passes only in it."""
    clock = VirtualClock()

    def launch(request: Request, **_: Any) -> Measured:
        answer = Launch(by_heads)(request)
        clock.advance(0.6 + answer.ended_s + sum(answer.switch_s))
        return answer

    for options in ({}, {"preset": "standard"}, {"max_time_s": 30.0, "target": Target(0.99)}):
        expected_s = plan(shared_bundle, measured, **options).expected_s
        began = clock.now
        profile(shared_bundle, measured, launch=launch, here=Here(), clock=clock, **FP32 | options)
        assert clock.now - began == pytest.approx(expected_s, rel=0.15)


# ---------------------------------------------------------------- on the command line


Virtually = Callable[..., Launch]


@pytest.fixture
def virtually(monkeypatch: pytest.MonkeyPatch) -> Virtually:
    """Children and a machine that are none, also where the command line asks for them."""

    def put(latencies: Any = by_heads, here: Here | None = None) -> Launch:
        launch = Launch(latencies)
        for function in (real_profile, plan_of):
            for name, value in {"launch": launch, "here": here or Here()}.items():
                monkeypatch.setitem(function.__kwdefaults__, name, value)
        return launch

    return put


def arguments(bundle: Path, profiles: Path, *more: object) -> tuple[object, ...]:
    chosen = ("--heads", "2,4", "--precision", "fp32", "--threads", 2)
    return ("profile", "--bundle", bundle, "--profiles", profiles, *chosen, *more)


def test_a_dry_run_measures_nothing_but_the_probe_and_writes_nothing(bundle, tmp_path, cli: Cli, virtually: Virtually):
    open_bundle(bundle)
    launch, before = virtually(), tree(tmp_path)
    ran = cli(*arguments(bundle, tmp_path / "profiles", "--dry-run"))
    assert ran.code == 0, ran.err
    assert ran.err == ""
    rounds, least = str(QUICK.rounds), str(QUICK.rounds * QUICK.sampling.samples)
    lines = [line.split() for line in ran.out.splitlines() if line.strip()]
    header = ["artifact", "backend", "threads", "batch", "processes", "samples", "at", "least", "one", "call"]
    assert lines[0] == header
    ways = ["onnxruntime,", "fp32", "2", "1", rounds, least]
    assert [line[:7] for line in lines[2:4]] == [[name, *ways] for name in ("h02-fp32", "h04-fp32")]
    assert lines[2][7:] == ["31.2", "ms"]
    assert ran.out.splitlines()[-1].startswith(f"{THEM}, about ")
    assert launch.names == ["h02-fp32"]
    assert tree(tmp_path) == before


def test_a_dry_run_as_json_is_the_plan(bundle, tmp_path, cli: Cli, virtually: Virtually):
    virtually()
    ran = cli(*arguments(bundle, tmp_path / "profiles", "--dry-run", "--json", "--preset", "standard"))
    assert ran.code == 0, ran.err
    found, how = msgspec.json.decode(ran.out, type=Plan), PRESETS["standard"]
    assert [cell.artifact for cell in found.cells] == ["h02-fp32", "h04-fp32"]
    assert (found.preset, found.regimes, found.at_most_s) == ("standard", ("saturated",), how.wall_s)
    assert {(cell.rounds, cell.samples) for cell in found.cells} == {(how.rounds, how.rounds * how.sampling.samples)}
    assert json.loads(ran.out)["expected_s"] == found.expected_s
    assert not (tmp_path / "profiles").exists()


def test_a_dry_run_beside_profiles_leaves_them_and_needs_no_probe(bundle, tmp_path, cli: Cli, virtually: Virtually):
    launch = virtually()
    assert cli(*arguments(bundle, tmp_path / "profiles")).code == 0
    count, before = len(launch.requests), tree(tmp_path)
    ran = cli(*arguments(bundle, tmp_path / "profiles", "--dry-run"))
    assert ran.out.splitlines()[-1].startswith(f"{THEM}, about ")
    assert len(launch.requests) == count
    assert tree(tmp_path) == before


def test_a_dry_run_with_real_children_measures_one(shared_bundle, tmp_path, cli: Cli):
    ran = cli(*arguments(shared_bundle, tmp_path / "profiles", "--dry-run", "--json"))
    assert ran.code == 0, ran.err
    assert all(cell.call_s > 0 for cell in msgspec.json.decode(ran.out, type=Plan).cells)
    assert os.listdir(tmp_path) == []


REGIMES = {
    "paced-30hz": ("--pace", "30hz"),
    "concurrent-2": ("--concurrency", 2),
    "saturated": ("--percentile", "p99", "--confidence", "99%", "--max-time", "10min"),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_how_calls_are_to_arrive_is_what_is_measured(shared_bundle, tmp_path, cli: Cli, virtually: Virtually, regime):
    launch = virtually(lambda _: repeat(1 / 64))
    ran = cli(*arguments(shared_bundle, tmp_path, *REGIMES[regime], "--json"))
    assert ran.code == 0, ran.err
    cells = json.loads(ran.out)["cells"]
    assert [(cell["artifact"], cell["regime"]) for cell in cells] == [("h02-fp32", regime), ("h04-fp32", regime)]
    how = launch.requests[0].sampling
    assert (how.pace_hz, how.concurrency) == (30.0 if "paced" in regime else None, 2 if "concurrent" in regime else 1)
    if regime == "saturated":
        assert len(cells[0]["latency_s"]) >= 662, "what p99 takes with 99 %, one call over it"
    elif regime == "paced-30hz":
        assert cells[0]["latency_s"] == pytest.approx([1 / 64] * len(cells[0]["latency_s"])), (
            "from the moment each was due"
        )


def test_a_paced_run_and_a_saturated_one_are_beside_each_other(shared_bundle, tmp_path, cli: Cli, virtually: Virtually):
    virtually()
    for more in ((), ("--pace", "8hz"), ("--concurrency", "2"), ("--preset", "sustained")):
        assert cli(*arguments(shared_bundle, tmp_path, *more)).code == 0
    (stored,) = read_profiles(tmp_path)
    found = sorted(cell.regime for cell in stored.profile.cells if cell.artifact == "h02-fp32")
    assert found == ["burst", "concurrent-2", "paced-8hz", "saturated", "sustained"]


def test_a_sustained_run_shows_burst_and_settled_figures_side_by_side(
    shared_bundle, tmp_path, cli: Cli, virtually: Virtually
):
    virtually()
    ran = cli(*arguments(shared_bundle, tmp_path, "--preset", "sustained"))
    assert ran.code == 0, ran.err
    assert f"4 cells (burst, sustained) in {PRESETS['sustained'].rounds} rounds of fresh processes" in ran.err
    titles = [line for line in ran.out.splitlines() if "onnxruntime, cpu, 2 threads" in line]
    assert any(line.startswith("burst") for line in titles)
    assert any(line.startswith("sustained") for line in titles)
    assert ran.out.splitlines()[-1].endswith("4 cells measured")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--pace", "30"), "'30' has no unit"),
        (("--pace", "0hz"), "a schedule of 0 calls a second has none"),
        (("--pace", "fast"), "'fast' is not a rate"),
        (("--pace", "30hz", "--concurrency", "2"), "calls on a schedule come from one caller"),
        (("--concurrency", "0"), "concurrency"),
        (("--concurrency", "two"), "concurrency"),
        (("--preset", "sustained", "--max-time", "1min"), "a sustained run takes the time it takes"),
        (("--preset", "sustained", "--pace", "30hz"), "a sustained run calls back to back"),
        (("--preset", "sustained", "--concurrency", "2"), "a sustained run calls back to back"),
        (("--percentile", "95"), "'95' is not a percentile"),
        (("--percentile", "95%"), "'95%' is not a percentile"),
        (("--percentile", "p100"), "'p100' is not a percentile"),
        (("--percentile", "p20"), "percentile 0.2 with confidence 0.95 is not possible"),
        (("--percentile", "p99.99"), "percentile 0.9999 with confidence 0.95 is not possible"),
        (("--confidence", "95"), "'95' has no unit"),
        (("--confidence", "100%"), "percentile 0.95 with confidence 1 is not possible"),
        (("--confidence", "p95"), "'p95' is not a percentage"),
        (("--max-time", "10"), "'10' has no unit"),
        (("--max-time", "-1s"), "'-1s' is not a duration"),
        (("--preset", "thorough"), "no preset 'thorough'"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_what_makes_no_sense_is_refused_with_a_hint_and_nothing_is_measured(
    shared_bundle, tmp_path, cli: Cli, virtually: Virtually, more, said, dry
):
    launch = virtually()
    ran = cli(*arguments(shared_bundle, tmp_path / "profiles", *more, *dry))
    assert ran.code == ExitCode.USAGE
    assert ran.err.startswith("error: ")
    assert said in ran.err.replace("--concurrency", "concurrency")
    assert "\nhint: " in ran.err
    assert ran.out == ""
    assert launch.requests == []
    assert not (tmp_path / "profiles").exists()


# ---------------------------------------------------------------- strict


def test_strict_is_exit_6_for_what_is_not_clean_and_keeps_it(shared_bundle, tmp_path, cli: Cli, virtually: Virtually):
    virtually(here=Here().changed(clocks="floating"))
    for more in ((), ("--json",)):
        ran = cli(*arguments(shared_bundle, tmp_path, "--strict", *more))
        assert ran.code == ExitCode.INVALID == 6
        said = "error: 2 of 2 measurements are not clean: h02-fp32: floating-clocks; h04-fp32: floating-clocks\nhint: "
        assert said in ran.err
        assert "they are kept" in ran.err
        (stored,) = read_profiles(tmp_path)
        assert {cell.flags for cell in stored.profile.cells} == {("floating-clocks",)}
        assert len(json.loads(ran.out)["cells"]) == 2 if more else str(stored.path) in ran.out


def test_strict_is_exit_0_for_what_is_clean_and_without_it_flags_are_shown_only(
    shared_bundle, tmp_path, cli: Cli, virtually: Virtually
):
    virtually()
    assert cli(*arguments(shared_bundle, tmp_path, "--strict")).code == 0
    virtually(here=Here().changed(clocks="floating"))
    ran = cli(*arguments(shared_bundle, tmp_path))
    assert ran.code == 0
    assert "floating-clocks: nothing kept the clocks where they were" in ran.out


def test_strict_refuses_what_could_not_be_measured(shared_bundle, tmp_path, cli: Cli, virtually: Virtually):
    def latencies(request: Request) -> Iterator[float]:
        if request.artifact == "h04-fp32":
            raise MissingError("h04-fp32: no answer within 600 s")
        return repeat(1 / 64)

    virtually(latencies)
    ran = cli(*arguments(shared_bundle, tmp_path, "--strict"))
    assert ran.code == 6
    assert "1 of 2 measurements are not clean: h04-fp32: no answer within 600 s" in ran.err
    assert len(read_profiles(tmp_path)[0].profile.cells) == 2


def test_clean_cells_pass(shared_bundle, tmp_path):
    cells = profile(shared_bundle, tmp_path, launch=Launch(by_heads), here=Here(), **FP32).cells
    check_clean(cells)
    with pytest.raises(InvalidError, match="1 of 2 measurements"):
        check_clean([cells[0], msgspec.structs.replace(cells[1], flags=("noisy", "contended"))])
