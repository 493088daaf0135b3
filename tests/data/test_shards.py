"""Shards: the same images as in a folder, whatever reads them; what is cached; what is refused and how it is named."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hydradeploy.data import samples, shards
from hydradeploy.data.datasets import SUFFIXES, open_dataset
from hydradeploy.errors import InputError
from tests.conftest import spec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where indices are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hydradeploy" / "shards"


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def shard(path: Path, *members: tuple[str, bytes], layout: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: int, seed: int = 0) -> tuple[tuple[str, bytes], ...]:
    return (f"{key}.jpg", encoded(seed)), (f"{key}.cls", str(label).encode())


def shown(dataset) -> list[bytes]:
    return [np.asarray(dataset.read(i)).tobytes() for i in range(len(dataset))]


def test_shards_give_the_images_and_labels_of_the_folder_they_were_made_of(tmp_path):
    files = [(f"c{label}", f"{i}.{suffix}") for label in range(3) for i, suffix in enumerate(("jpg", "png", "webp"))]
    for seed, (name, file) in enumerate(files):
        path = tmp_path / "folder" / "val" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed, {"jpg": "JPEG"}.get(path.suffix[1:], path.suffix[1:])))
    folder = open_dataset(str(tmp_path / "folder"), "val")
    for start in range(0, len(files), 4):
        members = []
        for i in range(start, min(start + 4, len(files))):
            members.append((f"{files[i][0]}/{files[i][1]}", Path(folder.where(i)).read_bytes()))
            members.append((f"{files[i][0]}/{files[i][1][0]}.cls", b"%d\n" % folder.labels[i]))
        shard(tmp_path / "shards" / f"val-{start:04d}.tar", *members)
    (tmp_path / "shards" / "classes.txt").write_text("c0\nc1\nc2\n")
    found = open_dataset(str(tmp_path / "shards"), "val")
    assert found.class_names == folder.class_names
    assert np.array_equal(found.labels, folder.labels)
    assert shown(found) == shown(folder)
    assert np.array_equal(found.pixels(5, spec()), folder.pixels(5, spec()))
    assert found.where(8) == f"{tmp_path / 'shards' / 'val-0008.tar'}: c2/2"


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read_with_names_of_any_length(tmp_path, layout):
    key = ("x" * 60 + "/") * 2 + "y" * (30 if layout == tarfile.USTAR_FORMAT else 200)
    shard(tmp_path / "train-0.tar", *sample(key, 0, 1), *sample("é", 1, 2), layout=layout)
    found = open_dataset(str(tmp_path), "train")
    assert [found.where(i).rpartition(": ")[2] for i in range(2)] == [key, "é"]
    assert shown(found)[1] == np.asarray(Image.open(io.BytesIO(encoded(2)))).tobytes()


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_of_more_bytes_than_the_headers_digits_can_say_is_stepped_over(tmp_path, layout):
    path, info = tmp_path / "val-0.tar", tarfile.TarInfo("a.bin")
    info.size = 9 << 30
    with path.open("wb") as file:
        file.write(info.tobuf(layout))
        file.seek(info.size, os.SEEK_CUR)  # a hole, which takes no place on the disk
        file.write(shard(tmp_path / "rest.tar", *sample("a", 0, 1)).read_bytes())
    (tmp_path / "rest.tar").unlink()
    found = open_dataset(str(tmp_path), "val")
    assert shown(found) == [np.asarray(Image.open(io.BytesIO(encoded(1)))).tobytes()]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_and_folders_are_no_images(tmp_path, layout):
    path = tmp_path / "val-0.tar"
    with tarfile.open(path, "w", format=layout) as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("l" * 90 + ".jpg")
            info.type, info.linkname = kind, "a" * (90 if layout == tarfile.USTAR_FORMAT else 150)
            archive.addfile(info)
    with pytest.raises(InputError, match="holds no sample"):
        open_dataset(str(tmp_path), "val")


@pytest.mark.parametrize("prefix", ["", "imagenet-"])
def test_the_only_shard_of_a_split_needs_no_number_and_its_index_is_kept_beside_the_others(tmp_path, cache, prefix):
    place = tmp_path / "set"
    shard(place / f"{prefix}train.tar", *sample("a", 0, 0), *sample("b", 1, 1))
    shard(place / f"{prefix}val.tar", *sample("c", 1, 2))
    assert [len(open_dataset(str(place), split)) for split in ("train", "val")] == [2, 1]
    kept = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(kept) == 2
    for split in ("train", "val"):
        open_dataset(str(place), split)
    assert {path: path.read_bytes() for path in cache.iterdir()} == kept


@pytest.mark.parametrize("names", [("train_full", "val_full"), ("Train", "VAL"), ("train-a", "train-b", "test-a")])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_shards_of_several_splits_are_never_one_test_split(tmp_path, names, split):
    for number, name in enumerate(names):
        shard(tmp_path / "set" / f"{name}.tar", *sample("a", number))
    with pytest.raises(InputError, match="shards of several splits") as refused:
        open_dataset(str(tmp_path / "set"), split)
    assert "train-0000.tar" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train-{}.tar", "val-{}.tar"),
        ("imagenet1k-train-{:04d}.tar", "imagenet1k-validation-{:02d}.tar"),
        ("imagenet-train-{:06d}.tar", "imagenet-val-{:06d}.tar"),
        ("train/{:05d}.tar", "val/{:05d}.tar"),
        ("train-{:05d}-of-01024.tar", "validation/{:05d}.tar"),
    ],
)
def test_the_usual_layouts_of_imagenet_are_found_in_the_order_of_their_names(tmp_path, train, val):
    for number in (2, 0, 1):
        shard(tmp_path / train.format(number), *sample("a", 0, number), *sample("b", 4, 10 + number))
    shard(tmp_path / val.format(0), *sample("c", 1, 20))
    found = {split: open_dataset(str(tmp_path), split) for split in ("train", "val", "test")}
    assert [int(label) for label in found["train"].labels] == [0, 4, 0, 4, 0, 4]
    names = [Path(found["train"].where(i).rpartition(": ")[0]) for i in range(6)]
    assert names == sorted(names)
    # The last class has no image in val; the splits agree all the same.
    assert {one.class_names for one in found.values()} == {("0", "1", "2", "3", "4")}
    assert shown(found["val"]) == shown(found["test"]), "ImageNet's labelled test images are val"


def test_hidden_files_are_no_shards(tmp_path):
    """macOS packs one beside each file, and rsync writes to one."""
    for split in ("train", "val"):
        shard(tmp_path / f"{split}-0000.tar", *sample("a", 0))
        (tmp_path / f"._{split}-0000.tar").write_bytes(b"\0\5\x16\7")
        (tmp_path / f".{split}-0001.tar").write_bytes(b"")
    assert [len(open_dataset(str(tmp_path), split)) for split in ("train", "val", "test")] == [1, 1, 1]


def test_a_folder_is_no_shard_whatever_its_name(tmp_path):
    shard(tmp_path / "train-0000.tar", *sample("a", 0))
    (tmp_path / "train-0001.tar").mkdir()
    assert len(open_dataset(str(tmp_path), "train")) == 1


def test_shards_named_after_no_split_are_the_test_split(tmp_path):
    folder = shard(tmp_path / "set" / "0.tar", *sample("a", 0)).parent
    assert len(open_dataset(str(folder), "test")) == 1
    with pytest.raises(InputError, match="no shards of the split train") as refused:
        open_dataset(str(folder), "train")
    assert "test" in str(refused.value.hint)


def test_archives_beside_the_class_folders_unpacked_from_them_are_left_alone(tmp_path):
    for split in ("train", "val"):
        for name in ("n1", "n2"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.JPEG").write_bytes(encoded(0))
            shard(tmp_path / split / f"{name}.tar", ("a.JPEG", encoded(0)))
        shard(tmp_path / f"ILSVRC2012_img_{split}.tar", ("a.JPEG", encoded(0)))
    (tmp_path / "devkit.tar.gz").write_bytes(b"\x1f\x8b")
    for split in ("train", "val", "test"):
        assert open_dataset(str(tmp_path), split).class_names == ("n1", "n2")


def test_a_sample_is_all_members_of_one_name_up_to_its_first_dot(tmp_path):
    described = json.dumps({"label": 2, "filename": "n01440764_1.JPEG", "boxes": [[1, 2, 3, 4]]}).encode()
    path = shard(
        tmp_path / "val-0.tar",
        ("__meta__.json", b"{}"),
        ("._a.jpg", b"what macOS packs"),
        ("a.JPEG", encoded(1)),
        ("a.seg.png", b"a mask, not the image"),
        ("a.json", described),
        ("b.cls", b"1"),
        ("b.json", described),
        ("b.png", encoded(2, "PNG")),
        ("d/b.json", b'{"label":0}'),
        ("d/b.webp", encoded(3, "WEBP")),
    )
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("d.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    found = open_dataset(str(tmp_path), "val")
    assert list(found.labels) == [2, 1, 0]
    assert [found.where(i).rpartition(": ")[2] for i in range(3)] == ["a", "b", "d/b"]
    assert shown(found)[1] == np.asarray(Image.open(io.BytesIO(encoded(2, "PNG")))).tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_image_that_folders_hold_is_read_from_shards(tmp_path, suffix):
    kind = Image.registered_extensions()[suffix]
    shard(tmp_path / "val-0.tar", (f"a{suffix}", encoded(0, kind)), ("a.cls", b"0"))
    assert open_dataset(str(tmp_path), "val").read(0).size == (24, 20)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "cat\ndog\n\n"),
        ("classes.txt", "\ufeffcat\ndog\n"),
        ("synset_words.txt", "cat a small animal\ndog a larger, louder one\n"),
    ],
)
@pytest.mark.parametrize("place", [".", "val"])
def test_names_of_classes_come_from_a_file_beside_the_shards_or_above(tmp_path, file, text, place):
    shard(tmp_path / "val" / "0.tar", *sample("a", 0))
    (tmp_path / place / file).write_text(text)
    assert open_dataset(str(tmp_path), "val").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "said"), [(b"cat\ncat\n", "'cat' twice"), (b"\n", "no class"), (b"\xff\n", "cannot be read")]
)
def test_a_file_of_classes_that_tells_none_apart_is_refused(tmp_path, text, said):
    shard(tmp_path / "val-0.tar", *sample("a", 0))
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(InputError, match=said) as refused:
        open_dataset(str(tmp_path), "val")
    assert "classes.txt" in refused.value.message


def test_a_label_beyond_the_classes_is_refused_by_shard_and_key(tmp_path):
    shard(tmp_path / "val-0.tar", *sample("a", 0), *sample("b", 2))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"val-0\.tar: b: its label is 2, but there are 2 classes"):
        open_dataset(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "holds no sample"),
        ([("notes", b"x")], "notes: has no image"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"0")], "a: has no label"),
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0")], "b: has no image"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "a: has two images"),
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("a.CLS", b"1")], r"a: has two labels \(\.CLS\)"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], r"a\.cls: holds no label"),
        ([("a.jpg", b"x"), ("a.cls", b"")], r"a\.cls: holds no label"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], r"a\.cls: the label -1"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 12)], r"a\.cls: the label 9"),
        ([("a.jpg", b"x"), ("a.json", b'{"labels":0}')], r"a\.json: holds no label"),
        ([("a.jpg", b"x"), ("a.json", b'{"label":"cat"}')], r"a\.json: holds no label"),
        ([("a.jpg", b"x"), ("a.json", b"{")], r"a\.json: holds no label"),
    ],
)
def test_a_shard_that_lacks_something_is_refused_by_shard_and_key(tmp_path, members, said):
    shard(tmp_path / "val-0.tar", *sample("fine", 0))
    shard(tmp_path / "val-1.tar", *members)
    with pytest.raises(InputError, match=said) as refused:
        open_dataset(str(tmp_path), "val")
    assert refused.value.message.startswith(str(tmp_path / "val-1.tar"))


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, b"\x1f\x8b" + b"0" * 600])
def test_what_is_no_tar_file_is_refused_by_its_name(tmp_path, data):
    (tmp_path / "val-0.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"val-0\.tar: not a readable tar file"):
        open_dataset(str(tmp_path), "val")


def test_a_shard_that_goes_on_after_its_end_is_refused_not_cut_off_there(tmp_path):
    """As cat makes one of two."""
    whole = (
        shard(tmp_path / "one", *sample("a", 0)).read_bytes() + shard(tmp_path / "two", *sample("b", 1)).read_bytes()
    )
    (tmp_path / "val-0.tar").write_bytes(whole)
    with pytest.raises(InputError, match=r"val-0\.tar: goes on after its end, at byte \d+") as refused:
        open_dataset(str(tmp_path), "val")
    assert "cat does not make one shard of several" in str(refused.value.hint)


@pytest.mark.parametrize("name", ["val-0.tar.gz", "val-0.tgz", "val-0.tar.zst"])
def test_compressed_shards_are_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="compressed") as refused:
        open_dataset(str(tmp_path), "val")
    assert "unpack" in str(refused.value.hint)


@settings(max_examples=60)
@given(st.data())
def test_a_shard_cut_off_anywhere_is_refused_when_it_is_opened(tmp_path, data):
    whole = shard(tmp_path / "whole.tar", *(member for i in range(3) for member in sample(f"k{i}", i, i))).read_bytes()
    # What follows the first block of zeros is padding.
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    cut = data.draw(st.one_of(st.integers(0, end + 511), st.integers(0, end // 512).map(lambda block: block * 512)))
    path = tmp_path / "cut" / "val-0.tar"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError, match=r"val-0\.tar: "):
        open_dataset(str(tmp_path / "cut"), "val")


@settings(max_examples=150)
@given(st.data())
def test_a_shard_with_a_damaged_byte_gives_images_or_an_error_that_names_it(tmp_path, data):
    whole = bytearray(shard(tmp_path / "whole.tar", *sample("a", 0, 1), *sample("b", 1, 2)).read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged" / "val-0.tar"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(whole)
    with suppress(InputError), named(path):
        found = open_dataset(str(tmp_path / "damaged"), "val")
        for i in range(len(found)):
            found.read(i)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Whatever is refused in the block is said to be in that file."""
    try:
        yield
    except InputError as error:
        if str(path) not in error.message:
            pytest.fail(f"{error.message} does not name {path}")
        raise


