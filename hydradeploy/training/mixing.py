"""Mixup and cutmix on a batch, as timm's batch mode has them: image i with image n - 1 - i, one mixture for all.

Sources: Zhang et al., arXiv 1710.09412 (mixup); Yun et al., arXiv 1905.04899 (cutmix).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hydradeploy.data.augment import Augmentation


def soft(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (n,) as probabilities (n, classes): `smoothing` is spread evenly over all classes."""
    off = smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def mixed(images: Tensor, targets: Tensor, how: Augmentation, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, channels, s, s) and targets (n, classes) mixed with themselves in reverse order.

    With both mixup and cutmix on, either has half of the batches.
    """
    cut = how.cutmix > 0 and (how.mixup == 0 or random.random() < 0.5)
    alpha = how.cutmix if cut else how.mixup
    if alpha == 0:
        return images, targets
    share = float(random.beta(alpha, alpha))
    if cut:
        images, share = _cut(images, share, random)
    else:
        images = images.flip(0).mul_(1 - share).add_(images, alpha=share)
    return images, targets * share + targets.flip(0) * (1 - share)


def _cut(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """A box of about 1 - share of the area from the other image, cut off at the borders; the share that is left."""
    height, width = images.shape[2:]
    ratio = (1 - share) ** 0.5
    tall, wide = int(height * ratio), int(width * ratio)
    y, x = int(random.integers(height)), int(random.integers(width))
    top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
    left, right = max(0, x - wide // 2), min(width, x + wide // 2)
    result = images.clone()
    result[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return result, 1 - (bottom - top) * (right - left) / (height * width)
