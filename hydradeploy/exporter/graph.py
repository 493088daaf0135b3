"""The inference graph of a subnet, written node by node: a plain ViT with q, k and v apart and rank 4 at most.

A `Graph` is what the runtime will compute and nothing else: where weights are stored is decided when it is lowered to
ONNX. So its digest survives retraining, repacking, calibration and a larger supernet, and measured latency can be kept
under it.

The last block needs k and v of every token, but queries, projection and MLP of the class token alone.
"""

from __future__ import annotations

import math

import msgspec

from hydradeploy.bundle import Batch, Dialect
from hydradeploy.exporter.precision import Precision
from hydradeploy.files import sha256_bytes
from hydradeploy.spec import Record, Subnet
from hydradeploy.stored import Dtype, Form, Input, image_shape, stored

Attribute = int | float | tuple[int, ...]

# opset and IR version. `ort`: what ONNX Runtime 1.23, the last for Python 3.10, opens, with Attention and Gelu as one
# node; `trt`: what TensorRT 8.6 (JetPack 6.0) parses.
_VERSIONS: dict[Dialect, tuple[int, int]] = {"ort": (23, 10), "trt": (17, 8)}
# The last whose QuantizeLinear ONNX Runtime 1.23 has a kernel for. Attention came with the next; in parts it takes as
# long.
_STATIC_OPSET = 22
DIALECTS: tuple[Dialect, ...] = ("ort", "trt")
_ONNX_TYPES: dict[Dtype, int] = {"float32": 1, "float16": 10, "bfloat16": 16}


class Node(Record, frozen=True, kw_only=True):
    """One ONNX node; its first output is also its name."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


class Weight(Record, frozen=True, kw_only=True):
    """A weight the graph reads: a leading block of the stored tensor of that name.

    With `scale`, the name of another weight, it is dequantised by it before it is cut; with `cast` it is turned into
    that type.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    scale: str | None = None
    cast: Dtype | None = None


class Constant(Record, frozen=True, kw_only=True):
    """A small tensor that belongs to the graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[int | float, ...]


class Graph(Record, frozen=True, kw_only=True):
    """`image`, float32 (batch, channels, s, s) or uint8 (batch, s, s, channels), to `logits` float32 (batch, classes).

    `dtype` is what it computes in, `steps` are float32 scalars whose values are no part of it: the quantisation steps
    of activations.
    """

    opset: int
    ir_version: int
    dtype: Dtype
    batch: Batch
    input: Input
    image_shape: tuple[int, int, int]
    classes: int
    nodes: tuple[Node, ...]
    weights: tuple[Weight, ...]
    constants: tuple[Constant, ...]
    steps: tuple[str, ...]


def digest(graphs: tuple[Graph, ...]) -> str:
    """SHA-256 of the graphs of an artifact: structure, shapes and types, no weight values and no scales."""
    return sha256_bytes(msgspec.json.encode(graphs, order="deterministic"))


def write(subnet: Subnet, precision: Precision, form: Form, dialect: Dialect, batch: Batch) -> Graph:
    """The graph of one artifact in one dialect."""
    return _Writer(subnet, precision, form, dialect, batch).graph()


def step_of(layer: str) -> str:
    """The name of the scalar that is the quantisation step of a layer's input."""
    return f"{layer}.step"


