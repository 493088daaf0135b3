"""The regression gate: what it answers, what it refuses, and how often it is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

from hydradeploy.errors import ExitCode, ForeignError, IntegrityError, UsageError
from hydradeploy.measurements import Cell, Conditions, Device, Profile, Stored
from hydradeploy.selector.compare import Comparison, Line, Rule, compare, compared, exit_code, parse_rule
from tests.selector.build import artifact, cell, conditions, device, failed, latencies, profile

MS = 1e-3
P95 = parse_rule("p95:+5%")


def measured(
    heads: int = 3, level_s: float = 10 * MS, *, processes: int = 5, n: int = 20, seed: int = 0, **changes: Any
) -> Cell:
    """A cell of processes that differ by no more than 1 %."""
    levels = [level_s * (1 + 0.0025 * i) for i in range(processes)]
    return cell(artifact(heads), latencies(*levels, n=n, seed=seed), **changes)


def stored(*cells: Cell, name: str = "some.json", of: Device | None = None, under: Conditions | None = None) -> Stored:
    return Stored(Path(name), profile(cells, of, under))


def only(before: Cell, after: Cell, rule: str = "p95:+5%", **options: Any) -> Line:
    (line,) = compared(stored(before), stored(after), [parse_rule(rule)], **options).lines
    return line


# -- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "figure", "percentile", "limit"),
    [
        ("p95:+5%", "p95", 0.95, 0.05),
        (" p99.9 : 3.5% ", "p99.9", 0.999, 0.035),
        ("p50:+0%", "p50", 0.5, 0.0),
        ("mean:+2%", "mean", None, 0.02),
        ("memory:+10%", "memory", None, 0.1),
        ("energy:+5%", "energy", None, 0.05),
        ("load:+20%", "load", None, 0.2),
    ],
)
def test_a_rule_is_a_figure_and_by_how_much_it_may_grow(text, figure, percentile, limit):
    assert parse_rule(text) == Rule(figure=figure, percentile=percentile, limit=limit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p95", "'p95' is no rule"),
        ("", "'' is no rule"),
        ("p95:+5", "'5' has no unit"),
        ("p95:0.05", "'0.05' has no unit"),
        ("p95:+5ms", "'ms' is not a unit"),
        ("p95:-5%", "not a percentage"),
        ("p95:", "not a percentage"),
        ("p100:+5%", "'p100' is not a percentile"),
        ("p99.99999999999:+5%", "'p99.99999999999' is not a percentile"),
        ("p0.00000000001:+5%", "'p0.00000000001' is not a percentile"),
        ("pace:+5%", "'pace' is not a percentile"),
        ("beauty:+5%", "no figure 'beauty'"),
    ],
)
def test_what_is_no_rule_is_a_usage_error_with_a_hint(text, said):
    with pytest.raises(UsageError, match=said) as refused:
        parse_rule(text)
    assert refused.value.hint


# -- outcomes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "outcome", "code"),
    [
        (1.0, "ok", ExitCode.OK),
        (1.04, "ok", ExitCode.OK),
        (1.2, "regression", ExitCode.REGRESSION),
        (0.8, "improved", ExitCode.OK),
    ],
)
@pytest.mark.parametrize("rule", ["p95:+5%", "p50:+5%", "mean:+5%"])
def test_a_cell_is_held_against_its_limit(factor, outcome, code, rule):
    found = compared(stored(measured()), stored(measured(level_s=factor * 10 * MS, seed=1)), [parse_rule(rule)])
    (line,) = found.lines
    assert (line.outcome, line.reason, exit_code(found)) == (outcome, None, code)
    assert line.ratio == pytest.approx(factor, abs=0.01)
    assert line.after / line.before == pytest.approx(line.ratio)
    assert line.lower < line.ratio < line.upper
    assert found.outcome == ("regression" if outcome == "regression" else "ok")


def test_over_the_limit_by_what_may_be_chance_is_inconclusive():
    before = cell(artifact(3), latencies(*(MS * level for level in (9, 10, 11, 12, 10)), n=20))
    after = cell(artifact(3), latencies(*(MS * level for level in (10, 9, 13, 14, 12)), n=20))
    found = compared(stored(before), stored(after), [P95])
    (line,) = found.lines
    assert (line.outcome, found.outcome, exit_code(found)) == ("inconclusive", "inconclusive", ExitCode.INCONCLUSIVE)
    assert line.ratio > 1.05 > 1 > line.lower
    assert line.reason == "that may be chance, more processes would tell"


def test_a_regression_counts_before_what_cannot_be_told():
    found = compared(
        stored(measured(3), measured(6, processes=2)), stored(measured(3, 20 * MS), measured(6, processes=2)), [P95]
    )
    assert {line.outcome for line in found.lines} == {"regression", "inconclusive"}
    assert exit_code(found) == ExitCode.REGRESSION


@pytest.mark.parametrize(
    ("before", "after", "rule", "reason"),
    [
        (measured(processes=2, n=60), measured(), "p50:+5%", "before: 2 processes, a comparison takes 3"),
        (measured(), measured(processes=1, n=60), "p50:+5%", "after: 1 process, a comparison takes 3"),
        (measured(), measured(n=5), "p95:+5%", "after: p95 takes 59 samples, there are 25"),
        (measured(), measured(), "p99:+5%", "before: p99 takes 299 samples, there are 100"),
        (measured(), measured(), "energy:+5%", "before: energy was not measured"),
        (measured(missing={"energy": "no meter"}), measured(), "energy:+5%", "before: no meter"),
        (
            measured(meter="VDD_IN, module", evidence={"energy_j": (1.0,) * 5}),
            measured(meter="VDD_GPU", evidence={"energy_j": (1.0,) * 5}),
            "energy:+5%",
            "by unlike meters: VDD_IN, module, VDD_GPU",
        ),
        (measured(), measured(memory_bytes=None), "memory:+5%", "after: memory was not measured"),
        (measured(load_s=(0.0,) * 5), measured(), "load:+5%", "before: load of 0"),
        (
            measured(),
            measured(level_s=20 * MS, flags=("contended",), remarks=("contended: others kept 0.9 cores busy",)),
            "p95:+5%",
            "after: contended: others kept 0.9 cores busy (--accept contended takes it)",
        ),
    ],
)
def test_what_cannot_be_told_says_why(before, after, rule, reason):
    line = only(before, after, rule)
    assert (line.outcome, line.reason) == ("inconclusive", reason)
    assert (line.before, line.ratio, line.upper) == (None, None, None)


def test_an_accepted_flag_and_one_that_is_a_remark_leave_an_answer():
    bad = measured(level_s=20 * MS, flags=("contended", "noisy"))
    assert only(measured(), bad, accept=("contended",)).outcome == "regression"
    assert only(measured(), measured(flags=("floating-clocks", "noisy"))).outcome == "ok"


@pytest.mark.parametrize(("grown", "outcome"), [(1.2, "regression"), (1.05, "ok"), (1.0, "ok"), (0.5, "improved")])
def test_memory_is_one_figure_and_the_limit_alone_decides(grown, outcome):
    line = only(measured(memory_bytes=10**7), measured(memory_bytes=int(grown * 10**7)), "memory:+10%")
    assert (line.outcome, line.ratio, line.lower, line.upper) == (outcome, pytest.approx(grown), None, None)


@pytest.mark.parametrize("rule", ["load:+20%", "energy:+20%"])
def test_loading_and_energy_are_compared_by_process(rule):
    def having(factor: float) -> Cell:
        values = tuple(factor * value for value in (0.100, 0.101, 0.099, 0.1, 0.1))
        return measured(load_s=values, evidence={"energy_j": values})

    line = only(having(1), having(1.5), rule)
    assert (line.outcome, line.ratio) == ("regression", pytest.approx(1.5))
    assert 1.4 < line.lower < 1.5 < line.upper < 1.6
    assert only(having(1), having(1.1), rule).outcome == "ok"


# -- what is matched with what --------------------------------------------------------------------------------------


def test_cells_are_matched_whatever_their_order_their_graph_and_when_they_were_measured():
    before = stored(measured(3), measured(6, threads=2), measured(6, regime="burst"))
    after = stored(
        measured(6, 40 * MS, regime="burst", measured_at="2027-01-01T00:00:00Z"),
        measured(6, 10 * MS, threads=2, graph_sha256="f" * 64),
        measured(3),
    )
    found = compared(before, after, [P95])
    assert [str(line.cell) for line in found.lines] == [
        "h03-fp32 (onnxruntime, 1 thread)",
        "h06-fp32 (onnxruntime, 2 threads)",
        "h06-fp32 (onnxruntime, 1 thread, burst)",
    ]
    assert [line.outcome for line in found.lines] == ["ok", "ok", "regression"]
    assert [line.graph_changed for line in found.lines] == [False, True, False]
    assert found.unmatched == ()


def test_of_two_graphs_of_one_name_the_one_measured_last_is_compared():
    old = measured(3, 99 * MS, graph_sha256="a" * 64, measured_at="2020-01-01T00:00:00Z")
    assert only(measured(3), measured(3)).outcome == "ok"
    (line,) = compared(stored(measured(3), old), stored(old, measured(3)), [P95]).lines
    assert (line.outcome, line.graph_changed) == ("ok", False)


def test_cells_of_one_side_are_listed_with_what_the_other_has():
    before = stored(measured(3), measured(4), measured(6), failed(artifact(8)))
    after = stored(measured(3), measured(5), failed(artifact(6), "out of memory"), failed(artifact(8)))
    found = compared(before, after, [P95])
    assert len(found.lines) == 1
    assert {(one.cell.artifact, one.measured, one.reason) for one in found.unmatched} == {
        ("h04-fp32", "before", "after: not measured"),
        ("h05-fp32", "after", "before: not measured"),
        ("h06-fp32", "before", "after: out of memory"),
        ("h08-fp32", "neither", "before: no kernel for it; after: no kernel for it"),
    }
    # What ran and does not any more is not simply fine.
    assert (found.outcome, exit_code(found)) == ("inconclusive", ExitCode.INCONCLUSIVE)
    fewer = compared(stored(measured(3), measured(4)), stored(measured(3)), [P95])
    assert exit_code(fewer) == ExitCode.OK


def test_other_versions_of_software_are_compared_and_told():
    old, new = (
        conditions(software=software)
        for software in ({"onnxruntime": "1.0", "a": "1"}, {"onnxruntime": "2.0", "a": "1", "b": "3"})
    )
    found = compared(stored(measured(), under=old), stored(measured(), under=new), [P95])
    assert found.software == ("b: none, 3", "onnxruntime: 1.0, 2.0")


def test_unlike_devices_and_conditions_are_refused_by_name():
    other = stored(measured(), of=device(cores=4), under=conditions(governor="powersave", software={}))
    with pytest.raises(
        ForeignError, match=r"\(before, after\): cores: 12, 4; governor: performance, powersave"
    ) as refused:
        compared(stored(measured()), other, [P95])
    assert refused.value.exit_code == ExitCode.FOREIGN
    assert "software" not in refused.value.message


def test_nothing_in_common_is_refused_with_what_there_is():
    with pytest.raises(ForeignError, match="no cell in common") as refused:
        compared(stored(measured(3), name="a.json"), stored(measured(3, threads=2), name="b.json"), [P95])
    assert refused.value.hint == (
        "measured before: h03-fp32 (onnxruntime, 1 thread); after: h03-fp32 (onnxruntime, 2 threads)"
    )


def written(path: Path, content: Profile) -> Path:
    path.write_bytes(msgspec.json.encode(content))
    return path


def test_files_are_read_and_the_answer_is_one_document(tmp_path: Path):
    before = written(tmp_path / "a.json", profile([measured()]))
    after = written(tmp_path / "b.json", profile([measured(level_s=20 * MS)]))
    found = compare(before, after, [P95, parse_rule("memory:+5%")])
    assert (found.before, found.after, found.device) == (str(before), str(after), "Imaginary CPU 9000")
    document = msgspec.json.encode(found)
    assert msgspec.json.decode(document, type=Comparison) == found
    assert msgspec.json.decode(document)["lines"][0]["rule"] == {"figure": "p95", "percentile": 0.95, "limit": 0.05}
    with pytest.raises(UsageError, match="nothing to compare by"):
        compare(before, after, [])
    with pytest.raises(UsageError, match="no flag 'loud'"):
        compare(before, after, [P95], accept=["loud"])
    with pytest.raises(UsageError, match="no such profile"):
        compare(before, tmp_path / "c.json", [P95])
    after.write_bytes(b"{")
    with pytest.raises(IntegrityError, match=r"b\.json"):
        compare(before, after, [P95])


# -- how often it is wrong ------------------------------------------------------------------------------------------


def drawn(generator: np.random.Generator, spread: float, count: int, factor: float = 1.0) -> Stored:
    """Cells of 5 processes of 20 calls, each of which follows the last, with a level per process."""
    cells = []
    for heads in range(3, 3 + count):
        z = generator.standard_normal((5, 20))
        for i in range(1, 20):
            z[:, i] = 0.5 * z[:, i - 1] + math.sqrt(0.75) * z[:, i]
        levels = spread * generator.standard_normal((5, 1))
        cells.append(cell(artifact(heads), (0.01 * factor * np.exp(0.05 * z + levels)).tolist()))
    return stored(*cells)


def outcomes(spread: float, runs: int, *, count: int, factor: float = 1.0) -> Sequence[str]:
    generator = np.random.default_rng([runs, count, int(1000 * spread), int(1000 * factor)])
    rules = [parse_rule(text) for text in ("p50:+3%", "p95:+5%", "mean:+2%")]
    return [
        compared(drawn(generator, spread, count), drawn(generator, spread, count, factor), rules).outcome
        for _ in range(runs)
    ]


def check_false_alarms(spread: float, runs: int, count: int) -> None:
    # So many are no proof, at one in ten thousand, that more than 5 % are.
    assert outcomes(spread, runs, count=count).count("regression") <= binom.ppf(1 - 1e-4, runs, 0.05)


def check_found(spread: float, runs: int) -> None:
    assert outcomes(spread, runs, count=1, factor=1.2).count("regression") >= 0.9 * runs


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_what_did_not_change_is_hardly_ever_a_regression(spread):
    check_false_alarms(spread, 300, 1)


def test_nor_is_it_where_many_cells_are_compared():
    check_false_alarms(0.1, 60, 20)


def test_a_fifth_slower_is_found():
    check_found(0.02, 200)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05, 0.1])
def test_what_did_not_change_is_hardly_ever_a_regression_over_thousands_of_runs(spread, count):
    assert outcomes(spread, 2000, count=count).count("regression") < 0.05 * 2000


@pytest.mark.slow
def test_a_fifth_slower_is_found_over_thousands_of_runs():
    check_found(0.02, 2000)


def test_ways_to_run_an_artifact_are_compared_each_with_itself():
    """Only the one with the setting has become slower."""
    ways = ({}, {"compute_type": "bf16"}, {"batch": 8}, {"settings": {"hint": "throughput"}})
    before = stored(*(measured(seed=i, **way) for i, way in enumerate(ways)))
    levels = (10 * MS, 10 * MS, 10 * MS, 15 * MS)
    after = stored(
        *(measured(3, level, seed=i, **way) for i, (way, level) in enumerate(zip(ways, levels, strict=True)))
    )
    outcomes = {str(line.cell): line.outcome for line in compared(before, after, [P95]).lines}
    assert outcomes == {
        "h03-fp32 (onnxruntime, 1 thread)": "ok",
        "h03-fp32 (onnxruntime, bf16, 1 thread)": "ok",
        "h03-fp32 (onnxruntime, 1 thread, batch 8)": "ok",
        "h03-fp32 (onnxruntime, hint=throughput, 1 thread)": "regression",
    }
