"""How long `profile` takes on ten subnets of a DeiT-B-sized supernet, and what it says of them.

python benchmarks/profiling.py [--preset quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from common import machine, stack, supernet_file, write_csv

from hydradeploy import export, profile
from hydradeploy.profiler.profile import Order
from hydradeploy.stats.latency import bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        export(supernet_file(directory), directory / "bundle")
        started = time.perf_counter()
        done = profile(directory / "bundle", directory / "profiles", Order(preset=options.preset))
        wall_s = time.perf_counter() - started
    print(f"{options.preset}: {wall_s:.0f} s")
    rows = []
    for cell in done.cells:
        found = bounds(cell.latency_s, cell.process, 0.95, 0.95)
        rows.append(
            {
                "artifact": cell.artifact,
                "preset": options.preset,
                "wall_s_of_all": round(wall_s, 1),
                "p50_ms": round(1e3 * median(cell.latency_s), 2),
                "p95_ms": round(1e3 * found.estimate, 2),
                "p95_upper_ms": "" if found.upper is None else round(1e3 * found.upper, 2),
                "n": found.n,
                "n_effective": round(found.n_effective, 1),
                "spread": "" if found.spread is None else round(found.spread, 4),
                "load_ms": round(1e3 * median(cell.load_s), 1),
                "memory_mib": "" if cell.memory_bytes is None else round(cell.memory_bytes / 2**20, 1),
            }
        )
        print(rows[-1], flush=True)
    write_csv(f"profile-{machine()}-{stack('onnxruntime')}", rows)


if __name__ == "__main__":
    main()
