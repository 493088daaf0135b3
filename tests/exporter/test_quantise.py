"""How int8 is made: ranges from data, layers kept in float until it costs no more than it may, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from hydradeploy import export, open_bundle
from hydradeploy.bundle import form_of
from hydradeploy.data.preprocess import normalise
from hydradeploy.data.samples import synthetic
from hydradeploy.errors import UsageError
from hydradeploy.exporter.calibration import calibrate
from hydradeploy.exporter.quantise import Quantising
from hydradeploy.exporter.sensitivity import simulate
from hydradeploy.stored import layers
from hydradeploy.supernet.store import Weights, load, save
from tests.conftest import Cli, geometry, spec, supernet, write_images

HARMED = ("blocks.1.mlp.fc1", "head")
KEEPABLE = len(layers(geometry())) // 2


def harmed(path: Path, *harm: str) -> Path:
    """A supernet where one channel of the inputs of some layers dwarfs the others, and no weight of theirs reads it:
    int8 spends all its levels on what does not matter."""
    sources = {"head": "norm"}
    sources |= {f"blocks.{i}.attn.qkv": f"blocks.{i}.norm1" for i in range(2)}
    sources |= {f"blocks.{i}.mlp.fc1": f"blocks.{i}.norm2" for i in range(2)}
    tensors = dict(supernet(seed=2).state_dict())
    with torch.no_grad():
        for layer in harm:
            tensors[f"{sources[layer]}.bias"][5] = 3000.0
            tensors[f"{layer}.weight"][:, 5] = 0.0
    # Nothing is cropped: images of the network's size are seen as they are.
    save(path, spec(crop_pct=1.0), tensors)
    return path


def labelled(path: Path, supernet_file: Path) -> Path:
    """60 images with the classes that the supernet in fp32 gives them, those it is surest of: what changes a class
    costs top-1, and rounding alone changes none."""
    weights = load(supernet_file)
    images = synthetic(weights.spec, 600, seed=3).images
    with torch.inference_mode():
        plain = weights.plain(weights.spec.geometry.subnet(6))
        logits = plain(torch.from_numpy(normalise(images, weights.spec.preprocessing))).numpy()
    ordered = np.sort(logits, 1)
    surest = np.argsort(ordered[:, -2] - ordered[:, -1])[:60]
    names = np.array([str(i) for i in range(10)])
    shown, labels = images[surest], logits.argmax(1)[surest]
    np.savez(path, images=shown, val_images=shown, val_labels=labels, class_names=names)
    return path


def content(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != ".stamp.json"}


@pytest.fixture
def outlier(tmp_path) -> tuple[Path, Path]:
    file = harmed(tmp_path / "s.safetensors", *HARMED)
    return file, labelled(tmp_path / "d.npz", file)


def command(supernet_file: Path, bundle: Path, *options: object) -> tuple[object, ...]:
    return ("export", "--supernet", supernet_file, "--bundle", bundle, *options)


@pytest.mark.parametrize("precision", ["int8", "int8dyn"])
def test_the_layers_that_cost_top1_are_kept_in_float_and_no_others(outlier, tmp_path, cli: Cli, precision):
    file, data = outlier
    options = ("--heads", 6, "--precision", precision, "--data", data)
    ran = cli(*command(file, tmp_path / "b", *options, "--max-drop", "5pp", "--json"))
    assert ran.code == 0, ran.err
    (document,) = json.loads(ran.out)["artifacts"]
    found = document["quantisation"]
    assert found["kept"] == sorted(HARMED)
    drop = found["drop"]
    assert (drop["data"], drop["n"], drop["limit"]) == ("d.npz", 60, 0.05)
    assert drop["fp32_top1"] == 1.0
    assert drop["fp32_top1"] - drop["top1"] <= 0.05
    # What is recorded is what graphs read: int8 for the others, float for these.
    bundle = open_bundle(tmp_path / "b")
    (artifact,) = bundle.manifest.artifacts
    assert set(form_of(bundle.spec, artifact).int8) == set(layers(geometry())) - set(HARMED)
    table = bundle.manifest.weights["supernet-int8.weights"]
    assert {name for name in table if name.startswith(("head", "blocks.1.mlp.fc1"))} == {
        f"{layer}.{kind}" for layer in HARMED for kind in ("weight", "bias")
    }
    assert f"judging {precision}" in ran.err
    assert "ranking layers" in ran.err


def test_where_int8_costs_nothing_no_layer_is_kept(tmp_path, cli: Cli):
    file = harmed(tmp_path / "s.safetensors")
    options = ("--precision", "int8", "--heads", 6, "--data", labelled(tmp_path / "d.npz", file), "--max-drop", "1pp")
    ran = cli(*command(file, tmp_path / "b", *options, "--json"))
    assert ran.code == 0, ran.err
    (artifact,) = json.loads(ran.out)["artifacts"]
    assert artifact["quantisation"]["kept"] == []
    assert artifact["quantisation"]["drop"] == {"data": "d.npz", "n": 60, "top1": 1.0, "fp32_top1": 1.0, "limit": 0.01}
    assert "ranking layers" not in ran.err


def test_all_subnets_of_an_export_keep_the_same_layers(outlier, tmp_path):
    """Those that the worst of them needs. The labels are the largest one's: the other is worse in fp32 already."""
    file, data = outlier
    bundle = export(
        file, tmp_path / "b", heads=(5, 6), precisions=("int8",), data=data, quantising=Quantising(max_drop=0.05)
    )
    kept = [artifact.quantisation.kept for artifact in bundle.manifest.artifacts]
    assert kept[0] == kept[1]
    assert set(HARMED) <= set(kept[0])
    drops = [artifact.quantisation.drop for artifact in bundle.manifest.artifacts]
    assert all(drop.fp32_top1 - drop.top1 <= 0.05 for drop in drops)
    assert drops[0].fp32_top1 < drops[1].fp32_top1 == 1.0


