"""The command line: each command parses, calls one public function, prints the answer; progress goes to stderr."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

import msgspec
import typer

from hydradeploy.bundle import Batch, Check
from hydradeploy.errors import (
    EXIT_CODES,
    EnvironmentFailed,
    ExitCode,
    HydraError,
    InputError,
    MissingError,
    UsageError,
)
from hydradeploy.spec import Interpolation, Spec, parse_heads, show_heads
from hydradeploy.units import show_bytes, show_count, show_percent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from typer.models import CommandInfo

    from hydradeploy.measurements import Cell, Stored
    from hydradeploy.profiler.plan import Plan
    from hydradeploy.remote.profile import Remote
    from hydradeploy.runtime.verify import Verified
    from hydradeploy.selector.budget import Budget
    from hydradeploy.stored import Input


_HEARTBEAT_S = 5.0

_CODES = "Exit codes:\n\n\b\n" + "\n".join(f"{code.value:>4}  {text}" for code, text in EXIT_CODES.items())

app = typer.Typer(
    name="hydradeploy",
    help="Puts an elastic vision transformer (HydraViT) on a fleet of unlike devices.",
    epilog=_CODES,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
BundlePath = Annotated[Path, typer.Option("--bundle", help="The bundle's directory.")]
ProfilesPath = Annotated[Path, typer.Option("--profiles", help="The directory of device profiles.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Verify = Annotated[str, typer.Option("--verify", metavar="stamp|always", help="Hash what is new, or everything.")]


def main() -> None:
    """Run the command line and exit with one of the documented codes."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, _interrupted)
    sys.exit(_guarded(sys.argv[1:], lambda: bool(interrupts)))


