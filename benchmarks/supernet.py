"""The paper's experiment at small scale: one supernet against ViTs trained one by one, and against other ways to nest.

    python benchmarks/supernet.py                    every run that the file of results lacks, then the report
    python benchmarks/supernet.py --report           the report alone
    python benchmarks/supernet.py --runs hydravit,single-03 --seeds 0
    python benchmarks/supernet.py --device cuda --jobs 12    so many runs at a time

A run that is stopped goes on where it was; each appends its rows to one CSV when it ends, whatever machine it ran on.
The report is a table with intervals over the seeds, what the paper claims held against it, and the picture of accuracy
over MACs.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import RESULTS, gpu, machine
from elastic import DynaBert, Elastic, MatFormer, SortedNet

from hydradeploy import train
from hydradeploy.data.datasets import SPLITS, open_dataset
from hydradeploy.spec import Classifiers, Geometry
from hydradeploy.supernet import store
from hydradeploy.supernet.model import Supernet
from hydradeploy.training import state as states
from hydradeploy.training.batches import source
from hydradeploy.training.loop import arithmetic
from hydradeploy.training.presets import GLYPHS
from hydradeploy.training.ranks import Ranks, ranks
from hydradeploy.training.recipe import Method, Preset, anchors_of
from hydradeploy.training.running import Running
from hydradeploy.training.train import right_of

SINGLES = (3, 6, 12)
CSV = RESULTS / "supernet-glyphs.csv"
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided, by degrees of freedom


@dataclass(frozen=True)
class Run:
    """One training: what is nested how, how it is trained, and at which levels it is tested."""

    what: str
    build: Callable[[Geometry], Supernet] = Supernet
    method: Mapping[str, Any] = field(default_factory=dict)
    alone: int | None = None
    teacher: str | None = None
    classifiers: Classifiers = "shared"


_TAUGHT_SANDWICH: Mapping[str, Any] = {"anchors": "sandwich", "distil": 0.5}
_OTHERS = {
    "matformer": Run("MLP only", MatFormer),
    "dynabert": Run("heads and MLP without the embedding", DynaBert),
    "sortednet": Run("all widths, heads thinned", SortedNet),
}

RUNS: Mapping[str, Run] = {
    "hydravit": Run("the paper's recipe"),
    **{f"single-{k:02d}": Run(f"a ViT of {k} heads trained alone", alone=k) for k in SINGLES},
    "sandwich-distil": Run("smallest, largest and a random subnet, taught by the largest", method=_TAUGHT_SANDWICH),
    **_OTHERS,
    "sandwich": Run("smallest, largest and a random subnet", method={"anchors": "sandwich"}),
    "sandwich-two": Run(
        "smallest, largest and two random subnets, taught by the largest",
        method={**_TAUGHT_SANDWICH, "draws": 2},
    ),
    "anchors": Run(
        "3, 6, 12 heads and a random subnet, taught by the largest", method={"anchors": SINGLES, "distil": 0.5}
    ),
    "anchors-two": Run(
        "3, 6, 12 heads and two random subnets, taught by the largest",
        method={"anchors": SINGLES, "draws": 2, "distil": 0.5},
    ),
    "in-place": Run("largest and a random subnet, taught by the largest", method={"anchors": "largest", "distil": 0.5}),
    "teacher": Run("taught by a ViT of 12 heads", method={"teacher_share": 0.5}, teacher="single-12"),
    "loss-weights": Run(
        "smaller subnets weigh more", method={"loss_weights": (2.0, 1.7, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.7, 0.6)}
    ),
    "loss-aware": Run("subnets of a larger loss are drawn more often", method={"loss_aware": 2.0}),
    "classifiers": Run("a classifier for each head count", classifiers="separate"),
    "no-decay": Run("no decay on what is not drawn", method={"decay_unsampled": False}),
    **{
        f"{name}-sandwich": replace(run, what=f"{run.what}, trained as sandwich-distil is", method=_TAUGHT_SANDWICH)
        for name, run in _OTHERS.items()
    },
}


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=GLYPHS.recipe.epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--data", default="glyphs", help="another data set shows that the benchmark works")
    parser.add_argument("--work", type=Path, default=Path("build/supernet"), help="supernets and states")
    parser.add_argument("--results", type=Path, default=CSV)
    parser.add_argument("--jobs", type=int, default=1, help="processes that make runs")
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    failed = 0
    if asked.jobs > 1 and not asked.report:
        _drawn(asked.data, asked.work)
        command = [sys.executable, *sys.argv, "--jobs", "1"]
        jobs = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(asked.jobs)]
        failed = sum(job.wait() != 0 for job in jobs)
        print(f"{failed} of {asked.jobs} processes failed", file=sys.stderr)
    elif not asked.report:
        data = _drawn(asked.data, asked.work)
        # Seeds first: after a third of the time there is one answer to everything.
        for seed in map(int, asked.seeds.split(",")):
            for name in asked.runs.split(","):
                with _claimed(asked.work, name, seed, asked.epochs, asked.results) as ours:
                    if ours:
                        _run(name, seed, asked.epochs, data, asked.work, asked.results, asked.device)
    report(_read(asked.results), asked.epochs, asked.results)
    if failed:
        sys.exit(1)


def preset_of(name: str, seed: int, epochs: int) -> Preset:
    """The glyphs preset as a run changes it."""
    run = RUNS[name]
    geometry = msgspec.structs.replace(GLYPHS.geometry, classifiers=run.classifiers)
    if run.alone is not None:
        geometry = geometry.alone(run.alone)
    recipe = msgspec.structs.replace(GLYPHS.recipe, epochs=epochs, seed=seed, method=Method(**run.method))
    return msgspec.structs.replace(GLYPHS, geometry=geometry, recipe=recipe)


def macs_of(name: str, level: int, geometry: Geometry) -> int:
    """MACs per image of a level of a run."""
    build = RUNS[name].build
    if isinstance(build, type) and issubclass(build, Elastic):
        with torch.device("meta"):
            return build(geometry).shape(level).macs(geometry)
    return geometry.alone(level).subnet(level).macs


def cost_of(name: str) -> float:
    """MACs per training image of one epoch's forward passes, the mean over what is drawn; a teacher's included."""
    run, geometry = RUNS[name], GLYPHS.geometry
    if run.alone is not None:
        return macs_of(name, run.alone, geometry)
    trained = geometry.trained_heads
    macs = {k: macs_of(name, k, geometry) for k in trained}
    method = Method(**run.method)
    anchors = anchors_of(method, trained)
    others = [macs[k] for k in trained if k not in anchors]
    taught = macs[trained[-1]] if run.teacher else 0
    return sum(macs[k] for k in anchors) + method.draws * statistics.mean(others) + taught


def _drawn(data: str, work: Path) -> Path:
    """The data set in one file, so that each run need not draw it."""
    path = work / f"{Path(data).stem}.npz"
    if path.exists():
        return path
    spec = GLYPHS.spec(open_dataset(data, "train").class_names)
    arrays: dict[str, Any] = {"class_names": np.array(spec.class_names)}
    for split in SPLITS:
        dataset = open_dataset(data, split)
        arrays[f"{split}_images"] = np.stack([dataset.pixels(i, spec) for i in range(len(dataset))])
        arrays[f"{split}_labels"] = dataset.labels
    work.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".part.npz"), **arrays)
    os.replace(path.with_suffix(".part.npz"), path)
    return path


@contextmanager
def _claimed(work: Path, name: str, seed: int, epochs: int, results: Path) -> Iterator[bool]:
    """Whether this run is still to be made, and by this process: the kernel drops another one's claim with it."""
    with (work / f"{name}-{seed}-{epochs}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            made = {(row["run"], row["seed"], row["epochs"]) for row in _read(results)}
            yield (name, str(seed), str(epochs)) not in made


def _run(name: str, seed: int, epochs: int, data: Path, work: Path, results: Path, device: str | None) -> None:
    run, out = RUNS[name], work / f"{name}-{seed}-{epochs}.safetensors"
    teacher = None if run.teacher is None else work / f"{run.teacher}-{seed}-{epochs}.safetensors"
    if teacher is not None and not teacher.exists():
        print(f"{name}, seed {seed}: left out until {run.teacher} is trained here", file=sys.stderr)
        return
    if not out.exists() or states.path_of(out).exists():
        train(
            str(data),
            out,
            preset_of(name, seed, epochs),
            teacher=teacher,
            resume=states.path_of(out).exists(),
            running=Running(device=device, workers=0),
            say=lambda text: print(f"{name}, seed {seed}: {text}", file=sys.stderr, flush=True),
            build=run.build,
        )
    with ranks(device) as us, arithmetic(GLYPHS.recipe, Running(), 1):
        tested, n = _tested(name, out, data, us)
        where = gpu() if us.device.type == "cuda" else machine()
    rows = [
        {"run": name, "seed": seed, "epochs": epochs, "level": level, "macs": macs_of(name, level, GLYPHS.geometry)}
        | {"right": right, "n": n, "training_macs": round(cost_of(name)), "date": date.today().isoformat()}
        | {"machine": where, "torch": torch.__version__}
        for level, right in tested.items()
    ]
    _append(results, rows)


def _tested(name: str, file: Path, data: Path, us: Ranks) -> tuple[dict[int, int], int]:
    """Right answers at each level, of so many. A ViT trained alone is sliced too, at every head count below its own."""
    weights, run = store.load(file), RUNS[name]
    geometry = weights.spec.geometry
    if run.alone is not None:
        levels = tuple(k for k in GLYPHS.geometry.trained_heads if k <= run.alone)
        geometry = msgspec.structs.replace(geometry, trained_heads=levels)
    model = run.build(geometry)
    model.load_state_dict(weights.tensors)
    images = source(open_dataset(str(data), "test"), weights.spec, GLYPHS.recipe, workers=0)
    return right_of(model.to(us.device), images, list(geometry.trained_heads), us), len(images)


def _append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # others may write the first rows too
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if not os.fstat(file.fileno()).st_size:
            writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Curves = dict[str, dict[int, dict[int, float]]]
"""Top-1 in points by run, seed and level."""


def report(rows: Sequence[Mapping[str, str]], epochs: int, path: Path) -> None:
    """Print the table and the claims, draw the picture; of the runs of so many epochs."""
    rows = [row for row in rows if int(row["epochs"]) == epochs]
    curves: Curves = {}
    for row in rows:
        seeds = curves.setdefault(row["run"], {})
        seeds.setdefault(int(row["seed"]), {})[int(row["level"])] = 100 * int(row["right"]) / int(row["n"])
    levels = GLYPHS.geometry.trained_heads
    ten = sum(macs_of("hydravit", k, GLYPHS.geometry) for k in levels)
    print(f"{epochs} epochs; top-1 in points, mean over seeds; cost against ten trainings")
    print("run                seeds  cost " + " ".join(f"{k:>6}" for k in levels))
    for name in RUNS:
        if name not in curves:
            continue
        seeds = curves[name].values()
        means = [
            f"{statistics.mean(curve[k] for curve in seeds):6.2f}" if all(k in c for c in seeds) else "     -"
            for k in levels
        ]
        print(f"{name:18} {len(seeds):5} {cost_of(name) / ten:5.3f} {' '.join(means)}")
    for line in claims(curves):
        print(line)
    if curves:
        _draw(curves, path.with_suffix(".svg"))


def claims(curves: Curves) -> list[str]:
    """Differences in points, paired by seed, with 95 % t intervals over seeds."""
    lines = []
    for name in RUNS:
        if name not in curves or RUNS[name].build is not Supernet or RUNS[name].alone is not None:
            continue
        for k in SINGLES:
            if f"single-{k:02d}" in curves:
                lines.append(_difference(curves, f"{name} - trained alone, {k} heads", name, f"single-{k:02d}", k))
        if name != "hydravit" and "hydravit" in curves:
            lines.append(_difference(curves, f"{name} - paper's recipe, 3 heads", name, "hydravit", 3))
    if "single-12" in curves:
        sliced = [statistics.mean(curve[k] for curve in curves["single-12"].values()) for k in (3, 6, 9)]
        lines.append("trained alone with 12 heads and sliced to 3, 6, 9: " + ", ".join(f"{v:.1f}" for v in sliced))
    for other in _OTHERS:
        taught = [(name, other) for name in ("sandwich-distil", "anchors")]
        pairs = (("hydravit", other), *taught, ("sandwich-distil", f"{other}-sandwich"))
        lines += [_at_equal_macs(curves, *pair) for pair in pairs if all(name in curves for name in pair)]
    return lines


def _difference(curves: Curves, what: str, one: str, other: str, level: int) -> str:
    seeds = sorted(curves[one].keys() & curves[other].keys())
    return f"{what}: {_interval([curves[one][s][level] - curves[other][s][level] for s in seeds])}"


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "no seed in common"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.2f} (one seed)"
    half = T95[min(4, len(values) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}, {len(values)} seeds)"


