"""The gate: an artifact is written only if it computes what the torch subnet computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hydradeploy.backends import Backend, Options, model, prepared, run_all
from hydradeploy.bundle import Batch, Dialect, Parity
from hydradeploy.errors import ParityError
from hydradeploy.exporter.precision import LEAST_COSINE, Precision
from hydradeploy.spec import Preprocessing, Subnet
from hydradeploy.stats.logits import Agreement, agreement
from hydradeploy.stored import Input
from hydradeploy.supernet.store import Weights

Logits = NDArray[np.float32]

# Logits as near to each other as this fraction of the largest are a tie, which each runtime decides as it rounds: in
# fp32 two of them differ by 2e-6.
_TIE = 1e-5


@dataclass(frozen=True)
class Shown:
    """The samples an artifact is judged by: uint8 pixels, and whether they are images or come from a seed."""

    pixels: NDArray[np.uint8]
    preprocessing: Preprocessing
    real: bool


def reference(weights: Weights, subnet: Subnet, images: NDArray[np.float32]) -> Logits:
    """Logits (n, classes) of the torch subnet in fp32, one image at a time as the device will see them."""
    plain = weights.plain(subnet)
    with torch.inference_mode():
        logits = [plain(torch.from_numpy(images[i : i + 1])) for i in range(len(images))]
        return np.asarray(torch.cat(logits).numpy())


def gate(
    name: str,
    expected: Logits,
    graphs: dict[Dialect, Path],
    subnet: Subnet,
    precision: Precision,
    kind: Input,
    batch: Batch,
    shown: Shown,
    backend: Backend,
) -> tuple[Parity, Logits]:
    """Run every dialect's graph and compare; returns the record and the logits of the backend's own dialect.

    Raises ParityError with the figures where a graph differs by more than the precision allows.
    """
    images = prepared(shown.pixels, kind, shown.preprocessing)
    results: dict[Dialect, tuple[Agreement, Logits]] = {}
    for dialect, path in graphs.items():
        opened = model(name, path, batch, subnet.geometry, kind, precision.name)
        with backend.open(opened, Options()) as session:
            logits = run_all(session, opened, images)
        found = agreement(expected, logits, precision.tolerance)
        results[dialect] = found, logits
        decided = agreement(expected, logits, _TIE / 2) if precision.exact_top1 else found
        _check(f"{name} ({dialect})", found, decided.overturned, precision)
    compared = [found for found, _ in results.values()]
    top1 = min(found.top1_agreement for found in compared)
    parity = Parity(
        samples=len(images),
        max_difference=max(found.max_difference for found in compared),
        tolerance=precision.tolerance,
        cosine=min(found.cosine for found in compared),
        least_cosine=LEAST_COSINE,
        top1_agreement=top1 if shown.real or precision.exact_top1 else None,
    )
    own = next((dialect for dialect in results if dialect == backend.dialect), next(iter(results)))
    return parity, results[own][1]


def _check(name: str, found: Agreement, overturned: int, precision: Precision) -> None:
    if found.within and found.cosine >= LEAST_COSINE and not overturned:
        return
    raise ParityError(
        f"{name} does not compute what the supernet computes: largest logit difference "
        f"{found.max_difference:.2e} of the largest |logit| ({precision.tolerance:g} allowed), smallest cosine "
        f"{found.cosine:.4f} ({LEAST_COSINE} asked), top-1 equal on {found.top1_agreement:.1%} of "
        f"{found.samples} samples",
        hint=f"nothing was written; {_advice(precision)}",
    )


def _advice(precision: Precision) -> str:
    if precision.int8 == "static":
        return "try another --calibration, a smaller --max-drop, which keeps layers in float, or fp16"
    if precision.int8 == "dynamic":
        return "try a smaller --max-drop, which keeps layers in float, or fp16"
    if precision.dtype == "float32":
        return "look at onnxruntime on this machine"
    return "where the weights overflow a narrow type, export them in fp32"
