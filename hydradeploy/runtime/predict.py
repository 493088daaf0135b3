"""`run`: classify image files with an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Options, backend, model_of, run_all
from hydradeploy.bundle import Artifact, Bundle, Check, open_bundle
from hydradeploy.data.preprocess import load_image, normalise
from hydradeploy.errors import InputError, UsageError
from hydradeploy.spec import Record
from hydradeploy.stats.logits import softmax


class Guess(Record, frozen=True, kw_only=True):
    """A class with its probability; `name` is None where the bundle has no class names."""

    index: int
    name: str | None
    probability: float


class Prediction(Record, frozen=True, kw_only=True):
    """The likeliest classes of one image, or why it could not be read."""

    image: str
    top: tuple[Guess, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """Which artifact answers, on what, and the answers as they come."""

    artifact: Artifact
    backend: str
    predictions: Iterator[Prediction]


def run(
    bundle: Path,
    images: Sequence[Path],
    *,
    artifact: str | None = None,
    backend_name: str | None = None,
    top: int = 5,
    threads: int | None = None,
    check: Check = "stamp",
) -> Run:
    """Classify image files; the artifact of most heads where none is named.

    An image that cannot be read becomes a Prediction with its error, and the others are still answered. Raises
    UsageError (no bundle, no such artifact), IntegrityError (damaged bundle), MissingError (no backend).
    """
    if top < 1 or (threads is not None and threads < 1):
        raise UsageError(f"top {top} and threads {threads} must be at least 1")
    if not images:
        raise UsageError("no image given", hint="hydradeploy run IMAGE...")
    runner = backend(backend_name)
    opened = open_bundle(bundle, check)
    chosen = largest(opened) if artifact is None else opened.artifact(artifact)
    model = model_of(opened, chosen, runner.dialect)
    size = 1 if model.batch == "dynamic" else model.batch

    def predictions() -> Iterator[Prediction]:
        with runner.open(model, Options(threads)) as session:
            for start in range(0, len(images), size):
                loaded = [(path, _load(path, opened)) for path in images[start : start + size]]
                pixels = [image for _, image in loaded if isinstance(image, np.ndarray)]
                scaled = normalise(np.stack(pixels), opened.spec.preprocessing) if pixels else None
                logits = iter(run_all(session, model, scaled) if scaled is not None else ())
                for path, image in loaded:
                    if isinstance(image, str):
                        yield Prediction(image=str(path), error=image)
                    else:
                        yield Prediction(image=str(path), top=_top(next(logits), top, opened.spec.class_names))

    return Run(chosen, runner.name, predictions())


def largest(bundle: Bundle) -> Artifact:
    """The artifact of most heads, the widest type among equals."""
    return max(bundle.manifest.artifacts, key=lambda artifact: (artifact.heads, artifact.size_bytes))


def _load(path: Path, bundle: Bundle) -> NDArray[np.uint8] | str:
    try:
        return load_image(path, bundle.spec)
    except InputError as error:
        return error.message


def _top(logits: NDArray[np.float32], count: int, names: tuple[str, ...] | None) -> tuple[Guess, ...]:
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")[:count]
    return tuple(
        Guess(index=int(i), name=names[i] if names is not None else None, probability=float(probabilities[i]))
        for i in order
    )
