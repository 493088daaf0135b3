"""`verify`: is the bundle what was written, and does it compute here what it computed there?"""

from __future__ import annotations

from pathlib import Path

from hydradeploy.backends import BACKEND_MODULES, Backend, Options, backend, model_of, run_all
from hydradeploy.bundle import MANIFEST, Bundle, open_bundle
from hydradeploy.data.preprocess import normalise
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
    top1_agreement: float


class Verified(Record, frozen=True, kw_only=True):
    """What was checked. `outputs_skipped` says why outputs were not, None where they were."""

    bundle: str
    files: int
    size_bytes: int
    outputs: tuple[Reproduced, ...]
    outputs_skipped: str | None


def verify(bundle: Path, *, backend_name: str | None = None) -> Verified:
    """Hash every file, then run the golden samples through every artifact on a backend, where one is usable.

    Raises UsageError (no bundle), IntegrityError (a file missing or changed), ParityError (an artifact computes
    something else here), MissingError (the backend asked for by name is not usable).
    """
    opened = open_bundle(bundle, "always")
    records = opened.manifest.files.values()
    runner, reason = _runner(backend_name)
    return Verified(
        bundle=str(bundle),
        files=len(records),
        size_bytes=sum(record.size_bytes for record in records),
        outputs=() if runner is None else _reproduce(opened, runner),
        outputs_skipped=reason,
    )


def _runner(name: str | None) -> tuple[Backend | None, str | None]:
    try:
        return backend(name), None
    except MissingError as error:
        if name in BACKEND_MODULES:
            raise
        return None, error.message


def _reproduce(bundle: Bundle, runner: Backend) -> tuple[Reproduced, ...]:
    golden = bundle.golden()
    images = normalise(golden.images, bundle.spec.preprocessing)
    reproduced = []
    for artifact in bundle.manifest.artifacts:
        if artifact.name not in golden.logits:
            raise IntegrityError(f"{bundle.path / MANIFEST}: no golden logits for artifact {artifact.name}")
        model = model_of(bundle, artifact, runner.dialect)
        with runner.open(model, Options()) as session:
            logits = run_all(session, model, images)
        found = agreement(golden.logits[artifact.name], logits, artifact.parity.tolerance)
        if not found.within:
            raise ParityError(
                f"{artifact.name} gives other logits here than when it was exported: largest difference "
                f"{found.max_difference:.2e} of the largest |logit| ({found.tolerance:.0e} allowed), "
                f"{found.overturned} of {found.samples} clear decisions overturned",
                hint=f"the files are whole, so look at {runner.name} on this machine",
            )
        reproduced.append(
            Reproduced(
                artifact=artifact.name,
                backend=runner.name,
                samples=found.samples,
                max_difference=found.max_difference,
                tolerance=found.tolerance,
                top1_agreement=found.top1_agreement,
            )
        )
    return tuple(reproduced)
