"""What the benchmarks share: a DeiT-B-sized supernet, the machine's name, medians with intervals, CSV."""

from __future__ import annotations

import csv
import platform
import random
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def supernet_file(directory: Path) -> Path:
    """A supernet of DeiT-B's size, heads 3 to 12, with random weights."""
    import torch

    from hydradeploy.spec import IMAGENET_MEAN, IMAGENET_STD, Geometry, Preprocessing, Spec
    from hydradeploy.supernet.model import Supernet
    from hydradeploy.supernet.store import save

    geometry = Geometry(
        image_size=224,
        patch_size=16,
        channels=3,
        head_dim=64,
        heads=12,
        trained_heads=tuple(range(3, 13)),
        depth=12,
        mlp_ratio=4.0,
        classes=1000,
        eps=1e-6,
    )
    preprocessing = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=0.875, interpolation="bicubic")
    model = Supernet(geometry).initialise(torch.Generator().manual_seed(0))
    path = directory / "supernet.safetensors"
    save(path, Spec(geometry=geometry, preprocessing=preprocessing), model.state_dict())
    return path


def machine() -> str:
    """The processor and how many of it: amd-epyc-2c."""
    import psutil

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2]
            break
    short = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|cpu|processor|@.*", "", name.lower())).strip("-")
    return f"{short}-{len(psutil.Process().cpu_affinity() or [])}c"


def stack(*packages: str) -> str:
    """Package versions for a file name: onnxruntime-1.32.0."""
    return "-".join(f"{package}-{version(package)}" for package in packages)


def ratio_interval(ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of per-round ratios and its bootstrap interval."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    tail = (1 - confidence) / 2
    low, high = medians[int(tail * len(medians))], medians[int((1 - tail) * len(medians)) - 1]
    return statistics.median(ratios), low, high


def write_csv(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """One row per measured thing, under the name of the machine and the stack."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}", file=sys.stderr)
    return path
