"""Machines for a monitor in another process: what one does is told by a file in the directory that its kind names."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydradeploy.devices.reading import Reading
from hydradeploy.errors import EnvironmentFailed, MissingError

SOURCE = "tests.profiler.toys:machine"


@dataclass(frozen=True)
class Toy:
    """Its gauges and counters are what the file says; `locked` is there while clocks are pinned."""

    root: Path
    gauges: dict[str, float]
    counters: dict[str, float]
    reading_s: float = 0.0
    breaks_after: int = 1 << 30
    locks: bool = True
    unlocks: bool = True

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        with open(self.root / "reads", "a") as file:
            print(*sorted(ours), file=file)
        if not (self.root / "modules").exists():
            (self.root / "modules").write_text("\n".join(sys.modules))
        if os.path.getsize(self.root / "reads") > self.breaks_after:
            os.kill(os.getpid(), signal.SIGSEGV)
        until = time.process_time() + self.reading_s
        while time.process_time() < until:
            pass
        return Reading(at_s=at_s, gauges=self.gauges, counters=self.counters)

    @contextmanager
    def lock_clocks(self) -> Iterator[None]:
        if not self.locks:
            raise MissingError("the clocks of a toy cannot be pinned", hint="get a grown-up's")
        (self.root / "locked").touch()
        try:
            yield
        finally:
            (self.root / "locked").unlink()
            if not self.unlocks:
                raise EnvironmentFailed("the clocks of this toy stay as they are", hint="wind it up")


def machine(kind: str) -> Toy:
    if not Path(kind).is_dir():
        raise MissingError(f"no toy in {kind}", hint="look below the bed")
    return Toy(Path(kind), **{"gauges": {}, "counters": {}} | json.loads(Path(kind, "toy.json").read_text()))
