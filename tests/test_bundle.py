"""Opening and verifying a bundle: what is whole is accepted, what is not is named."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydradeploy import export
from hydradeploy.bundle import GOLDEN, MANIFEST, STAMP, Manifest, form_of, open_bundle, read_manifest
from hydradeploy.engines.cache import roots
from hydradeploy.errors import IntegrityError, UsageError
from hydradeploy.files import sha256_bytes, sha256_file
from hydradeploy.stored import ITEM_BYTES, layers, stored
from tests.conftest import Cli, rot, write_supernet

FILES = ("supernet-fp32.weights", "h03-fp32.onnx", "h03-fp32.trt.onnx", "golden.npz", MANIFEST)


def edit(bundle: Path, change: Any) -> None:
    """Change the manifest's JSON and seal it again, as somebody who knows the format would."""
    document = json.loads((bundle / MANIFEST).read_text())
    change(document)
    document["sha256"] = ""
    with_hash = document | {"sha256": "0" * 64}
    try:
        manifest = msgspec.convert(with_hash, Manifest)
        with_hash["sha256"] = manifest.digest()
    except (msgspec.ValidationError, UsageError):
        pass
    (bundle / MANIFEST).write_text(json.dumps(with_hash))


def same_size_flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_whole_bundle_opens_and_lists_what_export_wrote(shared_bundle):
    bundle = open_bundle(shared_bundle)
    assert [a.name for a in bundle.manifest.artifacts] == [
        *(f"h{k:02d}-fp32" for k in range(2, 7)),
        *(f"h{k:02d}-fp16" for k in range(2, 7)),
    ]
    assert set(bundle.manifest.files) | {MANIFEST, STAMP} == {p.name for p in shared_bundle.iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, cli: Cli, name):
    (bundle / name).unlink()
    ran = cli("verify", "--bundle", bundle)
    assert ran.code == 10
    assert f"error: {bundle / name}: missing" in ran.err
    assert "hint:" in ran.err
    assert ran.out == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(bundle, cli: Cli, name, keep):
    path = bundle / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    ran = cli("verify", "--bundle", bundle)
    assert ran.code == 10
    assert str(path) in ran.err
    assert "Traceback" not in ran.err


@settings(max_examples=60)
@given(name=st.sampled_from(FILES), at=st.integers(0, 10**6))
def test_any_flipped_bit_in_any_file_is_found(shared_bundle, tmp_path_factory, name, at):
    copy = Path(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("flip") / "bundle"))
    try:
        same_size_flip(copy / name, at)
        with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
            open_bundle(copy, "always")
    finally:
        shutil.rmtree(copy)


def test_first_open_finds_tampered_weights_and_a_stamp_spares_the_next_ones(bundle, monkeypatch):
    open_bundle(bundle)
    hashed: list[str] = []
    import hydradeploy.bundle as module

    original = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: hashed.append(path.name) or original(path))
    open_bundle(bundle)
    assert not [name for name in hashed if not name.endswith(".onnx")]
    hashed.clear()
    open_bundle(bundle, "always")
    assert "supernet-fp32.weights" in hashed
    same_size_flip(bundle / "supernet-fp32.weights", 5000)
    with pytest.raises(IntegrityError, match="supernet-fp32"):
        open_bundle(bundle)


def test_only_always_finds_a_change_that_hides_behind_size_time_and_inode(bundle):
    open_bundle(bundle)
    rot(bundle / "supernet-fp32.weights", 0)
    open_bundle(bundle)
    with pytest.raises(IntegrityError, match="supernet-fp32"):
        open_bundle(bundle, "always")


@pytest.mark.parametrize("at", [2000, -20])
def test_golden_samples_that_rotted_since_they_were_hashed_are_named(bundle, at):
    open_bundle(bundle)
    rot(bundle / GOLDEN, at)
    with pytest.raises(IntegrityError, match=r"golden\.npz: cannot be read"):
        open_bundle(bundle).golden()


def test_a_graph_is_hashed_at_every_open(bundle):
    open_bundle(bundle)
    path = bundle / "h03-fp32.onnx"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match="h03-fp32"):
        open_bundle(bundle)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_stamp_that_a_kill_cut_off_is_as_good_as_none(bundle, kept):
    open_bundle(bundle)
    whole = (bundle / STAMP).read_bytes()
    (bundle / STAMP).write_bytes(whole[:kept])
    same_size_flip(bundle / "golden.npz", 700)
    with pytest.raises(IntegrityError, match="golden"):
        open_bundle(bundle)
    same_size_flip(bundle / "golden.npz", 700)
    open_bundle(bundle)
    assert len((bundle / STAMP).read_bytes()) == len(whole)


