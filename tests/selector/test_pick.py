"""`pick` on files and through the command line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from hydradeploy import declare, export, open_bundle
from hydradeploy.bundle import ACCURACY, AccuracyRow, Artifact, read_accuracy, write_accuracy
from hydradeploy.devices import DEVICE_MODULES, machine
from hydradeploy.errors import ForeignError, UsageError
from hydradeploy.measurements import Cell, Conditions, Device, add_profile
from hydradeploy.report.text import sentence
from hydradeploy.selector.answer import Answer
from hydradeploy.selector.budget import Budget
from hydradeploy.selector.pick import Request, pick, pick_all
from tests.conftest import Cli, geometry, write_supernet
from tests.selector.build import accuracy, cell, conditions, device, failed, latencies, limit, profile, share

MS = 1e-3
# Right answers of 200, per head count.
RIGHT = {2: 100, 3: 130, 4: 160, 5: 180, 6: 182}


class World:
    """A bundle with its profiles, and `pick` on them."""

    def __init__(self, bundle: Path, profiles: Path, cli: Cli) -> None:
        self.bundle, self.profiles, self.cli = bundle, profiles, cli
        opened = open_bundle(bundle)
        self.artifacts = {artifact.name: artifact for artifact in opened.manifest.artifacts}
        self.here = machine().identity()
        self.now = machine().conditions({"onnxruntime": "1.0"})

    def named(self, heads: int, precision: str = "fp32") -> Artifact:
        return self.artifacts[f"h{heads:02d}-{precision}"]

    def cell(self, heads: int, level_s: float | None = None, *, n: int = 40, **changes: Any) -> Cell:
        """A cell of five processes, by default of 1 ms per head."""
        level = heads * MS if level_s is None else level_s
        return cell(self.named(heads), latencies(*(level,) * 5, n=n, seed=heads), **changes)

    def measured(self, *cells: Cell, of: Device | None = None, under: Conditions | None = None) -> Path:
        return add_profile(self.profiles, profile(cells, of or self.here, under or self.now)).path

    def ladder(self, **changes: Any) -> Path:
        return self.measured(*(self.cell(heads, **changes) for heads in RIGHT))

    def evaluated(self, rights: Mapping[int, int] = RIGHT, **changes: Any) -> None:
        changes = {"instruction_set": self.here.instruction_set} | changes
        self.rows(*(accuracy(self.named(heads), share(right), **changes) for heads, right in rights.items()))

    def rows(self, *rows: AccuracyRow) -> None:
        write_accuracy(open_bundle(self.bundle), dict.fromkeys(rows))

    def run(self, *options: object):
        return self.cli("pick", "--bundle", self.bundle, "--profiles", self.profiles, *options)

    def json(self, *options: object, code: int = 0) -> dict[str, Any]:
        ran = self.run(*options, "--json")
        assert ran.code == code, ran.err
        assert ran.out.count("\n") == 1
        return json.loads(ran.out)

    def refused(self, *options: object, code: int) -> str:
        ran = self.run(*options)
        assert ran.code == code, ran.out + ran.err
        assert ran.out == ""
        assert ran.err.startswith("error: ")
        assert "Traceback" not in ran.err
        return ran.err


@pytest.fixture
def bare(bundle: Path, tmp_path: Path, cli: Cli) -> World:
    """A bundle without accuracy, and no profile."""
    return World(bundle, tmp_path / "profiles", cli)


@pytest.fixture
def world(bare: World) -> World:
    """Five artifacts of 1 ms per head, the wider the more accurate, measured here and now."""
    bare.evaluated()
    bare.ladder()
    return bare


# -- the answer -----------------------------------------------------------------------------------------------------

ANSWER = {
    *("verdict", "device_here", "profile", "device", "pick", "budget", "prefer", "runner_up", "cheaper", "nearest"),
    *("more_samples", "knobs", "notes", "rejected"),
}
PICKED = {
    *("artifact", "heads", "precision", "backend", "compute_type", "settings", "input", "batch", "threads"),
    *("regime", "file", "sha256"),
    *("latency_s", "accuracy", "memory_bytes", "size_bytes", "energy_j", "flags"),
}
LATENCY = {
    *("p50", "p95", "p99", "upper", "percentile", "confidence", "n", "n_effective", "processes", "spread"),
    "assumes",
}
TOP1 = {"top1", "lower", "upper", "n", "dataset", "source", "backend", "compute_type", "instruction_set"}
REJECTED = {"artifact", "backend", "compute_type", "settings", "threads", "batch", "status", "reason"}


def test_json_has_the_documented_keys_and_the_measured_values(world: World):
    found = world.json("--latency", "4.5ms", "--memory", "1GiB")
    assert set(found) == ANSWER
    picked, measured, of = found["pick"], world.cell(4), world.named(4)
    assert set(picked) == PICKED
    assert set(picked["latency_s"]) == LATENCY
    assert set(picked["accuracy"]) == TOP1
    assert (found["verdict"], found["device_here"], found["device"]) == ("pass", True, world.here.name)
    assert found["profile"] == str(next(world.profiles.glob("*.json")))
    assert (picked["artifact"], picked["heads"], picked["precision"]) == ("h04-fp32", 4, "fp32")
    assert (picked["backend"], picked["batch"], picked["threads"]) == ("onnxruntime", 1, 1)
    assert (picked["compute_type"], picked["settings"], picked["input"]) == ("fp32", {}, "float32")
    assert (picked["file"], picked["sha256"]) == (of.graphs["ort"], of.sha256)
    assert (world.bundle / picked["file"]).is_file()
    assert (picked["size_bytes"], picked["memory_bytes"]) == (of.size_bytes, measured.memory_bytes)
    assert (picked["energy_j"], picked["regime"], picked["flags"]) == (None, "saturated", [])
    ordered, latency = sorted(measured.latency_s), picked["latency_s"]
    assert (latency["p50"], latency["p95"]) == (ordered[99], ordered[189])
    assert latency["p95"] <= latency["upper"] <= 4.5 * MS
    assert (latency["percentile"], latency["confidence"]) == (0.95, 0.95)
    assert (latency["n"], latency["processes"], latency["assumes"]) == (200, 5, None)
    assert 0 < latency["n_effective"] <= 200
    assert (picked["accuracy"]["top1"], picked["accuracy"]["n"]) == (0.8, 200)
    assert picked["accuracy"]["lower"] < 0.8 < picked["accuracy"]["upper"]
    assert (picked["accuracy"]["dataset"], picked["accuracy"]["source"]) == ("images", "measured")
    budget = found["budget"]
    assert budget["latency"] == [{"percentile": 0.95, "limit_s": 0.0045}]
    assert (budget["memory_bytes"], budget["size_bytes"], budget["confidence"]) == (2**30, None, 0.95)
    assert found["runner_up"]["artifact"] == "h03-fp32"
    assert (found["nearest"], found["more_samples"], found["knobs"]) == (None, None, [])
    assert {r["artifact"]: r["status"] for r in found["rejected"]} == {"h05-fp32": "missed", "h06-fp32": "missed"}
    for rejected in found["rejected"]:
        assert set(rejected) == REJECTED


def test_a_percentile_is_null_where_the_samples_cannot_carry_it(world: World):
    # 299 independent samples for p99, 59 for p95, 5 for p50. A bound takes ten.
    for n, carried in ((80, {"p50", "p95", "p99"}), (40, {"p50", "p95"}), (10, {"p50"}), (1, {"p50"})):
        world.ladder(n=n)
        found = world.json("--size", "1GiB", "--prefer", "latency")["pick"]["latency_s"]
        assert found["n"] == 5 * n
        assert {key for key in ("p50", "p95", "p99") if found[key] is not None} == carried
        assert (found["upper"] is None) == (5 * n < 59)
        assert found["assumes"] is None


def test_the_cheaper_one_is_offered_where_the_difference_may_be_chance(world: World):
    found = world.json("--latency", "9ms")
    assert (found["pick"]["artifact"], found["cheaper"]["artifact"]) == ("h06-fp32", "h05-fp32")
    assert "faster and not significantly less accurate: h05-fp32" in world.run("--latency", "9ms").out
    assert world.json("--latency", "5.5ms")["cheaper"] is None


def test_a_floor_alone_asks_for_the_fastest_above_it(world: World):
    found = world.json("--min-top1", "70%")
    assert (found["prefer"], found["pick"]["artifact"]) == ("latency", "h04-fp32")
    assert world.json("--min-top1", "70%", "--latency", "9ms")["pick"]["artifact"] == "h06-fp32"
    assert world.json("--min-top1", "70%", "--prefer", "accuracy")["pick"]["artifact"] == "h06-fp32"


def test_the_size_is_what_pack_writes(world: World, tmp_path: Path, cli: Cli):
    named = world.json("--latency", "3.5ms")["pick"]
    assert cli("pack", named["artifact"], "--bundle", world.bundle, "--out", tmp_path / "packed").code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "packed").rglob("*") if path.name != ".stamp.json")
    assert named["size_bytes"] == pytest.approx(written, rel=0.01)


def test_people_get_the_same_answer_in_a_sentence(world: World):
    ran = world.run("--latency", "4.5ms")
    first, *_ = ran.out.splitlines()
    assert first.startswith("h04-fp32 (onnxruntime, 1 thread): p95 at most 4.0")
    assert "with 95% confidence" in first
    assert "top-1 80.0%" in first
    assert ran.err == ""


def test_a_bound_of_calls_of_several_images_says_so(bare: World):
    bare.evaluated()
    bare.measured(bare.cell(4, batch=8), bare.cell(6, batch=8))
    out = bare.run("--latency", "4.5ms", "--explain").out
    assert out.startswith("h04-fp32 (onnxruntime, 1 thread, batch 8): p95 at most 4.0")
    assert "refused: h06-fp32 (onnxruntime, 1 thread, batch 8): p95 over" in out


@pytest.mark.parametrize("heads", RIGHT)
def test_a_bound_as_it_is_told_is_a_budget_that_is_met(world: World, heads: int):
    told = world.run("--latency", f"{heads + 0.5}ms").out
    name, bound = re.search(r"^(h\d\d-fp32) .* at most (\S+ \S+) with", told, re.MULTILINE).groups()
    assert name == f"h{heads:02d}-fp32"
    assert world.json("--latency", bound)["pick"]["artifact"] == name


@pytest.mark.parametrize("confidence", ["95%", "97.5%", "99.9%"])
def test_the_confidence_is_told_as_it_was_asked_for(bare: World, confidence: str):
    bare.evaluated()
    levels = [2 * MS * (1 + 0.002 * i) for i in range(5)]
    bare.measured(cell(bare.named(2), latencies(*levels, n=100)))
    assert f" with {confidence} confidence (" in bare.run("--latency", "p90<=9ms", "--confidence", confidence).out
    found = bare.json("--latency", "p90<=9ms", "--confidence", confidence)
    just_below = f"p90<={found['pick']['latency_s']['upper'] * 999}ms"
    ran = bare.run("--latency", just_below, "--confidence", confidence)
    assert ran.code == 4
    assert f"; with {confidence} confidence no more than " in ran.out


def test_the_sentence_has_the_energy_where_it_was_measured_and_the_flags(world: World):
    remark = "floating-clocks: nothing kept the clocks where they were"
    world.measured(world.cell(4, energy_j=0.0421, flags=("floating-clocks",), remarks=(remark,)))
    found = world.json("--latency", "4.5ms")
    assert (found["pick"]["energy_j"], found["pick"]["flags"]) == (0.0421, ["floating-clocks"])
    assert remark in found["notes"]
    first, *_ = world.run("--latency", "4.5ms").out.splitlines()
    assert first.startswith("h04-fp32 (onnxruntime, 1 thread, floating-clocks): p95 at most 4.0")
    assert "0.0421 J per image" in first


def test_a_refusal_for_a_flag_says_on_what_evidence(world: World):
    remark = "contended: other programs kept 0.80 cores busy in 1 of 5 processes"
    world.measured(world.cell(5, flags=("contended", "noisy"), remarks=("noisy: processes differ by 12%", remark)))
    told = world.run("--latency", "9ms", "--explain").out
    assert f"refused: h05-fp32 (onnxruntime, 1 thread): {remark} (--accept contended takes it)" in told


def test_explain_has_a_line_per_refused_cell_with_its_number(world: World):
    world.measured(
        world.cell(2, flags=("contended",), threads=2),
        failed(world.named(3), "out of memory", threads=2),
        world.cell(4, memory_bytes=3 * 2**30, threads=2),
        world.cell(4, n=1, threads=3),
        world.cell(4, memory_bytes=None, threads=4),
        cell(world.named(2, "fp16"), latencies(*(MS,) * 5)),
    )
    ran = world.run("--latency", "4.5ms", "--memory", "1GiB", "--explain")
    assert ran.code == 0
    lines = {
        match[1]: match[2] for line in ran.out.splitlines() if (match := re.match(r"refused: (.*?\)): (.*)", line))
    }
    expected = {
        "h05-fp32 (onnxruntime, 1 thread)": r"p95 over 4.50 ms: 5\.0\d ms",
        "h06-fp32 (onnxruntime, 1 thread)": r"p95 over 4.50 ms: 6\.0\d ms",
        "h02-fp32 (onnxruntime, 2 threads)": r"contended.*--accept contended",
        "h03-fp32 (onnxruntime, 2 threads)": r"out of memory",
        "h04-fp32 (onnxruntime, 2 threads)": r"memory 3.00 GiB, over 1.00 GiB",
        "h04-fp32 (onnxruntime, 3 threads)": r"0 of 5 calls over 4.50 ms; .* worth 5 .* a bound takes 10",
        "h04-fp32 (onnxruntime, 4 threads)": r"memory was not measured",
        "h02-fp16 (onnxruntime, 1 thread)": r"no accuracy",
    }
    assert set(lines) == set(expected)
    for name, pattern in expected.items():
        assert re.search(pattern, lines[name]), lines[name]
    assert "refused" not in world.run("--latency", "4.5ms").out


# -- nothing fits ---------------------------------------------------------------------------------------------------


def followed(options: Sequence[str], knob: str) -> list[str]:
    """The options with the knob's flag in place of the one of that name."""
    flag, value = shlex.split(knob[knob.index("--") :])
    kept, pairs = [], list(zip(options[::2], options[1::2], strict=True))
    for name, old in pairs:
        same = name == flag and (flag != "--latency" or old.partition("<")[0] == value.partition("<")[0])
        if not same:
            kept += [name, old]
    assert flag == "--accept" or len(kept) == len(options) - 2
    return [*kept, flag, value]


