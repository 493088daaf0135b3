"""The matrix products that the subnet's graph does, and how fast ONNX Runtime and torch do them alone.

    fp32        MatMul, torch.matmul
    int8        uint8 x int8: MatMulInteger to int32, torch's quantized.linear (requantised to uint8)

The peak takes each shape from the engine that is faster at it, as often as the graph has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from common import answer, questions

from hydradeploy.spec import Subnet

Call = Callable[[], object]
Kind = Literal["linear", "patches", "attention"]

ENGINES = ("onnxruntime", "torch")
LEAST_CALLS = 1


class Product(NamedTuple):
    """`count` times (stack, rows, inner) x (stack, inner, columns); the right is a weight except in `attention`."""

    kind: Kind
    count: int
    stack: int
    rows: int
    inner: int
    columns: int

    @property
    def macs(self) -> int:
        return self.count * self.stack * self.rows * self.inner * self.columns


def products(subnet: Subnet, batch: int) -> list[Product]:
    """What hydradeploy's graph multiplies for a batch of images.

    The last block's queries, projection and MLP are for the class token only.
    """
    g, d, hidden, k = subnet.geometry, subnet.width, subnet.mlp_width, subnet.heads
    n, every, before = g.tokens, batch * g.tokens, g.depth - 1
    found = [
        Product("patches", 1, 1, batch * g.patches, g.channels * g.patch_size**2, d),
        Product("linear", 4 * before + 2, 1, every, d, d),
        Product("attention", before, batch * k, n, g.head_dim, n),
        Product("attention", before, batch * k, n, n, g.head_dim),
        Product("linear", before, 1, every, d, hidden),
        Product("linear", before, 1, every, hidden, d),
        Product("linear", 2, 1, batch, d, d),
        Product("attention", 1, batch * k, 1, g.head_dim, n),
        Product("attention", 1, batch * k, 1, n, g.head_dim),
        Product("linear", 1, 1, batch, d, hidden),
        Product("linear", 1, 1, batch, hidden, d),
        Product("linear", 1, 1, batch, d, g.classes),
    ]
    return [product for product in found if product.count]


def computed_in(precision: str, found: Sequence[Product]) -> list[Product]:
    """The products that are of that precision in its graphs: all in fp32, the linear layers in int8."""
    return [product for product in found if precision == "fp32" or product.kind == "linear"]


def peak(found: Sequence[Product], rounds: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """GMAC/s of each round. `rounds[i][j][p]` are the seconds of product p on engine j in round i.

    Each product counts as the engine does it that is faster in the median of the rounds.
    """
    engines = range(len(rounds[0]))
    fastest = [
        min(engines, key=lambda j, p=p: statistics.median(engine[j][p] for engine in rounds))  # type: ignore[misc]
        for p in range(len(found))
    ]
    macs = sum(product.macs for product in found)
    seconds = [sum(x.count * one[fastest[p]][p] for p, x in enumerate(found)) for one in rounds]
    return [macs / one / 1e9 for one in seconds]


def timed(call: Call, seconds: float) -> list[float]:
    """Seconds of each call for about as long as asked, after one that settles caches."""
    call()
    taken: list[float] = []
    while len(taken) < LEAST_CALLS or sum(taken) < seconds:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return taken


def onnxruntime_call(precision: str, x: Product) -> Call:
    """One product in a session of its own, its weight a constant, which ONNX Runtime packs beforehand."""
    import numpy as np
    import onnxruntime
    from onnx import numpy_helper, parser

    stack = f"{x.stack}," if x.kind == "attention" else ""
    left, right, result = (
        f"[{stack}{a},{b}]" for a, b in ((x.rows, x.inner), (x.inner, x.columns), (x.rows, x.columns))
    )
    feeds, constants = {"x": _left(x, "float32")}, {"w": _right(x, "float32")}
    if precision == "int8":
        text = f"(uint8{left} x) => (int32{result} y) {{ y = MatMulInteger(x, w, zero) }}"
        feeds, constants = {"x": _left(x, "uint8")}, {"w": _right(x, "int8"), "zero": np.array(128, np.uint8)}
    elif x.kind == "attention":
        text = f"(float{left} x, float{right} w) => (float{result} y) {{ y = MatMul(x, w) }}"
        feeds, constants = feeds | constants, {}
    else:
        text = f"(float{left} x) => (float{result} y) {{ y = MatMul(x, w) }}"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> product {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def torch_call(precision: str, x: Product) -> Call:
    """One product by torch, its weight packed beforehand where there is a way to."""
    import torch

    left, right = torch.from_numpy(_left(x, "float32")), torch.from_numpy(_right(x, "float32"))
    if precision == "fp32":
        return lambda: torch.matmul(left, right)
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated, and still the way to torch's int8 products
        values = torch.quantize_per_tensor(left, 0.03, 128, torch.quint8)
        matrix = torch.quantize_per_tensor(right.T.contiguous(), 0.03, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(matrix, None)
    return lambda: torch.ops.quantized.linear(values, packed, 0.5, 128)


def _left(x: Product, dtype: str) -> Any:
    return _random((x.stack, x.rows, x.inner) if x.kind == "attention" else (x.rows, x.inner), dtype)


def _right(x: Product, dtype: str) -> Any:
    return _random((x.stack, x.inner, x.columns) if x.kind == "attention" else (x.inner, x.columns), dtype)


def _random(shape: tuple[int, ...], dtype: str) -> Any:
    import numpy as np

    generator = np.random.default_rng(0)
    if dtype == "float32":
        return generator.normal(size=shape).astype(np.float32)
    # Small weights: two products of uint8 and int8 of full range overflow 16 bits on processors without VNNI.
    low, high = (-63, 64) if dtype == "int8" else (0, 256)
    return generator.integers(low, high, shape).astype(dtype)


def child(engine: str, precision: str, found: Sequence[Product]) -> None:
    """Answer each number of seconds with the median seconds of every product, measured for so long each."""
    call_of = onnxruntime_call if engine == "onnxruntime" else torch_call
    answer("ready")
    for seconds in questions():
        answer([statistics.median(timed(call_of(precision, product), seconds)) for product in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", required=True, help="what to measure, as latency.py asks for it")
    request = json.loads(parser.parse_args().child)
    child(request["engine"], request["precision"], [Product(*product) for product in request["products"]])


if __name__ == "__main__":
    main()
