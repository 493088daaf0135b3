"""benchmarks/training.py: what its ratios are of, that all train and read the same; and a round of it, tiny."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hydradeploy.data.datasets import open_dataset

COLUMNS = [
    *("machine", "stack", "setting", "what", "against", "rounds"),
    *("images_s", "ratio", "ratio_low", "ratio_high"),
    *("cpu_images_s", "cpu_ratio", "cpu_ratio_low", "cpu_ratio_high"),
]


@pytest.fixture
def training(benchmark_module) -> ModuleType:
    return benchmark_module("training")


def one_epoch(training: ModuleType, directory: Path):
    setting = training.Setting("glyphs", 4, 6, "fp32", False, "cpu", True)
    return training.Training(setting, str(training.training_data(directory, setting)))


def test_ratios_are_of_throughput_in_the_same_round_and_above_one_is_faster(training):
    rounds = [{"bare": (1.0, 2.0), "ours": (2.0, 2.5)}, {"bare": (3.0, 4.0), "ours": (6.0, 5.0)}]
    row = training.row("ours", "bare", rounds, 12)
    assert list(row) == COLUMNS[3:]
    assert (row["images_s"], row["ratio"], row["ratio_low"], row["ratio_high"]) == (4.0, 0.5, 0.5, 0.5)
    assert (row["cpu_images_s"], row["cpu_ratio"], row["cpu_ratio_low"], row["cpu_ratio_high"]) == (3.6, 0.8, 0.8, 0.8)


def test_both_loops_begin_at_the_same_loss_and_learn_the_same_batches(training, tmp_path):
    epoch = one_epoch(training, tmp_path)
    bare, ours = training.bare(epoch), training.ours(epoch)
    assert bare(0, 1) == pytest.approx(ours(0, 1), rel=1e-5)
    # On the same few images again and again; ours warms up, so that it is slower at it.
    losses = [[steps(0, 6) for _ in range(10)] for steps in (bare, ours)]
    assert all(found[-1] < found[0] for found in losses)


def test_another_loss_ends_the_benchmark(training):
    training.check_losses({training.BARE: 3.0, training.LOOP: 3.0001}, "fp32")
    for other in (3.001, float("nan")):
        with pytest.raises(SystemExit, match=f"Loop.*{other}"):
            training.check_losses({training.BARE: 3.0, training.LOOP: other}, "fp32")


def test_train_is_timed_in_turns_that_end_with_its_return(training, tmp_path, monkeypatch):
    epoch, answers = one_epoch(training, tmp_path), []
    written = tmp_path / "trained.safetensors"
    monkeypatch.setattr(training, "answer", lambda value: answers.append((*value, written.exists())))
    training.whole(epoch, iter([[0, 2], [2, 5], [5, 6]]))
    assert [there for *_, there in answers] == [False, False, True]
    assert all(clock > 0 and processor > 0 for clock, processor, _ in answers)


def test_folder_and_shards_hold_the_same_images(training, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mean = training.stored_images(tmp_path / "stored", 12, (40, 30))
    folder, shards = (open_dataset(str(tmp_path / "stored" / stored), "train") for stored in training.STORED)
    files = list((tmp_path / "stored" / "folder").rglob("*.jpeg"))
    assert sum(path.stat().st_size for path in files) // 12 == mean
    images = [
        sorted((int(of.labels[i]), np.asarray(of.read(i)).tobytes()) for i in range(len(of))) for of in (folder, shards)
    ]
    assert len(images[0]) == 12
    assert images[0] == images[1]


def test_an_earlier_run_of_the_same_setting_is_replaced_alone(training):
    before = [{"setting": setting, "what": what} for setting in ("a", "b") for what in ("x", "y")]
    new = [{"setting": "b", "what": "z"}]
    assert training.merged(before, new) == [*before[:2], *new]


def test_a_tiny_round_reads_from_both_with_and_without_readers(run_benchmark):
    rows = run_benchmark("training.py", "--only", "reading", "--readers", "0,1")
    assert list(rows[0]) == COLUMNS
    what = ["decode", "decode, crop, flip", "all augmentations, 0 readers", "all augmentations, 1 readers"]
    assert [row["what"] for row in rows] == [f"{stored}: {name}" for stored in ("folder", "shards") for name in what]
    assert {row["against"] for row in rows} == {"folder: decode", "shards: decode"}
    assert all(float(row["images_s"]) > 0 and float(row["cpu_images_s"]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_a_tiny_round_trains_in_all_three_ways(run_benchmark, arithmetic):
    rows = run_benchmark("training.py", "--only", "training", "--batch-size", "8", "--arithmetic", arithmetic)
    assert list(rows[0]) == COLUMNS
    assert [row["what"] for row in rows] == ["bare loop", "Loop", "train()"]
    assert {(row["against"], row["setting"]) for row in rows} == {("bare loop", f"glyphs, 16 steps of 8, {arithmetic}")}
    assert float(rows[0]["ratio"]) == 1.0
