"""How long picking takes: the command's wall time, and the selection alone over 100,000 synthetic cells.

    python benchmarks/pick.py [--rounds 10] [--cells 100000]

The command runs in a fresh process each time, on a DeiT-B-sized bundle whose profile holds as many samples as `quick`
and as `standard` take. The latencies are synthetic: picking does not care, and the true ones take hours.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from common import machine, supernet_file, write_csv

from hydradeploy import export
from hydradeploy.bundle import AccuracyRow, Artifact, Bundle, write_accuracy
from hydradeploy.devices import machine as device
from hydradeploy.measurements import Cell, Profile, add_profile
from hydradeploy.profiler.presets import PRESETS
from hydradeploy.selector.budget import Budget, LatencyLimit
from hydradeploy.selector.choose import choose
from hydradeploy.selector.judge import Candidate

IMAGES = 50_000


def cell(artifact: Artifact, rounds: int, samples: int, level_s: float, threads: int, generator: random.Random) -> Cell:
    """A synthetic cell: levels of processes differ by 2 %, calls by 5 %."""
    levels = [level_s * generator.lognormvariate(0, 0.02) for _ in range(rounds)]
    return Cell(
        artifact=artifact.name,
        graph_sha256=artifact.graph_sha256,
        backend="onnxruntime",
        processor="cpu",
        compute_type=artifact.precision,
        input="float32",
        batch=1,
        threads=threads,
        regime="saturated",
        measured_at="2026-01-01T00:00:00+00:00",
        latency_s=tuple(level * generator.lognormvariate(0, 0.05) for level in levels for _ in range(samples)),
        process=tuple(number for number in range(rounds) for _ in range(samples)),
        load_s=(0.1,) * rounds,
        first_s=(0.1,) * rounds,
        memory_bytes=artifact.size_bytes,
    )


def row(artifact: Artifact, generator: random.Random) -> AccuracyRow:
    """Synthetic accuracy, rising with the head count, on as many images as ImageNet's validation set has."""
    share = 0.68 + 0.012 * artifact.heads
    right = bytearray(IMAGES // 8)
    correct = 0
    for i in range(IMAGES):
        if generator.random() < share:
            right[i // 8] |= 128 >> i % 8
            correct += 1
    return AccuracyRow(
        artifact=artifact.name,
        sha256=artifact.sha256,
        backend="onnxruntime",
        compute_type=artifact.precision,
        instruction_set="x86_64-avx2",
        input="float32",
        dataset="synthetic",
        data_sha256="0" * 64,
        correct=correct,
        n=IMAGES,
        top1=correct / IMAGES,
        lower=correct / IMAGES - 0.004,
        upper=correct / IMAGES + 0.004,
        source="measured",
        right=bytes(right),
        outcomes=None,
    )


def command(directory: Path, bundle: Bundle, preset: str, rounds: int) -> dict[str, object]:
    """Wall time of the command over a profile of that size."""
    generator, here = random.Random(0), device()
    count = PRESETS[preset]
    artifacts = bundle.manifest.artifacts
    cells = tuple(
        cell(a, count.rounds, count.sampling.samples, a.macs / 50e9, threads, generator)
        for a in artifacts
        for threads in (1, 2)
    )
    profiles = directory / preset
    profiles.mkdir()
    add_profile(profiles, Profile(device=here.identity(), conditions=here.conditions({}), cells=cells))
    words = ["pick", "--latency", "200ms", "--bundle", str(bundle.path), "--profiles", str(profiles)]
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        ran = subprocess.run([Path(sys.executable).with_name("hydradeploy"), *words], capture_output=True, text=True)
        taken.append(time.perf_counter() - started)
        assert ran.returncode == 0, ran.stderr
    return figures(f"command, {len(cells)} cells of {count.samples} samples", taken)


def selection(bundle: Bundle, count: int, rounds: int) -> list[dict[str, object]]:
    """The selection alone, over budgets that most, some, few and no cells meet."""
    generator = random.Random(0)
    artifacts = bundle.manifest.artifacts
    rows = {artifact.name: row(artifact, generator) for artifact in artifacts}
    candidates = []
    for number in range(count):
        artifact = artifacts[number % len(artifacts)]
        level = artifact.macs / 50e9 * generator.uniform(0.5, 2)
        candidates.append(Candidate(cell(artifact, 5, 20, level, number + 1, generator), artifact, rows[artifact.name]))
    found = []
    for name, limit_s in (("most fit", 0.5), ("some fit", 0.1), ("few fit", 0.015), ("none fits", 0.005)):
        budget = Budget(latency=(LatencyLimit(percentile=0.95, limit_s=limit_s),))
        taken, verdict = [], ""
        for _ in range(rounds):
            fresh = [Candidate(c.cell, c.artifact, c.accuracy) for c in candidates]
            started = time.perf_counter()
            verdict = choose(fresh, budget).verdict
            taken.append(time.perf_counter() - started)
        found.append(figures(f"choose over {count} cells of 100 samples, {name}: {verdict}", taken))
    return found


def figures(what: str, taken: list[float]) -> dict[str, object]:
    """A row of the result."""
    found = {"what": what, "median_s": round(statistics.median(taken), 4), "slowest_s": round(max(taken), 4)}
    print(found, flush=True)
    return found | {"rounds": len(taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cells", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bundle = export(supernet_file(directory), directory / "bundle")
        generator = random.Random(0)
        write_accuracy(bundle, {row(a, generator): None for a in bundle.manifest.artifacts})
        rows = [command(directory, bundle, preset, options.rounds) for preset in ("quick", "standard")]
        rows += selection(bundle, options.cells, 5)
    write_csv(
        f"pick-{machine()}-python-{sys.version_info.major}.{sys.version_info.minor}-msgspec-{msgspec.__version__}", rows
    )


if __name__ == "__main__":
    main()
