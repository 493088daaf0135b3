"""benchmarks/shared_weights.py: one round of it on a tiny supernet."""

from __future__ import annotations

import pytest

VARIANTS = ("shared", "standalone")


@pytest.mark.slow
def test_both_variants_have_every_figure_and_a_ratio_of_them(run_benchmark):
    rows = run_benchmark("shared_weights.py", "--heads", "3,12")
    assert [row["artifact"] for row in rows] == ["h03-fp32", "h12-fp32"]
    for row in rows:
        for figure in ("latency_s", "load_s", "cold_load_s", "first_s"):
            one, other = (float(row[f"{figure}_{variant}"]) for variant in VARIANTS)
            assert min(one, other) > 0
            assert float(row[f"{figure}_low"]) == float(row[f"{figure}_ratio"]) == float(row[f"{figure}_high"])
            if figure != "latency_s":  # which is paired turn by turn
                # Figures have five digits behind the point, a load takes milliseconds.
                assert float(row[f"{figure}_ratio"]) == pytest.approx(one / other, rel=0.05)
        assert all(int(row[f"peak_bytes_{variant}"]) >= 0 for variant in VARIANTS)
