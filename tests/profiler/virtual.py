"""A machine and child processes that are none: the null backend on a clock of its own, in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat

import msgspec
import numpy as np

from hydradeploy.backends import Options
from hydradeploy.backends.null import Null, VirtualClock
from hydradeploy.devices.reading import Reading
from hydradeploy.measurements import Conditions, Device
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.sampling import Measured, measure

DEVICE = Device(
    kind="cpu",
    name="Toy Board 3",
    architecture="aarch64",
    instruction_set="aarch64-asimd",
    cores=4,
    memory_bytes=4 << 30,
)
CONDITIONS = Conditions(
    power_mode=None, governor="schedutil", affinity="0-3", quota_cores=None, clocks=None, os="Linux 6.1", software={}
)


@dataclass(frozen=True)
class Here:
    """A machine that is what it is told to be; its load rises with each look."""

    device: Device = DEVICE
    setting: Conditions = CONDITIONS
    loads: list[float] = field(default_factory=lambda: [0.0])
    kind: str = "cpu"
    processors: tuple[str, ...] = ("cpu",)

    def changed(self, **conditions: object) -> Here:
        return Here(self.device, msgspec.structs.replace(self.setting, **conditions))

    def why_not(self) -> str | None:
        return None

    def identity(self) -> Device:
        return self.device

    def conditions(self, software: Mapping[str, str]) -> Conditions:
        return msgspec.structs.replace(self.setting, software=dict(software))

    def cores(self) -> int:
        return 3

    def read(self, at_s: float, ours: Collection[int] = ()) -> Reading:
        self.loads[0] += 0.25
        return Reading(at_s=at_s, gauges={"load_average": self.loads[0]}, counters={})

    def missing(self) -> Mapping[str, str]:
        return {"energy": "a toy has no meter"}

    def meter(self) -> str | None:
        return None

    def occupied_bytes(self) -> int | None:
        return None

    def lock_clocks(self) -> AbstractContextManager[None]:
        return nullcontext()


Latencies = Callable[[Request], Iterable[float]]


@dataclass
class Launch:
    """Answers requests in this process; `latencies` gives the seconds of each call of one child."""

    latencies: Latencies = lambda request: repeat(1 / 64)
    requests: list[Request] = field(default_factory=list)
    answers: list[Measured] = field(default_factory=list)

    def __call__(self, request: Request) -> Measured:
        self.requests.append(request)
        clock = VirtualClock()
        runner = Null(clock, lambda _: iter(self.latencies(request)), load_s=0.125)
        batches = np.load(request.batches)
        self.answers.append(measure(runner, request.model, Options(request.threads), batches, request.sampling, clock))
        return self.answers[-1]

    @property
    def names(self) -> list[str]:
        return [request.name for request in self.requests]
