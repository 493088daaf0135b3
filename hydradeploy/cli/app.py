"""The command line as typer builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from hydradeploy.cli.choosing import compare, pick
from hydradeploy.cli.device import doctor, run, verify
from hydradeploy.cli.making import demo, export, import_, pack, train
from hydradeploy.cli.measuring import evaluate, profile, there
from hydradeploy.errors import EXIT_CODES

# In the order in which they are used, which is that of --help.
COMMANDS: Mapping[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "import": import_,
    "export": export,
    "evaluate": evaluate,
    "doctor": doctor,
    "profile": profile,
    "compare": compare,
    "pick": pick,
    "pack": pack,
    "verify": verify,
    "run": run,
    "there": there,
}
# What this program calls on another machine, and nobody by hand.
HIDDEN = ("there",)

_CODES = "Exit codes:\n\n\b\n" + "\n".join(f"{code.value:>4}  {text}" for code, text in EXIT_CODES.items())


def app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with the commands of these names: typer takes 40 ms to build all of them."""
    built = typer.Typer(
        name="hydradeploy",
        help="Puts an elastic vision transformer (HydraViT) on a fleet of unlike devices.",
        epilog=_CODES,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        callback=_root,
    )
    for name in names:
        built.command(name, hidden=name in HIDDEN)(COMMANDS[name])
    return built


def app_for(arguments: list[str]) -> typer.Typer:
    """With the one command that the arguments ask for, or with all where they ask for none there is."""
    return app([name for name in arguments[:1] if name in COMMANDS] or COMMANDS)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hydradeploy {version('hydradeploy')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...
