"""What TensorRT says is kept, not printed: it refuses by None or False, and only its log has the reason."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

_ERRORS = ("ERROR", "INTERNAL_ERROR")
_KEPT = 200  # lines; a builder can warn of every layer
_LONGEST = 800  # characters of an error message


def logger(trt: Any) -> Any:
    """The one logger of a module: TensorRT keeps the first it is given, and sends later lines there.

    It has `errors` and `warnings`, lines without breaks, oldest first.
    """
    return _logger(trt.ILogger)


def errors(log: Any) -> str:
    """The errors a logger has heard since it was last asked, in one line without repetitions."""
    said = _taken(log.errors)
    return "; ".join(dict.fromkeys(said))[:_LONGEST] or "it logged no reason"


def warnings(log: Any) -> tuple[str, ...]:
    """The warnings it has heard since it was last asked, without repetitions."""
    return tuple(dict.fromkeys(_taken(log.warnings)))


def _taken(lines: deque[str]) -> list[str]:
    taken = []
    while lines:  # TensorRT's threads may add to it meanwhile
        taken.append(lines.popleft())
    return taken


@cache
def _logger(base: Any) -> Any:
    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # or the binding has no C++ half
            self.errors: deque[str] = deque(maxlen=_KEPT)
            self.warnings: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rsplit(".", 1)[-1]
            if name in _ERRORS:
                self.errors.append(" ".join(message.split()))
            elif name == "WARNING":
                self.warnings.append(" ".join(message.split()))

    return Logger()
