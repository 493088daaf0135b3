"""Logits: compared with the logits they should be, and as probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Agreement:
    """How logits compare with a reference.

    `max_difference` is the largest |difference| as a fraction of the reference's largest |logit|, `cosine` the smallest
    between the logits of a sample; `top1_agreement` the fraction of samples with the same first class; `overturned` how
    many samples differ in it although the reference's margin is more than twice the tolerance, so that allowed
    differences cannot explain it.
    """

    samples: int
    max_difference: float
    cosine: float
    top1_agreement: float
    overturned: int
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the differences are within the tolerance and no clear decision is overturned."""
        return self.max_difference <= self.tolerance and not self.overturned


def agreement(reference: NDArray[np.float32], logits: NDArray[np.float32], tolerance: float) -> Agreement:
    """Compare logits (n, classes) with a reference of the same shape; raises ValueError where the shapes differ.

    NaN anywhere gives an infinite difference and a cosine of -1.
    """
    if reference.shape != logits.shape or reference.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}, the reference {reference.shape}")
    scale = float(np.abs(reference).max())
    with np.errstate(invalid="ignore"):  # infinite in both is no agreement either
        difference = float(np.abs(logits.astype(np.float64) - reference).max())
    relative = difference / scale if scale > 0 else difference
    same = reference.argmax(1) == logits.argmax(1)
    ordered = np.sort(reference, axis=1)
    margin = ordered[:, -1] - ordered[:, -2] if reference.shape[1] > 1 else np.full(len(reference), np.inf)
    clear = margin > 2 * tolerance * scale
    return Agreement(
        samples=len(reference),
        max_difference=relative if np.isfinite(relative) else float("inf"),
        cosine=_cosine(reference.astype(np.float64), logits.astype(np.float64)),
        top1_agreement=float(same.mean()),
        overturned=int((~same & clear).sum()),
        tolerance=tolerance,
    )


def _cosine(reference: NDArray[np.float64], logits: NDArray[np.float64]) -> float:
    if not (np.isfinite(reference).all() and np.isfinite(logits).all()):
        return -1.0
    lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(logits, axis=1)
    products = (reference * logits).sum(1)
    both_zero = (np.abs(reference).max(1) == 0) & (np.abs(logits).max(1) == 0)
    cosines = np.divide(products, lengths, out=both_zero.astype(np.float64), where=lengths > 0)
    return float(np.clip(cosines.min(), -1.0, 1.0))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities along the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))
