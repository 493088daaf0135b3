"""`evaluate`: accuracy with an interval, per image outcomes, and rows that belong to their weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from hydradeploy import declare, evaluate, export, open_bundle
from hydradeploy.bundle import ACCURACY, EVALUATION, read_accuracy, read_outcomes
from hydradeploy.data.datasets import open_dataset
from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import EnvironmentFailed, InputError, IntegrityError, MissingError
from hydradeploy.files import inside
from hydradeploy.stats.proportions import wilson
from hydradeploy.supernet.store import load, save
from tests.conftest import Cli, geometry, rot, spec, write_supernet
from tests.fakes import Fake, install


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """150 images in ten classes, too many for one chunk."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("labelled") / "images.npz"
    np.savez(
        path,
        images=generator.integers(0, 256, (150, 40, 36, 3), dtype=np.uint8),
        labels=np.arange(150) % 10,
    )
    return path


def test_accuracy_is_that_of_the_torch_subnet_on_the_same_images(bundle, supernet_file, labelled):
    found = evaluate(bundle, str(labelled))
    weights, dataset = load(supernet_file), open_dataset(str(labelled), "test")
    pixels = np.stack([dataset.pixels(i, weights.spec) for i in range(len(dataset))])
    images = torch.from_numpy(normalise(pixels, weights.spec.preprocessing))
    outcomes = read_outcomes(open_bundle(bundle))
    for row in found.rows:
        if not row.artifact.endswith("fp32"):
            continue
        plain = weights.plain(weights.spec.geometry.subnet(int(row.artifact[1:3])))
        with torch.inference_mode():
            probabilities = torch.softmax(plain(images), 1).numpy()
        said = outcomes[row.outcomes]
        assert np.array_equal(said.prediction, probabilities.argmax(1))
        np.testing.assert_allclose(said.probability, probabilities.max(1), rtol=1e-3)
        assert np.array_equal(said.right, said.prediction == dataset.labels)
        assert (row.correct, row.n) == (said.right.sum(), 150)
        assert row.top1 == row.correct / 150
        assert (row.lower, row.upper) == wilson(row.correct, row.n)
    assert len(found.rows) == 10


def test_rows_say_what_they_depend_on(bundle, labelled):
    opened = open_bundle(bundle)
    for row in evaluate(bundle, str(labelled)).rows:
        artifact = opened.artifact(row.artifact)
        assert row.sha256 == artifact.sha256
        assert (row.backend, row.compute_type, row.source) == ("onnxruntime", artifact.precision, "measured")
        assert row.instruction_set
        assert row.dataset == "images.npz"
    assert len({row.data_sha256 for row in read_accuracy(opened)}) == 1


def test_limit_takes_images_spread_over_the_set(bundle, labelled):
    rows = evaluate(bundle, str(labelled), limit=15).rows
    assert {row.n for row in rows} == {15}
    everything = evaluate(bundle, str(labelled), limit=1000).rows
    assert {row.n for row in everything} == {150}


def test_evaluating_again_replaces_just_its_own_rows(bundle, labelled, tmp_path):
    first = evaluate(bundle, str(labelled), limit=20).rows
    other = Path(shutil.copy(labelled, tmp_path / "other.npz"))
    second = evaluate(bundle, str(other), limit=20).rows
    assert set(read_accuracy(open_bundle(bundle))) == {*first, *second}
    third = evaluate(bundle, str(labelled), limit=30).rows
    assert set(read_accuracy(open_bundle(bundle))) == {*second, *third}
    outcomes = read_outcomes(open_bundle(bundle))
    assert {row.outcomes for row in (*second, *third)} == set(outcomes)
    assert all(len(outcomes[row.outcomes].right) == 30 for row in third)