def test_a_bad_image_is_named_by_its_shard_and_key_when_it_is_read(tmp_path):
    whole = encoded(0)
    members = [("cut.jpg", whole[: len(whole) // 2]), ("cut.cls", b"0"), ("none.jpg", b"text"), ("none.cls", b"0")]
    thin = encoded(0, "PNG", (1, 5000))
    path = shard(
        tmp_path / "val-0.tar",
        *members,
        ("empty.jpg", b""),
        ("empty.cls", b"0"),
        ("thin.png", thin),
        ("thin.cls", b"0"),
    )
    found = open_dataset(str(tmp_path), "val")
    for i, key in enumerate(("cut", "none", "empty")):
        with pytest.raises(InputError) as refused:
            found.read(i)
        assert refused.value.message.startswith(f"{path}: {key}: ")
    with pytest.raises(InputError) as refused:
        found.pixels(3, spec(crop_pct=0.001))
    assert refused.value.message.startswith(f"{path}: thin: ")


def test_a_bad_image_of_a_folder_is_named_by_its_path(tmp_path):
    whole = encoded(0)
    for name, data in (("0.JPEG", whole[: len(whole) // 2]), ("1.png", encoded(0, "PNG", (1, 5000)))):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    found = open_dataset(str(tmp_path), "test")
    with pytest.raises(InputError, match=r"a/0\.JPEG: cannot be read as an image"):
        found.read(0)
    with pytest.raises(InputError, match=r"a/1\.png: cannot be prepared"):
        found.pixels(1, spec(crop_pct=0.001))


def scanned(monkeypatch) -> list[str]:
    """The names of the shards whose headers are read from now on."""
    names: list[str] = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda path: names.append(path.name) or scan(path))
    return names


def three(tmp_path) -> Path:
    for i in range(3):
        shard(tmp_path / "set" / f"val-{i}.tar", *sample(f"a{i}", i, i), *sample("b", 0, 10 + i))
    return tmp_path / "set"


def test_a_second_opening_reads_no_headers_and_gives_the_same(tmp_path, monkeypatch, cache):
    folder = three(tmp_path)
    first = open_dataset(str(folder), "val")
    assert len(list(cache.iterdir())) == 1
    names = scanned(monkeypatch)
    again = open_dataset(str(folder), "val")
    assert names == []
    assert np.array_equal(first.labels, again.labels)
    assert [first.where(i) for i in range(6)] == [again.where(i) for i in range(6)]
    assert shown(first) == shown(again)


def test_only_shards_that_changed_or_are_new_are_read_again(tmp_path, monkeypatch, cache):
    folder = three(tmp_path)
    open_dataset(str(folder), "val")
    names = scanned(monkeypatch)
    shard(folder / "val-1.tar", *sample("new", 2, 99))
    shard(folder / "val-3.tar", *sample("more", 1, 98))
    found = open_dataset(str(folder), "val")
    assert names == ["val-1.tar", "val-3.tar"]
    assert list(found.labels) == [0, 0, 2, 2, 0, 1]
    assert shown(found)[2] == np.asarray(Image.open(io.BytesIO(encoded(99)))).tobytes()
    names.clear()
    (folder / "val-0.tar").unlink()
    assert len(open_dataset(str(folder), "val")) == 4
    assert len(open_dataset(str(folder), "val")) == 4
    assert names == []
    assert len(list(cache.iterdir())) == 1


def test_a_shard_of_the_same_size_that_was_written_anew_is_read_again(tmp_path, monkeypatch):
    path = shard(tmp_path / "set" / "val-0.tar", ("a.png", encoded(1, "PNG")), ("a.cls", b"0"))
    open_dataset(str(path.parent), "val")
    size, names = path.stat().st_size, scanned(monkeypatch)
    shard(path, ("a.png", encoded(2, "PNG")), ("a.cls", b"3"))
    assert path.stat().st_size == size
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert list(open_dataset(str(path.parent), "val").labels) == [3]
    assert names == ["val-0.tar"]


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_cache_is_made_again(tmp_path, cache, data):
    folder = tmp_path / "set"
    if not folder.exists():
        three(tmp_path)
    expected = [open_dataset(str(folder), "val").where(i) for i in range(6)]
    (file,) = cache.iterdir()
    whole = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(whole)
    found = open_dataset(str(folder), "val")
    assert [found.where(i) for i in range(6)] == expected
    assert list(found.labels) == [0, 0, 1, 0, 2, 0]
    assert len(shown(found)) == 6


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, cache):
    folder = three(tmp_path)
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    assert len(open_dataset(str(folder), "val")) == 6


def test_a_shard_that_changed_after_it_was_opened_is_refused_not_misread(tmp_path):
    folder = three(tmp_path)
    found = open_dataset(str(folder), "val")
    shard(folder / "val-0.tar", *sample("another", 0, 5), *sample("b", 0, 6))
    os.utime(folder / "val-0.tar", ns=(0, 1))
    with pytest.raises(InputError, match=r"val-0\.tar: has changed since"):
        found.read(0)
    (folder / "val-1.tar").unlink()
    with pytest.raises(InputError, match=r"val-1\.tar: cannot be opened"):
        found.read(2)
    found.read(4)
    with (folder / "val-2.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(InputError, match=r"val-2\.tar: b: the shard ends in this image"):
        found.read(5)


def _read_some(dataset, seed: int) -> list[tuple[int, bytes]]:
    order = np.random.default_rng(seed).integers(0, len(dataset), 60)
    return [(int(i), np.asarray(dataset.read(int(i))).tobytes()) for i in order]


def test_threads_and_forked_processes_read_at_once_through_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_OPEN", 2)
    for i in range(5):
        shard(tmp_path / "set" / f"val-{i}.tar", *(m for j in range(4) for m in sample(f"{i}{j}", i, 4 * i + j)))
    found = open_dataset(str(tmp_path / "set"), "val")
    expected = dict(enumerate(shown(found)))
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as threads:
        for read in threads.map(lambda seed: _read_some(found, seed), range(8)):
            assert all(expected[i] == pixels for i, pixels in read)
    assert len(os.listdir("/proc/self/fd")) <= before
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe() for _ in range(3)]

    def work(pipe, seed: int) -> None:
        pipe.send(_read_some(found, seed))

    processes = [fork.Process(target=work, args=(pipe, seed)) for seed, (_, pipe) in enumerate(pipes)]
    for process in processes:
        process.start()
    assert all(expected[i] == pixels for i, pixels in _read_some(found, 9))
    for process, (ours, theirs) in zip(processes, pipes, strict=True):
        assert ours.poll(30)
        assert all(expected[i] == pixels for i, pixels in ours.recv())
        process.join(30)
        assert process.exitcode == 0
        ours.close()
        theirs.close()


def test_samples_are_taken_from_the_held_out_shards(tmp_path):
    for split, seed in (("train", 0), ("val", 100)):
        members = [entry for i in range(6) for entry in sample(f"{i:02d}", i % 2, seed + i)]
        shard(tmp_path / "set" / f"{split}-00.tar", *members)
    found = samples.read(tmp_path / "set", spec(), 3)
    held_out = open_dataset(str(tmp_path / "set"), "val")
    assert found.source == "set"
    assert np.array_equal(found.images, np.stack([held_out.pixels(i, spec()) for i in (0, 2, 4)]))
