"""`run` and `verify` as a person on the device sees them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from hydradeploy import export, open_bundle, run, verify
from hydradeploy.backends import BACKEND_MODULES, Options
from hydradeploy.bundle import GOLDEN, MANIFEST, FileRecord, Golden, golden_bytes, write_accuracy
from hydradeploy.data.preprocess import load_image, normalise
from hydradeploy.devices import machine
from hydradeploy.errors import ParityError, UsageError
from hydradeploy.files import sha256_bytes
from hydradeploy.measurements import add_profile
from hydradeploy.supernet.store import load, save
from tests.conftest import Cli, write_supernet
from tests.fakes import Fake, install
from tests.selector.build import accuracy, cell, latencies, profile, share


def test_run_gives_the_torch_subnets_probabilities(shared_bundle, supernet_file, image):
    answer = next(run(shared_bundle, [image], artifact="h05-fp32", top=10).predictions)
    weights = load(supernet_file)
    pixels = normalise(load_image(image, weights.spec)[None], weights.spec.preprocessing)
    plain = weights.plain(weights.spec.geometry.subnet(5))
    expected = torch.softmax(plain(torch.from_numpy(pixels))[0], 0).detach().numpy()
    assert [guess.index for guess in answer.top] == list(np.argsort(-expected))
    np.testing.assert_allclose([g.probability for g in answer.top], np.sort(expected)[::-1], rtol=1e-4)
    assert sum(guess.probability for guess in answer.top) == pytest.approx(1)


def test_run_prints_five_classes_per_image_and_names_the_artifact_it_chose(shared_bundle, image, cli: Cli):
    ran = cli("run", image, image, "--bundle", shared_bundle)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert len(lines) == 12
    assert lines[0] == lines[6] == str(image)
    assert all("% " in line and "class " in line for line in lines[1:6])
    assert "h06-fp32" in ran.err


def test_of_artifacts_with_as_many_heads_the_widest_type_answers_however_large_its_files_are(
    supernet_file, tmp_path, image
):
    bundle = export(supernet_file, tmp_path / "b", heads=(2,), precisions=("int8dyn", "fp32", "fp16"))
    sizes = {artifact.name: artifact.size_bytes for artifact in bundle.manifest.artifacts}
    assert sizes["h02-fp32"] < sizes["h02-int8dyn"]
    assert run(tmp_path / "b", [image]).artifact.name == "h02-fp32"


def test_run_shows_class_names_where_the_bundle_has_them(tmp_path, image, cli: Cli):
    weights = load(write_supernet(tmp_path / "s"))
    names = tuple(f"kind {letter}" for letter in "abcdefghij")
    save(tmp_path / "t", msgspec.structs.replace(weights.spec, class_names=names), weights.tensors)
    export(tmp_path / "t", tmp_path / "b", heads=(2,))
    ran = cli("run", image, "--bundle", tmp_path / "b", "--top", 10)
    assert all(f"  {name}" in ran.out for name in names)
    assert "class " not in ran.out


def test_run_as_json_is_one_document(shared_bundle, image, cli: Cli):
    ran = cli("run", image, "--bundle", shared_bundle, "--artifact", "h02-fp16", "--json", "--top", 2)
    document = json.loads(ran.out)
    assert (document["artifact"], document["backend"]) == ("h02-fp16", "onnxruntime")
    assert [len(entry["top"]) for entry in document["images"]] == [2]
    assert ran.err == ""


@pytest.mark.parametrize("batch", [1, 3, "dynamic"])
def test_an_image_that_cannot_be_read_is_named_and_the_others_are_answered(
    supernet_file, tmp_path, image, cli: Cli, batch
):
    export(supernet_file, tmp_path / "b", heads=(2,), batch=batch)
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:200])
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    ran = cli("run", broken, image, text, tmp_path / "none.png", image, "--bundle", tmp_path / "b")
    assert ran.code == 11
    assert ran.out.splitlines().count(str(image)) == 2
    for path in (broken, text, tmp_path / "none.png"):
        assert f"error: {path}: " in ran.err
    assert "3 of 5 images have no answer" in ran.err
    assert "Traceback" not in ran.err
    documents = json.loads(cli("run", broken, image, "--bundle", tmp_path / "b", "--json").out)["images"]
    assert documents[0]["error"]
    assert documents[1]["error"] is None


def test_an_image_that_overflows_is_named_and_gets_no_answer_made_of_nan(overflowing, tmp_path, image, cli: Cli):
    white, grey = tmp_path / "white.png", tmp_path / "grey.png"
    Image.new("RGB", (40, 40), (255, 255, 255)).save(white)
    Image.new("RGB", (40, 40), (128, 128, 128)).save(grey)
    ran = cli("run", white, grey, "--bundle", overflowing, "--artifact", "h02-fp16")
    assert ran.code == 11
    assert f"error: {white}: h02-fp16 gives NaN or infinite logits for it" in ran.err
    assert ran.out.splitlines()[0] == str(grey)
    first, second = json.loads(cli("run", white, grey, "--bundle", overflowing, "--json").out)["images"]
    assert (first["error"], second["error"]) == (None, None), "fp32 has room for it"


def test_answers_do_not_depend_on_the_batch(supernet_file, tmp_path):
    paths = []
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    answers = []
    for batch in (1, 3, "dynamic"):
        export(supernet_file, tmp_path / str(batch), heads=(3,), batch=batch)
        answers.append([p.top[0] for p in run(tmp_path / str(batch), paths).predictions])
    for other in answers[1:]:
        assert [g.index for g in other] == [g.index for g in answers[0]]
        np.testing.assert_allclose([g.probability for g in other], [g.probability for g in answers[0]], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--artifact", "h09-fp32"], 2),
        (["--backend", "abacus"], 2),
        (["--top", "0"], 2),
        (["--threads", "0"], 2),
        (["--verify", "never"], 2),
        (["--bundle", "no-such-bundle"], 2),
        (["--latency", "1s", "--artifact", "h03-fp32"], 2),
        (["--latency", "1s", "--backend", "onnxruntime"], 2),
        (["--latency", "1s", "--threads", "2"], 2),
        (["--accept", "contended"], 2),
    ],
)
def test_wrong_options_are_usage_errors_with_hints(shared_bundle, image, cli: Cli, options, code):
    bundle = [] if "--bundle" in options else ["--bundle", shared_bundle]
    ran = cli("run", image, *bundle, *options)
    assert ran.code == code
    assert ran.err.splitlines()[-2].startswith("error: ")
    assert ran.err.splitlines()[-1].startswith("hint: ")
    assert ran.out == ""


def test_run_with_verify_always_finds_what_the_stamp_would_not(bundle, image, cli: Cli):
    import os

    assert cli("run", image, "--bundle", bundle).code == 0
    path = bundle / "supernet-fp32.weights"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cli("run", image, "--bundle", bundle).code == 0
    ran = cli("run", image, "--bundle", bundle, "--verify", "always")
    assert ran.code == 10
    assert str(path) in ran.err


def test_no_image_is_a_usage_error(shared_bundle):
    with pytest.raises(UsageError, match="no image"):
        run(shared_bundle, [])


def test_verify_reproduces_every_artifact(shared_bundle, cli: Cli):
    verified = verify(shared_bundle)
    assert [o.artifact for o in verified.outputs] == [a.name for a in open_bundle(shared_bundle).manifest.artifacts]
    assert all(output.max_difference <= output.tolerance for output in verified.outputs)
    assert (verified.outputs_skipped, verified.failed) == ((), ())
    document = json.loads(cli("verify", "--bundle", shared_bundle, "--json").out)
    assert document["files"] == len(open_bundle(shared_bundle).manifest.files)
    assert "every hash agrees" in cli("verify", "--bundle", shared_bundle).out


def test_an_artifact_that_computes_something_else_here_fails_verification(bundle, cli: Cli):
    """The files are whole: the golden logits are re-sealed as if another machine had given them."""
    opened = open_bundle(bundle)
    golden = opened.golden()
    logits = dict(golden.logits) | {"h04-fp32": golden.logits["h04-fp32"] * 1.01}
    data = golden_bytes(Golden(golden.images, logits))
    (bundle / GOLDEN).write_bytes(data)
    record = FileRecord(sha256=sha256_bytes(data), size_bytes=len(data))
    manifest = msgspec.structs.replace(opened.manifest, files=opened.manifest.files | {GOLDEN: record})
    (bundle / MANIFEST).write_bytes(manifest.encode())
    with pytest.raises(ParityError, match="h04-fp32"):
        verify(bundle)
    ran = cli("verify", "--bundle", bundle)
    assert ran.code == 5
    assert "hint:" in ran.err


def test_without_any_backend_verify_checks_hashes_and_says_what_it_did_not_check(shared_bundle, cli: Cli, monkeypatch):
    import hydradeploy.backends.onnxruntime as module

    install(monkeypatch)
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    ran = cli("verify", "--bundle", shared_bundle)
    assert ran.code == 0
    assert "outputs not checked: no usable backend" in ran.out
    asked = cli("verify", "--bundle", shared_bundle, "--backend", "onnxruntime")
    assert asked.code == 8
    assert "hint: pip install" in asked.err
    assert BACKEND_MODULES


def test_a_bundle_works_after_it_was_moved_and_from_another_directory(bundle, tmp_path, image, cli: Cli, monkeypatch):
    moved = Path(shutil.move(bundle, tmp_path / "moved"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("run", image, "--bundle", moved).code == 0
    assert cli("run", "../image.png", "--bundle", "../moved").code == 0


def test_verify_holds_each_artifact_to_its_own_tolerance_and_cosine(bundle, cli: Cli):
    """Logits that are 1 % off: too much for fp32, within what is allowed of fp16 if that is made to be int8's."""
    opened = open_bundle(bundle)
    golden = opened.golden()
    logits = {name: values * np.float32(1.01 if name.endswith("fp16") else 1) for name, values in golden.logits.items()}
    parity = msgspec.structs.replace(opened.artifact("h02-fp16").parity, tolerance=0.15)

    def seal(**changes: float) -> None:
        data = golden_bytes(Golden(golden.images, logits))
        (bundle / GOLDEN).write_bytes(data)
        files = opened.manifest.files | {GOLDEN: FileRecord(sha256=sha256_bytes(data), size_bytes=len(data))}
        allowed = msgspec.structs.replace(parity, **changes)
        artifacts = tuple(
            msgspec.structs.replace(a, parity=allowed) if a.precision == "fp16" else a
            for a in opened.manifest.artifacts
        )
        manifest = msgspec.structs.replace(opened.manifest, files=files, artifacts=artifacts)
        (bundle / MANIFEST).write_bytes(manifest.encode())

    seal()
    verified = verify(bundle)
    assert {o.artifact: (o.tolerance, o.least_cosine) for o in verified.outputs} == {
        a.name: (a.parity.tolerance, a.parity.least_cosine) for a in open_bundle(bundle).manifest.artifacts
    }
    assert all(o.max_difference > 0.009 for o in verified.outputs if o.artifact.endswith("fp16"))
    assert all(o.cosine > 0.999 for o in verified.outputs)
    seal(least_cosine=1.1)
    with pytest.raises(ParityError, match=r"h0\d-fp16 gives other logits .* \(1\.1 asked\)"):
        verify(bundle)
    seal(tolerance=0.001)
    assert cli("verify", "--bundle", bundle).code == 5


