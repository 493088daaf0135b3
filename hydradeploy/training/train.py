"""`train`: the paper's method at small scale, one readable loop.

Per step one head count is drawn, one forward and backward pass made through that subnet, one AdamW step taken
(HydraViT, arXiv 2409.17978, section 3). As in the official code, weight decay and momentum act on slices that were not
drawn too: their gradient is zero, not missing. Every random draw comes from the seed and the number of its step or
epoch, so a run that is stopped and resumed is the run that was not.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hydradeploy.data.datasets import Dataset, Split, open_dataset
from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import InputError, UsageError
from hydradeploy.spec import Spec
from hydradeploy.supernet import store
from hydradeploy.supernet.model import Supernet
from hydradeploy.training import state as states
from hydradeploy.training.recipe import Preset, Recipe, check_weights

Report = Callable[[str, int, int], None]
_ORDER, _SHIFT, _HEADS = 1, 2, 3  # streams of random numbers
_BATCH = 256


@dataclass(frozen=True)
class Trained:
    """The supernet file and top-1 on the validation images for three head counts."""

    out: Path
    spec: Spec
    top1: Mapping[int, float]
    seconds: float


@dataclass(frozen=True)
class _Images:
    """A split in memory: uint8 (n, s, s, channels) and labels (n,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def train(
    data: str,
    out: Path,
    preset: Preset,
    *,
    init_from: Path | None = None,
    resume: bool = False,
    force: bool = False,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train a supernet on the train split of a data set and write its moving average to `out`.

    `init_from` is a supernet file of fewer heads that is placed in the leading corner first. Interrupted, it leaves a
    usable supernet in `out` and its state beside it, and `resume` goes on from there exactly. Raises UsageError (no
    such data, `out` exists, another run's state), InputError (images, labels or loss refused), EnvironmentFailed
    (disk).
    """
    if out.exists() and not (resume or force):
        raise UsageError(
            f"{out} exists", hint="go on with --resume, replace it with --force, or name another with --out"
        )
    check_weights(preset.recipe.sample_weights, preset.geometry.trained_heads)
    dataset = open_dataset(data, "train")
    spec = preset.spec(dataset.class_names)
    images, held_out = _load(dataset, spec), _load(_same_classes(data, "val", dataset), spec)
    if len(images.labels) < preset.recipe.batch_size:
        raise InputError(
            f"{data}: {len(images.labels)} training images are too few for a batch of {preset.recipe.batch_size}",
            hint="choose a smaller --batch-size",
        )
    progress = states.Progress(spec=spec, recipe=preset.recipe, data_sha256=_digest(images), step=0)
    run = _Run(progress, images, held_out)
    if resume:
        run.restore(states.load(out), states.path_of(out))
    elif init_from is not None:
        small = store.load(init_from)
        store.place(run.model, small.tensors, small.spec.geometry)
        run.average.load_state_dict(run.model.state_dict())
    started = time.perf_counter()
    run.go(out, report, say)
    store.save(out, spec, run.average.state_dict())
    states.path_of(out).unlink(missing_ok=True)
    return Trained(out, spec, run.top1(), time.perf_counter() - started)


class _Run:
    """Weights, their average and the optimiser, at some step."""

    def __init__(self, progress: states.Progress, images: _Images, held_out: _Images) -> None:
        self._progress, self._images, self._held_out = progress, images, held_out
        self._spec, self._recipe = progress.spec, progress.recipe
        self._per_epoch = len(images.labels) // self._recipe.batch_size
        self._total = self._per_epoch * self._recipe.epochs
        generator = torch.Generator().manual_seed(self._recipe.seed)
        self.model = Supernet(self._spec.geometry).initialise(generator)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._optimiser = _adamw(self.model, self._recipe)
        self._order = np.empty(0, np.int64)

    def go(self, out: Path, report: Report, say: Callable[[str], None]) -> None:
        """Take the remaining steps; interrupted between two, save and raise KeyboardInterrupt."""
        first, started, losses = self._progress.step, time.perf_counter(), []
        with _interruptible() as interrupted:
            for step in range(first, self._total):
                losses.append(self._step(step))
                self._progress = msgspec.structs.replace(self._progress, step=step + 1)
                report("training", step + 1, self._total)
                if (step + 1) % self._per_epoch == 0:
                    left = (time.perf_counter() - started) / (step + 1 - first) * (self._total - step - 1)
                    say(self._line(step // self._per_epoch + 1, float(np.mean(losses)), left))
                    losses.clear()
                    states.save(out, self._state())
                if interrupted():
                    states.save(out, self._state())
                    store.save(out, self._spec, self.average.state_dict())
                    say(f"{out} is usable as it is; go on with --resume")
                    raise KeyboardInterrupt

    def top1(self) -> dict[int, float]:
        """Accuracy of the average on the held-out images for the fewest, the middle and the most heads."""
        trained = self._spec.geometry.trained_heads
        labels = torch.from_numpy(self._held_out.labels)
        found = {}
        for heads in sorted({trained[0], trained[len(trained) // 2], trained[-1]}):
            right = 0
            for start in range(0, len(labels), _BATCH):
                batch = normalise(self._held_out.pixels[start : start + _BATCH], self._spec.preprocessing)
                with torch.inference_mode():
                    said = self.average(torch.from_numpy(batch), heads).argmax(1)
                right += int((said == labels[start : start + _BATCH]).sum())
            found[heads] = right / len(labels)
        return found

    def restore(self, found: states.State, path: Path) -> None:
        """Go on from a saved state; raises UsageError where it is of another run."""
        states.check_same(found.progress, self._progress, path)
        self._progress = found.progress
        tensors = found.tensors
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        self.average.load_state_dict({name: tensors[f"average.{name}"] for name in self.average.state_dict()})
        if found.progress.step:
            for name, parameter in self.model.named_parameters():
                self._optimiser.state[parameter] = {
                    "step": torch.tensor(float(found.progress.step)),
                    **{moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS},
                }

    def _step(self, step: int) -> float:
        epoch, place = divmod(step, self._per_epoch)
        if place == 0 or not len(self._order):
            self._order = self._random(_ORDER, epoch).permutation(len(self._images.labels))
        chosen = self._order[place * self._recipe.batch_size : (place + 1) * self._recipe.batch_size]
        pixels = _shifted(self._images.pixels[chosen], self._recipe.shift, self._random(_SHIFT, step))
        images = torch.from_numpy(normalise(pixels, self._spec.preprocessing))
        heads = self._draw(step)
        logits = self.model(images, heads)
        labels = torch.from_numpy(self._images.labels[chosen])
        loss = F.cross_entropy(logits, labels, label_smoothing=self._recipe.label_smoothing)
        if not math.isfinite(loss.item()):
            raise InputError(
                f"the loss is {loss.item()} at step {step} with {heads} heads; what was saved before is kept",
                hint="choose a smaller --lr",
            )
        for group in self._optimiser.param_groups:
            group["lr"] = self._recipe.rate(step, self._per_epoch)
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
        self._optimiser.step()
        self._follow(step)
        return float(loss.item())

    def _follow(self, step: int) -> None:
        """Move the average; in the first steps faster, so that it forgets the initial weights."""
        decay = min(self._recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

    def _draw(self, step: int) -> int:
        weights = self._recipe.sample_weights
        shares = None if weights is None else np.array(weights) / 100
        return int(self._random(_HEADS, step).choice(self._spec.geometry.trained_heads, p=shares))

    def _random(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._recipe.seed, stream, number])

    def _state(self) -> states.State:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{moment}.{name}": self._optimiser.state[parameter][moment] for moment in _MOMENTS}
        return states.State(self._progress, tensors)

    def _line(self, epoch: int, loss: float, left: float) -> str:
        top1 = ", ".join(f"h{heads:02d} {share:.1%}" for heads, share in self.top1().items())
        return f"epoch {epoch}/{self._recipe.epochs}: loss {loss:.3f}, top-1 {top1}, {left:.0f} s left"


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms, the class token and positions."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or name in ("cls_token", "pos_embed") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _load(dataset: Dataset, spec: Spec) -> _Images:
    pixels = np.stack([dataset.pixels(i, spec) for i in range(len(dataset))])
    return _Images(pixels, dataset.labels)


def _same_classes(data: str, split: Split, other: Dataset) -> Dataset:
    dataset = open_dataset(data, split)
    if dataset.class_names != other.class_names:
        missing = sorted(set(dataset.class_names) ^ set(other.class_names))
        raise InputError(f"{data}: the splits have different classes ({', '.join(missing[:5])})")
    return dataset


def _digest(images: _Images) -> str:
    return hashlib.sha256(images.pixels.tobytes() + images.labels.astype("<i8").tobytes()).hexdigest()


def _shifted(pixels: NDArray[np.uint8], shift: float, random: np.random.Generator) -> NDArray[np.uint8]:
    """Each image moved by up to `shift` of its size in both directions, the border repeated."""
    most = round(shift * pixels.shape[1])
    if most == 0:
        return pixels
    size = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    moves = random.integers(0, 2 * most + 1, (len(pixels), 2))
    return np.stack([padded[i, y : y + size, x : x + size] for i, (y, x) in enumerate(moves)])


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is answered between two steps, where weights and optimiser agree; a second one at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
