"""Data sets: what is in them, their splits, and what is refused."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hydradeploy.data import datasets, samples
from hydradeploy.data.datasets import BUILT_IN, SPLITS, SUFFIXES, image_files, open_dataset
from hydradeploy.data.preprocess import load_image
from hydradeploy.errors import InputError, MissingError, UsageError
from tests.conftest import geometry, require, spec


def picture(path, seed=0, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def archive(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_digits_are_all_of_scikit_learns_in_three_parts_without_overlap():
    require("sklearn")
    from sklearn.datasets import load_digits

    parts = {split: open_dataset("digits", split) for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 1797
    assert len(parts["test"]) == 360
    seen = sorted(
        (int(part.labels[i]), np.asarray(part.read(i)).tobytes()) for part in parts.values() for i in range(len(part))
    )
    digits = load_digits()
    raw = np.round(digits.images * (255 / 16)).astype(np.uint8)
    assert seen == sorted((int(label), image.tobytes()) for label, image in zip(digits.target, raw, strict=True))
    assert all(set(part.labels) == set(range(10)) for part in parts.values())


def test_digits_are_the_same_every_time_and_use_the_whole_range():
    require("sklearn")
    one, two = open_dataset("digits", "val"), open_dataset("digits", "val")
    assert np.array_equal(one.labels, two.labels)
    pixels = np.stack([np.asarray(one.read(i)) for i in range(len(one))])
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match="scikit-learn") as refused:
        open_dataset("digits", "test")
    assert "pip install" in str(refused.value.hint)


def test_a_folder_gives_its_files_in_order_as_load_image_reads_them(tmp_path):
    for i, name in enumerate(["b/2.png", "a/1.jpg", "a/deep/0.png", "b/1.webp"]):
        picture(tmp_path / name, i)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    for hidden in (".cache/0.png", "a/._1.jpg", "b/.ipynb_checkpoints/2-checkpoint.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    found = open_dataset(str(tmp_path), "test")
    assert found.class_names == ("a", "b")
    assert list(found.labels) == [0, 0, 1, 1]
    files = ["a/1.jpg", "a/deep/0.png", "b/1.webp", "b/2.png"]
    for i, name in enumerate(files):
        assert np.array_equal(found.pixels(i, spec()), load_image(tmp_path / name, spec()))


def test_a_folder_with_splits_gives_each_its_own_and_val_serves_as_test(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            picture(tmp_path / split / "a" / f"{i}.png", i)
    assert [len(open_dataset(str(tmp_path), split)) for split in SPLITS] == [3, 2, 2]
    picture(tmp_path / "test" / "a" / "0.png")
    assert len(open_dataset(str(tmp_path), "test")) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_splits_is_no_training_set(tmp_path, split):
    picture(tmp_path / "a" / "0.png")
    with pytest.raises(InputError, match="no such split"):
        open_dataset(str(tmp_path), split)


@given(
    st.lists(
        st.lists(
            st.sampled_from(["a", "a-b", "a.png", "B.JPEG", "b.png", ".c", "._a.png", "z.txt", "ä.Jpg"]), max_size=4
        )
    )
)
def test_images_come_in_the_order_of_their_paths(paths):
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for path in paths:
            with suppress(OSError):  # a folder of that name is there, or a file where a folder would be
                root.joinpath(*path[:-1]).mkdir(parents=True, exist_ok=True)
                root.joinpath(*path).touch()
        found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(root).parts)]
        assert image_files(root) == [path for path in found if path not in hidden]


def test_links_to_images_are_images_and_links_to_folders_are_not_followed(tmp_path):
    picture(tmp_path / "there" / "0.png")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "1.png").symlink_to(tmp_path / "there" / "0.png")
    (tmp_path / "here" / "2.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "here" / "round").symlink_to(tmp_path / "here")
    assert image_files(tmp_path / "here") == [tmp_path / "here" / "1.png"]


def test_imagenets_suffixes_in_capitals_are_found(tmp_path):
    for split in ("train", "val"):
        for label in ("n01440764", "n01443537"):
            picture(tmp_path / split / label / "a.JPEG")
    assert [len(open_dataset(str(tmp_path), split)) for split in SPLITS] == [2, 2, 2]


def kaggle(tmp_path, rows="ILSVRC2012_val_1,n2 1 2 3 4 n2 5 6 7 8\nILSVRC2012_val_2,n1 1 2 3 4\n"):
    """ImageNet as Kaggle's archive has it: the validation images in one folder, their labels in a table far above."""
    root = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    for label in ("n1", "n2"):
        picture(root / "train" / label / f"{label}_1.JPEG")
    for i in (1, 2):
        picture(root / "val" / f"ILSVRC2012_val_{i}.JPEG", i)
    picture(root / "test" / "ILSVRC2012_test_1.JPEG")
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    return root


