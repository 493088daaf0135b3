"""What sharing one weights file costs at run time, against the same graphs with their own weights.

    python benchmarks/shared_weights.py [--rounds 10] [--heads 3,6,9,12]

Every figure is of a fresh process that opens one graph in ONNX Runtime; shared and standalone alternate, and which
goes first changes from round to round. Ratios are shared / standalone per round, their median with a 95 % bootstrap
interval. `load_s` opens the session with the files in the page cache, `cold_load_s` after they were dropped from it.
`peak_bytes` is the process's high-water mark less what it was before the graph was opened.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, ratio_interval, stack, supernet_file, write_csv

FIGURES = ("latency_s", "load_s", "cold_load_s", "first_s", "peak_bytes")


def high_water_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def child(bundle: Path, artifact: str, runs: int) -> None:
    """Open one artifact and run it; print the figures."""
    import numpy as np
    import onnxruntime  # noqa: F401  # its own import is not part of what is measured

    from hydradeploy.backends import Options, backend, model_of
    from hydradeploy.bundle import open_bundle

    opened, runner = open_bundle(bundle, "manifest"), backend("onnxruntime")
    model = model_of(opened, opened.artifact(artifact), runner.dialect)
    image = np.random.default_rng(0).normal(size=(1, *model.image_shape)).astype(np.float32)
    before = high_water_bytes()
    started = time.perf_counter()
    with runner.open(model, Options()) as session:
        loaded = time.perf_counter()
        session.run(image)
        first = time.perf_counter()
        samples = []
        for _ in range(runs):
            start = time.perf_counter()
            session.run(image)
            samples.append(time.perf_counter() - start)
    figures = {"load_s": loaded - started, "first_s": first - loaded, "peak_bytes": high_water_bytes() - before}
    print(json.dumps(figures | {"latency_s": statistics.median(samples) if samples else None}))


def measure(bundle: Path, artifact: str, runs: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(bundle), artifact, str(runs)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return figures


def drop_from_cache(bundle: Path) -> None:
    """Ask the kernel to forget the files' pages (they are clean: export synced them)."""
    for path in bundle.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one_round(bundles: dict[str, Path], artifact: str, heads: int, turn: int) -> dict[str, dict[str, float]]:
    """Both variants, the other one first in every other round."""
    order = list(bundles) if turn % 2 == 0 else list(bundles)[::-1]
    figures: dict[str, dict[str, float]] = {}
    for variant in order:
        drop_from_cache(bundles[variant])
        cold = measure(bundles[variant], artifact, 0)["load_s"]
        figures[variant] = measure(bundles[variant], artifact, 120 // heads) | {"cold_load_s": cold}
    return figures


def summary(artifact: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    row: dict[str, object] = {"machine": machine(), "artifact": artifact, "rounds": len(rounds)}
    for figure in FIGURES:
        for variant in ("shared", "standalone"):
            value = statistics.median(r[variant][figure] for r in rounds)
            row[f"{figure}_{variant}"] = round(value, 5) if figure.endswith("_s") else int(value)
        ratio, low, high = ratio_interval([r["shared"][figure] / r["standalone"][figure] for r in rounds])
        row |= {f"{figure}_ratio": round(ratio, 3), f"{figure}_low": round(low, 3), f"{figure}_high": round(high, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--heads", default="3-12")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1], int(arguments.child[2]))
        return
    from hydradeploy import export
    from hydradeploy.spec import parse_heads

    heads = parse_heads(arguments.heads)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        supernet = supernet_file(root)
        bundles = {"shared": root / "shared", "standalone": root / "standalone"}
        # The shared file always holds the largest subnet, or there would be nothing to cut.
        export(supernet, bundles["shared"], heads=sorted({*heads, 12}))
        export(supernet, bundles["standalone"], heads=heads, standalone=True)
        rows = []
        for k in heads:
            artifact = f"h{k:02d}-fp32"
            rows.append(summary(artifact, [one_round(bundles, artifact, k, turn) for turn in range(arguments.rounds)]))
            print(json.dumps(rows[-1]), file=sys.stderr)
    write_csv(f"shared_weights-{machine()}-{stack('onnxruntime')}", rows)


if __name__ == "__main__":
    main()
