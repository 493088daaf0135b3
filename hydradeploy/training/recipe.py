"""What a training run is: every number that decides its result, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from hydradeploy.errors import UsageError
from hydradeploy.spec import IMAGENET_MEAN, IMAGENET_STD, Geometry, Preprocessing, Record, Spec


class Recipe(Record, frozen=True, kw_only=True):
    """The paper's method (HydraViT, section 3): one head count per step, AdamW, warm-up and cosine, EMA.

    `learning_rate` is the peak, at batch `batch_size`. `sample_weights` are percentages, one per trained head count,
    that sum to 100; None draws uniformly. `shift` is the largest random translation, as a fraction of the image.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_epochs: int = 5
    warmup_from: float = 1e-6
    final_rate: float = 1e-5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ema_decay: float = 0.999
    sample_weights: tuple[int, ...] | None = None
    shift: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not (0 <= self.label_smoothing < 1 and 0 <= self.ema_decay < 1 and 0 <= self.shift < 0.5):
            raise ValueError("label_smoothing and ema_decay must be 0 to 1, shift 0 to 0.5")

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step: linear warm-up, then cosine down to `final_rate`."""
        warmup = min(self.warmup_epochs, self.epochs // 4) * steps_per_epoch
        if step < warmup:
            return self.warmup_from + (self.learning_rate - self.warmup_from) * step / warmup
        progress = (step - warmup) / max(1, self.epochs * steps_per_epoch - warmup)
        low = min(self.final_rate, self.learning_rate)
        return low + (self.learning_rate - low) * (1 + math.cos(math.pi * progress)) / 2


def check_weights(weights: tuple[int, ...] | None, trained_heads: tuple[int, ...]) -> None:
    """Raise UsageError unless there is one weight per trained head count and they sum to 100."""
    if weights is None:
        return
    if len(weights) != len(trained_heads):
        raise UsageError(
            f"{len(weights)} sample weights for {len(trained_heads)} head counts",
            hint="--sample-weights takes one percentage per trained head count",
        )
    if min(weights) < 0 or sum(weights) != 100:
        raise UsageError(f"sample weights sum to {sum(weights)}", hint="they are percentages and sum to 100")


class Preset(Record, frozen=True, kw_only=True):
    """A geometry and a recipe that suit a data set; `classes` and names come from the data."""

    geometry: Geometry
    preprocessing: Preprocessing
    recipe: Recipe

    def spec(self, class_names: tuple[str, ...]) -> Spec:
        """The spec of a supernet for these classes."""
        geometry = msgspec.structs.replace(self.geometry, classes=len(class_names))
        return Spec(geometry=geometry, preprocessing=self.preprocessing, class_names=class_names)


# Chosen so that a supernet trains in about two minutes on two cores and its smallest subnets are clearly worse.
DIGITS = Preset(
    geometry=Geometry(
        image_size=16,
        patch_size=4,
        channels=1,
        head_dim=16,
        heads=12,
        trained_heads=tuple(range(3, 13)),
        depth=4,
        mlp_ratio=4.0,
        classes=10,
        eps=1e-6,
    ),
    preprocessing=Preprocessing(mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation="bilinear"),
    recipe=Recipe(epochs=36, batch_size=32, label_smoothing=0.05, ema_decay=0.99, shift=0.07),
)

# Chosen so that a supernet trains in about 12 minutes of one core; each head up to the sixth pays, the others hardly.
# Patches of 6 pixels, not 4, leave 16 tokens instead of 36: that time is better spent on more than twice the steps.
GLYPHS = Preset(
    geometry=msgspec.structs.replace(DIGITS.geometry, image_size=24, patch_size=6, classes=36),
    preprocessing=Preprocessing(mean=(0.5,), std=(0.25,), crop_pct=1.0, interpolation="bilinear"),
    recipe=Recipe(epochs=18, learning_rate=2e-3, warmup_epochs=1),
)

# For other data at small scale; image and patch size, width, depth and epochs are to be chosen to suit it.
SMALL = Preset(
    geometry=msgspec.structs.replace(DIGITS.geometry, image_size=32, channels=3, head_dim=16, depth=6),
    preprocessing=Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=1.0, interpolation="bicubic"),
    recipe=Recipe(epochs=100, shift=0.125),
)


PRESETS: Mapping[str, Preset] = {"digits": DIGITS, "glyphs": GLYPHS}


def preset_for(data: str) -> Preset:
    """The preset of a data set that has one, else the one for other data."""
    return PRESETS.get(data, SMALL)
