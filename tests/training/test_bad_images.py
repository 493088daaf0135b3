"""Images that cannot be read: all processes count them together and end alike where they are too many."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from hydradeploy import train
from hydradeploy.errors import InputError
from hydradeploy.training import metrics
from hydradeploy.training.presets import SMALL
from hydradeploy.training.running import Running
from tests.conftest import geometry
from tests.training.test_processes import SHAPE, Together, trained

STREAMED = "[recipe.augment]\nshift = 0.0\ncrop_scale = [0.5, 1.0]\n"


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Two classes of twelve images, one of each damaged, and two sound ones to test with."""
    root = tmp_path_factory.mktemp("broken")
    for number in range(28):
        place = root / ("train" if number < 24 else "val") / f"n{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 10, 3), number, np.uint8)).save(place)
    for name in ("n0/6.png", "n1/11.png"):
        (root / "train" / name).write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return root


def options(broken: Path, tmp_path: Path, config: str, allowed: int) -> tuple[str, ...]:
    (tmp_path / "c.toml").write_text(config)
    files = ("--data", str(broken), "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "s"))
    return (*files, *SHAPE, "--epochs", "6", "--workers", "0", "--bad-images", str(allowed))


@pytest.mark.parametrize("config", ["", STREAMED], ids=["in memory", "streamed"])
@pytest.mark.parametrize("allowed", [0, 1])
def test_more_than_are_allowed_end_both_with_the_error_that_says_so(broken, tmp_path, config, allowed):
    ended = Together(2, *options(broken, tmp_path, config, allowed)).end()
    assert [code for code, _, _ in ended] == [11, 11], ended
    for _, _, err in ended:
        assert re.search(rf"error: .*n[01]/(6|11)\.png.*images that cannot be read, {allowed} allowed\)", err), err
        assert "--bad-images" in err
    assert not (tmp_path / "s").exists()


def test_so_many_as_are_allowed_are_counted_once(broken, tmp_path):
    trained(2, *options(broken, tmp_path, STREAMED, 2))
    assert metrics.read(tmp_path / "s")[-1].bad_images == 2


def test_going_on_with_fewer_allowed_than_were_counted_is_refused_at_once(broken, tmp_path):
    """In memory, where they are all known from the first step."""

    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    recipe = msgspec.structs.replace(SMALL.recipe, epochs=3, batch_size=8)
    shape = geometry(image_size=8, patch_size=4, channels=3, head_dim=8, heads=2, trained_heads=(1, 2), depth=1)
    preset = msgspec.structs.replace(SMALL, geometry=shape, recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        train(str(broken), tmp_path / "s", preset, running=Running(bad_images=2), report=stop)
    with pytest.raises(InputError, match=r"\(2 images that cannot be read, 1 allowed\)"):
        train(str(broken), tmp_path / "s", preset, running=Running(bad_images=1), resume=True)
    train(str(broken), tmp_path / "s", preset, running=Running(bad_images=2), resume=True)


@pytest.mark.parametrize("config", ["", STREAMED], ids=["in memory", "streamed"])
def test_a_held_out_image_ends_both_with_its_name(broken, tmp_path, config):
    """The one that meets it and the one that does not."""
    root = tmp_path / "broken"
    shutil.copytree(broken, root)
    (root / "val" / "n1" / "27.png").write_bytes(b"nothing")
    ended = Together(2, *options(root, tmp_path, config, 2)).end()
    assert [code for code, _, _ in ended] == [11, 11], ended
    assert all("val/n1/27.png: not an image" in err for _, _, err in ended), ended
