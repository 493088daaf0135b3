"""What belongs together: cells with the artifact they measured, artifacts with accuracy, a device with its file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hydradeploy.bundle import AccuracyRow, Artifact
from hydradeploy.errors import ForeignError, UsageError
from hydradeploy.measurements import Cell, Device, Profile, Stored, read_profiles
from hydradeploy.selector.judge import Candidate


def candidates(artifacts: Sequence[Artifact], rows: Sequence[AccuracyRow], profile: Profile) -> tuple[Candidate, ...]:
    """Each cell of the profile that measured a graph of one of the artifacts, with that artifact's accuracy.

    Latency belongs to the graph, accuracy to the weights: rows of other weights are left out. Of several rows the one
    measured the way the cell was is taken, else the last measured, else a declared one.
    """
    by_graph = {artifact.graph_sha256: artifact for artifact in artifacts}
    by_artifact: dict[str, list[AccuracyRow]] = {}
    for row in rows:
        by_artifact.setdefault(row.sha256, []).append(row)
    chosen: dict[tuple[str, str, str], AccuracyRow | None] = {}

    def accuracy(artifact: Artifact, cell: Cell) -> AccuracyRow | None:
        key = (artifact.sha256, cell.backend, cell.compute_type)
        if key not in chosen:
            chosen[key] = _closest(by_artifact.get(artifact.sha256, ()), cell, profile.device)
        return chosen[key]

    return tuple(
        Candidate(cell, artifact, accuracy(artifact, cell))
        for cell in profile.cells
        if (artifact := by_graph.get(cell.graph_sha256)) is not None
    )


def rows_of(rows: Sequence[AccuracyRow], artifacts: Sequence[Artifact], dataset: str | None) -> list[AccuracyRow]:
    """The rows of one data set: the named one, else the one evaluated last. Accuracies of two are not comparable.

    Raises UsageError where no row of these artifacts is of the named one.
    """
    content = {artifact.sha256 for artifact in artifacts}
    own = [row for row in rows if row.sha256 in content]
    if dataset is None:
        return [row for row in own if row.dataset == own[-1].dataset]
    chosen = [row for row in own if row.dataset == dataset]
    if not chosen:
        names = ", ".join(dict.fromkeys(row.dataset for row in own)) or "no data set"
        raise UsageError(f"no accuracy on {dataset!r}", hint=f"evaluated on {names}")
    return chosen


def profile_of(profiles: Path, here: Device) -> tuple[Stored, tuple[Stored, ...]]:
    """The newest profile of this device, and its others; raises ForeignError that names what was found instead."""
    found = read_profiles(profiles)
    if not found:
        raise ForeignError(f"{profiles}: no profile here", hint="measure this device: hydradeploy profile")
    own = [stored for stored in found if not stored.profile.device.differences(here)]
    if own:
        return own[0], tuple(own[1:])
    others = "; ".join(f"{s.path.name} ({', '.join(s.profile.device.differences(here))})" for s in found[:5])
    raise ForeignError(
        f"{profiles}: no profile of this device; found, with what differs (there, here): {others}",
        hint="measure this device: hydradeploy profile; or plan for another one with --profile FILE",
    )


def check_measured(found: Sequence[Candidate], stored: Stored, artifacts: Iterable[Artifact], bundle: Path) -> None:
    """Raise ForeignError where a profile measured none of the bundle's graphs."""
    if not found:
        measured = ", ".join(dict.fromkeys(cell.artifact for cell in stored.profile.cells)) or "nothing"
        names = ", ".join(artifact.name for artifact in artifacts)
        raise ForeignError(
            f"{stored.path}: measured other graphs ({measured}) than those of {bundle} ({names})",
            hint="measure this bundle: hydradeploy profile",
        )


def _closest(rows: Sequence[AccuracyRow], cell: Cell, device: Device) -> AccuracyRow | None:
    def likeness(row: AccuracyRow) -> tuple[bool, ...]:
        return (
            row.source == "measured",
            row.backend == cell.backend,
            row.compute_type == cell.compute_type,
            row.instruction_set == device.instruction_set,
        )

    # Of equals the last, which is the newest.
    return max(reversed(rows), key=likeness, default=None)
