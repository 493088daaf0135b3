"""Export: what it writes, what it keeps, what it refuses, and that nothing is lost whatever happens."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hydradeploy import export, open_bundle
from hydradeploy.backends import BACKEND_MODULES, PRECISION_NAMES
from hydradeploy.bundle import GOLDEN, MANIFEST
from hydradeploy.data.preprocess import normalise
from hydradeploy.engines.cache import Cache, Key
from hydradeploy.errors import EnvironmentFailed, IntegrityError, ParityError, UsageError
from hydradeploy.files import sha256_file
from hydradeploy.supernet.store import Weights, load
from tests.conftest import Cli, geometry, missing, rot, write_images, write_supernet


def names(bundle: Path) -> list[str]:
    return [artifact.name for artifact in open_bundle(bundle).manifest.artifacts]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != ".stamp.json"}


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_the_whole_bundle_is_little_larger_than_its_largest_subnet(tmp_path):
    file = write_supernet(
        tmp_path / "s.safetensors", geometry(head_dim=32, heads=8, trained_heads=tuple(range(1, 9)), depth=2)
    )
    export(file, tmp_path / "bundle")
    written = [p for p in (tmp_path / "bundle").iterdir() if p.suffix in (".onnx", ".weights")]
    assert len(written) == 17
    weights = sum(p.stat().st_size for p in written if p.suffix == ".weights")
    assert weights <= file.stat().st_size + 4096 * 40


ALLOWED = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2, "int8dyn": 0.15, "int8": 0.15}


def test_golden_logits_are_those_of_the_torch_subnet(everything, supernet_file):
    golden, weights = everything.golden(), load(supernet_file)
    images = torch.from_numpy(normalise(golden.images, everything.spec.preprocessing))
    for artifact in everything.manifest.artifacts:
        with torch.inference_mode():
            expected = weights.plain(everything.subnet(artifact))(images).numpy()
        difference = float(np.abs(golden.logits[artifact.name] - expected).max() / np.abs(expected).max())
        assert artifact.parity.tolerance == ALLOWED[artifact.precision]
        assert difference <= artifact.parity.tolerance
        # The record is of the worst dialect. Logits of a batch and of one image differ by torch's own rounding.
        assert artifact.parity.max_difference >= 0.999 * difference - 1e-7
        assert artifact.parity.cosine >= artifact.parity.least_cosine == 0.99
        assert artifact.parity.top1_agreement is not None


def test_artifacts_describe_themselves(everything):
    shape = everything.spec.geometry
    artifacts = everything.manifest.artifacts
    for artifact in artifacts:
        subnet = shape.subnet(artifact.heads)
        assert (artifact.parameters, artifact.macs) == (subnet.parameters, subnet.macs)
        suffix = "-uint8" if artifact.input == "uint8" else ""
        assert artifact.name == f"h{artifact.heads:02d}-{artifact.precision}{suffix}"
        assert (artifact.quantisation is not None) is artifact.precision.startswith("int8")
        assert list(artifact.graphs) == (["ort"] if artifact.precision == "int8dyn" else ["ort", "trt"])
    assert len(artifacts) == 20
    assert len({a.sha256 for a in artifacts}) == len({a.graph_sha256 for a in artifacts}) == 20
    assert everything.manifest.samples == "images.npz"


def test_samples_from_a_seed_say_so_and_judge_no_top1_but_that_of_fp32(shared_bundle):
    manifest = open_bundle(shared_bundle).manifest
    assert manifest.samples == "synthetic, seed 0"
    assert {a.precision for a in manifest.artifacts if a.parity.top1_agreement is None} == {"fp16"}


def test_artifacts_for_both_inputs_share_a_weights_file_but_for_their_embeddings(everything):
    for name, table in everything.manifest.weights.items():
        embedding = {tensor for tensor in table if tensor.startswith("embed.")}
        inputs = {f"embed.{kind}.{part}" for kind in ("float32", "uint8") for part in ("weight", "patches")}
        assert embedding == {"embed.class"} | inputs, name
    for precision in ("fp32", "int8"):
        floats, pixels = (everything.golden().logits[f"h04-{precision}{suffix}"] for suffix in ("", "-uint8"))
        np.testing.assert_allclose(pixels, floats, atol=(1e-5 if precision == "fp32" else 3e-2) * np.abs(floats).max())


def test_onnx_runtime_for_gpus_is_recorded_although_its_distribution_has_another_name(
    supernet_file, tmp_path, monkeypatch
):
    import onnxruntime

    real = importlib.metadata.version

    def version(distribution: str) -> str:
        if distribution == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(distribution)
        return real(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    manifest = export(supernet_file, tmp_path / "bundle", heads=(2,)).manifest
    assert manifest.tools["onnxruntime"] == onnxruntime.__version__


def test_the_same_supernet_gives_the_same_bytes(supernet_file, tmp_path):
    export(supernet_file, tmp_path / "a", heads=(2, 5))
    export(supernet_file, tmp_path / "b", heads=(2, 5))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8dyn"])
def test_hashes_say_what_they_should(supernet_file, tmp_path, precision):
    def artifact(name: str, **options):
        out = tmp_path / f"{name}.{len(list(tmp_path.iterdir()))}"
        return export(tmp_path / name, out, precisions=(precision,), **options).artifact(f"h03-{precision}")

    shutil.copy(supernet_file, tmp_path / "one")
    write_supernet(tmp_path / "retrained", seed=1)
    one, retrained = artifact("one"), artifact("retrained")
    small, batch = artifact("one", heads=(3,)), artifact("one", batch=2)
    standalone = artifact("one", standalone=True)
    assert one.sha256 == small.sha256 == standalone.sha256
    assert one.graph_sha256 == small.graph_sha256 == standalone.graph_sha256 == retrained.graph_sha256
    assert one.sha256 != retrained.sha256
    assert one.graph_sha256 != batch.graph_sha256


@pytest.mark.parametrize("precision", ["fp32", "int8dyn"])
@pytest.mark.parametrize("standalone", [True, False])
def test_content_does_not_depend_on_what_else_is_in_the_bundle(supernet_file, tmp_path, precision, standalone):
    """Accuracy and engines stay those of the artifact when another is added; and its weights are still found."""
    pixels = {"heads": (3,), "precisions": (precision,), "input": "uint8"}
    name = f"h03-{precision}-uint8"
    alone = export(supernet_file, tmp_path / "a", **pixels).artifact(name)
    export(supernet_file, tmp_path / "b", heads=(2, 4), precisions=(precision,), standalone=standalone)
    assert export(supernet_file, tmp_path / "b", **pixels).artifact(name).sha256 == alone.sha256


def test_content_changes_with_the_preprocessing(supernet_file, tmp_path):
    from hydradeploy.supernet.store import save

    weights = load(supernet_file)
    other = msgspec.structs.replace(weights.spec.preprocessing, crop_pct=0.9)
    save(tmp_path / "s", msgspec.structs.replace(weights.spec, preprocessing=other), weights.tensors)
    before = export(supernet_file, tmp_path / "a", heads=(2,)).artifact("h02-fp32")
    after = export(tmp_path / "s", tmp_path / "b", heads=(2,)).artifact("h02-fp32")
    assert before.sha256 != after.sha256
    assert before.graph_sha256 == after.graph_sha256


def test_adding_heads_keeps_what_is_there_and_equals_exporting_all(supernet_file, tmp_path):
    export(supernet_file, tmp_path / "grown", heads=(2, 4))
    export(supernet_file, tmp_path / "grown", heads=(6,))
    export(supernet_file, tmp_path / "grown", heads=(3,), precisions=("fp16", "int8dyn"))
    export(supernet_file, tmp_path / "grown", heads=(3,), precisions=("fp16",), input="uint8")
    assert names(tmp_path / "grown") == [
        *("h02-fp32", "h04-fp32", "h06-fp32"),
        *("h03-fp16", "h03-fp16-uint8", "h03-int8dyn"),
    ]
    export(supernet_file, tmp_path / "once", heads=(2, 4, 6))
    export(supernet_file, tmp_path / "once", heads=(3,), precisions=("fp16",), input="uint8")
    export(supernet_file, tmp_path / "once", heads=(3,), precisions=("int8dyn", "fp16"))
    assert snapshot(tmp_path / "grown") == snapshot(tmp_path / "once")


def test_adding_heads_does_not_run_unchanged_artifacts_again(supernet_file, tmp_path, monkeypatch):
    export(supernet_file, tmp_path / "bundle", heads=(3, 6))
    from hydradeploy.exporter import parity

    gated: list[str] = []
    original = parity.gate
    monkeypatch.setattr(parity, "gate", lambda name, *a: gated.append(name) or original(name, *a))
    export(supernet_file, tmp_path / "bundle", heads=(2,))
    assert gated == ["h02-fp32"]
    gated.clear()
    export(supernet_file, tmp_path / "other", heads=(2,))
    export(supernet_file, tmp_path / "other", heads=(3,))
    assert gated == ["h02-fp32", "h02-fp32", "h03-fp32"], (
        "a larger weights file moves the tensors, so the graph is another file"
    )


def test_others_files_in_the_bundle_are_carried_over(supernet_file, tmp_path):
    bundle = tmp_path / "bundle"
    export(supernet_file, bundle, heads=(2,))
    (bundle / "accuracy.json").write_text("{}")
    (bundle / "notes").mkdir()
    (bundle / "notes" / "of.txt").write_text("mine")
    export(supernet_file, bundle, heads=(3,))
    assert (bundle / "accuracy.json").read_text() == "{}"
    assert (bundle / "notes" / "of.txt").read_text() == "mine"


def test_engines_stay_as_long_as_their_artifact_does_and_are_nothing_of_the_bundle(supernet_file, tmp_path, cli):
    bundle = tmp_path / "bundle"
    before = export(supernet_file, bundle, heads=(2, 3))
    two, three = (engine_of(artifact) for artifact in before.manifest.artifacts)
    cache = Cache(bundle / "engines")
    for key in (two, three):
        cache.store(key, b"plan", artifact="as it was")
    assert cli("verify", "--bundle", bundle).code == 0
    assert open_bundle(bundle, "always").manifest == before.manifest
    export(supernet_file, bundle, heads=(4,))
    assert [cache.find(key) for key in (two, three)] == [b"plan", b"plan"], "added to"
    export(supernet_file, bundle, heads=(3,), batch=2)
    assert [cache.find(key) for key in (two, three)] == [b"plan", None], "replaced"
    other = write_supernet(tmp_path / "other.safetensors", seed=1)
    export(other, bundle, heads=(2,), force=True)
    assert not (bundle / "engines").exists()
    assert cli("pack", "h02-fp32", "--bundle", bundle, "--out", tmp_path / "pack").code == 0
    assert not (tmp_path / "pack" / "engines").exists()


def engine_of(artifact) -> Key:
    return Key(kind="tensorrt", graph_sha256=artifact.graph_sha256, sha256=artifact.sha256, version="10.3.0")


@pytest.mark.parametrize("input", ["float32", "uint8"])
@pytest.mark.parametrize("batch", [1, 3, "dynamic"])
@pytest.mark.parametrize("standalone", [False, True])
def test_batches_and_standalone_graphs_pass_the_gate_in_every_precision(
    supernet_file, tmp_path, batch, standalone, input
):
    options = {"precisions": PRECISION_NAMES, "data": write_images(tmp_path / "images.npz")}
    bundle = export(
        supernet_file, tmp_path / "b", heads=(3, 6), batch=batch, standalone=standalone, input=input, **options
    )
    assert [artifact.batch for artifact in bundle.manifest.artifacts] == [batch] * 10
    weights = {path.name for path in (tmp_path / "b").iterdir() if path.suffix == ".weights"}
    expected = set() if standalone else {f"supernet-{name}.weights" for name in ("fp32", "fp16", "bf16", "int8")}
    assert weights == expected
    assert all((artifact.weights is None) is standalone for artifact in bundle.manifest.artifacts)
    assert not list((tmp_path / "b").glob("*.emulated.onnx"))


def test_a_standalone_graph_works_alone(supernet_file, tmp_path):
    import onnxruntime

    bundle = export(supernet_file, tmp_path / "b", heads=(4,), standalone=True)
    alone = shutil.copy(tmp_path / "b" / "h04-fp32.onnx", tmp_path / "alone.onnx")
    golden = bundle.golden()
    image = normalise(golden.images[:1], bundle.spec.preprocessing)
    logits = onnxruntime.InferenceSession(alone).run(None, {"image": image})[0]
    np.testing.assert_allclose(logits[0], golden.logits["h04-fp32"][0], rtol=1e-5, atol=1e-5)


def test_parity_runs_on_images_from_a_folder_and_from_npz(supernet_file, tmp_path, cli: Cli):
    folder = tmp_path / "photos"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (50, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.jpg")
    ran = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "a", "--data", folder, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["samples"] == "photos"
    assert open_bundle(tmp_path / "a").golden().images.shape == (6, 32, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    export(supernet_file, tmp_path / "b", data=tmp_path / "d.npz", heads=(2,))
    assert np.array_equal(open_bundle(tmp_path / "b").golden().images[1], images[2])


def test_samples_stay_those_of_the_bundle_until_others_are_given(supernet_file, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    export(supernet_file, tmp_path / "b", data=tmp_path / "d.npz", heads=(2,))
    export(supernet_file, tmp_path / "b", heads=(3,))
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.samples == "d.npz"
    assert np.array_equal(bundle.golden().images, images)


def test_class_names_travel_into_the_bundle(tmp_path):
    from hydradeploy.supernet.store import save

    weights = load(write_supernet(tmp_path / "s"))
    named = msgspec.structs.replace(weights.spec, class_names=tuple("abcdefghij"))
    save(tmp_path / "t", named, weights.tensors)
    assert export(tmp_path / "t", tmp_path / "b", heads=(2,)).spec.class_names == tuple("abcdefghij")


@pytest.mark.parametrize(("heads", "named"), [("1", "1 heads"), ("7", "7 heads"), ("2-9", "7 heads")])
def test_head_counts_that_were_not_trained_are_refused(supernet_file, tmp_path, cli: Cli, heads, named):
    ran = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "b", "--heads", heads)
    assert ran.code == 2
    assert f"{named} were not trained" in ran.err
    assert "hint: this supernet has 2-6" in ran.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("heads", ["x", "3-", "6-3", "0", "", "3,,4", "99999"])
def test_head_counts_that_cannot_be_read_are_refused(supernet_file, tmp_path, cli: Cli, heads):
    ran = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "b", "--heads", heads)
    assert ran.code == 2
    assert "hint: write for example" in ran.err


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--precision", "int7", 2),
        ("--batch", "0", 2),
        ("--batch", "9" * 20, 2),
        ("--batch", "many", 2),
        ("--data", "no-such-folder", 2),
    ],
)
def test_other_wrong_options_are_refused(supernet_file, tmp_path, cli: Cli, option, value, code):
    ran = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "b", option, value)
    assert ran.code == code
    assert "error:" in ran.err
    assert "hint:" in ran.err
    assert not (tmp_path / "b").exists()


def test_another_supernet_is_refused_without_force(supernet_file, tmp_path, cli: Cli):
    bundle = tmp_path / "b"
    export(supernet_file, bundle, heads=(2, 3))
    before = snapshot(bundle)
    other = write_supernet(tmp_path / "other", seed=1)
    ran = cli("export", "--supernet", other, "--bundle", bundle, "--heads", 4)
    assert ran.code == 2
    assert "another supernet" in ran.err
    assert "--force" in ran.err
    assert snapshot(bundle) == before
    assert cli("export", "--supernet", other, "--bundle", bundle, "--heads", 4, "--force").code == 0
    assert names(bundle) == ["h04-fp32"]
    assert not (bundle / "h02-fp32.onnx").exists()


def test_a_damaged_bundle_is_refused_without_force_and_replaced_with_it(supernet_file, tmp_path):
    bundle = tmp_path / "b"
    export(supernet_file, bundle, heads=(2,))
    (bundle / "h02-fp32.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="h02-fp32") as refused:
        export(supernet_file, bundle, heads=(3,))
    assert "--force" in str(refused.value.hint)
    export(supernet_file, bundle, heads=(3,), force=True)
    assert names(bundle) == ["h03-fp32"]
    assert not (bundle / "h02-fp32.onnx").exists()


def test_a_supernet_that_training_replaces_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path, newer = write_supernet(tmp_path / "s"), write_supernet(tmp_path / "newer", seed=1)
    expected = export(newer, tmp_path / "expected", heads=(2,)).manifest

    def replaced(file: Path) -> Weights:
        weights = load(file)
        if newer.exists():
            os.replace(newer, file)
        return weights

    monkeypatch.setattr("hydradeploy.exporter.export.load", replaced)
    found = export(path, tmp_path / "b", heads=(2,)).manifest
    assert found.artifacts[0].sha256 == expected.artifacts[0].sha256
    assert found.supernet_sha256 == expected.supernet_sha256 == sha256_file(path)


def test_golden_samples_that_rotted_are_refused_and_replaced_with_force(supernet_file, tmp_path, cli: Cli):
    bundle = tmp_path / "b"
    export(supernet_file, bundle, heads=(2,))
    assert cli("verify", "--bundle", bundle).code == 0
    rot(bundle / GOLDEN, 2000)
    order = ("export", "--supernet", supernet_file, "--bundle", bundle, "--heads", 3)
    assert cli(*order).code == 10
    assert cli(*order, "--force").code == 0
    assert names(bundle) == ["h03-fp32"]


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_no_bundle_is_never_touched(supernet_file, tmp_path, force):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("important")
    with pytest.raises(UsageError, match="no bundle"):
        export(supernet_file, tmp_path / "home", force=force)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "important"
    (tmp_path / "home" / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(UsageError, match="no bundle"):
        export(supernet_file, tmp_path / "home", force=force)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "important"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no bundle"):
        export(supernet_file, tmp_path / "file", force=force)


def test_a_directory_that_cannot_be_exchanged_is_refused_before_the_work(supernet_file, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", ".."):
        with pytest.raises(UsageError, match="the directory this runs in"):
            export(supernet_file, Path(name), heads=(2,))
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("mnt"))
    (tmp_path / "mnt").mkdir()
    with pytest.raises(UsageError, match="where a file system is mounted"):
        export(supernet_file, tmp_path / "mnt", heads=(2,))


def test_a_bundle_behind_a_symbolic_link_is_replaced_where_it_is(supernet_file, tmp_path):
    (tmp_path / "disk").mkdir()
    export(supernet_file, tmp_path / "disk" / "bundle", heads=(2,))
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "bundle")
    export(supernet_file, tmp_path / "link", heads=(3,))
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk" / "bundle") == ["h02-fp32", "h03-fp32"]
    assert leftovers(tmp_path) == leftovers(tmp_path / "disk") == []


def damaged_supernet(source: Path, out: Path, change) -> Path:
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, out, metadata)
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(supernet_file, tmp_path, cli: Cli, value):
    def poison(tensors):
        tensors["blocks.1.mlp.fc2.weight"][3, 5] = value

    file = damaged_supernet(supernet_file, tmp_path / "s", poison)
    ran = cli("export", "--supernet", file, "--bundle", tmp_path / "b")
    assert ran.code == 11
    assert f"{file}: tensor blocks.1.mlp.fc2.weight holds NaN or infinite values" in ran.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_supernet_is_refused(supernet_file, tmp_path, cli: Cli, keep):
    data = supernet_file.read_bytes()
    (tmp_path / "s").write_bytes(data[: int(len(data) * keep)])
    ran = cli("export", "--supernet", tmp_path / "s", "--bundle", tmp_path / "b")
    assert ran.code == 10
    assert str(tmp_path / "s") in ran.err


def test_a_missing_supernet_is_refused_with_what_to_do(tmp_path, cli: Cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = cli("export")
    assert ran.code == 2
    assert "supernet.safetensors: no such file" in ran.err
    assert "hydradeploy import" in ran.err


def test_an_overflow_in_half_precision_fails_the_gate_and_leaves_no_bundle(supernet_file, tmp_path, cli: Cli):
    def amplify(tensors):
        tensors["blocks.0.mlp.fc1.weight"] *= 3e4

    file = damaged_supernet(supernet_file, tmp_path / "s", amplify)
    ran = cli("export", "--supernet", file, "--bundle", tmp_path / "b", "--precision", "fp16")
    assert ran.code == 5, ran.err
    assert "h02-fp16 (ort) does not compute what the supernet computes" in ran.err
    assert "hint:" in ran.err
    assert not (tmp_path / "b").exists()
    assert leftovers(tmp_path) == []


class _Off:
    """A runtime that is wrong by a given amount, or prefers another class."""

    name, dialect = "onnxruntime", "ort"

    def __init__(self, shift: float, on: str) -> None:
        self.shift, self.on = shift, on

    def why_not(self):
        return None

    def open(self, model, options):
        from hydradeploy.backends.onnxruntime import BACKEND

        self.session = BACKEND.open(model, options)
        self.model = model
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def software(self):
        return {}

    def run(self, images):
        logits = self.session.run(images)
        if self.on in self.model.graph.name:
            logits[:, 0] += self.shift
        return logits


@pytest.mark.parametrize("graph", ["h04-fp32.onnx", "h04-fp32.trt.onnx"])
@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_graph_that_computes_something_else_leaves_the_old_bundle(supernet_file, tmp_path, monkeypatch, graph, shift):
    bundle = tmp_path / "b"
    export(supernet_file, bundle, heads=(2,))
    before = snapshot(bundle)
    module = type(sys)("off")
    module.BACKEND = _Off(shift, graph)
    monkeypatch.setitem(sys.modules, "off", module)
    monkeypatch.setitem(BACKEND_MODULES, "onnxruntime", "off")
    with pytest.raises(ParityError, match="h04-fp32"):
        export(supernet_file, bundle, heads=(3, 4, 5))
    assert snapshot(bundle) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("margin", "passes"), [(0.0, True), (3e-5, False)])
def test_a_graph_may_decide_a_tie_in_fp32_and_nothing_else(supernet_file, tmp_path, monkeypatch, margin, passes):
    """Class 1 is ahead of class 0 by a margin of the largest |logit|, and the runtime adds twice that to class 0."""

    def ahead(tensors):
        tensors["head.weight"] *= 0
        tensors["head.bias"] *= 0
        tensors["head.bias"][:2] = torch.tensor([1 - margin, 1])

    file = damaged_supernet(supernet_file, tmp_path / "s", ahead)
    module = type(sys)("off")
    module.BACKEND = _Off(2 * margin or -1e-6, "h04")
    monkeypatch.setitem(sys.modules, "off", module)
    monkeypatch.setitem(BACKEND_MODULES, "onnxruntime", "off")
    if passes:
        (artifact,) = export(file, tmp_path / "b", heads=(4,)).manifest.artifacts
        assert artifact.parity.top1_agreement == 0
    else:
        with pytest.raises(ParityError, match=r"top-1 equal on 0\.0%"):
            export(file, tmp_path / "b", heads=(4,))


EXPORT = [sys.executable, "-m", "hydradeploy", "export"]


def start(supernet_file: Path, bundle: Path, *options: str, **kwargs) -> subprocess.Popen[str]:
    command = [*EXPORT, "--supernet", str(supernet_file), "--bundle", str(bundle), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def killed_exports(supernet_file: Path, tmp_path: Path, times: int, seed: int) -> None:
    """Kill exports at random moments of their writing; the old bundle stays whole, and the next one succeeds."""
    bundle = tmp_path / "bundle"
    export(supernet_file, bundle, heads=(2,))
    before = snapshot(bundle)
    generator = np.random.default_rng(seed)
    code = (
        "import sys, pathlib; from hydradeploy import export; print('ready', flush=True); "
        "supernet, bundle = map(pathlib.Path, sys.argv[1:]); "
        "export(supernet, bundle, heads=(2, 3, 4, 5, 6), precisions=('fp32', 'fp16'))"
    )
    killed = 0
    for _ in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(supernet_file), str(bundle)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0, 1.2))
        child.kill()
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        found = open_bundle(bundle, "always").manifest
        if len(found.artifacts) == 1:
            assert snapshot(bundle) == before
        else:
            assert len(found.artifacts) == 10
            shutil.rmtree(bundle)
            export(supernet_file, bundle, heads=(2,))
    assert killed
    export(supernet_file, bundle, heads=(2, 3))
    assert names(bundle) == ["h02-fp32", "h03-fp32"]
    assert leftovers(tmp_path) == []


def test_a_kill_at_any_moment_leaves_the_old_bundle_or_the_new(supernet_file, tmp_path):
    killed_exports(supernet_file, tmp_path, times=4, seed=0)


@pytest.mark.slow
def test_a_storm_of_kills_leaves_the_old_bundle_or_the_new(supernet_file, tmp_path):
    killed_exports(supernet_file, tmp_path, times=100, seed=1)


def test_ctrl_c_is_exit_130_and_leaves_nothing(supernet_file, tmp_path):
    child = start(supernet_file, tmp_path / "bundle", "--precision", "fp32,fp16")
    assert child.stderr is not None
    assert "reading" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    if child.returncode == 0:
        pytest.fail("the export ended before the signal came; make it longer")
    # Where Python code that a C library runs is interrupted, CPython ends itself by SIGINT: 130 too in any shell.
    assert child.returncode in (130, -signal.SIGINT)
    assert err.rstrip().endswith("interrupted")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_two_exports_at_once_both_end_up_in_the_bundle(supernet_file, tmp_path):
    children = [start(supernet_file, tmp_path / "b", "--heads", str(k)) for k in (2, 5)]
    for child in children:
        _, err = child.communicate()
        assert child.returncode == 0, err
    assert names(tmp_path / "b") == ["h02-fp32", "h05-fp32"]
    assert leftovers(tmp_path) == []


def test_an_export_waits_for_the_one_before_it_and_says_so(supernet_file, tmp_path):
    with (tmp_path / ".b.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = start(supernet_file, tmp_path / "b", "--heads", "2")
        assert child.stderr is not None
        lines = [child.stderr.readline(), child.stderr.readline()]
        assert any("another process is writing" in line for line in lines), lines
        assert not (tmp_path / "b").exists()
    assert child.communicate()[1] is not None
    assert child.returncode == 0
    assert names(tmp_path / "b") == ["h02-fp32"]


def test_a_file_size_limit_is_an_environment_failure_and_keeps_the_old_bundle(supernet_file, tmp_path):
    bundle = tmp_path / "bundle"
    export(supernet_file, bundle, heads=(2,))
    before = snapshot(bundle)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    child = start(supernet_file, bundle, "--heads", "6", preexec_fn=limit)
    _, err = child.communicate()
    assert child.returncode == 12, err
    assert "error: file too large while writing" in err
    assert "hint:" in err
    assert snapshot(bundle) == before
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_is_an_environment_failure_and_keeps_the_old_bundle(supernet_file, tmp_path):
    export(supernet_file, tmp_path / "bundle", heads=(2,))
    script = f"""
        mount -t tmpfs -o size=1000k tmpfs {tmp_path}/mnt || exit 77
        cp -r {tmp_path}/bundle {tmp_path}/mnt/bundle
        {" ".join(EXPORT)} --supernet {supernet_file} --bundle {tmp_path}/mnt/bundle --precision fp32,fp16
        echo code $?
        {sys.executable} -m hydradeploy verify --bundle {tmp_path}/mnt/bundle
        echo verified $?
        ls -A {tmp_path}/mnt
    """
    (tmp_path / "mnt").mkdir()
    # A private mount namespace: as root directly, else through a user namespace where the kernel allows one.
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    ran = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True)
    if ran.returncode == 77 or "unshare failed" in ran.stderr or "Operation not permitted" in ran.stderr:
        missing("mount", f"this kernel lets us mount no small disk ({ran.stderr.strip()})")
    assert "code 12" in ran.stdout, ran.stdout + ran.stderr
    assert "error: no space left on device while writing" in ran.stderr
    assert "hint: free some space" in ran.stderr
    assert "verified 0" in ran.stdout
    assert ran.stdout.split()[-1] == "bundle"


def test_a_directory_without_permission_is_an_environment_failure(supernet_file, tmp_path, monkeypatch):
    import hydradeploy.files as files

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with pytest.raises(EnvironmentFailed, match="permission denied while writing") as failed:
        export(supernet_file, tmp_path / "b")
    assert failed.value.hint


def test_progress_is_reported_and_json_is_all_there_is_on_stdout(supernet_file, tmp_path, cli: Cli):
    ran = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "b", "--heads", "2,3", "--json")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert [artifact["name"] for artifact in document["artifacts"]] == ["h02-fp32", "h03-fp32"]
    assert "checking parity" in ran.err
    human = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "b", "--heads", "2,3")
    assert "h03-fp32" in human.out
    assert "synthetic, seed 0" in human.out
    assert (tmp_path / "b" / MANIFEST).exists()


def test_a_supernet_written_again_is_the_same_supernet(supernet_file, tmp_path):
    from hydradeploy.supernet.store import save

    weights = load(supernet_file)
    for i in range(5):
        save(tmp_path / str(i), weights.spec, weights.tensors)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(5)}) == 1


def test_an_export_adds_to_the_bundle_that_a_killed_one_had_moved_aside(supernet_file, tmp_path):
    export(supernet_file, tmp_path / "b", heads=(2,))
    (tmp_path / "b").rename(tmp_path / ".b.old")
    export(supernet_file, tmp_path / "b", heads=(3,))
    assert names(tmp_path / "b") == ["h02-fp32", "h03-fp32"]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("heads", [2, 13])
def test_the_papers_supernet_has_neither_2_nor_13_heads(tmp_path, cli: Cli, heads):
    shape = geometry(head_dim=2, heads=12, trained_heads=tuple(range(3, 13)), depth=1)
    file = write_supernet(tmp_path / "s.safetensors", shape)
    ran = cli("export", "--supernet", file, "--bundle", tmp_path / "b", "--heads", heads)
    assert ran.code == 2
    assert f"error: {heads} heads were not trained" in ran.err
    assert "hint: this supernet has 3-12" in ran.err
    assert not (tmp_path / "b").exists()
