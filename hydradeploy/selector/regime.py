"""What the name of a regime says: how calls arrived. Latencies of two regimes are not comparable."""

from __future__ import annotations

import math
import re

SATURATED = "saturated"
_NAMED = (SATURATED, "burst", "sustained")


def callers(regime: str) -> int:
    """From how many callers at once: 4 for `concurrent-4`, else 1."""
    match = re.fullmatch(r"concurrent-([1-9][0-9]*)", regime)
    return 1 if match is None else int(match[1])


def is_regime(text: str) -> bool:
    """Whether calls can be measured to arrive so."""
    return text in _NAMED or callers(text) > 1 or pace_hz(text) is not None


def how_to_measure(regime: str) -> str:
    """The command that measures in that regime."""
    if pace_hz(regime) is not None:
        option = f" --pace {regime.removeprefix('paced-')}"
    elif callers(regime) > 1:
        option = f" --concurrency {callers(regime)}"
    else:
        option = " --preset sustained" if regime in ("burst", "sustained") else ""
    return f"measure it: hydradeploy profile{option}"


def pace_hz(regime: str) -> float | None:
    """How often per second by schedule: 30 for `paced-30hz`, None where calls do not wait for one."""
    match = re.fullmatch(r"paced-(.+)hz", regime)
    try:
        pace = math.nan if match is None else float(match[1])
    except ValueError:
        return None
    return pace if 0 < pace < math.inf else None
