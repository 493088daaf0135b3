"""A machine and child processes that are none: the null backend on a clock of its own, in this process."""

from __future__ import annotations

import resource
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
from scipy.special import ndtr, ndtri

import hydradeploy
from hydradeploy.backends.null import Null, VirtualClock
from hydradeploy.devices import Machine
from hydradeploy.devices.reading import Reading
from hydradeploy.measurements import Conditions, Device
from hydradeploy.profiler.child import Request, subject_of
from hydradeploy.profiler.profile import Order, Profiled
from hydradeploy.profiler.rounds import Launch as Launching
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


def profile(bundle: Path, profiles: Path, *, here: Machine, launch: Launching, **options: Any) -> Profiled:
    """`profile` of a machine that is none; what is in an order is given by its names."""
    order = {name: options.pop(name) for name in list(options) if name in Order.__dataclass_fields__}
    return hydradeploy.profile(bundle, profiles, Order(**order), here=here, launch=launch, **options)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond that, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


Latencies = Callable[[Request], Iterable[float]]


@dataclass
class Launch:
    """Answers requests in this process; `latencies` gives the seconds of each call of one child."""

    latencies: Latencies = lambda request: repeat(1 / 64)
    requests: list[Request] = field(default_factory=list)
    answers: list[Measured] = field(default_factory=list)

    def __call__(
        self,
        request: Request,
        *,
        patience_s: float = 3600.0,
        settled: Callable[[], bool] | None = None,
    ) -> Measured:
        self.requests.append(request)
        clock = VirtualClock()
        runner = Null(clock, lambda _: iter(self.latencies(request)), load_s=0.125)
        subject = subject_of(request, runner)
        answer = measure(
            runner,
            subject.model,
            request.options,
            np.load(request.batches),
            subject.preprocessing,
            request.sampling,
            clock,
            clock.sleep,
            other=subject.other,
            settled=settled or (lambda: True),
        )
        self.answers.append(answer)
        return answer

    @property
    def names(self) -> list[str]:
        return [request.artifact for request in self.requests]


@dataclass(frozen=True)
class Law:
    """How long calls take, in seconds, of a distribution known by its quantile function.

    That is the one of any call of a fresh process. Calls of one process follow each other as a Gaussian AR(1) process
    of `phi` does; `share` of the variance, before it becomes latencies, is between processes.
    """

    name: str
    ppf: Callable[[np.ndarray], np.ndarray]
    phi: float = 0.0
    share: float = 0.0

    def __str__(self) -> str:
        return self.name

    def sample(self, number: int) -> Iterator[float]:
        """The calls of process `number`, without end; the same each time."""
        generator = np.random.default_rng([crc32(self.name.encode()), number])
        level, z = generator.standard_normal(2)
        while True:
            noise = generator.standard_normal(512) * (1 - self.phi**2) ** 0.5
            for i in range(len(noise)):
                noise[i] = z = self.phi * z + noise[i]
            yield from self.ppf(ndtr(self.share**0.5 * level + (1 - self.share) ** 0.5 * noise)).tolist()

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, level: float) -> float:
        return float(self.ppf(np.float64(level)))


def log_normal(u: np.ndarray, sigma: float = 0.05) -> np.ndarray:
    """Around 20 ms."""
    return 0.02 * np.exp(sigma * ndtri(u))


def exponential_tail(u: np.ndarray) -> np.ndarray:
    """20 ms and more, 4 ms more in the mean."""
    return 0.02 - 0.004 * np.log1p(-u)


def spikes(u: np.ndarray) -> np.ndarray:
    """One of fifty takes three times as long or more."""
    rest = 0.98
    spike = 3 - np.log1p(-np.clip((u - rest) / (1 - rest), 0, 1 - 1e-12))
    return np.where(u < rest, log_normal(np.minimum(u / rest, 1 - 1e-12)), 0.02 * spike)


LAWS = (
    Law("log-normal", log_normal),
    Law("exponential tail", exponential_tail),
    Law("spikes", spikes),
    Law("autocorrelated", log_normal, phi=0.7),
    Law("processes differ", lambda u: log_normal(u, 0.11), share=0.8),
    Law("autocorrelated tail, processes differ", exponential_tail, phi=0.5, share=0.3),
)
