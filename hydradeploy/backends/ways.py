"""Ways to run artifacts: on which backend, in which compute type, with which settings; and what none of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from hydradeploy.backends import (
    PRECISION_NAMES,
    Backend,
    Options,
    backend,
    check_options,
    check_setting,
    precisions_of,
    usable,
)
from hydradeploy.bundle import Artifact, Bundle
from hydradeploy.errors import MissingError, UsageError

# Asks for every backend that runs here.
ALL = "all"


@dataclass(frozen=True)
class Way:
    """An artifact and how it is run. `settings` are those that are not the backend's defaults."""

    artifact: Artifact
    runner: Backend
    compute_type: str
    settings: Mapping[str, str]

    def options(self, threads: int | None = None) -> Options:
        return Options(threads, self.compute_type, self.settings)


@dataclass(frozen=True)
class Ways:
    """What can be run, artifact by artifact, and a line for each reason why something cannot."""

    found: tuple[Way, ...]
    left_out: tuple[str, ...]


def named(names: Sequence[str] | None = None) -> tuple[Backend, ...]:
    """The backends of these names, every usable one for `all`; None is the first usable one.

    Raises UsageError for an unknown name, MissingError for one that is not usable here.
    """
    if names is not None and ALL in names:
        return usable() or (backend(),)
    return tuple(backend(name) for name in dict.fromkeys(names)) if names else (backend(),)


def why_not(bundle: Bundle, artifact: Artifact, runner: Backend) -> str | None:
    """None where the backend runs the artifact here, else the reason, the same for all artifacts like it."""
    try:
        check_options(runner, Options(), artifact.precision)
    except MissingError as error:
        return error.message
    if runner.dialect is not None:
        lacks = runner.dialect not in artifact.graphs
        return f"{runner.name} takes graphs in dialect {runner.dialect}, and there is none" if lacks else None
    if artifact.weights is None:
        return f"{runner.name} computes from a weights file, and {bundle.path} has none"
    return None


def ways(
    bundle: Bundle,
    artifacts: Sequence[Artifact],
    runners: Sequence[Backend],
    *,
    precisions: Sequence[str] | None = None,
    compute_types: Sequence[str] | None = None,
    settings: Mapping[str, Sequence[str]] | None = None,
) -> Ways:
    """Every artifact on every backend that runs it, in each of the compute types and with each of the settings.

    None is the default compute type and default settings. A setting is for the backends that have it, several values
    are tried each. Raises MissingError where nothing is left, or nothing of a precision or compute type in `precisions`
    or `compute_types`, which somebody asked for by name; UsageError for a setting or a value that is none.
    """
    asked = {runner.name: list(_settings(runner, settings or {})) for runner in runners}
    _check_names(runners, settings or {})
    found: list[Way] = []
    run: set[str] = set()
    reasons: dict[str, list[str]] = {}
    for artifact, runner in product(artifacts, runners):
        reason = why_not(bundle, artifact, runner)
        if reason is None:
            run.add(artifact.precision)
            types = runner.compute_types(artifact.precision)
            asked_for = types[:1] if compute_types is None else dict.fromkeys(compute_types)
            chosen = [name for name in asked_for if name in types]
            found += [Way(artifact, runner, name, each) for name, each in product(chosen, asked[runner.name])]
            reason = None if chosen else _not_in(runner, artifact, compute_types or ())
        if reason is not None:
            reasons.setdefault(reason, []).append(artifact.name)
    left_out = tuple(f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items())
    _check_all_there(precisions or (), run, "run", runners, precisions_of)
    _check_all_there(compute_types or (), {way.compute_type for way in found}, "compute in", runners, _compute_types)
    computed = {way.artifact.precision for way in found}
    verb = f"compute in {', '.join(compute_types or ())} the artifacts of"
    _check_all_there(precisions or (), computed, verb, runners, _compute_types)
    if not found:
        raise MissingError("; ".join(reasons) or "no artifact to run", hint=_what_there_is(runners, precisions_of))
    return Ways(tuple(found), left_out)


def _settings(runner: Backend, settings: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Each combination of what the backend has of them, without what is its default anyway."""
    known = {name: values for name, values in settings.items() if name in runner.settings}
    for name, values in known.items():
        for value in values:
            check_setting(runner, name, value)
    for values in product(*(dict.fromkeys(values) for values in known.values())):
        yield {name: value for name, value in zip(known, values, strict=True) if value != runner.settings[name][0]}


def _check_names(runners: Sequence[Backend], settings: Mapping[str, Sequence[str]]) -> None:
    for name in settings:
        if not any(name in runner.settings for runner in runners):
            names = " and ".join(runner.name for runner in runners)
            raise UsageError(
                f"no setting {name!r} of {names}", hint=_what_there_is(runners, lambda r: list(r.settings))
            )


def _check_all_there(
    asked: Sequence[str],
    there: set[str],
    verb: str,
    runners: Sequence[Backend],
    has: Callable[[Backend], Sequence[str]],
) -> None:
    absent = [name for name in asked if name not in there]
    if absent:
        names, they = " and ".join(runner.name for runner in runners), "does" if len(runners) == 1 else "do"
        raise MissingError(f"{names} {they} not {verb} {', '.join(absent)} here", hint=_what_there_is(runners, has))


def _what_there_is(runners: Sequence[Backend], has: Callable[[Backend], Sequence[str]]) -> str:
    return "; ".join(f"{runner.name} has {', '.join(has(runner)) or 'none'}" for runner in runners)


def _compute_types(runner: Backend) -> list[str]:
    return list(dict.fromkeys(kind for name in PRECISION_NAMES for kind in runner.compute_types(name)))


def _not_in(runner: Backend, artifact: Artifact, asked: Sequence[str]) -> str:
    return f"{runner.name} does not compute {artifact.precision} artifacts in {', '.join(asked)} here"
