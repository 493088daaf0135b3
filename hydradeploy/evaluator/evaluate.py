"""`evaluate`: how often each artifact is right, by the runtime that will run it.

Each image is read and prepared once and shown to every artifact. What each said of each image is kept, so that two
artifacts can be compared on the same images.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Backend, Options, backend, model_of, run_all
from hydradeploy.bundle import AccuracyRow, Artifact, Bundle, Outcomes, open_bundle, write_accuracy
from hydradeploy.data.datasets import Dataset, open_dataset, spread
from hydradeploy.data.preprocess import normalise
from hydradeploy.devices.cpu import instruction_set
from hydradeploy.errors import InputError, UsageError
from hydradeploy.stats.logits import softmax
from hydradeploy.stats.proportions import wilson

_CHUNK = 32

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The rows this call measured or took over, one per artifact."""

    bundle: Path
    rows: tuple[AccuracyRow, ...]


def evaluate(
    bundle: Path,
    data: str,
    *,
    limit: int | None = None,
    backend_name: str | None = None,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Measure top-1 of every artifact on the test split of a data set and keep it in the bundle.

    `limit` takes that many images, spread evenly over the set. Rows of the same artifact, backend, instruction set and
    data set are replaced, all others stay. Raises UsageError (no bundle, no such data set), InputError (an image or a
    label refused, another number of classes), IntegrityError (damaged bundle), MissingError (no backend).
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} is not possible", hint="--limit takes 1 or more images")
    runner = backend(backend_name)
    opened = open_bundle(bundle)
    dataset = open_dataset(data, "test")
    chosen = np.arange(len(dataset)) if limit is None else spread(len(dataset), limit)
    labels = dataset.labels_for(opened.spec)[chosen]
    outcomes, digest = _outcomes(opened, runner, dataset, chosen, labels, report)
    rows = {_measured(opened.artifact(name), runner, dataset, digest, found): found for name, found in outcomes.items()}
    write_accuracy(opened, rows)
    return Evaluation(bundle, tuple(rows))


def declare(bundle: Path, table: Path) -> Evaluation:
    """Enter accuracy measured elsewhere from a CSV file with the columns artifact, dataset, top1 (0 to 1) and n.

    Such rows are marked declared and are shown as that. Raises UsageError (no such file), InputError (a column missing,
    no such artifact, a value that is none, naming the line).
    """
    opened = open_bundle(bundle, "manifest")
    rows = tuple(_declared(opened, table))
    if not rows:
        raise InputError(f"{table}: holds no rows below its header")
    write_accuracy(opened, dict.fromkeys(rows))
    return Evaluation(bundle, rows)


def _outcomes(
    bundle: Bundle,
    runner: Backend,
    dataset: Dataset,
    chosen: NDArray[np.int64],
    labels: NDArray[np.int64],
    report: Report,
) -> tuple[Mapping[str, Outcomes], str]:
    """What every artifact says of every chosen image, and the hash of those images and labels as they were shown."""
    artifacts = bundle.manifest.artifacts
    parts: dict[str, list[Outcomes]] = {artifact.name: [] for artifact in artifacts}
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    with ExitStack() as stack:
        models = [model_of(bundle, artifact, runner.dialect) for artifact in artifacts]
        sessions = [stack.enter_context(runner.open(model, Options())) for model in models]
        for start in range(0, len(chosen), _CHUNK):
            report(f"evaluating on {dataset.name}", start, len(chosen))
            indices = chosen[start : start + _CHUNK]
            pixels = np.stack([dataset.pixels(int(i), bundle.spec) for i in indices])
            digest.update(pixels.tobytes())
            images = normalise(pixels, bundle.spec.preprocessing)
            for model, session in zip(models, sessions, strict=True):
                logits = run_all(session, model, images)
                parts[model.name].append(_judge(logits, labels[start : start + _CHUNK]))
    report(f"evaluating on {dataset.name}", len(chosen), len(chosen))
    return {name: _joined(found) for name, found in parts.items()}, digest.hexdigest()


def _judge(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Outcomes:
    prediction = logits.argmax(1)
    probability = softmax(logits).max(1)
    return Outcomes(prediction.astype(np.int32), probability.astype(np.float32), prediction == labels)


def _joined(parts: list[Outcomes]) -> Outcomes:
    return Outcomes(
        np.concatenate([part.prediction for part in parts]),
        np.concatenate([part.probability for part in parts]),
        np.concatenate([part.right for part in parts]),
    )


def _measured(artifact: Artifact, runner: Backend, dataset: Dataset, digest: str, found: Outcomes) -> AccuracyRow:
    correct, n = int(found.right.sum()), len(found.right)
    lower, upper = wilson(correct, n)
    where = instruction_set()
    return AccuracyRow(
        artifact=artifact.name,
        sha256=artifact.sha256,
        backend=runner.name,
        compute_type=artifact.precision,
        instruction_set=where,
        dataset=dataset.name,
        data_sha256=digest,
        correct=correct,
        n=n,
        top1=correct / n,
        lower=lower,
        upper=upper,
        source="measured",
        right=np.packbits(found.right).tobytes(),
        outcomes="/".join((artifact.sha256[:16], runner.name, artifact.precision, where, dataset.name)),
    )


def _declared(bundle: Bundle, table: Path) -> Iterator[AccuracyRow]:
    artifacts = {artifact.name: artifact for artifact in bundle.manifest.artifacts}
    for place, row in _lines(table):
        if row["artifact"] not in artifacts:
            raise InputError(
                f"{place}: no artifact {row['artifact']!r} in {bundle.path}", hint=f"it has {', '.join(artifacts)}"
            )
        try:
            top1, n = float(row["top1"]), int(row["n"])
            lower, upper = wilson(round(top1 * n), n)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{place}: top1 must be 0 to 1 and n a count, found {row['top1']!r}, {row['n']!r}"
            ) from error
        yield AccuracyRow(
            artifact=row["artifact"],
            sha256=artifacts[row["artifact"]].sha256,
            backend=None,
            compute_type=None,
            instruction_set=None,
            dataset=row["dataset"],
            data_sha256=None,
            correct=round(top1 * n),
            n=n,
            top1=top1,
            lower=lower,
            upper=upper,
            source="declared",
            right=None,
            outcomes=None,
        )


def _lines(table: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    wanted = ("artifact", "dataset", "top1", "n")
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{table}: no column {', '.join(missing)}", hint=f"the header is {','.join(wanted)}")
            for row in reader:
                place = f"{table}, line {reader.line_num}"
                if any(not row[name] for name in wanted):
                    raise InputError(f"{place}: {', '.join(name for name in wanted if not row[name])} is empty")
                yield place, row
    except FileNotFoundError as error:
        raise UsageError(f"{table}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({error})") from error
