"""Training: it learns, the seed decides everything, a stopped run goes on exactly, and bad input is named."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from hydradeploy import evaluate, export, train
from hydradeploy.data.augment import Augmentation
from hydradeploy.errors import EnvironmentFailed, InputError, IntegrityError, UsageError
from hydradeploy.spec import Geometry
from hydradeploy.supernet.model import Supernet
from hydradeploy.supernet.store import load
from hydradeploy.training import metrics
from hydradeploy.training import state as states
from hydradeploy.training.loop import Loop
from hydradeploy.training.presets import DIGITS
from hydradeploy.training.recipe import Method, Preset, Recipe
from hydradeploy.training.running import Running
from tests.conftest import Cli, geometry, require, write_supernet
from tests.training.test_processes import SHAPE as SMALL_SHAPE
from tests.training.test_processes import Together

SHAPE = geometry(
    image_size=8,
    patch_size=4,
    channels=1,
    head_dim=8,
    heads=3,
    trained_heads=(1, 2, 3),
    depth=1,
    mlp_ratio=2.0,
)


def preset(shape: Geometry = SHAPE, **recipe: object) -> Preset:
    changes = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0} | recipe
    return msgspec.structs.replace(DIGITS, geometry=shape, recipe=Recipe(**changes))  # type: ignore[arg-type]


SHIFTED = Augmentation(shift=0.2)

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_every_subnet_learns(blobs, tmp_path):
    trained = train(blobs, tmp_path / "s", preset(epochs=40, learning_rate=3e-3))
    assert set(trained.top1) == {1, 2, 3}
    assert min(trained.top1.values()) > 0.8
    weights = load(tmp_path / "s")
    assert weights.spec.class_names == tuple("0123456789")
    assert weights.spec.geometry == SHAPE


def test_the_seed_decides_every_bit(blobs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(blobs, tmp_path / name, preset(seed=seed, augment=SHIFTED))
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("stop", [1, 7, 10, 13, 20])
def test_a_stopped_run_that_goes_on_is_the_run_that_was_not_stopped(blobs, tmp_path, stop):
    recipe = preset(augment=SHIFTED)
    train(blobs, tmp_path / "whole", recipe)

    def interrupting(what: str, done: int, total: int) -> None:
        if what == "training" and done == stop:
            signal.raise_signal(signal.SIGINT)

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(blobs, tmp_path / "s", recipe, report=interrupting, say=said.append)
    assert "--resume" in said[-1]
    usable = load(tmp_path / "s").model()
    assert usable(torch.zeros(1, 1, 8, 8), heads=2).shape == (1, 10)
    train(blobs, tmp_path / "s", recipe, resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("s")} == {"s", "s.metrics.jsonl"}
    assert [line.step for line in metrics.read(tmp_path / "s")] == [10, 20]


def test_a_run_killed_between_epochs_goes_on_from_the_last_one(blobs, tmp_path):
    recipe = preset(epochs=3)
    train(blobs, tmp_path / "whole", recipe)

    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 25:
            raise Killed

    with pytest.raises(Killed):
        train(blobs, tmp_path / "s", recipe, report=kill)
    assert not (tmp_path / "s").exists()
    train(blobs, tmp_path / "s", recipe, resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def interrupted(data: str, out: Path, recipe: Preset) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(data, out, recipe, report=stop)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (preset(seed=3), "seed (0, not 3)"),
        (preset(epochs=5), "epochs (2, not 5)"),
        (preset(msgspec.structs.replace(SHAPE, depth=2)), "depth (1, not 2)"),
    ],
)
def test_resuming_as_another_run_names_what_differs(blobs, tmp_path, other, named):
    interrupted(blobs, tmp_path / "s", preset())
    with pytest.raises(UsageError) as refused:
        train(blobs, tmp_path / "s", other, resume=True)
    assert named in refused.value.message


def test_resuming_with_other_images_is_refused(blobs, tmp_path):
    interrupted(blobs, tmp_path / "s", preset())
    with np.load(blobs) as arrays:
        changed = dict(arrays)
    changed["train_images"] = changed["train_images"][::-1]
    np.savez(tmp_path / "other.npz", **changed)
    with pytest.raises(UsageError, match="the training images"):
        train(str(tmp_path / "other.npz"), tmp_path / "s", preset(), resume=True)


def test_resuming_from_another_start_is_refused(blobs, tmp_path):
    write_supernet(
        tmp_path / "small", geometry(**(msgspec.structs.asdict(SHAPE) | {"heads": 1, "trained_heads": (1,)}))
    )
    interrupted(blobs, tmp_path / "s", preset())
    with pytest.raises(UsageError, match="differs in the supernet to start from"):
        train(blobs, tmp_path / "s", preset(), init_from=tmp_path / "small", resume=True)


def test_resuming_without_a_state_or_with_a_damaged_one_is_refused(blobs, tmp_path):
    with pytest.raises(UsageError, match="nothing to resume"):
        train(blobs, tmp_path / "s", preset(), resume=True)
    interrupted(blobs, tmp_path / "s", preset())
    state = tmp_path / "s.training"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(IntegrityError, match=r"s\.training"):
        train(blobs, tmp_path / "s", preset(), resume=True)


def test_heads_of_weight_zero_are_never_drawn(blobs, tmp_path):
    """Slices of heads that are never drawn see no gradient: their biases keep the zeros they began with."""
    train(blobs, tmp_path / "s", preset(method=Method(sample_weights=(100, 0, 0))))
    tensors = load(tmp_path / "s").tensors
    assert tensors["blocks.0.attn.proj.bias"][:8].abs().min() > 0
    assert tensors["blocks.0.attn.proj.bias"][8:].abs().max() == 0
    train(blobs, tmp_path / "t", preset(method=Method(sample_weights=(0, 50, 50))))
    tensors = load(tmp_path / "t").tensors
    assert tensors["blocks.0.attn.proj.bias"].abs().min() > 0


def test_a_smaller_supernet_to_start_from_is_kept_exactly_by_its_own_heads(blobs, tmp_path):
    small = geometry(**(msgspec.structs.asdict(SHAPE) | {"heads": 2, "trained_heads": (1, 2)}))
    write_supernet(tmp_path / "small", small)
    still = preset(epochs=1, learning_rate=1e-30, final_rate=0.0, weight_decay=0.0)
    train(blobs, tmp_path / "s", still, init_from=tmp_path / "small")
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    grown, before = load(tmp_path / "s").model(), load(tmp_path / "small").model()
    for heads in (1, 2):
        assert torch.equal(grown(images, heads), before(images, heads))


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_what_was_saved(blobs, tmp_path, cli: Cli):
    options = ("--data", blobs, "--out", tmp_path / "s", "--image-size", 8, "--patch-size", 4, "--batch-size", 16)
    ran = cli("train", *options, "--epochs", 2, "--lr", 1e30)
    assert ran.code == 11
    assert "the loss is nan at step" in ran.err
    assert not (tmp_path / "s").exists()


def test_the_rate_warms_up_and_ends_low():
    recipe = Recipe(epochs=40, learning_rate=1e-3, warmup_epochs=5)
    rates = [recipe.rate(step, 10) for step in range(400)]
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == rates[50] == pytest.approx(1e-3)
    assert rates[25] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[225] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[-1] == pytest.approx(1e-5, rel=0.02)
    assert rates[:51] == sorted(rates[:51])
    assert rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--data", "no-such-set"], 2, "no such data set"),
        (["--sample-weights", "0.5,49.5,50"], 2, "'0.5,49.5,50' is not a list of counts"),
        (["--sample-weights", "50,50"], 2, "2 sample weights for 10 head counts"),
        (["--sample-weights", "10,10,10,10,10,10,10,10,10,9"], 2, "sum to 99"),
        (["--sample-weights", "150,-50,0,0,0,0,0,0,0,0"], 2, "-50 is no sample weight"),
        (["--batch-size", "1000"], 11, "too few for a batch of 1000"),
        (["--lr", "0"], 2, "learning_rate must be above 0"),
        (["--lr", "nan"], 2, "learning_rate must be above 0"),
        (["--seed", str(2**64)], 2, "seed must be below 2^64"),
        (["--patch-size", "3"], 2, "image_size 32 is not a multiple of patch_size 3"),
        (["--init-from", "none.safetensors"], 2, "no such file"),
        (["--resume"], 2, "nothing to resume"),
        (["--device", "tpu"], 2, "no device 'tpu' to train on"),
        pytest.param(["--device", "cuda"], 8, "finds no GPU here", marks=WITHOUT_GPU),
    ],
)
def test_options_that_make_no_sense_are_refused(blobs, tmp_path, cli: Cli, options, code, text):
    data = [] if "--data" in options else ["--data", blobs]
    ran = cli("train", *data, "--out", tmp_path / "s", *options)
    assert ran.code == code, ran.err
    assert text in ran.err
    assert not (tmp_path / "s").exists()


def test_an_existing_supernet_is_not_trained_over(blobs, tmp_path, cli: Cli):
    (tmp_path / "s").write_bytes(b"precious")
    ran = cli("train", "--data", blobs, "--out", tmp_path / "s")
    assert ran.code == 2
    assert "replace it with --force" in ran.err
    assert "--resume" not in ran.err, "there is no state"
    assert (tmp_path / "s").read_bytes() == b"precious"
    assert "its run has come to its end" in cli("train", "--data", blobs, "--out", tmp_path / "s", "--resume").err


@pytest.mark.parametrize("option", ["--force", "--resume"])
@pytest.mark.parametrize("name", [".", "", "d", "pipe"])
def test_what_is_no_file_is_not_trained_over(blobs, tmp_path, cli: Cli, monkeypatch, name, option):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    os.mkfifo("pipe")  # as a device would be, which root could replace
    ran = cli("train", "--data", blobs, "--out", name, option)
    assert ran.code == 2
    assert "name a file with --out" in ran.err
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize("options", [("--teacher", "s", "--teacher-share", "0.5"), ("--init-from", "s")])
def test_what_a_run_goes_by_is_not_overwritten_by_it(blobs, tmp_path, cli: Cli, monkeypatch, options):
    """Stopped half-way it would have lost its teacher, and could not be resumed."""
    monkeypatch.chdir(tmp_path)
    write_supernet(Path("s"))
    before = Path("s").read_bytes()
    ran = cli("train", "--data", blobs, "--out", tmp_path / "s", "--force", *options)
    assert ran.code == 2
    assert "name another with --out" in ran.err
    assert Path("s").read_bytes() == before


def test_what_a_killed_run_left_is_not_overwritten_unless_asked(blobs, tmp_path):
    """There is no supernet yet, only its state and its metrics."""

    def kill(what: str, done: int, total: int) -> None:
        if done == 15:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(blobs, tmp_path / "s", preset(), report=kill)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "s.training" in left
    with pytest.raises(UsageError, match="the state of a run that was cut short, exists") as refused:
        train(blobs, tmp_path / "s", preset())
    assert str(refused.value.hint).startswith("go on with --resume, replace it with --force")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
    train(blobs, tmp_path / "s", preset(), force=True)
    assert not (tmp_path / "s.training").exists()


def test_what_another_run_wrote_while_this_one_read_its_images_is_not_overwritten(blobs, tmp_path):
    def build(shape: Geometry) -> Supernet:
        (tmp_path / "s").write_bytes(b"precious")
        return Supernet(shape)

    with pytest.raises(UsageError, match="s exists"):
        train(blobs, tmp_path / "s", preset(), build=build)
    assert (tmp_path / "s").read_bytes() == b"precious"


def test_two_processes_do_not_train_one_supernet(blobs, tmp_path):
    def meanwhile(what: str, done: int, total: int) -> None:
        if done == 5:
            with pytest.raises(UsageError, match="another process is training it"):
                train(blobs, tmp_path / "s", preset())

    train(blobs, tmp_path / "s", preset(), report=meanwhile)
    assert [line.step for line in metrics.read(tmp_path / "s")] == [10, 20]


def test_a_run_whose_loss_was_lost_goes_on_with_a_smaller_rate(blobs, tmp_path):
    interrupted(blobs, tmp_path / "s", preset())
    said: list[str] = []
    train(blobs, tmp_path / "s", preset(learning_rate=1e-4), resume=True, say=said.append)
    assert said[0] == "goes on with a learning rate of 0.0001, not 0.001: another run from here on"


def test_weights_that_are_not_finite_are_not_saved(blobs, tmp_path, monkeypatch):
    """Which the loss of the same step, taken before, does not show."""
    step = Loop.step

    def spoiled(self, number, pieces):
        step(self, number, pieces)
        if number == 19:
            with torch.no_grad():
                self.model.head.bias.fill_(float("inf"))

    monkeypatch.setattr(Loop, "step", spoiled)
    with pytest.raises(InputError, match="weights are not finite after 20 steps; what was saved before is kept"):
        train(blobs, tmp_path / "s", preset())
    assert states.load(tmp_path / "s").progress.step == 10


def test_a_full_memory_is_no_bug_of_ours(blobs, tmp_path, monkeypatch):
    for error, text in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"), "memory is full: CUDA out of"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "memory is full",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "a process that reads images has"),
    ):

        def fails(self, number, pieces, error=error):
            raise error

        monkeypatch.setattr(Loop, "step", fails)
        with pytest.raises(EnvironmentFailed, match=text) as failed:
            train(blobs, tmp_path / "s", preset())
        assert "\n" not in failed.value.message
        assert failed.value.hint


def test_torch_compile_without_a_compiler_is_no_bug_of_ours(blobs, tmp_path):
    nowhere = {"PATH": str(tmp_path), "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    options = ("--data", blobs, *SMALL_SHAPE, "--compile", "--out", str(tmp_path / "s"))
    ((code, _, err),) = Together(1, *options, prelude=f"import os\nos.environ |= {nowhere}").end()
    assert (code, "error: torch.compile finds no compiler: " in err) == (8, True), err
    assert "leave --compile out" in err


def test_splits_with_other_classes_are_refused(tmp_path, cli: Cli):
    for split, classes in (("train", "abcd"), ("val", "abc")):
        for name in classes:
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (8, 8)).save(tmp_path / "d" / split / name / f"{i}.png")
    ran = cli("train", "--data", tmp_path / "d", "--out", tmp_path / "s", "--batch-size", 4)
    assert ran.code == 11
    assert "the splits have different classes (d)" in ran.err


def test_the_command_tells_loss_accuracy_and_time_left(blobs, tmp_path, cli: Cli):
    shape = ("--image-size", 8, "--patch-size", 4, "--head-dim", 8, "--trained-heads", "1-3", "--depth", 1)
    options = ("--data", blobs, "--out", tmp_path / "s", *shape, "--epochs", 2, "--batch-size", 16)
    ran = cli("train", *options)
    assert ran.code == 0, ran.err
    assert "epoch 2/2: loss " in ran.err
    assert "top-1 h01 " in ran.err
    assert "s left" in ran.err
    assert "top-1 on held-out images h01 " in ran.out
    document = json.loads(cli("train", *options, "--force", "--json").out)
    assert set(document["top1"]) == {"h01", "h02", "h03"}


def test_a_run_of_one_process_answers_whatever_another_program_left_in_the_environment(
    blobs, tmp_path, cli: Cli, monkeypatch
):
    monkeypatch.setenv("RANK", "3")
    options = ("--data", blobs, "--out", tmp_path / "s", "--image-size", 8, "--patch-size", 4, "--epochs", 1)
    ran = cli("train", *options, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["out"] == str(tmp_path / "s")


def test_metrics_go_to_json_lines_and_to_tensorboard(blobs, tmp_path):
    require("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(blobs, tmp_path / "s", preset(epochs=3), running=Running(tensorboard=str(tmp_path / "board")))
    lines = metrics.read(tmp_path / "s")
    assert [(line.epoch, line.step) for line in lines] == [(1, 10), (2, 20), (3, 30)]
    assert all(line.images_per_second > 0 and 0 <= line.waiting < 1 and not line.bad_images for line in lines)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"loss", "learning_rate", "images_per_second", "waiting", "top1/h01", "top1/h03"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line.loss for line in lines])
    assert [event.step for event in board.Scalars("top1/h02")] == [10, 20, 30]


def test_metrics_of_a_run_that_goes_on_hold_each_step_once(blobs, tmp_path):
    """What was told after the last save is told again; a line that a kill cut off does not count."""

    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 25:
            raise Killed

    with pytest.raises(Killed):
        train(blobs, tmp_path / "s", preset(epochs=3), report=kill)
    path = metrics.path_of(tmp_path / "s")
    extra = path.read_bytes().splitlines(keepends=True)[-1].replace(b'"step":20', b'"step":25')
    path.write_bytes(path.read_bytes() + extra + b'{"step":3')
    train(blobs, tmp_path / "s", preset(epochs=3), resume=True)
    assert [line.step for line in metrics.read(tmp_path / "s")] == [10, 20, 30]
    path.write_bytes(b"{}\n")
    with pytest.raises(IntegrityError, match="line 1"):
        metrics.read(tmp_path / "s")


def test_a_loss_that_is_lost_later_keeps_the_last_good_state(blobs, tmp_path, monkeypatch):
    """Weights go bad at step 14; what is on disk is of step 10 and whole."""
    step = Loop.step

    def spoiled(self, number, pieces):
        if number == 14:
            with torch.no_grad():
                self.model.head.bias.fill_(float("nan"))
        step(self, number, pieces)

    monkeypatch.setattr(Loop, "step", spoiled)
    with pytest.raises(InputError, match=r"the loss is nan at step 14 with [123] heads"):
        train(blobs, tmp_path / "s", preset(epochs=3))
    monkeypatch.undo()
    found = states.load(tmp_path / "s")
    assert found.progress.step == 10
    assert all(tensor.isfinite().all() for name, tensor in found.tensors.items() if name != "losses")
    train(blobs, tmp_path / "whole", preset(epochs=3))
    train(blobs, tmp_path / "s", preset(epochs=3), resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_resuming_with_other_classes_is_refused(blobs, tmp_path):
    interrupted(blobs, tmp_path / "s", preset())
    with np.load(blobs) as arrays:
        np.savez(tmp_path / "named.npz", **arrays, class_names=np.array(list("abcdefghij")))
    with pytest.raises(UsageError, match="the classes"):
        train(str(tmp_path / "named.npz"), tmp_path / "s", preset(), resume=True)


def test_a_run_is_saved_every_so_many_steps(blobs, tmp_path):
    class Killed(BaseException):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 17:
            raise Killed

    train(blobs, tmp_path / "whole", preset())
    with pytest.raises(Killed):
        train(blobs, tmp_path / "s", preset(), running=Running(save_every=4), report=kill)
    assert states.load(tmp_path / "s").progress.step == 16
    train(blobs, tmp_path / "s", preset(), resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_teacher_that_does_not_fit_is_refused_by_field(blobs, tmp_path):
    taught = preset(method=Method(teacher_share=0.5))
    write_supernet(tmp_path / "t", geometry(**(msgspec.structs.asdict(SHAPE) | {"classes": 7})))
    with pytest.raises(InputError, match="the teacher's classes is 7, the supernet's 10"):
        train(blobs, tmp_path / "s", taught, teacher=tmp_path / "t")
    with pytest.raises(UsageError, match="need each other"):
        train(blobs, tmp_path / "s", taught)
    with pytest.raises(UsageError, match="none: no such file"):
        train(blobs, tmp_path / "s", taught, teacher=tmp_path / "none")
    train(blobs, tmp_path / "own", preset())
    with np.load(blobs) as arrays:
        np.savez(tmp_path / "named.npz", **arrays, class_names=np.array(list("1023456789")))
    with pytest.raises(InputError, match="own: the teacher has class '0' where the data has '1'"):
        train(str(tmp_path / "named.npz"), tmp_path / "s", taught, teacher=tmp_path / "own")
    train(blobs, tmp_path / "s", taught, teacher=tmp_path / "own")
    assert not torch.equal(load(tmp_path / "s").tensors["head.weight"], load(tmp_path / "own").tensors["head.weight"])


def test_a_full_disk_keeps_the_last_state_and_says_so(blobs, tmp_path, cli: Cli):
    import subprocess
    import sys

    out = tmp_path / "s"
    options = ["train", "--data", blobs, "--out", str(out), "--epochs", "3", "--batch-size", "16", "--image-size", "8"]
    options += ["--patch-size", "4", "--head-dim", "8", "--trained-heads", "1-3", "--depth", "1"]
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from hydradeploy.training import state
real = state.save
def save(out, found):
    real(out, found)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
state.save = save
from hydradeploy.cli import main
sys.argv = ["hydradeploy", *{options!r}]
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 12, ran.stderr
    assert "s.training" in ran.stderr or "metrics" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert states.load(out).progress.step == 10
    ran_on = cli(*options, "--resume")
    assert ran_on.code == 0, ran_on.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch has deprecated
def test_compiled_it_learns_the_same(blobs, tmp_path):
    train(blobs, tmp_path / "eager", preset(epochs=4, learning_rate=3e-3))
    train(blobs, tmp_path / "compiled", preset(epochs=4, learning_rate=3e-3), running=Running(compile=True))
    eager, compiled = load(tmp_path / "eager").tensors, load(tmp_path / "compiled").tensors
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow
def test_digits_reach_96_percent_and_the_smallest_subnet_is_clearly_worse(tmp_path):
    require("sklearn")
    train("digits", tmp_path / "s", DIGITS)
    export(tmp_path / "s", tmp_path / "b", data="digits")
    top1 = {row.artifact: row.top1 for row in evaluate(tmp_path / "b", "digits").rows}
    assert top1["h12-fp32"] >= 0.96
    assert top1["h03-fp32"] < top1["h12-fp32"] - 0.02
