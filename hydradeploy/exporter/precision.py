"""The precisions an artifact can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydradeploy.errors import UsageError


@dataclass(frozen=True)
class Precision:
    """How weights are stored and computed with, and how far the logits may be from the torch subnet in fp32.

    `tolerance` is a fraction of the largest |logit|. `exact_top1` asks for the same top-1 on every sample; without it
    only on those whose margin the tolerance cannot overturn.
    """

    name: str
    dtype: Literal["float32", "float16"]
    tolerance: float
    exact_top1: bool


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", tolerance=1e-4, exact_top1=True),
        # Half precision keeps 11 bits. A DeiT-B-sized supernet with random weights differs by 5e-4 at every head count;
        # ten times that leaves room for trained weights, whose activations are larger.
        Precision("fp16", "float16", tolerance=5e-3, exact_top1=False),
    )
}


def precision(name: str) -> Precision:
    """The precision of that name; raises UsageError that names those there are."""
    if name not in PRECISIONS:
        raise UsageError(f"no precision {name!r}", hint=f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