def test_kaggles_flat_validation_images_take_their_labels_from_its_table(tmp_path):
    root = kaggle(tmp_path)
    found, train = open_dataset(str(root), "val"), open_dataset(str(root), "train")
    assert found.class_names == train.class_names == ("n1", "n2")
    assert list(found.labels) == [1, 0]
    assert found.where(0) == str(root / "val" / "ILSVRC2012_val_1.JPEG")
    by_itself = open_dataset(str(root / "val"), "test")
    assert list(by_itself.labels) == [1, 0]
    with pytest.raises(InputError, match=r"test_1\.JPEG: .*has no label for it") as refused:
        open_dataset(str(root), "test")
    assert "val, not of test" in str(refused.value.hint)


@pytest.mark.parametrize("rows", ["ILSVRC2012_val_1,\n", "ILSVRC2012_val_1\n", "\xff"])
def test_a_table_of_labels_that_has_none_is_refused(tmp_path, rows):
    root = kaggle(tmp_path)
    table = tmp_path / "kaggle" / "LOC_val_solution.csv"
    table.write_bytes(f"ImageId,PredictionString\n{rows}".encode("latin-1"))
    with pytest.raises(InputError, match=r"LOC_val_solution\.csv: cannot be read as a table"):
        open_dataset(str(root), "val")


def test_an_empty_class_folder_is_refused_by_name(tmp_path):
    picture(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "readme.txt").write_text("nothing here")
    with pytest.raises(InputError, match="no image in this class folder") as refused:
        open_dataset(str(tmp_path), "test")
    assert str(tmp_path / "b") in refused.value.message


def test_a_folder_without_class_folders_is_refused(tmp_path):
    picture(tmp_path / "0.png")
    with pytest.raises(InputError, match="no class folders"):
        open_dataset(str(tmp_path), "test")


@pytest.mark.parametrize("shape", [(6, 9, 7), (6, 9, 7, 1), (6, 9, 7, 3)])
def test_an_npz_file_gives_its_images_grey_or_colour(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = open_dataset(archive(tmp_path / "d.npz", images=images, labels=np.array([0, 1, 2, 0, 1, 2])), "test")
    assert found.class_names == ("0", "1", "2")
    assert np.array_equal(np.asarray(found.read(4)).reshape(9, 7, -1), images[4].reshape(9, 7, -1))
    assert found.pixels(0, spec(geometry(channels=1))).shape == (32, 32, 1)
    assert found.pixels(0, spec()).shape == (32, 32, 3)


def test_an_npz_file_with_splits_and_names(tmp_path):
    arrays = {}
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        arrays[f"{split}_images"] = np.zeros((count, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 2
    path = archive(tmp_path / "d.npz", class_names=np.array(["cat", "dog"]), **arrays)
    assert [len(open_dataset(path, split)) for split in SPLITS] == [4, 3, 2]
    assert open_dataset(path, "val").class_names == ("cat", "dog")


def test_an_npz_file_without_a_test_split_is_tested_on_val(tmp_path):
    arrays = {"val_images": np.zeros((3, 8, 8), np.uint8), "val_labels": np.arange(3)}
    assert len(open_dataset(archive(tmp_path / "d.npz", **arrays), "test")) == 3
    alone = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4)}
    assert len(open_dataset(archive(tmp_path / "d.npz", **arrays, **alone), "test")) == 4


def test_numbers_are_classes_up_to_the_largest_label_of_any_split(tmp_path):
    """As of shards: a small split may lack the last classes."""
    arrays = {f"{split}_images": np.zeros((3, 8, 8), np.uint8) for split in SPLITS}
    labels = {"train_labels": [0, 1, 2], "val_labels": [0, 1, 1], "test_labels": [3, 0, 0]}
    path = archive(tmp_path / "d.npz", **arrays, **labels)
    assert [open_dataset(path, split).class_names for split in SPLITS] == [("0", "1", "2", "3")] * 3


def test_names_of_classes_may_be_bytes(tmp_path):
    images, labels = np.zeros((2, 8, 8), np.uint8), np.arange(2)
    path = archive(tmp_path / "d.npz", images=images, labels=labels, class_names=np.array([b"cat", b"dog"]))
    assert open_dataset(path, "test").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"labels": np.arange(3)}, "no array `images`"),
        ({"images": np.zeros((3, 0, 8), np.uint8), "labels": np.arange(3)}, r"\(3, 0, 8\)"),
        ({"images": np.zeros((3, 8, 8), np.uint8), "labels": np.array([0, 1, 10**12])}, "found 0 to 1000000000000"),
        (
            {"images": np.zeros((3, 8, 8), np.uint8), "labels": np.arange(3), "class_names": np.array([["a"]] * 3)},
            r"`class_names` are no names \(its shape is \(3, 1\), expected \(n,\)\)",
        ),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.arange(2), "class_names": np.array([b"a", b"\xff"])},
            "`class_names` are no names",
        ),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, "no array `labels`"),
        ({"images": np.zeros((3, 8, 8)), "labels": np.arange(3)}, "float64"),
        ({"images": np.zeros((3, 8, 8, 4), np.uint8), "labels": np.arange(3)}, r"\(3, 8, 8, 4\)"),
        ({"images": np.zeros((3, 64), np.uint8), "labels": np.arange(3)}, r"\(3, 64\)"),
        ({"images": np.zeros((3, 8, 8), np.uint8), "labels": np.arange(4)}, r"expected integers \(3,\)"),
        ({"images": np.zeros((3, 8, 8), np.uint8), "labels": np.zeros(3)}, "float64"),
        ({"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, int)}, "at least one"),
        ({"images": np.zeros((3, 8, 8), np.uint8), "labels": np.arange(3) - 1}, "found -1 to 1"),
        (
            {"images": np.zeros((3, 8, 8), np.uint8), "labels": np.arange(3), "class_names": np.array(["a", "b"])},
            "must be 0 to 1, found 0 to 2",
        ),
    ],
)
def test_arrays_that_are_no_data_set_are_refused_by_name(tmp_path, arrays, named):
    path = archive(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match=named) as refused:
        open_dataset(path, "test")
    assert path in refused.value.message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY", b"\xff\xd8\xff\xe0 a picture"])
