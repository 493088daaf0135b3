r"""What the trainer costs beside a bare loop over the same model and batches, and whether reading images keeps up.

    python benchmarks/training.py [--rounds 10] [--only training|reading]
    python benchmarks/training.py --only training --device cuda --arithmetic bf16 --compile \
        --preset hydravit-imagenet --batch-size 128 --steps 24

Training. The bare loop is what one would write for the paper's method (HydraViT, section 3) and no more: batches that
lie on the device, head counts drawn before, forward, cross-entropy, backward, AdamW, moving average; nothing is
checked, measured or kept. Ours is `Loop` fed by the source that `train` takes for images in memory, whose work counts;
and `train()` for one short epoch, from the call to its return: images read, losses and top-1 of three subnets told,
state and supernet written. Random images, the same images and head counts in the same steps of each, which the loss of
the first one shows. What changes images (crops, RandAugment, mixup) and drop path are left out of all. Each has a
process of its own with one thread; an epoch goes in turns, and who waits is stopped. Left out with --compile is
`train()`, which would compile in each epoch.

Reading. Generated JPEGs of ImageNet's size go through the augmentations of hydravit-imagenet up to batches for which
nothing is trained: from a folder and from tar shards, in the page cache, by 0, 1 and 2 readers. Beside it what must be
done in any case: decoding alone, by one thread; and decoding, crop and flip.

Images per second are medians over rounds. Ratios are of what was measured in the same round, above 1 is faster, with a
95 % bootstrap interval over rounds; once by the clock, once by the processor's time, which other load disturbs less.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, TINY, Worker, answer, machine, questions, ratio_interval, read_csv, stack, write_csv
from numpy.typing import NDArray
from PIL import Image

from hydradeploy.data.augment import Augmentation
from hydradeploy.data.datasets import open_dataset
from hydradeploy.supernet.model import Supernet
from hydradeploy.training.batches import Batch, InMemory, Order, Share, Source, Streamed, source
from hydradeploy.training.loop import Loop, arithmetic
from hydradeploy.training.objective import Drawing
from hydradeploy.training.presets import PRESETS
from hydradeploy.training.ranks import ranks
from hydradeploy.training.recipe import Preset
from hydradeploy.training.running import Running
from hydradeploy.training.train import train

BARE, LOOP, TRAIN = "bare loop", "Loop", "train()"
TURNS = 8  # of each thing in an epoch
EPOCH = 144  # steps: a quarter of what glyphs has images for, so what happens once an epoch weighs four times
HELD_OUT = 20  # training images to one that top-1 is of, as in glyphs
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

STORED = ("folder", "shards")
DECODED, CROPPED, READ = "decode", "decode, crop, flip", "all augmentations"
JPEG = {"size": (500, 375), "quality": 89}  # ImageNet's training images are 108 kB on average
READING_BATCH = 32
PASSES = 2  # over the images in each turn, so that starting readers is a small part

Spent = tuple[float, float]  # seconds by the clock and of the processor


@dataclass(frozen=True)
class Setting:
    """What is trained and how, as the command line says it; `steps` make an epoch."""

    preset_name: str
    batch_size: int
    steps: int
    arithmetic: str
    compile: bool
    device: str
    tiny: bool

    @property
    def preset(self) -> Preset:
        preset = PRESETS[self.preset_name]
        recipe = msgspec.structs.replace(
            preset.recipe,
            epochs=1,
            cooldown_epochs=0,
            batch_size=self.batch_size,
            arithmetic=self.arithmetic,
            drop_path=0.0,
            augment=Augmentation(),
        )
        geometry = msgspec.structs.replace(TINY, channels=preset.geometry.channels) if self.tiny else preset.geometry
        return msgspec.structs.replace(preset, recipe=recipe, geometry=geometry)

    @property
    def running(self) -> Running:
        return Running(device=self.device, workers=0, compile=self.compile)

    @property
    def machine(self) -> str:
        if self.device == "cpu":
            return machine()
        return "-".join(torch.cuda.get_device_name().lower().split())

    def __str__(self) -> str:
        kind = f"{self.arithmetic}{', compiled' if self.compile else ''}"
        return f"{self.preset_name}, {self.steps} steps of {self.batch_size}, {kind}"


def spent() -> Spent:
    """So far, by this process and those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def since(before: Spent) -> Spent:
    clock, processor = spent()
    return clock - before[0], processor - before[1]


# In a process of its own: training.


