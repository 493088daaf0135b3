"""A run as a TOML file: every option of geometry, preprocessing, recipe and running; the preset has what is left out.

What the preset has and the run shall not have is "none".

preset = "hydravit-imagenet"
teacher = "deit_base.safetensors"

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
from typing import Any, get_args

import msgspec

from hydradeploy.errors import InputError, UsageError, environment
from hydradeploy.spec import Geometry, Preprocessing, Record
from hydradeploy.training.presets import PRESETS
from hydradeploy.training.recipe import Preset, Recipe
from hydradeploy.training.running import Running

_KINDS: Mapping[str, type[Record]] = {"geometry": Geometry, "preprocessing": Preprocessing, "recipe": Recipe}
_PARTS = tuple(_KINDS)
# Files that decide the result too.
FILES = ("teacher", "init_from")
_NONE = "none"


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
        return tomllib.loads(data.decode("utf-8-sig"))  # some editors put a byte order mark in front
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


def file(given: Mapping[str, Any], name: str, where: str) -> Path | None:
    """One of FILES, where it is given; raises UsageError for what is no text."""
    value = given.get(name)
    if not isinstance(value, str | None):
        raise UsageError(f"{where}: {name} must be a file's name in quotes, got {value!r}")
    return None if value in (None, _NONE) else Path(value)


def resolved(preset: Preset, where: str, *layers: Mapping[str, Any]) -> tuple[Preset, Running]:
    """What the preset with the layers on top says; `where` names their source in the UsageError for what is wrong.

    Where `heads` is not given, it is the largest of the trained head counts that are.
    """
    given = merged(*layers)
    for part in given:
        if part not in (*_PARTS, "running", "preset", *FILES):
            raise UsageError(f"{where}: no table `{part}`", hint=f"the tables are {', '.join((*_PARTS, 'running'))}")
    geometry = given.get("geometry")
    if isinstance(geometry, dict) and "heads" not in geometry:
        trained = geometry.get("trained_heads")
        if isinstance(trained, list | tuple) and trained and all(type(heads) is int for heads in trained):
            given["geometry"] = geometry | {"heads": max(trained)}
    all_ = merged(_plain(preset, Running()), given)
    try:
        return (
            msgspec.convert({part: _with_none(all_[part], kind) for part, kind in _KINDS.items()}, Preset),
            msgspec.convert(_with_none(all_["running"], Running), Running, strict=True),
        )
    except (msgspec.ValidationError, TypeError) as error:
        leave_out = f'"{_NONE}" leaves it out; ' if "| null" in str(error) else ""
        hint = f"{leave_out}hydradeploy train --show-config prints every option"
        raise UsageError(f"{where}: {error}", hint=hint) from error


def shown(name: str, preset: Preset, running: Running, files: Mapping[str, Path | None]) -> str:
    """The TOML text of a run that began as the preset of that name; `read` and `resolved` give the run again."""
    import tomli_w

    return tomli_w.dumps(tables(name, preset, running, files))


def tables(name: str, preset: Preset, running: Running, files: Mapping[str, Path | None]) -> dict[str, Any]:
    """What `shown` writes."""
    top = {"preset": name} | {what: str(path) for what, path in files.items() if path is not None}
    told = _told(_plain(preset, running), _plain(preset_named(name), Running()))
    return top | told


def _plain(preset: Preset, running: Running) -> dict[str, Any]:
    """The tables that say all of a run."""
    whole = {part: getattr(preset, part) for part in _PARTS} | {"running": running}
    found: dict[str, Any] = msgspec.to_builtins(whole)
    return found


def _told(values: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, Any]:
    """As TOML has it, which has no None: left out where it is None without being told too."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        other = without[name]
        if isinstance(value, dict):
            found[name] = _told(value, other)
        elif value is not None:
            found[name] = value
        elif other is not None:
            found[name] = _NONE
    return found


def _with_none(values: Any, kind: type[Record]) -> Any:
    """None for "none" in the fields that may be None."""
    if not isinstance(values, dict):
        return values
    found = dict(values)
    for field in msgspec.structs.fields(kind):
        value = found.get(field.name)
        if isinstance(value, dict) and isinstance(field.type, type) and issubclass(field.type, Record):
            found[field.name] = _with_none(value, field.type)
        elif value == _NONE and type(None) in get_args(field.type):
            found[field.name] = None
    return found


def without_none(value: Any) -> Any:
    """Tables without the fields that are None, and without those that then are empty, at any depth."""
    if isinstance(value, dict):
        inside = {name: without_none(inner) for name, inner in value.items()}
        return {name: inner for name, inner in inside.items() if inner is not None and inner != {}}
    return value
