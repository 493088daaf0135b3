"""The supernet's tensors in stored form (see `hydradeploy.stored`), computed as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydradeploy.errors import InputError
from hydradeploy.exporter.weights import numpy_type
from hydradeploy.spec import Geometry, Preprocessing, three
from hydradeploy.stored import Dtype
from hydradeploy.supernet.store import Weights

Array = NDArray[Any]

# int8 weights use 64 of the 127 levels. Processors with AVX2 or AVX-512 but without VNNI add two products of uint8 and
# int8 in 16 bits, and 2 * 255 * 64 is the most that fits: with more, sums saturate there and results differ between
# processors, silently.
LEVELS = 64


def quantised(matrix: Array) -> tuple[Array, Array]:
    """An [in, out] matrix as int8 and a scale per output channel, float32: matrix = int8 * scale, to half a step."""
    steps = np.abs(matrix).max(0) / LEVELS
    # A column that decay has left among the denormal numbers counts as 0: its step would be 0, or flushed to it.
    scale = np.where(steps >= np.finfo(np.float32).tiny, steps, 1.0).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


class Source:
    """Stored tensors at full width, by name. `tensors` are timm's, float32."""

    def __init__(self, tensors: Mapping[str, Array], geometry: Geometry, preprocessing: Preprocessing) -> None:
        self._tensors, self._geometry, self._preprocessing = tensors, geometry, preprocessing

    def tensors(self, names: Mapping[str, Dtype]) -> Iterator[tuple[str, Array]]:
        """The named tensors in those types, in that order; the two halves of a quantised matrix follow each other."""
        pending: dict[str, Array] = {}
        for name, dtype in names.items():
            if name not in pending:
                if name.endswith(".int8"):
                    layer = name.removesuffix(".int8")
                    pending[name], pending[f"{layer}.scale"] = quantised(self._float(f"{layer}.weight"))
                else:
                    pending[name] = convert(name, self._float(name), dtype)
            yield name, pending.pop(name)

    def _float(self, name: str) -> Array:
        if name.startswith("embed."):
            return self._embedding(name)
        layer, _, kind = name.rpartition(".")
        if layer.endswith((".attn.q", ".attn.k", ".attn.v")):
            at, part = layer[:-1], layer[-1]
            tensor = three(self._tensors[f"{at}qkv.{kind}"])["qkv".index(part)]
            # A power of two for heads of 64: exact.
            tensor = tensor * np.float32(self._geometry.head_dim**-0.5) if part == "q" else tensor
        else:
            tensor = self._tensors[name]
        return np.asarray(tensor.T if tensor.ndim == 2 else tensor)

    def _embedding(self, name: str) -> Array:
        positions, weight = self._tensors["pos_embed"], self._tensors["patch_embed.proj.weight"]
        bias = self._tensors["patch_embed.proj.bias"]
        if name == "embed.class":
            return np.asarray(self._tensors["cls_token"] + positions[:, :1])
        if name == "embed.float32.weight":
            return weight
        if name == "embed.float32.patches":
            return np.asarray(positions[:, 1:] + bias)
        # (pixel / 255 - mean) / std, of (pixel - 128) / 256, which is what the graph makes of a pixel.
        std, mean = (np.array(getattr(self._preprocessing, part), np.float64) for part in ("std", "mean"))
        scaled = weight / std[:, None, None]  # (d, channels, p, p)
        if name == "embed.uint8.weight":
            return np.asarray((scaled * (256 / 255)).transpose(2, 3, 1, 0).reshape(-1, len(weight)), np.float32)
        shift = (scaled * (mean - 128 / 255)[:, None, None]).sum((1, 2, 3))
        return np.asarray(positions[:, 1:] + (bias - shift), np.float32)


def source_of(weights: Weights) -> Source:
    """A supernet's weights in stored form."""
    arrays = {name: tensor.numpy() for name, tensor in weights.tensors.items()}
    return Source(arrays, weights.spec.geometry, weights.spec.preprocessing)


def convert(name: str, tensor: Array, dtype: Dtype) -> Array:
    """A contiguous copy in that type; raises InputError where a value does not fit into it."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(tensor, dtype=numpy_type(dtype))
    if dtype == "float16" and not np.isfinite(converted).all():
        largest = float(np.abs(tensor).max())
        raise InputError(f"tensor {name} holds {largest:g}, more than fp16 can (65504)", hint="export it in fp32")
    return converted