def test_verify_on_several_backends_skips_what_one_lacks_with_a_line(shared_bundle, cli: Cli, monkeypatch):
    install(monkeypatch, Fake("abacus", {"fp32": ("fp32",)}))
    verified = verify(shared_bundle, backends=("all",))
    assert sorted((o.backend, o.artifact) for o in verified.outputs) == sorted(
        [("onnxruntime", f"h{heads:02d}-{kind}") for heads in range(2, 7) for kind in ("fp32", "fp16")]
        + [("abacus", f"h{heads:02d}-fp32") for heads in range(2, 7)]
    )
    ran = cli("verify", "--bundle", shared_bundle, "--backend", "onnxruntime,abacus")
    assert ran.code == 0, ran.err
    names = ", ".join(f"h{heads:02d}-fp16" for heads in range(2, 7))
    assert f"outputs not checked: left out: {names}: abacus does not run fp16 here" in ran.out
    install(monkeypatch, Fake("quartz", {"int8": ("int8",)}))
    alone = cli("verify", "--bundle", shared_bundle, "--backend", "quartz")
    assert alone.code == 8
    assert "hint: quartz has int8" in alone.err


def test_a_backend_that_fails_to_run_one_artifact_is_exit_8_after_the_others_were_verified(
    shared_bundle, cli: Cli, monkeypatch
):
    install(monkeypatch, Fake("abacus", {"fp32": ("fp32",)}, breaks=("h03-fp32",)), alone=True)
    ran = cli("verify", "--bundle", shared_bundle)
    assert ran.code == 8
    assert [name for name in ("h02-fp32", "h03-fp32", "h04-fp32", "h06-fp32") if f" {name} " in ran.out] == [
        *("h02-fp32", "h04-fp32", "h06-fp32")
    ]
    assert "every hash agrees" in ran.out
    assert "1 of 5 artifacts could not be run: h03-fp32: abacus cannot open h03-fp32" in ran.err


