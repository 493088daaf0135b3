"""How much a profile run measures: presets, and what the first round says of how much more it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from hydradeploy.errors import UsageError
from hydradeploy.profiler.sampling import Measured, Sampling
from hydradeploy.spec import Record
from hydradeploy.stats.latency import MOST_DEPENDENCE, n_effective
from hydradeploy.stats.order import samples_needed


class Preset(Record, frozen=True, kw_only=True):
    """How many rounds, what each process of the first one does, and what the later ones aim at.

    A cell is to get `samples` altogether, or as many as `misses` calls over the bound take for the percentile and the
    confidence asked for, and where `dependent` times what dependent ones are worth less; but no process takes fewer
    than `sampling.samples`, and what all cells take stays within `wall_s` seconds, None for any time.
    """

    rounds: int
    sampling: Sampling
    samples: int
    misses: int
    dependent: bool
    wall_s: float | None


# quick: enough for p95 at 95 % where calls are independent (59) with a slow one among them (93), in about two minutes
# for ten subnets of a ViT-B on two cores. Of fewer samples a process says too little about how its calls depend.
# standard and gate: the counts of measurement practice. Fast models take more, which costs them nothing. sustained: a
# settled device says the same in every process, so three are a check.
PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        rounds=5,
        sampling=Sampling(warmup=1, warmup_s=0.05, samples=16, seconds=0.1, at_most=100),
        samples=100,
        misses=1,
        dependent=False,
        wall_s=135.0,
    ),
    "standard": Preset(
        rounds=10,
        sampling=Sampling(warmup=3, warmup_s=0.3, settle_s=2.0, samples=60, seconds=0.5, at_most=500, switches=3),
        samples=1000,
        misses=2,
        dependent=True,
        wall_s=1800.0,
    ),
    "gate": Preset(
        rounds=10,
        sampling=Sampling(warmup=3, warmup_s=0.3, settle_s=2.0, samples=100, seconds=0.5, at_most=1000, switches=3),
        samples=2000,
        misses=10,
        dependent=True,
        wall_s=3600.0,
    ),
    "sustained": Preset(
        rounds=3,
        sampling=Sampling(
            warmup=1, warmup_s=0.0, settle_s=600.0, samples=60, seconds=60.0, at_most=1_000_000, sustain=True
        ),
        samples=180,
        misses=0,
        dependent=False,
        wall_s=None,
    ),
}


@dataclass(frozen=True)
class Target:
    """The percentile and confidence that the samples are to carry."""

    level: float = 0.95
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0.5 <= self.level <= 0.999 or not 0.5 <= self.confidence <= 0.999:
            raise UsageError(
                f"percentile {self.level:.4g} with confidence {self.confidence:.4g} is not possible",
                hint="both from 50% to 99.9%, for example --percentile p99 --confidence 95%",
            )


def preset_of(name: str, *, pace_hz: float | None = None, concurrency: int = 1, wall_s: float | None = None) -> Preset:
    """The preset of that name, called on a schedule or by several callers, within another time.

    Raises UsageError for an unknown name or what does not go together.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}", hint=f"one of {', '.join(PRESETS)}")
    if pace_hz is not None and concurrency > 1:
        raise UsageError("calls on a schedule come from one caller", hint="give --pace or --concurrency")
    if concurrency < 1:
        raise UsageError("concurrency must be at least 1")
    preset = PRESETS[name]
    if pace_hz is not None and pace_hz <= 0:
        raise UsageError(f"a schedule of {pace_hz:g} calls a second has none", hint="for example --pace 30hz")
    if preset.sampling.sustain and wall_s is not None:
        raise UsageError("a sustained run takes the time it takes", hint="leave out --max-time")
    if preset.sampling.sustain and (pace_hz is not None or concurrency > 1):
        raise UsageError("a sustained run calls back to back", hint="leave out --pace and --concurrency")
    sampling = msgspec.structs.replace(preset.sampling, pace_hz=pace_hz, concurrency=concurrency)
    return msgspec.structs.replace(preset, sampling=sampling, wall_s=preset.wall_s if wall_s is None else wall_s)


