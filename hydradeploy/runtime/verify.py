"""`verify`: is the bundle what was written, and does it compute here what it computed there?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydradeploy.backends import model_of, prepared, run_all
from hydradeploy.backends.ways import ALL, Way, Ways, named, ways
from hydradeploy.bundle import MANIFEST, Bundle, Golden, open_bundle, read_outcomes
from hydradeploy.errors import IntegrityError, MissingError, ParityError
from hydradeploy.spec import Record
from hydradeploy.stats.logits import agreement


class Reproduced(Record, frozen=True, kw_only=True):
    """How an artifact's logits here compare with those it gave when it was exported (see Parity for the figures)."""

    artifact: str
    backend: str
    samples: int
    max_difference: float
    tolerance: float
    cosine: float
    least_cosine: float
    top1_agreement: float


class Verified(Record, frozen=True, kw_only=True):
    """What was checked. `outputs_skipped` says of which artifacts outputs were not and why, `failed` which of them a
    backend could not run though it runs their precision."""

    bundle: str
    files: int
    size_bytes: int
    outputs: tuple[Reproduced, ...]
    outputs_skipped: tuple[str, ...]
    failed: tuple[str, ...]


def verify(bundle: Path, *, backends: Sequence[str] | None = None) -> Verified:
    """Hash every file, then run the golden samples through every artifact on the backends, where one is usable.

    Accuracy is read too, with what it was made from. `backends` None is the first usable one, `all` among them every
    usable one. An artifact is to give the logits it gave when it was exported, within the tolerance of its precision
    and with its least cosine: integers round otherwise on another processor.

    Raises UsageError (no bundle), IntegrityError (a file missing, changed or damaged), ParityError (an artifact
    computes something else here), MissingError (a backend asked for by name is not usable).
    """
    opened = open_bundle(bundle, "always")
    read_outcomes(opened)  # which no manifest has a hash of
    records = opened.manifest.files.values()
    try:
        found = ways(opened, opened.manifest.artifacts, named(backends))
    except MissingError as error:
        if backends is not None and ALL not in backends:
            raise
        found = Ways((), (error.message,))
    golden = opened.golden() if found.found else None
    outputs: list[Reproduced] = []
    failed: list[str] = []
    for way in found.found:
        assert golden is not None
        try:
            outputs.append(_reproduced(opened, way, golden))
        except MissingError as error:
            failed.append(f"{way.artifact.name}: {error.message}")
    return Verified(
        bundle=str(bundle),
        files=len(records),
        size_bytes=sum(record.size_bytes for record in records),
        outputs=tuple(outputs),
        outputs_skipped=found.left_out,
        failed=tuple(failed),
    )


def _reproduced(bundle: Bundle, way: Way, golden: Golden) -> Reproduced:
    artifact, runner = way.artifact, way.runner
    if artifact.name not in golden.logits:
        raise IntegrityError(f"{bundle.path / MANIFEST}: no golden logits for artifact {artifact.name}")
    model = model_of(bundle, artifact, runner.dialect)
    with runner.open(model, way.options()) as session:
        logits = run_all(session, model, prepared(golden.images, model.input, bundle.spec.preprocessing))
    parity = artifact.parity
    found = agreement(golden.logits[artifact.name], logits, parity.tolerance)
    if not found.within or found.cosine < parity.least_cosine:
        raise ParityError(
            f"{artifact.name} gives other logits here than when it was exported: largest difference "
            f"{found.max_difference:.2e} of the largest |logit| ({found.tolerance:.2g} allowed), smallest cosine "
            f"{found.cosine:.4f} ({parity.least_cosine} asked), {found.overturned} of {found.samples} clear decisions "
            f"overturned",
            hint=f"the files are whole, so look at {runner.name} on this machine",
        )
    return Reproduced(
        artifact=artifact.name,
        backend=runner.name,
        samples=found.samples,
        max_difference=found.max_difference,
        tolerance=found.tolerance,
        cosine=found.cosine,
        least_cosine=parity.least_cosine,
        top1_agreement=found.top1_agreement,
    )
