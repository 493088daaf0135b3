"""Static ranges of activations: what the inputs of layers reach on sample images, and where it is best cut off.

One pass over the images serves every subnet. Of each layer's input a histogram of |x| is kept and nothing else. Its
range is a power of two, so that widening it only adds up neighbours, and a value is counted in the same bin whatever
came before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import InputError, UsageError
from hydradeploy.exporter.walk import BATCH, Walk, check_images
from hydradeploy.spec import Subnet
from hydradeploy.stored import layers, matrices
from hydradeploy.supernet.store import Weights

Report = Callable[[str, int, int], None]

BINS = 4096
# The bins that int8 has for |x|, as entropy calibration counts them (see `Entropy`).
_LEVELS = 128
_LARGEST_INT8 = 127
# Smaller values count as 0: a step made from them would be at the end of float32's range.
_LEAST_EXPONENT = -100
# Percentile calibration gives up one value in so many. A channel that is large in every token holds one value in 768 of
# DeiT-B's layers, one in 3072 after its GELU: at one in a thousand it would be cut off everywhere, here it cannot be.
_ONE_IN = 10_000


class Maximum:
    """The largest |x|, kept whole."""

    def __init__(self) -> None:
        self.maximum = 0.0

    def add(self, values: Tensor) -> None:
        """Take in finite float32 values of any shape, at least one."""
        self.maximum = max(self.maximum, _largest(values))

    def limit(self) -> float:
        """The |x| that the largest int8 value is to stand for; 0 where all were 0."""
        return self.maximum


class Histogram(Maximum):
    """How often |x| lies in each of `BINS` bins of equal width between 0 and the smallest power of two above all."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self._exponent = _LEAST_EXPONENT

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self._exponent / BINS

    def add(self, values: Tensor) -> None:
        super().add(values)
        self._widen(math.frexp(self.maximum)[1])
        bins = (values.abs() * (1 / self.width)).to(torch.int32).flatten()
        self.counts += torch.bincount(bins, minlength=BINS).numpy()

    def _widen(self, exponent: int) -> None:
        if exponent <= self._exponent:
            return
        merged = min(2 ** (exponent - self._exponent), BINS)
        sums = self.counts.reshape(-1, merged).sum(1)
        self.counts = np.concatenate([sums, np.zeros(BINS - len(sums), np.int64)])
        self._exponent = exponent


class Percentile(Histogram):
    """All but one value in ten thousand."""

    def limit(self) -> float:
        reached = self.counts.cumsum()
        kept = reached[-1] - reached[-1] // _ONE_IN
        return min((int(np.searchsorted(reached, kept)) + 1) * self.width, self.maximum)


class Entropy(Histogram):
    """Where cutting off loses least of the distribution, by TensorRT's rule (Migacz, "8-bit inference with TensorRT",
    GTC 2017), which ONNX Runtime follows.

    P is the histogram up to the cut with all that lies beyond in its last bin. Q is that up to the cut in 128 levels,
    each level's count spread evenly over those of its bins that P has filled. The cut with the smallest
    Kullback-Leibler divergence of Q from P wins. Here a level has the same number of bins as every other, to one, where
    ONNX Runtime gives the last level what is left over; and a cut whose last level is empty is out, where it smooths
    zeros away.
    """

    def limit(self) -> float:
        ends = int(np.flatnonzero(self.counts)[-1]) + 1
        if ends <= _LEVELS:
            return self.maximum
        cuts = np.arange(_LEVELS, ends + 1)
        best = int(cuts[np.argmin(_divergences(self.counts.astype(np.float64), cuts))])
        return min(best * self.width, self.maximum)


_OBSERVERS: dict[str, type[Maximum]] = {"minmax": Maximum, "percentile": Percentile, "entropy": Entropy}
METHODS = tuple(_OBSERVERS)


def calibrate(
    weights: Weights, subnets: Sequence[Subnet], images: NDArray[np.uint8], method: str, report: Report
) -> dict[int, dict[str, float]]:
    """The quantisation step of each layer's input, above 0, by head count and layer (see `stored.layers`).

    `images` are pixels (n, s, s, channels); x is to become round(x / step) within -128..127. `report(what, done,
    total)` hears of progress. Raises UsageError for a method that is not in `METHODS`, InputError for images of another
    shape or type, none at all, or a layer whose input is not finite.
    """
    if method not in METHODS:
        raise UsageError(f"no calibration method {method!r}", hint=f"one of {', '.join(METHODS)}")
    geometry = weights.spec.geometry
    check_images(images, "uint8", geometry.image_size, geometry.image_size, geometry.channels)
    walks = [_Watched(weights, subnet, method) for subnet in subnets]
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            report("calibrating", start, len(images))
            shown = torch.from_numpy(normalise(images[start : start + BATCH], weights.spec.preprocessing))
            for walk in walks:
                walk(shown)
    found = {walk.subnet.heads: walk.steps() for walk in walks}
    report("calibrating", len(images), len(images))
    return found


class _Watched(Walk):
    """A subnet that notes what its layers are given."""

    def __init__(self, weights: Weights, subnet: Subnet, method: str) -> None:
        super().__init__(weights.tensors, subnet)
        self._seen = {layer: _OBSERVERS[method]() for layer in layers(subnet.geometry)}

    def steps(self) -> dict[str, float]:
        return {layer: _step(seen.limit()) for layer, seen in self._seen.items()}

    def linear(self, layer: str, matrix: str, x: Tensor) -> Tensor:
        # Of q, k and v, which share a layer's input, the last is always given all of it.
        if matrix == matrices(layer)[-1]:
            if not math.isfinite(_largest(x)):
                raise InputError(
                    f"layer {layer} of {self.subnet.name} ({self.subnet.heads} heads) has a NaN or infinite input in "
                    f"fp32",
                    hint="the weights overflow; train or import them again",
                )
            self._seen[layer].add(x)
        return super().linear(layer, matrix, x)


def _step(limit: float) -> float:
    # Where nothing is to be told apart any step does, and 1 is far from both ends of float32.
    return limit / _LARGEST_INT8 if limit > 2.0**_LEAST_EXPONENT else 1.0


def _largest(values: Tensor) -> float:
    """The largest |x|; NaN where there is one."""
    least, most = torch.aminmax(values)
    return max(-float(least), float(most))


def _divergences(counts: NDArray[np.float64], cuts: NDArray[np.int64]) -> NDArray[np.float64]:
    """KL divergence for a cut after each of `cuts` bins (see `Entropy`).

    Q is constant over a level, so a level adds (its share of P) * log(its mean), and all levels of all cuts are
    differences of a few running sums.
    """
    edges = np.arange(_LEVELS + 1) * cuts[:, None] // _LEVELS  # (cuts, levels + 1), in bins
    sums = np.diff(_running(counts)[edges])  # (cuts, levels)
    inside = _running(counts)[cuts]
    beyond, final = counts.sum() - inside, counts[cuts - 1]
    filled = np.diff(_running(counts > 0)[edges])
    filled[:, -1] += (beyond > 0) & (final == 0)
    means = np.log(np.divide(sums, filled, out=np.ones_like(sums), where=sums > 0))
    own = _running(_entropies(counts))[cuts] - _entropies(final) + _entropies(final + beyond)
    cross = (sums * means).sum(1) + beyond * means[:, -1]
    divergences = (own - cross) / counts.sum() - np.log(counts.sum() / np.maximum(inside, 1))
    return np.where((beyond > 0) & (sums[:, -1] == 0), np.inf, divergences)


def _running(values: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _entropies(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """x log x, 0 for 0."""
    return values * np.log(np.maximum(values, 1))
