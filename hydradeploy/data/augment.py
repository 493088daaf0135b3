"""What happens to an image before the supernet is trained on it, seeded by whoever asks."""

from __future__ import annotations

from hydradeploy.spec import Record


class Augmentation(Record, frozen=True, kw_only=True):
    """How training images are varied; by default not at all.

    `shift` is the largest random translation as a fraction of the image. `crop_scale` is the range of the area of a
    random resized crop (None: the crop that evaluation takes), `crop_ratio` that of its width over its height. `flip`
    is the probability of a horizontal flip. `randaugment` is a policy in timm's words, such as rand-m9-mstd0.5-inc1.
    `erasing` is the probability that a rectangle is replaced by noise (timm's mode `pixel`). `mixup` and `cutmix` are
    the parameters of their Beta distributions; 0 turns either off, and with both on each has half of the batches.
    """

    shift: float = 0.0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    randaugment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