class Training:
    """The model, the images and the head counts of an epoch, the same in every process."""

    def __init__(self, setting: Setting, data: str) -> None:
        self.setting, self.data, self.preset = setting, data, setting.preset
        self.recipe = self.preset.recipe
        self.device = torch.device(setting.device)

    @cached_property
    def images(self) -> Source:
        dataset = open_dataset(self.data, "train")
        found = source(dataset, self.preset.spec(dataset.class_names), self.recipe, 0)
        if not isinstance(found, InMemory):
            raise SystemExit(f"{len(dataset)} images are too many to be kept in memory; take fewer --steps")
        return found

    @cached_property
    def heads(self) -> list[int]:
        drawing = Drawing(self.recipe.method, self.preset.geometry.trained_heads, self.recipe.seed)
        return [drawing.of(step, 0)[0] for step in range(self.setting.steps)]

    @property
    def warm(self) -> int:
        """Steps before those that are timed: torch.compile wants every head count once."""
        if not self.setting.compile:
            return min(3, self.setting.steps)
        seen = [self.heads.index(k) for k in self.preset.geometry.trained_heads if k in self.heads]
        return max(seen) + 1

    def model(self) -> Supernet:
        classes = len(open_dataset(self.data, "train").class_names)
        geometry = msgspec.structs.replace(self.preset.geometry, classes=classes)
        return Supernet(geometry).initialise(torch.Generator().manual_seed(self.recipe.seed))

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        order = Order(len(self.images), self.recipe.batch_size, self.recipe.seed)
        return self.images.steps(order, first, last, Share())

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Steps(Protocol):
    def __call__(self, first: int, last: int) -> float:
        """Take the steps first .. last - 1 of an epoch; the loss of the last one."""


def bare(training: Training) -> Steps:
    recipe, device, heads = training.recipe, training.device, training.heads
    batches = [(b.images.to(device), b.labels.to(device)) for b in training.batches(0, training.setting.steps)]
    model = training.model().to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    weights, averages = list(model.parameters()), list(average.parameters())
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.arithmetic == "fp16")
    kind = AUTOCAST.get(recipe.arithmetic)
    called = torch.compile(model) if training.setting.compile else model

    def steps(first: int, last: int) -> float:
        for step in range(first, last):
            images, labels = batches[step]
            optimiser.zero_grad()
            with torch.autocast(device.type, kind, enabled=kind is not None):
                loss = F.cross_entropy(called(images, heads[step]), labels, label_smoothing=recipe.label_smoothing)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - recipe.ema_decay)
        return float(loss.detach())

    return steps


def ours(training: Training) -> Steps:
    with ranks(training.setting.device) as us:
        loop = Loop(training.model(), training.recipe, training.setting.running, us, training.setting.steps)

    def steps(first: int, last: int) -> float:
        batches = training.batches(first, last)
        for step in range(first, last):
            loop.step(step, batches)
        return loop.losses(last)[-1]

    return steps


def in_turns(training: Training, steps: Steps, asked: Iterator[list[int]]) -> None:
    """Take the steps that are asked for and answer what they took."""
    for first, last in asked:
        before = spent()
        steps(first, last)
        training.finish()
        answer(since(before))


def whole(training: Training, asked: Iterator[list[int]]) -> None:
    """The same from inside of `train()`: the first turn begins with the call and the last one ends with its return."""
    before, last = spent(), 0

    def pause(what: str, done: int, total: int) -> None:
        nonlocal before, last
        if done == last < total:
            training.finish()
            answer(since(before))
            _, last = next(asked)
            before = spent()

    out = Path(training.data).with_name("trained.safetensors")
    for _, end in asked:
        before, last = spent(), end
        train(training.data, out, training.preset, running=training.setting.running, force=True, report=pause)
        answer(since(before))


def training_child(thing: str, setting: Mapping[str, Any], data: str) -> None:
    training = Training(Setting(**setting), data)
    asked = iter(questions())
    with arithmetic(training.recipe, training.setting.running, len(training.preset.geometry.trained_heads)):
        steps = (bare if thing == BARE else ours)(training)
        loss = steps(0, 1)
        steps(1, training.warm)
        training.finish()
        answer(loss)
        if thing == TRAIN:
            whole(training, asked)
        else:
            in_turns(training, steps, asked)


# In a process of its own: reading.


def reading_child(root: str, preset_name: str, tiny: bool) -> None:
    """Answer what is asked of with the time that it took."""
    preset = PRESETS[preset_name]
    if tiny:
        preset = msgspec.structs.replace(preset, geometry=TINY)
    answer(None)
    for stored, what, workers in questions():
        dataset = open_dataset(str(Path(root) / stored), "train")
        augment = preset.recipe.augment
        if what == CROPPED:
            augment = Augmentation(crop_scale=augment.crop_scale, crop_ratio=augment.crop_ratio, flip=augment.flip)
        recipe = msgspec.structs.replace(preset.recipe, augment=augment)
        before = spent()
        if what == DECODED:
            for index in range(PASSES * len(dataset)):
                dataset.read(index % len(dataset))
        else:
            images = Streamed(dataset, preset.spec(dataset.class_names), recipe, workers)
            order = Order(len(dataset), min(READING_BATCH, len(dataset)), recipe.seed)
            for batch in images.steps(order, 0, PASSES * order.steps, Share()):
                assert not batch.bad
        answer(since(before))


