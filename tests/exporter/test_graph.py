"""The graphs: valid ONNX in both dialects, what the design promises of them, and an independent evaluation."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from hydradeploy import export
from hydradeploy.backends import PRECISION_NAMES
from hydradeploy.bundle import Artifact, Bundle
from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import ParityError
from hydradeploy.exporter import graph as graphs
from hydradeploy.exporter.precision import PRECISIONS
from hydradeploy.exporter.quantise import Quantising
from hydradeploy.exporter.sensitivity import simulate
from hydradeploy.spec import Geometry
from hydradeploy.stored import Form, Input, layers
from hydradeploy.supernet.store import Weights, load, save
from tests.conftest import geometry, spec, supernet, write_images, write_supernet

# opset and IR version by dialect; of static int8 the oldest ONNX Runtime has no kernel beyond opset 22.
VERSIONS = {("ort", "int8"): (22, 10), **{("ort", name): (23, 10) for name in PRECISION_NAMES if name != "int8"}}


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_every_graph_passes_the_full_onnx_check_in_place(everything, precision):
    checked = 0
    for artifact in everything.manifest.artifacts:
        for dialect, name in artifact.graphs.items():
            if artifact.precision == precision:
                path = everything.path / name
                onnx.checker.check_model(str(path), full_check=True)
                model = onnx.load(str(path), load_external_data=False)
                expected = VERSIONS.get((dialect, precision), (17, 8))
                assert (model.opset_import[0].version, model.ir_version) == expected
                assert [opset.domain for opset in model.opset_import] == [""], "no runtime's own operators"
                checked += 1
    assert checked == 4 * (1 if precision == "int8dyn" else 2)


def test_the_ort_dialect_has_attention_and_gelu_as_one_node_where_the_oldest_runtime_knows_them(everything):
    for artifact in everything.manifest.artifacts:
        counts = operators(everything.path / artifact.graphs["ort"])
        assert counts["Gelu"] == 2
        assert (counts["Attention"], counts["Softmax"]) == ((0, 2) if artifact.precision == "int8" else (2, 0))
        if "trt" in artifact.graphs:
            counts = operators(everything.path / artifact.graphs["trt"])
            assert (counts["Gelu"], counts["Attention"]) == (0, 0)


def operators(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


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
        assert len(external) == 3 + 2 * 15 + 4
        for entry in external:
            assert entry["location"] == "supernet-fp32.weights"
            assert int(entry["offset"]) % 4096 == 0
            assert int(entry["offset"]) + int(entry["length"]) <= size


def test_the_extents_to_read_ahead_are_those_the_graphs_point_to(everything):
    """But for the scales of int8 weights, a few kilobytes, which TensorRT's graphs read whole."""
    for artifact in everything.manifest.artifacts:
        scales = {
            tensor.offset
            for name, tensor in everything.manifest.weights[str(artifact.weights)].items()
            if name.endswith(".scale")
        }
        for dialect, graph in artifact.graphs.items():
            model = onnx.load(str(everything.path / graph), load_external_data=False)
            external = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
            pointed = {(e["location"], int(e["offset"]), int(e["length"])) for e in external}
            announced = {(e.path.name, e.offset, e.length) for e in everything.extents(artifact)}
            if dialect == "trt":
                announced, pointed = ({e for e in found if e[1] not in scales} for found in (announced, pointed))
            assert announced == pointed


def test_int8_and_int8dyn_share_one_weights_file_and_every_other_precision_has_its_own(everything):
    weights = {artifact.precision: artifact.weights for artifact in everything.manifest.artifacts}
    assert weights == {
        "fp32": "supernet-fp32.weights",
        "fp16": "supernet-fp16.weights",
        "bf16": "supernet-bf16.weights",
        "int8dyn": "supernet-int8.weights",
        "int8": "supernet-int8.weights",
    }


