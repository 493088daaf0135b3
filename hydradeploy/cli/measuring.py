"""Commands that measure: accuracy anywhere, latency and the rest on the device, at hand or over ssh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
import typer

from hydradeploy.cli import given
from hydradeploy.cli.options import Backends, BundlePath, ComputeTypes, Json, ProfilesPath
from hydradeploy.cli.output import print_json, print_table, say
from hydradeploy.cli.progress import progress
from hydradeploy.errors import UsageError
from hydradeploy.spec import parse_heads
from hydradeploy.units import show_number, show_percent

if TYPE_CHECKING:
    from hydradeploy.measurements import Cell, Stored
    from hydradeploy.profiler.plan import Plan
    from hydradeploy.remote.profile import Remote


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
    backend: Backends = None,
    compute_type: ComputeTypes = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of every artifact.

    Top-1 with a 95 % interval, kept in the bundle with what each artifact said of each image. Accuracy measured
    elsewhere is entered with --declared and marked as that.
    """
    if (data is None) == (declared is None):
        raise UsageError("give either --data or --declared", hint="hydradeploy evaluate --data digits")
    if declared is not None and (limit is not None or backend is not None or compute_type is not None):
        raise UsageError(
            "--declared takes what the table says; nothing is measured", hint="leave the other options out"
        )
    from hydradeploy.evaluator.evaluate import declare
    from hydradeploy.evaluator.evaluate import evaluate as call

    if declared is not None:
        found = declare(bundle, declared)
    else:
        with progress() as report:
            found = call(
                bundle,
                str(data),
                limit=limit,
                backends=given.names(backend),
                compute_types=given.names(compute_type),
                report=report,
                say=report.say,
            )
    if as_json:
        print_json({"bundle": str(bundle), "rows": found.rows, "left_out": found.left_out})
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
    print_table(("artifact", "top-1", "95% interval", "images", "data", "input", "by"), rows)


def profile(
    context: typer.Context,
    bundle: BundlePath = Path("bundle"),
    profiles: ProfilesPath = Path("profiles"),
    device: Annotated[
        str | None, typer.Option(metavar="jetson|cuda|cpu", help="Default: what this machine is.")
    ] = None,
    backend: Backends = None,
    compute_type: ComputeTypes = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE[,VALUE], for backends that have it: hint=throughput,latency. Several times."),
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Head counts: 3,6,9-12. Default: all in the bundle.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32,fp16. Default: all in the bundle.")] = None,
    threads: Annotated[
        str | None, typer.Option(help="Thread counts on the CPU: 1,2. Default: one per usable core.")
    ] = None,
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
        backends=given.names(backend),
        compute_types=given.names(compute_type),
        settings=given.settings(setting or ()),
        heads=None if heads is None else parse_heads(heads),
        precisions=given.names(precision),
        threads=None if threads is None else given.counts(threads),
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
    told = [option for option in _given(context, but=()) if option.startswith(_ONLY_THERE)]
    if told:
        names = " and ".join(option.partition("=")[0] for option in told)
        raise UsageError(
            f"{names} {'is' if len(told) == 1 else 'are'} about another device", hint="name it with --host"
        )
    if dry_run:
        _show_plan(plan_of(bundle, profiles, order), as_json)
        return
    with progress() as report:
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
        print_json({**found, "left_out": done.left_out, **more})
    else:
        _show_cells(done.cells)
        failed = sum(cell.error is not None for cell in done.cells)
        told = f"{show_number(len(done.cells) - failed, 'cell')} measured" + (f", {failed} failed" if failed else "")
        print(f"{done.stored.path}: {done.stored.profile.device.name}, {told}")
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


# What is about another device; the variable of the environment for --ssh is no word about this run.
_ONLY_THERE = ("--host-program=", "--bootstrap=", "--ssh=")


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

    with progress() as report:
        if dry_run:
            found = plan_of(remote, bundle, arguments, report=report, say=report.say)
        else:
            done = call(remote, bundle, profiles, arguments, resume=resume, report=report, say=report.say)
    if dry_run:
        _show_plan(msgspec.json.decode(found, type=Plan), as_json)
    else:
        _show_profiled(done, {"host": remote.host, "copied": done.copied}, strict, as_json)


def there() -> None:
    """What --host talks to."""
    from hydradeploy.remote.there import main as call

    raise typer.Exit(call())


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    from hydradeploy.profiler.plan import HEADER, rows, sentence

    print_table(HEADER, rows(plan))
    print("\n".join((*plan.left_out, sentence(plan))))


def _show_cells(cells: Sequence[Cell]) -> None:
    """Tables, then what is wrong with figures and why some are not there."""
    from hydradeploy.report.cells import missing_lines, remark_lines, tables

    for table in tables(cells):
        print(table.title)
        print_table(table.header, table.rows)
    for line in (*remark_lines(cells), *missing_lines(cells)):
        print(line)
    for cell in cells:
        if cell.error is not None:
            say(f"not measured: {cell.error}")
