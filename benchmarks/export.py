"""How long ten subnets of a DeiT-B-sized supernet take to write, and how many bytes they are.

    python benchmarks/export.py [--rounds 5]

Each round is a fresh process. `write_s` is from the call to the last graph on disk (reading and hashing the supernet
included, imports and parity not), `parity_s` the gate with its runs in torch and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, stack, supernet_file, write_csv


def child(supernet: Path, bundle: Path) -> None:
    """One export, timed by its own progress reports."""
    started = time.perf_counter()
    from hydradeploy.exporter.export import export

    imported = time.perf_counter()
    written = imported

    def report(what: str, done: int, total: int) -> None:
        nonlocal written
        if what.startswith("writing"):
            written = time.perf_counter()

    export(supernet, bundle, report=report)
    ended = time.perf_counter()
    print(json.dumps({"import_s": imported - started, "write_s": written - imported, "parity_s": ended - written}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as directory:
        supernet, bundle = supernet_file(Path(directory)), Path(directory) / "bundle"
        rounds = []
        for _ in range(arguments.rounds):
            shutil.rmtree(bundle, ignore_errors=True)
            command = [sys.executable, __file__, "--child", str(supernet), str(bundle)]
            rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(rounds[-1], file=sys.stderr)
        written = sum(p.stat().st_size for p in bundle.iterdir() if p.suffix in (".onnx", ".weights"))
        row = {
            "machine": machine(),
            "rounds": len(rounds),
            **{key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]},
            "write_s_max": round(max(r["write_s"] for r in rounds), 3),
            "supernet_bytes": supernet.stat().st_size,
            "graphs_and_weights_bytes": written,
            "ratio": round(written / supernet.stat().st_size, 5),
        }
    print(row)
    write_csv(f"export-{machine()}-{stack('onnx', 'torch')}", [row])


if __name__ == "__main__":
    main()
