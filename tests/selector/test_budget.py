"""Budgets as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.errors import UsageError
from hydradeploy.selector.budget import Budget, parse_latency, percentile_name
from hydradeploy.units import show_seconds
from tests.selector.build import limit


@pytest.mark.parametrize(
    ("text", "percent", "limit_s"),
    [
        ("20ms", 95, 0.02),
        (" 20 ms ", 95, 0.02),
        ("p99<=20ms", 99, 0.02),
        ("p99.9<1s", 99.9, 1.0),
        ("p50 <= 5 ms", 50, 0.005),
        ("p5<=1us", 5, 1e-6),
        ("p99.99<=1.5e2us", 99.99, 1.5e-4),
        ("p99.99999<=1h", 99.99999, 3600.0),
    ],
)
def test_a_latency_budget_is_a_percentile_and_a_duration(text, percent, limit_s):
    assert parse_latency(text) == limit(percent, limit_s)


@pytest.mark.parametrize(
    "text",
    [
        *("", "20", "p95<=20", "p100<=1ms", "p100.0<=1ms", "p0<=1ms", "p0.0<=1ms", "mean<=3ms", "max<=3ms", "<=3ms"),
        *("<3ms", "p95<=0ms", "0ms", "p95<=", "p95", "p95<=-3ms", "-3ms", "p<=3ms", "p.5<=3ms", "P95<=3ms"),
        *("p95>=3ms", "p95=3ms", "p95 3ms", "p95<<3ms", "p95<=<=3ms", "p95<=p99<=3ms", "p-5<=3ms", "p95<=3 m s"),
        *("p95<=3W", "p95<=1e999s", "1e-999s", "p99.9999999999<=1ms", "95%<=3ms", "p95<=3ms\np99<=4ms", "p٩٩<=3ms"),
        *("infs", "nanms", "p99,9<=3ms"),
    ],
)
def test_what_is_no_latency_budget_is_refused_with_a_hint(text):
    with pytest.raises(UsageError) as refused:
        parse_latency(text)
    assert refused.value.hint


PERCENTS = st.integers(1, 999_999_999).map(lambda n: n / 10**7)


@given(PERCENTS)
def test_the_name_of_a_percentile_is_read_back(percent):
    level = round(percent / 100, 9)
    parsed = parse_latency(f"{percentile_name(level)}<=1ms")
    assert parsed.percentile == level
    assert parsed.name == percentile_name(level)


@given(st.sampled_from((50, 90, 95, 99, 99.9)), st.floats(1e-6, 1e3), st.sampled_from(("<", "<=", " <= ")))
def test_what_is_shown_is_read_back_to_three_digits(percent, seconds, relation):
    parsed = parse_latency(f"p{percent}{relation}{show_seconds(seconds)}")
    assert parsed.percentile == round(percent / 100, 9)
    assert parsed.limit_s == pytest.approx(seconds, rel=0.0051)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_latency(text)
    except UsageError:
        return
    assert 0 < found.percentile < 1
    assert found.limit_s > 0


@pytest.mark.parametrize(
    ("level", "name"), [(0.5, "p50"), (0.95, "p95"), (0.999, "p99.9"), (0.9999999, "p99.99999"), (0.07, "p7")]
)
def test_percentiles_are_named_as_people_do(level, name):
    assert percentile_name(level) == name


@pytest.mark.parametrize("field", ["memory_bytes", "energy_j", "size_bytes", "throughput_per_s"])
def test_only_a_floor_is_a_floor_and_nothing_else(field):
    assert Budget(min_top1=0.5, confidence=0.9).only_a_floor
    assert not Budget().only_a_floor
    assert not Budget(**{field: 0.0}).only_a_floor
    assert not Budget(min_top1=0.5, **{field: 0.0}).only_a_floor
    assert not Budget(min_top1=0.5, latency=(limit(95, 1.0),)).only_a_floor