def test_a_file_that_is_no_archive_is_refused_by_name(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"d\.npz: not a readable") as refused:
        open_dataset(str(tmp_path / "d.npz"), "test")
    assert "pickle" not in refused.value.message, "numpy advises to run what is in a file that it does not know"
    assert "given by their folder" in str(refused.value.hint)


@pytest.mark.parametrize("opened", [lambda: open_dataset("", "test"), lambda: samples.read("", spec(), 4)])
def test_an_empty_name_is_not_taken_for_the_directory_this_runs_in(tmp_path, monkeypatch, opened):
    """As an unset variable of the shell leaves it; there may be pictures here that are no data set."""
    (tmp_path / "c").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "c" / "plot.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="'' is no data set"):
        opened()


def test_a_source_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such data set") as refused:
        open_dataset(str(tmp_path / "none"), "test")
    assert str(refused.value.hint).startswith("digits, glyphs, a folder")


def test_every_data_set_that_is_built_in_opens_and_gives_samples():
    require("sklearn")
    require("matplotlib")
    for name in BUILT_IN:
        assert all(open_dataset(name, split).name == name for split in SPLITS)
        assert samples.read(name, spec(geometry(channels=1)), 3).images.shape == (3, 32, 32, 1)


def test_labels_go_by_name_where_both_sides_have_the_same_names_else_by_position(tmp_path):
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 2])
    path = archive(tmp_path / "d.npz", images=images, labels=labels, class_names=np.array(["ant", "bee", "cow"]))
    found, three = open_dataset(path, "test"), spec(geometry(classes=3))
    for names, expected in [
        (None, [0, 1, 2]),
        (("cow", "ant", "bee"), [1, 2, 0]),
        (("n01", "n02", "n03"), [0, 1, 2]),
    ]:
        assert list(found.labels_for(msgspec.structs.replace(three, class_names=names))) == expected
    with pytest.raises(InputError, match="3 classes, the supernet 10"):
        found.labels_for(spec())


def test_labels_go_by_position_where_a_name_stands_twice(tmp_path):
    """As crane and maillot do among ImageNet's classes in words."""
    names = ("crane", "maillot", "crane")
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 2])
    path = archive(tmp_path / "d.npz", images=images, labels=labels, class_names=np.array(names))
    three = spec(geometry(classes=3))
    assert list(open_dataset(path, "test").labels_for(msgspec.structs.replace(three, class_names=names))) == [0, 1, 2]
