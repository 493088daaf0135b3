"""The ways to run a subnet that latency.py compares: their files, and the process in which each is opened and timed."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gemm
from common import answer, images_file, questions, supernet_file

from hydradeploy.spec import Geometry, Spec, Subnet

EAGER, COMPILED = "torch eager", "torch.compile"
EXPORTED, EXPORTED_OPENVINO = "torch.onnx.export + onnxruntime", "torch.onnx.export + openvino"
PRECISIONS = ("fp32", "int8dyn", "int8")
CALIBRATION_IMAGES = 16

Run = Callable[[Any], Any]
Load = Callable[[], Run]


@dataclass(frozen=True)
class Thing:
    """One way to run a subnet: what its process is asked for, the MACs of a batch, and which products it does."""

    name: str
    kind: str
    arguments: Mapping[str, str]
    macs: int
    products: str = "fp32"


@dataclass(frozen=True)
class Files:
    """What there is to run, written into a directory."""

    directory: Path
    geometry: Geometry

    @cached_property
    def supernet(self) -> Path:
        return supernet_file(self.directory, self.geometry)

    @cached_property
    def spec(self) -> Spec:
        from hydradeploy.supernet.store import load

        return load(self.supernet).spec

    def images(self, batch: int) -> Path:
        """A batch of images as the network takes them."""
        import numpy as np

        from hydradeploy.backends import prepared
        from hydradeploy.data import samples

        path = self.directory / f"images-{batch}.npy"
        np.save(path, prepared(samples.synthetic(self.spec, batch).images, "float32", self.spec.preprocessing))
        return path

    def bundle(self, heads: Sequence[int], batch: int) -> Path:
        """Ours in every precision. The largest subnet is always among them, or there would be nothing to cut."""
        from hydradeploy import export

        path = self.directory / f"bundle-{batch}"
        data = images_file(self.directory, self.spec, CALIBRATION_IMAGES)
        export(
            self.supernet,
            path,
            heads=sorted({*heads, self.geometry.heads}),
            precisions=PRECISIONS,
            batch=batch,
            data=data,
        )
        return path

    def plain(self, heads: int) -> Path:
        """The plain ViT that the subnet is, as a torch module."""
        import torch

        from hydradeploy.supernet.model import plain_vit
        from hydradeploy.supernet.store import load

        path = self.directory / f"plain-{heads}.pt"
        torch.save(plain_vit(load(self.supernet).tensors, self.geometry.subnet(heads)), path)
        return path

    def exported(self, heads: int, batch: int) -> Path:
        """What torch.onnx.export makes of the plain ViT."""
        import torch

        g, path = self.geometry, self.directory / f"exported-{heads}-{batch}.onnx"
        model = torch.load(self.plain(heads), weights_only=False)
        images = torch.zeros(batch, g.channels, g.image_size, g.image_size)
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
        return path


def peers(files: Files, subnet: Subnet, batch: int) -> Iterator[Thing]:
    """What people use today; all compute all of the plain ViT in fp32."""
    plain, graph = str(files.plain(subnet.heads)), str(files.exported(subnet.heads, batch))
    macs = batch * subnet.macs
    yield Thing(EAGER, "eager", {"file": plain}, macs)
    yield Thing(COMPILED, "compiled", {"file": plain, "images": str(files.images(batch))}, macs)
    yield Thing(EXPORTED, "onnxruntime", {"file": graph}, macs)
    yield Thing(EXPORTED_OPENVINO, "openvino", {"file": graph}, macs)


def of_bundle(bundle: Path, subnet: Subnet, batch: int) -> Iterator[Thing]:
    """Ours: every precision on every backend that computes on the processor and has it, in its default compute type."""
    from hydradeploy.backends import usable

    macs = sum(product.macs for product in gemm.products(subnet, batch))
    for precision in PRECISIONS:
        for runner in usable():
            if runner.processor == "cpu" and runner.compute_types(precision):
                arguments = {"bundle": str(bundle), "artifact": f"{subnet.name}-{precision}", "runner": runner.name}
                products = "fp32" if precision == "fp32" else "int8"
                yield Thing(f"ours {precision} {runner.name}", "ours", arguments, macs, products)


# Each of these imports what it needs and returns what opens the thing. LookupError says why it cannot run here.


def eager(file: str) -> Load:
    import torch

    torch.set_grad_enabled(False)

    def load() -> Run:
        model = torch.load(file, weights_only=False)
        return lambda images: model(torch.from_numpy(images)).numpy()

    return load


def compiled(file: str, images: str) -> Load:
    import numpy as np
    import torch
    import torch._dynamo  # which torch.compile would import, and imports are no part of opening

    torch.set_grad_enabled(False)
    first = torch.from_numpy(np.load(images))

    def load() -> Run:
        model = torch.compile(torch.load(file, weights_only=False))
        try:
            model(first)
        # Where there is no compiler, whatever notices it first raises.
        except Exception as error:
            raise LookupError(str(error).strip().splitlines()[0]) from error
        return lambda images: model(torch.from_numpy(images)).numpy()

    return load


def onnxruntime(file: str) -> Load:
    import onnxruntime

    def load() -> Run:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]

    return load


def openvino(file: str) -> Load:
    import openvino

    # Where the processor has bfloat16, OpenVINO would compute in it: another precision than the others'.
    options = {"INFERENCE_PRECISION_HINT": "f32"}

    def load() -> Run:
        request = openvino.Core().compile_model(file, "CPU", options).create_infer_request()
        return lambda images: request.infer({0: images}, share_inputs=True)[0]

    return load


def ours(bundle: str, artifact: str, runner: str) -> Load:
    from hydradeploy.backends import Options, backend, model_of
    from hydradeploy.bundle import open_bundle
    from hydradeploy.errors import MissingError

    found, opened = backend(runner), open_bundle(Path(bundle), "manifest")
    found.prepare()

    def load() -> Run:
        try:
            return found.open(model_of(opened, opened.artifact(artifact), found.dialect), Options()).run
        except MissingError as error:
            raise LookupError(error.message) from error

    return load


KINDS: Mapping[str, Callable[..., Load]] = {
    kind.__name__: kind for kind in (eager, compiled, onnxruntime, openvino, ours)
}


def child(images: str, kind: str, arguments: Mapping[str, str]) -> None:
    """Open one thing; then answer each number of seconds with the median seconds of a call in about that time."""
    import numpy as np

    batch, load = np.load(images), KINDS[kind](**arguments)
    started = time.perf_counter()
    try:
        run = load()
    except LookupError as error:
        answer({"skipped": str(error)})
        return
    load_s = time.perf_counter() - started
    answer({"load_s": load_s, "logits": np.asarray(run(batch), np.float64).ravel().tolist()})
    for seconds in questions():
        answer(statistics.median(gemm.timed(lambda: run(batch), seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", required=True, help="what to run, as latency.py asks for it")
    child(**json.loads(parser.parse_args().child))


if __name__ == "__main__":
    main()