# Options, the exit code, how many knobs there are.
MISSES = {
    "latency": (["--latency", "p95<=1.5ms"], 3, 1),
    "latency beside memory": (["--latency", "p95<=1.5ms", "--memory", "35MiB"], 3, 1),
    "another percentile": (["--latency", "p95<=9ms", "--latency", "p50<=1.234ms"], 3, 1),
    "latency and memory": (["--latency", "p95<=2.5ms", "--memory", "5MiB"], 3, 1),
    "memory": (["--memory", "1MiB"], 3, 1),
    "memory in bytes": (["--memory", "1B"], 3, 1),
    "size": (["--size", "1kB"], 3, 1),
    "throughput": (["--throughput", "1234/s"], 3, 1),
    "throughput surely": (["--throughput", "1234/s", "--confidence", "99.9%"], 3, 1),
    "latency surely": (["--latency", "p50<=1ms", "--confidence", "99%"], 3, 1),
    "energy": (["--energy", "0.01mJ"], 3, 1),
    "accuracy": (["--min-top1", "99.9%"], 3, 1),
    "accuracy surely": (["--min-top1", "99.9%", "--confidence", "99.9%"], 3, 1),
    "accuracy hardly": (["--min-top1", "99.9%", "--confidence", "50%"], 3, 1),
    "accuracy or latency": (["--min-top1", "86%", "--latency", "p95<=4.5ms"], 3, 2),
    "accuracy not proven": (["--min-top1", "80%", "--latency", "p95<=4.5ms"], 4, 2),
    "latency not proven": (["--latency", "p99<=2.2ms"], 4, 0),
    "three at once": (["--latency", "p95<=1ms", "--size", "1kB", "--min-top1", "99%"], 3, 0),
}


