"""From an image file to the network's input, against Pillow calls and arithmetic written out here."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hydradeploy.data.preprocess import crop, load_image, normalise
from hydradeploy.errors import InputError
from hydradeploy.spec import IMAGENET_MEAN, IMAGENET_STD
from tests.conftest import geometry, spec

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def picture(width, height, mode="RGB", seed=0):
    """An image of random pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels, mode=None)


def stored(path, image, **options):
    """An image file."""
    image.save(path, **options)
    return path


def expected(image, size, shorter, interpolation):
    """Resize so that the shorter side is `shorter` pixels, then cut the middle, in whole-number arithmetic."""
    width, height = image.size
    shorter_side = min(width, height)
    scaled = (shorter * width // shorter_side, shorter * height // shorter_side)
    if scaled != image.size:
        image = image.resize(scaled, FILTERS[interpolation])
    halves = [Decimal(side - size) / 2 for side in image.size]
    left, top = (int(half.to_integral_value(rounding=ROUND_HALF_EVEN)) for half in halves)
    return np.asarray(image)[top : top + size, left : left + size]


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(sorted(FILTERS)))
def test_any_size_is_resized_and_cropped_as_written_out(width, height, interpolation):
    image = picture(width, height)
    found = crop(image, 32, spec(interpolation=interpolation).preprocessing)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected(image, 32, 36, interpolation))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (61, 37), (37, 61), (36, 36), (36, 37), (37, 36), (200, 33)])
@pytest.mark.parametrize(("crop_pct", "shorter"), [(1.0, 32), (0.875, 36), (0.95, 33), (0.5, 64)])
def test_an_image_file_is_resized_by_the_crop_share_and_cut_in_the_middle(tmp_path, size, crop_pct, shorter):
    image = picture(*size)
    found = load_image(stored(tmp_path / "i.png", image), spec(crop_pct=crop_pct))
    assert found.shape == (32, 32, 3)
    assert np.array_equal(found, expected(image, 32, shorter, "bicubic"))


def test_the_sizes_of_imagenet_evaluation_are_224_out_of_256():
    image = picture(500, 375)
    found = crop(image, 224, spec(crop_pct=0.875).preprocessing)
    scaled = image.resize((341, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(found, np.asarray(scaled.crop((58, 16, 58 + 224, 16 + 224))))


def test_an_image_of_just_the_right_size_is_left_as_it_is(tmp_path):
    image = picture(32, 32)
    found = load_image(stored(tmp_path / "i.png", image), spec(crop_pct=1.0))
    assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
def test_the_interpolation_is_the_one_asked_for(tmp_path, interpolation):
    image = picture(50, 50)
    path = stored(tmp_path / "i.png", image)
    found = load_image(path, spec(interpolation=interpolation))
    assert np.array_equal(found, expected(image, 32, 36, interpolation))
    others = [load_image(path, spec(interpolation=other)) for other in FILTERS if other != interpolation]
    assert not any(np.array_equal(found, other) for other in others)


def test_a_gray_image_becomes_three_equal_channels_for_a_colour_network(tmp_path):
    image = picture(32, 32, "L")
    found = load_image(stored(tmp_path / "i.png", image), spec(crop_pct=1.0))
    assert all(np.array_equal(found[..., channel], np.asarray(image)) for channel in range(3))


def test_a_colour_image_becomes_one_channel_for_a_gray_network(tmp_path):
    image = picture(32, 32)
    found = load_image(stored(tmp_path / "i.png", image), spec(geometry(channels=1), crop_pct=1.0))
    assert found.shape == (32, 32, 1)
    luma = np.asarray(image) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(found[..., 0] - luma).max() <= 1


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    grey = np.asarray(picture(32, 32, "L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    found = load_image(stored(tmp_path / "i.png", deep), spec(geometry(channels=1), crop_pct=1.0))
    assert np.array_equal(found[..., 0], grey)


@pytest.mark.parametrize("kind", ["png", "png with a transparent grey", "pgm", "pgm of 12 bits"])
def test_sixteen_bits_are_scaled_in_every_file_that_has_them(tmp_path, kind):
    grey = np.asarray(picture(32, 32, "L")).astype(np.uint16)
    if kind.startswith("png"):
        deep = stored(tmp_path / "i", Image.fromarray(grey * 257), format="PNG").read_bytes()
        transparent = b"tRNS" + (0).to_bytes(2, "big")
        chunk = (2).to_bytes(4, "big") + transparent + zlib.crc32(transparent).to_bytes(4, "big")
        place = deep.index(b"IDAT") - 4
        data = deep[:place] + chunk * ("transparent" in kind) + deep[place:]
    else:
        most, pixels = (4095, grey * 16) if "12" in kind else (65535, grey * 257)
        data = b"P5 32 32 %d\n" % most + pixels.astype(">u2").tobytes()
    (tmp_path / "i").write_bytes(data)
    found = load_image(tmp_path / "i", spec(geometry(channels=1), crop_pct=1.0))
    assert np.abs(found[..., 0].astype(int) - grey).max() <= (1 if "12" in kind else 0)


def test_pixels_of_unknown_range_are_refused_by_name(tmp_path):
    image = Image.fromarray(np.zeros((32, 32), np.float32))
    with pytest.raises(InputError, match=r"i\.tiff: has pixels of 32 bits"):
        load_image(stored(tmp_path / "i.tiff", image), spec())


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))], ids=["none", "one index", "per index"])
def test_a_palette_image_is_read_in_its_colours(tmp_path, transparency):
    image = picture(32, 32).quantize(256)
    options = {} if transparency is None else {"transparency": transparency}
    found = load_image(stored(tmp_path / "i.png", image, **options), spec(crop_pct=1.0))
    colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    assert np.array_equal(found, colours[np.asarray(image)])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(tmp_path, mode):
    image = picture(32, 32, mode)
    found = load_image(stored(tmp_path / "i.png", image), spec(crop_pct=1.0))
    colours = np.asarray(image)[..., :-1]
    assert np.array_equal(found, np.broadcast_to(colours, (32, 32, 3)))


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "png", "ppm", "tif", "webp"])
def test_formats_are_read_by_content_whatever_the_name_says(tmp_path, suffix):
    colour = Image.new("RGB", (40, 40), (200, 40, 90))
    (tmp_path / "named.txt").write_bytes(stored(tmp_path / f"i.{suffix}", colour).read_bytes())
    found = load_image(tmp_path / "named.txt", spec())
    assert np.abs(found.astype(int) - [200, 40, 90]).max() <= 8


