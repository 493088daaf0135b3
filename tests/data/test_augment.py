"""Augmentation: what is drawn, from where and in which range; nothing but the generator decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hydradeploy.data.augment import Augmentation, augmented, crop_box, erase
from hydradeploy.data.preprocess import prepare
from hydradeploy.errors import InputError
from tests.conftest import geometry, spec

# The published recipe's (hydravit.md, HydraViT's args_hydravit.yaml).
PUBLISHED = Augmentation(
    crop_scale=(0.08, 1.0), flip=0.5, randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0
)


def picture(width, height, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def seeded(number=0):
    return np.random.default_rng(number)


def test_by_default_nothing_is_varied():
    image = picture(50, 40)
    random = seeded()
    assert np.array_equal(augmented(image, spec(), Augmentation(), random, "i"), prepare(image, spec(), "i"))
    assert random.random() == seeded().random(), "something was drawn"


@settings(max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["L", "RGB", "RGBA"]),
    st.sampled_from([1, 3]),
    st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_any_image_becomes_what_the_network_takes_the_same_for_the_same_generator(
    width, height, mode, channels, interpolation, seed, crops
):
    how = PUBLISHED if crops else Augmentation(shift=0.2, flip=0.5, randaugment="rand-n4-m10-inc1")
    wanted = spec(geometry(channels=channels), interpolation=interpolation)
    image = picture(width, height, mode)
    one, two = (augmented(image, wanted, how, seeded(seed), "i") for _ in range(2))
    assert (one.dtype, one.shape) == (np.uint8, (32, 32, channels))
    assert np.array_equal(one, two)


def test_no_two_draws_are_alike_and_numpys_own_generator_has_no_say():
    image = picture(60, 60)
    random = seeded()
    drawn = [augmented(image, spec(), PUBLISHED, random, "i").tobytes() for _ in range(8)]
    assert len(set(drawn)) == 8
    np.random.seed(1)
    assert augmented(image, spec(), PUBLISHED, seeded(), "i").tobytes() == drawn[0]


def test_a_certain_flip_mirrors_left_and_right():
    image = picture(50, 40)
    found = augmented(image, spec(), Augmentation(flip=1.0), seeded(), "i")
    assert np.array_equal(found, prepare(image, spec(), "i")[:, ::-1])


def test_flips_are_as_frequent_as_asked_for():
    image = picture(32, 32)
    still = augmented(image, spec(), Augmentation(), seeded(), "i").tobytes()
    random = seeded()
    flipped = sum(augmented(image, spec(), Augmentation(flip=0.3), random, "i").tobytes() != still for _ in range(2000))
    assert abs(flipped / 2000 - 0.3) < 0.04


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_shows_a_window_of_the_image_with_its_border_repeated(channels):
    wanted = spec(geometry(channels=channels))
    image = picture(50, 40)
    padded = np.pad(prepare(image, wanted, "i"), ((4, 4), (4, 4), (0, 0)), mode="edge")
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    random = seeded()
    places = [windows[augmented(image, wanted, Augmentation(shift=0.125), random, "i").tobytes()] for _ in range(1500)]
    assert set(places) == set(windows.values())
    assert np.abs(np.mean(places, 0) - 4).max() < 0.3


def test_a_crop_of_everything_is_the_whole_image_resized():
    image = picture(90, 90)
    how = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    found = augmented(image, spec(), how, seeded(), "i")
    assert np.array_equal(found, np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_a_crop_is_resized_by_itself_so_that_pixels_beyond_it_have_no_say():
    image = picture(200, 150)
    how = Augmentation(crop_scale=(0.1, 0.4))
    left, top, right, bottom = crop_box(image.size, (0.1, 0.4), (3 / 4, 4 / 3), seeded(3))
    inside = Image.fromarray(np.asarray(image)[top:bottom, left:right])
    for interpolation in ("bilinear", "bicubic"):
        found = augmented(image, spec(interpolation=interpolation), how, seeded(3), "i")
        resampling = Image.Resampling[interpolation.upper()]
        assert np.array_equal(found, np.asarray(inside.resize((32, 32), resampling)))


def test_crops_are_uniform_in_area_in_the_logarithm_of_the_ratio_and_in_place():
    random, size = seeded(), (1000, 800)
    boxes = np.array([crop_box(size, (0.1, 0.3), (3 / 4, 4 / 3), random) for _ in range(8000)], float)
    left, top, right, bottom = boxes.T
    across, down = right - left, bottom - top
    assert uniform(across * down / 800_000, 0.1, 0.3)
    assert uniform(np.log(across / down), np.log(3 / 4), np.log(4 / 3))
    assert uniform(left / (1000 - across), 0, 1)
    assert uniform(top / (800 - down), 0, 1)


def uniform(values, low, high):
    """Whether no quantile is farther off than chance has it (Kolmogorov and Smirnov, 1 in 10,000)."""
    places = np.sort((values - low) / (high - low))
    off = np.abs(places - np.linspace(0, 1, len(places))).max()
    return off < 2.23 / np.sqrt(len(places)) + 1 / 400  # whole pixels


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    st.integers(0, 2**32),
)
def test_every_crop_is_inside_and_has_pixels(width, height, scale, ratio, seed):
    left, top, right, bottom = crop_box((width, height), tuple(scale), tuple(ratio), seeded(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1)), ((1, 9), (0, 4, 1, 5))],
)
def test_where_no_crop_fits_it_is_the_largest_one_in_the_middle(size, box):
    assert crop_box(size, (1.0, 1.0), (3 / 4, 4 / 3), seeded()) == box


def test_what_was_moved_out_shows_the_mean_colour():
    how = Augmentation(randaugment="rand-m10-n30")
    wanted = spec(mean=(0.2, 0.4, 0.8), std=(1.0, 1.0, 1.0), crop_pct=1.0, interpolation="lanczos")
    seen: set[tuple[int, ...]] = set()
    for seed in range(20):
        found = augmented(
            Image.new("RGB", (32, 32), (255, 0, 0)), wanted, Augmentation(randaugment="rand-m10-n1"), seeded(seed), "i"
        )
        seen |= {tuple(pixel) for pixel in found.reshape(-1, 3).tolist()}
    assert (51, 102, 204) in seen
    assert augmented(picture(32, 32), wanted, how, seeded(), "i").shape == (32, 32, 3)


def test_an_image_that_cannot_be_shown_is_named():
    for how in (Augmentation(), PUBLISHED):
        with pytest.raises(InputError, match=r"shard 3, key 7: .*wants 4"):
            augmented(picture(8, 8), spec(geometry(channels=4)), how, seeded(), "shard 3, key 7")


@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_puts_noise_into_one_box_as_large_as_it_may_be(channels):
    how, random = Augmentation(erasing=1.0), seeded()
    shares, ratios, noise = [], [], []
    for _ in range(600):
        image = np.full((channels, 64, 64), 9.0, np.float32)
        erase(image, how, random)
        rows, columns = (np.flatnonzero((image[0] != 9.0).any(axis)) for axis in (1, 0))
        box = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box != 9.0).all()
        assert (image != 9.0).sum() == box.size
        shares.append(box[0].size / 64**2)
        ratios.append(len(rows) / len(columns))
        noise.append(box.ravel())
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert 0.015 < min(shares) < 0.03
    assert 0.30 < max(shares) < 0.35
    assert 0.25 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 4
    assert abs(np.mean(np.log(ratios))) < 0.1


def test_erasing_is_as_frequent_as_asked_for_and_the_same_for_the_same_generator():
    random, images = seeded(), np.zeros((2000, 1, 16, 16), np.float32)
    for image in images:
        erase(image, Augmentation(erasing=0.25), random)
    assert abs(images.any((1, 2, 3)).mean() - 0.25) < 0.04
    again, random = np.zeros_like(images), seeded()
    for image in again:
        erase(image, Augmentation(erasing=0.25), random)
    assert np.array_equal(images, again)


def test_without_erasing_an_image_stays_as_it_is():
    image = np.zeros((3, 16, 16), np.float32)
    for seed in range(50):
        erase(image, Augmentation(), seeded(seed))
    assert not image.any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_erasing_a_tiny_image_leaves_its_shape(size):
    for seed in range(20):
        image = np.zeros((1, size, size), np.float32)
        erase(image, Augmentation(erasing=1.0), seeded(seed))
        assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shift", -0.1),
        ("shift", 0.5),
        ("shift", float("nan")),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_ratio", (0.0, 1.0)),
        ("crop_ratio", (2.0, 1.0)),
        ("crop_ratio", (1.0, float("inf"))),
        ("flip", 1.1),
        ("flip", float("nan")),
        ("erasing", -0.1),
        ("mixup", -1.0),
        ("cutmix", float("inf")),
        ("randaugment", "rand-m9-w0"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})


def test_a_shift_of_random_crops_is_refused():
    with pytest.raises(ValueError, match="shift must be 0 with a crop_scale"):
        Augmentation(shift=0.1, crop_scale=(0.08, 1.0))
