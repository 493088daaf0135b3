"""Recipes by name: the paper's own, and those that suit small data."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hydradeploy.data.augment import Augmentation
from hydradeploy.spec import IMAGENET_MEAN, IMAGENET_STD, Geometry, Preprocessing
from hydradeploy.training.recipe import Preset, Recipe

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
    recipe=Recipe(epochs=36, batch_size=32, label_smoothing=0.05, ema_decay=0.99, augment=Augmentation(shift=0.07)),
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
    recipe=Recipe(epochs=100, augment=Augmentation(shift=0.125)),
)

# The published recipe: the official configuration file and README. What differs is listed in docs/training.md.
HYDRAVIT_IMAGENET = Preset(
    geometry=Geometry(
        image_size=224,
        patch_size=16,
        channels=3,
        head_dim=64,
        heads=12,
        trained_heads=tuple(range(3, 13)),
        depth=12,
        mlp_ratio=4.0,
        classes=1000,
        eps=1e-6,
    ),
    preprocessing=Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=0.875, interpolation="bicubic"),
    recipe=Recipe(
        epochs=300,
        cooldown_epochs=10,
        batch_size=1024,
        learning_rate=1e-3,
        warmup_epochs=5,
        warmup_from=1e-6,
        final_rate=1e-5,
        weight_decay=0.05,
        label_smoothing=0.1,
        drop_path=0.1,
        ema_decay=0.99996,
        ema_warmup=False,
        arithmetic="tf32",
        augment=Augmentation(
            crop_scale=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            flip=0.5,
            randaugment="rand-m9-mstd0.5-inc1",
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
        ),
        seed=42,
    ),
)

PRESETS: Mapping[str, Preset] = {
    "digits": DIGITS,
    "glyphs": GLYPHS,
    "small": SMALL,
    "hydravit-imagenet": HYDRAVIT_IMAGENET,
}


def suited(data: str) -> str:
    """The name of the preset for a data set: its own, or the one for other data."""
    return data if data in ("digits", "glyphs") else "small"


def preset_for(data: str) -> Preset:
    """The preset that suits a data set."""
    return PRESETS[suited(data)]
