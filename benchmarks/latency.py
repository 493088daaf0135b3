"""How fast subnets of a DeiT-B-sized supernet are, against what people use today.

    python benchmarks/latency.py [--heads 3,6,9,12] [--batches 1,8] [--rounds 10] [--only "ours int8"]

torch eager, torch.compile, and torch.onnx.export (dynamo, else defaults) with ONNX Runtime and with OpenVINO, all fp32
and the plain ViT that the subnet is; ours in every precision on every backend for the processor. `--only` takes what
has that text in its name, and the two that ratios are against. Rows go to one CSV, where they replace those of the same
machine, stack, k, batch and name.

Each thing has a process of its own, a fresh one every five rounds. They open one after the other (which is first
changes), then run in turns; who waits is stopped. What does not compute torch eager's logits ends the benchmark. Ratios
are of times, below 1 is faster: the median over rounds of each round's median over its turns, with a 95 % bootstrap
interval over rounds. `load_s` is the time to open without imports; torch.compile opens with its first call, after the
first process with what it cached. `gmac_s` counts what each computes: ours has the class token alone in most of the
last block. `peak_share` is that by `peak_gmac_s`, which the same products reach alone, in fp32 or in int8 (gemm.py), in
the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemm
import things
from common import DEIT_B, RESULTS, TINY, Worker, machine, ratio_interval, read_csv, stack, write_csv
from things import EAGER, EXPORTED, Files, Thing

from hydradeploy.spec import Subnet, parse_heads

TURNS = 2
ROUNDS_OF_A_PROCESS = 5
# For each turn of a thing, and for each product.
TURN_S, PRODUCT_S = 0.5, 0.05
# Between logits and those of torch eager; export asks for 0.99 on its samples.
LEAST_COSINE = 0.98
KEY = ("machine", "stack", "k", "batch", "thing")


@dataclass
class Round:
    """What one round found, by thing: seconds to open, and the median seconds of a call in each turn; by kind of
    products and engine: the seconds of each product."""

    load_s: dict[str, float] = field(default_factory=dict)
    turns: dict[str, list[float]] = field(default_factory=dict)
    products: dict[str, list[list[float]]] = field(default_factory=dict)

    def latency_s(self, thing: str) -> float:
        return statistics.median(self.turns[thing])

    def ratio(self, one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(self.turns[one], self.turns[other], strict=True))


class Cell:
    """The things of one k and batch, measured round by round. One that cannot run here is skipped from then on."""

    def __init__(self, subnet: Subnet, batch: int, found: Sequence[Thing], images: Path) -> None:
        self.subnet, self.batch, self.things, self._images = subnet, batch, list(found), images
        self._cache = {"TORCHINDUCTOR_CACHE_DIR": str(images.parent / "inductor")}

    def products(self, kind: str) -> list[gemm.Product]:
        return gemm.computed_in(kind, gemm.products(self.subnet, self.batch))

    def rounds(self, count: int) -> Iterator[Round]:
        for sitting, start in enumerate(range(0, count, ROUNDS_OF_A_PROCESS)):
            first = sitting % len(self.things)
            with ExitStack() as kept:
                opened = Round()
                workers = self._opened(self.things[first:] + self.things[:first], kept, opened)
                for _ in range(start, min(start + ROUNDS_OF_A_PROCESS, count)):
                    yield self._round(workers, opened.load_s)

    def _round(self, workers: Mapping[str, Worker], load_s: dict[str, float]) -> Round:
        done = Round(load_s)
        for turn in range(TURNS):
            for name in list(workers) if turn % 2 == 0 else list(workers)[::-1]:
                done.turns.setdefault(name, []).append(workers[name].ask(TURN_S))
            if turn == 0:
                done.products = self._products()
        return done

    def _opened(self, order: Sequence[Thing], kept: ExitStack, done: Round) -> dict[str, Worker]:
        workers, logits = {}, {}
        for thing in order:
            request = {"images": str(self._images), "kind": thing.kind, "arguments": thing.arguments}
            worker = kept.enter_context(Worker(things.__file__, request, self._cache))
            if "skipped" in worker.ready:
                print(f"{thing.name} is skipped: {worker.ready['skipped']}", file=sys.stderr)
                self.things.remove(thing)
                continue
            workers[thing.name], logits[thing.name] = worker, worker.ready["logits"]
            done.load_s[thing.name] = worker.ready["load_s"]
        for name, found in logits.items():
            if cosine(found, logits[EAGER]) < LEAST_COSINE:
                raise RuntimeError(f"{name} does not compute what {EAGER} does")
        return workers

    def _products(self) -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {}
        for kind in dict.fromkeys(thing.products for thing in self.things):
            for engine in gemm.ENGINES:
                request = {"engine": engine, "precision": kind, "products": self.products(kind)}
                with Worker(gemm.__file__, request) as worker:
                    found.setdefault(kind, []).append(worker.ask(PRODUCT_S))
        return found


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    import numpy as np

    return float(np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))


def rows_of(cell: Cell, rounds: Sequence[Round]) -> Iterator[dict[str, object]]:
    """A row per thing."""
    packages = stack("onnxruntime", "openvino", "torch", "onnxscript")
    for thing in cell.things:
        latency_s = [one.latency_s(thing.name) for one in rounds]
        peak = gemm.peak(cell.products(thing.products), [one.products[thing.products] for one in rounds])
        shares = [thing.macs / 1e9 / s / most for s, most in zip(latency_s, peak, strict=True)]
        yield {
            "machine": machine(),
            "stack": packages,
            "k": cell.subnet.heads,
            "batch": cell.batch,
            "thing": thing.name,
            "rounds": len(rounds),
            "median_ms": round(1e3 * statistics.median(latency_s), 4),
            **against(thing.name, EXPORTED, "ratio_exported", rounds),
            **against(thing.name, EAGER, "ratio_eager", rounds),
            "load_s": round(statistics.median(one.load_s[thing.name] for one in rounds), 4),
            "gmac": round(thing.macs / 1e9, 6),
            "gmac_s": round(thing.macs / 1e9 / statistics.median(latency_s), 3),
            "peak_gmac_s": round(statistics.median(peak), 3),
            "peak_share": round(statistics.median(shares), 4),
        }


def against(thing: str, other: str, column: str, rounds: Sequence[Round]) -> dict[str, object]:
    ratio, low, high = ratio_interval([one.ratio(thing, other) for one in rounds])
    return {column: round(ratio, 4), f"{column}_low": round(low, 4), f"{column}_high": round(high, 4)}


def merged(before: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of both, those measured again in their new form; by k and batch, as they were measured."""

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in KEY)

    found = {key(row): row for row in before} | {key(row): row for row in new}
    return sorted(found.values(), key=lambda row: (int(row["batch"]), int(row["k"])))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first['machine']}, {first['stack']}, k = {first['k']}, batch {first['batch']}")
    table.add_column("", no_wrap=True)
    for heading in ("ms", "/ exported (95 %)", "/ eager (95 %)", "load s", "GMAC/s", "of the peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratios = [
            f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"
            for name in ("ratio_exported", "ratio_eager")
        ]
        figures = f"{row['median_ms']:.2f}", *ratios, f"{row['load_s']:.3f}", f"{row['gmac_s']:.1f}"
        table.add_row(row["thing"], *figures, f"{row['peak_share']:.0%}")
    # Not narrower than its figures, wherever it is written to.
    Console(width=140).print(table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of time against the exported graph on ONNX Runtime, grouped by k, for single images."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    single = [row for row in rows if int(row["batch"]) == 1]
    names, heads = dict.fromkeys(row["thing"] for row in single), dict.fromkeys(int(row["k"]) for row in single)
    if not single:
        return
    figure, axes = plt.subplots(figsize=(max(7.0, 1.5 + 0.28 * len(names) * len(heads)), 5), layout="constrained")
    places, width = {k: i for i, k in enumerate(heads)}, 0.85 / len(names)
    for j, name in enumerate(names):
        mine = [row for row in single if row["thing"] == name]
        x = [places[int(row["k"])] + (j - (len(names) - 1) / 2) * width for row in mine]
        y, low, high = ([float(row[f"ratio_exported{part}"]) for row in mine] for part in ("", "_low", "_high"))
        spread = [
            [max(0.0, a - b) for a, b in zip(y, low, strict=True)],
            [max(0.0, b - a) for a, b in zip(y, high, strict=True)],
        ]
        axes.bar(x, y, width, yerr=spread, label=name, color=plt.colormaps["tab20"](j % 20))
        for row, at, top in zip(mine, x, high, strict=True):
            axes.text(at, top, f" {float(row['median_ms']):.1f} ms", rotation=90, ha="center", va="bottom", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(places.values()), [f"k = {k}" for k in places])
    axes.set_ylabel(f"time / {EXPORTED}, batch 1")
    axes.margins(y=0.2)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=parse_heads, default=(3, 6, 9, 12))
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure what has this in its name")
    parser.add_argument("--tiny", action="store_true", help="a supernet so small that figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV is")
    options = parser.parse_args()
    name = f"latency-{'tiny-' if options.tiny else ''}{machine()}-{stack('onnxruntime', 'openvino', 'torch')}"
    with tempfile.TemporaryDirectory() as directory:
        files = Files(Path(directory), TINY if options.tiny else DEIT_B)
        for batch in map(int, options.batches.split(",")):
            bundle = files.bundle(options.heads, batch)
            for k in options.heads:
                subnet = files.geometry.subnet(k)
                found = [*things.peers(files, subnet, batch), *things.of_bundle(bundle, subnet, batch)]
                chosen = [thing for thing in found if options.only in thing.name or thing.name in (EXPORTED, EAGER)]
                cell = Cell(subnet, batch, chosen, files.images(batch))
                rounds: list[Round] = []
                for one in cell.rounds(options.rounds):
                    rounds.append(one)
                    print(f"k = {k}, batch {batch}: round {len(rounds)} of {options.rounds}", file=sys.stderr)
                rows = list(rows_of(cell, rounds))
                show(rows)
                every = merged(read_csv(name, options.results), rows)
                draw(every, write_csv(name, every, options.results).with_suffix(".png"))


if __name__ == "__main__":
    main()
