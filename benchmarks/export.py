"""How long ten subnets of a DeiT-B-sized supernet take to write, how many bytes they are, and how int8 opens.

    python benchmarks/export.py [--rounds 5] [--heads 3-12]

Each round starts a fresh process per row, in turns whose order alternates; imports are not timed. torch.onnx.export
(dynamo, else defaults) is called once per subnet on the plain ViT that it is, reading and cutting the supernet with it,
comparing nothing. Ours writes all of them at once: `graphs and weights` is from the call to the last graph on disk,
the others are all of it with the parity gate, which runs torch and ONNX Runtime. `bytes` are graphs and weights.

Opening is measured the same way: an int8 artifact against its fp32 twin of the same bundle, files in the page cache.
Ratios are of times in the same round, below 1 is faster, with a 95 % bootstrap interval over rounds.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    DEIT_B,
    RESULTS,
    TINY,
    answer,
    images_file,
    machine,
    ratio_interval,
    stack,
    supernet_file,
    write_csv,
)

from hydradeploy.spec import parse_heads

PEER = "torch.onnx.export, a call per subnet"
FP32, BOTH, INT8 = "ours fp32", "ours fp32 + int8dyn", "ours int8dyn"
WRITTEN = "graphs and weights"
WRITERS = {PEER: (), FP32: ("fp32",), BOTH: ("fp32", "int8dyn"), INT8: ("int8dyn",)}
CALIBRATION_IMAGES = 16

Seconds = dict[str, float]


# In a process of its own: what was timed, by the name of the row.


def export_peer(supernet: str, directory: str, heads: Sequence[int]) -> Seconds:
    import torch

    from hydradeploy.supernet.model import plain_vit
    from hydradeploy.supernet.store import load

    # The first call imports hundreds of modules.
    torch.onnx.export(torch.nn.Identity().eval(), (torch.zeros(1),), dynamo=True, verbose=False)
    started = time.perf_counter()
    weights = load(Path(supernet))
    g = weights.spec.geometry
    Path(directory).mkdir()
    for k in heads:
        model = plain_vit(weights.tensors, g.subnet(k))
        images = torch.zeros(1, g.channels, g.image_size, g.image_size)
        torch.onnx.export(model, (images,), Path(directory) / f"h{k:02d}.onnx", dynamo=True, verbose=False)
    return {PEER: time.perf_counter() - started}


def export_ours(name: str, supernet: str, directory: str, heads: Sequence[int]) -> Seconds:
    """Timed by its own reports of progress."""
    import onnxruntime  # noqa: F401  # which the gate would import

    from hydradeploy.exporter.export import export

    started = written = time.perf_counter()

    def report(what: str, done: int, total: int) -> None:
        nonlocal written
        if what.startswith("writing"):
            written = time.perf_counter()

    export(Path(supernet), Path(directory), heads=heads, precisions=WRITERS[name], report=report)
    return {name: time.perf_counter() - started, f"{name}: {WRITTEN}": written - started}


def opening(bundle: str, artifact: str, runner: str) -> Seconds:
    from hydradeploy.backends import Options, backend, model_of
    from hydradeploy.bundle import open_bundle

    found, opened = backend(runner), open_bundle(Path(bundle), "manifest")
    found.prepare()
    started = time.perf_counter()
    with found.open(model_of(opened, opened.artifact(artifact), found.dialect), Options()):
        return {f"open {artifact} {runner}": time.perf_counter() - started}


CHILDREN: Mapping[str, Callable[..., Seconds]] = {
    child.__name__: child for child in (export_peer, export_ours, opening)
}


def timed(child: Callable[..., Seconds], **arguments: object) -> Seconds:
    """What a fresh process says of it."""
    command = [sys.executable, __file__, "--child", json.dumps({"child": child.__name__, "arguments": arguments})]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Seconds = json.loads(ran.stdout.splitlines()[-1])
    print(found, file=sys.stderr)
    return found


# In the parent.


def writing(directory: Path, supernet: Path, heads: Sequence[int], rounds: int) -> Iterator[dict[str, object]]:
    """The rows of all that writes."""
    found: list[Seconds] = []
    bytes_: dict[str, int] = {}
    for number in range(rounds):
        seconds: Seconds = {}
        for name in list(WRITERS)[:: 1 if number % 2 == 0 else -1]:
            written = directory / "written"
            given = {"supernet": str(supernet), "directory": str(written), "heads": heads}
            seconds |= timed(export_peer, **given) if name == PEER else timed(export_ours, name=name, **given)
            bytes_[name] = sum(path.stat().st_size for path in written.iterdir() if is_artifact(path))
            shutil.rmtree(written)
        found.append(seconds)
    for name in [PEER, *(row for ours in (FP32, BOTH, INT8) for row in (f"{ours}: {WRITTEN}", ours))]:
        size = bytes_[name.partition(":")[0]]
        sizes = {"bytes": size, "of_supernet": round(size / supernet.stat().st_size, 5)}
        yield row(name, PEER, found) | sizes


def is_artifact(path: Path) -> bool:
    """Graphs and weights, ours or torch's."""
    return path.name.endswith((".onnx", ".onnx.data", ".weights"))