def test_a_network_of_other_than_one_or_three_channels_reads_no_image_files(tmp_path):
    path = stored(tmp_path / "i.png", picture(32, 32))
    with pytest.raises(InputError, match="this supernet wants 4"):
        load_image(path, spec(geometry(channels=4)))


@given(st.integers(0, 2**32 - 1))
def test_normalising_is_scale_minus_mean_over_std(seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    found = normalise(images, spec(mean=IMAGENET_MEAN, std=IMAGENET_STD).preprocessing)
    exact = (images.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.abs(found - exact.transpose(0, 3, 1, 2)).max() <= 1e-6


def test_every_byte_is_normalised_to_within_a_millionth():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)):
        found = normalise(images, spec(mean=mean, std=std).preprocessing)
        exact = (images.astype(np.float64) / 255 - mean) / std
        assert np.abs(found - exact.transpose(0, 3, 1, 2)).max() <= 1e-6


def encoded(kind, size=(40, 30)):
    """An image of a format, as bytes."""
    buffer = io.BytesIO()
    picture(*size).save(buffer, kind)
    return buffer.getvalue()


def refused(path, of=None):
    """Read a file that must be refused by name; returns the message."""
    with pytest.raises(InputError) as caught:
        load_image(path, of or spec())
    assert str(path) in caught.value.message
    return caught.value.message


def test_a_missing_image_is_refused_by_name(tmp_path):
    assert "no such image" in refused(tmp_path / "absent.png")


@pytest.mark.parametrize("content", [b"", b"\n", b"this is text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a"])
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "i.png").write_bytes(content)
    refused(tmp_path / "i.png")


def test_a_directory_is_refused_by_name(tmp_path):
    refused(tmp_path)


def test_a_path_below_a_file_is_refused_by_name(tmp_path):
    refused(stored(tmp_path / "i.png", picture(8, 8)) / "inner.png")


def test_a_name_with_a_zero_byte_is_refused(tmp_path):
    refused(tmp_path / "a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_image_that_may_not_be_read_is_refused_by_name(tmp_path):
    path = stored(tmp_path / "i.png", picture(8, 8))
    path.chmod(0)
    refused(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_wherever_it_ends(tmp_path, kind):
    data = encoded(kind)
    for cut in sorted({*range(0, len(data) // 2, 20), len(data) // 2}):
        (tmp_path / "i").write_bytes(data[:cut])
        refused(tmp_path / "i")


@settings(max_examples=150)
@given(
    st.sampled_from(("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")),
    st.dictionaries(st.integers(0, 200), st.integers(0, 255), min_size=1, max_size=3),
    st.integers(1, 5000),
)
def test_an_image_with_damaged_bytes_is_read_or_refused(tmp_path, kind, changes, length):
    damaged = bytearray(encoded(kind))
    for at, value in changes.items():
        damaged[at] = value
    path = tmp_path / "i"
    path.write_bytes(damaged[:length])
    try:
        found = load_image(path, spec())
    except InputError as error:
        assert str(path) in error.message  # noqa: PT017
    else:
        assert found.shape == (32, 32, 3)


@pytest.mark.parametrize("limit", [1000, 3000], ids=["twice the limit and more", "above the limit"])
def test_an_image_that_would_unpack_to_too_much_is_refused(tmp_path, monkeypatch, limit):
    path = stored(tmp_path / "bomb.png", Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "cannot be read as an image" in refused(path)


def test_an_image_just_within_the_limit_is_read(tmp_path, monkeypatch):
    path = stored(tmp_path / "i.png", Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    assert load_image(path, spec()).shape == (32, 32, 3)


def test_a_thin_image_that_would_be_resized_to_too_much_is_refused(tmp_path, monkeypatch):
    path = stored(tmp_path / "thin.png", Image.new("RGB", (1, 8000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    refused(path)


def test_a_text_chunk_that_unpacks_to_too_much_is_refused(tmp_path):
    path = stored(tmp_path / "i.png", picture(32, 32))
    data, body = path.read_bytes(), b"zTXtkey\0\0" + zlib.compress(bytes(8 << 20))
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    path.write_bytes(data[:33] + chunk + data[33:])
    refused(path)


def test_threads_that_read_at_once_leave_the_filters_of_warnings_as_they_were(tmp_path, monkeypatch):
    """A thread that put them back while others read would have these warn of what is to be refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40)
    fine, large = stored(tmp_path / "f.jpg", picture(40, 40)), stored(tmp_path / "l.jpg", picture(48, 48))

    def refused(path):
        try:
            load_image(path, spec())
        except InputError as error:
            return error.message
        return None

    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(refused, [fine, large] * 300))
    assert all(said is None for said in found[::2])
    assert all("decompression bomb" in said for said in found[1::2])
    assert warnings.filters == before
