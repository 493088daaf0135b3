"""One process's part of a training run: weights, their average, the optimiser, and what a step does to them.

Per step a few head counts are drawn (one, in the paper's method), each gives one forward and backward pass through that
subnet, and one AdamW step is taken (HydraViT, arXiv 2409.17978, section 3). As in the official code, weight decay and
momentum act on slices that were not drawn too, unless the recipe says otherwise: their gradient is zero, not missing.
Every random draw comes from the seed and the number of its step, so a run that is stopped and resumed is the run that
was not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hydradeploy.errors import InputError
from hydradeploy.supernet.model import Supernet
from hydradeploy.training.batches import Batch
from hydradeploy.training.mixing import mixed, soft
from hydradeploy.training.objective import Drawing, decay_leading, loss_of, untouched
from hydradeploy.training.ranks import Ranks
from hydradeploy.training.recipe import Recipe
from hydradeploy.training.running import Running

_MIX, _DROP = 5, 6  # streams of random numbers
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEPT, _SMALLER = "what was saved before is kept", "choose a smaller --lr; --resume may go on with it"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loop:
    """A model in training; `steps_per_epoch` decides the learning rate of a step."""

    def __init__(
        self,
        model: Supernet,
        recipe: Recipe,
        running: Running,
        ranks: Ranks,
        steps_per_epoch: int,
        teacher: Supernet | None = None,
    ) -> None:
        self._recipe, self._running, self._ranks, self._per_epoch = recipe, running, ranks, steps_per_epoch
        self._trained = model.geometry.trained_heads
        self.model = model.to(ranks.device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._teacher = None if teacher is None else teacher.to(ranks.device).eval().requires_grad_(False)
        self._decayed = _decayed(self.model)
        self._optimiser = _adamw(self.model, self._decayed, recipe)
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=recipe.arithmetic == "fp16")
        self._drawing = Drawing(recipe.method, self._trained, recipe.seed)
        self._classifiers = list(model.head.parameters()) if isinstance(model.head, nn.ModuleDict) else []
        self._called = self._callable()
        # Of each step: the head counts, and the loss of each.
        self._losses: list[tuple[tuple[int, ...], Tensor]] = []
        self._settle()

    def step(self, step: int, pieces: Iterator[Batch]) -> None:
        """Take one step on the next `accumulate` batches of `pieces`."""
        heads = self._drawing.of(step, self._ranks.rank)
        self._optimiser.zero_grad()
        parts = self._running.accumulate
        found = torch.zeros(len(heads), device=self._ranks.device)
        for part in range(parts):
            images, targets = self._mixed(next(pieces), step, part)
            keep = self._keep(step, part, len(images))
            found += self._passes(heads, images, targets, keep, last_part=part == parts - 1) / parts
        self._losses.append((heads, found))
        self._follow_losses(heads, found)
        self._update(step, heads)

    def losses(self, step: int) -> list[float]:
        """The mean losses of the steps since the last call, of all processes; `step` is the next one.

        Raises InputError at the first that is not finite.
        """
        if not self._losses:
            return []
        values = [float(value) for value in self._ranks.mean(torch.stack([found.mean() for _, found in self._losses]))]
        seen = self._losses
        self._losses = []
        for number, value in enumerate(values, step - len(values)):
            if not np.isfinite(value):
                raise InputError(
                    f"the loss is {value} at step {number}{self._blamed(*seen[number - step])}; {_KEPT}", hint=_SMALLER
                )
        return values

    def check_finite(self, step: int) -> None:
        """Raise InputError unless every weight is finite after so many steps; a loss would tell only after the next."""
        if not _finite(list(self.model.parameters())):
            raise InputError(f"weights are not finite after {step} steps; {_KEPT}", hint=_SMALLER)

    def reset_average(self) -> None:
        """Begin the average anew at the weights as they are."""
        self.average.load_state_dict(self.model.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """All that decides how the run goes on."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self._optimiser.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
            if "step" in moments:
                tensors["updates"] = moments["step"]
        tensors["losses"] = self._drawing.losses
        scale: Mapping[str, Any] = self._scaler.state_dict()
        if scale:
            tensors["scale"] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        self.average.load_state_dict({name: tensors[f"average.{name}"] for name in self.average.state_dict()})
        for name, parameter in self.model.named_parameters():
            if f"{_MOMENTS[0]}.{name}" in tensors:
                moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
                self._optimiser.state[parameter] = {"step": tensors["updates"].clone(), **moments}
        self._drawing.losses = tensors["losses"].clone()
        if "scale" in tensors:
            scale, growth = tensors["scale"].tolist()
            self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})

    def _blamed(self, heads: tuple[int, ...], losses: Tensor) -> str:
        """The subnets whose loss is not finite; of other processes only the mean is known."""
        if self._ranks.world > 1:
            return ""
        these = [str(k) for k, loss in zip(heads, losses.tolist(), strict=True) if not np.isfinite(loss)]
        return f" with {', '.join(these)} heads"

    def _settle(self) -> None:
        """Have DistributedDataParallel arrange what it exchanges now, as it does after its first backward pass.

        Sums over three processes or more depend on that arrangement, and a run that is resumed begins anew with it.
        """
        if not isinstance(self._called, DistributedDataParallel):
            return
        g, recipe = self.model.geometry, self._recipe
        count = recipe.batch_size // (self._ranks.world * self._running.accumulate)
        images = torch.zeros(count, g.channels, g.image_size, g.image_size, device=self._ranks.device)
        with self._autocast():
            total = self._called(images, self._trained[-1], self._keep(0, 0, count)).float().sum()
        if self._classifiers:
            total = total + untouched(self._classifiers)
        total.backward()
        self._optimiser.zero_grad()

    def _callable(self) -> nn.Module:
        called: nn.Module = torch.compile(self.model) if self._running.compile else self.model  # type: ignore[assignment]
        if self._ranks.world == 1:
            return called
        ids = [self._ranks.device.index] if self._ranks.device.type == "cuda" else None
        return DistributedDataParallel(called, device_ids=ids, gradient_as_bucket_view=True)

    def _passes(
        self, heads: tuple[int, ...], images: Tensor, targets: Tensor, keep: Tensor | None, *, last_part: bool
    ) -> Tensor:
        """Forward and backward through each subnet; the losses (heads,). Gradients are exchanged with the last one."""
        method, recipe = self._recipe.method, self._recipe
        taught: list[tuple[float, Tensor]] = []
        if self._teacher is not None and method.teacher_share:
            with torch.no_grad(), self._autocast():
                taught.append((method.teacher_share, self._teacher(images, self._teacher.geometry.trained_heads[-1])))
        losses = []
        for i, k in enumerate(heads):
            last = last_part and i == len(heads) - 1
            with self._exchanging(last):
                with self._autocast():
                    logits = self._called(images, k, keep)
                loss = loss_of(logits, targets, recipe.label_smoothing, tuple(taught))
                scaled = loss * (self._weight(k) / (len(heads) * self._running.accumulate))
                if last and self._classifiers:
                    # Those of other subnets are to have a gradient of zero, as other slices have, and none is not that:
                    # AdamW would leave them out, and other processes would wait for it. It costs no look at the graph,
                    # as find_unused_parameters would.
                    scaled = scaled + untouched(self._classifiers)
                self._scaler.scale(scaled).backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
            if i == 0 and method.distil:
                own = 1 - method.distil
                taught = [(share * own, others) for share, others in taught] + [(method.distil, logits.detach())]
            losses.append(loss.detach())
        return torch.stack(losses)

    def _weight(self, heads: int) -> float:
        weights = self._recipe.method.loss_weights
        return 1.0 if weights is None else weights[self._trained.index(heads)]

    def _update(self, step: int, heads: tuple[int, ...]) -> None:
        rate = self._recipe.rate(step, self._per_epoch)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        if not self._recipe.method.decay_unsampled and self._steps():
            drawn = self._ranks.largest(torch.tensor([float(k in heads) for k in self._trained])).tolist()
            subnets = [self.model.geometry.subnet(k) for k, here in zip(self._trained, drawn, strict=True) if here]
            decay_leading(self._decayed, subnets, 1 - rate * self._recipe.weight_decay)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        decay = self._recipe.ema_decay
        if self._recipe.ema_warmup:  # faster at first, so that the average forgets the initial weights
            decay = min(decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def _steps(self) -> bool:
        """Whether the optimiser will take this step: not where a gradient was too large for fp16."""
        if not self._scaler.is_enabled():
            return True
        self._scaler.unscale_(self._optimiser)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return _finite(gradients)

    def _follow_losses(self, heads: tuple[int, ...], losses: Tensor) -> None:
        if not self._recipe.method.loss_aware:
            return
        sums = torch.zeros(2, len(self._trained), dtype=torch.float64)
        places = [self._trained.index(k) for k in heads]
        sums[0, places], sums[1, places] = losses.double().cpu(), 1.0
        self._drawing.follow(*self._ranks.mean(sums))

    def _mixed(self, batch: Batch, step: int, part: int) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self._ranks.device, non_blocking=True)
        labels = batch.labels.to(self._ranks.device, non_blocking=True)
        augment = self._recipe.augment
        if not (augment.mixup or augment.cutmix):
            return images, labels
        targets = soft(labels, self.model.geometry.classes, self._recipe.label_smoothing)
        return mixed(images, targets, augment, self._random(_MIX, step, part))

    def _keep(self, step: int, part: int, count: int) -> Tensor | None:
        """Which branches of which images stay, scaled: (depth, 2, count)."""
        if not self._recipe.drop_path:
            return None
        depth = self.model.geometry.depth
        dropped = np.linspace(0, self._recipe.drop_path, depth)[:, None, None]
        kept = self._random(_DROP, step, part).random((depth, 2, count)) >= dropped
        return torch.from_numpy((kept / (1 - dropped)).astype(np.float32)).to(self._ranks.device)

    def _random(self, stream: int, step: int, part: int) -> np.random.Generator:
        return np.random.default_rng([self._recipe.seed, stream, step, self._ranks.rank, part])

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = _AUTOCAST.get(self._recipe.arithmetic)
        return nullcontext() if kind is None else torch.autocast(self._ranks.device.type, kind)

    def _exchanging(self, now: bool) -> AbstractContextManager[Any]:
        if now or not isinstance(self._called, DistributedDataParallel):
            return nullcontext()
        return self._called.no_sync()


@contextmanager
def arithmetic(recipe: Recipe, running: Running, trained: int) -> Iterator[None]:
    """torch's switches as the recipe wants them, put back afterwards; `trained` is the number of head counts."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if recipe.arithmetic == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = recipe.arithmetic == "tf32"  # of the patch embedding; torch's default is yes
    try:
        # Each head count is a graph of its own, and training and evaluation differ.
        with torch._dynamo.config.patch(cache_size_limit=2 * trained + 2) if running.compile else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack([tensor.detach().abs().max() for tensor in tensors]).isfinite().all())


def _decayed(model: nn.Module) -> dict[str, nn.Parameter]:
    """What weight decay acts on: matrices, but not biases, norms, the class token and positions."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in ("cls_token", "pos_embed")
    }


def _adamw(model: nn.Module, decayed: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    others = [parameter for name, parameter in model.named_parameters() if name not in decayed]
    groups = [
        {
            "params": list(decayed.values()),
            "weight_decay": recipe.weight_decay if recipe.method.decay_unsampled else 0.0,
        },
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)
