"""A training run on disk, so that it can go on exactly: tensors as safetensors, the rest as JSON in the header."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from hydradeploy.errors import IntegrityError, UsageError, environment
from hydradeploy.files import write_atomically
from hydradeploy.spec import Record, Spec, decode
from hydradeploy.supernet.store import read_safetensors
from hydradeploy.training.recipe import Recipe

_HEADER = "hydradeploy.training"


class Progress(Record, frozen=True, kw_only=True):
    """Which run this is and how far it is: `step` is the next one to take, `bad` the images that cannot be read."""

    schema: int = 1
    spec: Spec
    recipe: Recipe
    data_sha256: str
    teacher_sha256: str | None = None
    init_sha256: str | None = None
    processes: int = 1
    accumulate: int = 1
    step: int
    bad: tuple[int, ...] = ()


@dataclass(frozen=True)
class State:
    """A run's progress and its tensors: weights, their moving average, AdamW's moments."""

    progress: Progress
    tensors: dict[str, Tensor]


def path_of(out: Path) -> Path:
    """Where the state of the run that writes the supernet `out` lies."""
    return out.with_name(f"{out.name}.training")


def save(out: Path, state: State) -> None:
    """Write the state beside the supernet, whole or not at all; raises EnvironmentFailed when the disk fails."""
    header = msgspec.json.encode(state.progress).decode()
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.tensors.items()}
    with environment(f"writing {path_of(out)}"):
        path_of(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path_of(out), to_safetensors(arrays, metadata={_HEADER: header}))


def load(out: Path) -> State:
    """The state of the run that writes `out`; raises UsageError where there is none, IntegrityError where damaged."""
    path = path_of(out)
    if not path.is_file():
        if out.exists():
            raise UsageError(
                f"{out}: its run has come to its end, so there is nothing to resume", hint="--force begins anew"
            )
        raise UsageError(f"{path}: no such file, so there is nothing to resume", hint="start without --resume")
    tensors, metadata = read_safetensors(path)
    if _HEADER not in metadata:
        raise IntegrityError(f"{path}: the header holds no training progress")
    progress = decode(metadata[_HEADER].encode(), Progress, f"{path}, header entry {_HEADER!r}")
    return State(progress, {name: tensor.clone() for name, tensor in tensors.items()})


def check_same(found: Progress, asked: Progress, path: Path) -> None:
    """Raise UsageError that names what differs, where a run is to go on as another one.

    Its learning rate may: a run whose loss was not finite goes on with a smaller one.
    """
    differing = [
        f"{field} ({_short(before)}, not {_short(now)})"
        for one, other in ((found.spec, asked.spec), (found.recipe, asked.recipe))
        for field, before, now in _differing(one, other)
        if field != "learning_rate"
    ]
    if found.data_sha256 != asked.data_sha256:
        differing.append("the training images")
    if found.teacher_sha256 != asked.teacher_sha256:
        differing.append("the teacher")
    # A run that goes on has what it began with in it, and need not be told of it again.
    if asked.init_sha256 not in (None, found.init_sha256):
        differing.append("the supernet to start from")
    if found.spec.class_names != asked.spec.class_names:
        differing.append("the classes")
    if differing:
        raise UsageError(
            f"{path}: belongs to another run, which differs in {', '.join(differing)}",
            hint="resume with the options it was started with, or start without --resume",
        )


def _differing(one: Record, other: Record) -> Iterator[tuple[str, object, object]]:
    """The fields that differ, those of the records inside by their own names."""
    for field, before in msgspec.structs.asdict(one).items():
        now = getattr(other, field)
        if isinstance(before, Record) and isinstance(now, Record):
            yield from _differing(before, now)
        elif before != now and field != "class_names":
            yield field, before, now


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
