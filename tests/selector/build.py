"""Cells, artifacts, accuracies and profiles made of the few numbers a test is about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import msgspec

from hydradeploy.bundle import AccuracyRow, Artifact, Parity
from hydradeploy.measurements import Cell, Conditions, Device, Profile
from hydradeploy.selector.budget import LatencyLimit
from hydradeploy.selector.judge import Candidate
from hydradeploy.stats.proportions import wilson

MEASURED_AT = "2026-01-01T00:00:00Z"


def digest(text: str) -> str:
    """A hash that differs where the text does."""
    return sha256(text.encode()).hexdigest()


def artifact(heads: int = 3, precision: str = "fp32", **changes: Any) -> Artifact:
    """A subnet's artifact; its hashes follow from its name."""
    name = f"h{heads:02d}-{precision}"
    values: dict[str, Any] = {
        "name": name,
        "heads": heads,
        "precision": precision,
        "dtype": "float16" if precision == "fp16" else "float32",
        "input": "float32",
        "quantisation": None,
        "batch": 1,
        "graphs": {"ort": f"{name}.onnx"},
        "weights": None,
        "sha256": digest(f"content of {name}"),
        "graph_sha256": digest(f"graph of {name}"),
        "parameters": heads * 1000,
        "macs": heads * 10000,
        "size_bytes": heads * 2**20,
        "parity": Parity(
            samples=1, max_difference=0.0, tolerance=0.1, cosine=1.0, least_cosine=0.99, top1_agreement=1.0
        ),
    }
    return Artifact(**(values | changes))


def latencies(*levels_s: float, n: int = 40, jitter: float = 0.01, seed: int = 0) -> list[list[float]]:
    """Independent samples, `n` of one process per level, each up to `jitter` (a fraction) above its level."""
    draw = random.Random(seed)
    return [[level * (1 + jitter * draw.random()) for _ in range(n)] for level in levels_s]


def cell(of: Artifact, by_process: Sequence[Sequence[float]], **changes: Any) -> Cell:
    """A cell of an artifact, with the latencies of each process in seconds."""
    values: dict[str, Any] = {
        "artifact": of.name,
        "graph_sha256": of.graph_sha256,
        "backend": "onnxruntime",
        "processor": "cpu",
        "compute_type": of.precision,
        "input": "float32",
        "batch": 1,
        "threads": 1,
        "regime": "saturated",
        "measured_at": MEASURED_AT,
        "latency_s": tuple(value for samples in by_process for value in samples),
        "process": tuple(number for number, samples in enumerate(by_process) for _ in samples),
        "load_s": (0.1,) * len(by_process),
        "first_s": (0.2,) * len(by_process),
        "memory_bytes": of.heads * 10 * 2**20,
    }
    return Cell(**(values | changes))


def failed(of: Artifact, error: str = "no kernel for it", **changes: Any) -> Cell:
    """A cell that could not be measured."""
    return cell(of, (), memory_bytes=None, error=error, **changes)


def accuracy(of: Artifact, right: Sequence[bool], **changes: Any) -> AccuracyRow:
    """The measured accuracy of an artifact, from whether it was right on each image."""
    correct, n = sum(right), len(right)
    padded = [*right, *(False,) * (-n % 8)]
    low, high = wilson(correct, n)
    values: dict[str, Any] = {
        "artifact": of.name,
        "sha256": of.sha256,
        "backend": "onnxruntime",
        "compute_type": of.precision,
        "instruction_set": "x86_64-avx2",
        "input": "float32",
        "dataset": "images",
        "data_sha256": digest("images"),
        "correct": correct,
        "n": n,
        "top1": correct / n,
        "lower": low,
        "upper": high,
        "source": "measured",
        "right": bytes(int("".join(map(str, map(int, padded[i : i + 8]))), 2) for i in range(0, len(padded), 8)),
        "outcomes": None,
    }
    return AccuracyRow(**(values | changes))


def declared(of: Artifact, correct: int, n: int, dataset: str = "images") -> AccuracyRow:
    """An accuracy that somebody has written down."""
    row = accuracy(of, [i < correct for i in range(n)], dataset=dataset, source="declared")
    return msgspec.structs.replace(
        row, backend=None, compute_type=None, instruction_set=None, input=None, data_sha256=None, right=None
    )


def share(correct: int, n: int = 200, *, seed: int = 0) -> list[bool]:
    """`correct` of `n` images are right; the same seed makes those of fewer a part of those of more."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    chosen = set(order[:correct])
    return [i in chosen for i in range(n)]


def candidate(
    heads: int = 3,
    by_process: Sequence[Sequence[float]] | None = None,
    right: Sequence[bool] | None = None,
    *,
    size_bytes: int | None = None,
    precision: str = "fp32",
    **changes: Any,
) -> Candidate:
    """A candidate of that many heads; without `right` it has no accuracy, `changes` are the cell's."""
    of = artifact(heads, precision, **({} if size_bytes is None else {"size_bytes": size_bytes}))
    measured = cell(of, latencies(*(0.01,) * 5) if by_process is None else by_process, **changes)
    return Candidate(measured, of, None if right is None else accuracy(of, right))


def limit(percent: float, limit_s: float) -> LatencyLimit:
    """`limit(95, 0.02)` is p95 <= 20 ms."""
    return LatencyLimit(percentile=round(percent / 100, 9), limit_s=limit_s)


def device(**changes: Any) -> Device:
    """Some device that is not this machine."""
    values: dict[str, Any] = {
        "kind": "cpu",
        "name": "Imaginary CPU 9000",
        "architecture": "riscv128",
        "instruction_set": "riscv128-wide",
        "cores": 12,
        "memory_bytes": 2**34,
    }
    return Device(**(values | changes))


def conditions(**changes: Any) -> Conditions:
    """Some conditions."""
    values: dict[str, Any] = {
        "power_mode": None,
        "governor": "performance",
        "affinity": "0-11",
        "quota_cores": None,
        "clocks": None,
        "os": "Linux 9.9",
        "software": {"onnxruntime": "1.0"},
    }
    return Conditions(**(values | changes))


def profile(cells: Sequence[Cell], of: Device | None = None, under: Conditions | None = None) -> Profile:
    """A profile of some device under some conditions."""
    return Profile(device=of or device(), conditions=under or conditions(), cells=tuple(cells))
