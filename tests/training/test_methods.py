"""Which subnets a step trains and on what: drawing, anchors, distillation, decay, mixing; against their definitions."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.data.augment import Augmentation
from hydradeploy.errors import UsageError
from hydradeploy.supernet.model import Supernet
from hydradeploy.training.batches import Batch, Order, Share
from hydradeploy.training.loop import Loop, arithmetic
from hydradeploy.training.mixing import mixed, soft
from hydradeploy.training.objective import Drawing
from hydradeploy.training.presets import HYDRAVIT_IMAGENET, PRESETS
from hydradeploy.training.ranks import Ranks
from hydradeploy.training.recipe import Method, Recipe, check_method
from hydradeploy.training.running import Running
from tests.conftest import geometry

HEADS = tuple(range(3, 13))
SHAPE = geometry(head_dim=4, heads=4, trained_heads=(1, 2, 3, 4), depth=2, image_size=8, patch_size=4, channels=1)
ALONE = Ranks(0, 1, torch.device("cpu"))


def drawn(method: Method, steps: int = 4000, rank: int = 0, heads: tuple[int, ...] = HEADS) -> list[tuple[int, ...]]:
    drawing = Drawing(method, heads, seed=0)
    return [drawing.of(step, rank) for step in range(steps)]


def test_one_head_count_is_drawn_uniformly_for_each_step():
    counts = Counter(heads for (heads,) in drawn(Method()))
    assert set(counts) == set(HEADS)
    assert all(abs(count - 400) < 5 * 19 for count in counts.values())  # five standard deviations


def test_percentages_are_the_frequencies_drawn():
    weights = (30, 0, 0, 20, 0, 0, 0, 0, 0, 50)
    counts = Counter(heads for (heads,) in drawn(Method(sample_weights=weights)))
    assert {heads: weights[heads - 3] for heads in counts} == {3: 30, 6: 20, 12: 50}
    assert all(abs(counts[heads] - 40 * weights[heads - 3]) < 5 * 32 for heads in counts)


@given(
    draws=st.integers(0, 12),
    anchors=st.sampled_from(["none", "largest", "sandwich"]) | st.lists(st.sampled_from(HEADS)).map(tuple),
    step=st.integers(0, 10**6),
)
def test_a_step_has_its_anchors_once_largest_first_and_so_many_others(draws, anchors, step):
    if draws == 0 and anchors in ("none", ()):
        with pytest.raises(ValueError, match="draws"):
            Method(draws=draws, anchors=anchors)
        return
    heads = Drawing(Method(draws=draws, anchors=anchors), HEADS, seed=1).of(step, 0)
    named = {"none": (), "largest": (12,), "sandwich": (12, 3)}
    ends = named[anchors] if isinstance(anchors, str) else tuple(sorted(set(anchors))[::-1])
    assert heads[: len(ends)] == ends
    assert len(set(heads)) == len(heads) == min(len(HEADS), len(ends) + draws)
    assert set(heads) <= set(HEADS)


def test_processes_draw_each_its_own_or_all_the_same():
    own = [drawn(Method(), 200, rank) for rank in (0, 1, 2)]
    assert own[0] != own[1] != own[2]
    shared = [drawn(Method(head_draw="shared"), 200, rank) for rank in (0, 1, 2)]
    assert shared[0] == shared[1] == shared[2] == own[0]


def test_a_head_count_of_a_larger_loss_is_drawn_more_often():
    drawing = Drawing(Method(loss_aware=1.0), (1, 2, 3, 4), seed=0)
    drawing.follow(torch.tensor([4.0, 2.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 2.0]))
    counts = Counter(drawing.of(step, 0)[0] for step in range(7000))
    # 4 : 2 : their mean : 1, where nothing is known of the third
    expected = np.array([4.0, 2.0, 7 / 3, 1.0])
    assert [counts[k] / 7000 for k in (1, 2, 3, 4)] == pytest.approx(expected / expected.sum(), abs=0.03)


def test_running_losses_follow_slowly():
    drawing = Drawing(Method(loss_aware=1.0), (1, 2), seed=0)
    drawing.follow(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    drawing.follow(torch.tensor([6.0, 5.0]), torch.tensor([2.0, 1.0]))
    assert drawing.losses.tolist() == pytest.approx([0.98 * 2 + 0.02 * 3, 5.0])


def test_losses_that_are_not_finite_draw_nothing_until_they_end_the_run():
    drawing = Drawing(Method(loss_aware=2.0), (1, 2, 3), seed=0)
    drawing.follow(torch.tensor([torch.inf, torch.inf, torch.nan]), torch.ones(3))
    assert drawing.of(0, 0)[0] in (1, 2, 3)


def batches(count: int = 1, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(12, 1, 8, 8, generator=generator),
            torch.randint(0, SHAPE.classes, (12,), generator=generator),
        )
        for _ in range(count)
    ]


def model(seed: int = 0) -> Supernet:
    return Supernet(SHAPE).initialise(torch.Generator().manual_seed(seed))


def gradients(recipe: Recipe, **options) -> dict[str, torch.Tensor]:
    """What one step of the loop leaves in the gradients."""
    loop = Loop(model(), recipe, Running(**options.pop("running", {})), ALONE, 10, **options)
    count = loop._running.accumulate
    whole = batches()[0]
    parts = [Batch(*pair) for pair in zip(whole.images.chunk(count), whole.labels.chunk(count), strict=True)]
    loop.step(0, iter(parts))
    return {name: parameter.grad.clone() for name, parameter in loop.model.named_parameters()}


def recipe(**changes) -> Recipe:
    method = Method(**changes.pop("method", {}))
    return Recipe(**({"epochs": 1, "batch_size": 12, "warmup_epochs": 0, "method": method} | changes))


def expected(terms) -> dict[str, torch.Tensor]:
    """Gradients of a loss that `terms` computes from a fresh model and the batch."""
    fresh = model()
    batch = batches()[0]
    terms(fresh, batch.images, batch.labels).backward()
    return {name: parameter.grad for name, parameter in fresh.named_parameters()}


def assert_same(one, other) -> None:
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_papers_step_is_the_gradient_of_one_subnet():
    (k,) = Drawing(Method(), SHAPE.trained_heads, 0).of(0, 0)
    found = gradients(recipe(label_smoothing=0.1))
    assert_same(found, expected(lambda net, x, y: F.cross_entropy(net(x, k), y, label_smoothing=0.1)))


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    whole = gradients(recipe(method={"anchors": "sandwich", "distil": 0.5}))
    assert_same(gradients(recipe(method={"anchors": "sandwich", "distil": 0.5}), running={"accumulate": 3}), whole)


def test_in_place_distillation_is_cross_entropy_against_the_largest_of_the_same_step():
    found = gradients(recipe(label_smoothing=0.0, method={"anchors": "sandwich", "draws": 0, "distil": 0.3}))

    def loss(net, x, y):
        largest, smallest = net(x, 4), net(x, 1)
        taught = -(largest.detach().softmax(1) * smallest.log_softmax(1)).sum(1).mean()
        return (F.cross_entropy(largest, y) + 0.7 * F.cross_entropy(smallest, y) + 0.3 * taught) / 2

    assert_same(found, expected(loss))


def test_a_teacher_takes_its_share_of_every_loss_and_is_not_changed():
    teacher = model(seed=5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    found = gradients(recipe(label_smoothing=0.0, method={"draws": 4, "teacher_share": 0.4}), teacher=teacher)

    def loss(net, x, y):
        soft_targets = teacher(x).softmax(1).detach()
        return (
            sum(
                0.6 * F.cross_entropy(net(x, k), y) - 0.4 * (soft_targets * net(x, k).log_softmax(1)).sum(1).mean()
                for k in (1, 2, 3, 4)
            )
            / 4
        )

    assert_same(found, expected(loss))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_loss_weights_scale_each_subnets_gradient():
    weights = (4.0, 3.0, 2.0, 1.0)
    found = gradients(recipe(label_smoothing=0.0, method={"draws": 4, "loss_weights": weights}))
    assert_same(
        found, expected(lambda net, x, y: sum((5 - k) * F.cross_entropy(net(x, k), y) for k in (1, 2, 3, 4)) / 4)
    )


@pytest.mark.parametrize("decays", [True, False])
def test_weight_decay_reaches_slices_that_were_not_drawn_or_does_not(decays):
    """Only one head is ever drawn; what lies beyond it has no gradient and moves by decay alone."""
    changes = {"sample_weights": (100, 0, 0, 0), "decay_unsampled": decays}
    loop = Loop(model(), recipe(learning_rate=1e-2, final_rate=1e-2, method=changes), Running(), ALONE, 10)
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    for step, batch in enumerate(batches(3)):
        loop.step(step, iter([batch]))
    after = loop.model.state_dict()
    width, full = SHAPE.head_dim, SHAPE.head_dim * SHAPE.heads
    factor = (1 - 1e-2 * 0.05) ** 3 if decays else 1.0
    for name in ("blocks.0.attn.proj.weight", "blocks.1.mlp.fc1.weight", "head.weight"):
        torch.testing.assert_close(after[name][:, width:], before[name][:, width:] * factor)
        assert not torch.equal(after[name][:1, :width], before[name][:1, :width])
    qkv, was = (state["blocks.0.attn.qkv.weight"].view(3, full, full) for state in (after, before))
    torch.testing.assert_close(qkv[:, width:], was[:, width:] * factor)
    torch.testing.assert_close(qkv[:, :, width:], was[:, :, width:] * factor)


@pytest.mark.parametrize("decays", [True, False])
def test_on_the_largest_subnet_both_ways_to_decay_are_adamw(decays):
    changes = {"sample_weights": (0, 0, 0, 100), "decay_unsampled": decays}
    loop = Loop(model(), recipe(learning_rate=1e-3, final_rate=1e-3, method=changes), Running(), ALONE, 10)
    fresh = model()
    decayed = [p for n, p in fresh.named_parameters() if p.ndim > 1 and n not in ("cls_token", "pos_embed")]
    others = [p for n, p in fresh.named_parameters() if p.ndim == 1 or n in ("cls_token", "pos_embed")]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    for step, batch in enumerate(batches(5)):
        loop.step(step, iter([batch]))
        adamw.zero_grad()
        F.cross_entropy(fresh(batch.images, 4), batch.labels, label_smoothing=0.1).backward()
        adamw.step()
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(loop.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decays", [True, False])
def test_a_step_too_large_for_fp16_changes_no_weight(decays):
    loop = Loop(model(), recipe(arithmetic="fp16", method={"decay_unsampled": decays}), Running(), ALONE, 10)
    loop.restore(loop.tensors() | {"scale": torch.tensor([1e38, 0.0], dtype=torch.float64)})
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    loop.step(5, iter(batches(1)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loop.model.state_dict().items())
    assert float(loop.tensors()["scale"][0]) < 1e38


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_by_its_decay_and_faster_at_first_if_asked(warmup):
    loop = Loop(model(), recipe(ema_decay=0.9, ema_warmup=warmup, learning_rate=1e-2), Running(), ALONE, 10)
    average = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    for step, batch in enumerate(batches(4)):
        loop.step(step, iter([batch]))
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        for name, tensor in loop.model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    for name, tensor in loop.average.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)


def test_stochastic_depth_drops_whole_branches_of_images_and_scales_the_others():
    net = model()
    images = batches()[0].images
    keep = torch.ones(2, 2, 12)
    assert torch.equal(net(images, 3, keep), net(images, 3))
    keep[:, :, 5] = 0.0
    dropped = net(images, 3, keep)
    torch.testing.assert_close(dropped[:5], net(images, 3)[:5])
    patchless = Supernet(msgspec.structs.replace(SHAPE, depth=1))
    patchless.load_state_dict({name: net.state_dict()[name] for name in patchless.state_dict()})
    nothing = patchless(images, 3, torch.zeros(1, 2, 12))
    torch.testing.assert_close(dropped[5], nothing[5])
    loop = Loop(model(), recipe(drop_path=0.5), Running(), ALONE, 10)
    kept = loop._keep(0, 0, 4000)
    assert kept.shape == (2, 2, 4000)
    assert (kept[0] == 1).all()
    assert sorted(kept[1].unique().tolist()) == [0.0, 2.0]
    assert float(kept[1].mean()) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_autocast_and_its_scale_train_and_go_on_exactly(kind):
    whole = Loop(model(), recipe(arithmetic=kind), Running(), ALONE, 10)
    first = Loop(model(), recipe(arithmetic=kind), Running(), ALONE, 10)
    all_ = batches(6)
    for step, batch in enumerate(all_):
        whole.step(step, iter([batch]))
        if step < 3:
            first.step(step, iter([batch]))
    second = Loop(model(seed=9), recipe(arithmetic=kind), Running(), ALONE, 10)
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    for step in range(3, 6):
        second.step(step, iter([all_[step]]))
    assert second.tensors().keys() == whole.tensors().keys()
    assert ("scale" in whole.tensors()) == (kind == "fp16")
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(second.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    assert all(np.isfinite(second.losses(6)))


@given(
    n=st.integers(2, 6), size=st.integers(2, 9), cutmix=st.booleans(), mixup=st.booleans(), seed=st.integers(0, 10**6)
)
def test_mixed_targets_are_the_shares_of_the_pixels(n, size, cutmix, mixup, seed):
    """Images of one value each: a pixel tells whose it is."""
    how = Augmentation(cutmix=1.0 if cutmix else 0.0, mixup=0.8 if mixup else 0.0)
    images = torch.arange(n).float()[:, None, None, None].expand(n, 1, size, size).clone()
    targets = soft(torch.arange(n), n, 0.0)
    got, mixture = mixed(images, targets, how, np.random.default_rng(seed))
    torch.testing.assert_close(mixture.sum(1), torch.ones(n))
    own = torch.arange(n).float()
    torch.testing.assert_close(got.mean((1, 2, 3)), mixture @ own, rtol=1e-4, atol=1e-4)
    if not (cutmix or mixup):
        assert torch.equal(got, images)
    if cutmix and not mixup:
        assert set(got.unique().tolist()) <= set(own.tolist())


def test_smoothed_targets_are_those_of_torch():
    labels = torch.tensor([0, 3, 2])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    ours = F.cross_entropy(logits, soft(labels, 5, 0.1))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))


@given(
    count=st.integers(1, 200),
    world=st.integers(1, 4),
    parts=st.integers(1, 3),
    batches_=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_processes_and_parts_share_each_batch_and_an_epoch_has_each_image_once(count, world, parts, batches_, seed):
    size = world * parts * batches_
    if count < size:
        return
    order = Order(count, size, seed)
    seen = []
    for step in range(order.steps):
        epoch, chosen = order.of(step)
        assert epoch == 0
        pieces = [piece for rank in range(world) for piece in Share(rank, world, parts).pieces(chosen)]
        assert np.array_equal(np.concatenate(pieces), chosen)
        assert {len(piece) for piece in pieces} == {batches_}
        seen += list(chosen)
    assert len(set(seen)) == len(seen) == order.steps * size
    assert order.of(order.steps)[0] == 1
    assert np.array_equal(Order(count, size, seed).of(order.steps)[1], order.of(order.steps)[1])


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({"loss_weights": (1.0, 2.0)}, "2 loss weights for 10 head counts"),
        ({"sample_weights": (50, 50)}, "2 sample weights for 10"),
        ({"sample_weights": (11,) + (10,) * 9}, "sum to 101"),
        ({"sample_weights": (-10, 20) + (10,) * 7 + (20,)}, "-10 is no sample weight"),
        ({"anchors": (6, 2)}, "anchor 2 is no trained head count"),
        ({"anchors": (6, 3), "distil": 0.5}, "the subnet of 12 heads cannot teach"),
    ],
)
def test_what_does_not_fit_the_head_counts_is_refused(method, text):
    with pytest.raises(UsageError, match=text):
        check_method(Method(**method), HEADS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"distil": 0.5},
        {"distil": 0.5, "anchors": ()},
        {"distil": 1.5, "anchors": "sandwich"},
        {"loss_weights": (1.0, -1.0)},
        {"loss_aware": -1.0},
        {"teacher_share": 2.0},
    ],
)
def test_a_method_that_makes_no_sense_is_refused_with_its_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Method(**wrong)


def test_the_imagenet_preset_is_the_published_recipe():
    """Of the reference: 3.2, and the sizes of 2.5."""
    preset = HYDRAVIT_IMAGENET
    r, a = preset.recipe, preset.recipe.augment
    assert (r.epochs, r.cooldown_epochs, r.warmup_epochs, r.all_epochs) == (300, 10, 5, 310)
    assert (r.learning_rate, r.warmup_from, r.final_rate, r.batch_size) == (1e-3, 1e-6, 1e-5, 1024)
    assert (r.weight_decay, r.drop_path, r.label_smoothing, r.seed) == (0.05, 0.1, 0.1, 42)
    assert (r.ema_decay, r.ema_warmup, r.arithmetic) == (0.99996, False, "tf32")
    assert (a.randaugment, a.mixup, a.cutmix, a.erasing, a.flip) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0, 0.25, 0.5)
    assert (a.crop_scale, a.crop_ratio, preset.preprocessing.interpolation) == ((0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
    assert (r.method, preset.preprocessing.crop_pct) == (Method(), 0.875)
    subnets = preset.spec(tuple(map(str, range(1000)))).geometry.subnets()
    assert [subnet.parameters for subnet in (subnets[0], subnets[3], subnets[-1])] == [5717416, 22050664, 86567656]
    per_epoch = 1251
    assert r.rate(0, per_epoch) == pytest.approx(1e-6)
    assert r.rate(5 * per_epoch, per_epoch) == pytest.approx(1e-3)
    assert r.rate(300 * per_epoch, per_epoch) == r.rate(310 * per_epoch - 1, per_epoch) == pytest.approx(1e-5)


def test_presets_are_found_by_name():
    assert set(PRESETS) == {"digits", "glyphs", "small", "hydravit-imagenet"}


@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_products_and_convolutions_are_rounded_as_the_recipe_says_and_as_before_afterwards(kind, convolutions):
    def switches() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    outside = switches()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = convolutions
    try:
        with arithmetic(recipe(arithmetic=kind), Running(), 3):
            assert switches() == (("high", True) if kind == "tf32" else ("highest", False))
        assert switches() == ("medium", convolutions)
    finally:
        torch.set_float32_matmul_precision(outside[0])
        torch.backends.cudnn.allow_tf32 = outside[1]
