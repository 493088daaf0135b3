"""A run as a TOML file: every option is in what is shown, what is shown is read back, and what is wrong is named."""

from __future__ import annotations

import msgspec
import pytest
import tomllib

from hydradeploy.errors import InputError, UsageError
from hydradeploy.training import config
from hydradeploy.training.presets import DIGITS, PRESETS
from hydradeploy.training.recipe import Preset
from hydradeploy.training.running import Running
from tests.conftest import Cli


def fields(record: type[msgspec.Struct]) -> set[str]:
    found = set()
    for field in msgspec.structs.fields(record):
        inner = field.type
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            found |= {f"{field.name}.{name}" for name in fields(inner)}
        else:
            found.add(field.name)
    return found


def shown(preset: Preset, running: Running) -> dict:
    tables = tomllib.loads(config.shown("digits", preset, running, {}))
    del tables["preset"]
    return tables


def flat(tables: dict) -> set[str]:
    found = set()
    for name, value in tables.items():
        found |= {f"{name}.{inner}" for inner in flat(value)} if isinstance(value, dict) else {name}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_shown_is_read_back_as_the_same_run(tmp_path, name):
    running = Running(workers=3, tensorboard="board", save_every=7)
    (tmp_path / "c.toml").write_text(config.shown(name, PRESETS[name], running, {}))
    found = config.read(tmp_path / "c.toml")
    assert config.resolved(config.preset_named(found["preset"]), "c.toml", found) == (PRESETS[name], running)


def test_every_option_can_be_set_in_the_file():
    optional = {"recipe.augment.crop_scale", "recipe.augment.randaugment", "recipe.method.sample_weights"}
    optional |= {"recipe.method.loss_weights", "running.device", "running.workers", "running.save_every"}
    optional |= {"running.tensorboard"}
    every = fields(Preset) | {f"running.{name}" for name in fields(Running)}
    assert flat(shown(DIGITS, Running())) == every - optional
    given = {
        "recipe": {
            "augment": {"crop_scale": [0.2, 1.0], "randaugment": "rand-m9-mstd0.5-inc1", "shift": 0.0},
            "method": {"sample_weights": [10] * 10, "loss_weights": [1.0] * 10},
        },
        "running": {"device": "cpu", "workers": 0, "save_every": 5, "tensorboard": "x"},
    }
    chosen, running = config.resolved(DIGITS, "test", given)
    assert flat(shown(chosen, running)) == every


def test_what_a_preset_has_can_be_left_out(tmp_path, cli: Cli):
    (tmp_path / "c.toml").write_text("[recipe.augment]\nrandaugment = 'none'\ncrop_scale = 'none'\n")
    start = ("train", "--data", "digits", "--preset", "hydravit-imagenet", "--show-config", "--config")
    ran = cli(*start, tmp_path / "c.toml")
    assert ran.code == 0, ran.err
    (tmp_path / "shown.toml").write_text(ran.out)
    chosen, _ = config.resolved(PRESETS["hydravit-imagenet"], "c.toml", config.read(tmp_path / "shown.toml"))
    assert (chosen.recipe.augment.randaugment, chosen.recipe.augment.crop_scale) == (None, None)


def test_files_that_decide_the_result_are_in_the_file_too(tmp_path, cli: Cli):
    options = ("train", "--data", "digits", "--teacher", "t.safetensors", "--teacher-share", 0.5, "--init-from", "i")
    (tmp_path / "shown.toml").write_text(cli(*options, "--show-config").out)
    ran = cli("train", "--data", "digits", "--config", tmp_path / "shown.toml", "--out", tmp_path / "s")
    assert (ran.code, "i: no such file" in ran.err) == (2, True), ran.err
    (tmp_path / "bad.toml").write_text("teacher = 3\n")
    ran = cli("train", "--data", "digits", "--config", tmp_path / "bad.toml", "--out", tmp_path / "s")
    assert (ran.code, "teacher must be a file's name in quotes" in ran.err) == (2, True), ran.err


def test_an_option_completes_what_the_file_says(tmp_path, cli: Cli):
    (tmp_path / "c.toml").write_text("[recipe.method]\ndistil = 0.5\n")
    ran = cli("train", "--data", "digits", "--config", tmp_path / "c.toml", "--anchors", "sandwich", "--show-config")
    assert ran.code == 0, ran.err


