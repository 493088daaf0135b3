"""What a step trains: which subnets, on which targets, and where weight decay acts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hydradeploy.spec import Subnet, three
from hydradeploy.training.recipe import Method, anchors_of

_HEADS = 3  # the stream of random numbers that head counts are drawn from
_SLOWNESS = 0.98  # of the running losses: about fifty steps


class Drawing:
    """Draws the head counts of each step; keeps the running loss of each, where the drawing follows it."""

    def __init__(self, method: Method, trained_heads: tuple[int, ...], seed: int) -> None:
        self._method, self._trained, self._seed = method, trained_heads, seed
        self.losses = torch.full((len(trained_heads),), torch.nan, dtype=torch.float64)

    def of(self, step: int, rank: int) -> tuple[int, ...]:
        """The head counts of a step, the largest anchor first, each once."""
        method, trained = self._method, self._trained
        anchors = anchors_of(method, trained)
        shares = self._shares()
        shares[[trained.index(k) for k in anchors]] = 0
        count = min(method.draws, int(np.count_nonzero(shares)))
        if not count:
            return anchors
        own = [rank] if rank and method.head_draw == "per-rank" else []
        random = np.random.default_rng([self._seed, _HEADS, step, *own])
        if method.sample_weights is None and not method.loss_aware and not anchors and count == 1:
            return (int(random.choice(trained)),)
        drawn = random.choice(trained, count, replace=False, p=shares / shares.sum())
        return (*anchors, *map(int, drawn))

    def follow(self, sums: Tensor, counts: Tensor) -> None:
        """Take in the losses of a step: per trained head count their sum and number over all processes.

        One that is not finite is passed over: it is about to end the run, and nothing can be drawn by it until then.
        """
        seen = (counts > 0) & sums.isfinite()
        now = sums[seen] / counts[seen]
        before = self.losses[seen]
        self.losses[seen] = torch.where(before.isnan(), now, _SLOWNESS * before + (1 - _SLOWNESS) * now)

    def _shares(self) -> NDArray[np.float64]:
        weights = self._method.sample_weights
        shares = np.ones(len(self._trained)) if weights is None else np.asarray(weights, np.float64)
        if self._method.loss_aware and not self.losses.isnan().all():
            losses = self.losses.nan_to_num(float(self.losses.nanmean())).clamp(min=1e-6).numpy()
            shares = shares * (losses / losses.mean()) ** self._method.loss_aware
        return shares


def loss_of(logits: Tensor, targets: Tensor, smoothing: float, taught: tuple[tuple[float, Tensor], ...]) -> Tensor:
    """Cross-entropy with labels (n,) or probabilities (n, classes).

    `taught` are shares of the loss, each against the softmax of other logits (n, classes); the rest is the targets'.
    """
    own = 1.0 - sum(share for share, _ in taught)
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.ndim == 1 else 0.0) * own
    for share, others in taught:
        loss = loss + F.cross_entropy(logits, others.float().softmax(-1)) * share
    return loss


def untouched(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0, to be added to a loss: it gives each of the parameters a gradient, of zero."""
    return torch.cat([parameter.reshape(-1)[:0] for parameter in parameters]).sum()


def decay_leading(parameters: dict[str, nn.Parameter], subnets: Iterable[Subnet], by: float) -> None:
    """Multiply what any of `subnets` reads of each parameter by `by`, in place; they are of one supernet."""
    # The largest one's blocks hold those of the others, but for classifiers of their own.
    ascending = sorted(subnets, key=lambda subnet: subnet.heads)
    blocks = {subnet.source(name): shape for subnet in ascending for name, shape in subnet.shapes.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            shape = blocks.get(name)
            if shape is None:
                continue
            if ".attn.qkv." in name:
                three(parameter)[:, : shape[0] // 3, : shape[1]].mul_(by)
            else:
                parameter[tuple(slice(size) for size in shape)].mul_(by)
