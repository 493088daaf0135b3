"""Weights in the form that graphs read them: names, types and shapes, and which of them an artifact reads.

Every tensor of a subnet is the leading block of the stored one. What can be computed before the first image is, where
that keeps it so: q is scaled already, k has no bias (it adds the same to a whole row of the softmax and cancels), the
class token has its position, and positions have the bias of the patch embedding. Matrices are [in, out], q, k and v
apart.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hydradeploy.spec import Geometry, Record, Subnet

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Input = Literal["float32", "uint8"]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class Form(Record, frozen=True, kw_only=True):
    """Which tensors an artifact reads.

    `dtype` is that of everything but `int8`, the layers (timm's names, see `layers`) whose matrices are int8. `input`
    is what images are: float32 (b, channels, s, s), normalised, or uint8 (b, s, s, channels).
    """

    dtype: Dtype
    input: Input = "float32"
    int8: tuple[str, ...] = ()


class Tensor(NamedTuple):
    """A stored tensor, or the leading block of one."""

    dtype: Dtype
    shape: tuple[int, ...]


def image_shape(geometry: Geometry, kind: Input) -> tuple[int, int, int]:
    """Of one image as a graph of that input takes it: (channels, s, s) normalised, or (s, s, channels) pixels."""
    g = geometry
    return (g.channels, g.image_size, g.image_size) if kind == "float32" else (g.image_size, g.image_size, g.channels)


def layers(geometry: Geometry) -> tuple[str, ...]:
    """The layers whose products can be in int8, in forward order: timm's names of the linear layers."""
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return (*(f"blocks.{i}.{part}" for i in range(geometry.depth) for part in parts), "head")


def matrices(layer: str) -> tuple[str, ...]:
    """What a layer's matrices are stored as: q, k and v apart."""
    return tuple(layer.replace("qkv", part) for part in "qkv") if layer.endswith("qkv") else (layer,)


def stored(subnet: Subnet, form: Form) -> dict[str, Tensor]:
    """The tensors that a subnet reads, in forward order: a float matrix is NAME.weight, an int8 one is NAME.int8 with
    one scale per output channel, NAME.scale. The classifier's name is `Subnet.classifier`, its layer is always head."""
    g, d, hidden = subnet.geometry, subnet.width, subnet.mlp_width
    found: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        found[name] = Tensor(form.dtype, shape)

    def linear(layer: str, name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        if layer in form.int8:
            found[f"{name}.int8"] = Tensor("int8", (rows, columns))
            add(f"{name}.scale", columns)
        else:
            add(f"{name}.weight", rows, columns)
        if bias:
            add(f"{name}.bias", columns)

    add("embed.class", 1, 1, d)
    patch = (g.channels, g.patch_size, g.patch_size)
    if form.input == "float32":
        add("embed.float32.weight", d, *patch)
    else:
        add("embed.uint8.weight", g.channels * g.patch_size**2, d)
    add(f"embed.{form.input}.patches", 1, g.patches, d)
    for i in range(g.depth):
        at = f"blocks.{i}"
        add(f"{at}.norm1.weight", d)
        add(f"{at}.norm1.bias", d)
        for part in "qkv":
            linear(f"{at}.attn.qkv", f"{at}.attn.{part}", d, d, bias=part != "k")
        linear(f"{at}.attn.proj", f"{at}.attn.proj", d, d)
        add(f"{at}.norm2.weight", d)
        add(f"{at}.norm2.bias", d)
        linear(f"{at}.mlp.fc1", f"{at}.mlp.fc1", d, hidden)
        linear(f"{at}.mlp.fc2", f"{at}.mlp.fc2", hidden, d)
    add("norm.weight", d)
    add("norm.bias", d)
    linear("head", subnet.classifier, d, g.classes)
    return found