@pytest.mark.parametrize("miss", MISSES)
def test_what_a_knob_says_gives_that_pick_when_followed(bare: World, miss):
    bare.evaluated()
    # Processes that differ a little: bounds are then no observed values.
    for heads in RIGHT:
        levels = [heads * MS * (1 + 0.01 * i) for i in range(5)]
        bare.measured(cell(bare.named(heads), latencies(*levels), energy_j=heads * 0.01237, threads=2))
    options, code, many = MISSES[miss]
    found = bare.json(*options, code=code)
    assert (found["verdict"], found["pick"]) == ("infeasible" if code == 3 else "inconclusive", None)
    assert found["nearest"]["artifact"] in bare.artifacts
    assert len(found["knobs"]) == many
    for knob in found["knobs"]:
        again = bare.json(*followed(options, knob))
        assert again["pick"]["artifact"] == knob.partition(" ")[0]
    told = bare.run(*options)
    assert told.code == code
    assert [line.removeprefix("would do: ") for line in told.out.splitlines() if "would do" in line] == found["knobs"]
    assert f"nearest: {found['nearest']['artifact']} (" in told.out


def test_a_knob_for_flags_adds_to_those_accepted(bare: World):
    bare.evaluated()
    bare.measured(
        bare.cell(2, flags=("throttled",)), bare.cell(3, 9 * MS), bare.cell(4, flags=("throttled", "contended"))
    )
    (knob,) = [knob for knob in bare.json("--latency", "5ms", code=4)["knobs"] if "--accept" in knob]
    assert knob.endswith("--accept throttled")
    assert bare.json(*followed(["--latency", "5ms"], knob))["pick"]["artifact"] == "h02-fp32"
    bare.measured(bare.cell(2, 9 * MS))
    options = ["--latency", "5ms", "--accept", "throttled"]
    (knob,) = [knob for knob in bare.json(*options, code=4)["knobs"] if "--accept" in knob]
    found = bare.json(*followed(options, knob))
    assert found["pick"]["artifact"] == "h04-fp32"
    assert {"measured while throttled", "measured while contended"} <= set(found["notes"])


def test_what_was_measured_disturbed_decides_nothing(bare: World):
    """Undisturbed it may be fast enough; only where no single call was, the answer is no."""
    bare.evaluated()
    remark = "contended: other programs kept 0.90 cores busy in 1 of 5 processes"
    bare.measured(bare.cell(2, flags=("contended",), remarks=(remark,)), bare.cell(3, 9 * MS))
    found = bare.json("--latency", "5ms", code=4)
    assert (found["verdict"], found["nearest"]["artifact"], found["more_samples"]) == ("inconclusive", "h02-fp32", None)
    said = bare.run("--latency", "5ms").out
    assert "h02-fp32 may meet the budget" in said
    assert f"nearest: h02-fp32 (onnxruntime, 1 thread): {remark} (--accept contended takes it)" in said
    slow = bare.json("--latency", "1us", code=3)
    assert (slow["verdict"], slow["nearest"]["artifact"]) == ("infeasible", "h03-fp32")


@pytest.mark.parametrize("flag", ["throttled", "graph-failed"])
def test_calls_that_were_all_slowed_down_are_no_proof_that_nothing_meets_the_budget(bare: World, flag: str):
    """At half of its clock no call is within the limit; at the whole of it all may be."""
    bare.evaluated()
    bare.measured(bare.cell(2, 8 * MS, flags=(flag,)), bare.cell(3, 9 * MS))
    found = bare.json("--latency", "5ms", code=4)
    assert (found["verdict"], found["nearest"]["artifact"]) == ("inconclusive", "h02-fp32")
    said = bare.run("--latency", "5ms").out
    assert f"nearest: h02-fp32 (onnxruntime, 1 thread): measured while {flag}; p95 over 5.00 ms" in said
    assert "--accept" not in said
    # Its memory is no other undisturbed.
    assert bare.json("--latency", "5ms", "--memory", "1B", code=3)["verdict"] == "infeasible"


def test_where_all_was_measured_disturbed_the_nearest_is_named_without_advice_that_is_of_no_use(bare: World):
    bare.evaluated()
    bare.measured(bare.cell(2, flags=("contended",)), bare.cell(3, flags=("contended",)))
    for options, reason in (
        (("--latency", "1us"), "p95 over 1.00 us"),
        (("--throughput", "5000/s"), "throughput 498/s, at most 498/s, below 5e+03/s"),
        (("--energy", "1J"), "energy was not measured"),
    ):
        found = bare.json(*options, code=3)
        assert (found["verdict"], found["nearest"]["artifact"], found["knobs"]) == ("infeasible", "h02-fp32", [])
        said = bare.run(*options).out
        assert "nearest: h02-fp32 (onnxruntime, 1 thread): measured while contended; " + reason in said
        assert "--accept" not in said


