"""The comparison of ways to nest: what they compute, what they cost, runs that are made once, and the report."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hydradeploy.supernet.model import Supernet
from hydradeploy.training.presets import GLYPHS
from tests.conftest import geometry

ROOT = Path(__file__).parents[2]
SHAPE = geometry(head_dim=8, heads=4, trained_heads=(1, 2, 3, 4), depth=2, image_size=8, patch_size=4, channels=1)


@pytest.fixture
def elastic(benchmark_module) -> ModuleType:
    return benchmark_module("elastic")


def built(kind: type[Supernet]) -> Supernet:
    model = kind(SHAPE).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["MatFormer", "DynaBert", "SortedNet"])
def test_the_largest_level_is_the_vit_itself_in_logits_and_cost(elastic, name):
    model = built(getattr(elastic, name))
    torch.testing.assert_close(model(IMAGES), built(Supernet)(IMAGES), rtol=1e-5, atol=1e-5)
    assert model.shape(4).macs(SHAPE) == SHAPE.subnet(4).macs
    costs = [model.shape(level).macs(SHAPE) for level in (1, 2, 3, 4)]
    assert costs == sorted(set(costs))


@pytest.mark.parametrize("name", ["MatFormer", "DynaBert"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_is_the_whole_with_the_rest_set_to_zero(elastic, name, level):
    model, whole = built(getattr(elastic, name)), built(Supernet)
    with torch.no_grad():
        for block in whole.blocks:
            block.mlp.fc2.weight[:, 32 * level :] = 0
            if name == "DynaBert":
                block.attn.proj.weight[:, 8 * level :] = 0
    torch.testing.assert_close(model(IMAGES, level), whole(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_thinner_head_has_the_first_channels_of_each(elastic):
    """As a plain ViT of thin heads with those rows and columns."""
    model = built(elastic.SortedNet)
    thin = Supernet(geometry(**{f: getattr(SHAPE, f) for f in SHAPE.__struct_fields__} | {"head_dim": 4}))
    state, d = model.state_dict(), 16
    rows = torch.cat([torch.arange(part * 32 + h * 8, part * 32 + h * 8 + 4) for part in range(3) for h in range(4)])
    picked = {}
    for key, tensor in thin.state_dict().items():
        full = state[key]
        if ".qkv." in key:
            full = full[rows]
        if key.endswith("attn.proj.weight"):
            full = full[:, rows[:16]]
        picked[key] = full[tuple(slice(size) for size in tensor.shape)]
    thin.load_state_dict(picked)
    torch.testing.assert_close(model(IMAGES, 2), thin(IMAGES), rtol=1e-5, atol=1e-5)
    assert model.shape(2).width == d


@pytest.fixture
def characters(tmp_path) -> str:
    """A few images of the size and classes of glyphs."""
    generator = np.random.default_rng(0)
    arrays = {"class_names": np.array([str(i) for i in range(36)])}
    for split, count in (("train", 128), ("val", 36), ("test", 72)):
        arrays |= {
            f"{split}_images": generator.integers(0, 256, (count, 24, 24), dtype=np.uint8),
            f"{split}_labels": np.arange(count) % 36,
        }
    (tmp_path / "work").mkdir()
    np.savez(tmp_path / "work" / "characters.npz", **arrays)
    return "characters"


def test_runs_are_made_once_and_reported(benchmark_module, characters, tmp_path, monkeypatch, capsys):
    benchmark = benchmark_module("supernet")
    command = ["supernet.py", "--data", characters, "--epochs", "1", "--seeds", "0"]
    runs = "hydravit,single-12,sandwich-distil,teacher,sortednet,sortednet-sandwich"
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.csv")]
    monkeypatch.setattr(sys, "argv", [*command, "--runs", runs, *places])
    benchmark.main()
    first = capsys.readouterr()
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == set(runs.split(","))
    assert [int(row["level"]) for row in rows if row["run"] == "hydravit"] == list(range(3, 13))
    assert [int(row["level"]) for row in rows if row["run"] == "single-12"] == list(range(3, 13))
    assert {row["n"] for row in rows} == {"72"}
    full = {row["macs"] for row in rows if row["level"] == "12"}
    assert full == {str(GLYPHS.geometry.subnet(12).macs)}
    for claim in (
        "hydravit - trained alone, 12 heads: ",
        "sandwich-distil - paper's recipe, 3 heads: ",
        "trained alone with 12 heads and sliced to 3, 6, 9: ",
        "hydravit - sortednet at equal MACs: ",
        "sandwich-distil - sortednet-sandwich at equal MACs: ",
        "(one seed)",
    ):
        assert claim in first.out
    assert (tmp_path / "r.svg").stat().st_size > 1000
    benchmark.main()
    again = capsys.readouterr()
    assert "epoch" not in again.err
    assert again.out == first.out


@pytest.mark.slow
def test_processes_share_the_runs(characters, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "supernet.py"), "--data", characters, "--epochs", "1"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.csv")]
    options = ["--runs", "hydravit,single-12,single-03", "--seeds", "0", "--jobs", "2"]
    ran = subprocess.run([*command, *places, *options], capture_output=True, text=True, check=True)
    assert "0 of 2 processes failed" in ran.stderr
    with (tmp_path / "r.csv").open() as file:
        rows = [(row["run"], row["level"]) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == 10 + 10 + 1


@pytest.mark.slow
def test_runs_that_fail_are_told_by_the_exit_code(characters, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "supernet.py"), "--data", characters, "--runs", "no-such-run"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.csv"), "--jobs", "2"]
    ran = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert (ran.returncode, "2 of 2 processes failed" in ran.stderr) == (1, True), ran.stderr