CHILDREN: Mapping[str, Callable[..., None]] = {child.__name__: child for child in (training_child, reading_child)}


# In the parent.


def training_data(directory: Path, setting: Setting) -> Path:
    """Random images of the geometry, in as many classes as it has."""
    random, g = np.random.default_rng(0), setting.preset.geometry
    count = setting.steps * setting.batch_size
    arrays: dict[str, NDArray[Any]] = {"class_names": np.array([f"{i:04d}" for i in range(g.classes)])}
    for split, images in (("train", count), ("val", max(1, count // HELD_OUT))):
        arrays[f"{split}_images"] = random.integers(
            0, 256, (images, g.image_size, g.image_size, g.channels), dtype=np.uint8
        )
        arrays[f"{split}_labels"] = random.integers(0, g.classes, images)
    path = directory / "images.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's annotation takes them for its own options
    return path


def trained(directory: Path, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """The rows of training."""
    things = [BARE, LOOP] if setting.compile else [BARE, LOOP, TRAIN]
    data = training_data(directory, setting)
    found: list[dict[str, Spent]] = []
    with ExitStack() as kept:
        workers: dict[str, Worker] = {}
        for thing in things:
            (directory / thing).mkdir()
            own = directory / thing / data.name
            own.hardlink_to(data)
            request = {"child": "training_child", "thing": thing, "setting": vars(setting), "data": str(own)}
            workers[thing] = kept.enter_context(Worker(__file__, request, {"OMP_NUM_THREADS": "1"}))
        check_losses({thing: worker.ready for thing, worker in workers.items()}, setting.arithmetic)
        bounds = sorted({setting.steps * turn // TURNS for turn in range(TURNS + 1)})
        for number in range(rounds):
            total = dict.fromkeys(things, (0.0, 0.0))
            for turn, asked in enumerate(pairwise(bounds), number):
                place = turn % len(things)
                for thing in things[place:] + things[:place]:
                    clock, processor = workers[thing].ask(asked)
                    total[thing] = total[thing][0] + clock, total[thing][1] + processor
            found.append(total)
            print(f"training, round {number + 1}: {total}", file=sys.stderr)
    given = {"machine": setting.machine, "stack": stack("torch"), "setting": str(setting)}
    return [given | row(thing, BARE, found, setting.steps * setting.batch_size) for thing in things]


def check_losses(losses: Mapping[str, float], kind: str) -> None:
    """End the benchmark unless the first step gave every process the same loss."""
    for thing, loss in losses.items():
        if not abs(loss - losses[BARE]) <= (1e-4 if kind == "fp32" else 1e-2) * losses[BARE]:
            raise SystemExit(f"{thing}: the loss of the first step is {loss}, the bare loop's {losses[BARE]}")


def row(what: str, against: str, rounds: Sequence[Mapping[str, Spent]], images: int) -> dict[str, Any]:
    """Of so many images that were trained on, or read, in each round."""
    measured: dict[str, Any] = {"what": what, "against": against, "rounds": len(rounds)}
    for place, prefix in enumerate(("", "cpu_")):
        rates = [images / one[what][place] for one in rounds]
        ratio, low, high = ratio_interval([one[against][place] / one[what][place] for one in rounds])
        measured |= {
            f"{prefix}images_s": round(statistics.median(rates), 1),
            f"{prefix}ratio": round(ratio, 4),
            f"{prefix}ratio_low": round(low, 4),
            f"{prefix}ratio_high": round(high, 4),
        }
    return measured


def jpeg(random: np.random.Generator, size: tuple[int, int]) -> bytes:
    """An image whose spectrum falls with the frequency, as that of photographs does; chroma is fainter and smooth."""
    width, height = size
    down, across = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    fall = 1 / np.maximum(1, np.hypot(down, across))
    planes = [np.fft.irfft2(fall * np.exp(2j * np.pi * random.random(fall.shape)), (height, width)) for _ in range(3)]
    luma, red, blue = (plane / plane.std() for plane in planes)
    pixels = 120 + 50 * luma[..., None] + 12 * np.stack([red, np.zeros_like(red), blue], -1)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "jpeg", quality=JPEG["quality"])
    return out.getvalue()


def stored_images(root: Path, count: int, size: tuple[int, int]) -> int:
    """Write the same images as folder and as shards, ten classes and four shards; their mean size in bytes."""
    random, total = np.random.default_rng(0), 0
    (root / "shards").mkdir(parents=True)
    with ExitStack() as kept:
        shards = [kept.enter_context(tarfile.open(root / "shards" / f"train-{i:04d}.tar", "w")) for i in range(4)]
        for number in range(count):
            data = jpeg(random, size)
            total += len(data)
            path = root / "folder" / "train" / str(number % 10) / f"{number:06d}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            for suffix, content in (("jpeg", data), ("cls", str(number % 10).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                shards[number % 4].addfile(member, io.BytesIO(content))
    return total // count


def read(
    directory: Path, preset: str, tiny: bool, count: int, readers: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """The rows of reading."""
    width, height = (64, 48) if tiny else JPEG["size"]
    mean = stored_images(directory / "stored", count, (width, height))
    asked = [(DECODED, 0), (CROPPED, 0), *((READ, workers) for workers in readers)]
    names = {(s, what, n): f"{s}: {what}" + f", {n} readers" * (what == READ) for s in STORED for what, n in asked}
    found: list[dict[str, Spent]] = []
    request = {"child": "reading_child", "root": str(directory / "stored"), "preset_name": preset, "tiny": tiny}
    # Where the places in shards are kept.
    environment = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(directory)}
    with Worker(__file__, request, environment) as worker:
        for stored in STORED:
            worker.ask((stored, DECODED, 0))
        for number in range(rounds):
            keys = list(names)[:: 1 if number % 2 == 0 else -1]
            found.append({names[key]: worker.ask(key) for key in keys})
            print(f"reading, round {number + 1}: {found[-1]}", file=sys.stderr)
    batch = min(READING_BATCH, count)
    setting = f"{preset}, {count} JPEGs {width} x {height}, {mean / 1000:.0f} kB"
    given = {"machine": machine(), "stack": stack("torch", "pillow"), "setting": setting}
    return [
        given
        | row(name, f"{stored}: {DECODED}", found, PASSES * (count if what == DECODED else count // batch * batch))
        for (stored, what, _), name in names.items()
    ]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['machine']}, {rows[0]['stack']}: {rows[0]['setting']}")
    table.add_column("", no_wrap=True)
    against = rows[0]["against"].rpartition(": ")[2]
    for heading in ("images/s", f"/ {against} (95 %)", "images/processor s", f"/ {against} (95 %)"):
        table.add_column(heading, justify="right")
    for one in rows:
        ratios = [
            f"{one[f'{of}ratio']:.3f} ({one[f'{of}ratio_low']:.3f} to {one[f'{of}ratio_high']:.3f})"
            for of in ("", "cpu_")
        ]
        table.add_row(one["what"], f"{one['images_s']:.1f}", ratios[0], f"{one['cpu_images_s']:.1f}", ratios[1])
    # Not narrower than its figures, wherever it is written to.
    Console(width=140).print(table)


def show_cores(rows: Sequence[Mapping[str, Any]]) -> None:
    """What a core reads with everything that readers and their reader cost."""
    for stored in STORED:
        last = [one for one in rows if one["what"].startswith(f"{stored}: {READ}")][-1]
        rate = last["cpu_images_s"]
        print(
            f"{last['what']}: a core prepares {rate:.0f} images/s, so N images/s of training take N / {rate:.0f} cores"
        )


def merged(before: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of both, without those of an earlier run of the same setting."""
    again = {one["setting"] for one in new}
    return [*(one for one in before if one["setting"] not in again), *new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=("training", "reading"))
    parser.add_argument("--preset", choices=PRESETS, default="glyphs", help="what is trained")
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=0, help=f"of an epoch; default: {EPOCH}")
    parser.add_argument("--arithmetic", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=256, help="that are read")
    parser.add_argument("--readers", default="0,1,2", help="numbers of processes that read")
    parser.add_argument("--tiny", action="store_true", help="so small that figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the CSV goes")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        request = options.child
        CHILDREN[request.pop("child")](**request)
        return
    batch = options.batch_size or PRESETS[options.preset].recipe.batch_size
    steps = options.steps or (2 * TURNS if options.tiny else EPOCH)
    setting = Setting(options.preset, batch, steps, options.arithmetic, options.compile, options.device, options.tiny)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.only != "reading":
            rows += trained(directory, setting, options.rounds)
            show(rows)
        if options.only != "training":
            readers = tuple(map(int, options.readers.split(",")))
            count = 8 if options.tiny else options.images
            reading = read(directory, "hydravit-imagenet", options.tiny, count, readers, options.rounds)
            show(reading)
            show_cores(reading)
            rows += reading
    file = f"training-{'tiny-' if options.tiny else ''}{setting.machine}-{stack('torch')}"
    write_csv(file, merged(read_csv(file, options.results), rows), options.results)


if __name__ == "__main__":
    main()
