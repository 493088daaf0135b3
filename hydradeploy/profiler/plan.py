"""What a profile run will do: its cells, and how long that should take by what is known of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydradeploy.backends.ways import Way
from hydradeploy.bundle import Artifact, Bundle
from hydradeploy.errors import UsageError
from hydradeploy.measurements import Cell, show_settings
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.presets import Preset, Target, regimes, samples_wanted
from hydradeploy.spec import Record
from hydradeploy.stats.basics import median
from hydradeploy.units import show_duration, show_number, show_seconds

# An interpreter that imports numpy and a runtime, before it opens anything.
_START_S = 0.6


@dataclass(frozen=True)
class Job:
    """A cell to be measured, and what its process is asked in the first round."""

    artifact: Artifact
    request: Request
    processor: str

    @property
    def key(self) -> str:
        """What it is, in a journal."""
        a, r = self.artifact, self.request
        how = " ".join(filter(None, (r.backend, r.compute_type, show_settings(r.settings))))
        return f"{a.name} {a.graph_sha256} {how} batch {batch_of(a)} threads {r.threads}"


class PlannedCell(Record, frozen=True, kw_only=True):
    """A cell of a plan. `call_s` is what one call should take, None where nothing tells, `samples` at least."""

    artifact: str
    backend: str
    compute_type: str
    settings: dict[str, str]
    input: str
    threads: int
    batch: int
    rounds: int
    samples: int
    call_s: float | None


class Plan(Record, frozen=True, kw_only=True):
    """What would be measured. `expected_s` is None where nothing of it was measured yet; `at_most_s` where samples are
    cut to fit, beyond which only the least is taken. `left_out` says what cannot be measured."""

    preset: str
    regimes: tuple[str, ...]
    cells: tuple[PlannedCell, ...]
    expected_s: float | None
    at_most_s: float | None
    left_out: tuple[str, ...] = ()


HEADER = ("artifact", "backend", "threads", "batch", "processes", "samples at least", "one call")


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """The cells of a plan below HEADER."""
    return [
        (
            cell.artifact,
            ", ".join(filter(None, (cell.backend, cell.compute_type, show_settings(cell.settings)))),
            str(cell.threads),
            str(cell.batch),
            str(cell.rounds),
            str(cell.samples),
            "not known" if cell.call_s is None else show_seconds(cell.call_s),
        )
        for cell in plan.cells
    ]


def sentence(plan: Plan) -> str:
    """How much it is and how long it should take."""
    count = len(plan.cells) * len(plan.regimes)
    text = (
        f"{show_number(count, 'cell')} ({', '.join(plan.regimes)}) in {plan.cells[0].rounds} rounds of fresh processes"
    )
    if plan.expected_s is not None:
        return f"{text}, about {show_duration(plan.expected_s)}"
    if plan.at_most_s is not None:
        return f"{text}, within {show_duration(plan.at_most_s)} or what the fewest samples take"
    return text


def chosen(bundle: Bundle, heads: Sequence[int] | None, precisions: Sequence[str] | None) -> list[Artifact]:
    """The artifacts of these head counts and precisions; raises UsageError where one is not in the bundle."""
    found = bundle.manifest.artifacts
    kept = [a for a in found if (not heads or a.heads in heads) and (not precisions or a.precision in precisions)]
    absent = (
        sorted(set(heads or ()) - {a.heads for a in kept}),
        sorted(set(precisions or ()) - {a.precision for a in kept}),
    )
    if any(absent) or not kept:
        wanted = " and ".join([f"{count} heads" for count in absent[0]] + list(absent[1]))
        names = ", ".join(artifact.name for artifact in found)
        raise UsageError(f"{bundle.path}: no artifact of {wanted or 'these'}", hint=f"it has {names}")
    return kept


def batch_of(artifact: Artifact) -> int:
    """Images per call: one where a graph takes any number."""
    return 1 if artifact.batch == "dynamic" else artifact.batch


def jobs_of(
    bundle: Bundle,
    ways: Sequence[Way],
    threads: Sequence[int],
    batches: Mapping[int, str],
    preset: Preset,
    device: str,
) -> list[Job]:
    """Every artifact in every way with every count of threads; on a GPU with one, for there a call has no others.

    A switch is timed from the artifact before it that is run alike, of the first from the last; where there is only
    one, there is nothing to switch from.
    """
    jobs = []
    for way in ways:
        artifact, alike = way.artifact, [other.artifact for other in ways if _alike(way, other)]
        other = alike[alike.index(artifact) - 1] if len(alike) > 1 and preset.sampling.switches else None
        for count in threads if way.runner.processor == "cpu" else (1,):
            request = Request(
                bundle=str(bundle.path.resolve()),
                artifact=artifact.name,
                graph_sha256=artifact.graph_sha256,
                backend=way.runner.name,
                compute_type=way.compute_type,
                settings=dict(way.settings),
                threads=count,
                batches=batches[batch_of(artifact)],
                sampling=preset.sampling,
                device=device,
                other=None if other is None else other.name,
            )
            jobs.append(Job(artifact, request, way.runner.processor))
    return jobs


def _alike(one: Way, other: Way) -> bool:
    how = [(way.runner.name, way.compute_type, way.settings, way.artifact.batch) for way in (one, other)]
    return how[0] == how[1]


def plan_of(name: str, preset: Preset, target: Target, jobs: Sequence[Job], calls: Sequence[float | None]) -> Plan:
    """The plan of these jobs, of whose calls is known how many seconds each should take, or None."""
    least = preset.sampling.samples
    aim = max(least, math.ceil(samples_wanted(preset, target) / preset.rounds))
    cells = tuple(
        PlannedCell(
            artifact=job.artifact.name,
            backend=job.request.backend,
            compute_type=job.request.compute_type,
            settings=job.request.settings,
            input=job.artifact.input,
            threads=job.request.threads,
            batch=batch_of(job.artifact),
            rounds=preset.rounds,
            samples=least * preset.rounds,
            call_s=call,
        )
        for job, call in zip(jobs, calls, strict=True)
    )
    told = [call for call in calls if call is not None]
    expected = None
    if len(told) == len(calls) and not preset.sampling.sustain:
        shortest = sum(process_s(preset, call, least) for call in told) * preset.rounds
        expected = sum(process_s(preset, call, aim) for call in told) * preset.rounds
        expected = max(shortest, min(expected, preset.wall_s or expected))
    longest = len(jobs) * preset.rounds * preset.sampling.settle_s if preset.sampling.sustain else preset.wall_s
    return Plan(preset=name, regimes=regimes(preset.sampling), cells=cells, expected_s=expected, at_most_s=longest)


def process_s(preset: Preset, call_s: float, samples: int) -> float:
    """Seconds of a process that takes so many samples: start, load, first calls, warm-up, sampling and switches, and
    what calls last for a meter."""
    sampling = preset.sampling
    # Loading and the first call together take about three calls of models of all sizes.
    warmup = 3 * call_s + max(sampling.warmup * call_s, sampling.warmup_s)
    spacing = max(call_s, 1 / sampling.pace_hz) if sampling.pace_hz else call_s
    switches = 2 * sampling.switches * call_s + (3 * call_s if sampling.switches else 0.0)
    seconds = min(sampling.seconds, sampling.at_most * spacing)
    return _START_S + warmup + max(samples * spacing, seconds, sampling.metered_s) + switches


def call_s(job: Job, known: Sequence[Cell]) -> float | None:
    """The median measured before of this graph, run in the same way by as many threads; None where there is none."""
    r = job.request
    own = (job.artifact.graph_sha256, r.backend, r.compute_type, r.settings, r.threads, "saturated")
    same = [
        c
        for c in known
        if c.latency_s and (c.graph_sha256, c.backend, c.compute_type, c.settings, c.threads, c.regime) == own
    ]
    return median(same[-1].latency_s) if same else None


def scaled(job: Job, other: Artifact, other_s: float) -> float:
    """What a call should take by the MACs of another artifact."""
    return other_s * job.artifact.macs * batch_of(job.artifact) / (other.macs * batch_of(other))
