"""A profile on disk: what was measured on one device under stated conditions, raw samples kept.

    profiles/<device>-<power mode>-<stack>.json

Percentiles are computed on reading, so that a better estimator applies to old measurements. History of the schema: 1,
the first; 2, clocks, switches, remarks on flags, the meter of an energy and what was missing; 3, settings of a backend,
and latencies that include turning pixels into what the model takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec

from hydradeploy.errors import IntegrityError, UsageError, environment
from hydradeploy.files import locked, write_atomically
from hydradeploy.spec import Record, decode
from hydradeploy.units import show_number

SCHEMA = 3

Key = tuple[str, str, str, str, str, str, str, int, int, str]


class Device(Record, frozen=True, kw_only=True):
    """What a device is, the same on every one of its make: fleets share profiles.

    `cores` are logical ones, `memory_bytes` what the kernel has.
    """

    kind: str
    name: str
    architecture: str
    instruction_set: str
    cores: int
    memory_bytes: int

    def differences(self, other: Device) -> tuple[str, ...]:
        """What tells them apart, as `field: this, other`; memory within a twentieth is the same."""
        found = _differences(self, other)
        if math.isclose(self.memory_bytes, other.memory_bytes, rel_tol=0.05):
            found.pop("memory_bytes", None)
        return tuple(found.values())


class Conditions(Record, frozen=True, kw_only=True):
    """How it was set up. Measurements under unlike conditions are never merged.

    `power_mode` is the device's own word for it, `governor` the clock governor of its cores, `affinity` the cores this
    process may use, `quota_cores` how much of them a control group grants, `clocks` is `pinned` or `floating`; None
    where there is no such thing or it cannot be read.
    `software` has the version of every runtime.
    """

    power_mode: str | None
    governor: str | None
    affinity: str
    quota_cores: float | None
    clocks: str | None
    os: str
    software: dict[str, str]

    def differences(self, other: Conditions) -> tuple[str, ...]:
        """What tells them apart, as `field: this, other`."""
        return tuple(_differences(self, other).values())


class Cell(Record, frozen=True, kw_only=True):
    """One artifact on one backend, measured.

    `compute_type` is what products are computed in, `settings` are those of the backend that are not its defaults,
    `input` is the type that the artifact takes.
    `regime` is how calls arrive: `saturated`, one right after the other; `paced-30hz`, on a schedule, where a latency
    counts from the intended arrival; `concurrent-4`, from four callers at once; `burst` and `sustained`, the first and
    the thermally settled ones of a long run.

    `latency_s` are the raw samples in order, `process` the child each comes from, `load_s` and `first_s` one value per
    child, `switch_s` first calls after another model's. `memory_bytes` is the most that any child took beyond what the
    runtime takes without a model, `energy_j` per image and beyond idling, by `meter`. `flags` say what was wrong with
    the measurement, `remarks` on what evidence, `evidence` has the numbers, one for each child that could tell it;
    `missing` says why a quantity is not there, or what stands in for it. `error` says why there is no measurement, or
    no more of it.
    """

    artifact: str
    graph_sha256: str
    backend: str
    processor: str
    compute_type: str
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    input: str
    batch: int
    threads: int
    regime: str
    measured_at: str
    latency_s: tuple[float, ...] = ()
    process: tuple[int, ...] = ()
    load_s: tuple[float, ...] = ()
    first_s: tuple[float, ...] = ()
    switch_s: tuple[float, ...] = ()
    memory_bytes: int | None = None
    energy_j: float | None = None
    meter: str | None = None
    flags: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    evidence: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    missing: dict[str, str] = msgspec.field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        if len(self.process) != len(self.latency_s):
            raise ValueError(f"{self.artifact}: {len(self.latency_s)} samples of {len(self.process)} processes")
        if not self.latency_s and self.error is None:
            raise ValueError(f"{self.artifact}: neither samples nor an error")
        # A sum shows a NaN wherever it stands, and a pick reads thousands of samples.
        if self.latency_s and (
            math.isnan(sum(self.latency_s)) or not 0 < min(self.latency_s) <= max(self.latency_s) < math.inf
        ):
            raise ValueError(f"{self.artifact}: latency_s must be positive and finite")
        if not all(
            0 <= value < math.inf for value in (*self.load_s, *self.first_s, *self.switch_s, self.energy_j or 0.0)
        ):
            raise ValueError(f"{self.artifact}: load_s, first_s, switch_s and energy_j must be finite and not negative")
        if min(self.batch, self.threads) < 1 or (self.memory_bytes or 0) < 0:
            raise ValueError(f"{self.artifact}: batch and threads must be at least 1, memory_bytes not negative")

    @property
    def key(self) -> Key:
        """What was measured; a later measurement of the same replaces it."""
        return (
            self.artifact,
            self.graph_sha256,
            self.backend,
            self.processor,
            self.compute_type,
            show_settings(self.settings),
            self.input,
            self.batch,
            self.threads,
            self.regime,
        )


class Profile(Record, frozen=True, kw_only=True):
    """All cells measured on one device under the same conditions."""

    schema: int = SCHEMA
    device: Device
    conditions: Conditions
    cells: tuple[Cell, ...]

    @property
    def measured_at(self) -> str:
        """When its newest cell was measured, ISO 8601 in UTC; empty for no cells."""
        return max((cell.measured_at for cell in self.cells), default="")


@dataclass(frozen=True)
class Stored:
    """A profile and its file."""

    path: Path
    profile: Profile


def show_settings(settings: Mapping[str, str]) -> str:
    """`hint=throughput`, several with commas in the order of their names; empty for the defaults."""
    return ", ".join(f"{name}={settings[name]}" for name in sorted(settings))


def show_way(artifact: str, backend: str, compute_type: str, settings: str, threads: int, batch: int) -> str:
    """`onnxruntime, 2 threads`, with settings, with the compute type where the artifact's name does not tell it, and
    with how many images a call has where it is not one."""
    told = "" if compute_type in artifact.split("-") else compute_type
    images = "" if batch == 1 else f"batch {batch}"
    return ", ".join(filter(None, (backend, told, settings, show_number(threads, "thread"), images)))


def read_profile(path: Path) -> Stored:
    """Read a profile; raises UsageError when there is none, IntegrityError for a damaged one."""
    try:
        return Stored(path, decode(path.read_bytes(), Profile, str(path), SCHEMA))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such profile", hint="measure one with hydradeploy profile") from error
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from error


def read_profiles(directory: Path) -> tuple[Stored, ...]:
    """Every profile of a directory, newest first, none where there is no directory.

    Raises UsageError where it is a file, IntegrityError for a damaged profile.
    """
    if directory.is_file():
        raise UsageError(f"{directory}: this is a file, profiles lie in a directory", hint=f"name {directory.parent}")
    found = [read_profile(path) for path in sorted(directory.glob("*.json"))]
    return tuple(sorted(found, key=lambda stored: stored.profile.measured_at, reverse=True))


def place_of(directory: Path, device: Device, conditions: Conditions) -> Path:
    """The file for profiles of that device under those conditions.

    Where files of that name hold others, the first free number is added to it. Raises IntegrityError for a damaged
    file.
    """
    name = _file_name(device, conditions)
    numbered = re.compile(re.escape(name) + r"(?:-([0-9]+))?\.json")
    found = {int(match[1] or 1): path for path in directory.glob("*.json") if (match := numbered.fullmatch(path.name))}
    # Beyond a number that is free too: somebody may have removed the file that had it.
    for _, path in sorted(found.items()):
        before = read_profile(path).profile
        if not before.device.differences(device) and not before.conditions.differences(conditions):
            return path
    free = next(number for number in count(1) if number not in found)
    return directory / (name + ("" if free == 1 else f"-{free}") + ".json")


def add_profile(directory: Path, fresh: Profile) -> Stored:
    """Keep a profile: its cells replace those of the same key in the file of that device under those conditions.

    A cell that failed does not replace one that was measured. Raises IntegrityError for a damaged file,
    EnvironmentFailed when the disk fails.
    """
    while True:
        path = place_of(directory, fresh.device, fresh.conditions)
        with locked(path, lambda _: None):
            if place_of(directory, fresh.device, fresh.conditions) != path:  # another process was first
                continue
            before = read_profile(path).profile.cells if path.exists() else ()
            merged = msgspec.structs.replace(fresh, cells=_merged(before, fresh.cells))
            with environment("writing the profile"):
                write_atomically(path, msgspec.json.format(msgspec.json.encode(merged), indent=0) + b"\n")
            return Stored(path, merged)


def _merged(before: Sequence[Cell], fresh: Sequence[Cell]) -> tuple[Cell, ...]:
    """What was there but for what was measured again; a measurement is not given up for a failure."""
    good = {cell.key for cell in before if cell.error is None}
    added = [cell for cell in fresh if cell.error is None or cell.key not in good]
    replaced = {cell.key for cell in added}
    return (*(cell for cell in before if cell.key not in replaced), *added)


def _file_name(device: Device, conditions: Conditions) -> str:
    stack = "-".join(f"{name}-{version}" for name, version in sorted(conditions.software.items()))
    mode = conditions.power_mode or conditions.governor or "default"
    parts = (f"{device.name} {device.cores}c", mode, stack)
    return "-".join(re.sub(r"[^a-z0-9.+]+", "-", part.lower()).strip("-") for part in parts if part)


def _differences(one: Record, other: Record) -> dict[str, str]:
    fields = {name: (getattr(one, name), getattr(other, name)) for name in one.__struct_fields__}
    return {name: f"{name}: {_shown(a)}, {_shown(b)}" for name, (a, b) in fields.items() if a != b}


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {version}" for name, version in sorted(value.items())) or "none"
    return "none" if value is None else str(value)