def metered(preset: Preset, window_s: float) -> Preset:
    """The same with processes that call for as long as a meter takes."""
    return msgspec.structs.replace(preset, sampling=msgspec.structs.replace(preset.sampling, metered_s=window_s))


def regimes(sampling: Sampling) -> tuple[str, ...]:
    """The names of the regimes that a process so sampled measures."""
    if sampling.sustain:
        return ("burst", "sustained")
    if sampling.pace_hz is not None:
        return (f"paced-{sampling.pace_hz:g}hz",)
    return (f"concurrent-{sampling.concurrency}",) if sampling.concurrency > 1 else ("saturated",)


def samples_wanted(preset: Preset, target: Target, dependence: float = 1.0) -> float:
    """How many samples of a cell carry the percentile, where so many are worth one independent one."""
    return max(float(preset.samples), samples_needed(target.level, target.confidence, preset.misses) * dependence)


@dataclass(frozen=True)
class Pilot:
    """The first round of one cell: what was measured and the seconds that took from start to end."""

    measured: Measured
    wall_s: float

    @property
    def call_s(self) -> float:
        """Seconds that a further sample takes, waiting for its turn included."""
        window = self.measured.ended_s - self.measured.started_s
        return window / len(self.measured.latency_s)

    @property
    def overhead_s(self) -> float:
        """Seconds of a process in which it neither samples nor calls for a meter."""
        return max(0.0, self.wall_s - (self.measured.called_until_s - self.measured.started_s))

    def least_s(self, sampling: Sampling) -> float:
        """Seconds of calls that no process stays below."""
        seconds = min(sampling.seconds, sampling.at_most * self.call_s)
        return max(sampling.samples * self.call_s, seconds, sampling.metered_s)

    def process_s(self, sampling: Sampling, count: int) -> float:
        """Seconds of a later process that takes so many samples or more."""
        return self.overhead_s + max(count * self.call_s, self.least_s(sampling))


def samples_after(preset: Preset, target: Target, pilots: Sequence[Pilot | None]) -> list[int]:
    """For each cell how many samples each process of the later rounds takes; fixed once, after the first round.

    What is wanted is cut to the time there is by giving every cell the same seconds per process, so that what is cheap
    gets all it wants. A cell whose pilot failed gets the least.
    """
    later, least = preset.rounds - 1, preset.sampling.samples
    wanted = [least if pilot is None else _wanted(preset, target, pilot) for pilot in pilots]
    known = [(pilot, count) for pilot, count in zip(pilots, wanted, strict=True) if pilot is not None]
    if preset.wall_s is None or not known:
        return wanted
    left = preset.wall_s - sum(p.wall_s for p, _ in known) - later * sum(p.overhead_s for p, _ in known)
    # What a process calls for the meter anyway, it may keep as well.
    share = max(_share(left / later, known, preset.sampling), preset.sampling.metered_s)
    return [
        count if pilot is None or share >= count * pilot.call_s else max(least, int(share / pilot.call_s))
        for pilot, count in zip(pilots, wanted, strict=True)
    ]


def with_samples(sampling: Sampling, count: int) -> Sampling:
    """The same, but for how many samples there are at least."""
    return msgspec.structs.replace(sampling, samples=count, at_most=max(count, sampling.at_most))


def _wanted(preset: Preset, target: Target, pilot: Pilot) -> int:
    """Samples per process of the later rounds that carry the percentile."""
    samples = pilot.measured.latency_s
    time = min(MOST_DEPENDENCE, len(samples) / n_effective([samples], target.level)) if preset.dependent else 1.0
    total = samples_wanted(preset, target, time) - len(samples)
    return max(preset.sampling.samples, math.ceil(total / (preset.rounds - 1)))


def _share(left_s: float, cells: Sequence[tuple[Pilot, int]], sampling: Sampling) -> float:
    """The most seconds per process at which all cells, none for longer than its count takes, stay within `left_s` a
    round; 0 where not even the least does."""

    def takes(share: float) -> float:
        return sum(max(p.least_s(sampling), min(count * p.call_s, share)) for p, count in cells)

    low, high = 0.0, max(count * pilot.call_s for pilot, count in cells)
    if takes(high) <= left_s:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if takes(middle) <= left_s else (low, middle)
    return low