def test_a_limit_that_no_setting_meets_is_exit_5_and_names_the_best(tmp_path, cli: Cli):
    everywhere = [layer for layer in layers(geometry()) if layer.endswith(("qkv", "fc1", "head"))]
    assert len(everywhere) > KEEPABLE
    file = harmed(tmp_path / "s.safetensors", *everywhere)
    ran = cli(
        *command(file, tmp_path / "b", "--heads", 6, "--precision", "int8dyn"),
        *("--data", labelled(tmp_path / "d.npz", file), "--max-drop", "0.1pp"),
    )
    assert ran.code == 5, ran.err
    assert "error: no setting of int8dyn stays within 0.10pp of fp32: the best keeps" in ran.err
    assert f"of {len(layers(geometry()))} layers in float and costs h06-int8dyn" in ran.err
    assert "on 60 images" in ran.err
    assert not (tmp_path / "b").exists()
    allowed = ran.err.partition("hint: nothing was written; allow --max-drop ")[2].partition(",")[0]
    again = cli(
        *command(file, tmp_path / "b", "--heads", 6, "--precision", "int8dyn"),
        *("--data", tmp_path / "d.npz", "--max-drop", allowed),
    )
    assert allowed == "3.34pp"  # of two in 60
    assert "no setting" not in again.err
    # What is kept is enough for the labels, not for the gate.
    assert again.code == 5
    assert "hint: nothing was written; try a smaller --max-drop" in again.err


@pytest.fixture
def three_lost(supernet_file, tmp_path) -> Path:
    """60 images that h06 in fp32 is right about, and in int8 with ranges at run time about 57 of them."""
    weights = load(supernet_file)
    images = synthetic(weights.spec, 3000, seed=5).images
    shown, subnet = normalise(images, weights.spec.preprocessing), weights.spec.geometry.subnet(6)
    with torch.inference_mode():
        right = weights.plain(subnet)(torch.from_numpy(shown)).numpy()
    found = simulate(weights, subnet, shown, layers(weights.spec.geometry), None)
    same = right.argmax(1) == found.argmax(1)
    # Those that are clear in both: the runtime rounds a little otherwise than torch.
    margins = [np.diff(np.sort(logits, 1)[:, -2:])[:, 0] for logits in (right, found)]
    surest = np.argsort(-np.minimum(*margins))
    chosen = np.concatenate([surest[same[surest]][:57], surest[~same[surest]][:3]])
    names = np.array([str(i) for i in range(10)])
    path = tmp_path / "lost.npz"
    np.savez(
        path, images=images[chosen], val_images=images[chosen], val_labels=right.argmax(1)[chosen], class_names=names
    )
    return path


def test_a_drop_of_just_the_limit_is_within_it(supernet_file, three_lost, tmp_path, cli: Cli):
    """As a difference of two top-1 it is 0.05000000000000004."""
    options = ("--heads", 6, "--precision", "int8dyn", "--data", three_lost, "--max-drop", "5pp", "--json")
    ran = cli(*command(supernet_file, tmp_path / "b", *options))
    assert ran.code == 0, ran.err
    (artifact,) = json.loads(ran.out)["artifacts"]
    assert (artifact["quantisation"]["kept"], artifact["quantisation"]["drop"]["top1"]) == ([], 0.95)


def test_a_limit_that_is_not_met_leaves_the_bundle_that_was_there(tmp_path, cli: Cli):
    file = harmed(
        tmp_path / "s.safetensors",
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc1",
        "blocks.1.attn.qkv",
        *HARMED,
    )
    export(file, tmp_path / "b", heads=(6,))
    before = content(tmp_path / "b")
    data = labelled(tmp_path / "d.npz", file)
    ran = cli(*command(file, tmp_path / "b", "--precision", "int8dyn", "--data", data, "--max-drop", "0.1pp"))
    assert ran.code == 5, ran.err
    assert content(tmp_path / "b") == before


