"""benchmarks/export.py: what its ratios are of, on made-up seconds; and one round of it on a tiny supernet."""

from __future__ import annotations

import pytest

COLUMNS = [
    *("machine", "stack", "what", "against", "rounds", "median_s", "slowest_s", "ratio", "ratio_low", "ratio_high"),
    *("bytes", "of_supernet"),
]


def test_ratios_are_of_the_same_round(benchmark_module):
    row = benchmark_module("export").row(
        "ours", "theirs", [{"ours": 1.0, "theirs": 4.0}, {"ours": 3.0, "theirs": 12.0}]
    )
    assert list(row) == COLUMNS[:-2]
    assert (row["median_s"], row["slowest_s"]) == (2.0, 3.0)
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (0.25, 0.25, 0.25)


@pytest.mark.slow
def test_writing_is_against_torch_and_opening_int8_against_its_fp32_twin(run_benchmark):
    rows = run_benchmark("export.py", "--heads", "12", "--opened", "3")
    assert list(rows[0]) == COLUMNS
    by_name = {row["what"]: row for row in rows}
    peer = by_name["torch.onnx.export, a call per subnet"]
    writing = [row for row in rows if row["bytes"]]
    opening = [row for row in rows if not row["bytes"]]
    assert {row["against"] for row in writing} == {peer["what"]}
    assert {(row["what"], row["against"]) for row in opening} >= {
        (f"open h03-{kind} onnxruntime", "open h03-fp32 onnxruntime") for kind in ("fp32", "int8dyn", "int8")
    }
    for row in rows:
        ratio = float(row["median_s"]) / float(by_name[row["against"]]["median_s"])
        assert abs(float(row["ratio"]) - ratio) < 0.02 * ratio + 1e-3
    assert float(by_name["ours fp32: graphs and weights"]["median_s"]) < float(by_name["ours fp32"]["median_s"])
    int8, both = by_name["ours int8dyn"], by_name["ours fp32 + int8dyn"]
    assert int(both["bytes"]) == int(int8["bytes"]) + int(by_name["ours fp32"]["bytes"])
    assert float(int8["of_supernet"]) < 1 < float(both["of_supernet"])
