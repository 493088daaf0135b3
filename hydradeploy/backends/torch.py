"""PyTorch on the CPU, without a graph: it computes from the weights file.

The file is mapped once for all sessions of a process, and a subnet's tensors are views of it: a second subnet costs no
memory. Where the products are computed in another type than the file's, that subnet is a copy.

The number of threads belongs to the process, not to a session. It is what the session that runs was opened with, and
what it was before when the last session is closed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from hydradeploy.backends import Images, Model, Options, Weights, check_input, check_options, read_ahead, with_defaults
from hydradeploy.errors import MissingError, environment
from hydradeploy.spec import Subnet
from hydradeploy.stored import ITEM_BYTES, stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Session:
    def __init__(self, model: Model, options: Options) -> None:
        import torch

        chosen = with_defaults(BACKEND, options, model.precision)
        weights = weights_of(model)
        dtype: torch.dtype = getattr(torch, TYPES[str(chosen.compute_type)])
        self._model, self._threads = model, chosen.threads
        read_ahead(model)
        mapped = views(weights)
        copied = any(tensor.dtype != dtype for tensor in mapped.values())
        self._tensors = {name: tensor.to(dtype) for name, tensor in mapped.items()}
        self._subnet, self._dtype, self._forward = weights.subnet, dtype, forward
        self._facts = {
            "torch": str(torch.__version__),
            "threads": "default" if options.threads is None else str(options.threads),
            "compute_type": str(chosen.compute_type),
            "weights": f"a copy in {chosen.compute_type}" if copied else "mapped",
            **chosen.settings,
        }
        _threads.enter()
        self._open = True
        if chosen.settings["mode"] == "compiled":
            try:
                self._compile()
            except BaseException:
                self.__exit__(None, None, None)
                raise

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._open, self._tensors = False, {}
            _threads.leave()

    def run(self, images: Images) -> NDArray[np.float32]:
        if not self._open:
            raise RuntimeError(f"{self._model.name}: the session is closed")
        check_input(self._model, images)
        try:
            return self._run(images)
        except RuntimeError as error:
            raise MissingError(f"torch cannot run {self._model.name}: {first_line(error)}") from error

    def _run(self, images: Images) -> NDArray[np.float32]:
        import torch

        _threads.use(self._threads)
        with torch.inference_mode():
            # torch has no arrays that cannot be written to.
            pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
            logits = self._forward(self._tensors, self._subnet, pixels.to(self._dtype))
            return np.asarray(logits.float().numpy())

    def _compile(self) -> None:
        import torch

        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise MissingError(
                f"torch compiles with {compiler}, which is not installed", hint="install it, or take mode=eager"
            )
        # Code of its own: torch counts what it compiles of one, and beyond eight computes without compiling.
        code = forward.__code__.replace(co_name=f"forward_{self._subnet.name}")
        self._forward = torch.compile(FunctionType(code, globals()), fullgraph=True)
        batch = 1 if self._model.batch == "dynamic" else self._model.batch
        try:
            self._run(np.zeros((batch, *self._model.image_shape), self._model.input))
        except Exception as error:  # whatever its compiler or the system's says
            cause = getattr(error, "inner_exception", error)
            raise MissingError(
                f"torch cannot compile {self._model.name}: {first_line(cause)}", hint="take mode=eager"
            ) from error

    def facts(self) -> Mapping[str, str]:
        return self._facts


class _Torch:
    name = "torch"
    dialect = None
    processor = "cpu"
    settings: Mapping[str, tuple[str, ...]] = {"mode": ("eager", "compiled")}

    def compute_types(self, precision: str) -> tuple[str, ...]:
        if precision == "fp32":
            return ("fp32", "bf16") if "bf16" in _narrow() else ("fp32",)
        return (precision,) if precision in _narrow() else ()

    def why_not(self) -> str | None:
        return None if find_spec("torch") else "the package torch is not installed"

    def software(self) -> Mapping[str, str]:
        from importlib.metadata import version

        return {"torch": version("torch")}

    def prepare(self) -> None:
        import torch

        torch.zeros(1)

    def open(self, model: Model, options: Options) -> _Session:
        check_options(self, options, model.precision)
        return _Session(model, options)


BACKEND = _Torch()


class _Threads:
    """The process's number of threads, lent to sessions."""

    def __init__(self) -> None:
        self._lock, self._sessions, self._before = threading.Lock(), 0, 0

    def enter(self) -> None:
        import torch

        with self._lock:
            if self._sessions == 0:
                self._before = torch.get_num_threads()
            self._sessions += 1

    def use(self, threads: int | None) -> None:
        import torch

        wanted = threads or self._before
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def leave(self) -> None:
        import torch

        with self._lock:
            self._sessions -= 1
            if self._sessions == 0:
                torch.set_num_threads(self._before)


_threads = _Threads()


@cache
def _narrow() -> tuple[str, ...]:
    """The types of 16 bits whose products this processor has instructions for; torch does others too, as fast as one
    number after the other can be."""
    import torch

    if not torch._C._has_mkldnn:
        return ()
    asked = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return tuple(name for name, supported in asked.items() if supported())


