"""`profile`: measure every artifact on this device, in rounds of fresh processes.

A round measures each cell once; the next one goes the other way round, so that a machine that warms up or slows down
touches all head counts alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from hydradeploy.backends import Backend, backend, model_of, usable
from hydradeploy.bundle import Artifact, Bundle, open_bundle
from hydradeploy.data.preprocess import normalise
from hydradeploy.devices import Machine, machine
from hydradeploy.errors import MissingError, UsageError, environment
from hydradeploy.measurements import Cell, Profile, Stored, add_profile, read_profiles
from hydradeploy.profiler.child import Request, spawn
from hydradeploy.profiler.sampling import Measured, Sampling

Report = Callable[[str, int, int], None]

_IMAGES = 16


@dataclass(frozen=True)
class Preset:
    """How many rounds, and what each process of them does."""

    rounds: int
    sampling: Sampling

    @property
    def samples(self) -> int:
        """The fewest samples a cell gets."""
        return self.rounds * self.sampling.samples


# quick: enough for p95 at 95 % where calls are independent (59) with a slow one among them (93). standard and gate: the
# counts of measurement practice for the same where they are not. Fast models take more, which costs them nothing.
PRESETS: Mapping[str, Preset] = {
    "quick": Preset(5, Sampling(warmup=1, warmup_s=0.05, samples=20, seconds=0.1, at_most=100)),
    "standard": Preset(10, Sampling(warmup=3, warmup_s=0.5, samples=100, seconds=0.5, at_most=500)),
    "gate": Preset(10, Sampling(warmup=3, warmup_s=0.5, samples=200, seconds=0.5, at_most=500)),
}


@dataclass(frozen=True)
class Profiled:
    """The profile's file and the cells measured this time."""

    stored: Stored
    cells: tuple[Cell, ...]


@dataclass
class _Job:
    """A cell while it is being measured."""

    artifact: Artifact
    request: Request
    found: list[Measured] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    error: str | None = None


def profile(
    bundle: Path,
    profiles: Path,
    *,
    device: str | None = None,
    backend_name: str | None = None,
    heads: Sequence[int] | None = None,
    precisions: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    preset: str = "quick",
    report: Report = lambda what, done, total: None,
    launch: Callable[[Request], Measured] = spawn,
    here: Machine | None = None,
) -> Profiled:
    """Measure latency, load time and memory of artifacts and keep them in the profile of this device.

    Every artifact is measured unless `heads` or `precisions` choose; with as many threads as this process has cores
    unless `threads` names one or more counts. A cell whose process fails keeps the reason and the others go on. Raises
    UsageError (no bundle, nothing chosen, no such preset), IntegrityError (damaged bundle or profile), MissingError
    (no backend, this is no such device, every cell failed), EnvironmentFailed (disk).
    """
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}", hint=f"one of {', '.join(PRESETS)}")
    if threads is not None and (not threads or min(threads) < 1):
        raise UsageError("threads must be at least 1")
    here = here or machine(device)
    runner = backend(backend_name)
    opened = open_bundle(bundle)
    chosen = _chosen(opened, heads, precisions)
    conditions = here.conditions({name: v for found in usable() for name, v in found.software().items()})
    counts = sorted(set(threads or (here.cores(),)))
    with environment(f"writing into {profiles}"):
        profiles.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=profiles).close()  # what cannot be kept is not worth measuring
    read_profiles(profiles)  # nor what a damaged file would keep from being merged
    with _inputs(opened, {_batch(artifact) for artifact in chosen}) as files:
        jobs = [
            _Job(a, _request(opened, a, runner, count, files[_batch(a)], PRESETS[preset].sampling))
            for a in chosen
            for count in counts
        ]
        _measure(jobs, PRESETS[preset].rounds, here, launch, report)
    cells = tuple(_cell(job, here.kind, "saturated") for job in jobs)
    if all(cell.error is not None for cell in cells):
        raise MissingError(f"no cell could be measured: {cells[0].error}")
    fresh = Profile(device=here.identity(), conditions=conditions, cells=cells)
    return Profiled(add_profile(profiles, fresh), cells)


