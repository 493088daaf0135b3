"""Glyphs: the same images everywhere, no font in two splits, every class legible, and neither torch nor matplotlib."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydradeploy.data import glyphs
from hydradeploy.data.datasets import SPLITS, Dataset, open_dataset
from hydradeploy.errors import MissingError
from tests.conftest import require

SHOWN = range(0, 1800, 7)

HASHED = """
import hashlib, sys
from hydradeploy.data.datasets import SPLITS, open_dataset

digest = hashlib.sha256()
for split in reversed(SPLITS):
    found = open_dataset("glyphs", split)
    for i in reversed(range(0, 1800, 7)):
        digest.update(found.read(i).tobytes())
print(digest.hexdigest())
print(*sorted({"torch", "onnx", "onnxruntime", "sklearn", "matplotlib", "scipy"} & set(sys.modules)))
"""


@pytest.fixture(autouse=True)
def _fonts() -> None:
    require("matplotlib")


def opened(split) -> Dataset:
    return open_dataset("glyphs", split)


def inked(font: Path, character: str) -> np.ndarray:
    return np.asarray(glyphs.mask(font, character), np.float64) / 255


def test_another_process_draws_the_same_images_in_any_order_without_torch_and_matplotlib():
    ran = subprocess.run([sys.executable, "-c", HASHED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    theirs, imported = ran.stdout.splitlines()
    ours = hashlib.sha256()
    images = {(split, i): opened(split).read(i) for split in SPLITS for i in SHOWN}
    for split in reversed(SPLITS):
        for i in reversed(SHOWN):
            ours.update(images[split, i].tobytes())
    assert theirs == ours.hexdigest()
    assert imported == ""


def test_the_test_split_has_ten_thousand_images_and_every_split_as_many_of_each_class():
    assert len(opened("test")) >= 10_000
    for split in SPLITS:
        found = opened(split)
        assert len(found.class_names) == len(set(found.class_names)) >= 36
        counts = np.bincount(found.labels, minlength=len(found.class_names))
        assert set(counts) == {len(found) // len(found.class_names)}


def test_no_font_is_in_two_splits_and_each_has_several():
    files = [file for split in SPLITS for file in glyphs.fonts(split)]
    assert len(files) == len(set(files)) == len({file.read_bytes() for file in files})
    assert all(len(glyphs.fonts(split)) >= 3 for split in SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_is_grey_of_one_size_and_none_is_another(split):
    found = opened(split)
    images = [found.read(i) for i in SHOWN]
    assert {(image.mode, image.size) for image in images} == {("L", (glyphs.SIZE, glyphs.SIZE))}
    assert min(np.asarray(image).std() for image in images) > 2
    assert len({image.tobytes() for image in images}) == len(images)


def test_the_same_place_in_two_splits_is_not_the_same_image_even_in_one_font():
    (font, *_) = glyphs.fonts("test")
    drawn = {glyphs.draw(split, (font,), 0).tobytes() for split in SPLITS}
    assert len(drawn) == len(SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_is_a_character_of_its_own_in_every_font(split):
    """A font that lacks a character draws the same box for all it lacks, or nothing."""
    for font in glyphs.fonts(split):
        masks = {character: inked(font, character) for character in glyphs.CLASSES}
        for character, mask in masks.items():
            assert 15 < mask.sum() < 400, (font.name, character)
            border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert not border.any(), f"{font.name}: {character} is cut off"
        for (one, a), (other, b) in itertools.combinations(masks.items(), 2):
            common = np.minimum(a, b).sum() / np.maximum(a, b).sum()
            assert common < 0.9, (font.name, one, other)


def test_a_class_looks_alike_in_all_fonts_so_no_font_has_symbols_in_the_letters_places():
    """The mean image of a class over the training fonts, slightly blurred, tells most characters of any font."""
    mean = {c: np.mean([blurred(inked(font, c)) for font in glyphs.fonts("train")], 0) for c in glyphs.CLASSES}
    for split in SPLITS:
        for font in glyphs.fonts(split):
            right = sum(nearest(blurred(inked(font, c)), mean) == c for c in glyphs.CLASSES)
            assert right >= 0.7 * len(glyphs.CLASSES), (font.name, right)


def blurred(mask: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        mask = np.mean([np.roll(mask, shift, axis) for shift in (-2, -1, 0, 1, 2)], 0)
    return mask / np.linalg.norm(mask)


def nearest(mask: np.ndarray, mean: dict[str, np.ndarray]) -> str:
    return max(mean, key=lambda c: float((mask * mean[c]).sum() / np.linalg.norm(mean[c])))


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(glyphs, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match="matplotlib") as refused:
        opened("test")
    assert refused.value.hint == "pip install matplotlib"


def test_a_matplotlib_without_its_fonts_is_refused_by_the_fonts_names(monkeypatch, tmp_path):
    class Found:
        origin = str(tmp_path / "matplotlib" / "__init__.py")

    monkeypatch.setattr(glyphs, "find_spec", lambda _: Found)
    with pytest.raises(MissingError, match=r"lacks .*cmr10\.ttf") as refused:
        opened("test")
    assert str(tmp_path) in refused.value.message


def test_a_font_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"no font")
    with pytest.raises(MissingError, match=r"x\.ttf: not a font"):
        glyphs.draw("test", (tmp_path / "x.ttf",), 0)
