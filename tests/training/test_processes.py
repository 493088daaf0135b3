"""Processes on one machine, over gloo: they share each batch, a killed run goes on exactly, all end together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pytest
import torch

from hydradeploy.errors import EnvironmentFailed
from hydradeploy.supernet.store import load
from hydradeploy.training import metrics
from hydradeploy.training.ranks import ranks
from tests.conftest import Cli

SHAPE = "--image-size 8 --patch-size 4 --head-dim 8 --trained-heads 1-3 --depth 1 --batch-size 16".split()  # noqa: SIM905


# A server that has torch imported forks each process: importing it takes longer than what is tested here.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["hydradeploy.training.train", "hydradeploy.cli"])


def _begin(rank: int, count: int, port: str, options: list[str], output: str, prelude: str) -> None:
    """What one process of a run does, as torchrun starts it."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{kind}", os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    exec(prelude, {})
    from hydradeploy.cli import main

    sys.argv = ["hydradeploy", "train", *options]
    main()


class Together:
    """So many processes of one `train`."""

    def __init__(self, count: int, *options: str, prelude: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._directory = TemporaryDirectory()
        self._outputs = [Path(self._directory.name) / str(rank) for rank in range(count)]
        self.processes = [
            _FORKSERVER.Process(target=_begin, args=(rank, count, port, list(options), str(output), prelude))
            for rank, output in enumerate(self._outputs)
        ]
        for process in self.processes:
            process.start()

    def until(self, text: str) -> None:
        """Wait until the first process says this."""
        deadline = time.monotonic() + 120
        while text not in self._text(0, "err"):
            assert self.processes[0].is_alive(), self._text(0, "err")
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each."""
        for process in self.processes:
            process.join(120)
        with self._directory:
            return [
                (process.exitcode, self._text(rank, "out"), self._text(rank, "err"))
                for rank, process in enumerate(self.processes)
            ]

    def kill(self, by: signal.Signals) -> None:
        for process in self.processes:
            os.kill(process.pid, by)

    def _text(self, rank: int, kind: str) -> str:
        path = Path(f"{self._outputs[rank]}.{kind}")
        return path.read_text() if path.exists() else ""


def trained(count: int, *options: str) -> list[tuple[int, str, str]]:
    ended = Together(count, *options).end()
    assert [code for code, _, _ in ended] == [0] * count, ended
    return ended


def test_two_that_draw_alike_are_one_up_to_rounding_and_only_the_first_speaks(blobs, tmp_path):
    same = ("--data", blobs, *SHAPE, "--epochs", "2", "--head-draw", "shared")
    trained(1, *same, "--out", str(tmp_path / "one"))
    (_, out, err), (_, other_out, other_err) = trained(2, *same, "--out", str(tmp_path / "two"))
    assert "top-1 on held-out images" in out
    assert "epoch 2/2" in err
    assert other_out == ""
    assert "epoch" not in other_err
    one, two = load(tmp_path / "one").tensors, load(tmp_path / "two").tensors
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    # The held-out images, an odd number, are shared and counted once.
    last = metrics.read(tmp_path / "two")[-1]
    for share in last.top1.values():
        assert share * 45 == pytest.approx(round(share * 45))


def test_two_that_draw_each_its_own_train_something_else(blobs, tmp_path):
    trained(2, "--data", blobs, *SHAPE, "--epochs", "1", "--out", str(tmp_path / "own"))
    trained(2, "--data", blobs, *SHAPE, "--epochs", "1", "--out", str(tmp_path / "same"), "--head-draw", "shared")
    own, same = load(tmp_path / "own").tensors, load(tmp_path / "same").tensors
    assert not torch.equal(own["head.weight"], same["head.weight"])


OPTIONS = ("--anchors", "largest", "--distil", "0.5", "--accumulate", "2", "--save-every", "3")


def test_a_killed_run_of_three_that_goes_on_is_the_run_that_was_not_killed(blobs, tmp_path):
    """Three, whose sums depend on the order in which they are added."""
    same = ("--data", blobs, *SHAPE, "--batch-size", "18", "--epochs", "3", *OPTIONS)
    trained(3, *same, "--out", str(tmp_path / "whole"))
    # Slow enough to be killed in the middle, whatever the machine's speed.
    slow = "import time\nfrom hydradeploy.training.loop import Loop\nreal = Loop.step\n"
    slow += "def step(self, n, p):\n    time.sleep(0.1)\n    real(self, n, p)\nLoop.step = step\n"
    run = Together(3, *same, "--out", str(tmp_path / "s"), prelude=slow)
    state = tmp_path / "s.training"
    deadline = time.monotonic() + 100
    while not state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill(signal.SIGKILL)
    assert [code for code, _, _ in run.end()] == [-9, -9, -9]
    assert not (tmp_path / "s").exists()
    trained(3, *same, "--out", str(tmp_path / "s"), "--resume")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [line.step for line in metrics.read(tmp_path / "s")] == [8, 16, 24]
    assert not state.exists()


def test_ctrl_c_stops_all_at_one_step_and_one_process_may_go_on(blobs, tmp_path):
    same = ("--data", blobs, *SHAPE, "--epochs", "40", "--out", str(tmp_path / "s"))
    run = Together(2, *same)
    run.until("epoch 1/")
    run.kill(signal.SIGINT)
    ended = run.end()
    assert [code for code, _, _ in ended] == [130, 130], ended
    assert "is usable as it is; go on with --resume" in ended[0][2]
    assert load(tmp_path / "s").spec.geometry.heads == 3
    ((_, _, err),) = trained(1, *same, "--resume")
    assert "goes on with 1 processes, not 2" in err


def test_a_loss_that_is_not_finite_ends_both_with_the_step(blobs, tmp_path):
    ended = Together(2, "--data", blobs, *SHAPE, "--lr", "1e30", "--out", str(tmp_path / "s")).end()
    assert [code for code, _, _ in ended] == [11, 11]
    assert all("the loss is nan at step" in err for _, _, err in ended)


def test_a_batch_that_cannot_be_shared_is_refused(blobs, tmp_path):
    ended = Together(2, "--data", blobs, *SHAPE, "--accumulate", "3", "--out", str(tmp_path / "s")).end()
    assert [code for code, _, _ in ended] == [2, 2]
    assert "a batch of 16 cannot be shared by 2 processes in 3 parts" in ended[0][2]


def test_the_others_end_with_one_line_when_one_is_killed(blobs, tmp_path):
    run = Together(2, "--data", blobs, *SHAPE, "--epochs", "500", "--out", str(tmp_path / "s"))
    run.until("epoch 1/")
    run.processes[1].kill()
    code, _, err = run.end()[0]
    assert code == 12, err
    assert "error: another process of this run has ended" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_torchrun_starts_them(blobs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hydradeploy", "train"]
    ended = subprocess.run(
        [*command, "--data", blobs, *SHAPE, "--epochs", "1", "--out", str(tmp_path / "s")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "top-1 on held-out images" in ended.stdout
    assert Path(tmp_path / "s").exists()


def test_readers_do_not_outlive_a_run_that_is_killed(tmp_path):
    """They have its lock too: whoever starts it again at once is not to be told that it still runs."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    arrays = {f"{split}_images": images for split in ("train", "val")}
    np.savez(tmp_path / "i.npz", **arrays, train_labels=np.arange(64) % 2, val_labels=np.arange(64) % 2)
    (tmp_path / "c.toml").write_text("[recipe.augment]\nshift = 0.0\ncrop_scale = [0.5, 1.0]\n")
    same = ("--data", str(tmp_path / "i.npz"), "--config", str(tmp_path / "c.toml"), *SHAPE, "--workers", "2")
    run = Together(1, *same, "--epochs", "10000", "--out", str(tmp_path / "s"))
    run.until("epoch 1/")
    readers = psutil.Process(run.processes[0].pid).children()
    assert len(readers) >= 2
    run.kill(signal.SIGKILL)
    _, alive = psutil.wait_procs(readers, timeout=2)
    assert not alive
    run.end()


@pytest.mark.parametrize(
    ("variable", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1"), ("LOCAL_WORLD_SIZE", "0")]
)
def test_a_variable_of_torchrun_that_is_no_number_is_named(monkeypatch, cli: Cli, tmp_path, variable, value):
    monkeypatch.setenv(variable, value)
    ran = cli("train", "--data", "digits", "--out", tmp_path / "supernet.safetensors", *SHAPE)
    assert ran.code == 2
    assert f"error: the variable {variable} is {value!r}, not a number" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", [None, "taken", "x"])
def test_processes_that_cannot_find_each_other_are_no_bug(monkeypatch, port):
    with socket.create_server(("127.0.0.1", 0)) as other:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_PORT", raising=False)
        if port is not None:
            monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]) if port == "taken" else port)
        with pytest.raises(EnvironmentFailed, match="do not find each other") as failed, ranks("cpu"):
            pass
        assert "torchrun" in str(failed.value.hint)