def _at_equal_macs(curves: Curves, name: str, other: str) -> str:
    """At each level of the other, its top-1 against this one's, interpolated over MACs."""
    geometry = GLYPHS.geometry
    parts = []
    for level in geometry.trained_heads[:-1]:
        macs = macs_of(other, level, geometry)
        own = [macs_of(name, k, geometry) for k in geometry.trained_heads]
        differences = [
            float(np.interp(macs, own, [curves[name][s][k] for k in geometry.trained_heads])) - curves[other][s][level]
            for s in sorted(curves[name].keys() & curves[other].keys())
        ]
        if differences:
            parts.append(f"{macs / 1e6:.1f}M {_interval(differences)}")
    return f"{name} - {other} at equal MACs: {', '.join(parts)}"


def _draw(curves: Curves, path: Path) -> None:
    """Top-1 over MACs: the mean of the seeds and their range."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there is no picture", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, seeds in curves.items():
        levels = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
        if RUNS[name].alone is not None:
            levels = levels[-1:]
        macs = [macs_of(name, k, GLYPHS.geometry) / 1e6 for k in levels]
        points = [[curve[k] for curve in seeds.values()] for k in levels]
        means = [statistics.mean(values) for values in points]
        ranges = [[statistics.mean(v) - min(v) for v in points], [max(v) - statistics.mean(v) for v in points]]
        style = (
            {"marker": "*", "markersize": 12, "linestyle": ""} if len(levels) == 1 else {"marker": "o", "markersize": 3}
        )
        axes.errorbar(macs, means, yerr=ranges, label=name, capsize=2, **style)  # type: ignore[arg-type]
    axes.set_xlabel("MACs per image, millions")
    axes.set_ylabel("top-1 on glyphs, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
