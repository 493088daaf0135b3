"""Supernets whose subnets have each their own classifier: one weights file still, and the torch subnets' logits."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from hydradeploy import export
from hydradeploy.backends import PRECISION_NAMES, Options, backend, model_of, prepared, run_all
from hydradeploy.backends.torch import views
from hydradeploy.bundle import open_bundle
from hydradeploy.data.preprocess import normalise
from hydradeploy.data.samples import synthetic
from hydradeploy.exporter.calibration import calibrate
from hydradeploy.exporter.pack import pack
from hydradeploy.exporter.sensitivity import ranking, simulate
from hydradeploy.exporter.weights import map_weights
from hydradeploy.stored import layers
from hydradeploy.supernet.store import Weights, load, save
from tests.conftest import geometry, require, spec, supernet, write_images, write_supernet

SHAPE = geometry(classifiers="separate")
HEADS = (3, 4, 6)
# As a fraction of the largest logit.
ALLOWED = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2, "int8dyn": 0.15, "int8": 0.15}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_supernet(tmp_path_factory.mktemp("separate") / "supernet.safetensors", SHAPE)


@pytest.fixture(scope="module")
def bundle(file):
    """Three subnets in every precision, one for pixels too; do not write to it."""
    require("onnxruntime")
    data, path = write_images(file.parent / "images.npz"), file.parent / "bundle"
    export(file, path, heads=HEADS, precisions=PRECISION_NAMES, data=data)
    return export(file, path, heads=(4,), precisions=PRECISION_NAMES, data=data, input="uint8")


def logits(of, name, runner="onnxruntime"):
    """Of the golden images."""
    artifact = of.artifact(name)
    opened = model_of(of, artifact, backend(runner).dialect)
    with backend(runner).open(opened, Options()) as session:
        return run_all(session, opened, prepared(of.golden().images, artifact.input, of.spec.preprocessing))


def expected(file, of, heads):
    images = torch.from_numpy(normalise(of.golden().images, of.spec.preprocessing))
    with torch.inference_mode():
        return load(file).model()(images, heads).numpy()


@pytest.mark.parametrize("runner", ["onnxruntime", "torch"])
def test_every_artifact_gives_the_logits_of_its_subnet(bundle, file, runner):
    ran = set()
    for artifact in bundle.manifest.artifacts:
        if not backend(runner).compute_types(artifact.precision):
            continue
        right = expected(file, bundle, artifact.heads)
        difference = np.abs(logits(bundle, artifact.name, runner) - right).max() / np.abs(right).max()
        assert difference <= ALLOWED[artifact.precision], artifact.name
        ran.add(artifact.name)
    assert {f"h0{heads}-fp32" for heads in HEADS} <= ran
    # Classifiers of others give other logits, so that a mix-up would show.
    right, state = expected(file, bundle, 4), load(file).tensors
    mixed = supernet(SHAPE)
    with torch.no_grad():
        mixed.head["h04"].weight.copy_(state["head.h06.weight"][:, :32])
        images = torch.from_numpy(normalise(bundle.golden().images, bundle.spec.preprocessing))
        assert np.abs(mixed(images, 4).numpy() - right).max() > 0.2 * np.abs(right).max()


def test_a_weights_file_holds_every_classifier_at_its_own_size_and_all_else_once(bundle, file):
    assert set(bundle.manifest.weights) == {"supernet-fp32.weights", "supernet-fp16.weights"} | {
        f"supernet-{name}.weights" for name in ("bf16", "int8")
    }
    for location, table in bundle.manifest.weights.items():
        kind = "int8" if location == "supernet-int8.weights" else "weight"
        own = {name: there.shape for name, there in table.items() if name.startswith("head")}
        assert {name: shape for name, shape in own.items() if name.endswith(kind)} == {
            f"head.h0{heads}.{kind}": (8 * heads, 10) for heads in HEADS
        }
        assert {name.split(".")[1] for name in own} == {f"h0{heads}" for heads in HEADS}
    tensors, state = (
        map_weights(bundle.path / "supernet-fp32.weights", bundle.manifest.weights["supernet-fp32.weights"]),
        load(file).tensors,
    )
    for heads in HEADS:
        np.testing.assert_array_equal(tensors[f"head.h0{heads}.weight"], state[f"head.h0{heads}.weight"].numpy().T)


def test_views_of_the_file_are_shared_but_for_the_classifiers(bundle):
    smaller, larger = (views(model_of(bundle, bundle.artifact(f"h0{k}-fp32"), None).weights) for k in (3, 6))
    assert {name for name in smaller if name not in larger} == {"head.h03.weight", "head.h03.bias"}
    for name in set(smaller) & set(larger):
        assert smaller[name].data_ptr() == larger[name].data_ptr()
    assert smaller["head.h03.weight"].untyped_storage().data_ptr() == larger["norm.bias"].untyped_storage().data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "int8dyn"])
def test_hashes_see_a_subnets_own_classifier_and_no_other(file, tmp_path, precision):
    def hashes(path, name, **options):
        written = export(path, tmp_path / name, precisions=(precision,), **options)
        return {artifact.heads: artifact.sha256 for artifact in written.manifest.artifacts}

    weights = load(file)
    tensors = weights.tensors | {"head.h03.bias": weights.tensors["head.h03.bias"] + 1}
    save(tmp_path / "changed", weights.spec, tensors)
    before, after = hashes(file, "a"), hashes(tmp_path / "changed", "b")
    assert {heads for heads in before if before[heads] != after[heads]} == {3}
    assert hashes(file, "c", heads=(3,)) == {3: before[3]}
    assert hashes(file, "d", heads=(3, 4), standalone=True) == {heads: before[heads] for heads in (3, 4)}


def test_adding_a_head_count_equals_exporting_all(file, tmp_path):
    export(file, tmp_path / "two", heads=(3, 5))
    export(file, tmp_path / "two", heads=(2,))
    export(file, tmp_path / "all", heads=(2, 3, 5))
    for path in (tmp_path / "all").iterdir():
        if path.name != ".stamp.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["h03-fp32", "h03-int8", "h04-int8dyn-uint8"])
def test_a_packed_subnet_takes_its_classifier_along_and_no_other(bundle, tmp_path, name):
    packed = pack(bundle.path, name, tmp_path / "packed")
    (table,) = packed.manifest.weights.values()
    own = f"h0{packed.artifact.heads}"
    assert {part.split(".")[1] for part in table if part.startswith("head")} == {own}
    opened = open_bundle(tmp_path / "packed")
    np.testing.assert_array_equal(logits(opened, name), logits(bundle, name))
    size = sum(path.stat().st_size for path in (tmp_path / "packed").iterdir() if path.name != ".stamp.json")
    assert size == packed.artifact.size_bytes


def test_columns_of_a_shared_classifier_as_own_ones_give_the_shared_supernets_logits(tmp_path):
    model = supernet()
    apart = msgspec.structs.replace(model.geometry, classifiers="separate")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    for subnet in apart.subnets():
        state[f"{subnet.classifier}.weight"] = model.head.weight[:, : subnet.width]
        state[f"{subnet.classifier}.bias"] = model.head.bias
    save(tmp_path / "shared", spec(), model.state_dict())
    save(tmp_path / "apart", spec(apart), state)
    one, other = (export(tmp_path / name, tmp_path / f"{name}.bundle") for name in ("shared", "apart"))
    for heads in apart.trained_heads:
        name = f"h0{heads}-fp32"
        np.testing.assert_array_equal(logits(other, name), logits(one, name))
        np.testing.assert_array_equal(logits(other, name, "torch"), logits(one, name, "torch"))


def test_int8_treats_a_classifier_of_its_own_as_the_plain_vits_head():
    """Its scales are over its own inputs, and the layer is called head whatever the subnet."""
    model, images = supernet(SHAPE), synthetic(spec(), 8, seed=1).images
    found = Weights(spec(SHAPE), dict(model.state_dict()))
    plain = Weights(spec(SHAPE.alone(3)), dict(model.subnet(3).state_dict()))
    subnet, alone = SHAPE.subnet(3), SHAPE.alone(3).subnet(3)
    quiet = lambda what, done, total: None  # noqa: E731
    steps = calibrate(found, [subnet], images, "minmax", quiet)[3]
    assert list(steps) == list(layers(SHAPE))
    assert steps == calibrate(plain, [alone], images, "minmax", quiet)[3]
    shown = normalise(images, found.spec.preprocessing)
    for given in (steps, None):
        np.testing.assert_array_equal(
            simulate(found, subnet, shown, ["head"], given), simulate(plain, alone, shown, ["head"], given)
        )
    assert set(ranking(found, subnet, shown, steps, quiet)) == set(layers(SHAPE))
