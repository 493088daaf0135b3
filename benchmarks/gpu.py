"""Subnets of a DeiT-B-sized supernet on an NVIDIA GPU: how fast, what changing between them costs, what they hold.

    python benchmarks/gpu.py [--heads 3-12] [--batches 1,64] [--rounds 5] [--compiled 3,6,9,12] [--together 3-12]

torch eager and torch.compile run the plain ViT that the subnet is, ours nested views of one set of weights in a CUDA
graph (backend torch-cuda), and ONNX Runtime's CUDA provider our graph of the subnet, as it comes and in a CUDA graph
(backend onnxruntime-cuda), in fp32 and fp16. A call goes from images on the host to logits on the host. Each thing has
a process of its own; they run in turns, and who waits is stopped. Ratios are of times to torch eager's in the same
type, below 1 is faster, the median over rounds with a 95 % bootstrap interval. What does not compute torch eager's
logits ends the benchmark; what torch cannot compile is left out, and so is ONNX Runtime where it is not usable.

Switching: all subnets open in one process, two of them in turns against each alone. Memory: what the GPU has less when
all are open against the largest alone, without what CUDA itself takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gemm
from common import DEIT_B, RESULTS, TINY, Worker, answer, gpu, questions, ratio_interval, stack, write_csv
from things import Files

from hydradeploy.errors import HydraError
from hydradeploy.spec import Subnet, parse_heads

EAGER, COMPILED, NESTED = "torch eager", "torch.compile", "nested CUDA graph"
# Each with the setting `graph`.
ONNXRUNTIME = {"onnxruntime": "off", "onnxruntime CUDA graph": "on"}
TYPES = ("fp32", "fp16")
TURN_S = 0.3
LEAST_COSINE = 0.99
SWITCHES = 200


def measured(
    files: Files, bundle: Path, subnet: Subnet, batch: int, rounds: int, things: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each thing in each type."""
    import numpy as np

    names = [(name, kind) for kind in TYPES for name in things]
    images, plain = str(files.images(batch)), str(files.plain(subnet.heads))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in names}
    with ExitStack() as kept:
        workers = {}
        for name, kind in names:
            request = {"name": name, "kind": kind, "images": images, "plain": plain, "bundle": str(bundle)}
            request["artifact"] = f"{subnet.name}-{kind}"
            workers[name, kind] = kept.enter_context(Worker(__file__, request))
        names = [key for key in names if "skipped" not in workers[key].ready]
        expected = np.asarray(workers[EAGER, "fp32"].ready["logits"])
        for key in names:
            logits = np.asarray(workers[key].ready["logits"])
            cosine = float(logits @ expected / np.linalg.norm(logits) / np.linalg.norm(expected))
            if not cosine >= LEAST_COSINE:
                raise SystemExit(f"{' '.join(key)} at k={subnet.heads}: cosine {cosine} to torch eager")
        for index in range(rounds):
            turn = index % len(names)
            for key in names[turn:] + names[:turn]:
                times[key].append(workers[key].ask(TURN_S))
    return [row(key, subnet, batch, times) for key in names]


