"""Checkpoints of others become `supernet.safetensors`: official HydraViT, timm and DeiT ViTs, safetensors.

No pickled code runs: torch's restricted loader reads the file, and every class it would not know is replaced by an
inert one that only keeps what it is given.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydradeploy.errors import InputError, IntegrityError, UsageError
from hydradeploy.spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Geometry,
    Interpolation,
    Preprocessing,
    Spec,
    show_heads,
)
from hydradeploy.supernet.store import HEADER, check_file, read_safetensors, save

# The official training script stores the averaged weights under the first name, and those are to be deployed;
# DeiT's own files use "model".
_CONTAINERS = ("state_dict_ema", "state_dict", "model")
# What DistributedDataParallel and torch.compile put before each name, in either order.
_WRAPPERS = ("module.", "_orig_mod.", "module.")


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` made: the spec, which entry of the checkpoint it took, what it had to assume."""

    out: Path
    spec: Spec
    entry: str
    warnings: tuple[str, ...]


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    trained_heads: Sequence[int] | None = None,
    head_dim: int = 64,
    crop_pct: float = 0.875,
    interpolation: Interpolation = "bicubic",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    force: bool = False,
) -> Imported:
    """Read a checkpoint, write a supernet file; an existing one is replaced only with `force`.

    Without `trained_heads`, those of the checkpoint's own training arguments, else 3 up to all heads with a warning.
    `mean` and `std` (one value per channel) default to ImageNet's for colour images, else to 0.5. `crop_pct` and
    `interpolation` default to what the official code validates with.
    Raises UsageError (no such file, `out` exists, an option that does not fit), IntegrityError (damaged), InputError
    (what does not fit, with its name and both shapes), EnvironmentFailed (disk).
    """
    check_file(out)
    if out.exists() and not force:
        raise UsageError(f"{out} exists", hint="replace it with --force, or name another file with --out")
    tensors, entry, stored_heads = _read(checkpoint)
    heads = trained_heads if trained_heads is not None else stored_heads
    try:
        geometry = _geometry(checkpoint, tensors, head_dim, heads)
    except ValueError as error:
        if trained_heads is not None and "trained_heads" in str(error):
            raise _wrong_option(error) from error
        raise InputError(f"{checkpoint}: {error}") from error
    colour = geometry.channels == 3
    half = (0.5,) * geometry.channels
    try:
        preprocessing = Preprocessing(
            mean=tuple(mean) if mean is not None else IMAGENET_MEAN if colour else half,
            std=tuple(std) if std is not None else IMAGENET_STD if colour else half,
            crop_pct=crop_pct,
            interpolation=interpolation,
        )
        names = None if class_names is None else tuple(class_names)
        spec = Spec(geometry=geometry, preprocessing=preprocessing, class_names=names)
    except ValueError as error:  # what is not given fits
        raise _wrong_option(error) from error
    save(out, spec, tensors, source=checkpoint)
    assumptions = list(_damaged(checkpoint))
    if heads is None:
        assumptions.append(
            f"the checkpoint does not say which head counts were trained; assumed "
            f"{show_heads(geometry.trained_heads)} heads of {head_dim} dims (--trained-heads, --head-dim). "
            "An ordinary ViT computes nothing useful with fewer heads than it was trained with"
        )
    return Imported(out, spec, entry, tuple(assumptions))


def _wrong_option(error: ValueError) -> UsageError:
    """What a spec says of its fields, said of the options that they come from."""
    fields = r"\b(crop_pct|mean|std|class_names|trained_heads)\b"
    text = re.sub(fields, lambda field: f"--{field[0].replace('_', '-')}", str(error))
    return UsageError(text, hint="hydradeploy import --help")


class _Inert:
    """Stands in for any class named by a checkpoint; keeps the attributes it is given and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _inert_mapping(*_: object) -> dict[object, object]:
    """Stands in for a mapping that torch's loader fills but does not know."""
    return {}


_MAPPINGS = ("collections.defaultdict",)


def _read(path: Path) -> tuple[dict[str, Tensor], str, tuple[int, ...] | None]:
    """The state dict, the entry it was under, and the head counts of the checkpoint's training arguments."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="give a .pth, .pth.tar, .pt or .safetensors file")
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        if HEADER in metadata:
            raise UsageError(f"{path} is a supernet file already", hint=f"hydradeploy export --supernet {path}")
        return _state(path, tensors), "safetensors", None
    content = _load_inertly(path)
    for entry in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping) and content[entry]:
            return _state(path, content[entry]), entry, _stored_heads(content.get("args"))
    return _state(path, content), "bare state dict", None


def _damaged(path: Path) -> Iterator[str]:
    """What torch loads without a word: bytes that are not those that were saved."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    # Like torch's loader it raises whatever damaged bytes lead it to.
    except Exception:
        record = "its entries"
    if record is not None:
        yield (
            f"the checksum of {record} in {path} does not agree: the file is damaged, unless it was saved without "
            "checksums (torch.serialization.set_crc32_options); compare what evaluate says of it"
        )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def _load_inertly(path: Path) -> Any:
    """torch's restricted loader, run again with a stand-in for each class that it names as unknown."""
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            return _load(path, stand_ins)
        except MemoryError:
            raise
        # The loader raises whatever the bytes lead it to: struct.error, KeyError, UnicodeDecodeError and more.
        except Exception as error:
            unknown = _UNKNOWN_CLASS.search(str(error))
            name = "" if unknown is None else unknown[1]
            full = name if "." in name else f"builtins.{name}"  # torch leaves that module's name out
            if not name or full in stand_ins:
                raise _refusal(path, error) from error
            stand_ins[full] = _inert_mapping if full in _MAPPINGS else type("Inert", (_Inert,), {})