def test_trt_graphs_dequantise_before_they_cut_and_ort_graphs_after(everything):
    """TensorRT wants to see the whole constant dequantised, ONNX Runtime an int8 one beside its product."""
    for dialect, first in (("ort", "Slice"), ("trt", "DequantizeLinear")):
        model = onnx.load(
            str(everything.path / everything.artifact("h04-int8").graphs[dialect]), load_external_data=False
        )
        int8 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
        readers = [node.op_type for node in model.graph.node if node.input and node.input[0] in int8]
        # head.int8 is cut by its rows alone, which takes no node.
        assert collections.Counter(readers) == {first: 12} | (
            {"DequantizeLinear": 1} if first == "Slice" else {first: 13}
        )


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


any_geometry = given(
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
    input=st.sampled_from(["float32", "uint8"]),
    seed=st.integers(0, 99),
)


class QuantizeLinear(OpRun):
    """As opset 13 has it, per tensor; ONNX's own evaluator begins at 19."""

    op_domain = ""

    def _run(self, x, step, zero, **attributes):
        assert zero.dtype == np.int8
        return (np.clip(np.rint(x / step) + zero, -128, 127).astype(np.int8),)


class DequantizeLinear(OpRun):
    """As opset 13 has it, for int8: per tensor or per column."""

    op_domain = ""

    def _run(self, x, scale, zero=None, *, axis, **attributes):
        assert x.dtype == np.int8
        assert scale.ndim == 0 or (axis == 1 and scale.shape == x.shape[1:])
        return ((x.astype(np.float32) - (0 if zero is None else zero.astype(np.float32))) * scale,)


class Exported:
    """A random supernet exported, and what its graphs give in ONNX's own evaluator."""

    def __init__(
        self, root: Path, precision: str, *, batch, standalone: bool, input: Input, seed: int, **shape
    ) -> None:
        patch, heads = shape.pop("patch"), shape["heads"]
        of = geometry(
            image_size=patch * shape.pop("grid"), patch_size=patch, trained_heads=tuple(range(1, heads + 1)), **shape
        )
        self.file = write_supernet(root / "s.safetensors", of, seed)
        data = write_images(root / "images.npz", spec(of))
        options = {"batch": batch, "standalone": standalone, "input": input, "data": data}
        try:
            self.bundle: Bundle = export(self.file, root / "bundle", precisions=(precision,), **options)
        except ParityError:  # a handful of channels may be too few for few bits, which is no matter here
            if precision not in ("int8", "int8dyn", "bf16"):
                raise
            reject()
        self.weights: Weights = load(self.file)
        self.golden = self.bundle.golden()
        self.size = 3 if batch == "dynamic" else batch
        self.normalised = normalise(self.golden.images, self.bundle.spec.preprocessing)

    def expected(self, artifact: Artifact) -> np.ndarray:
        """What the torch subnet makes of the images, in fp32."""
        with torch.inference_mode():
            return self.weights.plain(self.bundle.subnet(artifact))(torch.from_numpy(self.normalised)).numpy()

    def evaluated(self, graph: str, *, alike: bool = False) -> np.ndarray:
        """Logits of the first images of a batch; `alike`, of as many batches of one image repeated."""
        older = [QuantizeLinear, DequantizeLinear] if graph.endswith(".trt.onnx") else []
        evaluator = ReferenceEvaluator(str(self.bundle.path / graph), new_ops=older)
        images = self.normalised if self.bundle.manifest.artifacts[0].input == "float32" else self.golden.images
        if not alike:
            return evaluator.run(None, {"image": images[: self.size]})[0]
        repeated = [np.repeat(images[i : i + 1], self.size, 0) for i in range(3)]
        return np.concatenate([evaluator.run(None, {"image": batch})[0][-1:] for batch in repeated])


@settings(max_examples=25)
@any_geometry
def test_any_geometry_gives_graphs_that_an_independent_evaluator_agrees_with(tmp_path_factory, **drawn):
    """uint8 too: pixels give the logits of their normalised images."""
    found = Exported(tmp_path_factory.mktemp("any"), "fp32", **drawn)
    for artifact in found.bundle.manifest.artifacts:
        expected = found.expected(artifact)
        for name in artifact.graphs.values():
            got = found.evaluated(name)
            np.testing.assert_allclose(got, expected[: found.size], atol=2e-5 * np.abs(expected).max())
        golden = found.golden.logits[artifact.name]
        np.testing.assert_allclose(golden, expected, atol=1e-4 * np.abs(expected).max())


