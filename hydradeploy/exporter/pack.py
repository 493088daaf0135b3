"""Just what one device needs: a bundle of one artifact, its weights alone in their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hydradeploy.bundle import (
    GOLDEN,
    MANIFEST,
    Artifact,
    Bundle,
    Dialect,
    FileRecord,
    Golden,
    Manifest,
    StoredTensor,
    golden_bytes,
    holds_bundle,
    open_bundle,
    write_file,
)
from hydradeploy.errors import UsageError
from hydradeploy.exporter import graph as graphs
from hydradeploy.exporter import lower
from hydradeploy.exporter.jobs import job_of
from hydradeploy.exporter.weights import Array, layout, map_weights, write_weights
from hydradeploy.files import check_exchangeable, locked, sha256_bytes, staged
from hydradeploy.stored import stored

_UNKNOWN = FileRecord(sha256="0" * 64, size_bytes=0)


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    path: Path
    artifact: Artifact
    manifest: Manifest


@dataclass(frozen=True)
class _Plan:
    """Everything but the weights' bytes: small files, and where the tensors go."""

    files: Mapping[str, bytes]
    weights: str
    table: Mapping[str, StoredTensor]
    weights_bytes: int


def pack(bundle: Path, artifact: str, out: Path, *, force: bool = False) -> Packed:
    """Write a bundle of one artifact into the directory `out`.

    Raises UsageError for an unknown artifact, one of another version with a graph that this one would not write, and
    for an `out` in use (`force` replaces another bundle there), IntegrityError for a damaged bundle, EnvironmentFailed
    when the disk fails.
    """
    # A stamp would let bytes through that rotted on the disk since, and what is packed gets hashes of its own.
    opened = open_bundle(bundle, "always")
    chosen = opened.artifact(artifact)
    _check_same_graph(opened, chosen)
    check_replaceable(out, bundle, force=force)
    check_exchangeable(out)
    golden = opened.golden()
    plan = _plan(opened.manifest, chosen, golden)
    with locked(out, lambda _: None):
        check_replaceable(out, bundle, force=force)
        with staged(out) as stage:
            tensors = _tensors(opened, chosen)
            record = write_weights(stage / plan.weights, plan.table, ((name, tensors[name]) for name in plan.table))
            for name, data in plan.files.items():
                write_file(stage / name, data)
            manifest = _manifest(opened.manifest, chosen, plan, record)
            write_file(stage / MANIFEST, manifest.encode())
    return Packed(out, manifest.artifacts[0], manifest)


def _check_same_graph(bundle: Bundle, artifact: Artifact) -> None:
    """A pack has the graph written anew, and it is to be the one that was measured."""
    written = tuple(job_of(artifact).graphs(bundle.spec.geometry).values())
    if graphs.digest(written) != artifact.graph_sha256:
        version = bundle.manifest.tools.get("hydradeploy", "unknown")
        raise UsageError(
            f"{artifact.name} was written by another version of hydradeploy ({version}), with another graph",
            hint="pack it with that version, or export it again and measure it again",
        )


def packed_bytes(manifest: Manifest, artifact: Artifact, golden: Golden) -> int:
    """How many bytes `pack` would write for an artifact of this bundle."""
    plan = _plan(manifest, artifact, golden)
    others = plan.weights_bytes + sum(len(data) for data in plan.files.values())
    record = FileRecord(sha256=_UNKNOWN.sha256, size_bytes=plan.weights_bytes)
    size = others
    # The manifest holds the size it is part of; it settles once its number of digits does.
    while (total := others + len(_manifest(manifest, _sized(artifact, size), plan, record).encode())) != size:
        size = total
    return size


def check_replaceable(out: Path, source: Path | None, *, force: bool) -> None:
    """Raise UsageError unless `out` is free, empty, or with `force` another bundle."""
    if source is not None and out.resolve() == source.resolve():
        raise UsageError(f"{out} is the bundle itself", hint="pack into another directory")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not holds_bundle(out):
        raise UsageError(f"{out} exists and is no bundle; it is left as it is", hint="name another directory")
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out} holds the bundle that is packed", hint="pack into another directory")
    if not force:
        raise UsageError(f"{out} holds a bundle", hint="replace it with --force, or name another directory")


def _sized(artifact: Artifact, size_bytes: int) -> Artifact:
    return msgspec.structs.replace(artifact, size_bytes=size_bytes)


def _plan(manifest: Manifest, artifact: Artifact, golden: Golden) -> _Plan:
    job, geometry = job_of(artifact), manifest.spec.geometry
    table, weights_bytes = layout(stored(geometry.subnet(job.heads), job.form(geometry)))
    weights = f"{artifact.name}.weights"
    files: dict[str, bytes] = {
        artifact.graphs[dialect]: lower.shared(graph, table, weights, job.steps)
        for dialect, graph in job.graphs(geometry).items()
    }
    one = Golden(golden.images, {artifact.name: golden.logits[artifact.name]})
    files[GOLDEN] = golden_bytes(one)
    return _Plan(files, weights, table, weights_bytes)


def _manifest(manifest: Manifest, artifact: Artifact, plan: _Plan, weights: FileRecord) -> Manifest:
    small = {name: FileRecord(sha256=sha256_bytes(data), size_bytes=len(data)) for name, data in plan.files.items()}
    return msgspec.structs.replace(
        manifest,
        artifacts=(msgspec.structs.replace(artifact, weights=plan.weights),),
        weights={plan.weights: dict(plan.table)},
        files={plan.weights: weights, **small},
    )


def _tensors(bundle: Bundle, artifact: Artifact) -> Mapping[str, Array]:
    if artifact.weights is not None:
        return map_weights(bundle.path / artifact.weights, bundle.manifest.weights[artifact.weights])
    dialect: Dialect = next(iter(artifact.graphs))
    return lower.embedded_tensors(bundle.graph(artifact, dialect).read_bytes())