def test_later_layers_win_down_to_the_field_and_heads_follow_the_trained_ones():
    chosen, running = config.resolved(
        DIGITS,
        "test",
        {"recipe": {"epochs": 7, "method": {"draws": 2}}, "geometry": {"trained_heads": [2, 4]}},
        {"recipe": {"method": {"anchors": "largest"}}, "running": {"accumulate": 2}},
    )
    assert (chosen.recipe.epochs, chosen.recipe.method.draws, chosen.recipe.method.anchors) == (7, 2, "largest")
    assert (chosen.geometry.heads, chosen.geometry.trained_heads) == (4, (2, 4))
    assert running.accumulate == 2
    assert chosen.recipe.learning_rate == DIGITS.recipe.learning_rate


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[recipe]\nepoch = 3\n", "unknown field `epoch` - at `$.recipe`"),
        ("[recipe.augment]\nmixup = 'much'\n", "at `$.recipe.augment.mixup`"),
        ("[recipe.augment]\nrandaugment = false\n", 'hint: "none" leaves it out; hydradeploy train --show-config'),
        ("[geometry]\npatch_size = 5\n", "image_size 16 is not a multiple of patch_size 5"),
        ("[recipe.method]\nanchors = 'both'\n", "at `$.recipe.method.anchors`"),
        ("[running]\nworkers = -1\n", "workers must be at least 0"),
        ("[data]\npath = 'x'\n", "no table `data`"),
        ("recipe = 3\n", "at `$.recipe`"),
        ("[geometry]\ntrained_heads = 12\n", "at `$.geometry.trained_heads`"),
        ("[geometry]\ntrained_heads = '3-6'\n", "at `$.geometry.trained_heads`"),
        ("[geometry]\ntrained_heads = [true]\n", "at `$.geometry.trained_heads[0]`"),
        ("[geometry]\nchannels = 3\n", "mean has 1 values for 3 channels"),
        ("[recipe]\nweight_decay = -0.1\n", "weight_decay must be at least 0"),
        ("geometry = 'x'\n", "at `$.geometry`"),
        ("preset = 'imagenet'\n", "no preset 'imagenet'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_the_file(tmp_path, cli: Cli, text, named):
    (tmp_path / "c.toml").write_text(text)
    ran = cli("train", "--data", "digits", "--config", tmp_path / "c.toml", "--out", tmp_path / "s")
    assert ran.code == 2, ran.err
    assert named in ran.err
    assert "c.toml" in ran.err or "preset" in named


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        config.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"[recipe\n")
    with pytest.raises(InputError, match=r"bad\.toml: not TOML"):
        config.read(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"bad\.toml: not TOML"):
        config.read(tmp_path / "bad.toml")


def test_a_byte_order_mark_in_front_does_not_matter(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[recipe]\nepochs = 5\n")
    assert config.read(tmp_path / "c.toml") == {"recipe": {"epochs": 5}}


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path, cli: Cli):
    (tmp_path / "c.toml").write_text('preset = "hydravit-imagenet"\n[recipe]\nepochs = 5\nbatch_size = 64\n')
    ran = cli("train", "--data", "digits", "--config", tmp_path / "c.toml", "--epochs", 3, "--show-config")
    assert ran.code == 0, ran.err
    (tmp_path / "shown.toml").write_text(ran.out)
    shown = config.read(tmp_path / "shown.toml")
    assert (shown["recipe"]["epochs"], shown["recipe"]["batch_size"]) == (3, 64)
    assert shown["recipe"]["augment"]["randaugment"] == "rand-m9-mstd0.5-inc1"
    again = cli("train", "--data", "digits", "--config", tmp_path / "shown.toml", "--show-config")
    assert "randaugment" in again.out
    assert not (tmp_path / "s").exists()


def test_anchors_are_named_or_counted_in_the_file_and_on_the_command_line(tmp_path, cli: Cli):
    (tmp_path / "c.toml").write_text("[recipe.method]\nanchors = [12, 5]\ndistil = 0.5\n")
    for given, anchors in (((), (12, 5)), (("--anchors", "3-4,12"), (3, 4, 12)), (("--anchors", "largest"), "largest")):
        ran = cli("train", "--data", "digits", "--config", tmp_path / "c.toml", *given, "--show-config")
        assert ran.code == 0, ran.err
        (tmp_path / "shown.toml").write_text(ran.out)
        chosen, _ = config.resolved(DIGITS, "shown.toml", config.read(tmp_path / "shown.toml"))
        assert chosen.recipe.method.anchors == anchors


def test_an_anchor_that_is_not_trained_is_refused_before_anything_is_read(tmp_path, cli: Cli):
    ran = cli("train", "--data", "digits", "--anchors", "2,12", "--out", tmp_path / "s.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert "anchor 2 is no trained head count" in ran.err
    assert list(tmp_path.iterdir()) == []
