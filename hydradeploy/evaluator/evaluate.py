"""`evaluate`: how often each artifact is right, by the runtime that will run it.

Each image is read and prepared once for all head counts of a precision on a backend. What each said of each image is
kept, so that two artifacts can be compared on the same images.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Options, Session, model_of, prepared, run_all
from hydradeploy.backends.ways import Way, named, ways
from hydradeploy.bundle import (
    AccuracyRow,
    Bundle,
    Outcomes,
    check_writable,
    open_bundle,
    read_accuracy,
    write_accuracy,
)
from hydradeploy.data.datasets import Dataset, open_dataset, spread
from hydradeploy.devices.cpu import instruction_set
from hydradeploy.errors import InputError, MissingError, UsageError
from hydradeploy.spec import Spec
from hydradeploy.stats.logits import softmax
from hydradeploy.stats.proportions import wilson

_CHUNK = 32

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The rows this call measured or took over, one per artifact and way to run it, and why others are not there."""

    bundle: Path
    rows: tuple[AccuracyRow, ...]
    left_out: tuple[str, ...] = ()


def evaluate(
    bundle: Path,
    data: str,
    *,
    limit: int | None = None,
    backends: Sequence[str] | None = None,
    compute_types: Sequence[str] | None = None,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure top-1 of every artifact on the test split of a data set and keep it in the bundle.

    `limit` takes that many images, spread evenly over the set. `backends` None is the first usable one, `all` among
    them every usable one; `compute_types` None is the default of each artifact. What a backend does not run, or fails
    to, is left out and the others go on. Rows of the same artifact, backend, compute type, instruction set and data set
    are replaced, all others stay; where those were of other images `say` is told, of another number before the work.

    Raises UsageError (no bundle, no such data set), InputError (an image or a label refused, another number of
    classes), IntegrityError (damaged bundle), MissingError (no backend, none that runs any artifact or computes in what
    was asked for).
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} is not possible", hint="--limit takes 1 or more images")
    runners = named(backends)
    opened = open_bundle(bundle)
    wanted = ways(opened, opened.manifest.artifacts, runners, compute_types=compute_types)
    dataset = open_dataset(data, "test")
    chosen = np.arange(len(dataset)) if limit is None else spread(len(dataset), limit)
    shown = _Shown(opened, dataset, chosen, dataset.labels_for(opened.spec)[chosen])
    lost = _to_be_replaced(opened, wanted.found, dataset.name, len(chosen))
    for line in (*wanted.left_out, *_by_position(dataset, opened.spec), *lost):
        say(line)
    check_writable(opened)  # what cannot be kept is not worth hours
    rows: dict[AccuracyRow, Outcomes] = {}
    failed: list[str] = []
    for alike in _groups(wanted.found):
        way = alike[0]
        name = f"evaluating {way.artifact.precision} on {dataset.name} with {way.runner.name} in {way.compute_type}"
        outcomes, digest = _outcomes(shown, alike, partial(report, name), failed)
        fresh = {_measured(way, dataset, digest, found): found for way, found in outcomes}
        if fresh:  # kept at once, whatever becomes of the others
            for line in _replaced(opened, fresh):
                say(line)
            write_accuracy(opened, fresh)
        rows |= fresh
    for line in failed:
        say(line)
    if not rows:
        raise MissingError(f"no artifact could be evaluated: {'; '.join(failed)}")
    return Evaluation(bundle, tuple(rows), (*wanted.left_out, *failed))


def _by_position(dataset: Dataset, spec: Spec) -> Iterator[str]:
    """A line where only some classes have the same name on both sides: one is misspelt, or they are other classes."""
    names, others = set(spec.class_names or ()), set(dataset.class_names)
    if names != others and names & others:
        alone = ", ".join(repr(name) for name in sorted(others - names)[:3])
        yield f"labels of {dataset.name} are taken by position: the supernet has no class called {alone}"


def _to_be_replaced(bundle: Bundle, found: Sequence[Way], dataset: str, n: int) -> Iterator[str]:
    """A line where an evaluation on another number of images goes."""
    lost: dict[int, dict[str, None]] = {}
    here = instruction_set()
    rows = {row.measurement: row for row in read_accuracy(bundle) if row.n != n}
    for way in found:
        row = rows.get((way.artifact.sha256, way.runner.name, way.compute_type, here, dataset, "measured"))
        if row is not None:
            lost.setdefault(row.n, {})[way.artifact.name] = None
    for before, names in lost.items():
        yield f"{', '.join(names)}: {n} images of {dataset} are going to replace an evaluation on {before}"


def _replaced(bundle: Bundle, fresh: Iterable[AccuracyRow]) -> Iterator[str]:
    """A line where as many other images, of another data set of that name, are what is known from now on."""
    pairs = [(row, other) for other in read_accuracy(bundle) for row in fresh if row.replaces(other)]
    names = [row.artifact for row, other in pairs if row.n == other.n and row.data_sha256 != other.data_sha256]
    if names:
        row = pairs[0][0]
        yield f"{', '.join(names)}: these {row.n} images of {row.dataset} replace an evaluation on as many others"


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


@dataclass(frozen=True)
class _Shown:
    """The images of a data set that artifacts are shown."""

    bundle: Bundle
    dataset: Dataset
    chosen: NDArray[np.int64]
    labels: NDArray[np.int64]


