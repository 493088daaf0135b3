"""What `pick` answers, as it is printed by `--json`."""

from __future__ import annotations

from typing import Literal

from hydradeploy.bundle import AccuracyRow
from hydradeploy.selector.budget import Budget
from hydradeploy.selector.choose import Verdict
from hydradeploy.selector.judge import Candidate, Check
from hydradeploy.spec import Record
from hydradeploy.stats.order import samples_needed


class Latency(Record, frozen=True, kw_only=True):
    """Observed percentiles in seconds, null where the samples cannot carry one, and the bound that was decided by.

    `upper` is the upper bound of `percentile` with `confidence`; `n_effective` what the n samples are worth were they
    independent, `spread` how much the levels of processes differ, as a fraction; `assumes` what the bound takes for
    granted of the distribution, null where that is nothing.
    """

    p50: float | None
    p95: float | None
    p99: float | None
    upper: float | None
    percentile: float
    confidence: float
    n: int
    n_effective: float
    processes: int
    spread: float | None
    assumes: str | None


class Accuracy(Record, frozen=True, kw_only=True):
    """Top-1 with its 95 % interval, and whether it was measured or declared.

    `backend`, `compute_type` and `instruction_set` are those it was measured with, null where it was declared.
    """

    top1: float
    lower: float
    upper: float
    n: int
    dataset: str
    source: Literal["measured", "declared"]
    backend: str | None
    compute_type: str | None
    instruction_set: str | None


class Picked(Record, frozen=True, kw_only=True):
    """One cell with its evidence.

    `settings` are those of the backend that are not its defaults, `input` is the type of images that the artifact
    takes, `file` the graph to load, relative to the bundle, null where there is none; `regime` is how calls arrived
    when it was measured, `flags` what was wrong then.
    """

    artifact: str
    heads: int
    precision: str
    backend: str
    compute_type: str
    settings: dict[str, str]
    input: str
    batch: int
    threads: int
    regime: str
    file: str | None
    sha256: str
    latency_s: Latency
    accuracy: Accuracy | None
    memory_bytes: int | None
    size_bytes: int
    energy_j: float | None
    flags: tuple[str, ...]


class Rejected(Record, frozen=True, kw_only=True):
    """A cell that was not picked although it came first in the order of preference or missed a limit, and why."""

    artifact: str
    backend: str
    compute_type: str
    settings: dict[str, str]
    threads: int
    batch: int
    status: Literal["missed", "open"]
    reason: str


class Answer(Record, frozen=True, kw_only=True):
    """The answer for one profile. `pick` is None unless the verdict is `pass`.

    `nearest` is the cell that comes closest where nothing was picked, with why in `rejected`; `more_samples` what it
    would take to tell of an inconclusive one; `knobs` what measured change would give a pick; `notes` what a reader
    must know to trust the answer.
    """

    verdict: Verdict
    device_here: bool
    profile: str
    device: str
    pick: Picked | None
    budget: Budget
    prefer: str
    runner_up: Picked | None
    cheaper: Picked | None
    nearest: Picked | None
    more_samples: int | None
    knobs: tuple[str, ...]
    notes: tuple[str, ...]
    rejected: tuple[Rejected, ...]


def picked(candidate: Candidate, budget: Budget, level: float) -> Picked:
    """A candidate with its evidence; `level` is the percentile it was decided by."""
    cell, artifact = candidate.cell, candidate.artifact
    return Picked(
        artifact=artifact.name,
        heads=artifact.heads,
        precision=artifact.precision,
        backend=cell.backend,
        compute_type=cell.compute_type,
        settings=cell.settings,
        input=cell.input,
        batch=cell.batch,
        threads=cell.threads,
        regime=cell.regime,
        file=artifact.graphs.get("ort") or next(iter(artifact.graphs.values()), None),
        sha256=artifact.sha256,
        latency_s=_latency(candidate, level, budget.confidence),
        accuracy=accuracy(candidate.accuracy),
        memory_bytes=cell.memory_bytes,
        size_bytes=artifact.size_bytes,
        energy_j=cell.energy_j,
        flags=cell.flags,
    )


def rejected(candidate: Candidate, found: list[Check]) -> Rejected | None:
    """Why a candidate does not meet the budget, None where it does."""
    failing = [check for check in found if check.status == "missed"] or [c for c in found if c.status == "open"]
    if not failing:
        return None
    cell = candidate.cell
    return Rejected(
        artifact=candidate.artifact.name,
        backend=cell.backend,
        compute_type=cell.compute_type,
        settings=cell.settings,
        threads=cell.threads,
        batch=cell.batch,
        status="missed" if failing[0].status == "missed" else "open",
        reason="; ".join(check.text for check in failing),
    )


def accuracy(row: AccuracyRow | None) -> Accuracy | None:
    """The row's figures."""
    if row is None:
        return None
    return Accuracy(**{name: getattr(row, name) for name in Accuracy.__struct_fields__})


def _latency(candidate: Candidate, level: float, confidence: float) -> Latency:
    found = candidate.bounds(level, confidence)

    def carried(percentile: float) -> float | None:
        enough = found.n_effective >= samples_needed(percentile, confidence)
        return candidate.estimate_s(percentile) if enough else None

    return Latency(
        p50=carried(0.5),
        p95=carried(0.95),
        p99=carried(0.99),
        upper=found.upper,
        percentile=level,
        confidence=confidence,
        n=found.n,
        n_effective=round(found.n_effective, 1),
        processes=found.processes,
        spread=found.spread,
        assumes=found.assumes,
    )
