"""Quantities with units: what is read, what is refused, what is shown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.errors import UsageError
from hydradeploy.units import (
    DURATION,
    ENERGY,
    FRACTION,
    RATE,
    SIZE,
    parse,
    show_at_most,
    show_bytes,
    show_confidence,
    show_count,
    show_percent,
    show_seconds,
)

QUANTITIES = (DURATION, SIZE, ENERGY, FRACTION, RATE)
SI = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 1024.0,
    "MiB": 1024.0**2,
    "GiB": 1024.0**3,
    "uJ": 1e-6,
    "µJ": 1e-6,
    "mJ": 1e-3,
    "J": 1.0,
    "kJ": 1e3,
    "%": 0.01,
    "pp": 0.01,
    "/s": 1.0,
    "hz": 1.0,
    "Hz": 1.0,
    "/min": 1 / 60,
}
UNITS = [(quantity, unit) for quantity in QUANTITIES for unit in quantity.units]


def significant(text: str) -> int:
    """The significant digits of a shown number."""
    return len(text.split()[0].replace(".", "").lstrip("0"))


@pytest.mark.parametrize(("quantity", "unit"), UNITS, ids=[unit for _, unit in UNITS])
def test_one_of_each_unit_is_its_si_value(quantity, unit):
    assert parse(f"1{unit}", quantity) == pytest.approx(SI[unit], rel=1e-15)


@given(
    st.sampled_from(UNITS),
    st.one_of(st.integers(0, 10**12), st.floats(0, 1e12, allow_nan=False)),
    st.sampled_from(("", " ", "  ")),
)
def test_any_number_with_any_unit_is_that_number_times_the_unit(case, number, space):
    quantity, unit = case
    assert parse(f" {number!r}{space}{unit} ", quantity) == pytest.approx(float(number) * SI[unit], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("20_000us", 0.02), (".5ms", 0.0005), ("1e3us", 1e-3), ("2.5E-1 s", 0.25), ("0ms", 0.0)],
        *[("5\N{MICRO SIGN}s", 5e-6), ("5\N{GREEK SMALL LETTER MU}s", 5e-6)],
    ],
)
def test_ways_to_write_a_number(text, value):
    assert parse(text, DURATION) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("quantity", "suggestion"),
    [(DURATION, "20ms"), (SIZE, "20GiB"), (ENERGY, "20J"), (FRACTION, "20%"), (RATE, "20/s")],
)
def test_a_bare_number_is_refused_and_the_hint_gives_it_a_unit(quantity, suggestion):
    with pytest.raises(UsageError, match="has no unit") as refused:
        parse("20", quantity)
    assert suggestion in refused.value.hint
    assert parse(suggestion, quantity) > 0


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.example)
def test_the_example_of_a_quantity_can_be_read(quantity):
    assert parse(quantity.example, quantity) > 0


@pytest.mark.parametrize("text", ["20parsec", "20MS", "20 m", "20GB", "20ms2", "20e", "20.ms", "0x10s", "1,5ms"])
def test_an_unknown_unit_is_refused_and_the_hint_lists_the_known(text):
    with pytest.raises(UsageError, match="is not a unit of duration") as refused:
        parse(text, DURATION)
    assert all(unit in refused.value.hint for unit in DURATION.units)


@pytest.mark.parametrize(
    "text", ["", " ", "ms", "-5ms", "+5ms", "nan", "nan s", "inf", "infs", "-inf s", "_5ms", "5 ms ms"]
)
def test_what_is_no_amount_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="is not a duration") as refused:
        parse(text, DURATION)
    assert DURATION.example in refused.value.hint


@pytest.mark.parametrize("text", ["1e999s", "1e308h"])
def test_an_amount_too_large_for_a_float_is_refused(text):
    with pytest.raises(UsageError, match="not a finite number"):
        parse(text, DURATION)


@given(st.text(max_size=12), st.sampled_from(QUANTITIES))
def test_any_text_is_a_finite_amount_or_a_usage_error(text, quantity):
    try:
        value = parse(text, quantity)
    except UsageError:
        return
    assert math.isfinite(value)
    assert value >= 0


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (24_012_390, "22.9 MiB"),
        (2**20, "1.00 MiB"),
        (5 * 2**30, "5.00 GiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(size, shown):
    assert show_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ns"),
        (1e-9, "1.00 ns"),
        (2.5e-6, "2.50 us"),
        (0.0174, "17.4 ms"),
        (0.999, "999 ms"),
        (1, "1.00 s"),
        (123.4, "123 s"),
    ],
)
def test_seconds_are_shown_in_the_unit_that_fits(seconds, shown):
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.9999, "1.00 s"), (999.9e-6, "1.00 ms"), (9.999e-3, "10.0 ms"), (0.09996, "100 ms")]
)
def test_seconds_that_round_up_to_the_next_power_of_ten_keep_three_digits(seconds, shown):
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (86_567_656, "86.6 M"), (17_564_000_000, "17.6 G"), (999_900, "1.00 M")],
)
def test_counts_are_shown_in_thousands_millions_and_billions(count, shown):
    assert show_count(count) == shown


@given(st.floats(1e-9, 999.4))
def test_seconds_have_three_significant_digits_and_their_value(seconds):
    number, unit = show_seconds(seconds).split()
    assert significant(number) == 3
    assert float(number) * SI[unit] == pytest.approx(seconds, rel=0.00501)


@given(st.floats(1e-9, 9e3))
def test_what_is_shown_as_at_most_is_not_less_and_no_more_than_a_third_digit_more(seconds):
    shown = parse(show_at_most(seconds), DURATION)
    assert seconds <= shown <= seconds * 1.01001
    assert show_at_most(shown) == show_at_most(seconds)


@given(st.integers(1000, 999 * 10**9))
def test_counts_have_three_significant_digits_and_their_value(count):
    number, unit = show_count(count).split()
    assert significant(number) == 3
    assert float(number) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit] == pytest.approx(count, rel=0.00501)


@given(st.integers(1024, 999 * 2**30))
def test_bytes_are_within_half_of_the_third_digit_of_their_value(size):
    number, unit = show_bytes(size).split()
    assert 3 <= significant(number) <= 4
    assert float(number) * SI[unit] == pytest.approx(size, rel=0.00501)


@pytest.mark.parametrize(
    ("fraction", "digits", "shown"), [(0.784, 1, "78.4%"), (1, 0, "100%"), (0, 1, "0.0%"), (0.12345, 2, "12.35%")]
)
def test_a_fraction_is_shown_as_per_cent(fraction, digits, shown):
    assert show_percent(fraction, digits) == shown


@pytest.mark.parametrize(("level", "shown"), [(0.95, "95%"), (0.999, "99.9%"), (0.9951, "99.51%"), (1.0, "100%")])
def test_a_confidence_is_shown_with_all_of_its_digits(level, shown):
    assert show_confidence(level) == shown
