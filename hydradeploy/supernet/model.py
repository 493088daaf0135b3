"""The supernet: a DeiT-style ViT of which any leading heads form a working ViT (HydraViT, arXiv 2409.17978).

- timm's parameter names, so that its and the paper's checkpoints load as they are.
- One class serves as supernet and as plain ViT: at its full number of heads every slice below is the whole tensor.
- The head count is an argument of `forward`, never a state, so threads may run different subnets of one model.
- Slices are prefixes, hence views; only qkv is copied, because q, k and v are three prefixes of one matrix.
- One classifier serves all subnets, as in the paper's code, or each has its own (the paper's Table 2).
- Initialisation is timm's rule (truncated normal 0.02, zero biases). The paper's code means to follow it but leaves
  PyTorch's default in place, because its sliceable layers are not recognised there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydradeploy.spec import Geometry, Subnet, leading


class Attention(nn.Module):
    """Multi-head self-attention over the first heads; scale head_dim^-0.5 for every head count."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, heads: int) -> Tensor:
        b, n, d = x.shape
        qkv = F.linear(
            x, leading(self.qkv.weight, ".attn.qkv.", (3 * d, d)), leading(self.qkv.bias, ".attn.qkv.", (3 * d,))
        )
        q, k, v = qkv.reshape(b, n, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4)  # each (b, heads, n, head_dim)
        x = F.scaled_dot_product_attention(q, k, v)  # (b, heads, n, head_dim)
        return _linear(x.transpose(1, 2).reshape(b, n, d), self.proj, d)


class Mlp(nn.Module):
    """Two layers with exact GELU between; the hidden width shrinks with the input's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        hidden = d * self.fc1.out_features // self.fc1.in_features
        return _linear(F.gelu(_linear(x, self.fc1, hidden)), self.fc2, d)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, hidden: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, heads: int, keep: Tensor | None = None) -> Tensor:
        """`keep` (2, b) scales what attention and MLP add, per image."""
        branch: Tensor = self.attn(_norm(x, self.norm1), heads)
        x = x + (branch if keep is None else branch * keep[0, :, None, None])
        branch = self.mlp(_norm(x, self.norm2))
        return x + (branch if keep is None else branch * keep[1, :, None, None])


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to the leading `d` channels."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor, d: int) -> Tensor:
        x = F.conv2d(images, self.proj.weight[:d], _bias(self.proj.bias)[:d], stride=self.proj.stride)  # (b, d, g, g)
        return x.flatten(2).transpose(1, 2)  # (b, patches, d)


class Supernet(nn.Module):
    """A ViT of `geometry.heads` heads whose first k heads are a ViT for every trained k."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        g, dim = geometry, geometry.head_dim * geometry.heads
        self.geometry = geometry
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, g.tokens, dim))
        self.patch_embed = PatchEmbed(g.channels, dim, g.patch_size)
        hidden = round(g.mlp_ratio * dim)
        self.blocks = nn.ModuleList(Block(dim, hidden, g.head_dim, g.eps) for _ in range(g.depth))
        self.norm = nn.LayerNorm(dim, eps=g.eps)
        self.head = nn.Linear(dim, g.classes) if g.classifiers == "shared" else _each(g)

    def initialise(self, generator: torch.Generator | None = None) -> Supernet:
        """Random weights by timm's rule for ViTs; returns itself."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        # Conv2d's weight keeps PyTorch's rule, as in timm; redone here so that the generator decides it. Its bias,
        # which positions have in them as well, begins at zero like the others.
        nn.init.kaiming_uniform_(self.patch_embed.proj.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(_bias(self.patch_embed.proj.bias))
        return self

    def forward(self, images: Tensor, heads: int | None = None, keep: Tensor | None = None) -> Tensor:
        """Logits (b, classes) of normalised images (b, channels, s, s) by the first `heads` heads, all by default.

        `keep` (depth, 2, b), for training alone, scales what each block's two branches add: stochastic depth with 0 for
        a dropped branch and 1 / (1 - probability) for a kept one. Raises UsageError for a head count that was not
        trained.
        """
        subnet = self.geometry.subnet(self.geometry.heads if heads is None else heads)
        d = subnet.width
        x: Tensor = self.patch_embed(images, d)
        x = torch.cat([self.cls_token[..., :d].expand(len(x), -1, -1), x], dim=1)  # (b, tokens, d)
        x = x + self.pos_embed[..., :d]
        for i, block in enumerate(self.blocks):
            x = block(x, subnet.heads, None if keep is None else keep[i])
        return _linear(_norm(x[:, 0], self.norm), self._classifier(d), self.geometry.classes)

    def _classifier(self, d: int) -> nn.Linear:
        """That of the subnet of width `d`; looked up by width, because torch.compile stops at a name made from a number
        and makes three graphs of each subnet."""
        if isinstance(self.head, nn.Linear):
            return self.head
        for layer in self.head.values():
            if isinstance(layer, nn.Linear) and layer.in_features == d:
                return layer
        raise AssertionError(f"every trained head count has a classifier, and none is {d} wide")

    def subnet(self, heads: int) -> Supernet:
        """A plain ViT of its own with a copy of the leading weights, in evaluation mode, for a trained head count."""
        return plain_vit(self.state_dict(), self.geometry.subnet(heads))


def plain_vit(state: Mapping[str, Tensor], subnet: Subnet) -> Supernet:
    """The plain ViT that `subnet` is, in evaluation mode: the leading block of every tensor of a supernet, copied."""
    with torch.device("meta"):
        plain = Supernet(subnet.geometry.alone(subnet.heads))
    pieces = {name: leading(state[subnet.source(name)], name, shape).clone() for name, shape in subnet.shapes.items()}
    plain.load_state_dict(pieces, assign=True)
    return plain.eval()


def _each(geometry: Geometry) -> nn.ModuleDict:
    """A classifier for every trained head count, by the subnet's name."""
    return nn.ModuleDict({subnet.name: nn.Linear(subnet.width, geometry.classes) for subnet in geometry.subnets()})


def _linear(x: Tensor, layer: nn.Linear, out: int) -> Tensor:
    return F.linear(x, layer.weight[:out, : x.shape[-1]], layer.bias[:out])


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    d = x.shape[-1]
    return F.layer_norm(x, (d,), layer.weight[:d], layer.bias[:d], layer.eps)


def _bias(bias: Tensor | None) -> Tensor:
    assert bias is not None, "every layer here is built with a bias"
    return bias