@settings(max_examples=10)
@any_geometry
@pytest.mark.parametrize("precision", ["int8", "int8dyn"])
def test_any_geometry_gives_int8_graphs_that_compute_what_torch_simulates(tmp_path_factory, precision, **drawn):
    """Another formulation: weights and inputs rounded, products in float. A batch of the same image has its range."""
    found = Exported(tmp_path_factory.mktemp("any"), precision, **drawn)
    for artifact in found.bundle.manifest.artifacts:
        subnet = found.bundle.subnet(artifact)
        calibration = artifact.quantisation.calibration
        steps = None if calibration is None else calibration.scales
        simulated = simulate(found.weights, subnet, found.normalised, layers(subnet.geometry), steps)[:3]
        expected = found.expected(artifact)[:3]
        lost = np.abs(expected - simulated).mean()
        # Float rounding decides where a value lies half-way between two integers: far less than int8 itself costs, but
        # where a handful of channels is all there is.
        allowed = max(0.2 * lost, 2e-3 * np.abs(expected).max())
        for name in artifact.graphs.values():
            assert np.abs(found.evaluated(name, alike=True) - simulated).mean() <= allowed


@settings(max_examples=10)
@any_geometry
def test_any_geometry_gives_bf16_graphs_of_the_rounded_weights(tmp_path_factory, **drawn):
    """The ort dialect computes in fp32 with weights in bfloat16: as the torch subnet whose weights are so rounded."""
    found = Exported(tmp_path_factory.mktemp("any"), "bf16", **drawn)
    rounded = {name: tensor.bfloat16().float() for name, tensor in found.weights.tensors.items()}
    # These are added up before they are rounded, and with uint8 the normalisation is in the weights.
    exact = {name: found.weights.tensors[name] for name in ("cls_token", "pos_embed")}
    exact |= {name: tensor for name, tensor in found.weights.tensors.items() if name.startswith("patch_embed")}
    weights = Weights(found.weights.spec, rounded | exact)
    for artifact in found.bundle.manifest.artifacts:
        with torch.inference_mode():
            plain = weights.plain(found.bundle.subnet(artifact))
            expected = plain(torch.from_numpy(found.normalised)).numpy()[: found.size]
            lost = np.abs(found.expected(artifact)[: found.size] - expected).mean()
        got = found.evaluated(artifact.graphs["ort"])
        scale = np.abs(expected).max()
        assert np.abs(got - expected).max() <= 2e-2 * scale
        golden = found.golden.logits[artifact.name][: found.size]
        np.testing.assert_allclose(got, golden, atol=1e-4 * scale)
        assert lost > 0


def changed(path: Path, change) -> Path:
    """A supernet whose tensors are changed in place."""
    of = spec()
    tensors = dict(supernet(of.geometry).state_dict())
    with torch.no_grad():
        change(tensors)
    save(path, of, tensors)
    return path


def test_the_bias_of_k_cancels_and_is_stored_nowhere(tmp_path):
    """It adds the same to every score of a query. Ten times the weights' size, it would show."""

    def bias(value: float):
        def change(tensors):
            for i in range(2):
                tensors[f"blocks.{i}.attn.qkv.bias"][48:96] = value

        return change

    options = {"precisions": PRECISION_NAMES, "heads": (3, 6), "data": write_images(tmp_path / "images.npz")}
    without = export(changed(tmp_path / "a", bias(0.0)), tmp_path / "without", **options)
    huge = export(changed(tmp_path / "b", bias(3.0)), tmp_path / "huge", **options)
    assert [a.sha256 for a in huge.manifest.artifacts if a.precision != "int8"] == [
        a.sha256 for a in without.manifest.artifacts if a.precision != "int8"
    ]
    for a, b in zip(huge.manifest.artifacts, without.manifest.artifacts, strict=True):
        np.testing.assert_allclose(huge.golden().logits[a.name], without.golden().logits[b.name], rtol=1e-3, atol=1e-3)
    assert huge.artifact("h06-fp32").parity.max_difference < 1e-4


