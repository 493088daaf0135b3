"""benchmarks/latency.py: what its figures are of, on made-up seconds; and one round of it on a tiny supernet."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest

from hydradeploy import export
from tests.conftest import geometry, write_supernet

COLUMNS = [
    *("machine", "stack", "k", "batch", "thing", "rounds", "median_ms"),
    *("ratio_exported", "ratio_exported_low", "ratio_exported_high"),
    *("ratio_eager", "ratio_eager_low", "ratio_eager_high"),
    *("load_s", "gmac", "gmac_s", "peak_gmac_s", "peak_share"),
]


def macs_of(path: Path) -> int:
    """Counted from the shapes that onnx infers."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    shapes = {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim] for x in infos}
    shapes |= {x.name: list(x.dims) for x in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        of = [shapes[name] for name in node.input if name]
        if node.op_type in ("MatMul", "MatMulInteger", "Gemm"):
            total += math.prod(shapes[node.output[0]]) * of[0][-1]
        elif node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(of[1][1:])
        elif node.op_type == "Attention":
            (batch, queries, width), tokens = of[0], of[1][1]
            total += 2 * batch * queries * tokens * width
    return total


@pytest.mark.parametrize(("heads", "batch", "depth"), [(2, 1, 2), (6, 3, 1)])
def test_products_have_the_macs_of_the_exported_graph(tmp_path, benchmark_module, heads, batch, depth):
    shape = geometry(depth=depth)
    bundle = export(
        write_supernet(tmp_path / "s", shape),
        tmp_path / "b",
        heads=(heads,),
        precisions=("fp32", "int8dyn"),
        batch=batch,
    )
    products = benchmark_module("gemm").products(shape.subnet(heads), batch)
    for artifact in bundle.manifest.artifacts:
        assert sum(product.macs for product in products) == macs_of(bundle.graph(artifact, "ort"))


def test_the_peak_takes_each_product_from_the_faster_engine(benchmark_module):
    gemm = benchmark_module("gemm")
    found = [gemm.Product("linear", 3, 1, 10, 10, 10), gemm.Product("linear", 1, 1, 1, 10, 100)]
    # Engines by product; in the second round the first engine was disturbed.
    rounds = [[[1.0, 4.0], [2.0, 2.0]], [[9.0, 4.0], [10.0, 2.0]], [[1.0, 4.0], [2.0, 2.0]]]
    assert gemm.peak(found, rounds) == pytest.approx([4000 / 5 / 1e9, 4000 / 29 / 1e9, 4000 / 5 / 1e9])


def test_ratios_are_of_the_same_turn_and_shares_of_the_own_precision(tmp_path, benchmark_module):
    gemm, latency, things = (benchmark_module(name) for name in ("gemm", "latency", "things"))
    subnet = geometry().subnet(2)
    found = [
        things.Thing(things.EAGER, "eager", {}, 8 * 10**9),
        things.Thing(things.EXPORTED, "onnxruntime", {}, 8 * 10**9),
        things.Thing("ours int8", "ours", {}, 4 * 10**9, "int8"),
    ]
    cell = latency.Cell(subnet, 1, found, tmp_path / "images.npy")
    seconds = {
        kind: [[p.macs / p.count / 1e9 / gmac_s for p in cell.products(kind)]]
        for kind, gmac_s in (("fp32", 40), ("int8", 80))
    }
    rounds = []
    for slow in (1.0, 3.0):  # the machine, while the second round ran
        turns = {things.EAGER: [0.8, 0.8], things.EXPORTED: [0.4, 0.4], "ours int8": [0.1, 0.1]}
        turns = {name: [slow * s for s in of] for name, of in turns.items()}
        rounds.append(
            latency.Round(
                dict.fromkeys(turns, 2.0), turns, {k: [[slow * s for s in e] for e in v] for k, v in seconds.items()}
            )
        )
    rows = {row["thing"]: row for row in latency.rows_of(cell, rounds)}
    assert list(rows["ours int8"]) == COLUMNS
    assert [rows[thing.name]["ratio_exported"] for thing in found] == [2.0, 1.0, 0.25]
    assert [rows[thing.name]["ratio_eager_high"] for thing in found] == [1.0, 0.5, 0.125]
    assert [rows[thing.name]["peak_share"] for thing in found] == [0.25, 0.5, 0.5]
    assert rows["ours int8"]["gmac_s"] == 20.0
    assert gemm.computed_in("int8", cell.products("fp32")) == cell.products("int8") != cell.products("fp32")


def test_rows_measured_again_replace_their_own_only(benchmark_module):
    merged = benchmark_module("latency").merged
    same = {"machine": "m", "stack": "s"}
    before = [same | {"k": "3", "batch": "1", "thing": thing, "median_ms": "9"} for thing in ("a", "b")]
    new = [
        same | {"k": 3, "batch": 1, "thing": "b", "median_ms": 1.0},
        same | {"k": 2, "batch": 1, "thing": "b", "median_ms": 2.0},
    ]
    assert merged(before, new) == [new[1], before[0], new[0]]


@pytest.mark.slow
def test_one_round_on_a_tiny_supernet_measures_what_was_asked_and_both_references(tmp_path, run_benchmark):
    rows = run_benchmark("latency.py", "--heads", "3", "--batches", "1", "--only", "ours int8 onnxruntime")
    assert list(rows[0]) == COLUMNS
    names = ["torch eager", "torch.onnx.export + onnxruntime", "ours int8 onnxruntime"]
    assert [row["thing"] for row in rows] == names
    assert float(rows[0]["ratio_eager"]) == float(rows[1]["ratio_exported"]) == 1.0
    assert all(float(row["median_ms"]) > 0 and float(row["load_s"]) > 0 for row in rows)
    assert float(rows[2]["gmac"]) < float(rows[0]["gmac"])
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".csv", ".png"]
