"""What int8 does to a subnet's logits, in torch: another formulation of what int8 graphs compute, and by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydradeploy.errors import InputError, UsageError
from hydradeploy.exporter.source import quantised
from hydradeploy.exporter.walk import BATCH, Walk, check_images
from hydradeploy.spec import Subnet
from hydradeploy.stored import layers
from hydradeploy.supernet.store import Weights

Report = Callable[[str, int, int], None]
Steps = Mapping[str, float]


def simulate(
    weights: Weights,
    subnet: Subnet,
    images: NDArray[np.float32],
    int8_layers: Collection[str],
    steps: Steps | None,
) -> NDArray[np.float32]:
    """Logits (n, classes) of normalised images (n, channels, s, s) with just those layers in int8, the rest in fp32.

    `steps` are those of their inputs; without, each input of each image gets its own range, as in a graph of batch 1.
    Raises UsageError for a layer that is not there or has no step, InputError for images of another shape or type.
    """
    _check(subnet, images, int8_layers, steps)
    walk = _Int8(weights, subnet, int8_layers, steps)
    with torch.inference_mode():
        return np.asarray(torch.cat([walk(batch) for batch in _batches(images)]).numpy())


def ranking(
    weights: Weights, subnet: Subnet, images: NDArray[np.float32], steps: Steps | None, report: Report
) -> tuple[str, ...]:
    """All layers, the one first that alone in int8 changes the logits most.

    The change is the squared difference from the fp32 logits as a fraction of their own square, averaged over the
    normalised `images` (n, channels, s, s). `steps` as for `simulate`; `report(what, done, total)` hears of progress.
    Raises UsageError for a missing step, InputError for images refused or logits that are not finite in fp32.
    """
    names = layers(subnet.geometry)
    _check(subnet, images, names, steps)
    plain, depth = Walk(weights.tensors, subnet), subnet.geometry.depth
    harm: dict[str, float] = {}
    with torch.inference_mode():
        # What enters a block is kept, so that a layer costs only what comes after it.
        entering = [plain.tokens(batch) for batch in _batches(images)]
        expected = [plain.rest(0, x) for x in entering]
        if not all(bool(torch.isfinite(logits).all()) for logits in expected):
            raise InputError(
                f"{subnet.name} ({subnet.heads} heads) has NaN or infinite logits in fp32",
                hint="the weights overflow; train or import them again",
            )
        for i in range(depth + 1):
            for layer in (name for name in names if name.startswith(f"blocks.{i}." if i < depth else "head")):
                report("ranking layers", len(harm), len(names))
                changed = _Int8(weights, subnet, (layer,), steps)
                harm[layer] = _harm(expected, _outcomes(changed, plain, i, entering))
            if i < depth:
                entering = [plain.block(i, x) for x in entering]
    report("ranking layers", len(names), len(names))
    return tuple(sorted(names, key=lambda name: -harm[name]))


class _Int8(Walk):
    """A subnet with some layers in int8: their weights and inputs are rounded, the products are in float."""

    def __init__(self, weights: Weights, subnet: Subnet, int8: Collection[str], steps: Steps | None) -> None:
        names = [subnet.source(f"{layer}.weight") for layer in int8]
        rounded = {name: _rounded(weights.tensors[name]) for name in names}
        super().__init__({**weights.tensors, **rounded}, subnet)
        self._int8, self._steps = int8, steps

    def linear(self, layer: str, matrix: str, x: Tensor) -> Tensor:
        if layer in self._int8:
            x = _ranged(x) if self._steps is None else _stepped(x, self._steps[layer])
        return super().linear(layer, matrix, x)


def _outcomes(changed: Walk, plain: Walk, i: int, entering: Sequence[Tensor]) -> Iterator[Tensor]:
    """Logits with block i, or the head where there is no such block, by `changed` and what follows by `plain`."""
    for x in entering:
        if i == plain.subnet.geometry.depth:
            yield changed.logits(x)
        else:
            yield plain.rest(i + 1, changed.block(i, x))


def _harm(expected: Sequence[Tensor], found: Iterator[Tensor]) -> float:
    images, total = 0, 0.0
    for right, wrong in zip(expected, found, strict=True):
        size = right.double().square().sum(1)
        # All logits 0: then a difference of any size is all there is.
        size = torch.where(size > 0, size, 1.0)
        total += float(((wrong.double() - right).square().sum(1) / size).sum())
        images += len(right)
    return total / images


def _rounded(matrix: Tensor) -> Tensor:
    """A matrix [out, in] as int8 leaves it; whole, because scales belong to the supernet's tensor, not to a subnet."""
    values, scale = quantised(matrix.numpy().T)
    return torch.from_numpy(np.ascontiguousarray((values * scale).T))


def _stepped(x: Tensor, step: float) -> Tensor:
    """ONNX QuantizeLinear, symmetric, and back."""
    grid = torch.tensor(step, dtype=torch.float32)
    return torch.clamp(torch.round(x / grid), -128, 127) * grid


def _ranged(x: Tensor) -> Tensor:
    """ONNX DynamicQuantizeLinear of each image, and back."""
    axes = tuple(range(1, x.ndim))
    least, most = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    step = torch.where(most > least, (most - least) / 255, 1.0)
    zero = torch.clamp(torch.round(-least / step), 0, 255)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


def _batches(images: NDArray[np.float32]) -> Iterator[Tensor]:
    return (torch.from_numpy(images[start : start + BATCH]) for start in range(0, len(images), BATCH))


def _check(subnet: Subnet, images: NDArray[np.float32], int8: Collection[str], steps: Steps | None) -> None:
    g = subnet.geometry
    check_images(images, "float32", g.channels, g.image_size, g.image_size)
    for layer in int8:
        if layer not in layers(g):
            raise UsageError(f"no layer {layer!r} can be in int8", hint=f"those that can: {', '.join(layers(g))}")
        if steps is not None and layer not in steps:
            raise UsageError(f"layer {layer} has no quantisation step", hint="calibrate every layer that is in int8")
