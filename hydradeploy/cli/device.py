"""Commands of the device: what is wrong with it, whether a bundle is whole, and what is in an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hydradeploy.bundle import Check
from hydradeploy.cli import given
from hydradeploy.cli.options import BundlePath, Json, ProfilesPath
from hydradeploy.cli.output import print_json, print_table, say
from hydradeploy.errors import InputError, MissingError, UsageError
from hydradeploy.units import show_bytes, show_percent

if TYPE_CHECKING:
    from hydradeploy.runtime.verify import Verified
    from hydradeploy.selector.answer import Picked


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
        print_json(diagnosis)
    else:
        print("\n".join(lines(diagnosis)))
    raise typer.Exit(diagnosis.exit_code)


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

    verified = call(bundle, backends=given.names(backend))
    if as_json:
        print_json(verified)
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
                show_percent(o.top1_agreement),
            )
            for o in verified.outputs
        ]
        print_table(("artifact", "backend", "logit difference", "allowed", "cosine", "same top-1"), rows)
    print(f"{verified.bundle}: {verified.files} files, {show_bytes(verified.size_bytes)}, every hash agrees")
    for line in verified.outputs_skipped:
        print(f"outputs not checked: {line}")


def run(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    bundle: BundlePath = Path("bundle"),
    artifact: Annotated[str | None, typer.Option(help="For example h06-fp32. Default: the one of most heads.")] = None,
    latency: Annotated[
        list[str] | None, typer.Option(help="Use what pick gives for this budget: 20ms, 'p99<=20ms'.")
    ] = None,
    accept: Annotated[
        str | None, typer.Option(help="Flags that the pick accepts: throttled,contended,graph-failed.")
    ] = None,
    profiles: ProfilesPath = Path("profiles"),
    backend: Annotated[str | None, typer.Option(help="Default: the first that is usable.")] = None,
    top: Annotated[int, typer.Option(help="Classes to show per image.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Default: the backend's.", min=1)] = None,
    check: Annotated[
        str, typer.Option("--verify", metavar="stamp|always", help="Hash what is new, or everything.")
    ] = "stamp",
    as_json: Json = False,
) -> None:
    """Classify images with the named artifact, or with the one that --latency picks."""
    if check not in ("stamp", "always"):
        raise UsageError(f"--verify {check!r} is not possible", hint="stamp or always")
    compute_type: str | None = None
    settings: Mapping[str, str] = {}
    if latency:
        for option, value in {"--artifact": artifact, "--backend": backend, "--threads": threads}.items():
            if value is not None:
                raise UsageError(f"{option} and --latency exclude each other", hint="name how to run, or the budget")
        picked = _picked(bundle, profiles, latency, accept, as_json)
        artifact, backend, threads = picked.artifact, picked.backend, picked.threads
        compute_type, settings = picked.compute_type, picked.settings
    elif accept is not None:
        raise UsageError("--accept without --latency", hint="it is about what --latency picks from")
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
        say(f"no artifact named, using the one of most heads: {running.artifact.name}")
    predictions = []
    for prediction in running.predictions:
        predictions.append(prediction)
        if as_json:
            continue
        if prediction.error is not None:
            say(f"error: {prediction.error}")
            continue
        print(prediction.image)
        for guess in prediction.top:
            name = guess.name if guess.name is not None else f"class {guess.index}"
            print(f"  {show_percent(guess.probability):>6}  {name}")
    if as_json:
        how = {"artifact": running.artifact.name, "backend": running.backend, "compute_type": running.compute_type}
        print_json({**how, "images": predictions})
    failed = sum(prediction.error is not None for prediction in predictions)
    if failed:
        raise InputError(f"{failed} of {len(predictions)} images have no answer")


def _picked(bundle: Path, profiles: Path, latency: list[str], accept: str | None, as_json: bool) -> Picked:
    """What pick gives; where that is nothing its answer is the command's, and so is its exit code."""
    from hydradeploy.report.text import answer_lines
    from hydradeploy.selector.pick import Request, exit_code, pick

    answer = pick(bundle, profiles, Request(given.budget(latency), accept=given.flags(accept)))
    say("\n".join(answer_lines(answer)))
    if answer.pick is not None:
        return answer.pick
    if as_json:
        print_json(answer)
    raise typer.Exit(exit_code((answer,)))
