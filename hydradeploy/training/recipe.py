"""What a training run is: every number that decides its result, and nothing else."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from hydradeploy.data.augment import Augmentation
from hydradeploy.errors import UsageError
from hydradeploy.spec import Geometry, Preprocessing, Record, Spec

Anchors = Literal["none", "largest", "sandwich"] | tuple[int, ...]
HeadDraw = Literal["per-rank", "shared"]
Arithmetic = Literal["fp32", "tf32", "bf16", "fp16"]


class Method(Record, frozen=True, kw_only=True):
    """Which subnets a step trains, and on what; as it stands, the paper's method (HydraViT, section 3).

    `draws` head counts are drawn for each step. `anchors` are trained in every step besides: the largest subnet, both
    ends, the sandwich rule (Yu and Huang, arXiv 1903.05134), or those of these head counts. `head_draw` says whether
    all processes of a run draw the same head counts or each its own, as in the official code. `sample_weights` are
    percentages, one per trained head count, that sum to 100; None draws uniformly. `loss_aware` above 0 draws head
    counts in proportion to their running loss to that power. `loss_weights`, one per trained head count, scale each
    subnet's loss.

    `distil` is the share of a smaller subnet's loss that is cross-entropy against the largest one's output of the same
    step (in-place distillation, same source), `teacher_share` that of every subnet against the output of a teacher.
    Without `decay_unsampled`, weight decay acts on the slices that a step trains and on no others.
    """

    draws: int = 1
    anchors: Anchors = "none"
    head_draw: HeadDraw = "per-rank"
    sample_weights: tuple[int, ...] | None = None
    loss_aware: float = 0.0
    loss_weights: tuple[float, ...] | None = None
    distil: float = 0.0
    teacher_share: float = 0.0
    decay_unsampled: bool = True

    def __post_init__(self) -> None:
        bare = self.anchors in ("none", ())
        if self.draws < 0 or (self.draws == 0 and bare):
            raise ValueError(f"draws must be at least 1, or 0 with anchors, got {self.draws}")
        for field in ("distil", "teacher_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be 0 to 1, got {getattr(self, field)}")
        if self.distil and bare:
            raise ValueError('distil needs the largest subnet in every step: anchors "largest" or "sandwich"')
        if not 0 <= self.loss_aware < math.inf:
            raise ValueError(f"loss_aware must be at least 0 and finite, got {self.loss_aware}")
        weights = self.loss_weights
        if weights is not None and not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"loss_weights must be above 0 and finite, got {weights}")


class Recipe(Record, frozen=True, kw_only=True):
    """How a supernet is trained: AdamW, warm-up and cosine, a moving average of the weights.

    `batch_size` is the number of images in a step, of all processes together, and `learning_rate` the peak at it. The
    warm-up takes a quarter of `epochs` at most. The last `cooldown_epochs` come on top of `epochs`, at `final_rate`.
    `ema_warmup` lets the average follow faster in the first steps. `drop_path` is the largest probability to skip a
    branch, that of the last block, growing linearly from none in the first. `arithmetic` is that of the products: fp32,
    tf32 (fp32 where there is none), or autocast to bf16 or fp16, the last with a scaled loss.
    """

    epochs: int
    cooldown_epochs: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_epochs: int = 5
    warmup_from: float = 1e-6
    final_rate: float = 1e-5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    ema_decay: float = 0.999
    ema_warmup: bool = True
    arithmetic: Arithmetic = "fp32"
    augment: Augmentation = Augmentation()
    method: Method = Method()
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if min(self.warmup_epochs, self.cooldown_epochs, self.seed) < 0:
            raise ValueError("warmup_epochs, cooldown_epochs and seed must be at least 0")
        if self.seed >= 1 << 64:  # torch takes no more
            raise ValueError(f"seed must be below 2^64, got {self.seed}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        for field in ("warmup_from", "final_rate", "weight_decay"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be at least 0 and finite, got {getattr(self, field)}")
        if not (0 <= self.label_smoothing < 1 and 0 <= self.ema_decay < 1 and 0 <= self.drop_path < 1):
            raise ValueError("label_smoothing, ema_decay and drop_path must be 0 to 1")

    @property
    def all_epochs(self) -> int:
        """Epochs with those of the cool-down."""
        return self.epochs + self.cooldown_epochs

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step: linear warm-up, cosine down to `final_rate`, cool-down at that."""
        warmup = min(self.warmup_epochs, self.epochs // 4) * steps_per_epoch
        if step < warmup:
            return self.warmup_from + (self.learning_rate - self.warmup_from) * step / warmup
        progress = min(1.0, (step - warmup) / max(1, self.epochs * steps_per_epoch - warmup))
        low = min(self.final_rate, self.learning_rate)
        return low + (self.learning_rate - low) * (1 + math.cos(math.pi * progress)) / 2


def anchors_of(method: Method, trained_heads: tuple[int, ...]) -> tuple[int, ...]:
    """The head counts that every step trains, the largest first."""
    if isinstance(method.anchors, tuple):
        heads = method.anchors
    else:
        ends = (trained_heads[0], trained_heads[-1])
        heads = {"none": (), "largest": ends[1:], "sandwich": ends}[method.anchors]
    return tuple(sorted(set(heads), reverse=True))


def check_method(method: Method, trained_heads: tuple[int, ...]) -> None:
    """Raise UsageError unless anchors are trained head counts, with the largest among them where it teaches, and the
    weights given are one per trained head count, the drawing's with 100 for their sum."""
    anchors = anchors_of(method, trained_heads)
    for heads in anchors:
        if heads not in trained_heads:
            there = ", ".join(map(str, trained_heads))
            raise UsageError(f"anchor {heads} is no trained head count", hint=f"those are {there}")
    if method.distil and trained_heads[-1] not in anchors:
        raise UsageError(
            f"the subnet of {trained_heads[-1]} heads cannot teach the others: not every step trains it",
            hint=f"--anchors largest, sandwich, or head counts with {trained_heads[-1]} among them",
        )
    for weights, option in ((method.sample_weights, "sample"), (method.loss_weights, "loss")):
        if weights is not None and len(weights) != len(trained_heads):
            raise UsageError(
                f"{len(weights)} {option} weights for {len(trained_heads)} head counts",
                hint=f"--{option}-weights takes one number per trained head count",
            )
    weights = method.sample_weights
    if weights is not None and min(weights) < 0:
        raise UsageError(f"{min(weights)} is no sample weight", hint="they are percentages and sum to 100")
    if weights is not None and sum(weights) != 100:
        raise UsageError(f"sample weights sum to {sum(weights)}", hint="they are percentages and sum to 100")


class Preset(Record, frozen=True, kw_only=True):
    """A geometry and a recipe that suit a data set; `classes` and names come from the data."""

    geometry: Geometry
    preprocessing: Preprocessing
    recipe: Recipe

    def __post_init__(self) -> None:
        for field in ("mean", "std"):
            count = len(getattr(self.preprocessing, field))
            if count != self.geometry.channels:
                raise ValueError(f"{field} has {count} values for {self.geometry.channels} channels")

    def spec(self, class_names: tuple[str, ...]) -> Spec:
        """The spec of a supernet for these classes."""
        geometry = msgspec.structs.replace(self.geometry, classes=len(class_names))
        return Spec(geometry=geometry, preprocessing=self.preprocessing, class_names=class_names)
