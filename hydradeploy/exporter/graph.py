"""The inference graph of a subnet, written node by node: a plain ViT with q, k and v apart and rank 4 at most.

A `Graph` is what the runtime will compute and nothing else: where weights are stored is decided when it is lowered to
ONNX. So its digest survives retraining, repacking and a larger supernet, and measured latency can be kept under it.
"""

from __future__ import annotations

import math

import msgspec

from hydradeploy.bundle import Batch, Dialect, stored_shapes
from hydradeploy.exporter.precision import Precision
from hydradeploy.files import sha256_bytes
from hydradeploy.spec import Record, Subnet

Attribute = int | float | tuple[int, ...]

# opset and IR version: what TensorRT 8.6 (JetPack 6.0) parses, and what ONNX Runtime 1.23 and OpenVINO open with Gelu
# as one node.
_VERSIONS: dict[Dialect, tuple[int, int]] = {"ort": (20, 10), "trt": (17, 8)}
DIALECTS: tuple[Dialect, ...] = ("ort", "trt")


class Node(Record, frozen=True, kw_only=True):
    """One ONNX node with one output, which is also its name."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Attribute]


class Weight(Record, frozen=True, kw_only=True):
    """A weight the graph reads: a leading block of the stored tensor of that name."""

    name: str
    shape: tuple[int, ...]


class Constant(Record, frozen=True, kw_only=True):
    """A small tensor that belongs to the graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[int | float, ...]


class Graph(Record, frozen=True, kw_only=True):
    """`image` float32 (batch, channels, s, s) to `logits` float32 (batch, classes)."""

    opset: int
    ir_version: int
    dtype: str
    batch: Batch
    image_shape: tuple[int, int, int]
    classes: int
    nodes: tuple[Node, ...]
    weights: tuple[Weight, ...]
    constants: tuple[Constant, ...]


def digest(graphs: tuple[Graph, ...]) -> str:
    """SHA-256 of the graphs of an artifact: structure, shapes and types, no weight values."""
    return sha256_bytes(msgspec.json.encode(graphs, order="deterministic"))


def write(subnet: Subnet, precision: Precision, dialect: Dialect, batch: Batch) -> Graph:
    """The graph of one artifact in one dialect."""
    return _Writer(subnet, precision, dialect, batch).graph()


