"""What the names of regimes say."""

from __future__ import annotations

import pytest

from hydradeploy.selector.regime import callers, how_to_measure, is_regime, pace_hz


@pytest.mark.parametrize(
    ("regime", "count", "pace", "option"),
    [
        ("saturated", 1, None, ""),
        ("burst", 1, None, " --preset sustained"),
        ("sustained", 1, None, " --preset sustained"),
        ("concurrent-4", 4, None, " --concurrency 4"),
        ("concurrent-16", 16, None, " --concurrency 16"),
        ("paced-30hz", 1, 30.0, " --pace 30hz"),
        ("paced-29.97hz", 1, 29.97, " --pace 29.97hz"),
        ("concurrent-0", 1, None, ""),
        ("paced-0hz", 1, None, ""),
        ("paced-fasthz", 1, None, ""),
        ("paced-infhz", 1, None, ""),
    ],
)
def test_a_regime_tells_its_callers_its_pace_and_how_it_is_measured(regime, count, pace, option):
    assert (callers(regime), pace_hz(regime)) == (count, pace)
    assert how_to_measure(regime) == f"measure it: hydradeploy profile{option}"
    assert is_regime(regime) == bool(option or regime == "saturated")