def _groups(found: Sequence[Way]) -> Iterator[list[Way]]:
    """Those whose sessions are open at once: all head counts of a precision on one backend, but no more."""
    groups: dict[tuple[str, str, str], list[Way]] = {}
    for way in found:
        groups.setdefault((way.runner.name, way.compute_type, way.artifact.precision), []).append(way)
    yield from groups.values()


def _outcomes(
    shown: _Shown, alike: Sequence[Way], report: Callable[[int, int], None], failed: list[str]
) -> tuple[list[tuple[Way, Outcomes]], str]:
    """What each artifact says of every chosen image, and the hash of those images and labels as they were shown.

    What fails on the way is left out and named in `failed`.
    """
    spec, chosen = shown.bundle.spec, shown.chosen
    digest = hashlib.sha256(shown.labels.astype("<i8").tobytes())
    with ExitStack() as stack:
        asked = [_Asked(shown.bundle, shown.dataset, way, stack) for way in alike]
        for start in range(0, len(chosen), _CHUNK):
            if all(one.error is not None for one in asked):
                break
            report(start, len(chosen))
            indices = chosen[start : start + _CHUNK]
            pixels = np.stack([shown.dataset.pixels(int(i), spec) for i in indices])
            digest.update(pixels.tobytes())
            images = {
                kind: prepared(pixels, kind, spec.preprocessing) for kind in {way.artifact.input for way in alike}
            }
            for one in asked:
                one.show(images[one.way.artifact.input], shown.labels[start : start + _CHUNK], indices)
    report(len(chosen), len(chosen))
    failed += [f"left out: {one.way.artifact.name}: {one.error}" for one in asked if one.error is not None]
    return [(one.way, _joined(one.said)) for one in asked if one.error is None], digest.hexdigest()


def _beside_others(way: Way) -> Options:
    """All head counts are open at once: threads of one that spin for its next image take the cores from the others."""
    settings = {"spinning": "off"} if "spinning" in way.runner.settings else {}
    return Options(compute_type=way.compute_type, settings=settings)


class _Asked:
    """An artifact that is shown images until it fails."""

    def __init__(self, bundle: Bundle, dataset: Dataset, way: Way, stack: ExitStack) -> None:
        self.way = way
        self.said: list[Outcomes] = []
        self.error: str | None = None
        self._dataset = dataset
        self._model = model_of(bundle, way.artifact, way.runner.dialect)
        self._session: Session | None = None
        with self._failing():
            self._session = stack.enter_context(way.runner.open(self._model, _beside_others(way)))

    def show(self, images: Images, labels: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        if self._session is not None and self.error is None:
            with self._failing():
                logits = run_all(self._session, self._model, images)
                broken = ~np.isfinite(logits).all(1)
                if broken.any():
                    where, way = self._dataset.where(int(indices[broken.argmax()])), self.way
                    raise MissingError(
                        f"{way.runner.name} gives NaN or infinite logits in {way.compute_type} for {where}"
                    )
                self.said.append(_judge(logits, labels))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except MissingError as error:
            self.error = error.message


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


def _measured(way: Way, dataset: Dataset, digest: str, found: Outcomes) -> AccuracyRow:
    artifact, runner = way.artifact, way.runner
    correct, n = int(found.right.sum()), len(found.right)
    lower, upper = wilson(correct, n)
    where = instruction_set()
    return AccuracyRow(
        artifact=artifact.name,
        sha256=artifact.sha256,
        backend=runner.name,
        compute_type=way.compute_type,
        instruction_set=where,
        input=artifact.input,
        dataset=dataset.name,
        data_sha256=digest,
        correct=correct,
        n=n,
        top1=correct / n,
        lower=lower,
        upper=upper,
        source="measured",
        right=np.packbits(found.right).tobytes(),
        outcomes="/".join((artifact.sha256[:16], runner.name, way.compute_type, where, dataset.name)),
    )


def _declared(bundle: Bundle, table: Path) -> Iterator[AccuracyRow]:
    artifacts = {artifact.name: artifact for artifact in bundle.manifest.artifacts}
    lines: dict[tuple[str, str], str] = {}
    for place, row in _lines(table):
        if row["artifact"] not in artifacts:
            raise InputError(
                f"{place}: no artifact {row['artifact']!r} in {bundle.path}", hint=f"it has {', '.join(artifacts)}"
            )
        if (earlier := lines.setdefault((row["artifact"], row["dataset"]), place)) != place:
            raise InputError(
                f"{place}: {row['artifact']} on {row['dataset']} is there twice", hint=f"the other is {earlier}"
            )
        try:
            top1, n = float(row["top1"]), int(row["n"])
            if not 0 <= top1 <= 1:
                raise ValueError(top1)
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
            input=None,
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
        # Spreadsheets put a byte order mark in front, people spaces around a comma.
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in wanted if name not in reader.fieldnames]
            if missing:
                raise InputError(f"{table}: no column {', '.join(missing)}", hint=f"the header is {','.join(wanted)}")
            for row in reader:
                place = f"{table}, line {reader.line_num}"
                found = {name: (row[name] or "").strip() for name in wanted}
                if not all(found.values()):
                    raise InputError(f"{place}: {', '.join(name for name in wanted if not found[name])} is empty")
                yield place, found
    except FileNotFoundError as error:
        raise UsageError(f"{table}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({error})") from error