def test_where_a_stamp_cannot_be_left_in_the_bundle_it_is_kept_in_the_cache(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import hydradeploy.bundle as module

    (bundle / STAMP).unlink(missing_ok=True)
    (bundle / STAMP).mkdir()
    open_bundle(bundle)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    hashed: list[str] = []
    original_hash = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: hashed.append(path.name) or original_hash(path))
    open_bundle(bundle)
    assert "supernet-fp32.weights" not in hashed


def test_a_user_without_a_home_opens_a_bundle(bundle, monkeypatch):
    """A number that is nobody's, as containers and services run under."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    (bundle / STAMP).unlink(missing_ok=True)
    assert open_bundle(bundle).manifest.artifacts
    assert roots(bundle) == (bundle / "engines", Path("/.cache/hydradeploy/engines"))


def test_a_link_under_the_stamps_name_is_not_followed(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").write_text("mine")
    (bundle / STAMP).unlink(missing_ok=True)
    (bundle / STAMP).symlink_to(tmp_path / "mine")
    open_bundle(bundle, "always")
    assert (tmp_path / "mine").read_text() == "mine"


def test_opening_for_the_manifest_alone_reads_nothing_else(bundle):
    for path in bundle.iterdir():
        if path.name != MANIFEST:
            path.unlink()
    assert open_bundle(bundle, "manifest").manifest.artifacts


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m.update(colour=1), "colour"),
        (lambda m: m["spec"]["geometry"].update(colour=1), r"\$.spec.geometry"),
        (lambda m: m["artifacts"][1].update(heads="3"), r"\$.artifacts\[1\].heads"),
        (lambda m: m["artifacts"][0]["parity"].update(samples=1.5), r"\$.artifacts\[0\].parity.samples"),
        (lambda m: m["artifacts"][0].pop("macs"), "macs"),
        (lambda m: m["artifacts"][0].update(input="uint16"), r"\$.artifacts\[0\].input"),
        (lambda m: m["artifacts"][0].update(dtype="int4"), r"\$.artifacts\[0\].dtype"),
        (lambda m: m["artifacts"][0].update(quantisation={"kept": ["head"]}), r"\$.artifacts\[0\].quantisation"),
        (lambda m: m["artifacts"][0]["parity"].pop("cosine"), "cosine"),
        (lambda m: m["files"]["golden.npz"].update(size_bytes=True), r"\$.files\[...\].size_bytes"),
        (lambda m: m["spec"]["geometry"].update(image_size=33), "image_size 33"),
        (lambda m: m["spec"]["preprocessing"].update(interpolation="area"), "interpolation"),
        (lambda m: m["artifacts"][0].update(heads=7), "7 heads"),
        (lambda m: m["artifacts"][0].update(name="h03-fp32"), "named twice"),
        (lambda m: m["files"].pop("h02-fp32.onnx"), r"h02-fp32\.onnx"),
        (lambda m: m.update(weights={}), "table"),
        (lambda m: m.update(schema=2), "schema 2"),
    ],
)
def test_a_manifest_with_wrong_fields_is_refused_with_the_path_inside_it(bundle, change, where):
    edit(bundle, change)
    with pytest.raises(IntegrityError, match=where) as refused:
        open_bundle(bundle)
    assert str(bundle / MANIFEST) in refused.value.message


def test_an_edited_manifest_is_noticed_even_where_every_field_is_possible(bundle, cli: Cli):
    text = (bundle / MANIFEST).read_text()
    assert '"crop_pct": 0.875' in text
    (bundle / MANIFEST).write_text(text.replace('"crop_pct": 0.875', '"crop_pct": 0.9'))
    ran = cli("verify", "--bundle", bundle)
    assert ran.code == 10
    assert f"{bundle / MANIFEST}: changed" in ran.err


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle, name):
    (bundle.parent / "outside").write_bytes(b"x")
    record = {"sha256": sha256_bytes(b"x"), "size_bytes": 1}
    edit(bundle, lambda m: m["files"].update({name: record}))
    with pytest.raises(IntegrityError, match="leaves the directory"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["supernet-fp32.weights", "h03-fp32.onnx", MANIFEST])
def test_a_symbolic_link_out_of_the_bundle_is_refused(bundle, cli: Cli, name):
    outside = bundle.parent / "outside"
    shutil.move(bundle / name, outside)
    (bundle / name).symlink_to(outside)
    ran = cli("verify", "--bundle", bundle)
    assert ran.code == 10
    assert f"{bundle / name}: a symbolic link leads out" in ran.err


@pytest.mark.parametrize("damaged", [False, True])
def test_a_bundle_that_is_replaced_while_it_is_opened_opens_as_the_new_one(bundle, tmp_path, monkeypatch, damaged):
    newer = tmp_path / "newer"
    export(write_supernet(tmp_path / "s", seed=1), newer, heads=(2, 3))
    if damaged:
        rot(newer / "h03-fp32.onnx", 100)

    def replaced(path: Path) -> str:
        if newer.exists():
            shutil.rmtree(bundle)
            newer.rename(bundle)
        return sha256_file(path)

    monkeypatch.setattr("hydradeploy.bundle.sha256_file", replaced)
    if damaged:
        with pytest.raises(IntegrityError, match=r"h03-fp32\.onnx: changed"):
            open_bundle(bundle)
    else:
        assert len(open_bundle(bundle).manifest.artifacts) == 2


def test_a_bundle_behind_a_symbolic_link_opens(bundle, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle)
    assert open_bundle(link).manifest == read_manifest(bundle)


def test_an_exchange_cut_in_half_is_finished_at_open(bundle):
    bundle.rename(bundle.parent / ".bundle.old")
    assert open_bundle(bundle).manifest.artifacts
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_no_bundle_is_a_usage_error_with_a_hint(tmp_path, cli: Cli):
    ran = cli("verify", "--bundle", tmp_path / "none")
    assert ran.code == 2
    assert "no bundle here" in ran.err
    assert "hydradeploy export" in ran.err


def test_the_form_of_an_artifact_says_which_layers_are_int8(everything):
    shape = everything.spec.geometry
    expected = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8dyn": "float32", "int8": "float32"}
    for artifact in everything.manifest.artifacts:
        form = everything.form(artifact)
        assert (form.dtype, form.input) == (expected[artifact.precision], artifact.input)
        assert form.int8 == (layers(shape) if artifact.precision.startswith("int8") else ())
    artifact = everything.artifact("h04-int8")
    keeping = msgspec.structs.replace(artifact.quantisation, kept=("head", "blocks.0.mlp.fc2"))
    form = form_of(everything.spec, msgspec.structs.replace(artifact, quantisation=keeping))
    assert form.int8 == tuple(layer for layer in layers(shape) if layer not in keeping.kept)


def test_an_artifact_reads_its_prefix_of_each_tensor_and_no_other(everything):
    for artifact in everything.manifest.artifacts:
        table = everything.manifest.weights[artifact.weights]
        end = {there.offset: name for name, there in table.items()}
        read = {end[extent.offset]: extent.length for extent in everything.extents(artifact)}
        wanted = stored(everything.subnet(artifact), everything.form(artifact))
        assert read.keys() == wanted.keys()
        for name, length in read.items():
            own = math.prod(wanted[name].shape) * ITEM_BYTES[wanted[name].dtype]
            assert own <= length <= math.prod(table[name].shape) * ITEM_BYTES[table[name].dtype]
        if artifact.heads == 6:
            assert sum(read.values()) == sum(
                math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in wanted.values()
            )


def test_a_table_without_a_tensor_that_an_artifact_reads_is_named(bundle):
    edit(bundle, lambda m: m["weights"]["supernet-fp32.weights"].pop("blocks.1.attn.k.weight"))
    opened = open_bundle(bundle)
    with pytest.raises(IntegrityError, match=r"supernet-fp32\.weights has no tensor blocks\.1\.attn\.k\.weight"):
        opened.extents(opened.artifact("h02-fp32"))


def test_an_unknown_artifact_names_those_there_are(shared_bundle):
    with pytest.raises(UsageError) as refused:
        open_bundle(shared_bundle).artifact("h99-fp32")
    assert "h02-fp32" in str(refused.value.hint)