def test_a_knob_names_other_conditions_of_this_device(world: World):
    fast = msgspec.structs.replace(world.now, governor="turbo")
    path = world.measured(world.cell(2, MS / 2, measured_at="2020-01-01T00:00:00Z"), under=fast)
    found = world.json("--latency", "1ms", code=3)
    assert f"h02-fp32 (onnxruntime, 1 thread) fits under the conditions of {path}" in found["knobs"]
    again = world.json("--latency", "1ms", "--profile", path)
    assert again["pick"]["artifact"] == "h02-fp32"
    assert any("governor: turbo" in note for note in again["notes"])


def test_nothing_usable_at_all_is_infeasible_without_a_nearest(bare: World):
    bare.evaluated()
    bare.measured(failed(bare.named(2)), failed(bare.named(3)))
    found = bare.json("--latency", "1us", code=3)
    assert (found["verdict"], found["nearest"]) == ("infeasible", None)
    assert [r["artifact"] for r in found["rejected"]] == ["h02-fp32", "h03-fp32"]
    out = bare.run("--latency", "1us").out
    assert "nothing meets the budget" in out
    # Else nobody would know that nothing was measured.
    assert "refused: h02-fp32 (onnxruntime, 1 thread): could not be measured: no kernel for it" in out
    assert bare.run("--latency", "1us", "--explain").out == out


# Between the slowest of 200 calls of the narrowest and what their logarithms bound p99 by.
NOT_PROVEN = "p99<=2.025ms"