def test_another_number_of_images_than_before_is_told_before_the_work(bundle, labelled):
    said: list[str] = []

    def interrupted(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    evaluate(bundle, str(labelled), limit=20, say=said.append)
    assert not said
    with pytest.raises(KeyboardInterrupt):  # it is told while it can still be helped
        evaluate(bundle, str(labelled), limit=5, say=said.append, report=interrupted)
    (line,) = said
    assert line.startswith("h02-fp32, h03-fp32, ")
    assert line.endswith("h06-fp16: 5 images of images.npz are going to replace an evaluation on 20")
    assert {row.n for row in read_accuracy(open_bundle(bundle))} == {20}
    evaluate(bundle, str(labelled), limit=5)
    assert {row.n for row in read_accuracy(open_bundle(bundle))} == {5}


def test_an_artifact_whose_rows_of_several_ways_go_is_told_once(bundle, labelled, monkeypatch):
    install(monkeypatch, Fake("abacus", {"fp32": ("fp32", "bf16")}))
    said: list[str] = []
    for limit in (6, 4):
        evaluate(bundle, str(labelled), limit=limit, backends=("abacus",), compute_types=("fp32", "bf16"))
    evaluate(bundle, str(labelled), limit=3, backends=("abacus",), compute_types=("fp32", "bf16"), say=said.append)
    assert said[-1].startswith("h02-fp32, h03-fp32, h04-fp32, h05-fp32, h06-fp32: 3 images")


def test_as_many_images_of_another_data_set_of_that_name_are_told(bundle, labelled, tmp_path):
    said: list[str] = []
    evaluate(bundle, str(labelled), limit=20, say=said.append)
    evaluate(bundle, str(labelled), limit=20, say=said.append)
    assert not said
    with np.load(labelled) as arrays:
        np.savez(tmp_path / labelled.name, images=255 - arrays["images"], labels=arrays["labels"])
    evaluate(bundle, str(tmp_path / labelled.name), limit=20, say=said.append)
    assert [line.partition(": ")[2] for line in said] == [
        "these 20 images of images.npz replace an evaluation on as many others"
    ] * 2  # fp32 and fp16


def test_a_disk_that_fills_up_while_accuracy_is_written_leaves_what_was_there(bundle, labelled, monkeypatch, cli: Cli):
    before = evaluate(bundle, str(labelled), limit=20).rows
    made = tempfile.mkstemp

    def full(prefix: str, dir: Path) -> tuple[int, str]:
        if ACCURACY in prefix:
            raise OSError(errno.ENOSPC, "No space left on device", str(dir))
        return made(prefix=prefix, dir=dir)

    monkeypatch.setattr("tempfile.mkstemp", full)
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled)
    assert ran.code == 12
    assert "nothing that was there before is lost" in ran.err
    monkeypatch.undo()
    assert read_accuracy(open_bundle(bundle)) == before
    assert set(read_outcomes(open_bundle(bundle))) == {row.outcomes for row in before}
    assert not list(bundle.glob(".evaluation*"))


def test_outcomes_that_are_replaced_while_they_are_read_are_the_new_ones(bundle, labelled, tmp_path, monkeypatch):
    newer = Path(shutil.copytree(bundle, tmp_path / "newer"))
    evaluate(bundle, str(labelled), limit=5)
    evaluate(newer, str(labelled), limit=8)

    def replaced(root: Path, name: str) -> Path:
        if name == EVALUATION and newer.exists():
            for file in (ACCURACY, EVALUATION):
                os.replace(newer / file, bundle / file)
            shutil.rmtree(newer)
        return inside(root, name)

    opened = open_bundle(bundle)
    monkeypatch.setattr("hydradeploy.bundle.inside", replaced)
    assert {len(found.right) for found in read_outcomes(opened).values()} == {8}


def test_an_artifact_that_overflows_on_an_image_is_left_out_and_the_image_named(overflowing, tmp_path, cli: Cli):
    path = Path(shutil.copytree(overflowing, tmp_path / "bundle"))
    images = np.full((60, 32, 32, 3), 128, np.uint8)
    images[40] = 255
    np.savez(tmp_path / "l.npz", images=images, labels=np.arange(60) % 10)
    ran = cli("evaluate", "--bundle", path, "--data", tmp_path / "l.npz", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert [row["artifact"] for row in document["rows"]] == ["h02-fp32"]
    said = "onnxruntime gives NaN or infinite logits in fp16 for l.npz: image 40"
    assert document["left_out"] == [f"left out: h02-fp16: {said}"]


def test_what_cannot_be_written_is_told_before_the_work(bundle, labelled, monkeypatch):
    def full(*given: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    reported: list[str] = []
    with pytest.raises(EnvironmentFailed, match="no space left"):
        evaluate(bundle, str(labelled), report=lambda what, done, total: reported.append(what))
    assert not reported


def test_an_interrupted_evaluation_keeps_the_precisions_that_were_done(bundle, labelled):
    def stop(what: str, done: int, total: int) -> None:
        if "fp16" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, str(labelled), limit=20, report=stop)
    assert {row.artifact[-4:] for row in read_accuracy(open_bundle(bundle))} == {"fp32"}


@pytest.mark.parametrize(("field", "value"), [("top1", 0.99), ("top1", 5.0), ("lower", 0.99), ("upper", -0.5)])
def test_figures_that_cannot_be_are_refused(bundle, labelled, cli: Cli, field, value):
    evaluate(bundle, str(labelled), limit=20)
    path = bundle / "accuracy.json"
    told = json.loads(path.read_text())
    told["rows"][0][field] = value
    path.write_text(json.dumps(told))
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled, "--limit", 5)
    assert (ran.code, "accuracy.json" in ran.err, field in ran.err) == (10, True, True), ran.err


