"""Whether the profiler's latency is the application's: against a loop over the bare runtime, and against benchmark_app.

python benchmarks/agreement.py [--heads 6] [--rounds 10] [--threads 2]

In one run, a fresh process each, in turns whose order alternates:

    profile     the whole profiler on an artifact, its monitor at work
    loop        a script of a few lines over onnxruntime.InferenceSession, which knows nothing of hydradeploy
    ours        the profiler's measuring code over OpenVINO, by a backend of a few lines in this file
    app         OpenVINO's benchmark_app, synchronous, one stream, the same precision and threads

The parent's and the monitor's processor time are taken meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from common import machine, ratio_interval, stack, supernet_file, write_csv

import hydradeploy
from hydradeploy import export, open_bundle
from hydradeploy.profiler import monitor
from hydradeploy.profiler.child import Request, spawn
from hydradeploy.profiler.monitor import Watch
from hydradeploy.profiler.profile import Order
from hydradeploy.profiler.sampling import Measured

LOOP = """
import json, sys, time
import numpy as np, onnxruntime

graph, batches, threads, count = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
for number in range(6):
    session.run(None, {"image": batches[number % len(batches)]})
seconds = []
for number in range(count):
    images = batches[number % len(batches)]
    begun = time.perf_counter()
    session.run(None, {"image": images})
    seconds.append(time.perf_counter() - begun)
print(json.dumps(seconds))
"""

OURS = """
import json, sys
import numpy as np, openvino
from hydradeploy.backends import Model, Options
from hydradeploy.profiler.sampling import Sampling, measure
from hydradeploy.spec import Preprocessing

graph, batches, threads, count = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Session:
    def __init__(self):
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    def __enter__(self): return self
    def __exit__(self, *_): self.request = None
    def run(self, images): return self.request.infer({"image": images}, share_inputs=True)["logits"]
    def facts(self): return {}

class OpenVino:
    name, dialect, processor = "openvino", "ort", "cpu"
    def prepare(self): pass
    def open(self, model, options): return Session()

sampling = Sampling(warmup=5, warmup_s=0.0, samples=count, seconds=0.0, at_most=count)
model = Model("graph", graph, 1, batches.shape[2:], 1000, input="uint8")
nothing = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, interpolation="bicubic")
found = measure(OpenVino(), model, Options(threads), batches, nothing, sampling)
print(json.dumps(found.latency_s))
"""


def graph_of(request: Request) -> str:
    """The file that a request's artifact is computed from."""
    bundle = open_bundle(Path(request.bundle), "manifest")
    return str(bundle.graph(bundle.artifact(request.artifact), "ort"))


@dataclass
class Turns:
    """Launches the profiler's child and the three others after or before it, and keeps what each said."""

    threads: int
    samples: dict[str, list[list[float]]] = field(default_factory=dict)
    parent_cpu_s: float = 0.0
    parent_wall_s: float = 0.0

    def __call__(self, request: Request, **how: object) -> Measured:
        count = request.sampling.samples
        turns = {
            "loop": lambda: self._script(LOOP, request, count),
            "ours": lambda: self._script(OURS, request, count),
            "app": lambda: self._app(request, count),
        }
        backwards = len(self.samples.get("profile", ())) % 2
        before, after = (("ours", "loop"), ("app",)) if backwards else (("app",), ("loop", "ours"))
        for name in before:
            self.samples.setdefault(name, []).append(turns[name]())
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        measured = spawn(request, **how)  # type: ignore[arg-type]
        self.parent_cpu_s += time.process_time() - cpu_s
        self.parent_wall_s += time.perf_counter() - wall_s
        self.samples.setdefault("profile", []).append(list(measured.latency_s))
        for name in after:
            self.samples.setdefault(name, []).append(turns[name]())
        print({name: round(1e3 * median(values[-1]), 2) for name, values in self.samples.items()}, flush=True)
        return measured

    def _script(self, script: str, request: Request, count: int) -> list[float]:
        command = [sys.executable, "-c", script, graph_of(request), request.batches, str(request.threads), str(count)]
        environment = os.environ | {"PYTHONPATH": str(Path(hydradeploy.__file__).parents[1])}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return list(json.loads(ran.stdout.splitlines()[-1]))

    def _app(self, request: Request, count: int) -> list[float]:
        """Its median only: it tells no samples."""
        app = Path(sys.executable).with_name("benchmark_app")
        command = [str(app), "-m", graph_of(request), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"]
        command += ["-nthreads", str(request.threads), "-infer_precision", "f32", "-niter", str(count)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"Median:\s+([0-9.]+) ms", ran.stdout)
        assert found is not None, ran.stdout
        return [float(found[1]) / 1e3]


@contextmanager
def kept(watches: list[Watch]) -> Iterator[Watch]:
    """The profiler's own monitor, remembered so that its cost can be told."""
    with monitor.watching("cpu") as watch:
        watches.append(watch)
        yield watch


def row(name: str, one: str, other: str, turns: Turns) -> dict[str, object]:
    """Medians of the pooled samples and the ratio of the medians of each round."""
    a, b = turns.samples[one], turns.samples[other]
    ratio, low, high = ratio_interval([median(x) / median(y) for x, y in zip(a, b, strict=True)])
    pooled = [median(value for values in samples for value in values) for samples in (a, b)]
    return {
        "compared": name,
        "rounds": len(a),
        "threads": turns.threads,
        "first_ms": round(1e3 * pooled[0], 3),
        "second_ms": round(1e3 * pooled[1], 3),
        "pooled_ratio": round(pooled[0] / pooled[1], 4),
        "ratio": round(ratio, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    turns = Turns(options.threads)
    watches: list[Watch] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # Of pixels, so that nobody has to prepare them.
        export(supernet_file(directory), directory / "bundle", heads=(options.heads,), input="uint8")
        assert open_bundle(directory / "bundle").manifest.artifacts
        order = Order(preset="standard", threads=(options.threads,), max_time_s=600.0)
        done = hydradeploy.profile(
            directory / "bundle", directory / "profiles", order, launch=turns, watch=lambda: kept(watches)
        )
    rows = [
        row("profile / loop (onnxruntime)", "profile", "loop", turns),
        row("ours / benchmark_app (openvino)", "ours", "app", turns),
    ]
    cost = watches[0].cost
    assert cost is not None
    shares = {
        "parent_core_share": round(turns.parent_cpu_s / turns.parent_wall_s, 5),
        "monitor_core_share": round(cost.share, 5),
    }
    for found in rows:
        print(found)
    print(shares, done.cells[0].flags, done.cells[0].remarks)
    write_csv(f"agreement-{machine()}-{stack('onnxruntime', 'openvino')}", [found | shares for found in rows])


if __name__ == "__main__":
    main()
