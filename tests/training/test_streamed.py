"""Images read as they are needed: the same whoever reads them, exact when a run goes on, and bad ones counted."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from hydradeploy import train
from hydradeploy.data.augment import Augmentation
from hydradeploy.data.datasets import open_dataset
from hydradeploy.errors import InputError, UsageError
from hydradeploy.training import metrics
from hydradeploy.training import state as states
from hydradeploy.training.batches import Order, Share, Streamed, source
from hydradeploy.training.presets import HYDRAVIT_IMAGENET, SMALL
from hydradeploy.training.recipe import Preset
from hydradeploy.training.running import Running
from tests.conftest import geometry

SHAPE = geometry(
    image_size=16, patch_size=8, channels=3, head_dim=8, heads=3, trained_heads=(1, 2, 3), depth=1, mlp_ratio=2.0
)


def preset(**changes: object) -> Preset:
    """The paper's recipe in little."""
    little = {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "cooldown_epochs": 1}
    recipe = msgspec.structs.replace(HYDRAVIT_IMAGENET.recipe, **(little | changes))
    return msgspec.structs.replace(HYDRAVIT_IMAGENET, geometry=SHAPE, recipe=recipe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of 8 images to train on and 4 held out, as ImageNet lies on disk."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("n01", "n02", "n03"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPEG")
    return root