def test_accuracy_stays_with_its_weights_when_artifacts_are_added_and_replaced(tmp_path, labelled):
    one = write_supernet(tmp_path / "one")
    export(one, tmp_path / "b", heads=(2,))
    evaluate(tmp_path / "b", str(labelled), limit=10)
    export(one, tmp_path / "b", heads=(3,))
    bundle = open_bundle(tmp_path / "b")
    (row,) = read_accuracy(bundle)
    assert row.sha256 == bundle.artifact("h02-fp32").sha256
    assert read_outcomes(bundle)
    export(write_supernet(tmp_path / "two", seed=1), tmp_path / "b", heads=(2,), force=True)
    replaced = open_bundle(tmp_path / "b")
    assert [row.sha256 == replaced.artifact("h02-fp32").sha256 for row in read_accuracy(replaced)] == [False]


def photos(path: Path, *classes: str) -> Path:
    """A folder of classes of one image each."""
    for name in classes:
        (path / name).mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / name / "a.png")
    return path


def test_a_data_set_has_its_own_name_wherever_this_is_run(bundle, tmp_path, monkeypatch, cli: Cli):
    folder = photos(tmp_path / os.fsdecode(b"ph\xffotos"), *"abcdefghij")
    (row,) = {(row.dataset, row.data_sha256) for row in evaluate(bundle, str(folder)).rows}
    monkeypatch.chdir(folder)
    for source in (".", "a/.."):
        assert {(row.dataset, row.data_sha256) for row in evaluate(bundle, source).rows} == {row}
    assert row[0] == "ph\ufffdotos"
    assert {row.dataset for row in read_accuracy(open_bundle(bundle))} == {row[0]}


def test_a_class_that_only_one_side_has_is_told_where_others_have_the_same_name(supernet_file, tmp_path):
    weights = load(supernet_file)
    names = ("\ufeffa", *"bcdefghij")
    save(tmp_path / "s", msgspec.structs.replace(weights.spec, class_names=names), weights.tensors)
    export(tmp_path / "s", tmp_path / "b", heads=(2,))
    said: list[str] = []
    evaluate(tmp_path / "b", str(photos(tmp_path / "photos", *"abcdefghij")), say=said.append)
    assert said == ["labels of photos are taken by position: the supernet has no class called 'a'"]
    evaluate(tmp_path / "b", str(photos(tmp_path / "others", *"klmnopqrst")), say=said.append)
    assert len(said) == 1, "where no name is the same nobody meant them to be"


def test_folders_are_matched_to_class_names_whatever_their_order(tmp_path):
    named = msgspec.structs.replace(spec(geometry(classes=3)), class_names=("zebra", "ant", "mole"))
    labels = open_dataset(str(photos(tmp_path / "photos", *named.class_names)), "test").labels_for(named)
    assert list(labels) == [1, 2, 0]


