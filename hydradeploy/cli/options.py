"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
BundlePath = Annotated[Path, typer.Option("--bundle", help="The bundle's directory.")]
ProfilesPath = Annotated[Path, typer.Option("--profiles", help="The directory of device profiles.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Backends = Annotated[
    str | None,
    typer.Option("--backend", help="One, several with commas, or all. Default: the first that is usable."),
]
ComputeTypes = Annotated[
    str | None,
    typer.Option("--compute-type", help="What to compute in: fp32,bf16. Default: what suits each artifact."),
]
