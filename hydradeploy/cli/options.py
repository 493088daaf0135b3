"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


BundlePath = Annotated[Path, typer.Option("--bundle", help="The bundle's directory.")]


ProfilesPath = Annotated[Path, typer.Option("--profiles", help="The directory of device profiles.")]


Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


Verify = Annotated[str, typer.Option("--verify", metavar="stamp|always", help="Hash what is new, or everything.")]
