"""`supernet.safetensors`: the weights under timm's names, the spec as JSON in the header under "hydradeploy"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from hydradeploy.errors import InputError, IntegrityError, UsageError, environment
from hydradeploy.files import write_atomically
from hydradeploy.spec import Geometry, Record, Spec, Subnet, decode, leading, three
from hydradeploy.supernet.model import Supernet, plain_vit

HEADER = "hydradeploy"


class Header(Record, frozen=True, kw_only=True):
    """What the file's header says besides names and shapes."""

    schema: int
    spec: Spec


@dataclass(frozen=True)
class Weights:
    """A spec and the tensors that fit it, mapped from their file: pages are read when touched."""

    spec: Spec
    tensors: Mapping[str, Tensor]

    def model(self) -> Supernet:
        """A supernet in evaluation mode with a copy of these weights."""
        with torch.device("meta"):
            model = Supernet(self.spec.geometry)
        model.load_state_dict({name: tensor.clone() for name, tensor in self.tensors.items()}, assign=True)
        return model.eval()

    def plain(self, subnet: Subnet) -> Supernet:
        """The plain ViT of one subnet, in evaluation mode, without building the supernet."""
        return plain_vit(self.tensors, subnet)


def save(path: Path, spec: Spec, tensors: Mapping[str, Tensor], *, source: Path | None = None) -> None:
    """Write a supernet file, whole or not at all; refusals name `source`, where the tensors come from another file.

    Raises InputError for tensors that do not fit the spec or are not finite, EnvironmentFailed when the disk fails.
    """
    check(tensors, spec.geometry, str(source or path))
    arrays = {
        name: tensors[name].detach().to("cpu", torch.float32).contiguous().numpy() for name in spec.geometry.shapes()
    }
    header = msgspec.json.encode(Header(schema=1, spec=spec)).decode()
    # One metadata entry, not the customary "format" too: safetensors writes several in random order, and the same
    # supernet is to give the same bytes.
    data = to_safetensors(arrays, metadata={HEADER: header})
    with environment(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)


def check_file(path: Path) -> None:
    """Raise UsageError where a supernet file is to take the place of what is no file: a directory, a device."""
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "no file that can be replaced"
        raise UsageError(f"{path} is {what}", hint="name a file with --out")


def load(path: Path) -> Weights:
    """Open a supernet file.

    Raises UsageError when it is not there, IntegrityError when it is damaged or its header is not ours, InputError for
    tensors that do not fit the spec or are not finite.
    """
    tensors, metadata = read_safetensors(path)
    if HEADER not in metadata:
        raise InputError(
            f"{path}: the header holds no spec, so this is not a supernet file",
            hint=f"hydradeploy import {path} --out supernet.safetensors",
        )
    spec = _spec(path, metadata[HEADER])
    check(tensors, spec.geometry, str(path))
    return Weights(spec, {name: tensor.float() for name, tensor in tensors.items()})


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped, and metadata of any safetensors file; raises UsageError or IntegrityError."""
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file", hint="train a supernet or import a checkpoint: hydradeploy import --help"
        )
    try:
        with environment(f"reading {path}"), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise IntegrityError(
            f"{path}: not a whole safetensors file ({error})", hint="copy or write it again; it may be truncated"
        ) from error


def check(tensors: Mapping[str, Tensor], geometry: Geometry, source: str) -> None:
    """Raise InputError unless `tensors` are just those of the geometry, float and finite; names tensor and shapes."""
    expected = geometry.shapes()
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: tensor {name} is missing, expected with shape {shape}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{source}: tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    for name, tensor in tensors.items():
        if name not in expected:
            raise InputError(
                f"{source}: tensor {name} with shape {tuple(tensor.shape)} has no place in a plain ViT, expected none",
                hint="supported: class token, learned positions, pre-norm blocks, one linear head, as in timm's DeiT",
            )
        if not tensor.is_floating_point():
            raise InputError(f"{source}: tensor {name} is {tensor.dtype}, expected floating point")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise InputError(f"{source}: tensor {name} holds no plain values (meta, sparse or other layout)")
        # One pass and no copy: a sum is finite only if every term is, and terms that cancel infinities give NaN.
        if not torch.isfinite(tensor.float().sum(dtype=torch.float64)):
            raise InputError(f"{source}: tensor {name} holds NaN or infinite values{_as_fp32(tensor)}")


def _as_fp32(tensor: Tensor) -> str:
    return "" if tensor.dtype == torch.float32 else f" once it is fp32 (it is {tensor.dtype})"


def place(model: Supernet, small: Mapping[str, Tensor], geometry: Geometry) -> None:
    """Put a smaller ViT into the leading corner, so that the supernet at its head counts equals it exactly.

    Where the supernet's classifiers are separate, those of the small one's head counts are replaced and no others.
    Raises InputError where anything but the number of heads differs, naming the tensor and both shapes, or head_dim and
    eps, which no shape tells; and for separate classifiers where the supernet has one.
    """
    check(small, geometry, "the smaller ViT")
    if geometry.classifiers == "separate" and model.geometry.classifiers == "shared":
        raise InputError(
            "the smaller ViT has separate classifiers, the supernet shares one",
            hint="train with --classifiers separate, or start from a file with a shared one",
        )
    if geometry.head_dim != model.geometry.head_dim or geometry.eps != model.geometry.eps:
        raise InputError(
            f"the smaller ViT has head_dim {geometry.head_dim} and eps {geometry.eps}, "
            f"the supernet {model.geometry.head_dim} and {model.geometry.eps}"
        )
    if geometry.heads > model.geometry.heads:
        raise InputError(
            f"the smaller ViT has more heads than the supernet: tensor cls_token has shape "
            f"{tuple(small['cls_token'].shape)}, expected at most {tuple(model.cls_token.shape)}"
        )
    corner = msgspec.structs.replace(
        model.geometry, heads=geometry.heads, trained_heads=geometry.trained_heads, classifiers=geometry.classifiers
    )
    check(small, corner, "the smaller ViT, in the supernet's leading corner")
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, piece in _pieces(small, geometry, model.geometry):
            if ".attn.qkv." in name:
                three(whole[name])[tuple(slice(size) for size in three(piece).shape)] = three(piece)
            else:
                whole[name][tuple(slice(size) for size in piece.shape)] = piece


def _pieces(small: Mapping[str, Tensor], geometry: Geometry, whole: Geometry) -> Iterator[tuple[str, Tensor]]:
    """What of the smaller ViT goes where in the supernet of geometry `whole`."""
    if whole.classifiers == "shared":
        yield from small.items()
        return
    yield from ((name, tensor) for name, tensor in small.items() if not name.startswith("head."))
    for k in geometry.trained_heads:
        if k in whole.trained_heads:
            subnet = geometry.subnet(k)
            for name in ("head.weight", "head.bias"):
                yield whole.subnet(k).source(name), leading(small[subnet.source(name)], name, subnet.shapes[name])


def _spec(path: Path, text: str) -> Spec:
    return decode(text.encode(), Header, f"{path}, header entry {HEADER!r}").spec