def test_steps_are_those_of_the_calibration_and_each_subnet_has_its_own(supernet_file, tmp_path):
    data = write_images(tmp_path / "images.npz", count=20)
    quantising = Quantising(method="percentile", images=12)
    bundle = export(supernet_file, tmp_path / "b", heads=(3, 6), precisions=("int8",), data=data, quantising=quantising)
    weights: Weights = load(supernet_file)
    with np.load(data) as arrays:
        images = arrays["images"][np.arange(12) * 20 // 12]
    subnets = [bundle.subnet(artifact) for artifact in bundle.manifest.artifacts]
    expected = calibrate(weights, subnets, images, "percentile", lambda *_: None)
    for artifact in bundle.manifest.artifacts:
        found = artifact.quantisation.calibration
        assert (found.method, found.data, found.images) == ("percentile", "images.npz", 12)
        assert found.scales == expected[artifact.heads]
        assert list(found.scales) == list(layers(geometry()))
        assert artifact.quantisation.drop is None
    assert bundle.artifact("h03-int8").quantisation != bundle.artifact("h06-int8").quantisation


def test_ranges_at_run_time_need_no_data_and_record_no_calibration(supernet_file, tmp_path, cli: Cli):
    ran = cli(*command(supernet_file, tmp_path / "b", "--heads", 6, "--precision", "int8dyn", "--json"))
    assert ran.code == 0, ran.err
    (artifact,) = json.loads(ran.out)["artifacts"]
    assert artifact["quantisation"] == {"kept": [], "calibration": None, "drop": None}
    assert list(artifact["graphs"]) == ["ort"]


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (("--precision", "int8"), "static int8 is calibrated on images", "--data"),
        (("--precision", "fp32,int8"), "static int8 is calibrated on images", "export int8dyn"),
        (("--precision", "int8dyn", "--max-drop", "1pp"), "--max-drop needs labelled images", "--data"),
        (("--precision", "fp32,fp16", "--max-drop", "1pp"), "nothing is exported in int8", "--precision int8"),
        (
            ("--precision", "int8dyn", "--calibration", "mean"),
            "no calibration method 'mean'",
            "minmax, percentile, entropy",
        ),
        (("--precision", "int8dyn", "--calibration", "entropy"), "nothing to calibrate", "--precision int8"),
        (("--precision", "fp32", "--calibration-images", "9"), "nothing to calibrate", "--precision int8"),
        (("--precision", "int8dyn", "--calibration-images", "0"), "0", ""),
        (("--precision", "int8dyn", "--max-drop", "1"), "1", "unit"),
        (("--precision", "int8dyn", "--max-drop", "a lot"), "a lot", ""),
        (("--precision", "int8dyn", "--input", "uint16"), "uint16", "float32 or uint8"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    supernet_file, tmp_path, cli: Cli, options, said, hint
):
    ran = cli(*command(supernet_file, tmp_path / "b", *options))
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert hint in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), "empty"),
        (np.zeros((4, 16, 32, 3), np.uint8), "uint8 (4, 16, 32, 3)"),
        (np.zeros((4, 3, 32, 32), np.uint8), "uint8 (4, 3, 32, 32)"),
        (np.zeros((4, 32, 32, 3), np.float32), "float32 (4, 32, 32, 3)"),
        (np.zeros((4, 32, 32), np.uint8), "uint8 (4, 32, 32)"),
    ],
)
def test_images_that_cannot_be_calibrated_with_are_refused_with_both_shapes(
    supernet_file, tmp_path, cli: Cli, images, found
):
    np.savez(tmp_path / "d.npz", images=images)
    ran = cli(*command(supernet_file, tmp_path / "b", "--precision", "int8", "--data", tmp_path / "d.npz"))
    assert ran.code == 11, ran.err
    assert found in ran.err
    assert found == "empty" or "expected uint8 (n, 32, 32, 3)" in ran.err
    assert not (tmp_path / "b").exists()


def test_images_without_labels_cannot_be_judged_by(supernet_file, tmp_path, cli: Cli):
    data = write_images(tmp_path / "d.npz")
    ran = cli(*command(supernet_file, tmp_path / "b", "--precision", "int8dyn", "--data", data, "--max-drop", "1pp"))
    assert ran.code == 11, ran.err
    assert "d.npz: holds no array `val_images`" in ran.err
    assert not (tmp_path / "b").exists()


def test_less_than_one_image_is_no_calibration():
    for options in ({"images": 0}, {"judged": 0}):
        with pytest.raises(UsageError, match="at least one image"):
            Quantising(**options)


def test_artifacts_added_later_keep_how_the_others_were_quantised(outlier, tmp_path):
    """A bundle grows without its data set: graphs are made again from what the manifest says."""
    file, data = outlier
    options = {"precisions": ("int8",), "data": data, "quantising": Quantising(max_drop=0.05)}
    before = export(file, tmp_path / "b", heads=(6,), **options).artifact("h06-int8")
    data.unlink()
    after = export(file, tmp_path / "b", heads=(4,), precisions=("fp16",))
    assert {artifact.name for artifact in after.manifest.artifacts} == {"h06-int8", "h04-fp16"}
    assert msgspec.structs.replace(after.artifact("h06-int8"), size_bytes=0) == msgspec.structs.replace(
        before, size_bytes=0
    )