def saturating(tensors) -> None:
    """Every int8 product is of the largest byte and the largest weight, in all places."""
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1.0 if name.endswith("bias") else 0.0)
        elif name.startswith(("blocks", "head")):
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    # Both signs, and no two classes alike.
    tensors["head.weight"][1::2] *= -1
    tensors["head.bias"].copy_(torch.arange(10) * 1e-2)


def test_the_largest_bytes_and_weights_saturate_no_sum_on_this_processor(tmp_path):
    """With 127 levels they are off by half on a processor with AVX2 alone, which adds pairs of products in 16 bits."""
    file = changed(tmp_path / "s", saturating)
    bundle = export(file, tmp_path / "b", precisions=("int8dyn", "int8"), data=write_images(tmp_path / "images.npz"))
    for artifact in bundle.manifest.artifacts:
        width = bundle.subnet(artifact).width
        signs = np.where(np.arange(10) % 2, -1.0, 1.0)
        logits = bundle.golden().logits[artifact.name]
        np.testing.assert_allclose(logits, np.tile(width * signs + np.arange(10) * 1e-2, (8, 1)), rtol=1e-5)
        assert artifact.parity.max_difference < 1e-5


def digest(shape: Geometry, heads: int, precision: str = "fp32", batch=1, input: Input = "float32", kept=()) -> str:
    subnet, kind = shape.subnet(heads), PRECISIONS[precision]
    int8 = () if kind.int8 is None else tuple(layer for layer in layers(shape) if layer not in kept)
    form = Form(dtype=kind.dtype, input=input, int8=int8)
    return graphs.digest(tuple(graphs.write(subnet, kind, form, dialect, batch) for dialect in kind.dialects))


def test_the_graph_digest_tells_graphs_apart_and_ignores_the_supernet_around_them():
    shape = geometry()
    digests = {
        digest(shape, 4),
        *(digest(shape, 3, precision) for precision in PRECISION_NAMES),
        *(digest(shape, 3, precision, input="uint8") for precision in PRECISION_NAMES),
        digest(shape, 3, "int8", kept=("head",)),
        digest(shape, 3, "int8", kept=("blocks.0.attn.qkv",)),
        digest(shape, 3, batch=2),
        digest(shape, 3, batch="dynamic"),
        digest(geometry(classes=11), 3),
        digest(geometry(eps=1e-5), 3),
    }
    assert len(digests) == 17
    for precision in PRECISION_NAMES:
        assert digest(shape, 3, precision) == digest(geometry(heads=4, trained_heads=(3, 4)), 3, precision)


def test_a_calibration_of_other_values_is_the_same_graph_with_other_content(tmp_path, supernet_file):
    one, two = (
        export(supernet_file, tmp_path / method, heads=(3,), precisions=("int8",), data=data, quantising=quantising)
        for method, data, quantising in (
            ("a", write_images(tmp_path / "a.npz"), Quantising(images=8)),
            ("b", write_images(tmp_path / "b.npz"), Quantising(images=16)),
        )
    )
    assert one.artifact("h03-int8").graph_sha256 == two.artifact("h03-int8").graph_sha256
    assert one.artifact("h03-int8").sha256 != two.artifact("h03-int8").sha256


def test_the_graph_digest_does_not_change_by_accident():
    """Measured latencies are kept under it: when this changes, every profile becomes stale. Change it knowingly."""
    assert {name: digest(geometry(), 3, name)[:16] for name in PRECISION_NAMES} == {
        "fp32": "614311fdc5c2f4f6",
        "fp16": "4b8a94f094d153e1",
        "bf16": "d7b0e4851b82f4b7",
        "int8dyn": "81a47508f402e9d2",
        "int8": "e91d7b173f4b1b26",
    }
