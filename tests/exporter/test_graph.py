"""The graphs: valid ONNX in both dialects, what the design promises of them, and an independent evaluation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from hydradeploy import export
from hydradeploy.bundle import open_bundle
from hydradeploy.data.preprocess import normalise
from hydradeploy.exporter import graph as graphs
from hydradeploy.exporter.precision import PRECISIONS
from hydradeploy.supernet.store import load
from tests.conftest import geometry, write_supernet

VERSIONS = {"ort": (20, 10), "trt": (17, 8)}


@pytest.mark.parametrize("dialect", ["ort", "trt"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_passes_the_full_onnx_check_in_place(shared_bundle, dialect, precision):
    for artifact in open_bundle(shared_bundle).manifest.artifacts:
        if artifact.precision == precision:
            path = shared_bundle / artifact.graphs[dialect]
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(str(path), load_external_data=False)
            assert (model.opset_import[0].version, model.ir_version) == VERSIONS[dialect]


def test_tensors_have_rank_four_at_most(shared_bundle):
    model = onnx.shape_inference.infer_shapes(onnx.load(str(shared_bundle / "h04-fp32.onnx")), strict_mode=True)
    ranks = [len(value.type.tensor_type.shape.dim) for value in model.graph.value_info]
    assert ranks
    assert max(ranks) == 4


def test_initialisers_point_into_one_weights_file_within_its_bounds_and_on_pages(shared_bundle):
    size = (shared_bundle / "supernet-fp32.weights").stat().st_size
    for k in range(2, 7):
        model = onnx.load(str(shared_bundle / f"h{k:02d}-fp32.onnx"), load_external_data=False)
        external = [
            {entry.key: entry.value for entry in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ]
        assert len(external) == 4 + 2 * 16 + 4
        for entry in external:
            assert entry["location"] == "supernet-fp32.weights"
            assert int(entry["offset"]) % 4096 == 0
            assert int(entry["offset"]) + int(entry["length"]) <= size


def test_the_extents_to_read_ahead_are_just_those_the_graphs_point_to(shared_bundle):
    bundle = open_bundle(shared_bundle)
    for artifact in bundle.manifest.artifacts:
        for graph in artifact.graphs.values():
            model = onnx.load(str(shared_bundle / graph), load_external_data=False)
            external = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
            pointed = {(e["location"], int(e["offset"]), int(e["length"])) for e in external}
            assert {(e.path.name, e.offset, e.length) for e in bundle.extents(artifact)} == pointed


def test_a_smaller_subnet_reads_fewer_bytes(shared_bundle):
    read = []
    for k in range(2, 7):
        model = onnx.load(str(shared_bundle / f"h{k:02d}-fp32.onnx"), load_external_data=False)
        lengths = [{e.key: e.value for e in t.external_data}.get("length", 0) for t in model.graph.initializer]
        read.append(sum(map(int, lengths)))
    assert read == sorted(set(read))


def test_the_largest_subnet_needs_no_slice_and_the_others_one_per_matrix(shared_bundle):
    def slices(k: int) -> int:
        model = onnx.load(str(shared_bundle / f"h{k:02d}-fp32.onnx"), load_external_data=False)
        return sum(node.op_type == "Slice" for node in model.graph.node)

    assert slices(6) == 0
    assert [slices(k) for k in range(2, 6)] == [2 * 6 + 1] * 4


def test_graphs_hold_no_path_and_no_version_of_ours(shared_bundle):
    for path in shared_bundle.glob("*.onnx"):
        model = onnx.load(str(path), load_external_data=False)
        assert model.producer_version == ""
        assert str(shared_bundle).encode() not in path.read_bytes()


@settings(max_examples=25)
@given(
    head_dim=st.sampled_from([4, 8]),
    heads=st.integers(1, 4),
    depth=st.integers(1, 3),
    patch=st.sampled_from([4, 8]),
    grid=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    mlp_ratio=st.sampled_from([1.0, 2.5, 4.0]),
    classes=st.integers(2, 7),
    batch=st.sampled_from([1, 3, "dynamic"]),
    standalone=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_geometry_gives_graphs_that_an_independent_evaluator_agrees_with(
    tmp_path_factory, head_dim, heads, depth, patch, grid, channels, mlp_ratio, classes, batch, standalone, seed
):
    shape = geometry(
        image_size=patch * grid,
        patch_size=patch,
        channels=channels,
        head_dim=head_dim,
        heads=heads,
        trained_heads=tuple(range(1, heads + 1)),
        depth=depth,
        mlp_ratio=mlp_ratio,
        classes=classes,
    )
    root = tmp_path_factory.mktemp("any")
    file = write_supernet(root / "s.safetensors", shape, seed)
    bundle = export(file, root / "bundle", batch=batch, standalone=standalone)
    golden = bundle.golden()
    size = 3 if batch == "dynamic" else batch
    images = normalise(golden.images[:size], bundle.spec.preprocessing)
    for artifact in bundle.manifest.artifacts:
        torch_logits = load(file).plain(bundle.subnet(artifact))(_tensor(images)).detach().numpy()
        for name in artifact.graphs.values():
            got = ReferenceEvaluator(str(bundle.path / name)).run(None, {"image": images})[0]
            np.testing.assert_allclose(got, torch_logits, atol=2e-5 * np.abs(torch_logits).max())
            np.testing.assert_allclose(got, golden.logits[artifact.name][:size], atol=1e-4 * np.abs(torch_logits).max())


def _tensor(images):
    import torch

    return torch.from_numpy(images)


def digest(shape, heads, precision="fp32", batch=1):
    subnet = shape.subnet(heads)
    return graphs.digest(tuple(graphs.write(subnet, PRECISIONS[precision], d, batch) for d in graphs.DIALECTS))


def test_the_graph_digest_tells_graphs_apart_and_ignores_the_supernet_around_them():
    shape = geometry()
    digests = {
        digest(shape, 3),
        digest(shape, 4),
        digest(shape, 3, "fp16"),
        digest(shape, 3, batch=2),
        digest(shape, 3, batch="dynamic"),
        digest(geometry(classes=11), 3),
        digest(geometry(eps=1e-5), 3),
    }
    assert len(digests) == 7
    assert digest(shape, 3) == digest(geometry(heads=4, trained_heads=(3, 4)), 3)


def test_the_graph_digest_does_not_change_by_accident():
    """Measured latencies are kept under it: when this changes, every profile becomes stale. Change it knowingly."""
    assert digest(geometry(), 3)[:16] == "82113ecf6f3af088"