class _Writer:
    """Collects nodes; each method returns the name of the tensor it made."""

    def __init__(self, subnet: Subnet, precision: Precision, form: Form, dialect: Dialect, batch: Batch) -> None:
        self._subnet, self._geometry, self._batch = subnet, subnet.geometry, batch
        self._precision, self._form, self._ort = precision, form, dialect == "ort"
        # ONNX Runtime's processor backend has no bfloat16: there its weights are widened when they are loaded.
        self._dtype: Dtype = "float32" if self._ort and form.dtype == "bfloat16" else form.dtype
        self._opset, self._ir_version = _VERSIONS[dialect]
        if self._ort and precision.int8 == "static":
            self._opset = _STATIC_OPSET
        self._stored = stored(subnet, form)
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._constants: dict[str, Constant] = {}
        self._steps: dict[str, None] = {}
        self._ranged: dict[str, tuple[str, str, str]] = {}
        self._grids: dict[str, str] = {}

    def graph(self) -> Graph:
        g = self._geometry
        x = self._tokens()
        for i in range(g.depth):
            x = self._block(x, f"blocks.{i}", last=i == g.depth - 1)
        x = self._norm(x, "norm")  # (b, 1, d)
        narrow = self._dtype != "float32"
        self._head(x, "head" if narrow else "logits")
        if narrow:
            self._cast("head", "float32", "logits")
        return Graph(
            opset=self._opset,
            ir_version=self._ir_version,
            dtype=self._dtype,
            batch=self._batch,
            input=self._form.input,
            image_shape=image_shape(g, self._form.input),
            classes=g.classes,
            nodes=tuple(self._nodes),
            weights=tuple(self._weights.values()),
            constants=tuple(self._constants.values()),
            steps=tuple(self._steps),
        )

    def _tokens(self) -> str:
        patches = self._patches() if self._form.input == "float32" else self._pixel_patches()
        x = self._node("Add", [patches, self._weight(f"embed.{self._form.input}.patches")], "embed.positioned")
        return self._node("Concat", [self._class_token(), x], "embedded", axis=1)

    def _patches(self) -> str:
        """Of normalised images: (b, patches, d)."""
        g, patch = self._geometry, (self._geometry.patch_size, self._geometry.patch_size)
        # Before opset 22 there is no Conv in bfloat16.
        wide = self._dtype == "bfloat16"
        image = self._cast("image", self._dtype, "image.cast") if self._dtype == "float16" else "image"
        weight = self._weight("embed.float32.weight", widened=wide)
        x = self._node("Conv", [image, weight], "embed.conv", kernel_shape=patch, strides=patch)
        x = self._cast(x, self._dtype, "embed.narrow") if wide else x
        x = self._node("Reshape", [x, self._ints("embed.flat", 0, self._subnet.width, g.patches)], "embed.flatten")
        return self._node("Transpose", [x], "embed", perm=(0, 2, 1))

    def _pixel_patches(self) -> str:
        """Of uint8 pixels: (b, patches, d).

        Normalisation is in the weights, but for what is exact in every type and keeps weights and sums in the range of
        half precision: (pixel - 128) / 256.
        """
        g, p, cells = self._geometry, self._geometry.patch_size, self._geometry.image_size // self._geometry.patch_size
        unit = self._floats("image.unit", 2.0**-8)
        if self._ort:
            middle = self._constant(Constant(name="image.middle", dtype="uint8", shape=(), values=(128,)))
            x = self._node("DequantizeLinear", ["image", unit, middle], "image.scaled")
        else:  # TensorRT dequantises no uint8
            x = self._cast("image", self._dtype, "image.cast")
            x = self._node("Sub", [x, self._floats("image.middle", 128.0)], "image.centred")
            x = self._node("Mul", [x, unit], "image.scaled")
        x = self._node("Reshape", [x, self._ints("image.rows", -1, p, cells, p * g.channels)], "image.split")
        x = self._node("Transpose", [x], "image.cells", perm=(0, 2, 1, 3))
        pixels = p * p * g.channels
        x = self._node("Reshape", [x, self._ints("image.patched", -1, g.patches, pixels)], "image.patches")
        return self._node("MatMul", [x, self._weight("embed.uint8.weight")], "embed")

    def _class_token(self) -> str:
        token, d = self._weight("embed.class"), self._subnet.width
        if self._batch == 1:
            return token
        if self._batch == "dynamic":
            images = self._node("Shape", ["image"], "batch", start=0, end=1)
            shape = self._node("Concat", [images, self._ints("embed.class.one", 1, d)], "embed.class.shape", axis=0)
        else:
            shape = self._ints("embed.class.shape", self._batch, 1, d)
        return self._node("Expand", [token, shape], "embed.class.expand")

    def _block(self, x: str, at: str, *, last: bool) -> str:
        y = self._norm(x, f"{at}.norm1")
        queries = self._first(y, f"{at}.queries") if last else y
        residual = self._first(x, f"{at}.residual") if last else x
        y = self._attention(queries, y, f"{at}.attn")
        x = self._projected(y, residual, f"{at}.attn.proj", f"{at}.attended")
        layer = f"{at}.mlp.fc1"
        y = self._gelu(self._linear(self._norm(x, f"{at}.norm2"), layer, layer), f"{at}.mlp.act")
        return self._projected(y, x, f"{at}.mlp.fc2", at)

    def _first(self, x: str, output: str) -> str:
        """The class token: (b, 1, d)."""
        return self._node("Gather", [x, self._ints("class_token", 0)], output, axis=1)

    def _attention(self, queries: str, x: str, at: str) -> str:
        k, layer = self._subnet.heads, f"{at}.qkv"
        q = self._linear(queries, layer, f"{at}.q")
        keys = self._product(x, layer, f"{at}.k", f"{at}.k")
        v = self._linear(x, layer, f"{at}.v")
        if self._opset < 23:
            return self._mixed(q, keys, v, at)
        return self._node("Attention", [q, keys, v], f"{at}.mixed", q_num_heads=k, kv_num_heads=k, scale=1.0)

    def _mixed(self, q: str, keys: str, v: str, at: str) -> str:
        """Attention in parts."""
        split = self._ints("attn.split", 0, -1, self._subnet.heads, self._geometry.head_dim)
        heads = {}
        for part, x, perm in (("q", q, (0, 2, 1, 3)), ("k", keys, (0, 2, 3, 1)), ("v", v, (0, 2, 1, 3))):
            y = self._node("Reshape", [x, split], f"{at}.{part}.split")
            heads[part] = self._node("Transpose", [y], f"{at}.{part}.heads", perm=perm)
        y = self._node("MatMul", [heads["q"], heads["k"]], f"{at}.scores")  # (b, k, queries, tokens)
        y = self._node("Softmax", [y], f"{at}.softmax", axis=-1)
        y = self._node("MatMul", [y, heads["v"]], f"{at}.weighted")
        y = self._node("Transpose", [y], f"{at}.merge", perm=(0, 2, 1, 3))
        return self._node("Reshape", [y, self._ints("attn.merge", 0, -1, self._subnet.width)], f"{at}.mixed")

    def _projected(self, x: str, residual: str, layer: str, output: str) -> str:
        """`residual` plus a linear layer."""
        if self._apart(layer):
            y = self._node("Add", [residual, self._product(x, layer, layer, f"{layer}.product")], f"{layer}.added")
            return self._node("Add", [y, self._weight(f"{layer}.bias")], output)
        return self._node("Add", [residual, self._linear(x, layer, layer)], output)

    def _head(self, x: str, output: str) -> None:
        name = self._subnet.classifier
        if "head" in self._form.int8:
            flat = self._ints("head.flat", -1, self._geometry.classes)
            self._node("Reshape", [self._linear(x, "head", name), flat], output)
        else:
            x = self._node("Reshape", [x, self._ints("head.flat", -1, self._subnet.width)], "head.rows")
            self._node("Gemm", [x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")], output)

    def _linear(self, x: str, layer: str, name: str) -> str:
        y = self._product(x, layer, name, f"{name}.product")
        bias = self._weight(f"{name}.bias")
        if not self._apart(layer):
            return self._node("Add", [y, bias], name)
        columns = self._weights[bias].shape[0]
        y = self._node("Reshape", [y, self._ints(f"apart.{columns}", 0, 1, -1, columns)], f"{name}.apart")
        y = self._node("Add", [y, bias], f"{name}.biased")
        return self._node("Reshape", [y, self._ints(f"together.{columns}", 0, -1, columns)], name)

    def _apart(self, layer: str) -> bool:
        """Whether something must stand between a product and its bias: ONNX Runtime would merge the two into a Gemm in
        float before it sees that the product is one of int8."""
        return self._ort and self._precision.int8 == "static" and layer in self._form.int8

    def _product(self, x: str, layer: str, name: str, output: str) -> str:
        if layer not in self._form.int8:
            return self._node("MatMul", [x, self._weight(f"{name}.weight")], output)
        if self._precision.int8 == "dynamic":
            return self._ranged_product(x, name, output)
        return self._node("MatMul", [self._stepped(x, layer), self._dequantised(name)], output)

    def _ranged_product(self, x: str, name: str, output: str) -> str:
        """An int8 product whose left side gets its range at run time."""
        values, step, zero = self._ranges(x)
        y = self._node("MatMulInteger", [values, self._weight(f"{name}.int8"), zero], f"{output}.int32")
        y = self._cast(y, "float32", f"{output}.float")
        scale = self._node("Mul", [step, self._weight(f"{name}.scale")], f"{output}.rescale")
        return self._node("Mul", [y, scale], output)

    def _ranges(self, x: str) -> tuple[str, str, str]:
        if x not in self._ranged:
            outputs = (f"{x}.uint8", f"{x}.range", f"{x}.zero")
            self._nodes.append(Node(op="DynamicQuantizeLinear", inputs=(x,), outputs=outputs, attributes={}))
            self._ranged[x] = outputs
        return self._ranged[x]

    def _stepped(self, x: str, layer: str) -> str:
        """`x` on the grid of its layer's step."""
        if x in self._grids:
            return self._grids[x]
        step = step_of(layer)
        self._steps[step] = None
        # The same values either way: int8 is what TensorRT takes, and processors without products of two signed types
        # are six times as fast with uint8.
        kind, middle = ("uint8", 128) if self._ort else ("int8", 0)
        zero = self._constant(Constant(name="middle", dtype=kind, shape=(), values=(middle,)))
        y = self._node("QuantizeLinear", [x, step, zero], f"{x}.quantised")
        self._grids[x] = self._node("DequantizeLinear", [y, step, zero], f"{x}.grid")
        return self._grids[x]

    def _dequantised(self, name: str) -> str:
        """An int8 matrix as the product sees it. ONNX Runtime and OpenVINO want it cut first, TensorRT wants to see the
        whole constant dequantised."""
        scale, shape = f"{name}.scale", self._stored[f"{name}.int8"].shape
        if not self._ort:
            weight = Weight(name=f"{name}.int8", dtype="int8", shape=shape, scale=scale)
            self._weights[weight.name] = weight
            return weight.name
        inputs = [self._weight(f"{name}.int8"), self._weight(scale)]
        return self._node("DequantizeLinear", inputs, f"{name}.weight", axis=1)

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

    def _cast(self, x: str, dtype: Dtype, output: str) -> str:
        return self._node("Cast", [x], output, to=_ONNX_TYPES[dtype])

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Attribute) -> str:
        self._nodes.append(Node(op=op, inputs=tuple(inputs), outputs=(output,), attributes=attributes))
        return output

    def _weight(self, name: str, *, widened: bool = False) -> str:
        tensor = self._stored[name]
        widened = widened or (tensor.dtype == "bfloat16" and self._dtype == "float32")
        self._weights[name] = Weight(
            name=name, dtype=tensor.dtype, shape=tensor.shape, cast="float32" if widened else None
        )
        return name

    def _ints(self, name: str, *values: int) -> str:
        return self._constant(Constant(name=name, dtype="int64", shape=(len(values),), values=values))

    def _floats(self, name: str, value: float) -> str:
        return self._constant(Constant(name=name, dtype=self._dtype, shape=(), values=(value,)))

    def _constant(self, constant: Constant) -> str:
        self._constants[constant.name] = constant
        return constant.name