def test_declared_accuracy_is_marked_so_and_stays_apart(bundle, labelled, tmp_path, cli: Cli):
    measured = evaluate(bundle, str(labelled), limit=10).rows
    table = tmp_path / "imagenet.csv"
    table.write_text("artifact,dataset,top1,n\nh02-fp32,imagenet,0.7056,50000\nh03-fp32,imagenet,0.75396,50000\n")
    ran = cli("evaluate", "--bundle", bundle, "--declared", table)
    assert ran.code == 0, ran.err
    assert "declared" in ran.out
    assert "70.56%" in ran.out
    rows = read_accuracy(open_bundle(bundle))
    assert [row.source for row in rows] == ["measured"] * len(measured) + ["declared"] * 2
    declared = rows[-2]
    assert (declared.correct, declared.n, declared.backend, declared.outcomes) == (35280, 50000, None, None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("artifact,top1,n\nh02-fp32,0.5,10\n", "no column dataset"),
        ("artifact,dataset,top1,n\nh99-fp32,d,0.5,10\n", "line 2: no artifact 'h99-fp32'"),
        ("artifact,dataset,top1,n\nh02-fp32,d,70.5,10\n", "line 2: top1 must be"),
        ("artifact,dataset,top1,n\nh02-fp32,d,nan,10\n", "line 2: top1 must be"),
        ("artifact,dataset,top1,n\nh02-fp32,d,1.001,10\n", "line 2: top1 must be"),
        ("artifact,dataset,top1,n\nh02-fp32,d,-0.001,10\n", "line 2: top1 must be"),
        ("artifact,dataset,top1,n\nh02-fp32,d,0.5,0\n", "line 2: top1 must be"),
        ("artifact,dataset,top1,n\nh02-fp32,d,0.5,ten\n", "line 2: top1 must be"),
        ("artifact,dataset,top1,n\nh02-fp32,,0.5,10\n", "line 2: dataset is empty"),
        ("artifact,dataset,top1,n\nh02-fp32,d\n", "line 2: top1, n is empty"),
        (
            "artifact,dataset,top1,n\nh02-fp32,d,0.5,10\nh02-fp32,e,0.5,10\nh02-fp32,d,0.6,10\n",
            "line 4: h02-fp32 on d is there twice",
        ),
        ("artifact,dataset,top1,n\n", "holds no rows"),
        ("", "no column artifact, dataset, top1, n"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_with_its_line(bundle, tmp_path, cli: Cli, text, named):
    (tmp_path / "t.csv").write_text(text)
    ran = cli("evaluate", "--bundle", bundle, "--declared", tmp_path / "t.csv")
    assert ran.code == 11
    assert f"{tmp_path / 't.csv'}" in ran.err
    assert named in ran.err
    assert not (bundle / ACCURACY).exists()


def test_the_command_prints_a_table_and_one_json_document(bundle, labelled, cli: Cli):
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled, "--limit", 20)
    assert ran.code == 0, ran.err
    assert "h02-fp32" in ran.out
    assert "95% interval" in ran.out
    document = json.loads(cli("evaluate", "--bundle", bundle, "--data", labelled, "--limit", 20, "--json").out)
    assert len(document["rows"]) == 10


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ([], 2, "give either --data or --declared"),
        (["--data", "digits", "--declared", "x.csv"], 2, "give either"),
        (["--data", "no-such-set"], 2, "no such data set"),
        (["--declared", "no-such.csv"], 2, "no such file"),
        (["--declared", "no-such.csv", "--limit", "5"], 2, "nothing is measured"),
        (["--declared", "no-such.csv", "--backend", "openvino"], 2, "nothing is measured"),
        (["--declared", "no-such.csv", "--compute-type", "fp32"], 2, "nothing is measured"),
        (["--data", "digits", "--limit", "0"], 2, "limit"),
        (["--data", "digits", "--backend", "abacus"], 2, "no backend"),
    ],
)
def test_wrong_options_are_usage_errors(bundle, cli: Cli, options, code, text):
    ran = cli("evaluate", "--bundle", bundle, *options)
    assert ran.code == code
    assert text in ran.err
    assert "hint:" in ran.err or "no such" in ran.err


def test_another_number_of_classes_is_refused_with_both(bundle, tmp_path, cli: Cli):
    np.savez(tmp_path / "d.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))
    ran = cli("evaluate", "--bundle", bundle, "--data", tmp_path / "d.npz")
    assert ran.code == 11
    assert "d.npz has 4 classes, the supernet 10" in ran.err


def test_an_image_that_cannot_be_read_stops_the_evaluation_by_name(bundle, tmp_path, cli: Cli):
    for label in "abcdefghij":
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "set" / label / "a.png")
    (tmp_path / "set" / "d" / "b.png").write_bytes(b"no image")
    ran = cli("evaluate", "--bundle", bundle, "--data", tmp_path / "set")
    assert ran.code == 11
    assert str(tmp_path / "set" / "d" / "b.png") in ran.err
    assert not (bundle / ACCURACY).exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": 1}', b'{"schema": 9, "rows": []}'])
