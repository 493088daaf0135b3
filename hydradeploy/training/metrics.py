"""What a run tells of itself: a file of JSON lines beside the supernet, and TensorBoard."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from hydradeploy.errors import IntegrityError, MissingError, environment
from hydradeploy.files import write_atomically
from hydradeploy.spec import Record


class Line(Record, frozen=True, kw_only=True):
    """One epoch, or part of one where a run was stopped.

    `step` is the next one to take. `top1` is that of the average on the held-out images, per subnet.
    `images_per_second` counts all processes, `waiting` is the share of the time that the first one waited for images.
    `bad_images` is how many could not be read so far.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    top1: dict[str, float]
    images_per_second: float
    waiting: float
    bad_images: int = 0


def path_of(out: Path) -> Path:
    """Where the metrics of the run that writes the supernet `out` lie."""
    return out.with_name(f"{out.name}.metrics.jsonl")


class Metrics:
    """Writes each line to both places; lines past the step that a run goes on from are dropped first."""

    def __init__(self, out: Path, tensorboard: str | None, step: int) -> None:
        self._path = path_of(out)
        kept = [line for line in read(out) if line.step <= step] if step else []
        with environment(f"writing {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, b"".join(msgspec.json.encode(line) + b"\n" for line in kept))
        self._board = None if tensorboard is None else _board(tensorboard, step)

    def add(self, line: Line) -> None:
        """Append a line; raises EnvironmentFailed when the disk fails."""
        with environment(f"writing {self._path}"), self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
        if self._board is not None:
            numbers = {"loss": line.loss, "learning_rate": line.learning_rate, "waiting": line.waiting}
            numbers |= {"images_per_second": line.images_per_second}
            numbers |= {f"top1/{name}": share for name, share in line.top1.items()}
            for name, value in numbers.items():
                self._board.add_scalar(name, value, line.step)
            self._board.flush()


def read(out: Path) -> list[Line]:
    """The lines of a run so far, none where there is no file; a last line that was cut off is left out.

    Raises IntegrityError where another line cannot be read.
    """
    path = path_of(out)
    if not path.exists():
        return []
    with environment(f"reading {path}"):
        lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(msgspec.json.decode(line, type=Line))
        except msgspec.MsgspecError as error:
            raise IntegrityError(f"{path}: line {number}: {error}", hint="move the file away") from error
    return found


def check_tensorboard() -> None:
    """Raise MissingError unless TensorBoard's package is installed."""
    if find_spec("tensorboard") is None:
        raise MissingError("TensorBoard is not installed", hint="pip install tensorboard")


def _board(path: str, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    with environment(f"writing {path}"):
        return SummaryWriter(path, purge_step=step + 1 if step else None)