class _Writer:
    """Collects nodes; each method returns the name of the tensor it made."""

    def __init__(self, subnet: Subnet, precision: Precision, dialect: Dialect, batch: Batch) -> None:
        self._subnet, self._geometry, self._batch = subnet, subnet.geometry, batch
        self._dtype = precision.dtype
        self._opset, self._ir_version = _VERSIONS[dialect]
        self._shapes = stored_shapes(subnet)
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._constants: dict[str, Constant] = {}

    def graph(self) -> Graph:
        g = self._geometry
        x = self._tokens(self._cast("image", self._dtype, "image.cast"))
        for i in range(g.depth):
            x = self._block(x, f"blocks.{i}")
        # The class token first: the norm is per token, so the other 196 need none.
        x = self._node("Gather", [x, self._ints("class_token", [0], scalar=True)], "norm.token", axis=1)
        x = self._norm(x, "norm")
        narrow = self._dtype != "float32"
        x = self._node(
            "Gemm", [x, self._weight("head.weight"), self._weight("head.bias")], "head" if narrow else "logits"
        )
        self._cast(x, "float32", "logits")
        return Graph(
            opset=self._opset,
            ir_version=self._ir_version,
            dtype=self._dtype,
            batch=self._batch,
            image_shape=(g.channels, g.image_size, g.image_size),
            classes=g.classes,
            nodes=tuple(self._nodes),
            weights=tuple(self._weights.values()),
            constants=tuple(self._constants.values()),
        )

    def _tokens(self, image: str) -> str:
        g, d = self._geometry, self._subnet.width
        weights = [self._weight("patch_embed.proj.weight"), self._weight("patch_embed.proj.bias")]
        patch = (g.patch_size, g.patch_size)
        x = self._node("Conv", [image, *weights], "patch_embed.proj", kernel_shape=patch, strides=patch)
        x = self._node("Reshape", [x, self._ints("patch_embed.flat", [0, d, g.patches])], "patch_embed.flatten")
        x = self._node("Transpose", [x], "patch_embed", perm=(0, 2, 1))  # (b, patches, d)
        x = self._node("Concat", [self._class_token(), x], "tokens", axis=1)
        return self._node("Add", [x, self._weight("pos_embed")], "embedded")

    def _class_token(self) -> str:
        token, d = self._weight("cls_token"), self._subnet.width
        if self._batch == 1:
            return token
        if self._batch == "dynamic":
            images = self._node("Shape", ["image"], "batch", start=0, end=1)
            shape = self._node("Concat", [images, self._ints("cls_token.one", [1, d])], "cls_token.shape", axis=0)
        else:
            shape = self._ints("cls_token.shape", [self._batch, 1, d])
        return self._node("Expand", [token, shape], "cls_token.expand")

    def _block(self, x: str, at: str) -> str:
        y = self._attention(self._norm(x, f"{at}.norm1"), f"{at}.attn")
        x = self._node("Add", [x, y], f"{at}.attended")
        y = self._linear(self._norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        y = self._linear(self._gelu(y, f"{at}.mlp.act"), f"{at}.mlp.fc2")
        return self._node("Add", [x, y], at)

    def _attention(self, x: str, at: str) -> str:
        g, k = self._geometry, self._subnet.heads
        split = self._ints("attn.split", [0, 0, k, g.head_dim])
        parts = {}
        for part, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
            y = self._node("Reshape", [self._linear(x, f"{at}.{part}"), split], f"{at}.{part}.split")
            parts[part] = self._node("Transpose", [y], f"{at}.{part}.heads", perm=perm)
        scale = self._floats("attn.scale", g.head_dim**-0.5)
        q = self._node("Mul", [parts["q"], scale], f"{at}.q.scaled")
        y = self._node("MatMul", [q, parts["k"]], f"{at}.scores")  # (b, k, tokens, tokens)
        y = self._node("MatMul", [self._node("Softmax", [y], f"{at}.softmax", axis=-1), parts["v"]], f"{at}.mixed")
        y = self._node("Transpose", [y], f"{at}.merge", perm=(0, 2, 1, 3))
        y = self._node("Reshape", [y, self._ints("attn.merge", [0, 0, self._subnet.width])], f"{at}.merged")
        return self._linear(y, f"{at}.proj")

    def _linear(self, x: str, at: str) -> str:
        y = self._node("MatMul", [x, self._weight(f"{at}.weight")], f"{at}.matmul")
        return self._node("Add", [y, self._weight(f"{at}.bias")], at)

    def _norm(self, x: str, at: str) -> str:
        weights = [self._weight(f"{at}.weight"), self._weight(f"{at}.bias")]
        # stash_type keeps its default, 1: mean and variance are computed in fp32 in every precision.
        return self._node("LayerNormalization", [x, *weights], at, axis=-1, epsilon=self._geometry.eps)

    def _gelu(self, x: str, at: str) -> str:
        if self._opset >= 20:
            return self._node("Gelu", [x], at)
        # The order of these five is the one that ONNX Runtime and TensorRT recognise and fuse.
        y = self._node("Div", [x, self._floats("gelu.sqrt2", math.sqrt(2))], f"{at}.scaled")
        y = self._node("Erf", [y], f"{at}.erf")
        y = self._node("Add", [y, self._floats("gelu.one", 1.0)], f"{at}.shifted")
        y = self._node("Mul", [x, y], f"{at}.gated")
        return self._node("Mul", [y, self._floats("gelu.half", 0.5)], at)

    def _cast(self, x: str, dtype: str, output: str) -> str:
        if self._dtype == "float32":
            return x
        return self._node("Cast", [x], output, to={"float32": 1, "float16": 10}[dtype])

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Attribute) -> str:
        self._nodes.append(Node(op=op, inputs=tuple(inputs), output=output, attributes=attributes))
        return output

    def _weight(self, name: str) -> str:
        self._weights[name] = Weight(name=name, shape=self._shapes[name])
        return name

    def _ints(self, name: str, values: list[int], *, scalar: bool = False) -> str:
        shape = () if scalar else (len(values),)
        self._constants[name] = Constant(name=name, dtype="int64", shape=shape, values=tuple(values))
        return name

    def _floats(self, name: str, value: float) -> str:
        self._constants[name] = Constant(name=name, dtype=self._dtype, shape=(), values=(value,))
        return name