def test_artifacts_that_take_pixels_are_run_and_verified(supernet_file, tmp_path, image, cli: Cli):
    export(supernet_file, tmp_path / "b", heads=(3,), input="uint8")
    export(supernet_file, tmp_path / "b", heads=(3,))
    assert [o.artifact for o in verify(tmp_path / "b").outputs] == ["h03-fp32", "h03-fp32-uint8"]
    pixels, scaled = (
        [g.probability for g in next(run(tmp_path / "b", [image], artifact=name).predictions).top]
        for name in ("h03-fp32-uint8", "h03-fp32")
    )
    np.testing.assert_allclose(pixels, scaled, rtol=1e-4)


def test_run_names_no_artifact_that_the_backend_does_not_run(shared_bundle, image, cli: Cli, monkeypatch):
    abacus = Fake("abacus", {"fp16": ("fp16",)})
    install(monkeypatch, abacus, Fake("quartz", {"int8": ("int8",)}))
    ran = cli("run", image, "--bundle", shared_bundle, "--backend", "abacus")
    assert ran.code == 0, ran.err
    assert "h06-fp16" in ran.err
    for options in (["--backend", "quartz"], ["--backend", "abacus", "--artifact", "h02-fp32"]):
        refused = cli("run", image, "--bundle", shared_bundle, *options)
        assert refused.code == 8
        assert f"{options[1]} does not run fp32 here" in refused.err