def test_a_percentile_beyond_the_samples_is_inconclusive_and_says_how_many_more(world: World):
    assert max(world.cell(2).latency_s) < 2.025 * MS
    found = world.json("--latency", NOT_PROVEN, code=4)
    assert (found["verdict"], found["pick"], found["nearest"]["artifact"]) == ("inconclusive", None, "h02-fp32")
    nearest = found["nearest"]["latency_s"]
    assert found["more_samples"] == pytest.approx(299 * 200 / nearest["n_effective"] - 200, abs=2)
    assert (nearest["p99"], nearest["assumes"], nearest["upper"]) == (None, None, None)
    told = world.run("--latency", NOT_PROVEN)
    assert told.code == 4
    assert f"about {found['more_samples']} more samples" in told.out
    assert re.search(r"0 of 200 calls over 2\.0\d ms; p99 takes 299 samples even were they independent", told.out)
    # Thrice of it: what would tell is an estimate, and this limit is a hair above the slowest call.
    world.ladder(n=3 * (found["more_samples"] + 200) // 5)
    picked = world.json("--latency", NOT_PROVEN)["pick"]
    assert (picked["artifact"], picked["latency_s"]["assumes"]) == ("h02-fp32", None)
    assert picked["latency_s"]["p99"] <= picked["latency_s"]["upper"] <= 2.025 * MS


def test_a_bound_that_assumes_log_normal_latencies_says_so(bare: World):
    bare.evaluated()
    thrice = [[value for value in chain for _ in range(3)] for chain in latencies(*(2 * MS,) * 5, n=10)]
    bare.measured(cell(bare.named(2), thrice))
    found = bare.json("--latency", "2.5ms")
    latency = found["pick"]["latency_s"]
    assert latency["assumes"] == "log-normal latencies"
    assert max(max(chain) for chain in thrice) <= latency["upper"] <= 2.5 * MS
    note = "too few samples for a bound of p95 without assumptions: log-normal latencies (--preset standard takes more)"
    assert found["notes"] == [note]
    # Of whichever limit it is.
    again = bare.json("--latency", "p50<=2.5ms", "--latency", "p95<=2.5ms")
    assert (again["pick"]["latency_s"]["assumes"], again["notes"]) == (None, [note])
    first, *others = bare.run("--latency", "2.5ms").out.splitlines()
    assert f"(assuming log-normal latencies, 150 samples worth {latency['n_effective']:.0f})" in first
    assert f"note: {note}" in others


def test_samples_worth_too_few_for_any_bound_are_inconclusive_and_leave_no_knob(bare: World):
    bare.evaluated()
    bare.ladder(n=1)
    found = bare.json("--latency", "3ms", code=4)
    assert (found["nearest"]["artifact"], found["nearest"]["latency_s"]["upper"]) == ("h02-fp32", None)
    assert (found["more_samples"], found["knobs"]) == (59 - 5, [])
    assert "5 samples are worth 5 independent ones, a bound takes 10" in bare.run("--latency", "3ms").out


def test_more_samples_are_not_promised_to_what_misses_another_limit(world: World):
    found = world.json("--latency", "p99<=2.5ms", "--size", "1B", code=3)
    assert (found["verdict"], found["more_samples"]) == ("infeasible", None)


def test_few_processes_of_enough_samples_take_nothing_for_granted(bare: World):
    bare.evaluated()
    bare.measured(cell(bare.named(2), latencies(2 * MS, 2.01 * MS, 2 * MS, n=60)))
    found = bare.json("--latency", "3ms")
    assert (found["pick"]["latency_s"]["processes"], found["pick"]["latency_s"]["assumes"]) == (3, None)
    assert found["notes"] == []
    assert "assuming" not in bare.run("--latency", "3ms").out


# -- which profile --------------------------------------------------------------------------------------------------


def test_no_profiles_say_where_and_what_to_do(bare: World):
    bare.evaluated()
    for prepare in (lambda: None, bare.profiles.mkdir):
        prepare()
        said = bare.refused("--latency", "5ms", code=7)
        assert f"{bare.profiles}: no profile here" in said
        assert "hint: measure this device: hydradeploy profile" in said


def test_profiles_of_other_devices_are_named_with_what_differs(bare: World):
    bare.evaluated()
    bare.measured(bare.cell(2), of=device())
    slower = msgspec.structs.replace(bare.here, cores=bare.here.cores + 3)
    path = bare.measured(bare.cell(2), of=slower)
    said = bare.refused("--latency", "5ms", code=7)
    assert f"{path.name} (cores: {bare.here.cores + 3}, {bare.here.cores})" in said
    assert f"name: Imaginary CPU 9000, {bare.here.name}" in said
    assert "architecture: riscv128, " in said
    assert "--profile" in said


def test_a_little_less_memory_is_the_same_device(bare: World):
    bare.evaluated()
    bare.measured(bare.cell(2), of=msgspec.structs.replace(bare.here, memory_bytes=int(bare.here.memory_bytes * 0.97)))
    assert bare.json("--latency", "5ms")["device_here"] is True


def test_a_profile_of_another_device_is_planned_with_when_named(world: World):
    path = world.measured(world.cell(6, MS), of=device(), under=conditions())
    found = world.json("--latency", "2.5ms", "--profile", path)
    assert (found["device_here"], found["device"], found["profile"]) == (False, "Imaginary CPU 9000", str(path))
    assert found["pick"]["artifact"] == "h06-fp32"
    assert not any("other conditions" in note for note in found["notes"])
    assert world.json("--latency", "2.5ms")["pick"]["artifact"] == "h02-fp32"


def test_a_profile_of_other_graphs_is_named_with_both(bare: World, tmp_path: Path):
    other = tmp_path / "other"
    export(write_supernet(tmp_path / "deeper", geometry(depth=1)), other, heads=(2, 3))
    rows = {accuracy(one, share(100)): None for one in open_bundle(other).manifest.artifacts}
    write_accuracy(open_bundle(other), rows)
    path = bare.ladder()
    ran = bare.cli("pick", "--bundle", other, "--profiles", bare.profiles, "--latency", "5ms")
    assert ran.code == 7
    assert f"{path}: measured other graphs (h02-fp32, h03-fp32, h04-fp32, h05-fp32, h06-fp32)" in ran.err
    assert f"{other} (h02-fp32, h03-fp32)" in ran.err
    every = bare.cli("pick", "--bundle", other, "--profiles", bare.profiles, "--latency", "5ms", "--all")
    assert every.code == 7


def test_latency_survives_retraining_and_accuracy_does_not(bare: World, tmp_path: Path):
    bare.evaluated()
    bare.ladder()
    retrained = tmp_path / "retrained"
    export(write_supernet(tmp_path / "again", seed=5), retrained, heads=(2, 3))
    again = World(retrained, bare.profiles, bare.cli)
    assert again.named(2).graph_sha256 == bare.named(2).graph_sha256
    again.rows(*read_accuracy(open_bundle(bare.bundle)))
    said = again.refused("--latency", "9ms", code=2)
    assert "accuracy.json has 5 rows, all of other weights" in said
    assert "--assume-larger-is-better" in said
    assert again.json("--latency", "9ms", "--assume-larger-is-better")["pick"]["artifact"] == "h03-fp32"
    again.evaluated({2: 20})
    found = again.json("--latency", "9ms")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"]["top1"]) == ("h02-fp32", 0.1)
    assert "some cells have no accuracy and were left out" in found["notes"]
    assert [(r["artifact"], "no accuracy" in r["reason"]) for r in found["rejected"]] == [("h03-fp32", True)]


def test_the_newest_profile_of_this_device_is_taken(world: World):
    newer = msgspec.structs.replace(world.now, software={"onnxruntime": "2.0"})
    path = world.measured(world.cell(6, MS, measured_at="2026-02-01T00:00:00Z"), under=newer)
    older = msgspec.structs.replace(world.now, software={"onnxruntime": "0.9"})
    world.measured(world.cell(5, MS / 9, measured_at="2025-02-01T00:00:00Z"), under=older)
    world.measured(world.cell(5, MS / 9, measured_at="2026-03-01T00:00:00Z"), of=device())
    found = world.json("--latency", "2.5ms")
    assert (found["profile"], found["pick"]["artifact"]) == (str(path), "h06-fp32")
    # Software is the profile's, not this moment's.
    assert found["notes"] == []


def test_a_newer_profile_of_other_graphs_or_in_another_regime_hides_no_older_one(world: World):
    (path,) = world.profiles.glob("*.json")
    other, later = world.cell(5, MS, graph_sha256="f" * 64), "2026-03-01T00:00:00Z"
    world.measured(
        msgspec.structs.replace(other, measured_at=later), under=msgspec.structs.replace(world.now, os="Plan 9")
    )
    paced = world.measured(
        world.cell(6, MS, regime="paced-30hz", measured_at="2026-02-01T00:00:00Z"),
        under=msgspec.structs.replace(world.now, affinity="0-99"),
    )
    found = world.json("--latency", "4.5ms")
    assert (found["profile"], found["pick"]["artifact"]) == (str(path), "h04-fp32")
    found = world.json("--latency", "4.5ms", "--regime", "paced-30hz")
    assert (found["profile"], found["pick"]["artifact"]) == (str(paced), "h06-fp32")
    # What none has is told of the newest with these graphs, not of the newest of all.
    said = world.refused("--latency", "4.5ms", "--regime", "burst", code=7)
    assert f"{paced}: these graphs were not measured burst, only paced-30hz" in said


def test_measuring_again_replaces_a_cell(world: World):
    world.measured(world.cell(5, MS))
    assert world.json("--latency", "2.5ms")["pick"]["artifact"] == "h05-fp32"
    assert len(list(world.profiles.glob("*.json"))) == 1


def test_other_conditions_are_noted_with_then_and_now(bare: World):
    bare.evaluated()
    bare.ladder()
    (path,) = bare.profiles.glob("*.json")
    changed = msgspec.structs.replace(bare.now, affinity="0-99", os="Plan 9")
    path.unlink()
    bare.measured(bare.cell(2), under=changed)
    (note,) = bare.json("--latency", "5ms")["notes"]
    assert note.startswith("measured under other conditions (then, now): ")
    assert f"affinity: 0-99, {bare.now.affinity}" in note
    assert f"os: Plan 9, {bare.now.os}" in note
    assert f"note: {note}" in bare.run("--latency", "5ms").out


def test_all_tells_profiles_of_one_device_under_other_conditions_apart_and_how_each_pick_runs(world: World):
    for heads, mode in ((6, "15W"), (4, "MAXN")):
        world.measured(world.cell(heads, MS, threads=heads), of=device(), under=conditions(power_mode=mode))
    out = world.run("--latency", "4.5ms", "--all").out
    rows = {mode: line for line in out.splitlines() for mode in ("15w", "maxn") if mode in line}
    assert "h06-fp32 (onnxruntime, 6 threads)" in rows["15w"]
    assert "h04-fp32 (onnxruntime, 4 threads)" in rows["maxn"]
    for line in rows.values():  # the file that --profile takes
        assert (world.profiles / line.split()[-1]).is_file()


def test_all_has_a_row_per_profile_with_its_device(world: World):
    world.measured(world.cell(6, MS, measured_at="2026-05-01T00:00:00Z"), of=device(), under=conditions())
    slow = device(name="Slow Toaster")
    world.measured(world.cell(2, 1.0), of=slow, under=conditions())
    ran = world.run("--latency", "4.5ms", "--all")
    assert ran.code == 3
    names = ("Imaginary", "Slow", world.here.name[:20])
    rows = {name: line for line in ran.out.splitlines() for name in names if name in line}
    assert len(rows) == 3
    assert re.search(r"pass +h06-fp32", rows["Imaginary"])
    assert "infeasible" in rows["Slow"]
    assert "(this one)" in rows[names[2]]
    assert "h04-fp32" in rows[names[2]]
    answers = world.json("--latency", "4.5ms", "--all", code=3)["answers"]
    assert answers[0]["device"] == "Imaginary CPU 9000"
    assert sorted(a["device_here"] for a in answers) == [False, False, True]
    assert all(set(a) == ANSWER for a in answers)
    assert world.run("--latency", "2s", "--all").code == 0
    # Where some are inconclusive and others infeasible, more samples come first.
    assert world.run("--latency", NOT_PROVEN, "--all").code == 4


# -- which regime ---------------------------------------------------------------------------------------------------


def asked(world: World, regime: str, budget: Budget, **more: Any) -> Answer:
    return pick(world.bundle, world.profiles, Request(budget, regime=regime, **more))


def test_regimes_are_not_mixed(world: World):
    world.measured(world.cell(6, MS, regime="burst"), world.cell(5, 3 * MS, regime="sustained"))
    budget = Budget(latency=(limit(95, 4.5 * MS),))
    for regime, name in (("saturated", "h04-fp32"), ("burst", "h06-fp32"), ("sustained", "h05-fp32")):
        found = asked(world, regime, budget)
        assert found.pick is not None
        assert (found.pick.artifact, found.pick.regime) == (name, regime)
        assert (regime in sentence(found.pick)) == (regime != "saturated")
    assert world.json("--latency", "4.5ms")["pick"]["artifact"] == "h04-fp32"
    assert {r.artifact for r in asked(world, "burst", Budget(latency=(limit(95, MS / 9),))).rejected} == {"h06-fp32"}


@pytest.mark.parametrize(
    ("regime", "option"),
    [
        ("burst", "--preset sustained"),
        ("paced-30hz", "--pace 30hz"),
        ("concurrent-4", "--concurrency 4"),
    ],
)
def test_a_regime_that_was_not_measured_is_refused_with_those_that_were(world: World, regime: str, option: str):
    world.measured(world.cell(2, regime="paced-7hz"))
    for call in (
        lambda *a: asked(world, *a),
        lambda *a: pick_all(world.bundle, world.profiles, Request(a[1], regime=regime)),
    ):
        with pytest.raises(ForeignError, match=f"not measured {regime}, only paced-7hz, saturated") as refused:
            call(regime, Budget(latency=(limit(95, 1.0),)))
        assert refused.value.hint == f"pick --regime paced-7hz; or measure it: hydradeploy profile {option}"


def test_all_leaves_out_profiles_without_the_regime(world: World):
    world.measured(world.cell(2, regime="burst"), of=device(), under=conditions())
    (found,) = pick_all(world.bundle, world.profiles, Request(Budget(latency=(limit(95, 1.0),)), regime="burst"))
    assert found.device == "Imaginary CPU 9000"


def test_several_callers_give_several_times_the_images(world: World):
    world.measured(world.cell(2, 4 * MS, regime="concurrent-4"))
    fast, faster = (Budget(throughput_per_s=rate) for rate in (900, 1100))
    found = asked(world, "concurrent-4", fast)
    assert found.pick is not None
    missed = asked(world, "concurrent-4", faster)
    assert missed.verdict == "infeasible"
    assert "throughput 995/s" in missed.rejected[0].reason
    (knob,) = missed.knobs
    assert "--throughput 9" in knob


def test_calls_on_a_schedule_have_no_throughput_of_their_own(world: World):
    world.measured(world.cell(2, regime="paced-30hz"))
    with pytest.raises(UsageError, match="the throughput of paced-30hz is its schedule's"):
        asked(world, "paced-30hz", Budget(throughput_per_s=10))


# -- which kind of device -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accelerated:
    """This machine with an imaginary accelerator."""

    found: Device

    def why_not(self) -> str | None:
        return None

    def identity(self) -> Device:
        return self.found

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        return conditions(software=dict(software), power_mode="full")


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Device:
    """What this machine is as a device of kind `abacus`, and none of kind `quipu`."""
    found = device(kind="abacus", name="Imaginary Abacus")
    absent = SimpleNamespace(MACHINE=SimpleNamespace(why_not=lambda: "no cords here"))
    monkeypatch.setitem(sys.modules, "imaginary_abacus", SimpleNamespace(MACHINE=Accelerated(found)))
    monkeypatch.setitem(sys.modules, "imaginary_quipu", absent)
    monkeypatch.setitem(DEVICE_MODULES, "abacus", "imaginary_abacus")
    monkeypatch.setitem(DEVICE_MODULES, "quipu", "imaginary_quipu")
    return found


def test_a_profile_is_of_this_device_whatever_kind_of_device_this_machine_is(bare: World, accelerated: Device):
    bare.evaluated()
    bare.measured(bare.cell(2, 9 * MS))
    bare.measured(bare.cell(2, MS, measured_at="2026-09-01T00:00:00Z"), of=accelerated, under=conditions())
    found = bare.json("--latency", "5ms")
    assert (found["device"], found["device_here"]) == ("Imaginary Abacus", True)
    assert "power_mode: none, full" in found["notes"][0]
    bare.measured(bare.cell(2, 2 * MS, measured_at="2027-01-01T00:00:00Z"))
    assert bare.json("--latency", "5ms")["device"] == bare.here.name


def test_a_profile_of_a_kind_that_this_machine_is_not_is_named_with_the_reason(bare: World, accelerated: Device):
    bare.evaluated()
    for kind, reason in (("quipu", "quipu: no cords here"), ("sextant", "no device kind 'sextant'")):
        path = bare.measured(bare.cell(2), of=device(kind=kind, name=kind))
        said = bare.refused("--latency", "5ms", code=7)
        assert path.name in said
        assert reason in said
        assert bare.json("--latency", "5ms", "--profile", path)["device_here"] is False


# -- which accuracy -------------------------------------------------------------------------------------------------


def test_of_several_data_sets_the_last_evaluated_counts_unless_named(world: World):
    world.evaluated({2: 199, 3: 150, 4: 120}, dataset="other", data_sha256="f" * 64)
    found = world.json("--latency", "4.5ms")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"]["dataset"]) == ("h02-fp32", "other")
    found = world.json("--latency", "4.5ms", "--dataset", "images")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"]["dataset"]) == ("h04-fp32", "images")
    said = world.refused("--latency", "4.5ms", "--dataset", "imagenet", code=2)
    assert "no accuracy on 'imagenet'" in said
    assert "hint: evaluated on images, other" in said


def test_a_declared_accuracy_is_marked(bare: World, tmp_path: Path):
    (tmp_path / "t.csv").write_text(
        "artifact,dataset,top1,n\nh02-fp32,imagenet,0.7,50000\nh03-fp32,imagenet,0.75,50000\n"
    )
    declare(bare.bundle, tmp_path / "t.csv")
    bare.ladder()
    found = bare.json("--latency", "5ms")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"]["source"]) == ("h03-fp32", "declared")
    assert "the accuracy on imagenet was declared, not measured" in found["notes"]
    assert found["cheaper"] is None
    assert "images of imagenet, declared" in bare.run("--latency", "5ms").out


def test_measured_accuracy_comes_before_a_declared_one_of_the_same_set(world: World, tmp_path: Path):
    (tmp_path / "t.csv").write_text("artifact,dataset,top1,n\nh02-fp32,images,1,50000\n")
    declare(world.bundle, tmp_path / "t.csv")
    assert world.json("--latency", "4.5ms")["pick"]["artifact"] == "h04-fp32"


def test_the_row_measured_as_the_cell_was_is_taken(world: World):
    world.evaluated({3: 131})
    world.evaluated({3: 132}, compute_type="tf32")
    world.evaluated({3: 133}, instruction_set="z80")
    world.evaluated({3: 134}, backend="abacus")
    found = world.json("--latency", "3.5ms")
    assert found["pick"]["accuracy"]["top1"] == 131 / 200
    assert not any("accuracy was measured with" in note for note in found["notes"])


def test_of_rows_measured_otherwise_the_last_counts(bare: World):
    bare.evaluated({2: 101}, backend="abacus")
    bare.evaluated({2: 102}, backend="quipu")
    bare.ladder()
    assert bare.json("--latency", "3.5ms")["pick"]["accuracy"]["top1"] == 102 / 200


def test_accuracy_on_other_images_of_a_data_set_is_not_compared(bare: World):
    """Ten images, all right, are no better than 180 of 200."""
    ways = [bare.cell(heads, backend=backend) for heads in (2, 5) for backend in ("onnxruntime", "abacus")]
    bare.measured(*ways)
    bare.evaluated({2: 100, 5: 180})
    ten = {"backend": "abacus", "data_sha256": "a" * 64, "instruction_set": bare.here.instruction_set}
    bare.rows(accuracy(bare.named(2), [True] * 10, **ten))
    found = bare.json("--latency", "9ms")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"]["n"]) == ("h05-fp32", 200)
    # Once all have seen the ten, all are compared on them.
    bare.rows(accuracy(bare.named(5), [True] * 9 + [False], **ten))
    found = bare.json("--latency", "9ms")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"]["n"]) == ("h02-fp32", 10)
    bare.evaluated({2: 100, 5: 180})
    assert bare.json("--latency", "9ms")["pick"]["artifact"] == "h05-fp32"


def test_accuracy_measured_elsewhere_is_noted_with_both_places(bare: World):
    bare.evaluated(instruction_set="z80")
    bare.ladder()
    (note,) = bare.json("--latency", "3.5ms")["notes"]
    assert "onnxruntime in fp32 on z80" in note
    assert f"onnxruntime in fp32 on {bare.here.instruction_set}" in note


def test_accuracy_measured_in_another_compute_type_is_noted_and_the_one_of_the_cells_own_is_preferred(bare: World):
    where = bare.here.instruction_set
    bare.measured(bare.cell(2, compute_type="bf16"))
    bare.evaluated({2: 100})
    answer = bare.json("--latency", "3.5ms")
    assert answer["notes"] == [
        f"accuracy was measured with onnxruntime in fp32 on {where}, latency with onnxruntime in bf16 on {where}"
    ]
    assert answer["pick"]["accuracy"]["compute_type"] == "fp32"
    bare.evaluated({2: 90}, compute_type="bf16")
    bare.evaluated({2: 101})
    answer = bare.json("--latency", "3.5ms")
    assert answer["notes"] == []
    assert (answer["pick"]["accuracy"]["compute_type"], answer["pick"]["accuracy"]["top1"]) == ("bf16", 0.45)


def test_of_all_ways_to_run_an_artifact_one_that_meets_the_budget_is_picked_and_named(bare: World):
    """One artifact in five ways; what tells the picked one from the others is in the answer."""
    bare.evaluated({4: 150})
    bare.measured(
        bare.cell(4, 9 * MS),
        bare.cell(4, 8 * MS, threads=2),
        bare.cell(4, 7 * MS, compute_type="bf16"),
        bare.cell(4, 6 * MS, backend="openvino", settings={"hint": "throughput"}),
        bare.cell(4, 3 * MS, backend="openvino", compute_type="bf16", settings={"hint": "throughput"}, threads=2),
    )
    picked = bare.json("--latency", "3.5ms")["pick"]
    assert (picked["artifact"], picked["precision"], picked["backend"]) == ("h04-fp32", "fp32", "openvino")
    assert (picked["compute_type"], picked["settings"], picked["threads"]) == ("bf16", {"hint": "throughput"}, 2)
    told = bare.run("--latency", "3.5ms", "--explain").out
    assert "h04-fp32 (openvino, bf16, hint=throughput, 2 threads): p95 at most" in told
    for way in ("onnxruntime, 1 thread", "onnxruntime, 2 threads", "onnxruntime, bf16, 1 thread"):
        assert f"refused: h04-fp32 ({way}): p95 over 3.50 ms" in told
    assert "refused: h04-fp32 (openvino, hint=throughput, 1 thread)" in told
    near = bare.run("--latency", "2.5ms")
    assert near.code == 3
    assert "h04-fp32 (openvino, bf16, hint=throughput, 2 threads) fits with" in near.out
    assert near.out.count("nearest: h04-fp32 (openvino, bf16, hint=throughput, 2 threads): p95 over 2.50 ms: 3.") == 1


def test_the_nearest_of_several_ways_is_refused_for_its_own_reason(bare: World):
    bare.evaluated({4: 150})
    bare.measured(bare.cell(4, 9 * MS), bare.cell(4, 5 * MS, settings={"arena": "off"}))
    assert (
        "nearest: h04-fp32 (onnxruntime, arena=off, 1 thread): p95 over 2.50 ms: 5."
        in bare.run("--latency", "2.5ms").out
    )


@pytest.mark.parametrize("what", ["energy", "memory"])
def test_a_preference_that_nothing_was_measured_of_is_told(bare: World, what: str):
    """Else the most accurate one seems to be the one that takes least."""
    bare.evaluated()
    none = {"energy_j": None, "memory_bytes": None, "missing": {what: "no meter"}}
    bare.measured(bare.cell(2, **none), bare.cell(3, **none))
    found = bare.json("--latency", "9ms", "--prefer", what)
    assert found["pick"]["artifact"] == "h03-fp32"
    assert found["notes"] == [f"{what} was not measured, so that accuracy decided: no meter"]
    (note,) = bare.json("--latency", "9ms", "--prefer", what, "--assume-larger-is-better")["notes"][1:]
    assert note == f"{what} was not measured, so that the number of heads decided: no meter"
    bare.measured(bare.cell(2, energy_j=0.1))
    found = bare.json("--latency", "9ms", "--prefer", what)
    assert (found["pick"]["artifact"], found["notes"]) == ("h02-fp32", [])


def test_cells_without_accuracy_are_left_out_only_where_it_counts(bare: World):
    bare.evaluated({3: 130})
    bare.ladder()
    assert bare.json("--latency", "9ms")["notes"] == ["some cells have no accuracy and were left out"]
    found = bare.json("--latency", "9ms", "--prefer", "latency")
    assert (found["pick"]["artifact"], found["pick"]["accuracy"], found["notes"]) == ("h02-fp32", None, [])
    found = bare.json("--latency", "9ms", "--assume-larger-is-better")
    assert found["pick"]["artifact"] == "h06-fp32"
    assert found["notes"] == ["accuracy was not looked at: more heads are assumed to be better"]
    found = bare.json("--latency", "9ms", "--assume-larger-is-better", "--min-top1", "50%")
    assert found["pick"]["artifact"] == "h03-fp32"
    assert not any("not looked at" in note for note in found["notes"])


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "no budget given"),
        (["--confidence", "99%"], "no budget given"),
        (["--latency", "20"], "'20' has no unit"),
        (["--latency", "p100<=1ms"], "not a latency budget"),
        (["--memory", "1.5"], "has no unit"),
        (["--throughput", "50"], "has no unit"),
        (["--min-top1", "0.78"], "has no unit"),
        (["--size", "-3MiB"], "not a size"),
        (["--min-top1", "100.1%"], "a top-1 of 100.1% is out of reach"),
        (["--min-top1", "1e300%"], "a top-1 of 1e+300% is out of reach"),
        (["--latency", "20ms", "--regime", "paced-30"], "no regime 'paced-30'"),
        (["--latency", "20ms", "--regime", ""], "no regime ''"),
        (["--latency", "20ms", "--all", "--profile", "some.json"], "--all and --profile exclude each other"),
        (["--latency", "20ms", "--all", "--explain"], "--all and --explain exclude each other"),
        (["--latency", "20ms", "--prefer", "beauty"], "cannot prefer 'beauty'"),
        (["--latency", "20ms", "--confidence", "100%"], "confidence"),
        (["--latency", "20ms", "--confidence", "10%"], "confidence"),
        (["--latency", "20ms", "--profile", "nowhere.json"], "nowhere.json: no such profile"),
        (["--latency", "20ms", "--bundle", "nowhere"], "nowhere: no bundle here"),
        (["--latency", "20ms", "--dataset", "nothing"], "no accuracy on 'nothing'"),
        (["--latency", "20ms", "--accept", "contended,loud"], "no flag 'loud' to accept"),
    ],
)
def test_requests_that_make_no_sense_are_usage_errors_with_a_hint(world: World, options, text):
    said = world.refused(*options, code=2)
    assert text in said
    assert "\nhint: " in said