def test_a_damaged_accuracy_file_is_named(bundle, labelled, cli: Cli, content):
    (bundle / ACCURACY).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"accuracy\.json"):
        read_accuracy(open_bundle(bundle))
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled, "--limit", 5)
    assert ran.code == 10
    assert str(bundle / ACCURACY) in ran.err
    assert (bundle / ACCURACY).read_bytes() == content


def test_outcomes_of_another_evaluation_are_refused_and_written_anew(bundle, labelled):
    evaluate(bundle, str(labelled), limit=5)
    (bundle / EVALUATION).write_bytes((bundle / EVALUATION).read_bytes()[:-30])
    with pytest.raises(IntegrityError, match=r"evaluation\.npz"):
        read_outcomes(open_bundle(bundle))
    evaluate(bundle, str(labelled), limit=5)
    assert len(read_outcomes(open_bundle(bundle))) == 10


def test_a_bundle_with_accuracy_still_verifies_and_packs(bundle, labelled, tmp_path, cli: Cli):
    evaluate(bundle, str(labelled), limit=5)
    assert cli("verify", "--bundle", bundle).code == 0
    assert cli("pack", "h02-fp32", "--out", tmp_path / "p", "--bundle", bundle).code == 0


@pytest.mark.parametrize("name", [ACCURACY, EVALUATION])
def test_verify_finds_damage_in_what_evaluate_wrote(bundle, labelled, cli: Cli, name):
    evaluate(bundle, str(labelled), limit=5)
    rot(bundle / name, 0)
    ran = cli("verify", "--bundle", bundle)
    assert ran.code == 10
    assert str(bundle / name) in ran.err


