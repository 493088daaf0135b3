"""Glyphs tell subnets apart: trained on them, more heads are right significantly more often."""

from __future__ import annotations

import msgspec
import pytest

from hydradeploy import evaluate, export, train
from hydradeploy.bundle import open_bundle, read_outcomes
from hydradeploy.data import glyphs
from hydradeploy.training.presets import GLYPHS, preset_for
from tests.conftest import require


def test_the_preset_takes_the_images_as_they_are():
    assert preset_for("glyphs") is GLYPHS
    spec = GLYPHS.spec(glyphs.CLASSES)
    assert (spec.geometry.image_size, spec.geometry.channels) == (glyphs.SIZE, 1)
    assert (spec.geometry.classes, spec.preprocessing.crop_pct) == (len(glyphs.CLASSES), 1.0)


@pytest.mark.slow
def test_twelve_heads_are_right_more_often_than_three_by_mcnemars_exact_test(tmp_path):
    """A fifth of the preset's schedule is enough."""
    require("matplotlib")
    require("onnxruntime")
    require("scipy")
    from scipy.stats import binomtest

    short = msgspec.structs.replace(GLYPHS, recipe=msgspec.structs.replace(GLYPHS.recipe, epochs=4))
    train("glyphs", tmp_path / "supernet.safetensors", short)
    export(tmp_path / "supernet.safetensors", tmp_path / "bundle", heads=(3, 12))
    rows = {row.artifact: row for row in evaluate(tmp_path / "bundle", "glyphs").rows}
    assert set(rows) == {"h03-fp32", "h12-fp32"}
    assert min(row.n for row in rows.values()) >= 10_000
    outcomes = read_outcomes(open_bundle(tmp_path / "bundle"))
    three, twelve = (outcomes[str(rows[name].outcomes)].right for name in ("h03-fp32", "h12-fp32"))
    gained, lost = int((twelve & ~three).sum()), int((three & ~twelve).sum())
    assert gained > lost
    assert binomtest(gained, gained + lost).pvalue < 0.001
