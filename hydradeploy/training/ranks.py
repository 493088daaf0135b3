"""The processes of one training run, as torchrun starts them; without it, a run of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hydradeploy.errors import EnvironmentFailed, MissingError, UsageError


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, on the processor."""
        return self._reduced(values, dist.ReduceOp.SUM) / self.world

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum over all processes, on the processor."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gathered(self, value: Any) -> list[Any]:
        """The value of each process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Let one process of each machine through the block before the others."""
        waits = int(os.environ.get("LOCAL_RANK", "0")) > 0
        if self.world > 1 and waits:
            dist.barrier()
        yield
        if self.world > 1 and not waits:
            dist.barrier()

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world == 1:
            return values.cpu()
        # A copy: the caller's tensor keeps this process's values.
        reduced = values.to(self.device, copy=True)
        dist.all_reduce(reduced, operation)
        return reduced.cpu()


@contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """Join the other processes of the run, by the variables that torchrun sets; leave them when the block ends.

    `device` is cpu or cuda; by default cuda where there is one. Raises UsageError for another or for a variable that
    is no number, MissingError where it is not there, EnvironmentFailed when another process has ended.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"no device {kind!r} to train on", hint="cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingError("cuda: torch finds no GPU here", hint="install torch for CUDA, or --device cpu")
    world, local = told("WORLD_SIZE", 1), told("LOCAL_RANK", 0, least=0)
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}",
            hint="torchrun --nproc-per-node with as many as there are GPUs",
        )
    place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if world == 1:
        yield Ranks(0, 1, place)
        return
    _join("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, place)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise EnvironmentFailed(
            "another process of this run has ended", hint="its own message says why; --resume goes on"
        ) from error
    finally:
        dist.destroy_process_group()


def told(variable: str, default: int, least: int = 1) -> int:
    """One of the variables that torchrun sets; raises UsageError where it is no whole number of `least` or more."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UsageError(
            f"the variable {variable} is {text!r}, not a number from {least} up", hint="torchrun sets it; else unset it"
        )
    return int(text)


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:  # the second for a variable that is not there or no number
        said = str(error).partition("\n")[0]
        raise EnvironmentFailed(
            f"the processes of this run do not find each other: {said}",
            hint="start them with torchrun; on one machine with --standalone, which looks for a free port",
        ) from error