def opened(directory: Path, supernet: Path, heads: Sequence[int], rounds: int) -> Iterator[dict[str, object]]:
    """The rows of opening: int8 in both kinds against fp32, on each backend that has them."""
    from hydradeploy import export
    from hydradeploy.backends import usable
    from hydradeploy.supernet.store import load

    bundle, kinds = directory / "bundle", ("fp32", "int8dyn", "int8")
    spec = load(supernet).spec
    data = images_file(directory, spec, CALIBRATION_IMAGES)
    # The largest subnet is always among them, or there would be nothing to cut.
    export(supernet, bundle, heads=sorted({*heads, spec.geometry.heads}), precisions=kinds, data=data)
    for runner in usable():
        has = [kind for kind in kinds if runner.processor == "cpu" and runner.compute_types(kind)]
        if "fp32" not in has or len(has) == 1:
            continue
        for k in heads:
            artifacts = [f"h{k:02d}-{kind}" for kind in has]
            found: list[Seconds] = []
            for number in range(rounds):
                seconds: Seconds = {}
                for artifact in artifacts[:: 1 if number % 2 == 0 else -1]:
                    seconds |= timed(opening, bundle=str(bundle), artifact=artifact, runner=runner.name)
                found.append(seconds)
            names = [f"open {artifact} {runner.name}" for artifact in artifacts]
            yield from (row(name, names[0], found) | {"bytes": "", "of_supernet": ""} for name in names)


def row(what: str, against: str, rounds: Sequence[Seconds]) -> dict[str, object]:
    ratio, low, high = ratio_interval([one[what] / one[against] for one in rounds])
    return {
        "machine": machine(),
        "stack": stack("onnx", "onnxruntime", "onnxscript", "openvino", "torch"),
        "what": what,
        "against": against,
        "rounds": len(rounds),
        "median_s": round(statistics.median(one[what] for one in rounds), 4),
        "slowest_s": round(max(one[what] for one in rounds), 4),
        "ratio": round(ratio, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['machine']}, {rows[0]['stack']}")
    table.add_column("", no_wrap=True)
    for heading in ("s", "slowest", "ratio (95 %)", "/ supernet's bytes"):
        table.add_column(heading, justify="right")
    for one in rows:
        ratio = f"{one['ratio']:.3f} ({one['ratio_low']:.3f} to {one['ratio_high']:.3f})"
        figures = f"{one['median_s']:.3f}", f"{one['slowest_s']:.3f}", ratio, str(one["of_supernet"])
        table.add_row(one["what"], *figures)
    # Not narrower than its figures, wherever it is written to.
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=parse_heads, default=tuple(range(3, 13)), help="what is written")
    parser.add_argument("--opened", type=parse_heads, default=(3, 6, 9, 12), help="what is opened")
    parser.add_argument("--tiny", action="store_true", help="a supernet so small that figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV goes")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        answer(CHILDREN[options.child["child"]](**options.child["arguments"]))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        supernet = supernet_file(directory, TINY if options.tiny else DEIT_B)
        rows = [
            *writing(directory, supernet, options.heads, options.rounds),
            *opened(directory, supernet, options.opened, options.rounds),
        ]
    show(rows)
    file = f"export-{'tiny-' if options.tiny else ''}{machine()}-{stack('onnx', 'torch')}"
    write_csv(file, rows, options.results)


if __name__ == "__main__":
    main()
