"""A subnet in torch, layer by layer, as its graphs compute it, for what has to see or change the inputs of its layers.

The plain ViT has the same logits but other inputs: graphs take the last block's queries, projection and MLP of the
class token alone, so what patches hold there belongs into no range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hydradeploy.errors import InputError
from hydradeploy.spec import Subnet, leading, three
from hydradeploy.stored import matrices

# Images that are run together: enough to keep the cores busy, and 20 MB of a DeiT-B's hidden activations.
BATCH = 8


class Walk:
    """A subnet in fp32. `linear` is where a subclass sees each input on its way into a product.

    `tensors` are the supernet's, under timm's names; nothing of them is copied, so many subnets cost no memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], subnet: Subnet) -> None:
        self.subnet = subnet
        self._pieces: dict[str, Tensor] = {}
        for name, shape in subnet.shapes.items():
            if ".attn.qkv." not in name:
                self._pieces[name] = leading(tensors[subnet.source(name)], name, shape)
                continue
            layer, kind = name.rsplit(".", 1)
            for matrix, part in zip(matrices(layer), three(tensors[name]), strict=True):
                piece = f"{matrix}.{kind}"
                self._pieces[piece] = leading(part, piece, (shape[0] // 3, *shape[1:]))

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of normalised images (n, channels, s, s)."""
        return self.rest(0, self.tokens(images))

    def rest(self, first: int, x: Tensor) -> Tensor:
        """Logits (n, classes) from the input of block `first`, or of the final norm where there is no such block."""
        for i in range(first, self.subnet.geometry.depth):
            x = self.block(i, x)
        return self.logits(x)

    def tokens(self, images: Tensor) -> Tensor:
        """The input of the first block: (n, tokens, d)."""
        weight, bias = self._pieces["patch_embed.proj.weight"], self._pieces["patch_embed.proj.bias"]
        patches = F.conv2d(images, weight, bias, stride=self.subnet.geometry.patch_size).flatten(2).transpose(1, 2)
        token = self._pieces["cls_token"].expand(len(images), -1, -1)
        return torch.cat([token, patches], 1) + self._pieces["pos_embed"]

    def block(self, i: int, x: Tensor) -> Tensor:
        """Block i: (n, tokens, d) to the same, the last one to the class token, (n, 1, d)."""
        at, last = f"blocks.{i}", i == self.subnet.geometry.depth - 1
        y = self._norm(f"{at}.norm1", x)
        queries, residual = (y[:, :1], x[:, :1]) if last else (y, x)
        x = residual + self._linear(f"{at}.attn.proj", self._attention(f"{at}.attn", queries, y))
        hidden = F.gelu(self._linear(f"{at}.mlp.fc1", self._norm(f"{at}.norm2", x)))
        return x + self._linear(f"{at}.mlp.fc2", hidden)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (n, classes) from the output of the last block."""
        return self._linear("head", self._norm("norm", x))[:, 0]

    def linear(self, layer: str, matrix: str, x: Tensor) -> Tensor:
        """The product of a layer's input with one of its matrices (see `stored.matrices`), and its bias."""
        return F.linear(x, self._pieces[f"{matrix}.weight"], self._pieces[f"{matrix}.bias"])

    def _linear(self, layer: str, x: Tensor) -> Tensor:
        return self.linear(layer, layer, x)

    def _attention(self, at: str, queries: Tensor, x: Tensor) -> Tensor:
        layer, d = f"{at}.qkv", self.subnet.width
        inputs = zip(matrices(layer), (queries, x, x), strict=True)
        q, k, v = (self._heads(self.linear(layer, matrix, y)) for matrix, y in inputs)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, d)

    def _heads(self, x: Tensor) -> Tensor:
        """(n, tokens, d) to (n, heads, tokens, head_dim)."""
        return x.reshape(*x.shape[:2], self.subnet.heads, self.subnet.geometry.head_dim).transpose(1, 2)

    def _norm(self, at: str, x: Tensor) -> Tensor:
        weight, bias = self._pieces[f"{at}.weight"], self._pieces[f"{at}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.subnet.geometry.eps)


def check_images(images: NDArray[Any], dtype: str, *sides: int) -> None:
    """Raise InputError unless `images` are of that type and shape (n, *sides), at least one."""
    if images.dtype != dtype or images.shape[1:] != sides or not len(images):
        expected = f"{dtype} of shape (n, {', '.join(map(str, sides))}), n at least 1"
        raise InputError(f"images are {images.dtype} of shape {images.shape}, expected {expected}")
