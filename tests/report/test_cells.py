"""Tables of measured cells: every figure that is there, and why others are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from hydradeploy.measurements import Cell
from hydradeploy.report.cells import Table, label, missing_lines, remark_lines, tables
from hydradeploy.stats.bootstrap import quantile_interval
from hydradeploy.stats.order import quantile
from tests.selector.build import artifact, cell, failed, latencies

MS = 1e-3
UNSTEADY = "noisy: warm-up ended unsteadily in 3 of 5 processes"
FLOATING = "floating-clocks: nothing kept the clocks where they were"


def measured(heads: int = 3, level_s: float = 20 * MS, *, n: int = 40, processes: int = 5, **changes: Any) -> Cell:
    """A cell of processes that each differ from the last by 3 %."""
    levels = [level_s * (1 + 0.03 * i) for i in range(processes)]
    return cell(artifact(heads), latencies(*levels, n=n, seed=heads), **changes)


def column(table: Table, name: str) -> list[str]:
    return [row[table.header.index(name)] for row in table.rows]


def width(table: Table) -> int:
    """Characters of a line, with three between columns."""
    return sum(max(map(len, texts)) + 3 for texts in zip(table.header, *table.rows, strict=True))


def test_latencies_come_first_and_the_rest_beside_the_evidence():
    one = measured(
        energy_j=0.4,
        meter="VDD_IN, module",
        switch_s=(30 * MS, 50 * MS, 40 * MS),
        evidence={"prepare_s": (0.2 * MS, 0.4 * MS, 0.3 * MS)},
    )
    first, second = tables([one])
    ordered = sorted(one.latency_s)
    low, high = quantile_interval(one.latency_s, one.process)
    assert first.title == "saturated, onnxruntime, cpu, 1 thread, batch 1"
    assert first.header == ("artifact", "p50 (95 %)", "p95", "p99", "p95 at most", "spread")
    assert column(first, "p50 (95 %)") == [f"{1e3 * ordered[99]:.1f} ms ({1e3 * low:.1f}..{1e3 * high:.1f})"]
    assert column(first, "p95") == [f"{1e3 * quantile(ordered, 0.95):.1f} ms"]
    assert float(column(first, "p95 at most")[0].split()[0]) > 1e3 * quantile(ordered, 0.95)
    assert re.fullmatch(r"[45]\.\d%", column(first, "spread")[0])
    assert second.title == f"also measured: {first.title}; energy by VDD_IN, module"
    names = ("samples", "worth", "load", "prepare", "first run", "switch", "memory", "energy")
    assert second.header == ("artifact", *names)
    assert second.rows[0][1] == "200"
    assert second.rows[0][3:] == ("100 ms", "300 us", "200 ms", "40.0 ms", "30.0 MiB", "0.4 J")


def test_a_percentile_that_the_samples_cannot_carry_says_how_many_it_takes():
    for n, p95, p99 in (
        (200, r"22\.\d ms", r"22\.\d ms"),
        (40, r"22\.\d ms", r"n/a \(n<299\)"),
        (10, r"n/a \(n<59\)", r"n/a \(n<299\)"),
    ):
        first, _ = tables([measured(n=n)])
        assert re.fullmatch(p95, column(first, "p95")[0])
        assert re.fullmatch(p99, column(first, "p99")[0])


def test_one_process_has_neither_an_interval_nor_a_spread_nor_a_bound():
    first, _ = tables([measured(processes=1)])
    assert re.fullmatch(r"20\.\d ms", column(first, "p50 (95 %)")[0])
    assert column(first, "p95 at most") == ["n/a"]
    assert "spread" not in first.header
    assert list(missing_lines([measured(processes=1)])) == [
        "p95 has no bound: one process says nothing about the next one"
    ]


def test_an_interval_across_a_change_of_unit_keeps_both():
    first, _ = tables([measured(level_s=0.99 * MS, n=20)])
    assert re.fullmatch(r"1\.0\d ms \(9\d\d us\.\.1\.\d\d\)", column(first, "p50 (95 %)")[0])


def test_only_what_differs_between_cells_has_a_column():
    cells = [measured(threads=1), measured(threads=2), measured(6, threads=2, backend="openvino")]
    first, second = tables(cells)
    assert first.header[:4] == ("artifact", "backend", "threads", "p50 (95 %)")
    assert column(first, "threads") == ["1", "2", "2"]
    assert first.title == "saturated, cpu, batch 1"
    assert second.header[:3] == ("artifact", "backend", "threads")
    assert label(cells[0], cells) == "h03-fp32, onnxruntime, 1 thread"
    assert label(cells[0], cells[:1]) == "h03-fp32"


def test_precision_is_in_the_name_and_computing_otherwise_has_a_column():
    both = [cell(artifact(3, name), latencies(*(MS,) * 5)) for name in ("fp32", "fp16")]
    assert "compute type" not in next(tables(both)).header
    first, _ = tables([both[0], measured(compute_type="tf32")])
    assert column(first, "compute type") == ["fp32", "tf32"]
    first, _ = tables([measured(compute_type="bf16"), measured(4, compute_type="bf16")])
    assert column(first, "compute type") == ["bf16", "bf16"], "the names tell another one"


def test_settings_have_a_column_where_they_differ_and_are_in_the_title_where_they_do_not():
    fast, slow = measured(settings={"hint": "throughput", "arena": "off"}), measured()
    first, _ = tables([fast, slow])
    assert column(first, "settings") == ["arena=off, hint=throughput", "default"]
    assert label(fast, [fast, slow]) == "h03-fp32, arena=off, hint=throughput"
    first, _ = tables([fast])
    assert "settings" not in first.header
    assert first.title == "saturated, onnxruntime, arena=off, hint=throughput, cpu, 1 thread, batch 1"


def test_a_failed_cell_has_a_row_and_no_figures():
    first, second = tables([measured(), failed(artifact(6))])
    assert first.rows[1][:3] == ("h06-fp32", "failed", "")
    assert [row[0] for row in second.rows] == ["h03-fp32"]
    (only,) = tables([failed(artifact(6))])
    assert only.rows[0][0] == "h06-fp32"


def test_calls_on_a_schedule_show_missed_deadlines_and_the_age_of_frames():
    chains = [[30 * MS] * 15 + [40 * MS] * 5] * 5
    first, second = tables([cell(artifact(3), chains, regime="paced-30hz")])
    assert first.title.startswith("paced-30hz, ")
    assert column(second, "missed") == ["25.0%"]
    assert column(second, "frame age") == ["73.3 ms"]
    assert "throughput (95 %)" not in second.header


@pytest.mark.parametrize(("late", "shown"), [(0, "0.0%"), (1, "<0.1%"), (4, "0.1%")])
def test_one_missed_deadline_among_thousands_is_not_none(late, shown):
    chains = [[30 * MS] * 800] * 4 + [[30 * MS] * (800 - late) + [40 * MS] * late]
    _, second = tables([cell(artifact(3), chains, regime="paced-30hz")])
    assert column(second, "missed") == [shown]


def test_several_callers_show_throughput_with_its_interval():
    _, second = tables([cell(artifact(3), [[v] * 20 for v in (38 * MS, 40 * MS, 42 * MS)], regime="concurrent-4")])
    found = re.fullmatch(r"100/s \((\d+\.\d)\.\.(\d+)\)", column(second, "throughput (95 %)")[0])
    assert found is not None
    assert 80 < float(found[1]) < 95 < 105 < int(found[2]) < 125
    assert "missed" not in second.header


def test_first_and_settled_calls_stand_side_by_side():
    cells = [
        measured(regime="burst"),
        measured(6, regime="burst"),
        measured(6, 30 * MS, regime="sustained"),
        measured(3, 25 * MS, regime="sustained"),
        measured(9, regime="sustained"),
    ]
    burst, sustained, both, rest = tables(cells)
    assert (burst.title.split(",")[0], sustained.title.split(",")[0]) == ("burst", "sustained")
    assert both.title == "first and settled calls of a long run: onnxruntime, cpu, 1 thread, batch 1"
    assert column(both, "artifact") == ["h06-fp32", "h03-fp32"]
    assert column(both, "slower by") == ["+50.0%", "+25.0%"]
    assert column(both, "p50 burst")[1] == column(burst, "p50 (95 %)")[0].partition(" (")[0]
    assert column(rest, "regime") == ["burst", "burst", "sustained", "sustained", "sustained"]


@pytest.mark.parametrize("regime", ["saturated", "paced-29.97hz", "concurrent-16"])
def test_tables_fit_into_a_line(regime):
    heavy = {"flags": ("throttled", "floating-clocks"), "energy_j": 0.001234, "switch_s": (0.123,), "regime": regime}
    of = artifact(12, "int8dyn")
    cells = [
        cell(of, latencies(*(0.123,) * 5), threads=threads, memory_bytes=2**33 - 2**28, **heavy) for threads in (1, 16)
    ]
    for table in tables(cells):
        assert width(table) <= 120, table.header


def test_flags_stand_in_the_row_and_are_explained_once_below():
    cells = [
        measured(flags=("noisy", "floating-clocks"), remarks=("noisy: processes differ by 12%", UNSTEADY, FLOATING)),
        measured(6, flags=("floating-clocks",), remarks=(FLOATING,)),
        failed(artifact(9)),
    ]
    assert column(next(tables(cells)), "flags") == ["noisy, floating", "floating", ""]
    assert list(remark_lines(cells)) == [f"{UNSTEADY} (h03-fp32)", FLOATING], "how they differ is in the table"
    assert "flags" not in next(tables([measured()])).header


def test_a_flag_without_evidence_is_still_told():
    assert list(remark_lines([measured(flags=("contended",)), measured(6)])) == ["measured while contended (h03-fp32)"]


def lines_of(cells: Sequence[Cell]) -> list[str]:
    return list(missing_lines(cells))


def test_what_was_not_measured_is_said_once_with_the_reason():
    why = {"energy": "no meter", "temperature": "no permission"}
    cells = [measured(missing=why), measured(6, missing=why), measured(9, missing={"energy": "no meter"})]
    assert lines_of(cells) == [
        "energy not measured: no meter",
        "temperature not measured: no permission (h03-fp32; h06-fp32)",
    ]
    assert lines_of([measured()]) == []


def test_a_bound_that_takes_something_for_granted_or_is_not_there_says_so():
    thrice = cell(artifact(6), [[v for v in chain for _ in range(3)] for chain in latencies(*(MS,) * 5, n=10)])
    short = measured(n=2)
    assert lines_of([thrice, short]) == [
        "the bound of p95 takes log-normal latencies for granted, samples are worth too few (h06-fp32)",
        "p95 has no bound: p95 takes 59 samples even were they independent (h03-fp32)",
    ]