def test_run_of_a_budget_opens_exactly_what_was_picked(bundle, tmp_path, image, cli: Cli, monkeypatch):
    """Artifact, backend, compute type, settings and threads are those of the measured cell."""
    abacus = Fake("abacus", {"fp32": ("fp32", "bf16")}, {"hint": ("latency", "throughput")})
    install(monkeypatch, abacus)
    opened = open_bundle(bundle)
    here = machine()
    artifact = opened.artifact("h03-fp32")
    row = accuracy(artifact, share(120), backend="abacus", compute_type="bf16")
    write_accuracy(opened, {row: None})
    how = {"backend": "abacus", "compute_type": "bf16", "settings": {"hint": "throughput"}, "threads": 2}
    fast = cell(artifact, latencies(*(0.001,) * 5), **how)
    slow = cell(artifact, latencies(*(0.009,) * 5))
    add_profile(tmp_path / "profiles", profile([slow, fast], here.identity(), here.conditions({})))
    ran = cli(*("run", image, "--bundle", bundle, "--profiles", tmp_path / "profiles", "--latency", "2ms", "--json"))
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert (document["artifact"], document["backend"], document["compute_type"]) == ("h03-fp32", "abacus", "bf16")
    assert abacus.opened == [("h03-fp32", Options(2, "bf16", {"hint": "throughput"}))]
    assert "h03-fp32 (abacus, bf16, hint=throughput, 2 threads)" in ran.err


def test_run_of_a_budget_follows_the_advice_of_its_pick_and_gives_its_answer(bundle, tmp_path, image, cli: Cli):
    opened = open_bundle(bundle)
    here, artifact = machine(), opened.artifact("h03-fp32")
    write_accuracy(opened, {accuracy(artifact, share(120)): None})
    measured = cell(artifact, latencies(*(0.001,) * 5), flags=("contended",))
    add_profile(tmp_path / "profiles", profile([measured], here.identity(), here.conditions({})))
    options = ("--bundle", bundle, "--profiles", tmp_path / "profiles", "--latency", "2ms")
    refused = cli("run", image, *options, "--json")
    assert refused.code == 4
    assert "--accept contended takes it" in refused.err
    assert json.loads(refused.out) == json.loads(cli("pick", *options, "--json").out)
    ran = cli("run", image, *options, "--accept", "contended", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["artifact"] == "h03-fp32"
