"""Pack: one artifact for one device, of exactly the size that was announced, and the same artifact still."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from hydradeploy import export, open_bundle, pack, run, verify
from hydradeploy.bundle import GOLDEN, MANIFEST
from hydradeploy.errors import IntegrityError
from hydradeploy.exporter.weights import block, map_weights
from hydradeploy.stored import stored
from tests.conftest import Cli, rot


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("heads", range(2, 7))
def test_a_pack_has_the_announced_size_and_is_the_same_artifact(shared_bundle, tmp_path, heads, precision):
    name = f"h{heads:02d}-{precision}"
    source = open_bundle(shared_bundle).artifact(name)
    packed = pack(shared_bundle, name, tmp_path / "device")
    assert size(tmp_path / "device") == source.size_bytes == packed.artifact.size_bytes
    opened = open_bundle(tmp_path / "device").manifest
    (artifact,) = opened.artifacts
    assert (artifact.sha256, artifact.graph_sha256) == (source.sha256, source.graph_sha256)
    assert artifact.parity == source.parity


def test_a_pack_of_every_precision_and_input_holds_its_own_tensors_alone_and_answers_the_same(everything, tmp_path):
    for source in everything.manifest.artifacts:
        out = tmp_path / source.name
        packed = pack(everything.path, source.name, out)
        assert size(out) == source.size_bytes
        opened = open_bundle(out)
        (artifact,) = opened.manifest.artifacts
        assert artifact.weights == packed.artifact.weights == f"{source.name}.weights"
        assert msgspec.structs.replace(artifact, weights=source.weights) == source
        wanted = stored(opened.subnet(artifact), opened.form(artifact))
        table = opened.manifest.weights[artifact.weights]
        assert {name: (there.dtype, there.shape) for name, there in table.items()} == wanted
        assert np.array_equal(opened.golden().logits[source.name], everything.golden().logits[source.name])
        (reproduced,) = verify(out).outputs
        assert reproduced.max_difference <= 1e-5, source.name


def test_a_packed_graph_needs_no_slice_and_reads_the_same_values(everything, tmp_path):
    """Values by the stored tables: the leading blocks of the bundle's are all of the pack's."""
    for name in ("h03-int8", "h03-bf16", "h04-fp32-uint8"):
        packed = pack(everything.path, name, tmp_path / name)
        opened, weights = open_bundle(tmp_path / name), packed.artifact.weights
        own = map_weights(opened.path / weights, opened.manifest.weights[weights])
        shared = everything.artifact(name).weights
        whole = map_weights(everything.path / shared, everything.manifest.weights[shared])
        assert all(np.array_equal(tensor, block(whole[key], tensor.shape)) for key, tensor in own.items())
        for graph in packed.artifact.graphs.values():
            nodes = onnx.load(str(opened.path / graph), load_external_data=False).graph.node
            assert "Slice" not in {node.op_type for node in nodes}


def test_sizes_grow_with_heads_and_shrink_with_precision(shared_bundle, everything):
    sizes = {a.name: a.size_bytes for a in open_bundle(shared_bundle).manifest.artifacts}
    in_order = [sizes[f"h{k:02d}-fp32"] for k in range(2, 7)]
    assert in_order == sorted(set(in_order))
    assert all(sizes[f"h{k:02d}-fp16"] < sizes[f"h{k:02d}-fp32"] for k in range(2, 7))
    sizes = {a.name: a.size_bytes for a in everything.manifest.artifacts}
    assert all(sizes[f"h06-{name}"] < sizes["h06-fp32"] for name in ("fp16", "bf16", "int8dyn", "int8"))


@pytest.mark.slow
def test_ten_int8_artifacts_of_a_deit_b_take_a_quarter_of_its_file(deit_b_everything, deit_b_file):
    supernet = deit_b_file.stat().st_size
    names = [path for path in deit_b_everything.path.iterdir() if "int8." in path.name]
    assert len(names) == 21
    assert sum(path.stat().st_size for path in names) <= 0.27 * supernet
    # A pack has the golden images too, and small subnets have more that is not a matrix.
    sizes = {artifact.name: artifact.size_bytes for artifact in deit_b_everything.manifest.artifacts}
    shares = [sizes[f"h{heads:02d}-int8"] / sizes[f"h{heads:02d}-fp32"] for heads in range(3, 13)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] <= 0.34
    assert shares[-1] <= 0.27


@pytest.mark.parametrize("options", [{}, {"standalone": True}, {"batch": 3}, {"batch": "dynamic"}])
def test_a_pack_verifies_and_answers_as_the_bundle_does(supernet_file, tmp_path, image, options):
    export(supernet_file, tmp_path / "b", heads=(3, 6), **options)
    pack(tmp_path / "b", "h03-fp32", tmp_path / "device")
    announced = open_bundle(tmp_path / "b").artifact("h03-fp32").size_bytes
    assert size(tmp_path / "device") == announced
    (reproduced,) = verify(tmp_path / "device").outputs
    assert reproduced.max_difference <= 1e-6
    answers = [
        next(run(path, [image], artifact="h03-fp32").predictions) for path in (tmp_path / "b", tmp_path / "device")
    ]
    assert [g.index for g in answers[0].top] == [g.index for g in answers[1].top]
    np.testing.assert_allclose(*[[g.probability for g in a.top] for a in answers], rtol=1e-5)


def test_the_command_packs_and_says_how_large(bundle, tmp_path, cli: Cli):
    ran = cli("pack", "h03-fp32", "--out", tmp_path / "device", "--bundle", bundle)
    assert ran.code == 0
    assert "h03-fp32" in ran.out
    ran = cli("pack", "h04-fp32", "--out", tmp_path / "other", "--bundle", bundle, "--json")
    assert json.loads(ran.out)["artifact"]["size_bytes"] == size(tmp_path / "other")


def test_an_unknown_artifact_is_refused(bundle, tmp_path, cli: Cli):
    ran = cli("pack", "h09-fp32", "--out", tmp_path / "device", "--bundle", bundle)
    assert ran.code == 2
    assert "hint: it has h02-fp32" in ran.err
    assert not (tmp_path / "device").exists()


def test_what_is_at_the_target_is_only_replaced_when_asked(bundle, tmp_path, cli: Cli):
    out = tmp_path / "device"
    command = ("--out", out, "--bundle", bundle)
    assert cli("pack", "h03-fp32", *command).code == 0
    refused = cli("pack", "h04-fp32", *command)
    assert refused.code == 2
    assert "--force" in refused.err
    assert (out / "h03-fp32.onnx").exists()
    assert cli("pack", "h04-fp32", *command, "--force").code == 0
    assert [a.name for a in open_bundle(out).manifest.artifacts] == ["h04-fp32"]
    assert not (out / "h03-fp32.onnx").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_bundle_itself_and_foreign_directories_are_never_replaced(bundle, tmp_path, cli: Cli, force):
    assert cli("pack", "h03-fp32", "--out", bundle, "--bundle", bundle, *force).code == 2
    assert len(open_bundle(bundle).manifest.artifacts) == 10
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("important")
    assert cli("pack", "h03-fp32", "--out", tmp_path / "home", "--bundle", bundle, *force).code == 2
    assert (tmp_path / "home" / "thesis.txt").read_text() == "important"
    # Others call a file so too.
    (tmp_path / "home" / "manifest.json").write_text('{"name": "my web app", "artifacts": 3}')
    ran = cli("pack", "h03-fp32", "--out", tmp_path / "home", "--bundle", bundle, *force)
    assert (ran.code, "is no bundle" in ran.err) == (2, True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "important"


def test_the_bundle_that_is_packed_is_not_replaced_with_what_it_lies_in(bundle, tmp_path, cli: Cli):
    outer = Path(shutil.copytree(bundle, tmp_path / "outer"))
    inner = Path(shutil.copytree(bundle, outer / "inner"))
    ran = cli("pack", "h03-fp32", "--out", outer, "--bundle", inner, "--force")
    assert (ran.code, "holds the bundle that is packed" in ran.err) == (2, True)
    assert len(open_bundle(inner).manifest.artifacts) == 10


def test_a_damaged_bundle_is_not_packed(bundle, tmp_path):
    with (bundle / "supernet-fp32.weights").open("r+b") as file:
        file.write(b"tampered")
    with pytest.raises(IntegrityError, match="supernet-fp32"):
        pack(bundle, "h03-fp32", tmp_path / "device")
    assert not (tmp_path / "device").exists()


@pytest.mark.parametrize("name", ["supernet-fp32.weights", GOLDEN])
def test_what_rotted_since_the_bundle_was_hashed_gets_no_hash_of_its_own(bundle, tmp_path, cli: Cli, name):
    open_bundle(bundle)
    rot(bundle / name, 100)
    ran = cli("pack", "h03-fp32", "--bundle", bundle, "--out", tmp_path / "device")
    assert ran.code == 10
    assert f"{bundle / name}: changed" in ran.err
    assert not (tmp_path / "device").exists()


def test_an_artifact_whose_graph_this_version_would_write_otherwise_is_not_packed(bundle, tmp_path, cli: Cli):
    manifest = open_bundle(bundle).manifest
    older = tuple(msgspec.structs.replace(artifact, graph_sha256="0" * 64) for artifact in manifest.artifacts)
    tools = manifest.tools | {"hydradeploy": "0.0.7"}
    (bundle / MANIFEST).write_bytes(msgspec.structs.replace(manifest, artifacts=older, tools=tools).encode())
    ran = cli("pack", "h03-fp32", "--bundle", bundle, "--out", tmp_path / "device")
    assert ran.code == 2
    assert "h03-fp32 was written by another version of hydradeploy (0.0.7), with another graph" in ran.err
    assert not (tmp_path / "device").exists()


def test_a_pack_can_be_packed_again(bundle, tmp_path):
    pack(bundle, "h03-fp16", tmp_path / "one")
    pack(tmp_path / "one", "h03-fp16", tmp_path / "two")
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir() if p.name[0] != "."} for d in ("one", "two")]
    assert files[0] == files[1]
    assert MANIFEST in files[0]
