"""Every command and every snippet in README and docs works; links lead somewhere; generated pages are current."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydradeploy import open_bundle
from hydradeploy.backends import PRECISION_NAMES
from tests.conftest import Cli, geometry, require, supernet

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


SHORTER = {"demo": ["--epochs", "1"], "train": ["--epochs", "1"], "profile": ["--heads", "3,6"]}


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A directory with what the README's reader has: an official checkpoint, a photo, labelled images. All small."""
    shape = geometry(
        image_size=224, patch_size=32, head_dim=64, heads=12, trained_heads=tuple(range(3, 13)), depth=1, mlp_ratio=0.5
    )
    state = {f"module.{name}": tensor for name, tensor in supernet(shape).state_dict().items()}
    checkpoint = {"state_dict": {}, "state_dict_ema": state, "args": argparse.Namespace(heads=list(range(3, 13)))}
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    for label in range(10):
        folder = tmp_path / "imagenet" / "val" / f"n{label}"
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "photo.jpg", folder / "a.JPEG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_runs_from_top_to_bottom(workplace, cli, capsys):
    """As it stands, but for a training cut short and fewer cells measured.

    What a busy machine measures may be inconclusive (exit 4); nothing else is excused.
    """
    require("sklearn")
    require("matplotlib")
    found = commands(ROOT / "README.md")
    assert len(found) >= 14
    for command in found:
        if command == "make demo":
            target = re.search(r"^demo:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert target is not None
            command = target[1]
        words = shlex.split(command, comments=True)
        assert words[0] == "hydradeploy"
        words += SHORTER.get(words[1], [])
        ran = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        allowed = (0, 4) if "--latency" in words else (0,)
        assert ran.returncode in allowed, f"{command}\n{ran.stderr}"
        if words[1] == "demo":
            check_demo(Path("build/demo"), ran.stderr, cli)
            shutil.copy("build/demo/supernet.safetensors", "supernet.safetensors")
    snippets = blocks(ROOT / "README.md", "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert "h06-fp32" in capsys.readouterr().out


def check_demo(out: Path, said: str, cli: Cli) -> None:
    """It evaluated and measured every subnet, drew them, and found for three rising budgets what `pick` finds again."""
    rows = json.loads((out / "bundle" / "accuracy.json").read_text())["rows"]
    assert [row["artifact"] for row in rows] == [f"h{k:02d}-fp32" for k in range(3, 13)]
    assert all(row["n"] == 360 for row in rows)
    (profile,) = (out / "profiles").glob("*.json")
    assert len(json.loads(profile.read_text())["cells"]) == 10
    assert len(re.findall(r"^  h.*: top-1 ", said, re.MULTILINE)) >= 10
    with Image.open(out / "accuracy-latency.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    limits, verdicts = [], {0: "pass", 3: "infeasible", 4: "inconclusive"}
    for asked in re.findall(r"^> hydradeploy (pick .*)$", said, re.MULTILINE):
        again = cli(*asked.split(), "--bundle", out / "bundle", "--profiles", out / "profiles", "--json")
        answer = json.loads(again.out)
        assert answer["verdict"] == verdicts[again.code]
        limits.append(answer["budget"]["latency"][0]["limit_s"])
    assert len(limits) == 3
    assert limits == sorted(limits)
    assert answer == json.loads((out / "pick.json").read_text())


def run_through(page: str, least: int, *more: str) -> None:
    """Run a page's commands as they stand, with `more` behind, each in the directory that the one before it left."""
    found = commands(ROOT / "docs" / page)
    assert len(found) >= least
    for command in found:
        ran = subprocess.run([sys.executable, "-m", *shlex.split(command), *more], capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"


def test_the_guide_to_training_runs_from_top_to_bottom(workplace):
    require("sklearn")
    run_through("training.md", 5, "--depth", "1", "--head-dim", "4")  # smaller, because there are four of them
    assert len(list(workplace.glob("*.metrics.jsonl"))) == 4
    (config,) = blocks(ROOT / "docs" / "training.md", "toml")
    Path("run.toml").write_text(config)
    shown = subprocess.run(
        [sys.executable, "-m", "hydradeploy", "train", "--data", "digits", "--config", "run.toml", "--show-config"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert 'anchors = "sandwich"' in shown.stdout


def test_the_guide_to_precisions_runs_from_top_to_bottom(workplace):
    run_through("exporting.md", least=5)
    artifacts = open_bundle(workplace / "bundle").manifest.artifacts
    assert {artifact.precision for artifact in artifacts} == set(PRECISION_NAMES)
    assert {artifact.name for artifact in artifacts} >= {"h06-fp16-uint8", "h12-int8"}


def test_the_guide_to_imagenet_runs_from_top_to_bottom(workplace):
    run_through("imagenet.md", least=6)
    crops = {name: open_bundle(workplace / name).spec.preprocessing.crop_pct for name in ("bundle", "crop90")}
    assert crops == {"bundle": 0.875, "crop90": 0.9}


def test_other_pages_hold_no_command_that_nobody_runs():
    assert [page.name for page in PAGES if commands(page)] == [
        "README.md",
        "exporting.md",
        "imagenet.md",
        "training.md",
    ]


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("data.md", {"train", "export", "evaluate"}),
        ("training.md", {"train", "import"}),
        ("jetson.md", {"doctor", "profile", "pick", "run"}),
        ("remote.md", {"profile", "pick"}),
    ],
)
def test_our_commands_for_devices_and_large_data_exist_with_their_options(page, least):
    """They need a device or hours. Here the command line's own parser reads them, which refuses what it lacks."""
    import typer

    from hydradeploy.cli.app import app

    lines = [line for block in blocks(ROOT / "docs" / page, "sh") for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    ours = [words[words.index(word) + 1 :] for words in found for word in words if Path(word).name == "hydradeploy"]
    assert {words[0] for words in ours} >= least
    group = typer.main.get_command(app())
    for name, *arguments in ours:
        group.commands[name].make_context(name, arguments)
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    installed = {extra for line in lines for extra in re.findall(r"hydradeploy\[(\w+)\]", line)}
    assert installed or page in ("data.md", "remote.md", "training.md")
    for extra in installed:
        assert f"\n{extra} = " in extras


def test_the_command_reference_is_current():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "cli.md").read_text() == generate["page"](), "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_version_is_told_once_and_the_changelog_knows_what_is_next():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_the_formats_page_names_every_field_on_disk():
    import msgspec

    from hydradeploy.bundle import (
        AccuracyFile,
        AccuracyRow,
        Artifact,
        Calibration,
        Drop,
        FileRecord,
        Manifest,
        Parity,
        Quantisation,
        StoredTensor,
    )
    from hydradeploy.engines.cache import EngineRecord, Key
    from hydradeploy.measurements import Cell, Conditions, Device, Profile
    from hydradeploy.spec import Geometry, Preprocessing, Spec

    text = (ROOT / "docs" / "formats.md").read_text()
    profiles = text.partition("## profiles/")[2]
    structs = {
        AccuracyFile: text,
        AccuracyRow: text,
        Artifact: text,
        Calibration: text,
        Cell: profiles,
        Conditions: profiles,
        Device: profiles,
        Drop: text,
        EngineRecord: text,
        FileRecord: text,
        Geometry: text,
        Key: text.partition("### engines/")[2].partition("## profiles/")[0],
        Manifest: text,
        Parity: text,
        Preprocessing: text,
        Profile: profiles,
        Quantisation: text,
        Spec: text,
        StoredTensor: text,
    }
    for struct, section in structs.items():
        for field in msgspec.structs.fields(struct):
            named = re.search(rf"`(?:\w+\.)*{field.name}(?:`|\[)", section)
            assert named, f"{struct.__name__}.{field.name} is not in docs/formats.md"
