"""What the benchmarks share: supernets, the machine's name, processes that wait stopped, ratios with intervals, CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from hydradeploy.spec import IMAGENET_MEAN, IMAGENET_STD, Geometry, Preprocessing, Spec
from hydradeploy.training.presets import HYDRAVIT_IMAGENET

RESULTS = Path(__file__).parent / "results"

DEIT_B = HYDRAVIT_IMAGENET.geometry
# As many heads, so that the same options do; it shows that a benchmark works, its figures mean nothing.
TINY = Geometry(
    image_size=32,
    patch_size=8,
    channels=3,
    head_dim=8,
    heads=12,
    trained_heads=tuple(range(3, 13)),
    depth=2,
    mlp_ratio=4.0,
    classes=10,
    eps=1e-6,
)


def supernet_file(directory: Path, geometry: Geometry = DEIT_B) -> Path:
    """A supernet of DeiT-B's size, heads 3 to 12, with random weights."""
    import torch

    from hydradeploy.supernet.model import Supernet
    from hydradeploy.supernet.store import save

    preprocessing = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=0.875, interpolation="bicubic")
    model = Supernet(geometry).initialise(torch.Generator().manual_seed(0))
    path = directory / "supernet.safetensors"
    save(path, Spec(geometry=geometry, preprocessing=preprocessing), model.state_dict())
    return path


def images_file(directory: Path, spec: Spec, count: int) -> Path:
    """An .npz file of synthetic images to calibrate with; others than those that artifacts are compared on."""
    import numpy as np

    from hydradeploy.data import samples

    path = directory / "images.npz"
    np.savez(path, images=samples.synthetic(spec, count, seed=1).images)
    return path


def machine() -> str:
    """The processor, the widest instructions it has, and how many of it: amd-epyc-avx2-2c.

    Virtual machines give processors of one family a single name, and int8 is twice as fast with VNNI.
    """
    import psutil

    from hydradeploy.devices.cpu import instruction_set

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2]
            break
    short = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|cpu|processor|@.*", "", name.lower())).strip("-")
    widest = instruction_set().partition("-")[2].replace("_", "-")
    cores = f"{len(psutil.Process().cpu_affinity() or [])}c"
    return "-".join(part for part in (short, widest, cores) if part)


def gpu() -> str:
    """The first GPU by its name: nvidia-h200."""
    import torch

    return "-".join(torch.cuda.get_device_name().lower().split())


def stack(*packages: str) -> str:
    """Package versions for a file name: onnxruntime-1.32.0."""
    return "-".join(f"{package}-{version(package)}" for package in packages)


class Worker:
    """A script's child process: it prints a line of JSON when it is ready and one for each that it is sent.

    Whenever it owes no answer it is stopped (SIGSTOP), because the spinning threads of one that waits slow the others.
    """

    def __init__(self, script: str, request: Mapping[str, object], environment: Mapping[str, str] = {}) -> None:
        command = [sys.executable, script, "--child", json.dumps(request)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1", **environment},
        )
        self.ready: Any = self._answer()

    def ask(self, question: object) -> Any:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def answer(value: object) -> None:
    """Say something to the process that started this one."""
    print(json.dumps(value), flush=True)


def questions() -> Iterable[Any]:
    """What the process that started this one asks, until it asks no more."""
    return map(json.loads, sys.stdin)


def ratio_interval(ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of per-round ratios and its bootstrap interval."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    tail = (1 - confidence) / 2
    low, high = medians[int(tail * len(medians))], medians[int((1 - tail) * len(medians)) - 1]
    return statistics.median(ratios), low, high


def write_csv(name: str, rows: Sequence[Mapping[str, object]], directory: Path = RESULTS) -> Path:
    """One row per measured thing, under the name of the machine and the stack."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}", file=sys.stderr)
    return path


def read_csv(name: str, directory: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of an earlier run, none where there was none."""
    path = directory / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
