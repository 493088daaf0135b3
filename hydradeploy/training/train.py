"""`train`: the paper's method and what improves on it, from data set to supernet file, in one or many processes."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec
import torch
from torch import Tensor

from hydradeploy.data.datasets import Dataset, Split, open_dataset
from hydradeploy.errors import EnvironmentFailed, InputError, MissingError, UsageError
from hydradeploy.files import locked, sha256_file
from hydradeploy.spec import Geometry, Spec
from hydradeploy.supernet import store
from hydradeploy.supernet.model import Supernet
from hydradeploy.training import metrics
from hydradeploy.training import state as states
from hydradeploy.training.batches import Batch, Order, Share, Source, readers, source
from hydradeploy.training.loop import Loop, arithmetic
from hydradeploy.training.ranks import Ranks, ranks
from hydradeploy.training.recipe import Preset, check_method
from hydradeploy.training.running import Running

Report = Callable[[str, int, int], None]
_TOGETHER = 10  # steps between two meetings of the processes
# What torch says on processors, and Triton on GPUs.
_NO_COMPILER = re.compile(r"No working C\+\+ compiler found|Failed to find C compiler")
_NAMED_BAD = 3  # of the images that end a run, the last ones, for the others have been told


@dataclass(frozen=True)
class Trained:
    """The supernet file and top-1 on the validation images for three head counts.

    `first` says whether this is the process of the run that writes and speaks.
    """

    out: Path
    spec: Spec
    top1: Mapping[int, float]
    seconds: float
    first: bool = True


def train(
    data: str,
    out: Path,
    preset: Preset,
    *,
    init_from: Path | None = None,
    teacher: Path | None = None,
    running: Running | None = None,
    resume: bool = False,
    force: bool = False,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    build: Callable[[Geometry], Supernet] = Supernet,
) -> Trained:
    """Train a supernet on the train split of a data set and write its moving average to `out`.

    `init_from` is a supernet file of no more heads that is placed in the leading corner first, `teacher` one whose
    largest subnet teaches where the recipe gives it a share of the loss. Interrupted, it leaves a usable supernet in
    `out` and its state beside it, and `resume` goes on from there exactly. Started by torchrun, the processes share
    each batch, and the first one writes. `build` makes the model, so that heirs with other subnets can be compared.
    Raises UsageError (no such data, `out` exists, another run's state),
    InputError (images, labels or loss refused), MissingError (TensorBoard, a compiler), EnvironmentFailed (disk).
    """
    running = running or Running()
    store.check_file(out)
    _check_apart(out, teacher, init_from)
    if not resume:
        _check_free(out, force)
    check_method(preset.recipe.method, preset.geometry.trained_heads)
    if (teacher is not None) != (preset.recipe.method.teacher_share > 0):
        raise UsageError("a teacher and its share of the loss need each other", hint="--teacher and --teacher-share")
    if running.tensorboard is not None:
        metrics.check_tensorboard()
    with _enough(), ranks(running.device) as us, arithmetic(preset.recipe, running, len(preset.geometry.trained_heads)):
        small = None if init_from is None else store.load(init_from)
        run = _prepared(data, preset, running, us, teacher, init_from, build)
        started = time.perf_counter()
        with _alone(out) if us.first else nullcontext():
            if resume:
                run.restore(out, say)
            elif us.first:  # another run may have ended while this one read its images
                _check_free(out, force)
            if small is not None and not resume:
                store.place(run.loop.model, small.tensors, small.spec.geometry)
                run.loop.reset_average()
            run.go(out, report, say)
            if us.first:
                store.save(out, run.spec, run.loop.average.state_dict())
                states.path_of(out).unlink(missing_ok=True)
        return Trained(out, run.spec, run.top1(), time.perf_counter() - started, us.first)


@contextmanager
def _enough() -> Iterator[None]:
    """What torch raises where memory is full has no type of its own but on GPUs; raises EnvironmentFailed for it.

    Raises MissingError where there is no compiler for torch.compile.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
            raise EnvironmentFailed(
                f"memory is full: {said}", hint="choose a smaller --batch-size, or take it in parts with --accumulate"
            ) from error
        if said.startswith("DataLoader worker"):
            raise EnvironmentFailed(
                f"a process that reads images has died: {said}",
                hint="it may lack memory, shared memory too (docker run --shm-size); --workers 0 reads without any",
            ) from error
        if isinstance(error, torch._dynamo.exc.BackendCompilerFailed) and _NO_COMPILER.search(said):
            raise MissingError(
                f"torch.compile finds no compiler: {said}", hint="install one, such as g++, or leave --compile out"
            ) from error
        raise


def _alone(out: Path) -> AbstractContextManager[None]:
    """The right to write `out` and what is beside it; raises UsageError where another process has it."""

    def busy(_: str) -> NoReturn:
        raise UsageError(f"{out}: another process is training it", hint="wait for it, or name another with --out")

    return locked(out, busy)


def _check_apart(out: Path, *read: Path | None) -> None:
    """Raise UsageError where a run would overwrite what it goes by: it could not be resumed then."""
    for path in read:
        if path is not None and path.resolve() == out.resolve():
            raise UsageError(
                f"{out} is what the run goes by, not to be overwritten by it", hint="name another with --out"
            )


def _check_free(out: Path, force: bool) -> None:
    """Raise UsageError where a run that begins at `out` would destroy something."""
    state = states.path_of(out)
    if force or not (out.exists() or state.exists()):
        return
    go_on = "go on with --resume, " if state.exists() else ""
    what = out if out.exists() else f"{state}, the state of a run that was cut short,"
    raise UsageError(f"{what} exists", hint=f"{go_on}replace it with --force, or name another with --out")


def _prepared(
    data: str,
    preset: Preset,
    running: Running,
    us: Ranks,
    teacher: Path | None,
    init_from: Path | None,
    build: Callable[[Geometry], Supernet],
) -> _Run:
    recipe = preset.recipe
    with us.one_first():  # it leaves the index of shards to the others
        dataset = open_dataset(data, "train")
        validation = _same_classes(data, "val", dataset)
    spec = preset.spec(dataset.class_names)
    if len(dataset) < recipe.batch_size:
        raise InputError(
            f"{data}: {len(dataset)} training images are too few for a batch of {recipe.batch_size}",
            hint="choose a smaller --batch-size",
        )
    if recipe.batch_size % (us.world * running.accumulate):
        raise UsageError(
            f"a batch of {recipe.batch_size} cannot be shared by {us.world} processes in {running.accumulate} parts",
            hint="choose a --batch-size that is a multiple of both",
        )
    workers = readers() if running.workers is None else running.workers
    images = source(dataset, spec, recipe, workers, running.bad_images)
    held_out = source(validation, spec, recipe, workers)
    teaching = None if teacher is None else _teacher(teacher, spec)
    progress = states.Progress(
        spec=spec,
        recipe=recipe,
        data_sha256=images.sha256,
        teacher_sha256=None if teacher is None else sha256_file(teacher),
        init_sha256=None if init_from is None else sha256_file(init_from),
        processes=us.world,
        accumulate=running.accumulate,
        step=0,
    )
    model = build(spec.geometry).initialise(torch.Generator().manual_seed(recipe.seed))
    order = Order(len(images), recipe.batch_size, recipe.seed)
    loop = Loop(
        model,
        recipe,
        running,
        us,
        order.steps,
        teaching,
    )
    return _Run(progress, running, us, images, held_out, order, loop)


def _teacher(path: Path, spec: Spec) -> Supernet:
    weights = store.load(path)
    one, other = weights.spec, spec
    for field in ("image_size", "channels", "classes"):
        if getattr(one.geometry, field) != getattr(other.geometry, field):
            raise InputError(
                f"{path}: the teacher's {field} is {getattr(one.geometry, field)}, "
                f"the supernet's {getattr(other.geometry, field)}"
            )
    if (one.preprocessing.mean, one.preprocessing.std) != (other.preprocessing.mean, other.preprocessing.std):
        raise InputError(f"{path}: the teacher's mean and std are not those of the supernet")
    for theirs, ours in zip(one.class_names or (), other.class_names or (), strict=False):
        if theirs != ours:
            raise InputError(f"{path}: the teacher has class {theirs!r} where the data has {ours!r}")
    return weights.model()


class _Run:
    """A loop with its data, its state on disk and what it tells."""

    def __init__(
        self,
        progress: states.Progress,
        running: Running,
        us: Ranks,
        images: Source,
        held_out: Source,
        order: Order,
        loop: Loop,
    ) -> None:
        self.spec, self._recipe, self._running = progress.spec, progress.recipe, running
        self._progress, self._us, self._images, self._held_out = progress, us, images, held_out
        self._order = order
        self._total = order.steps * self._recipe.all_epochs
        self.loop = loop
        self._bad: dict[int, str] = {}
        self._top1: tuple[int, dict[int, float]] | None = None

    def restore(self, out: Path, say: Callable[[str], None]) -> None:
        """Go on from the saved state of the run that writes `out`; raises UsageError where it is of another run."""
        found = states.load(out)
        states.check_same(found.progress, self._progress, states.path_of(out))
        for field, what in (("processes", "processes"), ("accumulate", "parts of a batch")):
            before, now = getattr(found.progress, field), getattr(self._progress, field)
            if before != now and self._us.first:
                say(f"goes on with {now} {what}, not {before}: as well, but not bit by bit")
        self._progress = msgspec.structs.replace(
            self._progress,
            step=found.progress.step,
            bad=found.progress.bad,
            init_sha256=found.progress.init_sha256,
        )
        self._bad = {index: f"training image {index} could not be read before" for index in found.progress.bad}
        self._check_bad()
        before, now = found.progress.recipe.learning_rate, self._recipe.learning_rate
        if before != now and self._us.first:
            say(f"goes on with a learning rate of {now:g}, not {before:g}: another run from here on")
        self.loop.restore(found.tensors)

    def go(self, out: Path, report: Report, say: Callable[[str], None]) -> None:
        """Take the remaining steps; interrupted between two, save and raise KeyboardInterrupt."""
        first, watch = self._progress.step, _Watch(self._recipe.batch_size)
        lines = metrics.Metrics(out, self._running.tensorboard, first) if self._us.first else None
        share = Share(self._us.rank, self._us.world, self._running.accumulate)
        batches = self._images.steps(self._order, first, self._total, share)
        pieces = watch.timed(self._seen(batches, say))
        losses: list[float] = []
        with _interruptible() as interrupted, closing(batches):
            for step in range(first, self._total):
                self.loop.step(step, pieces)
                watch.steps += 1
                done = step + 1
                if self._us.first:
                    report("training", done, self._total)
                ends, saves, meets = self._due(done)
                if not (saves or meets or self._us.world == 1):
                    continue
                stops = bool(self._us.largest(torch.tensor(float(interrupted()))))
                if saves or stops or meets:
                    losses += self.loop.losses(done)
                    self._share_bad()
                    self._progress = msgspec.structs.replace(self._progress, step=done, bad=tuple(sorted(self._bad)))
                speed, waiting = watch.images_per_second(), watch.waiting()  # before other things take their time
                # Before the held-out images, which may be refused: that is not to cost the epoch.
                if saves or stops:
                    self.loop.check_finite(done)
                    self._save(out)
                if ends:
                    line = self._line(losses, speed, waiting)
                    self._tell(line, lines, watch.left(self._total - done), say)
                    losses = []
                    watch.restart()
                if stops:
                    self._leave(out, say)

    def _due(self, done: int) -> tuple[bool, bool, bool]:
        """After so many steps: whether an epoch ends, whether the state is saved, whether the processes meet."""
        every = self._running.save_every
        ends = done % self._order.steps == 0
        return ends, ends or (every is not None and done % every == 0), done % _TOGETHER == 0

    def _leave(self, out: Path, say: Callable[[str], None]) -> NoReturn:
        """Interrupted, with the state saved: leave a usable supernet too."""
        if self._us.first:
            store.save(out, self.spec, self.loop.average.state_dict())
            say(f"{out} is usable as it is; go on with --resume")
        raise KeyboardInterrupt

    def top1(self) -> dict[int, float]:
        """Accuracy of the average on the held-out images for the fewest, the middle and the most heads."""
        if self._top1 is not None and self._top1[0] == self._progress.step:
            return self._top1[1]
        trained = self.spec.geometry.trained_heads
        some = sorted({trained[0], trained[len(trained) // 2], trained[-1]})
        right = right_of(self.loop.average, self._held_out, some, self._us)
        found = {heads: count / len(self._held_out) for heads, count in right.items()}
        self._top1 = self._progress.step, found
        return found

    def _seen(self, batches: Iterator[Batch], say: Callable[[str], None]) -> Iterator[Batch]:
        """The batches, with what could not be read counted, named, and refused where it is too much."""
        for batch in batches:
            for index, reason in batch.bad:
                if index in self._bad:
                    continue
                self._bad[index] = reason
                # Of several processes none ends alone: the others could only say that it has ended.
                if self._us.world == 1:
                    self._check_bad()
                if len(self._bad) <= self._running.bad_images:
                    say(f"{reason}; the next image takes its place ({len(self._bad)} so far)")
            yield batch

    def _share_bad(self) -> None:
        if self._us.world > 1:
            for others in self._us.gathered(self._bad):
                self._bad |= others
            self._check_bad()

    def _check_bad(self) -> None:
        # There must be one to take the place of the others, however many are allowed.
        if len(self._bad) > min(self._running.bad_images, len(self._images) - 1):
            some = "; ".join(list(self._bad.values())[-_NAMED_BAD:])
            raise InputError(
                f"{some} ({len(self._bad)} images that cannot be read, {self._running.bad_images} allowed)",
                hint="mend or remove it, or let others take the place of so many with --bad-images",
            )

    def _line(self, losses: list[float], speed: float, waiting: float) -> metrics.Line:
        step = self._progress.step
        return metrics.Line(
            step=step,
            epoch=step // self._order.steps,
            loss=sum(losses) / max(1, len(losses)),
            learning_rate=self._recipe.rate(step - 1, self._order.steps),
            top1={f"h{heads:02d}": share for heads, share in self.top1().items()},
            images_per_second=speed,
            waiting=waiting,
            bad_images=len(self._bad),
        )

    def _tell(self, line: metrics.Line, lines: metrics.Metrics | None, left: float, say: Callable[[str], None]) -> None:
        if lines is None:
            return
        lines.add(line)
        top1 = ", ".join(f"{name} {share:.1%}" for name, share in line.top1.items())
        say(f"epoch {line.epoch}/{self._recipe.all_epochs}: loss {line.loss:.3f}, top-1 {top1}, {left:.0f} s left")

    def _save(self, out: Path) -> None:
        if self._us.first:
            states.save(out, states.State(self._progress, self.loop.tensors()))


class _Watch:
    """Where the time of an epoch goes."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self._started, self._waited, self.steps = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; waiting for them is counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def images_per_second(self) -> float:
        """Since the epoch began, of all processes."""
        return self.steps * self._batch_size / max(1e-9, time.perf_counter() - self._started)

    def waiting(self) -> float:
        """The share of the time since the epoch began that went by in waiting for images."""
        return self._waited / max(1e-9, time.perf_counter() - self._started)

    def left(self, steps: int) -> float:
        """Seconds that so many steps will take at this epoch's speed."""
        return (time.perf_counter() - self._started) / max(1, self.steps) * steps


def right_of(model: Supernet, images: Source, head_counts: list[int], us: Ranks) -> dict[int, int]:
    """How many of all images each subnet is right about; the processes share the work.

    Raises InputError, in all of them, where one meets an image that cannot be read.
    """
    right = torch.zeros(len(head_counts), dtype=torch.float64)
    refused: InputError | None = None
    try:
        for batch in images.plainly(range(us.rank, len(images), us.world)):
            seen, labels = batch.images.to(us.device), batch.labels.to(us.device)
            with torch.inference_mode():
                for i, heads in enumerate(head_counts):
                    said: Tensor = model(seen, heads).argmax(1)
                    right[i] += float((said == labels).sum())
    except InputError as error:
        refused = error
    # Of several processes none ends alone: the others could only say that it has ended.
    for reason in us.gathered(None if refused is None else refused.message):
        if reason is not None:
            raise InputError(reason) from refused
    counts = us.mean(right) * us.world
    return {heads: round(float(count)) for heads, count in zip(head_counts, counts, strict=True)}


def _same_classes(data: str, split: Split, other: Dataset) -> Dataset:
    dataset = open_dataset(data, split)
    if dataset.class_names != other.class_names:
        missing = sorted(set(dataset.class_names) ^ set(other.class_names))
        raise InputError(f"{data}: the splits have different classes ({', '.join(missing[:5])})")
    return dataset


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
