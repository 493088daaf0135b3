"""What sharing one weights file costs at run time, against the same graphs with their own weights.

    python benchmarks/shared_weights.py [--rounds 8] [--heads 3,6,9,12]

Each round starts one fresh process per variant. They open their graph one after the other (which is first changes from
round to round), then run in turns of a few inferences, so that whatever else the machine does meets both alike. The
waiting one is stopped (SIGSTOP), because its spinning threads would slow the other. A round's latency ratio is the
median over its pairs of turns; ratios are shared / standalone, given as the median over rounds with a 95 % bootstrap
interval over rounds.

`load_s` opens the session with the files in the page cache, `cold_load_s` after they were dropped from it, `first_s` is
the first inference. `peak_bytes` is the process's high-water mark less what it was before the graph was opened.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from common import (
    DEIT_B,
    RESULTS,
    TINY,
    Worker,
    answer,
    machine,
    questions,
    ratio_interval,
    stack,
    supernet_file,
    write_csv,
)

from hydradeploy.spec import parse_heads

TURNS = 8
FIGURES = ("latency_s", "load_s", "cold_load_s", "first_s", "peak_bytes")


def high_water_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def child(bundle: str, artifact: str) -> None:
    """Open one artifact and say the figures, then answer each number with the seconds of that many runs."""
    import numpy as np
    import onnxruntime  # noqa: F401  # its own import is not part of what is measured

    from hydradeploy.backends import Options, backend, model_of
    from hydradeploy.bundle import open_bundle

    opened, runner = open_bundle(Path(bundle), "manifest"), backend("onnxruntime")
    model = model_of(opened, opened.artifact(artifact), runner.dialect)
    image = np.random.default_rng(0).normal(size=(1, *model.image_shape)).astype(np.float32)
    before = high_water_bytes()
    started = time.perf_counter()
    with runner.open(model, Options()) as session:
        loaded = time.perf_counter()
        session.run(image)
        first = time.perf_counter() - loaded
        answer({"load_s": loaded - started, "first_s": first, "peak_bytes": high_water_bytes() - before})
        for runs in questions():
            samples = []
            for _ in range(runs):
                start = time.perf_counter()
                session.run(image)
                samples.append(time.perf_counter() - start)
            answer(samples)


def drop_from_cache(bundle: Path) -> None:
    """Ask the kernel to forget the files' pages (they are clean: export synced them)."""
    for path in bundle.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one_round(bundles: dict[str, Path], artifact: str, heads: int, number: int) -> dict[str, dict[str, float]]:
    """All figures of both variants; `latency_s` of the ratio is paired turn by turn."""
    order = list(bundles) if number % 2 == 0 else list(bundles)[::-1]
    cold = {}
    for variant in order:
        drop_from_cache(bundles[variant])
        with opening(bundles[variant], artifact) as worker:
            cold[variant] = worker.ready["load_s"]
    turns: dict[str, list[float]] = {variant: [] for variant in order}
    with ExitStack() as kept:
        workers = {variant: kept.enter_context(opening(bundles[variant], artifact)) for variant in order}
        for turn in range(TURNS):
            for variant in order if turn % 2 == 0 else order[::-1]:
                # Two that settle caches come first.
                samples = workers[variant].ask(max(3, 30 // heads) + 2)[2:]
                turns[variant].append(statistics.median(samples))
    ratio = statistics.median(a / b for a, b in zip(turns["shared"], turns["standalone"], strict=True))
    return {
        variant: worker.ready
        | {"latency_s": statistics.median(turns[variant]), "paired_ratio": ratio, "cold_load_s": cold[variant]}
        for variant, worker in workers.items()
    }


def opening(bundle: Path, artifact: str) -> Worker:
    """A process that has the artifact open."""
    return Worker(__file__, {"bundle": str(bundle), "artifact": artifact})


def summary(artifact: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    row: dict[str, object] = {"machine": machine(), "artifact": artifact, "rounds": len(rounds)}
    for figure in FIGURES:
        for variant in ("shared", "standalone"):
            value = statistics.median(r[variant][figure] for r in rounds)
            row[f"{figure}_{variant}"] = round(value, 5) if figure.endswith("_s") else int(value)
        ratios = [r["shared"][figure] / r["standalone"][figure] for r in rounds]
        if figure == "latency_s":
            ratios = [r["shared"]["paired_ratio"] for r in rounds]
        ratio, low, high = ratio_interval(ratios)
        row |= {f"{figure}_ratio": round(ratio, 3), f"{figure}_low": round(low, 3), f"{figure}_high": round(high, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--heads", type=parse_heads, default=tuple(range(3, 13)))
    parser.add_argument("--tiny", action="store_true", help="a supernet so small that figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV goes")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(**options.child)
        return
    from hydradeploy import export

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        supernet = supernet_file(root, TINY if options.tiny else DEIT_B)
        bundles = {"shared": root / "shared", "standalone": root / "standalone"}
        # The shared file always holds the largest subnet, or there would be nothing to cut.
        export(supernet, bundles["shared"], heads=sorted({*options.heads, 12}))
        export(supernet, bundles["standalone"], heads=options.heads, standalone=True)
        rows = []
        for k in options.heads:
            artifact = f"h{k:02d}-fp32"
            rows.append(summary(artifact, [one_round(bundles, artifact, k, turn) for turn in range(options.rounds)]))
            print(json.dumps(rows[-1]), file=sys.stderr)
    file = f"shared_weights-{'tiny-' if options.tiny else ''}{machine()}-{stack('onnxruntime')}"
    write_csv(file, rows, options.results)


if __name__ == "__main__":
    main()
