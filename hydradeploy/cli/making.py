"""Commands of the workstation: a supernet trained or imported, its subnets exported and packed; and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hydradeploy.cli import given
from hydradeploy.cli.extras import extra
from hydradeploy.cli.options import BundlePath, Force, Json
from hydradeploy.cli.output import print_json, print_table, say
from hydradeploy.cli.progress import progress
from hydradeploy.errors import UsageError
from hydradeploy.spec import Interpolation, Spec, parse_heads, show_heads
from hydradeploy.units import show_bytes, show_count, show_percent

if TYPE_CHECKING:
    from hydradeploy.stored import Input


def demo(
    out: Annotated[Path, typer.Option(help="The directory to fill.")] = Path("build/demo"),
    epochs: Annotated[int | None, typer.Option(help="Train for less than the preset.", min=1)] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run the whole flow on bundled data.

    Trains a small supernet on digits, exports, evaluates, measures, picks for three budgets, and draws a picture.
    """
    with extra("train"):
        from hydradeploy.demo import demo as call
    with progress() as report:
        done = call(out, epochs=epochs, force=force, report=report, say=report.say)
    if as_json:
        print_json({"pick": str(done.pick_file), "picture": str(done.picture), "answers": done.answers})
    else:
        print(f"{done.pick_file}: the last answer, as pick --json gives it\n{done.picture}: accuracy against latency")


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
        bool,
        typer.Option("--show-config", help="Print every option of this run as TOML, or --json, and train nothing."),
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
    weights = None if sample_weights is None else given.counts(sample_weights)
    with extra("train"):
        from hydradeploy.training import config as configs
        from hydradeploy.training.presets import suited
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
    where = "options" if config is None else f"{config}, with the options"
    chosen, running = configs.resolved(configs.preset_named(name), where, written, options)
    teacher = teacher or configs.file(written, "teacher", where)
    init_from = init_from or configs.file(written, "init_from", where)
    if show_config:
        whole = (name, chosen, running, {"teacher": teacher, "init_from": init_from})
        if as_json:
            print_json(configs.tables(*whole))
        else:
            print(configs.shown(*whole), end="")
        return
    # Torch takes seconds, and nobody waits for it to hear of a wrong option.
    with extra("train"):
        from hydradeploy.training.train import train as call
    with progress() as report:
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
    if not trained.first:
        return
    top1 = {f"h{count:02d}": share for count, share in trained.top1.items()}
    if as_json:
        print_json({"out": str(out), "spec": trained.spec, "top1": top1, "seconds": trained.seconds})
    else:
        shares = ", ".join(f"{name} {show_percent(share)}" for name, share in top1.items())
        print(f"{out}: {_describe(trained.spec)}; top-1 on held-out images {shares}")


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
    names = None if class_names is None else given.lines(class_names)
    with extra("export"):
        from hydradeploy.supernet.importer import import_checkpoint
    imported = import_checkpoint(
        checkpoint,
        out,
        trained_heads=heads,
        head_dim=head_dim,
        crop_pct=crop_pct,
        interpolation=cast("Interpolation", interpolation),
        mean=None if mean is None else given.floats(mean),
        std=None if std is None else given.floats(std),
        class_names=names,
        force=force,
    )
    for warning in imported.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({"out": str(out), "entry": imported.entry, "spec": imported.spec, "warnings": imported.warnings})
    else:
        print(f"{out}: {_describe(imported.spec)}, from {imported.entry}")


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
        str | None,
        typer.Option(help="How static int8 finds its ranges: minmax, percentile or entropy. Default: minmax."),
    ] = None,
    calibration_images: Annotated[int | None, typer.Option(help="To find them with. Default: 64.", min=1)] = None,
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
    with extra("export"):
        from hydradeploy.exporter.export import export as call
        from hydradeploy.exporter.quantise import Quantising
    from hydradeploy.units import FRACTION, parse

    precisions = [name.strip() for name in precision.split(",")]
    quantising = Quantising(
        method=calibration or Quantising.method,
        images=calibration_images or Quantising.images,
        max_drop=None if max_drop is None else parse(max_drop, FRACTION),
    )
    if "int8" not in precisions and (calibration or calibration_images):
        raise UsageError("there is nothing to calibrate but in static int8", hint="--precision int8")
    with progress() as report:
        written = call(
            supernet,
            bundle,
            heads=wanted,
            precisions=precisions,
            batch=given.batch(batch),
            input=cast("Input", input),
            standalone=standalone,
            data=data,
            quantising=quantising,
            engine=engine,
            targets=given.names(target) or (),
            force=force,
            report=report,
            say=report.say,
        )
    manifest = written.manifest
    if as_json:
        print_json({"bundle": str(bundle), "samples": manifest.samples, "artifacts": manifest.artifacts})
        return
    rows = [
        (
            a.name,
            show_count(a.parameters),
            show_count(a.macs),
            show_bytes(a.size_bytes),
            f"{a.parity.max_difference:.1e}",
            f"{a.parity.cosine:.4f}",
            "" if a.parity.top1_agreement is None else show_percent(a.parity.top1_agreement),
        )
        for a in manifest.artifacts
    ]
    print_table(("artifact", "parameters", "MACs", "packed size", "logit difference", "cosine", "same top-1"), rows)
    total = sum(record.size_bytes for record in manifest.files.values())
    stored = sum(record.size_bytes for name, record in manifest.files.items() if name in manifest.weights)
    print(
        f"{bundle}: {show_bytes(total)}, {show_bytes(stored)} of it shared weights; "
        f"parity on {manifest.artifacts[0].parity.samples} samples ({manifest.samples})"
    )


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
    with extra("export"):
        from hydradeploy.exporter.pack import pack as call
    packed = call(bundle, artifact, out, force=force)
    if as_json:
        print_json({"out": str(out), "artifact": packed.artifact})
    else:
        print(f"{out}: {packed.artifact.name}, {show_bytes(packed.artifact.size_bytes)}")


def _describe(spec: Spec) -> str:
    g = spec.geometry
    return (
        f"{show_heads(g.trained_heads)} heads of {g.head_dim}, depth {g.depth}, {g.image_size}x{g.image_size} pixels "
        f"in patches of {g.patch_size}, {g.classes} classes, crop {spec.preprocessing.crop_pct}"
    )