def _interrupted(number: int, frame: FrameType | None) -> None:
    """What is told to end does what it does on Ctrl-C, also where a shell has that ignored in the background."""
    answer = signal.getsignal(signal.SIGINT)
    (answer if callable(answer) else signal.default_int_handler)(number, frame)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hydradeploy {version('hydradeploy')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The directory to fill.")] = Path("build/demo"),
    epochs: Annotated[int | None, typer.Option(help="Train for less than the preset.", min=1)] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run the whole flow on bundled data.

    Trains a small supernet on digits, exports, evaluates, measures, picks for three budgets, and draws a picture.
    """
    with _extra("train"):
        from hydradeploy.demo import demo as call
    with _progress() as report:
        done = call(out, epochs=epochs, force=force, report=report, say=report.say)
    if as_json:
        _print_json({"pick": str(done.pick_file), "picture": str(done.picture), "answers": done.answers})
    else:
        print(f"{done.pick_file}: the last answer, as pick --json gives it\n{done.picture}: accuracy against latency")


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option(
            help="digits, glyphs, a folder with train/CLASS and val/CLASS folders, tar shards, or an .npz file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The supernet file to write.")] = Path("supernet.safetensors"),
    preset: Annotated[
        str | None, typer.Option(help="digits, glyphs, small or hydravit-imagenet. Default: what suits the data.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with any of the options of --show-config.")] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every option of this run as TOML, and train nothing.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Default: what suits the data.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, of all processes.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random draw.", min=0)] = None,
    arithmetic: Annotated[str | None, typer.Option(help="fp32, tf32, bf16 or fp16.")] = None,
    trained_heads: Annotated[str | None, typer.Option(help="Head counts to train: 3-12.")] = None,
    classifiers: Annotated[
        str | None, typer.Option(help="shared: one for all head counts; separate: one for each.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head.", min=1)] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks.", min=1)] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    patch_size: Annotated[int | None, typer.Option(help="Pixels.", min=1)] = None,
    sample_weights: Annotated[
        str | None, typer.Option(help="Percentages, one per trained head count: 20,10,... Default: uniform.")
    ] = None,
    head_draw: Annotated[
        str | None, typer.Option(help="per-rank: each process draws its own head counts; shared: all the same.")
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Head counts drawn for each step.", min=0)] = None,
    anchors: Annotated[
        str | None, typer.Option(help="Subnets in every step besides: none, largest, sandwich (both ends), or 3,6,12.")
    ] = None,
    distil: Annotated[
        float | None, typer.Option(help="Share of a smaller subnet's loss that the largest one's output gives.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="A supernet file whose largest subnet teaches.")] = None,
    teacher_share: Annotated[float | None, typer.Option(help="Share of the loss that the teacher gives.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="A supernet file of no more heads to start from.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images, for each that trains.", min=0)
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts that a batch goes through in.", min=1)] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    save_every: Annotated[
        int | None, typer.Option(help="Steps after which to save, besides each epoch.", min=1)
    ] = None,
    bad_images: Annotated[
        int | None, typer.Option(help="Unreadable images to replace by the next one before giving up.", min=0)
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Directory to write metrics for TensorBoard to.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a supernet, in one process or, with torchrun -m hydradeploy train, in many.

    The paper's method: one random head count per step. Ctrl-C leaves a usable supernet; --resume goes on exactly.
    """
    heads = None if trained_heads is None else parse_heads(trained_heads)
    weights = None if sample_weights is None else tuple(round(value) for value in _floats(sample_weights))
    with _extra("train"):
        from hydradeploy.training import config as configs
        from hydradeploy.training.presets import suited
        from hydradeploy.training.train import train as call
    written = {} if config is None else configs.read(config)
    name = str(preset or written.get("preset") or suited(data))
    fixed = parse_heads(anchors) if anchors is not None and anchors[:1].isdigit() else anchors
    shape = {"head_dim": head_dim, "depth": depth, "image_size": image_size, "patch_size": patch_size}
    method = {"sample_weights": weights, "head_draw": head_draw, "draws": draws, "anchors": fixed, "distil": distil}
    numbers = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "seed": seed, "arithmetic": arithmetic}
    how = {"device": device, "workers": workers, "accumulate": accumulate, "compile": compiled or None}
    told = {"save_every": save_every, "bad_images": bad_images, "tensorboard": tensorboard and str(tensorboard)}
    options = configs.without_none(
        {
            "geometry": {**shape, "trained_heads": heads, "classifiers": classifiers},
            "recipe": {**numbers, "method": {**method, "teacher_share": teacher_share}},
            "running": {**how, **told},
        }
    )
    start = configs.preset_named(name)
    # What is wrong in the file is said of the file, before the options are laid over it.
    if config is not None:
        configs.resolved(start, str(config), written)
    chosen, running = configs.resolved(start, "options", written, options)
    if show_config:
        print(configs.shown(name, chosen, running), end="")
        return
    with _progress() as report:
        trained = call(
            data,
            out,
            chosen,
            init_from=init_from,
            teacher=teacher,
            running=running,
            resume=resume,
            force=force,
            report=report,
            say=report.say,
        )
    if int(os.environ.get("RANK", "0")):
        return
    top1 = {f"h{count:02d}": share for count, share in trained.top1.items()}
    if as_json:
        _print_json({"out": str(out), "spec": trained.spec, "top1": top1, "seconds": trained.seconds})
    else:
        shown = ", ".join(f"{name} {show_percent(share)}" for name, share in top1.items())
        print(f"{out}: {_describe(trained.spec)}; top-1 on held-out images {shown}")


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Official HydraViT checkpoint, timm/DeiT ViT, or safetensors.")],
    out: Annotated[Path, typer.Option(help="The supernet file to write.")] = Path("supernet.safetensors"),
    trained_heads: Annotated[str | None, typer.Option(help="Head counts that were trained: 3-12.")] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.", min=1)] = 64,
    crop_pct: Annotated[float, typer.Option(help="Share of the resized shorter side that the crop keeps.")] = 0.875,
    interpolation: Annotated[str, typer.Option(help="nearest, bilinear, bicubic or lanczos.")] = "bicubic",
    mean: Annotated[str | None, typer.Option(help="One value per channel. Default: ImageNet's for colour.")] = None,
    std: Annotated[str | None, typer.Option(help="One value per channel. Default: ImageNet's for colour.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file with one class name per line.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into supernet.safetensors.

    Reads official HydraViT checkpoints, ViTs in timm's and DeiT's naming, and safetensors. No pickled code is run.
    """
    if interpolation not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise UsageError(f"no interpolation {interpolation!r}", hint="one of nearest, bilinear, bicubic, lanczos")
    heads = None if trained_heads is None else parse_heads(trained_heads)
    names = None if class_names is None else _lines(class_names)
    with _extra("export"):
        from hydradeploy.supernet.importer import import_checkpoint
    imported = import_checkpoint(
        checkpoint,
        out,
        trained_heads=heads,
        head_dim=head_dim,
        crop_pct=crop_pct,
        interpolation=cast("Interpolation", interpolation),
        mean=None if mean is None else _floats(mean),
        std=None if std is None else _floats(std),
        class_names=names,
        force=force,
    )
    for warning in imported.warnings:
        _say(f"warning: {warning}")
    if as_json:
        _print_json({"out": str(out), "entry": imported.entry, "spec": imported.spec, "warnings": imported.warnings})
    else:
        print(f"{out}: {_describe(imported.spec)}, from {imported.entry}")


@app.command()
def export(
    supernet: Annotated[Path, typer.Option(help="The supernet file.")] = Path("supernet.safetensors"),
    bundle: BundlePath = Path("bundle"),
    heads: Annotated[str | None, typer.Option(help="Head counts: 3,6,9-12. Default: all that were trained.")] = None,
    precision: Annotated[
        str,
        typer.Option(help="fp32, fp16, bf16, int8dyn (ranges at run time), int8 (calibrated); several with commas."),
    ] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to compare graphs on and to calibrate int8 with: digits, glyphs, a folder or .npz. "
            "Default: from a seed."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Images per run: a number, or dynamic.")] = "1",
    input: Annotated[
        str, typer.Option(metavar="float32|uint8", help="Normalised images (b, c, s, s), or pixels (b, s, s, c).")
    ] = "float32",
    calibration: Annotated[
        str, typer.Option(help="How static int8 finds its ranges: minmax, percentile or entropy.")
    ] = "minmax",
    calibration_images: Annotated[int, typer.Option(help="To find them with.", min=1)] = 64,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Top-1 that int8 may cost on --data, 0.5pp; layers that hurt are kept in float."),
    ] = None,
    standalone: Annotated[bool, typer.Option("--standalone", help="Graphs that carry their own weights.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="tensorrt|tensorrt-rtx", help="Build engines too: for the GPU here, or with -rtx ahead of time."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="GPUs to build for ahead of time: sm86,sm89. Default: what tensorrt-rtx chooses.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write subnets as ONNX graphs over one weights file.

    Every graph is run and compared with the torch subnet first; where one differs, nothing is written. Artifacts that
    are in the bundle already stay.
    """
    wanted = None if heads is None else parse_heads(heads)
    if input not in ("float32", "uint8"):
        raise UsageError(f"--input {input!r} is not possible", hint="float32 or uint8")
    if target is not None and engine is None:
        raise UsageError("--target without --engine", hint="--engine tensorrt-rtx")
    with _extra("export"):
        from hydradeploy.exporter.export import export as call
        from hydradeploy.exporter.quantise import Quantising
    from hydradeploy.units import FRACTION, parse

    quantising = Quantising(
        method=calibration,
        images=calibration_images,
        max_drop=None if max_drop is None else parse(max_drop, FRACTION),
    )
    with _progress() as report:
        written = call(
            supernet,
            bundle,
            heads=wanted,
            precisions=[name.strip() for name in precision.split(",")],
            batch=_batch(batch),
            input=cast("Input", input),
            standalone=standalone,
            data=data,
            quantising=quantising,
            engine=engine,
            targets=_names(target) or (),
            force=force,
            report=report,
            say=report.say,
        )
    manifest = written.manifest
    if as_json:
        _print_json({"bundle": str(bundle), "samples": manifest.samples, "artifacts": manifest.artifacts})
        return
    rows = [
        (
            a.name,
            show_count(a.parameters),
            show_count(a.macs),
            show_bytes(a.size_bytes),
            f"{a.parity.max_difference:.1e}",
            f"{a.parity.cosine:.4f}",
            "" if a.parity.top1_agreement is None else show_percent(a.parity.top1_agreement, 0),
        )
        for a in manifest.artifacts
    ]
    _table(("artifact", "parameters", "MACs", "packed size", "logit difference", "cosine", "same top-1"), rows)
    total = sum(record.size_bytes for record in manifest.files.values())
    stored = sum(record.size_bytes for name, record in manifest.files.items() if name in manifest.weights)
    print(
        f"{bundle}: {show_bytes(total)}, {show_bytes(stored)} of it shared weights; "
        f"parity on {manifest.artifacts[0].parity.samples} samples ({manifest.samples})"
    )


@app.command()
def evaluate(
    data: Annotated[
        str | None,
        typer.Option(help="digits, glyphs, a folder with a folder per class, or an .npz file; its test split."),
    ] = None,
    declared: Annotated[
        Path | None, typer.Option(help="CSV of accuracy measured elsewhere: artifact,dataset,top1,n.")
    ] = None,
    bundle: BundlePath = Path("bundle"),
    limit: Annotated[int | None, typer.Option(help="Evaluate on that many images, spread evenly.", min=1)] = None,
    backend: Annotated[
        str | None, typer.Option(help="One, several with commas, or all. Default: the first that is usable.")
    ] = None,
    compute_type: Annotated[
        str | None, typer.Option(help="What to compute in: fp32,bf16. Default: what suits each artifact.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of every artifact.

    Top-1 with a 95 % interval, kept in the bundle with what each artifact said of each image. Accuracy measured
    elsewhere is entered with --declared and marked as that.
    """
    if (data is None) == (declared is None):
        raise UsageError("give either --data or --declared", hint="hydradeploy evaluate --data digits")
    from hydradeploy.evaluator.evaluate import declare
    from hydradeploy.evaluator.evaluate import evaluate as call

    if declared is not None:
        found = declare(bundle, declared)
    else:
        with _progress() as report:
            found = call(
                bundle,
                str(data),
                limit=limit,
                backends=_names(backend),
                compute_types=_names(compute_type),
                report=report,
                say=report.say,
            )
    if as_json:
        _print_json({"bundle": str(bundle), "rows": found.rows, "left_out": found.left_out})
        return
    rows = [
        (
            row.artifact,
            show_percent(row.top1, 2),
            f"{show_percent(row.lower, 2)} .. {show_percent(row.upper, 2)}",
            str(row.n),
            row.dataset,
            row.input or "",
            row.source if row.backend is None else f"{row.backend}, {row.compute_type}, {row.instruction_set}",
        )
        for row in found.rows
    ]
    _table(("artifact", "top-1", "95% interval", "images", "data", "input", "by"), rows)


@app.command()
def profile(
    context: typer.Context,
    bundle: BundlePath = Path("bundle"),
    profiles: ProfilesPath = Path("profiles"),
    device: Annotated[
        str | None, typer.Option(metavar="jetson|cuda|cpu", help="Default: what this machine is.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="One, several with commas, or all. Default: the first that is usable.")
    ] = None,
    compute_type: Annotated[
        str | None, typer.Option(help="What to compute in: fp32,bf16. Default: what suits each artifact.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE[,VALUE], for backends that have it: hint=throughput,latency. Several times."),
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Head counts: 3,6,9-12. Default: all in the bundle.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32,fp16. Default: all in the bundle.")] = None,
    threads: Annotated[str | None, typer.Option(help="Thread counts: 1,2. Default: one per usable core.")] = None,
    preset: Annotated[
        str, typer.Option(help="How many samples to take: quick, standard, gate; or sustained.")
    ] = "quick",
    pace: Annotated[
        str | None, typer.Option(help="Call on a schedule, 30hz; latency counts from the intended arrival.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Call from so many threads at once.", min=1)] = 1,
    percentile: Annotated[str, typer.Option(help="Take samples for this one.")] = "p95",
    confidence: Annotated[str, typer.Option(help="And with this confidence.")] = "95%",
    max_time: Annotated[
        str | None,
        typer.Option(help="Cut samples to fit, 10min. Default: 135s for quick, 30min and 60min for the others."),
    ] = None,
    lock_clocks: Annotated[
        bool, typer.Option("--lock-clocks", help="Pin the clocks meanwhile, and put them back. Takes root.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be measured and how long.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut short.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew where a run was cut short.")] = False,
    no_build: Annotated[bool, typer.Option("--no-build", help="Fail where an engine is missing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 6 where a measurement is not clean.")] = False,
    host: Annotated[
        str | None, typer.Option(help="Measure that device over ssh: user@orin, ssh://user@orin:2222.")
    ] = None,
    host_program: Annotated[
        str | None, typer.Option(help="The hydradeploy there, ~/hydra/bin/hydradeploy. Default: found.")
    ] = None,
    bootstrap: Annotated[
        str | None,
        typer.Option(metavar="WHEEL", help="Install this wheel there, with extra ort or WHEEL[openvino], in a cache."),
    ] = None,
    ssh: Annotated[
        str | None, typer.Option(envvar="HYDRADEPLOY_SSH", help="To reach it with: 'ssh -F FILE'. Default: ssh.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and energy, here or on a --host.

    Every artifact is run in several fresh processes, head counts interleaved, while another one watches the device.
    All samples are kept in a profile, where they replace earlier ones of the same device under the same conditions.
    """
    from hydradeploy.profiler.presets import Target
    from hydradeploy.profiler.profile import Order
    from hydradeploy.profiler.profile import plan as plan_of
    from hydradeploy.profiler.profile import profile as call
    from hydradeploy.units import DURATION, FRACTION, RATE, parse, parse_percentile

    order = Order(
        device=device,
        backends=_names(backend),
        compute_types=_names(compute_type),
        settings=_settings(setting or ()),
        heads=None if heads is None else parse_heads(heads),
        precisions=_names(precision),
        threads=None if threads is None else _counts(threads),
        preset=preset,
        pace_hz=None if pace is None else parse(pace, RATE),
        concurrency=concurrency,
        target=Target(parse_percentile(percentile), parse(confidence, FRACTION)),
        max_time_s=None if max_time is None else parse(max_time, DURATION),
    )
    if host is not None:
        from hydradeploy.remote.profile import Remote
        from hydradeploy.remote.program import wheel

        remote = Remote(host, ssh, host_program, None if bootstrap is None else wheel(bootstrap))
        _profile_there(remote, bundle, profiles, _given(context, but=_NOT_THERE), dry_run, resume, strict, as_json)
        return
    if host_program is not None or bootstrap is not None:
        raise UsageError("--host-program and --bootstrap are about another device", hint="name it with --host")
    if dry_run:
        _show_plan(plan_of(bundle, profiles, order), as_json)
        return
    with _progress() as report:
        done = call(
            bundle,
            profiles,
            order,
            lock_clocks=lock_clocks,
            resume=resume,
            force=force,
            build=not no_build,
            report=report,
            say=report.say,
        )
    _show_profiled(done, {}, strict, as_json)


class _Measured(Protocol):
    """What was measured, wherever that was."""

    @property
    def stored(self) -> Stored: ...

    @property
    def cells(self) -> tuple[Cell, ...]: ...

    @property
    def left_out(self) -> tuple[str, ...]: ...


def _show_profiled(done: _Measured, more: Mapping[str, object], strict: bool, as_json: bool) -> None:
    from hydradeploy.profiler.profile import check_clean

    if as_json:
        found = {"profile": str(done.stored.path), "device": done.stored.profile.device, "cells": done.cells}
        _print_json({**found, "left_out": done.left_out, **more})
    else:
        _show_cells(done.cells)
        print(f"{done.stored.path}: {done.stored.profile.device.name}, {len(done.cells)} cells measured")
    if strict:
        check_clean(done.cells)


# What is about this machine, or done on it with what comes back.
_NOT_THERE = (
    "bundle",
    "profiles",
    "host",
    "host_program",
    "bootstrap",
    "ssh",
    "as_json",
    "strict",
    "dry_run",
    "resume",
)


def _given(context: typer.Context, *, but: Sequence[str]) -> list[str]:
    """The options that were given, as they were, but for some."""
    arguments = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name is None or parameter.name in but or source is None or source.name != "COMMANDLINE":
            continue
        value, option = context.params[parameter.name], parameter.opts[0]
        if value is True:
            arguments.append(option)
        else:
            arguments += [f"{option}={one}" for one in (value if isinstance(value, list | tuple) else [value])]
    return arguments


def _profile_there(
    remote: Remote,
    bundle: Path,
    profiles: Path,
    arguments: Sequence[str],
    dry_run: bool,
    resume: bool,
    strict: bool,
    as_json: bool,
) -> None:
    from hydradeploy.profiler.plan import Plan
    from hydradeploy.remote.profile import plan as plan_of
    from hydradeploy.remote.profile import profile as call

    with _progress() as report:
        if dry_run:
            found = plan_of(remote, bundle, arguments, report=report, say=report.say)
        else:
            done = call(remote, bundle, profiles, arguments, resume=resume, report=report, say=report.say)
    if dry_run:
        _show_plan(msgspec.json.decode(found, type=Plan), as_json)
    else:
        _show_profiled(done, {"host": remote.host, "copied": done.copied}, strict, as_json)


@app.command(hidden=True)
def there() -> None:
    """What --host talks to."""
    from hydradeploy.remote.there import main as call

    raise typer.Exit(call())


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        _print_json(plan)
        return
    from hydradeploy.profiler.plan import HEADER, rows, sentence

    _table(HEADER, rows(plan))
    print("\n".join((*plan.left_out, sentence(plan))))


def _show_cells(cells: Sequence[Cell]) -> None:
    """Tables, then what is wrong with figures and why some are not there."""
    from hydradeploy.report.cells import missing_lines, remark_lines, tables

    for table in tables(cells):
        print(table.title)
        _table(table.header, table.rows)
    for line in (*remark_lines(cells), *missing_lines(cells)):
        print(line)
    for cell in cells:
        if cell.error is not None:
            _say(f"not measured: {cell.error}")


@app.command()
def pick(
    latency: Annotated[list[str] | None, typer.Option(help="20ms is the 95th percentile; or 'p99<=20ms'.")] = None,
    memory: Annotated[str | None, typer.Option(help="At most, 1.5GiB.")] = None,
    energy: Annotated[str | None, typer.Option(help="At most per image, 0.4J.")] = None,
    size: Annotated[str | None, typer.Option(help="At most on disk when packed, 50MiB.")] = None,
    throughput: Annotated[str | None, typer.Option(help="At least, in images: 50/s.")] = None,
    min_top1: Annotated[str | None, typer.Option(help="At least, 78%; the lower end of the interval counts.")] = None,
    prefer: Annotated[
        str | None, typer.Option(help="accuracy, latency, energy, memory or size. Default: accuracy.")
    ] = None,
    confidence: Annotated[str, typer.Option(help="For everything that chance is in.")] = "95%",
    explain: Annotated[
        bool, typer.Option("--explain", help="One line per measured cell, with what refused it.")
    ] = False,
    everywhere: Annotated[bool, typer.Option("--all", help="One row per device profile.")] = False,
    bundle: BundlePath = Path("bundle"),
    profiles: ProfilesPath = Path("profiles"),
    profile: Annotated[Path | None, typer.Option(help="Plan with this profile, also of another device.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Accuracy on this one. Default: the last evaluated.")] = None,
    regime: Annotated[
        str, typer.Option(help="How calls arrive: saturated, paced-30hz, concurrent-4, burst, sustained.")
    ] = "saturated",
    accept: Annotated[str | None, typer.Option(help="Flags to accept: throttled,contended.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Only cells without any flag.")] = False,
    assume_larger: Annotated[
        bool, typer.Option("--assume-larger-is-better", help="Order by head count instead of accuracy.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Name the most accurate subnet that meets a budget, with evidence.

    --latency 20ms: the 95th percentile is at most 20 ms, with 95 % confidence. Exits with 3 where nothing meets the
    budget and with 4 where more samples are needed to tell.
    """
    from hydradeploy.report.text import DEVICE_HEADER, answer_lines, device_row
    from hydradeploy.selector.pick import Request, exit_code, pick_all
    from hydradeploy.selector.pick import pick as call

    request = Request(
        budget=_budget(latency or [], memory, energy, size, throughput, min_top1, confidence),
        prefer=cast("Any", prefer),
        accept=_flags(accept),
        strict=strict,
        assume_larger_is_better=assume_larger,
        dataset=dataset,
        regime=regime,
    )
    if everywhere:
        answers = pick_all(bundle, profiles, request)
        if as_json:
            _print_json({"answers": answers})
        else:
            _table(DEVICE_HEADER, [device_row(answer) for answer in answers])
    else:
        answers = (call(bundle, profiles, request, profile=profile),)
        if as_json:
            _print_json(answers[0])
        else:
            print("\n".join(answer_lines(answers[0], explain=explain)))
    raise typer.Exit(exit_code(answers))


def _budget(
    latency: Sequence[str],
    memory: str | None = None,
    energy: str | None = None,
    size: str | None = None,
    throughput: str | None = None,
    min_top1: str | None = None,
    confidence: str = "95%",
) -> Budget:
    from hydradeploy.selector.budget import Budget, parse_latency
    from hydradeploy.units import ENERGY, FRACTION, RATE, SIZE, parse

    return Budget(
        latency=tuple(map(parse_latency, latency)),
        memory_bytes=None if memory is None else parse(memory, SIZE),
        energy_j=None if energy is None else parse(energy, ENERGY),
        size_bytes=None if size is None else parse(size, SIZE),
        throughput_per_s=None if throughput is None else parse(throughput, RATE),
        min_top1=None if min_top1 is None else parse(min_top1, FRACTION),
        confidence=parse(confidence, FRACTION),
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A profile.")],
    after: Annotated[Path, typer.Argument(help="A later one of the same device under the same conditions.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="p95:+5%; also p50, mean, memory, energy, load. Several times for several. Default: p95:+5%"),
    ] = None,
    accept: Annotated[str | None, typer.Option(help="Flags to accept: throttled,contended.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown for a pull request.")] = False,
    as_json: Json = False,
) -> None:
    """Fail where a device has become slower than it was.

    A regression is over the limit and not by chance; it exits with 9. With 4 where more processes are needed to tell.
    """
    from hydradeploy.report import compare as shown
    from hydradeploy.selector.compare import compare as call
    from hydradeploy.selector.compare import exit_code, parse_rule

    if markdown and as_json:
        raise UsageError("--markdown and --json exclude each other", hint="choose one")
    rules = tuple(map(parse_rule, fail_on or ("p95:+5%",)))
    comparison = call(before, after, rules, accept=_flags(accept))
    if as_json:
        _print_json(comparison)
    elif markdown:
        print(shown.markdown(comparison), end="")
    else:
        _table(shown.HEADER, tuple(shown.rows(comparison)))
        print("\n".join(shown.lines(comparison)))
    raise typer.Exit(exit_code(comparison))


def _flags(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between them, None where none are given; raises UsageError for an empty list."""
    if text is None:
        return None
    found = _flags(text)
    if not found:
        raise UsageError(f"{text!r} names nothing", hint="one name, or several with commas")
    return found


def _settings(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, values = (part.strip() for part in text.partition("="))
        if not name or not _flags(values):
            raise UsageError(f"--setting {text!r} is not possible", hint="write for example hint=throughput,latency")
        found[name] = (*found.get(name, ()), *_flags(values))
    return found


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(metavar="jetson|cuda|cpu", help="Default: what this machine is.")
    ] = None,
    profiles: ProfilesPath = Path("profiles"),
    as_json: Json = False,
) -> None:
    """Say whether this machine is fit to be measured.

    One line per backend, sensor, right, clock, limit, load and disk: ok, or what is wrong and what puts it right.
    """
    from hydradeploy.doctor import diagnose, lines

    diagnosis = diagnose(profiles, device=device)
    if as_json:
        _print_json(diagnosis)
    else:
        print("\n".join(lines(diagnosis)))
    raise typer.Exit(diagnosis.exit_code)


@app.command()
def verify(
    bundle: BundlePath = Path("bundle"),
    backend: Annotated[
        str | None, typer.Option(help="Run the golden samples on: one, several with commas, or all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's files and what it computes here.

    Hashes every file, then runs the golden samples and compares the logits with those of the export.
    """
    from hydradeploy.runtime.verify import verify as call

    verified = call(bundle, backends=_names(backend))
    if as_json:
        _print_json(verified)
    else:
        _show_verified(verified)
    if verified.failed:
        raise MissingError(
            f"{len(verified.failed)} of {len(verified.failed) + len(verified.outputs)} artifacts could not be run: "
            + "; ".join(verified.failed)
        )


def _show_verified(verified: Verified) -> None:
    if verified.outputs:
        rows = [
            (
                o.artifact,
                o.backend,
                f"{o.max_difference:.1e}",
                f"{o.tolerance:.2g}",
                f"{o.cosine:.4f}",
                show_percent(o.top1_agreement, 0),
            )
            for o in verified.outputs
        ]
        _table(("artifact", "backend", "logit difference", "allowed", "cosine", "same top-1"), rows)
    print(f"{verified.bundle}: {verified.files} files, {show_bytes(verified.size_bytes)}, every hash agrees")
    for line in verified.outputs_skipped:
        print(f"outputs not checked: {line}")


@app.command()
def pack(
    artifact: Annotated[str, typer.Argument(help="For example h06-fp32.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    bundle: BundlePath = Path("bundle"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a bundle of one artifact, for one device.

    It holds the graphs, the weights this subnet reads and no others, preprocessing, class names and golden samples.
    """
    with _extra("export"):
        from hydradeploy.exporter.pack import pack as call
    packed = call(bundle, artifact, out, force=force)
    if as_json:
        _print_json({"out": str(out), "artifact": packed.artifact})
    else:
        print(f"{out}: {packed.artifact.name}, {show_bytes(packed.artifact.size_bytes)}")


@app.command()
def run(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    bundle: BundlePath = Path("bundle"),
    artifact: Annotated[str | None, typer.Option(help="For example h06-fp32. Default: the one of most heads.")] = None,
    latency: Annotated[
        list[str] | None, typer.Option(help="Use what pick gives for this budget: 20ms, 'p99<=20ms'.")
    ] = None,
    profiles: ProfilesPath = Path("profiles"),
    backend: Annotated[str | None, typer.Option(help="Default: the first that is usable.")] = None,
    top: Annotated[int, typer.Option(help="Classes to show per image.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Default: the backend's.", min=1)] = None,
    check: Verify = "stamp",
    as_json: Json = False,
) -> None:
    """Classify images with the named artifact, or with the one that --latency picks."""
    if check not in ("stamp", "always"):
        raise UsageError(f"--verify {check!r} is not possible", hint="stamp or always")
    if latency and artifact is not None:
        raise UsageError("--artifact and --latency exclude each other", hint="name the artifact or the budget")
    compute_type: str | None = None
    settings: Mapping[str, str] = {}
    if latency:
        from hydradeploy.report.text import answer_lines
        from hydradeploy.selector.pick import Request, exit_code, pick

        answer = pick(bundle, profiles, Request(_budget(latency)))
        _say("\n".join(answer_lines(answer)))
        if answer.pick is None:
            raise typer.Exit(exit_code((answer,)))
        artifact, backend, threads = answer.pick.artifact, answer.pick.backend, answer.pick.threads
        compute_type, settings = answer.pick.compute_type, answer.pick.settings
    from hydradeploy.runtime.predict import run as call

    running = call(
        bundle,
        images,
        artifact=artifact,
        backend_name=backend,
        top=top,
        threads=threads,
        compute_type=compute_type,
        settings=settings,
        check=cast("Check", check),
    )
    if artifact is None:
        _say(f"no artifact named, using the one of most heads: {running.artifact.name}")
    predictions = []
    for prediction in running.predictions:
        predictions.append(prediction)
        if as_json:
            continue
        if prediction.error is not None:
            _say(f"error: {prediction.error}")
            continue
        print(prediction.image)
        for guess in prediction.top:
            name = guess.name if guess.name is not None else f"class {guess.index}"
            print(f"  {show_percent(guess.probability):>6}  {name}")
    if as_json:
        how = {"artifact": running.artifact.name, "backend": running.backend, "compute_type": running.compute_type}
        _print_json({**how, "images": predictions})
    failed = sum(prediction.error is not None for prediction in predictions)
    if failed:
        raise InputError(f"{failed} of {len(predictions)} images could not be read, the others are answered")


def _guarded(arguments: Sequence[str], interrupted: Callable[[], bool]) -> int:
    """Run a command; every way out is an exit code, and only a bug shows a traceback.

    Libraries in C may make another error of a KeyboardInterrupt that comes while they call back: `interrupted` knows.
    """
    try:
        code = _app_for(arguments)(args=list(arguments) or ["--help"], standalone_mode=False, prog_name="hydradeploy")
        sys.stdout.flush()
        if code == ExitCode.INTERRUPTED:  # typer's answer to KeyboardInterrupt
            _say("interrupted")
        return code if isinstance(code, int) else ExitCode.OK
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt) or interrupted():
            _say("interrupted")
            return ExitCode.INTERRUPTED
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Say what went wrong, and give its exit code."""
    try:
        raise error
    except HydraError as known:
        return _fail(known)
    except _CLICK_ERROR as wrong:
        return _fail(UsageError(_sentence(wrong), hint=_help_hint(wrong)))
    except (BrokenPipeError, SystemExit):  # the second is typer's answer to the first
        # The reader of our output has left; so do we, and keep Python from complaining about it on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except MemoryError:
        return _fail(EnvironmentFailed("out of memory", hint="close other programs, or choose fewer heads"))
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        return _fail(EnvironmentFailed(f"{(error.strerror or str(error)).lower()}{named}"))
    except Exception:
        traceback.print_exc()
        _say("error: this is a bug in hydradeploy\nhint: please report it with the lines above")
        return ExitCode.BUG


def _app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command line with the one command that is asked for: typer takes 40 ms to build all of them."""
    asked = [command for command in app.registered_commands if _name_of(command) in arguments[:1]]
    if not asked:
        return app
    lean = copy.copy(app)
    lean.registered_commands = asked
    return lean


def _name_of(command: CommandInfo) -> str | None:
    return command.name or (command.callback.__name__ if command.callback else None)


# typer carries its own copy of click, under a private name; its errors are reached by a public heir.
_CLICK_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[2])


def _sentence(error: Exception) -> str:
    message = str(cast("Any", error).format_message()).strip()
    return message.rstrip(".") or "usage"


def _help_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else 'hydradeploy'} --help"


def _fail(error: HydraError) -> int:
    _say(f"error: {error.message}")
    if error.hint:
        _say(f"hint: {error.hint}")
    return error.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Not a terminal: nothing is cut to an imagined width.
    Console(width=None if sys.stdout.isatty() else 400).print(table)


class _Reporter(Protocol):
    """Progress of one command: how far it is, and lines to keep."""

    def __call__(self, what: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def _progress() -> Iterator[_Reporter]:
    """Progress on stderr: a bar with time left on a terminal, else a line per step and a heartbeat."""
    if not sys.stderr.isatty():
        yield _Heartbeat()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        yield _Bars(progress)
    finally:
        progress.stop()


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._progress.start()  # not before: it would wipe out what ssh asks
            self._tasks[what] = self._progress.add_task(what, total=total or None)
        self._progress.update(self._tasks[what], completed=done)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


class _Heartbeat:
    def __init__(self) -> None:
        self._what, self._last = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._last >= _HEARTBEAT_S:
            _say(f"{what} {done}/{total}" if total else what)
            self._what, self._last = what, now

    def say(self, text: str) -> None:
        _say(text)
        self._last = time.monotonic()


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra to install where a workstation command meets a device's installation."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("hydradeploy"):
            raise
        raise MissingError(
            f"the package {error.name} is not installed; this command belongs on a workstation",
            hint=f"pip install 'hydradeploy[{name}]'",
        ) from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers", hint="write for example 0.485,0.456,0.406") from error


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of counts", hint="write for example 1,2") from error


def _batch(text: str) -> Batch:
    if text == "dynamic":
        return "dynamic"
    if not text.isdecimal():
        raise UsageError(f"--batch {text!r} is not possible", hint="a number of images, or dynamic")
    return int(text)


def _describe(spec: Spec) -> str:
    g = spec.geometry
    return (
        f"{show_heads(g.trained_heads)} heads of {g.head_dim}, depth {g.depth}, {g.image_size}x{g.image_size} pixels "
        f"in patches of {g.patch_size}, {g.classes} classes, crop {spec.preprocessing.crop_pct}"
    )