def weights_of(model: Model) -> Weights:
    """Where the model's tensors lie; raises MissingError where there is no weights file."""
    if model.weights is None:
        raise MissingError(
            f"torch computes from a weights file, and the graphs of {model.name} carry their own",
            hint="export without --standalone",
        )
    return model.weights


# Alive as long as a tensor is: torch keeps the array whose memory it uses.
_mapped: WeakValueDictionary[tuple[int, ...], NDArray[np.uint8]] = WeakValueDictionary()


def views(weights: Weights) -> dict[str, Tensor]:
    """The tensors that a subnet reads, by their stored names: views of the file, mapped once for all subnets in use.

    Raises MissingError for a file that ends too early, EnvironmentFailed for one that cannot be read.
    """
    return nested(whole(weights), weights)


def nested(tensors: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """What a subnet reads of whole stored tensors, as views of them."""
    shapes = {name: tensor.shape for name, tensor in stored(weights.subnet, weights.form).items()}
    return {name: tensors[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


def whole(weights: Weights) -> dict[str, Tensor]:
    """The stored tensors of which a subnet reads a part, as views of the mapped file; raises as `views` does."""
    import torch

    with environment("mapping the weights"):
        key = file_key(weights.path)
        data = _mapped.get(key)
        if data is None:
            # Private, not read-only: torch has no tensors that cannot be written to.
            data = _mapped[key] = np.memmap(weights.path, np.uint8, mode="c")
    everything, found = torch.from_numpy(data), {}
    for name in stored(weights.subnet, weights.form):
        there = weights.table[name]
        end = there.offset + prod(there.shape) * ITEM_BYTES[there.dtype]
        if end > len(data):
            raise MissingError(f"torch cannot open {weights.path}: {name} ends at {end}, the file at {len(data)}")
        found[name] = everything[there.offset : end].view(getattr(torch, there.dtype)).view(there.shape)
    return found


def file_key(path: Path) -> tuple[int, ...]:
    """What tells a file from another one, and from itself before it was written again."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def forward(tensors: Mapping[str, Tensor], subnet: Subnet, images: Tensor) -> Tensor:
    """Logits (b, classes) of float images (b, channels, s, s) or pixels (b, s, s, channels), in the tensors' type. The
    same mathematics as the graphs."""
    import torch

    d, eps = subnet.width, subnet.geometry.eps
    x = _tokens(tensors, subnet, images)  # (b, tokens, d)
    for i in range(subnet.geometry.depth):
        at = f"blocks.{i}"
        y = torch.layer_norm(x, (d,), tensors[f"{at}.norm1.weight"], tensors[f"{at}.norm1.bias"], eps)
        queries = y
        if i == subnet.geometry.depth - 1:  # nobody reads another token of the last block
            x, queries = x[:, :1], y[:, :1]
        x = x + _linear(tensors, f"{at}.attn.proj", _attention(tensors, subnet, f"{at}.attn", queries, y))
        y = torch.layer_norm(x, (d,), tensors[f"{at}.norm2.weight"], tensors[f"{at}.norm2.bias"], eps)
        y = torch.nn.functional.gelu(_linear(tensors, f"{at}.mlp.fc1", y))
        x = x + _linear(tensors, f"{at}.mlp.fc2", y)
    x = torch.layer_norm(x, (d,), tensors["norm.weight"], tensors["norm.bias"], eps)
    return _linear(tensors, subnet.classifier, x[:, 0])


def _tokens(tensors: Mapping[str, Tensor], subnet: Subnet, images: Tensor) -> Tensor:
    import torch

    g = subnet.geometry
    p, cells = g.patch_size, g.image_size // g.patch_size
    if "embed.float32.weight" in tensors:
        x = torch.conv2d(images, tensors["embed.float32.weight"], stride=p).flatten(2).transpose(1, 2)
        x = x + tensors["embed.float32.patches"]
    else:
        x = ((images - 128) * 2.0**-8).reshape(-1, p, cells, p * g.channels).transpose(1, 2)
        x = x.reshape(-1, g.patches, p * p * g.channels) @ tensors["embed.uint8.weight"]
        x = x + tensors["embed.uint8.patches"]
    return torch.cat([tensors["embed.class"].expand(len(x), -1, -1), x], 1)


def _attention(tensors: Mapping[str, Tensor], subnet: Subnet, at: str, queries: Tensor, x: Tensor) -> Tensor:
    import torch

    def heads(y: Tensor) -> Tensor:
        return y.view(len(y), -1, subnet.heads, subnet.geometry.head_dim).transpose(1, 2)

    q = heads(_linear(tensors, f"{at}.q", queries))
    k, v = heads(x @ tensors[f"{at}.k.weight"]), heads(_linear(tensors, f"{at}.v", x))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)  # (b, heads, queries, head_dim)
    return y.transpose(1, 2).flatten(2)


def _linear(tensors: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.linear(x, tensors[f"{layer}.weight"].T, tensors[f"{layer}.bias"])


def first_line(error: Exception) -> str:
    """What torch says, without the traces it adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