def row(
    key: tuple[str, str], subnet: Subnet, batch: int, times: Mapping[tuple[str, str], Sequence[float]]
) -> dict[str, Any]:
    name, kind = key
    ratios = [ours / eager for ours, eager in zip(times[key], times[EAGER, kind], strict=True)]
    ratio, low, high = ratio_interval(ratios)
    median = statistics.median(times[key])
    return {
        "machine": gpu(),
        "k": subnet.heads,
        "batch": batch,
        "thing": name,
        "type": kind,
        "rounds": len(ratios),
        "median_ms": round(median * 1e3, 4),
        "images_s": round(batch / median, 1),
        "ratio_eager": round(ratio, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


def opened(request: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What turns images on the host into logits there."""
    if request["name"] in ONNXRUNTIME:
        settings = {"graph": ONNXRUNTIME[request["name"]]}
        return session(Path(request["bundle"]), request["artifact"], "onnxruntime-cuda", settings).run
    import torch

    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False
    if request["name"] == NESTED:
        return session(Path(request["bundle"]), request["artifact"]).run
    dtype = torch.float16 if request["kind"] == "fp16" else torch.float32
    model = torch.load(request["plain"], weights_only=False).to("cuda", dtype)
    if request["name"] == COMPILED:
        model.geometry = Fixed(model.geometry)
        model = torch.compile(model)
    return lambda images: model(torch.from_numpy(images).to("cuda", dtype)).float().cpu().numpy()


class Fixed:
    """A geometry whose subnet is made already: releases of torch before 2.13 cannot compile the making of one."""

    def __init__(self, geometry: Any) -> None:
        self.__dict__ |= {name: getattr(geometry, name) for name in geometry.__struct_fields__}
        self.largest = geometry.subnet(geometry.heads)

    def subnet(self, heads: int) -> Subnet:
        return self.largest


def session(bundle: Path, artifact: str, name: str = "torch-cuda", settings: Mapping[str, str] = {}) -> Any:
    from hydradeploy import open_bundle
    from hydradeploy.backends import Options, backend, model_of

    found, runner = open_bundle(bundle), backend(name)
    return runner.open(model_of(found, found.artifact(artifact), runner.dialect), Options(settings=settings))


def onnxruntime() -> list[str]:
    """Its name and version where it computes on the GPU; else none, and why is said."""
    from hydradeploy.backends import backend

    try:
        return [f"onnxruntime-{backend('onnxruntime-cuda').software()['onnxruntime']}"]
    except HydraError as error:
        print(f"left out: {error.message}", file=sys.stderr)
        return []


def call_s(run: Callable[[], object], seconds: float) -> float:
    """The median seconds of a call in about that time."""
    return statistics.median(gemm.timed(run, seconds))


def child(request: Mapping[str, Any]) -> None:
    import numpy as np

    if "resident" in request:
        answer(resident(Path(request["bundle"]), request["resident"], request["kind"]))
        return
    batch = np.load(request["images"])
    # Whatever the compiler raises; of ONNX Runtime, what says that it cannot be had here.
    left_out = {COMPILED: Exception} | dict.fromkeys(ONNXRUNTIME, HydraError)
    try:
        run = opened(request)
        logits = run(batch)
    except left_out.get(request["name"], ()) as error:
        print(f"skipped: {request['name']}: {str(error).splitlines()[0]}", file=sys.stderr)
        answer({"skipped": str(error)})
        return
    for _ in range(5):
        run(batch)
    answer({"logits": np.asarray(logits, np.float64).ravel().tolist()})
    for seconds in questions():
        answer(call_s(lambda: run(batch), seconds))


def resident(bundle: Path, heads: Sequence[int], kind: str) -> dict[str, float]:
    """Bytes of the GPU that subnets take when all are open, and the seconds that changing between two of them costs."""
    import numpy as np
    import torch

    from hydradeploy import open_bundle

    torch.zeros(1, device="cuda")
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    free = torch.cuda.mem_get_info()[0]
    sessions = [session(bundle, f"h{k:02d}-{kind}") for k in heads]
    g = open_bundle(bundle).spec.geometry
    image = np.random.default_rng(0).standard_normal((1, g.channels, g.image_size, g.image_size), np.float32)
    for each in sessions:
        each.run(image)
    found = {"bytes": free - torch.cuda.mem_get_info()[0], "reserved": torch.cuda.memory_reserved()}
    if len(sessions) > 1:
        one, other = sessions[-1], sessions[len(sessions) // 2]
        extra = []
        for _ in range(5):
            alone = [call_s(lambda s=s: s.run(image), TURN_S) for s in (one, other)]
            started = time.perf_counter()
            for _ in range(SWITCHES):
                one.run(image)
                other.run(image)
            extra.append((time.perf_counter() - started) / SWITCHES - sum(alone))
        # Two changes in each pair.
        found["switch_s"] = statistics.median(extra) / 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="3-12")
    parser.add_argument("--compiled", default="3,6,9,12", help="heads to run torch.compile for")
    parser.add_argument("--together", default="3-12", help="heads to hold in memory together")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny supernet: shows that this works, means nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    from hydradeploy import export
    from hydradeploy.backends import backend

    try:
        backend("torch-cuda")
    except HydraError as error:
        raise SystemExit(f"error: {error.message}\nhint: run this where an NVIDIA GPU is") from error
    beside = onnxruntime()
    heads, compiled, together = (parse_heads(text) for text in (given.heads, given.compiled, given.together))
    with tempfile.TemporaryDirectory() as directory:
        files = Files(Path(directory), TINY if given.tiny else DEIT_B)
        bundle = Path(directory) / "bundle"
        export(files.supernet, bundle, heads=sorted({*heads, *together, 12}), precisions=TYPES, batch="dynamic")
        name = "-".join([f"gpu-{gpu()}-{stack('torch')}", *beside])
        held = []
        for kind in TYPES:
            taken: dict[str, Any] = {"machine": gpu(), "type": kind}
            for label, which in (("largest", [max(together)]), ("all", list(together))):
                with Worker(__file__, {"bundle": str(bundle), "resident": which, "kind": kind}) as worker:
                    taken |= {f"{label}_{key}": value for key, value in worker.ready.items()}
            taken["ratio"] = round(taken["all_bytes"] / taken["largest_bytes"], 4)
            print(json.dumps(taken), flush=True)
            held.append(taken)
        write_csv(f"gpu-resident-{gpu()}-{stack('torch')}", held, given.results)

        rows: list[dict[str, Any]] = []
        for batch in (int(text) for text in given.batches.split(",")):
            for k in heads:
                subnet = files.geometry.subnet(k)
                things = [EAGER, *[COMPILED] * (k in compiled), NESTED, *(ONNXRUNTIME if beside else ())]
                found = measured(files, bundle, subnet, batch, given.rounds, things)
                for each in found:
                    print(json.dumps(each), flush=True)
                rows += found
                write_csv(name, rows, given.results)


if __name__ == "__main__":
    main()
