"""The gate: an artifact is written only if it computes what the torch subnet computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hydradeploy.backends import Backend, Options, model, run_all
from hydradeploy.bundle import Batch, Dialect, Parity
from hydradeploy.errors import ParityError
from hydradeploy.exporter.precision import Precision
from hydradeploy.spec import Subnet
from hydradeploy.stats.logits import Agreement, agreement
from hydradeploy.supernet.store import Weights

Logits = NDArray[np.float32]


def reference(weights: Weights, subnet: Subnet, images: NDArray[np.float32]) -> Logits:
    """Logits (n, classes) of the torch subnet in fp32, one image at a time as the device will see them."""
    plain = weights.plain(subnet)
    with torch.inference_mode():
        logits = [plain(torch.from_numpy(images[i : i + 1])) for i in range(len(images))]
        return np.asarray(torch.cat(logits).numpy())


def gate(
    expected: Logits,
    graphs: dict[Dialect, Path],
    subnet: Subnet,
    precision: Precision,
    batch: Batch,
    images: NDArray[np.float32],
    backend: Backend,
) -> tuple[Parity, Logits]:
    """Run every dialect's graph and compare; returns the record and the logits of the backend's own dialect.

    Raises ParityError with the figures where a graph differs by more than the precision allows.
    """
    name = f"{subnet.name}-{precision.name}"
    results: dict[Dialect, tuple[Agreement, Logits]] = {}
    for dialect, path in graphs.items():
        opened = model(name, path, batch, subnet.geometry)
        with backend.open(opened, Options()) as session:
            logits = run_all(session, opened, images)
        found = agreement(expected, logits, precision.tolerance)
        results[dialect] = found, logits
        if not found.within or (precision.exact_top1 and found.top1_agreement < 1):
            raise ParityError(
                f"{name} ({dialect}) does not compute what the supernet computes: largest logit difference "
                f"{found.max_difference:.2e} of the largest |logit| ({precision.tolerance:.0e} allowed), "
                f"top-1 equal on {found.top1_agreement:.1%} of {found.samples} samples",
                hint="no bundle was written; where the weights overflow a narrow type, export them in fp32",
            )
    compared = [found for found, _ in results.values()]
    parity = Parity(
        samples=len(images),
        max_difference=max(found.max_difference for found in compared),
        tolerance=precision.tolerance,
        top1_agreement=min(found.top1_agreement for found in compared),
    )
    return parity, results[backend.dialect][1]