def _load(path: Path, stand_ins: Mapping[str, Any]) -> Any:
    pairs = [(stand_in, name) for name, stand_in in stand_ins.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(pairs):  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # of old pickle protocols
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


# What torch says of a class it was not told to allow, from 2.6 to 2.13.
_UNKNOWN_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")


# By what torch says of them: what is no checkpoint, and what holds code. Often it advises to run whatever is in the
# file, which is nothing to pass on.
_REFUSED = {
    "Weights only load failed": "not a torch checkpoint, or one with code in it, which is not run",
    "Invalid magic number": "not a torch checkpoint, but a pickle of something else",
    "TorchScript archives": "a TorchScript archive, a program, which is not run",
}


def _refusal(path: Path, error: Exception) -> InputError | IntegrityError:
    hint = "load it where you trust it and save the state dict as safetensors"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    code = next((line for line in lines if "blocked" in line or "GLOBAL" in line), None)
    if code is not None:
        return InputError(f"{path}: refused, its pickle asks for code to be run ({code})", hint=hint)
    for words, what in _REFUSED.items():
        if words in str(error):
            return InputError(f"{path}: {what}", hint=hint)
    # Whatever the loader stumbles over as it reads bytes that are no pickle says nothing about the file.
    reason = lines[0] if isinstance(error, RuntimeError) else "its bytes are no pickle, or only the beginning of one"
    return IntegrityError(
        f"{path}: cannot be read ({reason})", hint="the file may be truncated, or is not a torch checkpoint"
    )


def _state(path: Path, state: object) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path}: holds no state dict (looked for {', '.join(_CONTAINERS)} and a bare one)")
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        tensors[name] = value
    return tensors


def _stored_heads(args: object) -> tuple[int, ...] | None:
    """The `--heads` of the official training script, where the checkpoint kept its arguments."""
    heads = getattr(args, "heads", None)
    if isinstance(heads, list) and heads and all(type(head) is int for head in heads):
        return tuple(sorted(set(heads)))
    return None


def _geometry(path: Path, tensors: Mapping[str, Tensor], head_dim: int, heads: Sequence[int] | None) -> Geometry:
    """Read the geometry off the shapes; `save` then checks every tensor against it."""
    dim, channels, patch, _ = _shape(path, tensors, "patch_embed.proj.weight", 4)
    tokens = _shape(path, tensors, "pos_embed", 3)[1]
    hidden = _shape(path, tensors, "blocks.0.mlp.fc1.weight", 2)[0]
    classes = _shape(path, tensors, "head.weight", 2)[0]
    if dim % head_dim:
        raise InputError(
            f"{path}: tensor patch_embed.proj.weight has {dim} channels, expected a multiple of head_dim {head_dim}",
            hint="name the head size with --head-dim",
        )
    grid = math.isqrt(tokens - 1)
    if grid < 1 or grid * grid != tokens - 1:
        raise InputError(
            f"{path}: tensor pos_embed has shape {tuple(tensors['pos_embed'].shape)}, expected "
            f"{(1, grid * grid + 1, dim)}: a square of patches and one class token",
            hint="distilled ViTs and register tokens are not supported",
        )
    if not (dim and channels and patch and hidden and classes):
        raise InputError(f"{path}: tensor patch_embed.proj.weight, blocks.0.mlp.fc1.weight or head.weight is empty")
    total = dim // head_dim
    return Geometry(
        image_size=grid * patch,
        patch_size=patch,
        channels=channels,
        head_dim=head_dim,
        heads=total,
        trained_heads=tuple(heads if heads is not None else range(min(3, total), total + 1)),
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        mlp_ratio=hidden / dim,
        classes=classes,
        eps=1e-6,
    )


def _shape(path: Path, tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(
            f"{path}: tensor {name} is missing, so this is no ViT in timm's naming",
            hint=f"it holds for example {', '.join(list(tensors)[:3])}",
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != rank:
        raise InputError(f"{path}: tensor {name} has shape {shape}, expected {rank} dimensions")
    return shape
