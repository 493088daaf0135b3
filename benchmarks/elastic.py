"""Other ways to nest subnets in one ViT, on the parameters of a Supernet, to compare HydraViT's with.

A level k of 1 to 12 takes the place of a head count. Each is the idea of its paper at the size of these experiments, as
the reference implementation of ThinkingViT has them for ImageNet; none is the code of its authors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydradeploy.spec import Geometry
from hydradeploy.supernet.model import Attention, Block, Mlp, Supernet


@dataclass(frozen=True)
class Shape:
    """What a level computes: embedding width, heads, channels of a head, hidden width of the MLP."""

    width: int
    heads: int
    head_dim: int
    hidden: int

    def macs(self, g: Geometry) -> int:
        """Multiply-accumulates per image, as Subnet.macs counts them."""
        n, inner = g.tokens, self.heads * self.head_dim
        products = n * (4 * self.width * inner + 2 * self.width * self.hidden) + 2 * n * n * inner
        return g.patches * g.channels * g.patch_size**2 * self.width + g.depth * products + g.classes * self.width


class Elastic(Supernet):
    """A ViT whose levels are of any shape that prefixes of its parameters can have."""

    def shape(self, level: int) -> Shape:
        """What a level computes."""
        raise NotImplementedError

    def forward(self, images: Tensor, heads: int | None = None, keep: Tensor | None = None) -> Tensor:
        """Logits of level `heads`, the largest by default; without stochastic depth."""
        assert keep is None, "stochastic depth is not part of these experiments"
        shape = self.shape(self.geometry.heads if heads is None else heads)
        d = shape.width
        x: Tensor = self.patch_embed(images, d)
        x = torch.cat([self.cls_token[..., :d].expand(len(x), -1, -1), x], dim=1) + self.pos_embed[..., :d]
        for block in self.blocks:
            assert isinstance(block, Block)
            x = x + _attention(_norm(x, block.norm1), block.attn, shape)
            x = x + _mlp(_norm(x, block.norm2), block.mlp, shape.hidden)
        return F.linear(_norm(x[:, 0], self.norm), self.head.weight[:, :d], self.head.bias)


class MatFormer(Elastic):
    """Only the MLP's hidden width shrinks (Devvrit et al., arXiv 2310.07707)."""

    def shape(self, level: int) -> Shape:
        """See Elastic."""
        g = self.geometry
        return Shape(g.heads * g.head_dim, g.heads, g.head_dim, round(g.mlp_ratio * g.head_dim * level))


class DynaBert(Elastic):
    """Heads and hidden width shrink, the embedding does not (Hou et al., arXiv 2004.04037); without its teacher."""

    def shape(self, level: int) -> Shape:
        """See Elastic."""
        g = self.geometry
        return Shape(g.heads * g.head_dim, level, g.head_dim, round(g.mlp_ratio * g.head_dim * level))


class SortedNet(Elastic):
    """All widths shrink and every head stays, thinner (Valipour et al., arXiv 2309.00255, as ported to ViT).

    Widths are the largest multiples of the number of heads up to HydraViT's, where those cannot be shared evenly.
    """

    def shape(self, level: int) -> Shape:
        """See Elastic."""
        g = self.geometry
        thin = g.head_dim * level // g.heads
        return Shape(g.heads * thin, g.heads, thin, round(g.mlp_ratio * g.heads * thin))


def _attention(x: Tensor, layer: Attention, shape: Shape) -> Tensor:
    """Of each of the leading heads the leading channels."""
    b, n, d = x.shape
    full = layer.qkv.in_features
    heads, thin = shape.heads, shape.head_dim
    rows = layer.qkv.weight.view(3, full // layer.head_dim, layer.head_dim, full)[:, :heads, :thin, :d]
    bias = layer.qkv.bias.view(3, full // layer.head_dim, layer.head_dim)[:, :heads, :thin]
    qkv = F.linear(x, rows.reshape(-1, d), bias.reshape(-1)).view(b, n, 3, heads, thin).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(b, n, heads * thin)
    columns = layer.proj.weight.view(full, full // layer.head_dim, layer.head_dim)[:d, :heads, :thin]
    return F.linear(x, columns.reshape(d, -1), layer.proj.bias[:d])


def _mlp(x: Tensor, layer: Mlp, hidden: int) -> Tensor:
    d = x.shape[-1]
    inner = F.gelu(F.linear(x, layer.fc1.weight[:hidden, :d], layer.fc1.bias[:hidden]))
    return F.linear(inner, layer.fc2.weight[:d, :hidden], layer.fc2.bias[:d])


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    d = x.shape[-1]
    return F.layer_norm(x, (d,), layer.weight[:d], layer.bias[:d], layer.eps)
