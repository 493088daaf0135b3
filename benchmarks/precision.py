"""What each precision costs in top-1, on the same images as fp32.

    python benchmarks/precision.py SUPERNET [--data glyphs] [--heads 3,6,9,12] [--max-drop 0.5pp]

Exports every precision, evaluates all of them on the test split, and compares each with its fp32 twin image by image:
the difference with a 95 % interval, how many images only one of the two had right, and McNemar's exact p.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import machine, stack, write_csv

import hydradeploy
from hydradeploy.bundle import AccuracyRow
from hydradeploy.exporter.precision import PRECISIONS
from hydradeploy.exporter.quantise import Quantising
from hydradeploy.spec import parse_heads
from hydradeploy.stats.proportions import mcnemar
from hydradeploy.units import FRACTION, parse


def right(row: AccuracyRow) -> np.ndarray:
    """Whether each image was answered rightly."""
    assert row.right is not None
    return np.unpackbits(np.frombuffer(row.right, np.uint8), count=row.n).astype(bool)


def compared(bundle: Path, rows: tuple[AccuracyRow, ...]) -> Iterator[dict[str, object]]:
    artifacts = {a.name: a for a in hydradeploy.open_bundle(bundle).manifest.artifacts}
    twins = {artifacts[row.artifact].heads: right(row) for row in rows if artifacts[row.artifact].precision == "fp32"}
    for row in rows:
        artifact, own = artifacts[row.artifact], right(row)
        twin = twins[artifact.heads]
        lost, won = int((twin & ~own).sum()), int((own & ~twin).sum())
        drop = (lost - won) / row.n
        half = 1.96 * math.sqrt(max(lost + won - (lost - won) ** 2 / row.n, 0)) / row.n
        found = artifact.quantisation
        yield {
            "artifact": row.artifact,
            "backend": row.backend,
            "instruction_set": row.instruction_set,
            "n": row.n,
            "top1": round(row.top1, 5),
            "drop_pp": round(100 * drop, 3),
            "drop_low_pp": round(100 * (drop - half), 3),
            "drop_high_pp": round(100 * (drop + half), 3),
            "only_fp32_right": lost,
            "only_it_right": won,
            "p": f"{mcnemar(lost, won):.3g}",
            "kept_in_float": 0 if found is None else len(found.kept),
            "cosine_at_export": round(artifact.parity.cosine, 6),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("supernet", type=Path)
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--heads", default="3,6,9,12")
    parser.add_argument("--max-drop", default="0.5pp")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "bundle"
        hydradeploy.export(
            arguments.supernet,
            bundle,
            heads=parse_heads(arguments.heads),
            precisions=tuple(PRECISIONS),
            data=arguments.data,
            quantising=Quantising(max_drop=parse(arguments.max_drop, FRACTION)),
        )
        found = hydradeploy.evaluate(bundle, arguments.data, limit=arguments.limit)
        rows = list(compared(bundle, found.rows))
    for row in rows:
        print(row, file=sys.stderr)
    write_csv(f"precision-{arguments.data}-{machine()}-{stack('onnxruntime')}", rows)


if __name__ == "__main__":
    main()