def test_everything_of_the_recipe_trains_from_folders(folder, tmp_path):
    trained = train(str(folder), tmp_path / "s", preset(), running=Running(workers=2))
    assert set(trained.top1) == {1, 2, 3}
    assert trained.spec.class_names == ("n01", "n02", "n03")
    assert trained.spec.preprocessing.crop_pct == 0.875
    assert [line.epoch for line in metrics.read(tmp_path / "s")] == [1, 2, 3]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_readers_changes_no_bit(folder, tmp_path, workers):
    train(str(folder), tmp_path / "none", preset(), running=Running(workers=0))
    train(str(folder), tmp_path / "some", preset(), running=Running(workers=workers))
    assert (tmp_path / "none").read_bytes() == (tmp_path / "some").read_bytes()


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_stopped_run_that_goes_on_is_the_run_that_was_not_stopped(folder, tmp_path, stop):
    def interrupting(what: str, done: int, total: int) -> None:
        if done == stop:
            signal.raise_signal(signal.SIGINT)

    train(str(folder), tmp_path / "whole", preset(), running=Running(workers=1))
    with pytest.raises(KeyboardInterrupt):
        train(str(folder), tmp_path / "s", preset(), running=Running(workers=2), report=interrupting)
    train(str(folder), tmp_path / "s", preset(), running=Running(workers=0), resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_signal_to_all_processes_ends_a_run_as_one_to_it_alone_does(folder, tmp_path):
    """As torchrun, batch systems and service managers send it: the readers must not die before the run has ended."""
    options = "--image-size 16 --patch-size 8 --head-dim 8 --trained-heads 1-3 --depth 1 --batch-size 8 --workers 2"
    command = [sys.executable, "-m", "hydradeploy", "train", "--data", str(folder), "--preset", "hydravit-imagenet"]
    run = subprocess.Popen(
        [*command, *options.split(), "--epochs", "2000", "--out", str(tmp_path / "s")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    told = ""
    while "epoch 1/" not in told:
        told += run.stderr.readline()
        assert run.poll() is None, told
    os.killpg(run.pid, signal.SIGTERM)
    told += run.communicate(timeout=100)[1]
    assert run.returncode == 130, told
    assert "is usable as it is; go on with --resume" in told
    assert states.load(tmp_path / "s").progress.step > 0


def test_an_image_is_varied_from_epoch_to_epoch_and_alike_in_one(folder):
    recipe, spec = preset().recipe, preset().spec(("n01", "n02", "n03"))
    images = source(open_dataset(str(folder), "train"), spec, recipe, 0)
    order = Order(24, 24, 0)

    def epoch(number: int) -> dict[int, np.ndarray]:
        (batch,) = images.steps(order, number, number + 1, Share())
        return dict(zip(map(int, order.of(number)[1]), batch.images.numpy(), strict=True))

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert all(np.array_equal(first[i], again[i]) for i in first)
    assert not any(np.array_equal(first[i], second[i]) for i in first)


def test_small_images_that_are_taken_whole_come_from_memory_and_are_those_on_disk(folder):
    spec = preset().spec(("n01", "n02", "n03"))
    dataset = open_dataset(str(folder), "val")
    plain = msgspec.structs.replace(preset().recipe, augment=Augmentation())
    held = source(dataset, spec, plain, 0)
    read = source(dataset, spec, preset().recipe, 0)
    assert isinstance(read, Streamed)
    assert not isinstance(held, Streamed)
    for one, other in zip(held.plainly(range(12)), read.plainly(range(12)), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """The same images, two of them damaged."""
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    for name in ("n01/3.JPEG", "n03/0.JPEG"):
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:200])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_stops_the_run_by_name(broken, tmp_path, workers):
    with pytest.raises(InputError, match=r"(n01/3|n03/0)\.JPEG.*1 images that cannot be read, 0 allowed") as refused:
        train(str(broken), tmp_path / "s", preset(), running=Running(workers=workers))
    assert "--bad-images" in str(refused.value.hint)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_many_as_are_allowed_are_named_once_counted_and_replaced(broken, tmp_path, workers):
    said: list[str] = []
    running = Running(workers=workers, bad_images=2)
    train(str(broken), tmp_path / "s", preset(), running=running, say=said.append)
    named = [line for line in said if "takes its place" in line]
    assert len(named) == 2
    assert {"n01/3.JPEG" in line for line in named} == {True, False}
    assert [line.bad_images for line in metrics.read(tmp_path / "s")][-1] == 2


@pytest.mark.parametrize("allowed", [0, 2])
def test_bad_images_of_a_set_that_is_kept_in_memory_are_counted_too(broken, tmp_path, allowed):
    whole = msgspec.structs.replace(preset(epochs=1), recipe=SMALL.recipe)
    whole = msgspec.structs.replace(whole, recipe=msgspec.structs.replace(SMALL.recipe, epochs=1, batch_size=8))
    said: list[str] = []
    running = Running(bad_images=allowed)
    if allowed:
        train(str(broken), tmp_path / "s", whole, running=running, say=said.append)
        assert sum("takes its place" in line for line in said) == 2
        assert metrics.read(tmp_path / "s")[-1].bad_images == 2
        return
    with pytest.raises(InputError, match=r"n01/3\.JPEG.*1 images that cannot be read, 0 allowed"):
        train(str(broken), tmp_path / "s", whole, running=running)


def test_an_image_in_memory_that_cannot_be_read_is_the_next_one_with_its_label(broken, folder):
    recipe = msgspec.structs.replace(SMALL.recipe, augment=Augmentation())
    spec = preset().spec(("n01", "n02", "n03"))
    damaged, sound = (
        next(source(open_dataset(str(place), "train"), spec, recipe, 0, 2).steps(Order(24, 24, 0), 0, 1, Share()))
        for place in (broken, folder)
    )
    order = Order(24, 24, 0).of(0)[1].tolist()
    for bad, other in ((3, 4), (16, 17)):
        assert torch.equal(damaged.images[order.index(bad)], sound.images[order.index(other)])
        assert damaged.labels[order.index(bad)] == sound.labels[order.index(other)]


@pytest.mark.parametrize("augment", [HYDRAVIT_IMAGENET.recipe.augment, SMALL.recipe.augment], ids=["read", "kept"])
def test_of_a_set_that_is_gone_no_more_images_are_tried_than_may_be_bad(folder, tmp_path, augment):
    """Its disk was unmounted, say: a million tries for every image of a batch would take hours."""
    tried: list[int] = []

    def gone(index: int) -> Image.Image:
        tried.append(index)
        raise InputError(f"{index}: no such image")

    dataset = replace(open_dataset(str(folder), "train"), read=gone)
    images = source(dataset, preset().spec(dataset.class_names), preset(augment=augment).recipe, 0, bad_images=2)
    (batch,) = images.steps(Order(24, 8, 0), 0, 1, Share())
    assert len(tried) <= 8 * 3
    assert len({index for index, _ in batch.bad}) > 2


def test_one_image_must_be_readable_however_many_may_not_be(folder, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    for path in (root / "train").rglob("*.JPEG"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"\(24 images that cannot be read, 1000 allowed\)"):
        train(str(root), tmp_path / "s", preset(), running=Running(workers=0, bad_images=1000))


def test_a_run_does_not_go_on_with_other_images_of_the_same_labels(folder, tmp_path):
    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    place = tmp_path / "images"
    shutil.copytree(folder, place)
    with pytest.raises(KeyboardInterrupt):
        train(str(place), tmp_path / "s", preset(), running=Running(workers=0), report=stop)
    moved = place.rename(tmp_path / "moved")
    (moved / "train/n01/0.JPEG").rename(moved / "train/n01/99.JPEG")
    with pytest.raises(UsageError, match="differs in the training images"):
        train(str(moved), tmp_path / "s", preset(), running=Running(workers=0), resume=True)
    (moved / "train/n01/99.JPEG").rename(moved / "train/n01/0.JPEG")
    train(str(moved), tmp_path / "s", preset(), running=Running(workers=0), resume=True)


def test_what_was_counted_is_kept_when_a_run_goes_on(broken, tmp_path):
    def interrupting(what: str, done: int, total: int) -> None:
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    running = Running(workers=0, bad_images=2)
    with pytest.raises(KeyboardInterrupt):
        train(str(broken), tmp_path / "s", preset(), running=running, report=interrupting)
    assert len(states.load(tmp_path / "s").progress.bad) == 2
    said: list[str] = []
    train(str(broken), tmp_path / "s", preset(), running=running, resume=True, say=said.append)
    assert not any("takes its place" in line for line in said)
    assert metrics.read(tmp_path / "s")[-1].bad_images == 2


def test_a_held_out_image_that_cannot_be_read_is_an_error_that_costs_no_epoch(folder, tmp_path):
    train(str(folder), tmp_path / "whole", preset(), running=Running(workers=1))
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    (root / "val" / "n02" / "1.JPEG").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"n02/1\.JPEG"):
        train(str(root), tmp_path / "s", preset(), running=Running(workers=1, bad_images=5))
    shutil.copy(folder / "val" / "n02" / "1.JPEG", root / "val" / "n02" / "1.JPEG")
    assert states.load(tmp_path / "s").progress.step == 3
    train(str(root), tmp_path / "s", preset(), running=Running(workers=1), resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def shards(folder: Path, root: Path) -> Path:
    """The same images as tar shards, ten samples each."""
    root.mkdir()
    for split in ("train", "val"):
        samples = [
            (path, label)
            for label, name in enumerate(("n01", "n02", "n03"))
            for path in sorted((folder / split / name).iterdir())
        ]
        for number, start in enumerate(range(0, len(samples), 10)):
            with tarfile.open(root / f"{split}-{number:04d}.tar", "w") as tar:
                for i, (path, label) in enumerate(samples[start : start + 10], start):
                    for suffix, data in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                        entry = tarfile.TarInfo(f"{i:06d}.{suffix}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
    return root


def arrays(folder: Path, root: Path) -> Path:
    """As many images of random pixels as there are in the folder, with its labels, in an .npz file."""
    root.mkdir()
    generator, found = np.random.default_rng(0), {}
    for split, count in (("train", 24), ("val", 12)):
        found[f"{split}_images"] = generator.integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
        found[f"{split}_labels"] = np.arange(count) * 3 // count
    np.savez(root / "set.npz", **found)
    return root / "set.npz"


def others_in_shards(path: Path) -> None:
    """Replace the images of a shard, by the same names, by others."""
    with tarfile.open(path / "train-0001.tar") as tar:
        members = [(entry.name, tar.extractfile(entry).read()) for entry in tar.getmembers()]
    with tarfile.open(path / "train-0001.tar", "w") as tar:
        for name, data in members:
            if name.endswith(".jpg"):
                out = io.BytesIO()
                Image.open(io.BytesIO(data)).rotate(180).save(out, "JPEG", quality=50)
                data = out.getvalue()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def others_in_arrays(path: Path) -> None:
    with np.load(path) as held:
        found = dict(held)
    found["train_images"][5, 3, 3, 0] ^= 1
    np.savez(path, **found)


@pytest.mark.parametrize(("made", "replace"), [(shards, others_in_shards), (arrays, others_in_arrays)])
def test_a_copy_is_gone_on_with_and_other_images_of_the_same_names_are_not(
    folder, tmp_path, monkeypatch, made, replace
):
    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, running = made(folder, tmp_path / "set"), Running(workers=0)
    with pytest.raises(KeyboardInterrupt):
        train(str(place), tmp_path / "s", preset(), running=running, report=stop)
    shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    replace(place)
    with pytest.raises(UsageError, match="differs in the training images"):
        train(str(place), tmp_path / "s", preset(), running=running, resume=True)
    copied = tmp_path / "copy" / place.relative_to(tmp_path / "set")
    train(str(copied), tmp_path / "s", preset(), running=running, resume=True)


def test_shards_train_as_the_folder_does(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(str(folder), tmp_path / "a", preset(), running=Running(workers=1))
    trained = train(str(shards(folder, tmp_path / "shards")), tmp_path / "b", preset(), running=Running(workers=1))
    assert trained.spec.class_names == ("0", "1", "2")
    # All but the names of the classes is the same.
    from hydradeploy.supernet.store import load

    one, other = load(tmp_path / "a").tensors, load(tmp_path / "b").tensors
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
