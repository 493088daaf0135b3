"""Training supernets whose subnets have each their own classifier: steps by their definition, and exact resuming."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F

from hydradeploy import train
from hydradeploy.errors import InputError, UsageError
from hydradeploy.supernet.model import Supernet
from hydradeploy.supernet.store import load
from hydradeploy.training import state as states
from hydradeploy.training.batches import Batch
from hydradeploy.training.loop import Loop
from hydradeploy.training.presets import DIGITS
from hydradeploy.training.ranks import Ranks
from hydradeploy.training.recipe import Method, Preset, Recipe
from hydradeploy.training.running import Running
from tests.conftest import Cli, geometry
from tests.training.test_processes import SHAPE as OPTIONS
from tests.training.test_processes import Together
from tests.training.test_train import SHAPE as SHARED

SHAPE = msgspec.structs.replace(SHARED, classifiers="separate")
ALONE = Ranks(0, 1, torch.device("cpu"))
CLASSIFIERS = [f"head.h0{heads}.{part}" for heads in (1, 2, 3) for part in ("weight", "bias")]


def preset(shape=SHAPE, **recipe) -> Preset:
    changes = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0} | recipe
    return msgspec.structs.replace(DIGITS, geometry=shape, recipe=Recipe(**changes))


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(12, 1, 8, 8, generator=generator), torch.randint(0, 10, (12,), generator=generator))
        for _ in range(count)
    ]


def looped(method: Method, steps: int, **recipe) -> tuple[Loop, dict[str, torch.Tensor]]:
    """A loop after so many steps, and the weights before."""
    changes = {"epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-2, "final_rate": 1e-2} | recipe
    model = Supernet(SHAPE).initialise(torch.Generator().manual_seed(0))
    loop = Loop(model, Recipe(method=method, **changes), Running(), ALONE, 10)
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    for step, batch in enumerate(batches(steps)):
        loop.step(step, iter([batch]))
    return loop, before


def test_every_subnet_learns(blobs, tmp_path):
    trained = train(blobs, tmp_path / "s", preset(epochs=25, learning_rate=3e-3))
    assert all(share > 0.8 for share in trained.top1.values()), trained.top1
    assert load(tmp_path / "s").spec.geometry == SHAPE


@pytest.mark.parametrize("stop", [1, 2, 13])
def test_a_stopped_run_that_goes_on_is_the_run_that_was_not_stopped(blobs, tmp_path, stop):
    class Killed(BaseException):
        pass

    def report(what, done, total):
        if done == stop + 1:
            raise Killed

    train(blobs, tmp_path / "whole", preset())
    every = Running(save_every=1)
    with pytest.raises(Killed):
        train(blobs, tmp_path / "s", preset(), running=every, report=report)
    found = states.load(tmp_path / "s")
    assert found.progress.step == stop
    assert {f"exp_avg.{name}" for name in CLASSIFIERS} <= set(found.tensors)
    train(blobs, tmp_path / "s", preset(), running=every, resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_going_on_with_the_other_kind_of_classifier_is_refused(blobs, tmp_path):
    class Killed(BaseException):
        pass

    def report(what, done, total):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        train(blobs, tmp_path / "s", preset(), running=Running(save_every=1), report=report)
    with pytest.raises(UsageError, match=r"classifiers \(separate, not shared\)"):
        train(blobs, tmp_path / "s", preset(msgspec.structs.replace(SHAPE, classifiers="shared")), resume=True)


@pytest.mark.parametrize("decays", [True, False])
def test_weight_decay_reaches_classifiers_that_were_not_drawn_or_does_not(decays):
    loop, before = looped(Method(sample_weights=(0, 100, 0), decay_unsampled=decays), 3)
    after, factor = loop.model.state_dict(), (1 - 1e-2 * 0.05) ** 3 if decays else 1.0
    for name in CLASSIFIERS:
        if "h02" in name:
            assert not torch.equal(after[name], before[name])
        else:
            torch.testing.assert_close(after[name], before[name] * (1.0 if name.endswith("bias") else factor))


@pytest.mark.parametrize("decays", [True, False])
def test_both_ways_to_decay_are_adamw_on_all_that_the_steps_train(decays):
    """Every subnet in every step, so that nothing is left alone; AdamW by torch on the same losses."""
    loop, before = looped(Method(draws=3, decay_unsampled=decays), 4)
    fresh = Supernet(SHAPE)
    fresh.load_state_dict(before)
    decayed = [p for n, p in fresh.named_parameters() if p.ndim > 1 and n not in ("cls_token", "pos_embed")]
    others = [p for n, p in fresh.named_parameters() if p.ndim == 1 or n in ("cls_token", "pos_embed")]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2)
    for batch in batches(4):
        adamw.zero_grad()
        losses = [F.cross_entropy(fresh(batch.images, k), batch.labels, label_smoothing=0.1) for k in (1, 2, 3)]
        (sum(losses) / 3).backward()
        adamw.step()
    for name, tensor in fresh.state_dict().items():
        if name.endswith("qkv.bias"):
            continue  # that of keys has no gradient but rounding, of which AdamW makes steps
        torch.testing.assert_close(loop.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_momentum_goes_on_in_a_classifier_that_is_not_drawn_as_in_slices_of_a_shared_one():
    """Two steps of AdamW with gradients, one with a gradient of zero: torch's own on that parameter alone."""
    loop, before = looped(Method(anchors="largest", draws=0), 1)
    first = {name: parameter.grad.clone() for name, parameter in loop.model.named_parameters()}
    loop._drawing._method = Method(sample_weights=(100, 0, 0))
    loop.step(1, iter(batches(1)))
    alone = torch.nn.Parameter(before["head.h03.weight"].clone())
    adamw = torch.optim.AdamW([alone], lr=1e-2, weight_decay=0.05)
    for gradient in (first["head.h03.weight"], torch.zeros_like(alone)):
        alone.grad = gradient
        adamw.step()
    torch.testing.assert_close(loop.model.state_dict()["head.h03.weight"], alone.detach())


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_every_classifier_has_a_gradient_and_those_not_drawn_one_of_zero(arithmetic):
    loop, _ = looped(Method(sample_weights=(0, 0, 100)), 1, arithmetic=arithmetic)
    found = {name: parameter.grad for name, parameter in loop.model.named_parameters()}
    assert {name for name in CLASSIFIERS if found[name].any()} == {"head.h03.weight", "head.h03.bias"}


