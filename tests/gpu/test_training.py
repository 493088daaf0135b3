"""Training on the GPU: it learns in every arithmetic, goes on where it was, and compares runs unchanged."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from hydradeploy import train
from hydradeploy.data.augment import Augmentation
from hydradeploy.supernet.store import load
from hydradeploy.training.batches import Batch
from hydradeploy.training.presets import DIGITS
from hydradeploy.training.recipe import Method, Preset, Recipe
from hydradeploy.training.running import Running
from tests.conftest import geometry

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SHAPE = geometry(
    image_size=8, patch_size=4, channels=1, head_dim=8, heads=3, trained_heads=(1, 2, 3), depth=1, mlp_ratio=2.0
)
ON_GPU = Running(device="cuda", workers=0)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")


def preset(**changes: object) -> Preset:
    whole = {"epochs": 20, "batch_size": 16, "warmup_epochs": 0, "learning_rate": 3e-3} | changes
    return msgspec.structs.replace(DIGITS, geometry=SHAPE, recipe=Recipe(**whole))  # type: ignore[arg-type]


@pytest.mark.parametrize("arithmetic", ["fp32", "tf32", "bf16", "fp16"])
def test_it_learns_in_every_arithmetic_with_all_that_makes_it_better(blobs, tmp_path, arithmetic):
    method = Method(anchors="sandwich", distil=0.5, decay_unsampled=False)
    recipe = preset(arithmetic=arithmetic, method=method, drop_path=0.1, augment=Augmentation(mixup=0.2, cutmix=0.2))
    trained = train(blobs, tmp_path / "s", recipe, running=ON_GPU)
    assert min(trained.top1.values()) > 0.7


def test_batches_of_readers_come_in_memory_that_the_gpu_copies_from():
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = pin_memory(Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)))
    assert pinned.images.is_pinned()
    assert pinned.labels.is_pinned()


def test_a_run_begun_on_the_gpu_is_that_of_the_processor_up_to_rounding(blobs, tmp_path):
    short = preset(epochs=2)
    train(blobs, tmp_path / "gpu", short, running=ON_GPU)
    train(blobs, tmp_path / "cpu", short, running=Running(device="cpu", workers=0))
    gpu, cpu = load(tmp_path / "gpu").tensors, load(tmp_path / "cpu").tensors
    for name, tensor in cpu.items():
        torch.testing.assert_close(gpu[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_a_stopped_run_goes_on_where_it_was(blobs, tmp_path):
    def stop(what: str, done: int, total: int) -> None:
        if done == 13:
            signal.raise_signal(signal.SIGINT)

    short = preset(epochs=2, arithmetic="fp16")
    with pytest.raises(KeyboardInterrupt):
        train(blobs, tmp_path / "s", short, running=ON_GPU, report=stop)
    train(blobs, tmp_path / "s", short, running=ON_GPU, resume=True)
    train(blobs, tmp_path / "whole", short, running=ON_GPU)
    stopped, whole = load(tmp_path / "s").tensors, load(tmp_path / "whole").tensors
    for name, tensor in whole.items():
        torch.testing.assert_close(stopped[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_the_comparison_of_ways_to_nest_runs_here_unchanged(blobs, tmp_path):
    script = ROOT / "benchmarks" / "supernet.py"
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.csv"), "--data", blobs]
    runs = ["--runs", "hydravit,single-12,sandwich-distil,matformer", "--seeds", "0", "--epochs", "1"]
    subprocess.run([sys.executable, str(script), "--device", "cuda", "--jobs", "4", *places, *runs], check=True)
    with (tmp_path / "r.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"hydravit", "single-12", "sandwich-distil", "matformer"}
