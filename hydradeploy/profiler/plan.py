"""What a profile run will do: its cells, and how long that should take by what is known of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hydradeploy.backends import Backend, model_of
from hydradeploy.bundle import Artifact, Bundle
from hydradeploy.errors import UsageError
from hydradeploy.measurements import Cell
from hydradeploy.profiler.child import Opened, Request
from hydradeploy.profiler.presets import Preset, Target, regimes, samples_wanted
from hydradeploy.spec import Record
from hydradeploy.stats.basics import median
from hydradeploy.units import show_duration, show_seconds

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
        return f"{a.name} {a.graph_sha256} {r.backend} batch {batch_of(a)} threads {r.threads}"


class PlannedCell(Record, frozen=True, kw_only=True):
    """A cell of a plan. `call_s` is what one call should take, None where nothing tells, `samples` at least."""

    artifact: str
    backend: str
    threads: int
    batch: int
    rounds: int
    samples: int
    call_s: float | None


class Plan(Record, frozen=True, kw_only=True):
    """What would be measured. `expected_s` is None where nothing of it was measured yet; `at_most_s` where samples are
    cut to fit, beyond which only the least is taken."""

    preset: str
    regimes: tuple[str, ...]
    cells: tuple[PlannedCell, ...]
    expected_s: float | None
    at_most_s: float | None


HEADER = ("artifact", "threads", "batch", "processes", "samples at least", "one call")


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """The cells of a plan below HEADER."""
    return [
        (
            cell.artifact,
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
    text = f"{count} cells ({', '.join(plan.regimes)}) in {plan.cells[0].rounds} rounds of fresh processes"
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
    artifacts: Sequence[Artifact],
    runner: Backend,
    threads: Sequence[int],
    batches: Mapping[int, str],
    preset: Preset,
    device: str,
) -> list[Job]:
    """Every artifact with every count of threads. A switch is timed from the artifact before it, of the first from the
    last; where there is only one, there is nothing to switch from."""
    opened = [_opened(bundle, artifact, runner) for artifact in artifacts]
    jobs = []
    for place, artifact in enumerate(artifacts):
        other = opened[place - 1] if len(opened) > 1 and preset.sampling.switches else None
        fields = {name: getattr(opened[place], name) for name in Opened.__struct_fields__}
        for count in threads:
            request = Request(
                **fields,
                backend=runner.name,
                threads=count,
                batches=batches[batch_of(artifact)],
                sampling=preset.sampling,
                device=device,
                other=other if other is not None and other.batch == opened[place].batch else None,
            )
            jobs.append(Job(artifact, request, runner.processor))
    return jobs


def _opened(bundle: Bundle, artifact: Artifact, runner: Backend) -> Opened:
    model = model_of(bundle, artifact, runner.dialect)
    model = replace(model, graph=model.graph.resolve())
    return Opened(
        name=model.name,
        graph=str(model.graph),
        batch=model.batch,
        image_shape=model.image_shape,
        classes=model.classes,
        extents=tuple((str(path.resolve()), offset, length) for path, offset, length in model.extents),
    )


def plan_of(name: str, preset: Preset, target: Target, jobs: Sequence[Job], calls: Sequence[float | None]) -> Plan:
    """The plan of these jobs, of whose calls is known how many seconds each should take, or None."""
    least = preset.sampling.samples
    aim = max(least, math.ceil(samples_wanted(preset, target) / preset.rounds))
    cells = tuple(
        PlannedCell(
            artifact=job.artifact.name,
            backend=job.request.backend,
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
    """Seconds of a process that takes so many samples: start, load, first calls, warm-up, sampling and switches."""
    sampling = preset.sampling
    # Loading and the first call together take about three calls of models of all sizes.
    warmup = 3 * call_s + max(sampling.warmup * call_s, sampling.warmup_s)
    spacing = max(call_s, 1 / sampling.pace_hz) if sampling.pace_hz else call_s
    switches = 2 * sampling.switches * call_s + (3 * call_s if sampling.switches else 0.0)
    return _START_S + warmup + max(samples * spacing, min(sampling.seconds, sampling.at_most * spacing)) + switches


def call_s(job: Job, known: Sequence[Cell]) -> float | None:
    """The median measured before of this graph, with as many threads on the same backend; None where there is none."""
    own = (job.artifact.graph_sha256, job.request.backend, job.request.threads, "saturated")
    same = [c for c in known if c.latency_s and (c.graph_sha256, c.backend, c.threads, c.regime) == own]
    return median(same[-1].latency_s) if same else None


def scaled(job: Job, other: Artifact, other_s: float) -> float:
    """What a call should take by the MACs of another artifact."""
    return other_s * job.artifact.macs * batch_of(job.artifact) / (other.macs * batch_of(other))
