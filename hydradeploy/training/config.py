"""A run as a TOML file: every option of geometry, preprocessing, recipe and running; the preset has what is left out.

preset = "hydravit-imagenet"

[geometry]
trained_heads = [9, 10, 11, 12]

[recipe]
epochs = 100

[recipe.augment]
mixup = 0.2

[recipe.method]
anchors = "sandwich"

[running]
workers = 8
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hydradeploy.errors import InputError, UsageError, environment
from hydradeploy.training.presets import PRESETS
from hydradeploy.training.recipe import Preset
from hydradeploy.training.running import Running

_PARTS = ("geometry", "preprocessing", "recipe")


def preset_named(name: str) -> Preset:
    """The preset of that name; raises UsageError where there is none."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}", hint=f"one of {', '.join(PRESETS)}")
    return PRESETS[name]


def read(path: Path) -> dict[str, Any]:
    """The tables of a file; raises UsageError where it is not there, InputError where it is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="hydradeploy train --show-config prints one to begin with")
    with environment(f"reading {path}"):
        data = path.read_bytes()
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error})") from error


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Tables laid over each other, the later ones on top, down to the last field."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            before = result.get(name)
            result[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return result


def tables(preset: Preset, running: Running) -> dict[str, Any]:
    """The tables that say all of a run; fields that are None are left out, as TOML has no such value."""
    whole = {part: getattr(preset, part) for part in _PARTS} | {"running": running}
    found: dict[str, Any] = without_none(msgspec.to_builtins(whole))
    return found


def resolved(preset: Preset, where: str, *layers: Mapping[str, Any]) -> tuple[Preset, Running]:
    """What the preset with the layers on top says; `where` names their source in the UsageError for what is wrong.

    Where `heads` is not given, it is the largest of the trained head counts that are.
    """
    given = merged(*layers)
    for part in given:
        if part not in (*_PARTS, "running", "preset"):
            raise UsageError(f"{where}: no table `{part}`", hint=f"the tables are {', '.join((*_PARTS, 'running'))}")
    geometry = given.get("geometry")
    if isinstance(geometry, dict) and "heads" not in geometry and geometry.get("trained_heads"):
        given["geometry"] = geometry | {"heads": max(geometry["trained_heads"])}
    all_ = merged(tables(preset, Running()), given)
    try:
        return (
            msgspec.convert({part: all_[part] for part in _PARTS}, Preset),
            msgspec.convert(all_["running"], Running, strict=True),
        )
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(f"{where}: {error}", hint="hydradeploy train --show-config prints every option") from error


def shown(name: str, preset: Preset, running: Running) -> str:
    """The TOML text of a run that began as the preset of that name; `read` and `resolved` give the run again."""
    import tomli_w

    return tomli_w.dumps({"preset": name} | tables(preset, running))


def without_none(value: Any) -> Any:
    """Tables without the fields that are None, at any depth."""
    if isinstance(value, dict):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return value
