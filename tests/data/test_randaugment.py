"""RandAugment: each operation against arithmetic written out here, its ranges, and how often what is drawn."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hydradeploy.data import randaugment
from hydradeploy.data.randaugment import Canvas, Operation, Policy, operations, parse

NAMES = tuple(operations(True))
FILL = (10, 200, 90)
NEAREST = Canvas(FILL, Image.Resampling.NEAREST)
SIZE = 32


def picture(channels=3, seed=0, low=0, high=256):
    """Random pixels (32, 32, channels), no grey level used evenly."""
    values = np.random.default_rng(seed).beta(0.7, 1.6, (SIZE, SIZE, channels))
    return (low + values * (high - low)).astype(np.uint8)


def applied(name, pixels, level, resampling=Image.Resampling.NEAREST):
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    found = operations(True)[name].apply(image, level, Canvas(FILL[:channels], resampling))
    return np.asarray(found).reshape(SIZE, SIZE, channels)


def levels(name, strength, increasing=True, count=50):
    random = np.random.default_rng(0)
    return {operations(increasing)[name].level(strength, random) for _ in range(count)}


channels = pytest.mark.parametrize("channels", [1, 3])


def test_there_are_timms_fifteen():
    assert len(NAMES) == len(set(NAMES)) == 15
    assert set(operations(False)) == set(NAMES)


@channels
def test_invert(channels):
    pixels = picture(channels)
    assert np.array_equal(applied("Invert", pixels, 0), 255 - pixels)


@channels
@pytest.mark.parametrize("threshold", [0, 26, 128, 256])
def test_solarize_inverts_what_is_not_below_the_threshold(channels, threshold):
    pixels = picture(channels)
    assert np.array_equal(applied("Solarize", pixels, threshold), np.where(pixels < threshold, pixels, 255 - pixels))


@channels
@pytest.mark.parametrize("added", [0, 99, 110])
def test_solarize_add_makes_dark_pixels_lighter(channels, added):
    pixels = picture(channels)
    assert np.array_equal(applied("SolarizeAdd", pixels, added), pixels + np.where(pixels < 128, added, 0))


@channels
@pytest.mark.parametrize("bits", [0, 1, 4])
def test_posterize_keeps_the_leading_bits(channels, bits):
    pixels = picture(channels)
    step = 2 ** (8 - bits)
    assert np.array_equal(applied("Posterize", pixels, bits), pixels.astype(int) // step * step)


@channels
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_brightness_is_a_multiple(channels, factor):
    pixels = picture(channels)
    assert close(applied("Brightness", pixels, factor), pixels * factor)


@channels
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_contrast_goes_away_from_the_mean_grey(channels, factor):
    pixels = picture(channels)
    mean = np.floor(grey(pixels).mean() + 0.5)
    assert close(applied("Contrast", pixels, factor), mean + factor * (pixels - mean))


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_color_goes_away_from_each_pixels_grey(factor):
    pixels = picture()
    assert close(applied("Color", pixels, factor), grey(pixels) + factor * (pixels - grey(pixels)), 2)


@pytest.mark.parametrize("factor", [0.1, 1.9])
def test_color_leaves_a_grey_image_as_it_is(factor):
    pixels = picture(1)
    assert np.array_equal(applied("Color", pixels, factor), pixels)


@channels
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_sharpness_goes_away_from_the_smoothed_image(channels, factor):
    pixels = picture(channels).astype(np.float64)
    smooth = pixels.copy()
    around = sum(pixels[1 + y : SIZE - 1 + y, 1 + x : SIZE - 1 + x] for y in (-1, 0, 1) for x in (-1, 0, 1))
    smooth[1:-1, 1:-1] = np.floor((around + 4 * pixels[1:-1, 1:-1]) / 13 + 0.5)
    assert close(applied("Sharpness", pixels.astype(np.uint8), factor), smooth + factor * (pixels - smooth), 2)


@channels
def test_autocontrast_stretches_each_channel_to_the_whole_range(channels):
    pixels = picture(channels, low=40, high=180)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    assert close(applied("AutoContrast", pixels, 0), (pixels - low) * 255.0 / (high - low))


@channels
def test_equalize_makes_the_ranks_of_pixels_their_grey_levels(channels):
    pixels = picture(channels)
    found = applied("Equalize", pixels, 0)
    for channel in range(channels):
        plane = pixels[..., channel]
        counts = np.bincount(plane.ravel(), minlength=256)
        step = (counts.sum() - counts[plane.max()]) // 255
        below = np.cumsum(counts) - counts
        assert np.array_equal(found[..., channel], np.minimum(255, (step // 2 + below[plane]) // step))


@channels
@pytest.mark.parametrize("level", [-0.27, 0.27])
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ShearX", lambda x, y, level: (x + level * y, y)),
        ("ShearY", lambda x, y, level: (x, y + level * x)),
        ("TranslateX", lambda x, y, level: (x + level * SIZE, y)),
        ("TranslateY", lambda x, y, level: (x, y + level * SIZE)),
    ],
)
def test_moves_take_each_pixel_from_where_it_was_and_fill_the_rest(channels, level, name, source):
    pixels = picture(channels)
    assert np.array_equal(applied(name, pixels, level), moved(pixels, lambda x, y: source(x, y, level)))


@channels
@pytest.mark.parametrize("degrees", [-27.0, 13.0, 30.0])
def test_rotate_turns_against_the_clock_about_the_middle(channels, degrees):
    pixels = picture(channels)
    cos, sin, middle = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), SIZE / 2

    def source(x, y):
        right, down = x - middle, y - middle
        return middle + cos * right - sin * down, middle + sin * right + cos * down

    assert np.array_equal(applied("Rotate", pixels, degrees), moved(pixels, source))


@channels
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_moves_by_the_smooth_filters_stay_near_where_nearest_puts_a_smooth_image(channels, name, resampling):
    ramp = np.add.outer(np.arange(SIZE), np.arange(SIZE))[..., None].repeat(channels, 2).astype(np.uint8) * 3 + 40
    level = 20.0 if name == "Rotate" else 0.2
    near, smooth = applied(name, ramp, level).astype(int), applied(name, ramp, level, resampling).astype(int)
    inside = (near != FILL[:channels]).all(2) & (smooth != FILL[:channels]).all(2)
    assert inside.mean() > 0.6
    assert np.median(np.abs(near - smooth)[inside]) <= 3
    assert not np.array_equal(near, smooth)


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("Rotate", 0.9, {-27.0, 27.0}),
        ("ShearX", 0.9, {-0.27, 0.27}),
        ("ShearY", 1.0, {-0.3, 0.3}),
        ("TranslateX", 0.9, {-0.405, 0.405}),
        ("TranslateY", 0.5, {-0.225, 0.225}),
        ("Posterize", 0.0, {4}),
        ("Posterize", 0.9, {1}),
        ("Posterize", 1.0, {0}),
        ("Solarize", 0.0, {256}),
        ("Solarize", 0.9, {26}),
        ("Solarize", 1.0, {0}),
        ("SolarizeAdd", 0.9, {99}),
        ("SolarizeAdd", 1.0, {110}),
        ("Brightness", 0.9, {0.19, 1.81}),
        ("Color", 1.0, {0.1, 1.9}),
        ("Contrast", 0.0, {1.0}),
        ("Sharpness", 0.5, {0.55, 1.45}),
    ],
)
def test_levels_of_the_increasing_operations(name, strength, expected):
    assert {round(level, 9) for level in levels(name, strength)} == expected


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("Posterize", 0.9, {3}),
        ("Solarize", 0.9, {230}),
        ("SolarizeAdd", 0.9, {99}),
        ("Rotate", 0.9, {-27.0, 27.0}),
        *((name, 0.9, {1.72}) for name in ("Brightness", "Color", "Contrast", "Sharpness")),
    ],
)
def test_levels_without_inc1(name, strength, expected):
    assert {round(level, 9) for level in levels(name, strength, increasing=False)} == expected


@given(st.floats(0, 1), st.booleans())
def test_levels_stay_in_the_ranges_that_operations_take(strength, increasing):
    most = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}
    for name in NAMES:
        for level in levels(name, strength, increasing, 8):
            if name in most:
                assert abs(level) <= most[name]
            elif name in ("Color", "Contrast", "Brightness", "Sharpness"):
                assert 0.1 <= level <= 1.9 + 1e-9
            else:
                top = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110}.get(name, 0)
                assert level in range(top + 1)


def test_operations_are_drawn_evenly_half_of_them_applied_at_about_the_magnitude(monkeypatch):
    seen = []

    def recording(name):
        def level(strength, random):
            seen.append((name, strength))
            return 0.0

        return Operation(level, lambda image, level, canvas: image)

    monkeypatch.setattr(randaugment, "operations", lambda _: {name: recording(name) for name in NAMES})
    random, images = np.random.default_rng(5), 6000
    for _ in range(images):
        randaugment.randaugment(Image.new("L", (1, 1)), parse("rand-m9-mstd0.5-inc1"), NEAREST, random)
    counts = Counter(name for name, _ in seen)
    assert abs(len(seen) / images - 2 * 0.5) < 0.03
    assert set(counts) == set(NAMES)
    assert all(abs(count / images - 1 / 15) < 0.015 for count in counts.values())
    strengths = np.array([strength for _, strength in seen])
    assert strengths.max() == 1.0  # clipped
    assert abs(np.median(strengths) - 0.9) < 0.003
    assert abs(np.quantile(strengths, 0.1587) - 0.85) < 0.003  # one spread below
    assert (strengths == 1.0).mean() == pytest.approx(0.0228, abs=0.008)  # two spreads above


@pytest.mark.parametrize(("policy", "strength"), [(Policy(magnitude=4), 0.4), (Policy(magnitude=30), 1.0)])
def test_without_spread_the_strength_is_the_magnitude_clipped(monkeypatch, policy, strength):
    seen = set()
    only = Operation(lambda strength, random: seen.add(strength) or 0.0, lambda image, level, canvas: image)
    monkeypatch.setattr(randaugment, "operations", lambda _: {"Only": only})
    randaugment.randaugment(
        Image.new("L", (1, 1)), Policy(policy.magnitude, count=40), NEAREST, np.random.default_rng(0)
    )
    assert seen == {strength}


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB"]), st.integers(0, 2**32), st.booleans())
def test_any_image_keeps_its_shape_and_the_same_generator_gives_the_same_pixels(width, height, mode, seed, increasing):
    bands = len(mode)
    pixels = (
        np.random.default_rng(seed)
        .integers(0, 256, (height, width, bands), dtype=np.uint8)
        .squeeze(2 * (bands == 1) or ())
    )
    image = Image.fromarray(pixels)
    policy = Policy(magnitude=9, spread=0.5, count=6, increasing=increasing)
    canvas = Canvas(FILL[:bands], Image.Resampling.BICUBIC)
    one, two = (randaugment.randaugment(image, policy, canvas, np.random.default_rng(seed)) for _ in range(2))
    assert (one.size, one.mode) == (image.size, image.mode)
    assert one.tobytes() == two.tobytes()
    assert np.array_equal(np.asarray(image), pixels), "the image itself was changed"


def test_policies_are_read_as_timm_writes_them():
    assert parse("rand-m9-mstd0.5-inc1") == Policy(magnitude=9, spread=0.5, count=2, increasing=True)
    assert parse("rand-n3-m7") == Policy(magnitude=7, spread=0.0, count=3, increasing=False)
    assert parse("rand") == Policy(magnitude=10, spread=0.0, count=2, increasing=False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "does not begin with rand"),
        ("augmix-m3", "does not begin with rand"),
        ("rand-m9-w0", "'w0'"),
        ("rand-m9-tweights", "'tweights'"),
        ("rand-m9-p0.3", "'p0.3'"),
        ("rand-m9-mmax20", "'mmax20'"),
        ("rand-m9-", "''"),
        ("rand-m-9", "'m'"),
        ("rand-m9-m9", "twice"),
        ("rand-m9.5", "whole numbers"),
        ("rand-n1.5", "whole numbers"),
        ("rand-inc0", "inc1"),
        ("rand-mstd101", "mstd"),
    ],
)
def test_other_policies_are_refused_with_what_is_known(text, named):
    with pytest.raises(ValueError, match=named) as refused:
        parse(text)
    assert "rand-m9-mstd0.5-inc1" in str(refused.value)


def grey(pixels):
    """Luma as Pillow rounds it (ITU-R 601), (h, w, 1)."""
    if pixels.shape[2] == 1:
        return pixels.astype(np.float64)
    return np.floor(pixels @ np.array([0.299, 0.587, 0.114]) + 0.5)[..., None]


def close(found, expected, most=1):
    return np.abs(found - np.clip(expected, 0, 255)).max() <= most


def moved(pixels, source):
    """Each pixel taken from `source` of its middle, in pixels from the left and top; what is outside is filled."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    across, down = (np.floor(place).astype(int) for place in source(x, y))
    inside = (across >= 0) & (across < SIZE) & (down >= 0) & (down < SIZE)
    taken = pixels[down.clip(0, SIZE - 1), across.clip(0, SIZE - 1)]
    return np.where(inside[..., None], taken, np.array(FILL[: pixels.shape[2]]))
