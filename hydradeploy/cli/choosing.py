"""Commands that choose from what was measured, and tell what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hydradeploy.cli import given
from hydradeploy.cli.options import BundlePath, Json, ProfilesPath
from hydradeploy.cli.output import print_json, print_table
from hydradeploy.errors import UsageError


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
    accept: Annotated[str | None, typer.Option(help="Flags to accept: throttled,contended,graph-failed.")] = None,
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
        budget=given.budget(latency or [], memory, energy, size, throughput, min_top1, confidence),
        prefer=cast("Any", prefer),
        accept=given.flags(accept),
        strict=strict,
        assume_larger_is_better=assume_larger,
        dataset=dataset,
        regime=regime,
    )
    if everywhere and (explain or profile is not None):
        other = "--explain" if explain else "--profile"
        raise UsageError(f"--all and {other} exclude each other", hint="--all has a row per profile")
    if everywhere:
        answers = pick_all(bundle, profiles, request)
        if as_json:
            print_json({"answers": answers})
        else:
            print_table(DEVICE_HEADER, [device_row(answer) for answer in answers])
    else:
        answers = (call(bundle, profiles, request, profile=profile),)
        if as_json:
            print_json(answers[0])
        else:
            print("\n".join(answer_lines(answers[0], explain=explain)))
    raise typer.Exit(exit_code(answers))


def compare(
    before: Annotated[Path, typer.Argument(help="A profile.")],
    after: Annotated[Path, typer.Argument(help="A later one of the same device under the same conditions.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="p95:+5%; also p50, mean, memory, energy, load. Several times for several. Default: p95:+5%"),
    ] = None,
    accept: Annotated[str | None, typer.Option(help="Flags to accept: throttled,contended,graph-failed.")] = None,
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
    comparison = call(before, after, rules, accept=given.flags(accept))
    if as_json:
        print_json(comparison)
    elif markdown:
        print(shown.markdown(comparison), end="")
    else:
        print_table(shown.HEADER, tuple(shown.rows(comparison)))
        print("\n".join(shown.lines(comparison)))
    raise typer.Exit(exit_code(comparison))
