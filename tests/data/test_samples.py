"""Images to check artifacts with: made from a seed, out of a folder, out of an .npz file."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hydradeploy.data.preprocess import load_image
from hydradeploy.data.samples import is_synthetic, read, synthetic
from hydradeploy.errors import InputError, UsageError
from tests.conftest import geometry, spec


def arrays(path, compressed=False, **content):
    """An .npz file."""
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


def pixels(count=4, size=32, channels=3, seed=0):
    """Images already cropped."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def flat(path, value):
    """An image file of one gray value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (value,) * 3).save(path)
    return path


def test_only_made_images_count_as_made():
    assert is_synthetic(synthetic(spec(), 1, seed=12).source)
    assert not is_synthetic("synthetic-photos")


def test_made_images_are_the_same_for_the_same_seed_and_others_for_another():
    one, same, other = synthetic(spec(), 4, seed=3), synthetic(spec(), 4, seed=3), synthetic(spec(), 4, seed=4)
    assert np.array_equal(one.images, same.images)
    assert not np.array_equal(one.images, other.images)
    assert one.source == "synthetic, seed 3"


def test_made_images_do_not_depend_on_numpys_own_state():
    np.random.seed(1)
    one = synthetic(spec(), 2)
    np.random.seed(2)
    assert np.array_equal(one.images, synthetic(spec(), 2).images)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [8, 32])
def test_made_images_have_the_geometrys_shape_and_differ_from_each_other(channels, size):
    images = synthetic(spec(geometry(channels=channels, image_size=size)), 3).images
    assert images.shape == (3, size, size, channels)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 3


def test_made_images_are_smooth_and_use_the_range():
    images = synthetic(spec(geometry(image_size=64, patch_size=8)), 4).images.astype(int)
    assert images.std() > 40
    assert np.abs(np.diff(images, axis=1)).mean() < 0.6 * np.abs(images[:, ::8] - images[:, ::-8]).mean()


def test_a_folder_is_searched_through_and_other_files_are_left(tmp_path):
    folder = tmp_path / "imagenet"
    values = {"a.png": 10, "n01/b.JPG": 60, "n01/deep/c.jpeg": 110, "n02/d.bmp": 160, "n02/e.webp": 210}
    for name, value in values.items():
        flat(folder / name, value)
    (folder / "n01" / "labels.txt").write_text("no image")
    found = read(folder, spec(), 10)
    assert found.source == "imagenet"
    assert found.images.shape == (5, 32, 32, 3)
    assert [round(float(image.mean()), -1) for image in found.images] == [10, 60, 110, 160, 210]


def test_of_a_folder_of_splits_the_val_part_is_taken(tmp_path):
    for split, value in (("train", 10), ("val", 60), ("test", 110)):
        flat(tmp_path / split / "n01" / "a.png", value)
    found = read(tmp_path, spec(), 10)
    assert [round(float(image.mean()), -1) for image in found.images] == [60]
    assert found.source == tmp_path.name


def test_images_of_a_folder_are_preprocessed(tmp_path, image):
    found = read(image.parent, spec(), 1)
    assert np.array_equal(found.images[0], load_image(image, spec()))


@pytest.mark.parametrize("count", [1, 3, 4, 7, 12])
def test_few_images_of_a_folder_are_spread_evenly_over_its_classes(tmp_path, count):
    for label in range(4):
        for i in range(3):
            flat(tmp_path / f"n{label}" / f"{i}.png", 60 * label)
    found = read(tmp_path, spec(), count)
    per_class = [sum(int(image[0, 0, 0]) == 60 * label for image in found.images) for label in range(4)]
    assert len(found.images) == count
    assert max(per_class) - min(per_class) <= 1


def test_an_empty_folder_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="no image in it") as refused:
        read(tmp_path, spec(), 3)
    assert str(tmp_path) in refused.value.message


def test_a_broken_image_in_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png"):
        read(tmp_path, spec(), 3)


def test_a_directory_named_like_an_image_is_no_image(tmp_path):
    flat(tmp_path / "n01.png" / "a.png", 100)
    assert read(tmp_path, spec(), 3).images.shape == (1, 32, 32, 3)


def test_what_is_not_there_is_a_usage_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder") as refused:
        read(tmp_path / "absent", spec(), 3)
    assert ".npz" in refused.value.hint


@pytest.mark.parametrize("compressed", [False, True])
def test_images_of_an_npz_file_are_taken_as_they_are(tmp_path, compressed):
    found = read(arrays(tmp_path / "a.npz", compressed, images=pixels(), labels=np.arange(4)), spec(), 10)
    assert np.array_equal(found.images, pixels())
    assert found.source == "a.npz"


@pytest.mark.parametrize("taken", [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]])
def test_few_images_of_an_npz_file_are_spread_evenly(tmp_path, taken):
    found = read(arrays(tmp_path / "a.npz", images=pixels()), spec(), len(taken))
    assert np.array_equal(found.images, pixels()[taken])


def test_of_an_npz_file_of_splits_the_val_part_is_taken_as_of_other_data_sets(tmp_path):
    """What a supernet was trained with is what it is exported with, and of any size."""
    splits = {"train_images": pixels(size=40), "val_images": pixels(size=40)[:2], "test_images": pixels(size=40)}
    labels = {name.replace("images", "labels"): np.arange(len(images)) for name, images in splits.items()}
    found = read(arrays(tmp_path / "a.npz", **splits, **labels), spec(), 10)
    assert found.images.shape == (2, 32, 32, 3)
    assert found.source == "a.npz"
    apart = pixels()
    assert np.array_equal(read(arrays(tmp_path / "a.npz", images=apart, **splits, **labels), spec(), 4).images, apart)


def test_a_gray_network_takes_gray_images(tmp_path):
    found = read(arrays(tmp_path / "a.npz", images=pixels(channels=1)), spec(geometry(channels=1)), 4)
    assert found.images.shape == (4, 32, 32, 1)


@pytest.mark.parametrize(
    "images",
    [
        pixels().astype(np.float32),
        pixels().astype(np.int8),
        pixels(size=31),
        pixels(channels=1),
        pixels()[0],
        pixels().transpose(0, 3, 1, 2),
        np.array(3, np.uint8),
        pixels().astype("V1"),
        np.array(["a"]),
    ],
    ids=lambda value: f"{value.dtype} {value.shape}",
)
def test_images_of_another_type_or_shape_are_refused_with_what_was_expected(tmp_path, images):
    path = arrays(tmp_path / "a.npz", images=images)
    with pytest.raises(InputError, match=r"expected uint8 \(n, 32, 32, 3\)") as refused:
        read(path, spec(), 4)
    assert str(path) in refused.value.message
    assert f"{images.dtype} {images.shape}" in refused.value.message


def test_no_images_in_an_npz_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="is empty"):
        read(arrays(tmp_path / "a.npz", images=pixels(0)), spec(), 4)


def test_an_npz_file_without_the_array_is_refused_with_its_name(tmp_path):
    with pytest.raises(InputError, match="holds no array `images`"):
        read(arrays(tmp_path / "a.npz", pictures=pixels()), spec(), 4)


class Opens:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickled_array_is_refused_and_nothing_in_it_runs(tmp_path):
    path = arrays(tmp_path / "a.npz", images=np.array([Opens(tmp_path / "marker")], dtype=object))
    with pytest.raises(InputError, match=r"a\.npz: not a readable"):
        read(path, spec(), 4)
    assert not (tmp_path / "marker").exists()
    with np.load(path, allow_pickle=True) as file:
        file["images"][0].close()
    assert (tmp_path / "marker").exists()


def refused(path):
    """Read a file that must be refused by name."""
    with pytest.raises(InputError) as caught:
        read(path, spec(), 4)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_npz_file_is_refused_wherever_it_ends(tmp_path, compressed):
    path = arrays(tmp_path / "a.npz", compressed, images=pixels())
    data = path.read_bytes()
    for cut in (*range(12), *range(12, len(data), len(data) // 60), len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path)


@pytest.mark.parametrize("content", [b"text", b"\x80\x04\x95", b"\x93NUMPY", b"PK\x03\x04"])
def test_a_file_that_is_no_npz_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz")


def test_a_bare_npy_file_is_refused_by_name(tmp_path):
    np.save(tmp_path / "a.npy", pixels())
    refused(tmp_path / "a.npy")


def test_an_archive_whose_images_are_no_array_is_refused_by_name(tmp_path):
    for name in ("images", "images.npy"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr(name, "hello")
        refused(tmp_path / "a.npz")


@settings(max_examples=100)
@given(st.booleans(), st.dictionaries(st.integers(-120, 250), st.integers(0, 255), min_size=1, max_size=3))
def test_an_npz_file_with_damaged_bytes_is_read_or_refused(tmp_path, compressed, changes):
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, images=pixels(1))
    damaged = bytearray(buffer.getvalue())
    for at, value in changes.items():
        damaged[at] = value
    path = tmp_path / "a.npz"
    path.write_bytes(damaged)
    try:
        found = read(path, spec(), 4)
    except InputError as error:
        assert str(path) in error.message  # noqa: PT017
    else:
        assert found.images.shape[1:] == (32, 32, 3)