def test_no_accuracy_at_all_is_a_usage_error_that_offers_the_head_count(bare: World):
    bare.ladder()
    said = bare.refused("--latency", "9ms", code=2)
    assert "no accuracy of these artifacts is known" in said
    assert "--assume-larger-is-better" in said
    assert bare.json("--latency", "4.5ms", "--assume-larger-is-better")["pick"]["artifact"] == "h04-fp32"
    assert bare.json("--latency", "4.5ms", "--prefer", "size")["pick"]["artifact"] == "h02-fp32"


def test_strict_without_a_clean_cell_is_an_invalid_measurement(bare: World):
    bare.evaluated()
    bare.measured(bare.cell(2, flags=("floating-clocks",)), bare.cell(3, flags=("throttled",)), failed(bare.named(4)))
    said = bare.refused("--latency", "9ms", "--strict", code=6)
    assert "floating-clocks, throttled" in said
    found = bare.json("--latency", "9ms")
    assert (found["pick"]["artifact"], found["notes"][-1]) == ("h02-fp32", "measured while floating-clocks")
    bare.measured(bare.cell(2, 8 * MS, threads=2))
    assert bare.json("--latency", "9ms", "--strict")["pick"]["threads"] == 2


def test_one_profile_without_anything_to_pick_from_costs_the_others_no_answer(world: World):
    world.measured(world.cell(2, flags=("noisy",)), of=device(), under=conditions())
    found = world.json("--latency", "4.5ms", "--strict", "--all", code=4)["answers"]
    assert {a["device"]: a["verdict"] for a in found} == {
        world.here.name: "pass",
        "Imaginary CPU 9000": "inconclusive",
    }
    # Where it is so of all of them it is said.
    world.measured(*(world.cell(heads, flags=("noisy",)) for heads in RIGHT))
    assert "no clean measurement" in world.refused("--latency", "4.5ms", "--strict", "--all", code=6)


