"""How int8 artifacts are quantised: ranges from images, and the layers that stay in float where int8 costs too much."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Backend, Options, model, prepared, run_all
from hydradeploy.bundle import Calibration, Drop, Quantisation
from hydradeploy.data import samples
from hydradeploy.data.datasets import open_dataset, spread
from hydradeploy.errors import ParityError, UsageError
from hydradeploy.exporter import lower
from hydradeploy.exporter.calibration import METHODS, calibrate
from hydradeploy.exporter.jobs import Job
from hydradeploy.exporter.precision import precision
from hydradeploy.exporter.sensitivity import ranking
from hydradeploy.exporter.source import source_of
from hydradeploy.exporter.weights import Array, block
from hydradeploy.stored import layers, stored
from hydradeploy.supernet.store import Weights
from hydradeploy.units import show_points

Report = Callable[[str, int, int], None]

# Of the calibration images, those that layers are ranked with.
_RANKED = 16
# Labelled images that are prepared at once: as float32 a thousand of ImageNet's are 600 MB.
_CHUNK = 32


@dataclass(frozen=True)
class Quantising:
    """How int8 is to be made.

    `images` are so many to calibrate with, `max_drop` the top-1 that int8 may cost as a fraction, judged on `judged`
    labelled images; None does not ask.
    """

    method: str = "minmax"
    images: int = 64
    max_drop: float | None = None
    judged: int = 1000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"no calibration method {self.method!r}", hint=f"one of {', '.join(METHODS)}")
        if self.images < 1 or self.judged < 1:
            raise UsageError("calibration takes at least one image")


def quantised(
    weights: Weights,
    jobs: Sequence[Job],
    data: str | Path | None,
    quantising: Quantising,
    runner: Backend,
    report: Report,
) -> list[Job]:
    """The jobs, those in int8 with their quantisation.

    Raises UsageError where static int8 or a limit has no `data` or a limit nothing in int8, InputError for images
    refused, ParityError where no setting stays within the limit, with the best that was found.
    """
    chosen = [job for job in jobs if job.precision.int8 is not None]
    if not chosen and quantising.max_drop is not None:
        raise UsageError("--max-drop is what int8 may cost, and nothing is exported in int8", hint="--precision int8")
    if not chosen:
        return list(jobs)
    if data is None and quantising.max_drop is not None:
        raise UsageError("--max-drop needs labelled images", hint="name them with --data")
    if data is None and any(job.precision.int8 == "static" for job in chosen):
        raise UsageError("static int8 is calibrated on images", hint="name them with --data, or export int8dyn")
    found = samples.read(data, weights.spec, quantising.images) if data is not None else None
    made = list(_ranged(weights, chosen, found, quantising.method, report))
    if quantising.max_drop is not None and found is not None:
        judge = _Judge(weights, _Labelled.read(weights, str(data), quantising.judged, report), runner, report)
        made = [
            job
            for name in dict.fromkeys(job.precision.name for job in made)
            for job in _within(
                judge, [job for job in made if job.precision.name == name], found.images, quantising.max_drop
            )
        ]
    by_name = {job.name: job for job in made}
    return [by_name.get(job.name, job) for job in jobs]


def _ranged(
    weights: Weights, jobs: Sequence[Job], found: samples.Samples | None, method: str, report: Report
) -> Iterator[Job]:
    """Every layer in int8, with the ranges of its input."""
    static = [job for job in jobs if job.precision.int8 == "static"]
    steps: Mapping[int, dict[str, float]] = {}
    if static and found is not None:
        subnets = [weights.spec.geometry.subnet(heads) for heads in sorted({job.heads for job in static})]
        steps = calibrate(weights, subnets, found.images, method, report)
    for job in jobs:
        calibration = None
        if job.precision.int8 == "static" and found is not None:
            calibration = Calibration(
                method=method, data=found.source, images=len(found.images), scales=steps[job.heads]
            )
        yield job.with_quantisation(Quantisation(kept=(), calibration=calibration, drop=None))


@dataclass(frozen=True)
class _Labelled:
    """Pixels (n, s, s, channels) and labels (n,) of a data set."""

    name: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @classmethod
    def read(cls, weights: Weights, data: str, count: int, report: Report) -> _Labelled:
        dataset = open_dataset(data, "val")
        chosen = spread(len(dataset), count)
        labels = dataset.labels_for(weights.spec)[chosen]
        pixels = []
        for done, index in enumerate(chosen):
            report("reading labelled images", done, len(chosen))
            pixels.append(dataset.pixels(int(index), weights.spec))
        return cls(dataset.name, np.stack(pixels), labels)


class _Judge:
    """Top-1 of jobs, by the graphs they would write."""

    def __init__(self, weights: Weights, labelled: _Labelled, runner: Backend, report: Report) -> None:
        self.weights, self.labelled, self.report = weights, labelled, report
        self._runner = runner
        self._source = source_of(weights)
        self._tensors: dict[str, Array] = {}
        self._twins: dict[int, float] = {}

    def drops(self, jobs: Sequence[Job], limit: float) -> list[Job]:
        """The jobs with what they cost."""
        judged = []
        for done, job in enumerate(jobs):
            self.report(f"judging {job.precision.name}", done, len(jobs))
            if job.heads not in self._twins:
                self._twins[job.heads] = self._top1(Job(job.heads, precision("fp32"), 1, True))
            drop = Drop(
                data=self.labelled.name,
                n=len(self.labelled.labels),
                top1=self._top1(replace(job, batch=1)),
                fp32_top1=self._twins[job.heads],
                limit=limit,
            )
            judged.append(job.with_quantisation(msgspec.structs.replace(_quantisation(job), drop=drop)))
        return judged

    def _top1(self, job: Job) -> float:
        geometry = self.weights.spec.geometry
        subnet, form = geometry.subnet(job.heads), job.form(geometry)
        wanted = stored(subnet, form)
        missing = {name: tensor.dtype for name, tensor in wanted.items() if name not in self._tensors}
        self._tensors |= dict(self._source.tensors(missing))
        blocks = {name: block(self._tensors[name], tensor.shape) for name, tensor in wanted.items()}
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "judged.onnx"
            path.write_bytes(lower.embedded(job.graphs(geometry)["ort"], blocks, job.steps))
            opened = model(job.name, path, 1, geometry, job.input, job.precision.name)
            right = 0
            with self._runner.open(opened, Options()) as session:
                for start in range(0, len(self.labelled.labels), _CHUNK):
                    pixels = self.labelled.pixels[start : start + _CHUNK]
                    images = prepared(pixels, job.input, self.weights.spec.preprocessing)
                    predicted = run_all(session, opened, images).argmax(1)
                    right += int((predicted == self.labelled.labels[start : start + _CHUNK]).sum())
        return right / len(self.labelled.labels)


def _within(judge: _Judge, jobs: Sequence[Job], images: NDArray[np.uint8], limit: float) -> list[Job]:
    """The jobs with the fewest layers kept in float that stay within the limit, the same for all of them.

    Layers are kept by how much they hurt the subnet that loses most, one, two, four and so on, then between the last
    two; never more than half, which would be no int8.
    """
    judged = judge.drops(jobs, limit)
    if _worst(judged) <= limit:
        return judged
    geometry = judge.weights.spec.geometry
    worst = max(judged, key=_drop)
    shown = np.asarray(prepared(images[:_RANKED], "float32", judge.weights.spec.preprocessing), np.float32)
    calibration = _quantisation(worst).calibration
    order = ranking(
        judge.weights,
        geometry.subnet(worst.heads),
        shown,
        None if calibration is None else calibration.scales,
        judge.report,
    )
    best, failing, most = judged, 0, len(layers(geometry)) // 2
    count = 1
    while True:
        judged = judge.drops([_keeping(job, order[:count]) for job in jobs], limit)
        best = min(best, judged, key=_worst)
        if _worst(judged) <= limit:
            return _fewest(judge, jobs, order, failing, count, judged, limit)
        if count == most:
            break
        failing, count = count, min(2 * count, most)
    lost = max(best, key=_drop)
    kept = _quantisation(lost).kept
    raise ParityError(
        f"no setting of {jobs[0].precision.name} stays within {show_points(limit)} of fp32: the best keeps "
        f"{len(kept)} of {len(layers(geometry))} layers in float and costs {lost.name} {show_points(_drop(lost))} "
        f"on {len(judge.labelled.labels)} images",
        hint=f"nothing was written; allow --max-drop {_allowing(_drop(lost))}, or export fp16",
    )


def _fewest(
    judge: _Judge,
    jobs: Sequence[Job],
    order: Sequence[str],
    failing: int,
    passing: int,
    judged: list[Job],
    limit: float,
) -> list[Job]:
    while passing - failing > 1:
        middle = (failing + passing) // 2
        tried = judge.drops([_keeping(job, order[:middle]) for job in jobs], limit)
        if _worst(tried) <= limit:
            passing, judged = middle, tried
        else:
            failing = middle
    return judged


def _keeping(job: Job, kept: Sequence[str]) -> Job:
    return job.with_quantisation(msgspec.structs.replace(_quantisation(job), kept=tuple(sorted(kept)), drop=None))


def _quantisation(job: Job) -> Quantisation:
    if job.quantisation is None:
        raise ValueError(f"{job.name} has nothing in int8")
    return job.quantisation


def _drop(job: Job) -> float:
    found = _quantisation(job).drop
    # By whole images: 1 - 0.95 is more than 0.05 in binary.
    return 0.0 if found is None else round((found.fp32_top1 - found.top1) * found.n) / found.n


def _allowing(drop: float) -> str:
    """The smallest limit of two decimals that a drop is within."""
    return show_points(math.ceil(round(drop * 1e4, 6)) / 1e4)


def _worst(jobs: Sequence[Job]) -> float:
    return max(map(_drop, jobs))