def test_a_shared_supernet_to_start_from_keeps_its_logits_by_its_head_counts(blobs, tmp_path):
    small = geometry(**(msgspec.structs.asdict(SHAPE) | {"heads": 2, "trained_heads": (1, 2), "classifiers": "shared"}))
    train(blobs, tmp_path / "small", preset(small, epochs=1))
    # No step moves it: the rate is as small as can be.
    frozen = preset(epochs=1, learning_rate=1e-30, final_rate=1e-30, weight_decay=0.0)
    train(blobs, tmp_path / "s", frozen, init_from=tmp_path / "small")
    one, other = load(tmp_path / "s").model(), load(tmp_path / "small").model()
    images = batches(1)[0].images
    with torch.inference_mode():
        for heads in (1, 2):
            torch.testing.assert_close(one(images, heads), other(images, heads))
    with pytest.raises(InputError, match="separate classifiers"):
        train(
            blobs,
            tmp_path / "t",
            preset(msgspec.structs.replace(SHAPE, classifiers="shared")),
            init_from=tmp_path / "s",
        )


def test_the_command_takes_them_by_name_and_no_other(blobs, tmp_path, cli: Cli):
    out = tmp_path / "s"
    ran = cli("train", "--data", blobs, *OPTIONS, "--epochs", 1, "--classifiers", "separate", "--out", out)
    assert ran.code == 0, ran.err
    assert load(out).spec.geometry.classifiers == "separate"
    refused = cli("train", "--data", blobs, *OPTIONS, "--classifiers", "each", "--out", tmp_path / "t")
    assert refused.code == 2
    assert "classifiers" in refused.err


def both(*options: str) -> None:
    ended = Together(2, *options).end()
    assert [code for code, _, _ in ended] == [0, 0], ended


def test_two_processes_that_draw_the_same_train_what_one_does(blobs, tmp_path):
    """In parts and with two subnets, so that gradients are exchanged with the last of several passes."""
    same = ("--data", blobs, *OPTIONS, "--classifiers", "separate", "--epochs", "2")
    same += ("--anchors", "largest", "--distil", "0.5", "--accumulate", "2")
    both(*same, "--head-draw", "shared", "--out", str(tmp_path / "two"))
    ended = Together(1, *same, "--head-draw", "shared", "--out", str(tmp_path / "one")).end()
    assert [code for code, _, _ in ended] == [0], ended
    one, two = load(tmp_path / "one").tensors, load(tmp_path / "two").tensors
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-5, msg=name)


def test_two_processes_that_draw_each_its_own_agree_and_train_every_classifier(blobs, tmp_path):
    """Each uses a classifier that the other does not, in most steps; what they go on with is the same."""
    same = ("--data", blobs, *OPTIONS, "--classifiers", "separate", "--epochs", "2", "--out", str(tmp_path / "s"))
    prelude = (
        "import os, torch\nfrom hydradeploy.training.loop import Loop\nreal = Loop.step\n"
        "def step(self, n, p):\n    real(self, n, p)\n"
        f"    torch.save(self.model.state_dict(), {str(tmp_path)!r} + '/rank' + os.environ['RANK'])\nLoop.step = step\n"
    )
    ended = Together(2, *same, prelude=prelude).end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(first[name].any()) for name in CLASSIFIERS if name.endswith("bias"))