def _measure(
    jobs: Sequence[_Job],
    rounds: int,
    here: Machine,
    launch: Callable[[Request], Measured],
    report: Report,
) -> None:
    total = rounds * len(jobs)
    for number in range(rounds):
        order = jobs if number % 2 == 0 else list(reversed(jobs))
        for place, job in enumerate(order):
            report("measuring", number * len(jobs) + place, total)
            if job.error is not None:
                continue
            job.loads.append(here.read(0.0).gauges.get("load_average", -1.0))
            try:
                job.found.append(launch(job.request))
            except MissingError as error:
                job.error = error.message
    report("measuring", total, total)


def _chosen(bundle: Bundle, heads: Sequence[int] | None, precisions: Sequence[str] | None) -> list[Artifact]:
    found = bundle.manifest.artifacts
    chosen = [a for a in found if (not heads or a.heads in heads) and (not precisions or a.precision in precisions)]
    absent = (
        sorted(set(heads or ()) - {a.heads for a in chosen}),
        sorted(set(precisions or ()) - {a.precision for a in chosen}),
    )
    if any(absent) or not chosen:
        wanted = " and ".join([f"{count} heads" for count in absent[0]] + list(absent[1]))
        names = ", ".join(artifact.name for artifact in found)
        raise UsageError(f"{bundle.path}: no artifact of {wanted or 'these'}", hint=f"it has {names}")
    return chosen


def _batch(artifact: Artifact) -> int:
    return 1 if artifact.batch == "dynamic" else artifact.batch


@contextmanager
def _inputs(bundle: Bundle, sizes: set[int]) -> Iterator[Mapping[int, Path]]:
    """Per batch size a file of batches: the golden images and their mirror images, so that inputs change."""
    golden = bundle.golden().images
    images = normalise(np.concatenate([golden, golden[:, :, ::-1]]), bundle.spec.preprocessing)
    with ExitStack() as stack:
        with environment("writing the images to measure with"):
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            files = {}
            for size in sizes:
                count = max(2, -(-_IMAGES // size))
                chosen = np.arange(count * size) % len(images)
                files[size] = Path(directory, f"{size}.npy")
                np.save(files[size], images[chosen].reshape(count, size, *images.shape[1:]))
        yield files


def _request(
    bundle: Bundle, artifact: Artifact, runner: Backend, threads: int, batches: Path, sampling: Sampling
) -> Request:
    model = model_of(bundle, artifact, runner.dialect)
    model = replace(model, graph=model.graph.resolve())
    return Request(
        backend=runner.name,
        name=model.name,
        graph=str(model.graph),
        batch=model.batch,
        image_shape=model.image_shape,
        classes=model.classes,
        extents=tuple((str(path.resolve()), offset, length) for path, offset, length in model.extents),
        threads=threads,
        batches=str(batches),
        sampling=sampling,
    )


def _cell(job: _Job, processor: str, regime: str) -> Cell:
    memory = [found.memory_bytes for found in job.found if found.memory_bytes is not None]
    samples = [(value, number) for number, found in enumerate(job.found) for value in found.latency_s]
    return Cell(
        artifact=job.artifact.name,
        graph_sha256=job.artifact.graph_sha256,
        backend=job.request.backend,
        processor=processor,
        compute_type=job.artifact.precision,
        input="float32",
        batch=_batch(job.artifact),
        threads=job.request.threads,
        regime=regime,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        latency_s=tuple(value for value, _ in samples),
        process=tuple(number for _, number in samples),
        load_s=tuple(found.load_s for found in job.found),
        first_s=tuple(found.first_s for found in job.found),
        memory_bytes=max(memory, default=None),
        evidence={
            "load_average": tuple(load for load in job.loads if load >= 0),
            "warmup": tuple(float(found.warmup) for found in job.found),
        },
        error=job.error,
    )