def test_one_profile_of_artifacts_that_were_not_evaluated_costs_the_others_no_answer(bare: World):
    bare.evaluated({3: 130})
    bare.measured(bare.cell(3))
    bare.measured(bare.cell(2), of=device(), under=conditions())
    found = bare.json("--latency", "4.5ms", "--all", code=3)["answers"]
    assert {a["device"]: a["verdict"] for a in found} == {bare.here.name: "pass", "Imaginary CPU 9000": "infeasible"}


def edited(path: Path, edit: Any) -> None:
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))


EDITS = {
    "an unknown field": (lambda d: d.update(colour="red"), "colour"),
    "an unknown field of a cell": (lambda d: d["cells"][1].update(p95=1.0), "cells"),
    "a schema of the future": (
        lambda d: d.update(schema=4),
        "schema 4, this version reads 3\nhint: upgrade hydradeploy",
    ),
    "a schema of the past": (
        lambda d: d.update(schema=2),
        "schema 2, this version reads 3\nhint: an earlier version wrote it: move it away and write it again",
    ),
    "no schema": (lambda d: d.pop("schema"), "schema"),
    "no device": (lambda d: d.pop("device"), "device"),
    "a latency of zero": (lambda d: d["cells"][0]["latency_s"].__setitem__(0, 0), "latency_s"),
    "a negative latency": (lambda d: d["cells"][0]["latency_s"].__setitem__(7, -1e-3), "latency_s"),
    "a text for a number": (lambda d: d["cells"][0].update(memory_bytes="10"), "memory_bytes"),
    "fewer processes than samples": (lambda d: d["cells"][0]["process"].pop(), "process"),
    "neither samples nor error": (lambda d: d["cells"][0].update(latency_s=[], process=[]), "neither samples"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_profile_is_refused_by_name(world: World, what):
    edit, text = EDITS[what]
    (path,) = world.profiles.glob("*.json")
    edited(path, edit)
    for options in ([], ["--all"], ["--profile", path]):
        said = world.refused("--latency", "5ms", *options, code=10)
        assert str(path) in said
        assert text in said


@pytest.mark.parametrize("keep", [0, 1, 300, -2])
def test_a_truncated_profile_is_refused_by_name(world: World, keep):
    (path,) = world.profiles.glob("*.json")
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in world.refused("--latency", "5ms", code=10)


def test_a_truncated_accuracy_file_is_refused_by_name(world: World):
    path = world.bundle / ACCURACY
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in world.refused("--latency", "5ms", code=10)


def test_an_edited_manifest_is_refused_and_weights_are_not_read(world: World):
    for path in world.bundle.glob("*.weights"):
        path.unlink()
    (world.bundle / "golden.npz").write_bytes(b"")
    assert world.json("--latency", "4.5ms")["pick"]["artifact"] == "h04-fp32"
    edited(world.bundle / "manifest.json", lambda d: d["artifacts"][0].update(size_bytes=1))
    assert "manifest.json" in world.refused("--latency", "5ms", code=10)


HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "openvino", "PIL")

LIGHT = f"""
import sys
from hydradeploy.cli import main
try:
    main()
except SystemExit as ended:
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("loaded:", *loaded, file=sys.stderr)
    sys.exit(ended.code)
"""


def test_picking_loads_neither_runtime_nor_numpy(world: World):
    world.measured(world.cell(2, MS), of=device(), under=conditions())
    for options in (["--latency", "4.5ms", "--explain"], ["--latency", "1us", "--json"], ["--latency", "9ms", "--all"]):
        arguments = ["pick", "--bundle", str(world.bundle), "--profiles", str(world.profiles), *options]
        ran = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True)
        assert ran.returncode == (3 if "1us" in options else 0), ran.stderr
        assert ran.stderr == "loaded:\n"
