"""The precisions an artifact can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydradeploy.bundle import Dialect
from hydradeploy.errors import UsageError
from hydradeploy.stored import Dtype

# The gate of every precision: the smallest cosine between an artifact's logits and those of the torch subnet in fp32.
LEAST_COSINE = 0.99


@dataclass(frozen=True)
class Precision:
    """How weights are stored and computed with, and how far the logits may be from the torch subnet in fp32.

    `weights` names the weights file, which precisions may share; `int8` is how the inputs of int8 products get their
    ranges, None where there are none. `tolerance` is a fraction of the largest |logit|. `exact_top1` asks for the same
    top-1 on every sample but ties; without it only on those whose margin the tolerance cannot overturn.
    """

    name: str
    weights: str
    dtype: Dtype
    tolerance: float
    exact_top1: bool = False
    int8: Literal["dynamic", "static"] | None = None
    dialects: tuple[Dialect, ...] = ("ort", "trt")


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "fp32", "float32", tolerance=1e-4, exact_top1=True),
        # Half precision keeps 11 bits. A DeiT-B-sized supernet with random weights differs by 5e-4 at every head count;
        # ten times that leaves room for trained weights, whose activations are larger.
        Precision("fp16", "fp16", "float16", tolerance=5e-3),
        # Eight bits: the same with three bits less.
        Precision("bf16", "bf16", "bfloat16", tolerance=4e-2),
        # TensorRT finds no ranges at run time.
        Precision("int8dyn", "int8", "float32", tolerance=0.15, int8="dynamic", dialects=("ort",)),
        Precision("int8", "int8", "float32", tolerance=0.15, int8="static"),
    )
}


def precision(name: str) -> Precision:
    """The precision of that name; raises UsageError that names those there are."""
    if name not in PRECISIONS:
        raise UsageError(f"no precision {name!r}", hint=f"one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
