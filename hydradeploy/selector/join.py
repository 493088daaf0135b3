"""What belongs together: cells with the artifact they measured, artifacts with accuracy, a device with its file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hydradeploy.bundle import AccuracyRow, Artifact
from hydradeploy.devices import Machine, machine
from hydradeploy.errors import ForeignError, MissingError, UsageError
from hydradeploy.measurements import Cell, Conditions, Device, Profile, Stored, read_profiles
from hydradeploy.selector.judge import Candidate
from hydradeploy.selector.regime import SATURATED, how_to_measure


class Here:
    """This machine as every kind of device that a profile is of: a GPU's driver is asked only where one needs it."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Machine, Device] | str] = {}

    def differences(self, device: Device) -> tuple[str, ...]:
        """What tells a device from this machine, as `field: that, this`; empty where it is one of its make."""
        found = self._as(device.kind)
        return (found,) if isinstance(found, str) else device.differences(found[1])

    def conditions(self, device: Device) -> Conditions | None:
        """The present ones, without software; None where this machine is no such device."""
        found = self._as(device.kind)
        if isinstance(found, str) or device.differences(found[1]):
            return None
        return found[0].conditions({})

    def _as(self, kind: str) -> tuple[Machine, Device] | str:
        """This machine as a kind of device, or why it is none."""
        if kind not in self._found:
            try:
                one = machine(kind)
                self._found[kind] = (one, one.identity())
            except (MissingError, UsageError) as error:
                self._found[kind] = error.message
        return self._found[kind]


def candidates(
    artifacts: Sequence[Artifact], rows: Sequence[AccuracyRow], profile: Profile, regime: str = SATURATED
) -> tuple[Candidate, ...]:
    """Each cell of the profile that measured a graph of one of the artifacts in a regime, with its accuracy.

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
        if cell.regime == regime and (artifact := by_graph.get(cell.graph_sha256)) is not None
    )


def rows_of(rows: Sequence[AccuracyRow], artifacts: Sequence[Artifact], dataset: str | None) -> list[AccuracyRow]:
    """The rows of one data set: the named one, else the one evaluated last. Accuracies of two are not comparable.

    Nor are those on other images of one: where it was evaluated on several, the measured rows are those on the images
    of most artifacts, of equally many the last. Raises UsageError where no row of these artifacts is of the named one.
    """
    content = {artifact.sha256 for artifact in artifacts}
    own = [row for row in rows if row.sha256 in content]
    if dataset is None:
        return _on_the_same_images([row for row in own if row.dataset == own[-1].dataset])
    chosen = [row for row in own if row.dataset == dataset]
    if not chosen:
        names = ", ".join(dict.fromkeys(row.dataset for row in own)) or "no data set"
        raise UsageError(f"no accuracy on {dataset!r}", hint=f"evaluated on {names}")
    return _on_the_same_images(chosen)


def _on_the_same_images(rows: Sequence[AccuracyRow]) -> list[AccuracyRow]:
    """Rows of one data set, of the measured ones those on the same images."""
    shown: dict[str | None, set[str]] = {}
    for row in reversed(rows):
        if row.source == "measured":
            shown.setdefault(row.data_sha256, set()).add(row.sha256)
    # Of equals the first, which is the last that was evaluated.
    images = max(shown, key=lambda data: len(shown[data]), default=None)
    return [row for row in rows if row.source == "declared" or row.data_sha256 == images]


def profile_of(
    profiles: Path, here: Here, artifacts: Sequence[Artifact], regime: str
) -> tuple[Stored, tuple[Stored, ...]]:
    """The newest profile of this device that measured graphs of these artifacts in that regime, and its others; where
    none did the newest that measured them otherwise, else the newest.

    Raises ForeignError that names what was found instead of this device.
    """
    found = read_profiles(profiles)
    if not found:
        raise ForeignError(f"{profiles}: no profile here", hint="measure this device: hydradeploy profile")
    own = [stored for stored in found if not here.differences(stored.profile.device)]
    if own:
        regimes = [regimes_of(stored.profile, artifacts) for stored in own]
        # Of equals the first, which is the newest.
        place = max(range(len(own)), key=lambda i: (regime in regimes[i], bool(regimes[i])))
        return own[place], (*own[:place], *own[place + 1 :])
    others = "; ".join(f"{s.path.name} ({', '.join(here.differences(s.profile.device))})" for s in found[:5])
    raise ForeignError(
        f"{profiles}: no profile of this device; found, with what differs (there, here): {others}",
        hint="measure this device: hydradeploy profile; or plan for another one with pick --profile FILE",
    )


def check_measured(stored: Stored, artifacts: Sequence[Artifact], regime: str, bundle: Path) -> None:
    """Raise ForeignError where a profile measured none of the bundle's graphs, or none in that regime."""
    regimes = regimes_of(stored.profile, artifacts)
    if regime not in regimes:
        if regimes:
            raise ForeignError(
                f"{stored.path}: these graphs were not measured {regime}, only {', '.join(regimes)}",
                hint=f"pick --regime {regimes[0]}; or {how_to_measure(regime)}",
            )
        measured = ", ".join(dict.fromkeys(cell.artifact for cell in stored.profile.cells)) or "nothing"
        names = ", ".join(artifact.name for artifact in artifacts)
        raise ForeignError(
            f"{stored.path}: measured other graphs ({measured}) than those of {bundle} ({names})",
            hint="measure this bundle: hydradeploy profile",
        )


def regimes_of(profile: Profile, artifacts: Iterable[Artifact]) -> list[str]:
    """The regimes in which a profile measured graphs of these artifacts."""
    graphs = {artifact.graph_sha256 for artifact in artifacts}
    return sorted({cell.regime for cell in profile.cells if cell.graph_sha256 in graphs})


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
