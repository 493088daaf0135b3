"""`run`: classify image files with an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import (
    PRECISION_NAMES,
    Backend,
    Options,
    backend,
    check_options,
    model_of,
    prepared,
    run_all,
)
from hydradeploy.backends.ways import why_not
from hydradeploy.bundle import Artifact, Bundle, Check, open_bundle
from hydradeploy.data.preprocess import load_image
from hydradeploy.errors import InputError, MissingError, UsageError
from hydradeploy.processes import check_threads
from hydradeploy.spec import Record
from hydradeploy.stats.logits import softmax


class Guess(Record, frozen=True, kw_only=True):
    """A class with its probability; `name` is None where the bundle has no class names."""

    index: int
    name: str | None
    probability: float


class Prediction(Record, frozen=True, kw_only=True):
    """The likeliest classes of one image, or why there are none."""

    image: str
    top: tuple[Guess, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """Which artifact answers, on what, computed in which type, and the answers as they come."""

    artifact: Artifact
    backend: str
    compute_type: str
    predictions: Iterator[Prediction]


def run(
    bundle: Path,
    images: Sequence[Path],
    *,
    artifact: str | None = None,
    backend_name: str | None = None,
    top: int = 5,
    threads: int | None = None,
    compute_type: str | None = None,
    settings: Mapping[str, str] | None = None,
    check: Check = "stamp",
) -> Run:
    """Classify image files; the artifact of most heads where none is named.

    `compute_type` and `settings` are the backend's defaults where they are not given. An image that cannot be read
    or that the artifact has no finite logits for becomes a Prediction with its error, and the others are still
    answered. Raises UsageError (no bundle, no such artifact or setting), IntegrityError (damaged bundle), MissingError
    (no backend, or it does not run the artifact in that compute type).
    """
    if top < 1:
        raise UsageError(f"top {top} must be at least 1")
    if threads is not None:
        check_threads(threads)
    if not images:
        raise UsageError("no image given", hint="hydradeploy run IMAGE...")
    runner = backend(backend_name)
    opened = open_bundle(bundle, check)
    chosen = largest(opened, runner) if artifact is None else opened.artifact(artifact)
    options = Options(threads, compute_type, dict(settings or {}))
    check_options(runner, options, chosen.precision)
    model = model_of(opened, chosen, runner.dialect)
    size = 1 if model.batch == "dynamic" else model.batch

    def predictions() -> Iterator[Prediction]:
        with runner.open(model, options) as session:
            for start in range(0, len(images), size):
                loaded = [(path, _load(path, opened)) for path in images[start : start + size]]
                pixels = [image for _, image in loaded if isinstance(image, np.ndarray)]
                shown = prepared(np.stack(pixels), model.input, opened.spec.preprocessing) if pixels else None
                logits = iter(run_all(session, model, shown) if shown is not None else ())
                for path, image in loaded:
                    if isinstance(image, str):
                        yield Prediction(image=str(path), error=image)
                    else:
                        yield _prediction(path, next(logits), chosen.name, top, opened.spec.class_names)

    computed_in = compute_type or runner.compute_types(chosen.precision)[0]
    return Run(chosen, runner.name, computed_in, predictions())


def largest(bundle: Bundle, runner: Backend) -> Artifact:
    """The artifact of most heads that the backend runs, the widest type among equals; raises MissingError for none."""
    reasons = {artifact.name: why_not(bundle, artifact, runner) for artifact in bundle.manifest.artifacts}
    runs = [artifact for artifact in bundle.manifest.artifacts if reasons[artifact.name] is None]
    if not runs:
        raise MissingError("; ".join(dict.fromkeys(filter(None, reasons.values()))) or "no artifact to run")
    return max(runs, key=lambda artifact: (artifact.heads, -PRECISION_NAMES.index(artifact.precision)))


def _load(path: Path, bundle: Bundle) -> NDArray[np.uint8] | str:
    try:
        return load_image(path, bundle.spec)
    except InputError as error:
        return error.message


def _prediction(
    path: Path, logits: NDArray[np.float32], artifact: str, top: int, names: tuple[str, ...] | None
) -> Prediction:
    if not np.isfinite(logits).all():
        return Prediction(image=str(path), error=f"{path}: {artifact} gives NaN or infinite logits for it")
    return Prediction(image=str(path), top=_top(logits, top, names))


def _top(logits: NDArray[np.float32], count: int, names: tuple[str, ...] | None) -> tuple[Guess, ...]:
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")[:count]
    return tuple(
        Guess(index=int(i), name=names[i] if names is not None else None, probability=float(probabilities[i]))
        for i in order
    )
