"""What a supernet is: its geometry, its preprocessing, and the shapes, parameters and MACs of each of its subnets.

Subnet k is the first k heads: width d = head_dim * k, MLP width mlp_ratio * d, the same depth (HydraViT, arXiv
2409.17978, section 3). Every tensor of a subnet is the leading block of the supernet's tensor of that name; only the
classifier may be each subnet's own (the paper's Table 2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import msgspec

from hydradeploy.errors import IntegrityError, UsageError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Classifiers = Literal["shared", "separate"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value that can be on disk: frozen, strict about types, refusing fields it does not know."""


class _Versioned(msgspec.Struct):
    schema: int


_Kind = TypeVar("_Kind", bound=Record)


def decode(data: bytes, kind: type[_Kind], where: str, schema: int = 1) -> _Kind:
    """Strictly decode one of our JSON documents, which `schema` of the format must fit.

    Raises IntegrityError that names `where` and the path inside it.
    """
    hint = "copy or write it again"
    try:
        found = msgspec.json.decode(data, type=_Versioned).schema
        if found != schema:
            older = "an earlier version wrote it: move it away and write it again"
            raise IntegrityError(
                f"{where}: schema {found}, this version reads {schema}",
                hint="upgrade hydradeploy" if found > schema else older,
            )
        return msgspec.json.decode(data, type=kind)
    except UsageError as error:  # a head count outside the geometry
        raise IntegrityError(f"{where}: {error.message}", hint=hint) from error
    except msgspec.ValidationError as error:  # its text ends with the path
        raise IntegrityError(f"{where}: {error}", hint=hint) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{where}: cannot be read ({error})", hint=hint) from error


class Geometry(Record, frozen=True, kw_only=True):
    """The shape of a supernet. `heads` is that of the largest subnet; raises ValueError where the numbers disagree.

    `classifiers` says whether subnets share one classifier, each its leading columns, or have each their own.
    """

    image_size: int
    patch_size: int
    channels: int
    head_dim: int
    heads: int
    trained_heads: tuple[int, ...]
    depth: int
    mlp_ratio: float
    classes: int
    eps: float
    classifiers: Classifiers = "shared"

    def __post_init__(self) -> None:
        for field in ("image_size", "patch_size", "channels", "head_dim", "heads", "depth", "classes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.depth > 1000:  # no ViT is; a damaged file should not make billions of names
            raise ValueError(f"depth must be at most 1000, got {self.depth}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        hidden = self.head_dim * self.mlp_ratio
        # A ratio such as 8/3 is not exact in binary; what it gives is.
        if not math.isfinite(hidden) or round(hidden) < 1 or abs(hidden - round(hidden)) > 1e-6:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} times head_dim {self.head_dim} must be a whole number above 0"
            )
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be between 0 and 1, got {self.eps}")
        if not self.trained_heads or list(self.trained_heads) != sorted(set(self.trained_heads)):
            raise ValueError("trained_heads must be ascending head counts, at least one")
        if self.trained_heads[0] < 1 or self.trained_heads[-1] > self.heads:
            raise ValueError(f"trained_heads must be within 1..{self.heads}, got {show_heads(self.trained_heads)}")

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.patches + 1

    def subnet(self, heads: int) -> Subnet:
        """The subnet of `heads` heads; raises UsageError for a head count that was not trained."""
        if heads not in self.trained_heads:
            raise UsageError(
                f"{heads} heads were not trained", hint=f"this supernet has {show_heads(self.trained_heads)}"
            )
        return Subnet(geometry=self, heads=heads)

    def subnets(self) -> tuple[Subnet, ...]:
        """All trained subnets, smallest first."""
        return tuple(self.subnet(heads) for heads in self.trained_heads)

    def alone(self, heads: int) -> Geometry:
        """The geometry of the plain ViT that the leading `heads` heads form."""
        return msgspec.structs.replace(self, heads=heads, trained_heads=(heads,), classifiers="shared")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """timm's parameter names and shapes at full width, in forward order; `head.h03.weight` and the like, each as
        wide as its subnet, where classifiers are separate."""
        return _shapes(self)