def test_a_table_as_spreadsheets_and_people_write_it_is_read(bundle, tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes(b"\xef\xbb\xbfartifact , dataset, top1, n\r\nh02-fp32 , imagenet , 0.7, 100\r\n")
    (row,) = declare(bundle, table).rows
    assert (row.artifact, row.dataset, row.top1, row.n) == ("h02-fp32", "imagenet", 0.7, 100)


def test_declaring_the_same_twice_keeps_one_row(bundle, tmp_path):
    (tmp_path / "t.csv").write_text("artifact,dataset,top1,n\nh02-fp32,imagenet,0.7,100\n")
    declare(bundle, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("artifact,dataset,top1,n\nh02-fp32,imagenet,0.8,100\n")
    declare(bundle, tmp_path / "t.csv")
    assert [row.top1 for row in read_accuracy(open_bundle(bundle))] == [0.8]


def test_a_data_set_without_a_test_split_names_those_it_has(tmp_path):
    (tmp_path / "set" / "train" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="no such split") as refused:
        open_dataset(str(tmp_path / "set"), "test")
    assert "train" in str(refused.value.hint)


# ---------------------------------------------------------------- backends, compute types, inputs


def test_rows_of_several_backends_and_types_stand_beside_each_other(bundle, labelled, monkeypatch):
    abacus = Fake("abacus", {"fp32": ("fp32", "bf16")})
    install(monkeypatch, abacus)
    told: list[str] = []
    found = evaluate(
        bundle, str(labelled), limit=10, backends=("all",), compute_types=("fp32", "bf16"), say=told.append
    )
    assert {(row.artifact, row.backend, row.compute_type) for row in found.rows} == {
        (f"h{heads:02d}-fp32", backend, kind)
        for heads in range(2, 7)
        for backend, kind in (("onnxruntime", "fp32"), ("abacus", "fp32"), ("abacus", "bf16"))
    }
    assert [options.compute_type for _, options in abacus.opened] == ["fp32"] * 5 + ["bf16"] * 5
    assert told == list(found.left_out)
    assert told[-1].endswith("h06-fp16: abacus does not run fp16 here")
    again = evaluate(bundle, str(labelled), limit=20, backends=("abacus",), compute_types=("bf16",)).rows
    stored = read_accuracy(open_bundle(bundle))
    assert len(stored) == 15, "rows of the same way are replaced, the others stay"
    assert {row.n for row in stored if row.compute_type == "bf16"} == {20}
    assert set(again) <= set(stored)
    assert len(read_outcomes(open_bundle(bundle))) == 15


def test_no_more_sessions_are_open_at_once_than_there_are_head_counts(bundle, labelled, monkeypatch):
    most, now = 0, 0

    class Counting(Fake):
        def open(self, model, options):
            nonlocal most, now
            now += 1
            most = max(most, now)
            session = super().open(model, options)
            leave = session.__exit__

            class Counted(type(session)):
                def __exit__(self, *error):
                    nonlocal now
                    now -= 1
                    leave(*error)

            session.__class__ = Counted
            return session

    install(monkeypatch, Counting("abacus", {"fp32": ("fp32", "bf16"), "fp16": ("fp16",)}), alone=True)
    evaluate(bundle, str(labelled), limit=3, compute_types=("fp32", "bf16", "fp16"))
    assert (most, now) == (5, 0)


def test_an_artifact_that_takes_pixels_is_as_accurate_as_the_one_that_takes_normalised_images(
    supernet_file, tmp_path, labelled, cli: Cli
):
    for kind in ("float32", "uint8"):
        export(supernet_file, tmp_path / "b", heads=(2, 3), input=kind)
    rows = {row.artifact: row for row in evaluate(tmp_path / "b", str(labelled)).rows}
    assert {name: row.input for name, row in rows.items()} == {
        "h02-fp32": "float32",
        "h03-fp32": "float32",
        "h02-fp32-uint8": "uint8",
        "h03-fp32-uint8": "uint8",
    }
    for name in ("h02-fp32", "h03-fp32"):
        assert rows[name].right == rows[f"{name}-uint8"].right
    shown = cli("evaluate", "--bundle", tmp_path / "b", "--data", labelled, "--limit", 5).out
    assert [line.split()[-4] for line in shown.splitlines() if "-uint8" in line] == ["uint8"] * 2


@pytest.mark.parametrize("broken", ["when it is opened", "when it is run"])
def test_a_backend_that_fails_with_one_artifact_keeps_the_others(bundle, labelled, monkeypatch, cli: Cli, broken):
    class Breaking(Fake):
        def open(self, model, options):
            session = super().open(model, options)
            if model.name == "h04-fp32":
                session._session = None
                session.run = fail
            return session

    def fail(images):
        raise MissingError("abacus cannot run h04-fp32: no kernel for it")

    opening = broken == "when it is opened"
    kind = Fake if opening else Breaking
    install(monkeypatch, kind("abacus", {"fp32": ("fp32",)}, breaks=("h04-fp32",) if opening else ()), alone=True)
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled, "--limit", 40, "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert [row["artifact"] for row in document["rows"]] == [f"h{heads:02d}-fp32" for heads in (2, 3, 5, 6)]
    verb = "open" if opening else "run"
    assert document["left_out"][-1] == f"left out: h04-fp32: abacus cannot {verb} h04-fp32: no kernel for it"
    assert document["left_out"][-1] in ran.err
    assert {row.artifact for row in read_accuracy(open_bundle(bundle))} == {row["artifact"] for row in document["rows"]}


def test_where_everything_fails_nothing_is_written(bundle, labelled, monkeypatch, cli: Cli):
    names = [artifact.name for artifact in open_bundle(bundle).manifest.artifacts]
    install(monkeypatch, Fake("abacus", {"fp32": ("fp32",), "fp16": ("fp16",)}, breaks=names), alone=True)
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled)
    assert ran.code == 8
    assert "no artifact could be evaluated" in ran.err
    assert not (bundle / ACCURACY).exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--backend", "quartz"), "quartz does not run fp32 here"),
        (("--backend", "quartz,onnxruntime", "--compute-type", "int4"), "do not compute in int4 here"),
        (("--backend", "onnxruntime", "--compute-type", "fp32,int8"), "does not compute in int8 here"),
    ],
)
def test_where_no_backend_does_what_was_asked_for_it_is_exit_8_with_what_they_have(
    bundle, labelled, monkeypatch, cli: Cli, options, told
):
    install(monkeypatch, Fake("quartz", {"int8": ("int8",)}))
    ran = cli("evaluate", "--bundle", bundle, "--data", labelled, *options)
    assert ran.code == 8
    assert told in ran.err
    assert "hint: " in ran.err
    assert " has " in ran.err
    assert not (bundle / ACCURACY).exists()