class Preprocessing(Record, frozen=True, kw_only=True):
    """From an image file to the network's input: resize the shorter side, centre crop, scale to 0..1, normalise.

    `crop_pct` is the share of the resized shorter side that the crop keeps (timm's word).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: Interpolation

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError("mean and std must have one value per channel")
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std must be finite and above 0, got {self.std}")


class Spec(Record, frozen=True, kw_only=True):
    """All that must travel with the weights. `class_names` is None where nobody gave them."""

    geometry: Geometry
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.preprocessing.mean) != self.geometry.channels:
            raise ValueError(
                f"mean has {len(self.preprocessing.mean)} values but the images have {self.geometry.channels} channels"
            )
        if self.class_names is not None and len(self.class_names) != self.geometry.classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.geometry.classes} classes")


class Subnet(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The first `heads` heads of a supernet."""

    geometry: Geometry
    heads: int

    @property
    def name(self) -> str:
        """`h03` ... `h12`."""
        return f"h{self.heads:02d}"

    @property
    def classifier(self) -> str:
        """The name under which this subnet's classifier is kept: `head`, or `head.h03` where it is its own."""
        return "head" if self.geometry.classifiers == "shared" else f"head.{self.name}"

    def source(self, name: str) -> str:
        """The supernet's tensor of which this subnet's tensor `name` is the leading block."""
        return f"{self.classifier}{name.removeprefix('head')}" if name.startswith("head.") else name

    @property
    def width(self) -> int:
        """The embedding channels, timm's embed_dim."""
        return self.geometry.head_dim * self.heads

    @property
    def mlp_width(self) -> int:
        """The MLP's hidden channels."""
        return round(self.geometry.mlp_ratio * self.width)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """timm's parameter names and this subnet's shapes, in forward order."""
        return _shapes(self.geometry.alone(self.heads))

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(_product(shape) for shape in self.shapes.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image, attention products counted, norms and softmax not."""
        g, d, n = self.geometry, self.width, self.geometry.tokens
        patch_embed = g.patches * g.channels * g.patch_size**2 * d
        products = n * (4 * d * d + 2 * d * self.mlp_width) + 2 * n * n * d
        return patch_embed + g.depth * products + g.classes * d


Array = TypeVar("Array", bound=Any)


def leading(tensor: Array, name: str, shape: Sequence[int]) -> Array:
    """The leading block of a supernet's tensor, as a view where the layout allows; numpy arrays and torch tensors.

    `attn.qkv` holds three stacked matrices, so its rows are three prefixes, one each of q, k and v.
    """
    if ".attn.qkv." not in name:
        block: Array = tensor[tuple(slice(size) for size in shape)]
        return block
    rows = (slice(None), slice(shape[0] // 3), *(slice(size) for size in shape[1:]))
    stacked: Array = three(tensor)[rows].reshape(*shape)
    return stacked


def three(qkv: Array) -> Array:
    """q, k and v of a stacked tensor along a new first axis, as a view."""
    parts: Array = qkv.reshape(3, qkv.shape[0] // 3, *qkv.shape[1:])
    return parts


def parse_heads(text: str) -> tuple[int, ...]:
    """Head counts from "3,6,9-12", ascending; raises UsageError where it cannot be read."""
    heads: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        if match is None:
            raise UsageError(f"{text!r} is not a list of head counts", hint="write for example 3,6,9-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= 4096:
            raise UsageError(f"{part.strip()!r} is not a range of head counts", hint="write for example 9-12")
        heads.update(range(first, last + 1))
    return tuple(sorted(heads))


def show_heads(heads: Iterable[int]) -> str:
    """The shortest text that `parse_heads` reads back: 3,6,9-12."""
    runs: list[list[int]] = []
    for head in sorted(heads):
        if runs and head == runs[-1][1] + 1:
            runs[-1][1] = head
        else:
            runs.append([head, head])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _shapes(g: Geometry) -> dict[str, tuple[int, ...]]:
    d, h = g.head_dim * g.heads, round(g.mlp_ratio * g.head_dim * g.heads)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, g.tokens, d),
        "patch_embed.proj.weight": (d, g.channels, g.patch_size, g.patch_size),
        "patch_embed.proj.bias": (d,),
    }
    for i in range(g.depth):
        block = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            "mlp.fc1.weight": (h, d),
            "mlp.fc1.bias": (h,),
            "mlp.fc2.weight": (d, h),
            "mlp.fc2.bias": (d,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    if g.classifiers == "shared":
        return shapes | {"head.weight": (g.classes, d), "head.bias": (g.classes,)}
    for subnet in g.subnets():
        shapes[f"{subnet.classifier}.weight"] = (g.classes, subnet.width)
        shapes[f"{subnet.classifier}.bias"] = (g.classes,)
    return shapes


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
