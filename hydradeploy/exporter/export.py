"""`export`: a supernet file becomes a bundle, or more artifacts of one."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from hydradeploy.backends import Backend, backend, prepared
from hydradeploy.bundle import (
    GOLDEN,
    MANIFEST,
    SCHEMA,
    STAMP,
    Artifact,
    Batch,
    Bundle,
    Dialect,
    FileRecord,
    Golden,
    Manifest,
    Parity,
    StoredTensor,
    golden_bytes,
    holds_bundle,
    open_bundle,
    read_manifest,
    write_file,
)
from hydradeploy.data import samples
from hydradeploy.engines import cache as engines
from hydradeploy.engines.building import build_missing
from hydradeploy.engines.cache import ENGINES
from hydradeploy.engines.plans import EngineOptions, check_can_build
from hydradeploy.errors import IntegrityError, MissingError, UsageError, environment
from hydradeploy.exporter import graph as graphs
from hydradeploy.exporter import lower, parity
from hydradeploy.exporter.jobs import Job, job_of
from hydradeploy.exporter.pack import packed_bytes
from hydradeploy.exporter.precision import PRECISIONS, precision
from hydradeploy.exporter.quantise import Quantising, quantised
from hydradeploy.exporter.source import source_of
from hydradeploy.exporter.weights import Array, HeadDigests, block, layout, united, write_weights
from hydradeploy.exporter.widened import widened
from hydradeploy.files import check_exchangeable, link_or_copy, locked, sha256_file, staged
from hydradeploy.spec import Geometry
from hydradeploy.stored import Form, Input, Tensor, stored
from hydradeploy.supernet.store import Weights, load

SAMPLES = 8
# Runtimes count images in 32 bits.
_LARGEST_BATCH = 2**31 - 1

Report = Callable[[str, int, int], None]


def export(
    supernet: Path,
    bundle: Path,
    *,
    heads: Sequence[int] | None = None,
    precisions: Sequence[str] = ("fp32",),
    batch: Batch = 1,
    input: Input = "float32",
    standalone: bool = False,
    data: str | Path | None = None,
    quantising: Quantising | None = None,
    engine: str | None = None,
    targets: Sequence[str] = (),
    force: bool = False,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Bundle:
    """Write artifacts of `supernet` into the directory `bundle`, all trained head counts by default.

    Artifacts already there stay, or are replaced if they have the same name. `input` uint8 takes pixels (b, s, s,
    channels), with the normalisation in the weights. `data` are the images that graphs are compared on and int8 is
    calibrated with. `engine` is tensorrt or tensorrt-rtx: engines of the artifacts are built too, for the GPU at hand
    or ahead of time for `targets` (sm86). `report(what, done, total)` hears of progress. Raises UsageError (no such
    file, head count, precision, target; int8 without data; the bundle is of another supernet and not `force`),
    InputError (weights or images refused), ParityError (the graphs do not compute what the supernet computes, or int8
    costs more accuracy than it may; nothing is written), MissingError (no onnxruntime to run them, nothing to build
    engines with; an engine that cannot be built, when the bundle is written), EnvironmentFailed (disk). Whatever
    happens, what was in `bundle` is whole.
    """
    if engine is not None:
        check_can_build(engine, targets)
    kinds = [precision(name) for name in precisions]
    if batch != "dynamic" and not 1 <= batch <= _LARGEST_BATCH:
        raise UsageError(f"batch {batch} is not possible", hint=f"--batch takes 1 to {_LARGEST_BATCH}, or dynamic")
    check_exchangeable(bundle)
    runner = backend("onnxruntime")
    report("reading the supernet", 0, 1)
    weights, supernet_sha256 = _read(supernet)
    geometry = weights.spec.geometry
    chosen = geometry.trained_heads if heads is None else tuple(heads)
    jobs = [Job(geometry.subnet(k).heads, kind, batch, standalone, input) for kind in kinds for k in chosen]
    if not jobs:
        raise UsageError("nothing to export: no head count or no precision given")
    given = samples.read(data, weights.spec, SAMPLES) if data is not None else None
    with locked(bundle, lambda message: report(message, 0, 0)):
        there = _existing(bundle, supernet_sha256, force=force)
        jobs = quantised(weights, jobs, data, quantising or Quantising(), runner, report)
        used = given or _samples_of(there) or samples.synthetic(weights.spec, SAMPLES)
        run = _Export(weights, _merged(there, jobs), used, there, runner, report)
        with staged(bundle) as stage:
            manifest = run.write(stage, supernet_sha256)
            _carry_over(bundle, stage, manifest)
    written = Bundle(bundle, manifest)
    if engine is not None:
        _build_engines(written, {job.name for job in jobs}, engine, EngineOptions(targets=tuple(targets)), report, say)
    return written


def _read(supernet: Path) -> tuple[Weights, str]:
    """The weights of a supernet file and its hash; read again where training has replaced it in between."""
    while True:
        before = _version(supernet)
        weights = load(supernet)
        with environment(f"reading {supernet}"):
            digest = sha256_file(supernet)
        if _version(supernet) == before:
            return weights, digest


def _version(path: Path) -> tuple[int, int, int] | None:
    """What differs where a file is another than it was; None for none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _build_engines(
    bundle: Bundle,
    names: Collection[str],
    kind: str,
    options: EngineOptions,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Engines of the artifacts of those names; raises MissingError that tells of each that could not be built."""
    artifacts = [artifact for artifact in bundle.manifest.artifacts if artifact.name in names]
    wanted = [(artifact, artifact.precision) for artifact in artifacts]
    found = build_missing(kind, bundle, wanted, options, report=report, say=say)
    if found.left_out:
        say(f"no engine of {', '.join(found.left_out)}: there is no graph for TensorRT in this precision")
    if found.failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.failed.items())
        raise MissingError(
            f"{len(found.failed)} of {len(artifacts)} engines could not be built, the bundle is: {reasons}"
        )
    say(f"engines of {kind}: {len(found.ready)} ready")


class _Export:
    """One run over all jobs: weights, graphs, gate, manifest."""

    def __init__(
        self,
        weights: Weights,
        jobs: Sequence[Job],
        used: samples.Samples,
        there: Bundle | None,
        runner: Backend,
        report: Report,
    ) -> None:
        self._weights, self._jobs, self._samples, self._there = weights, jobs, used, there
        self._runner, self._report = runner, report
        self._geometry: Geometry = weights.spec.geometry
        self._files: dict[str, FileRecord] = {}
        self._tables: dict[str, dict[str, StoredTensor]] = {}
        self._content: dict[str, str] = {}
        self._graphs = {job.name: job.graphs(self._geometry) for job in jobs}
        self._digests = {name: graphs.digest(tuple(found.values())) for name, found in self._graphs.items()}
        self._source = source_of(weights)

    def write(self, stage: Path, supernet_sha256: str) -> Manifest:
        """Fill the staged directory and return its manifest."""
        self._report("writing weights and graphs", 0, len(self._jobs))
        for file in dict.fromkeys(job.weights_file for job in self._jobs):
            self._write_weights(stage, file, [job for job in self._jobs if job.weights_file == file])
        for done, job in enumerate(self._jobs, 1):
            self._write_graphs(stage, job)
            self._report("writing weights and graphs", done, len(self._jobs))
        checked = dict(self._gate(stage))
        golden = Golden(self._samples.images, {name: logits for name, (_, logits) in checked.items()})
        self._files[GOLDEN] = write_file(stage / GOLDEN, golden_bytes(golden))
        artifacts = [self._artifact(job, checked[job.name][0]) for job in self._jobs]
        manifest = Manifest(
            schema=SCHEMA,
            spec=self._weights.spec,
            supernet_sha256=supernet_sha256,
            samples=self._samples.source,
            artifacts=tuple(artifacts),
            weights=self._tables,
            files=self._files,
            tools=_tools(self._runner),
        )
        sized = tuple(
            msgspec.structs.replace(artifact, size_bytes=packed_bytes(manifest, artifact, golden))
            for artifact in artifacts
        )
        manifest = msgspec.structs.replace(manifest, artifacts=sized)
        write_file(stage / MANIFEST, manifest.encode())
        return msgspec.structs.replace(manifest, sha256=manifest.digest())

    def _write_weights(self, stage: Path, file: str, jobs: Sequence[Job]) -> None:
        """One pass over the weights of a file: convert, hash what each head adds, write what is shared."""
        most: dict[Form, int] = {}
        for job in jobs:
            form = job.form(self._geometry)
            most[form] = max(most.get(form, 0), job.heads)
        digests = {form: HeadDigests(self._geometry, heads, form) for form, heads in most.items()}
        everything = self._union(jobs)

        def tensors() -> Iterator[tuple[str, Array]]:
            for name, tensor in self._source.tensors({name: t.dtype for name, t in everything.items()}):
                for digest in digests.values():
                    digest.update(name, tensor)
                yield name, tensor

        read = self._union([job for job in jobs if not job.standalone])
        shared = {name: read[name] for name in everything if name in read}
        if shared:
            self._tables[file], _ = layout(shared)
            written = ((name, tensor) for name, tensor in tensors() if name in shared)
            self._files[file] = write_weights(stage / file, self._tables[file], written)
        else:
            for _ in tensors():
                pass
        preprocessing = msgspec.json.encode(self._weights.spec.preprocessing)
        for job in jobs:
            context = (self._digests[job.name].encode(), preprocessing, msgspec.json.encode(job.steps))
            self._content[job.name] = digests[job.form(self._geometry)].content(job.heads, *context)

    def _union(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """The tensors that any of the jobs reads, as large as the largest subnet's; of the smaller ones only a
        classifier of their own comes to that. Those of each form are in its own order, whatever others there are: the
        hash of an artifact's content goes by it."""
        heads = sorted({job.heads for job in jobs}, reverse=True)
        found: dict[str, Tensor] = {}
        for form in dict.fromkeys(job.form(self._geometry) for job in jobs):
            for subnet in map(self._geometry.subnet, heads):
                found = united(found, stored(subnet, form))
        return found

    def _write_graphs(self, stage: Path, job: Job) -> None:
        blocks = self._blocks(job) if job.standalone else {}
        for dialect, graph in self._graphs[job.name].items():
            name = job.graph_file(dialect)
            self._files[name] = write_file(stage / name, self._lowered(job, graph, blocks))

    def _blocks(self, job: Job) -> Mapping[str, Array]:
        wanted = stored(self._geometry.subnet(job.heads), job.form(self._geometry))
        found = self._source.tensors({name: tensor.dtype for name, tensor in wanted.items()})
        return {name: block(tensor, wanted[name].shape) for name, tensor in found}

    def _lowered(self, job: Job, graph: graphs.Graph, blocks: Mapping[str, Array]) -> bytes:
        if job.standalone:
            return lower.embedded(graph, blocks, job.steps)
        return lower.shared(graph, self._tables[job.weights_file], job.weights_file, job.steps)

    def _gate(self, stage: Path) -> Iterator[tuple[str, tuple[Parity, parity.Logits]]]:
        """Parity of every artifact; the record stays where neither its files nor the samples changed."""
        preprocessing = self._weights.spec.preprocessing
        shown = parity.Shown(self._samples.images, preprocessing, not samples.is_synthetic(self._samples.source))
        images = prepared(self._samples.images, "float32", preprocessing)
        kept = self._unchanged()
        references: dict[int, parity.Logits] = {}
        for done, job in enumerate(self._jobs):
            self._report("checking parity", done, len(self._jobs))
            if job.name in kept:
                yield job.name, kept[job.name]
                continue
            subnet = self._geometry.subnet(job.heads)
            if job.heads not in references:
                references[job.heads] = parity.reference(self._weights, subnet, np.asarray(images, np.float32))
            with self._runnable(stage, job) as paths:
                yield (
                    job.name,
                    parity.gate(
                        job.name,
                        references[job.heads],
                        paths,
                        subnet,
                        job.precision,
                        job.input,
                        job.batch,
                        shown,
                        self._runner,
                    ),
                )
        self._report("checking parity", len(self._jobs), len(self._jobs))

    @contextmanager
    def _runnable(self, stage: Path, job: Job) -> Iterator[dict[Dialect, Path]]:
        """The graph files of a job; of a graph in bfloat16, one that emulates it."""
        paths = {dialect: stage / job.graph_file(dialect) for dialect in job.precision.dialects}
        emulated = []
        for dialect, graph in self._graphs[job.name].items():
            if graph.dtype == "bfloat16":
                blocks = self._blocks(job) if job.standalone else {}
                paths[dialect] = stage / f"{job.name}.emulated.onnx"
                paths[dialect].write_bytes(self._lowered(job, widened(graph), blocks))
                emulated.append(paths[dialect])
        try:
            yield paths
        finally:
            for path in emulated:
                path.unlink()

    def _unchanged(self) -> dict[str, tuple[Parity, parity.Logits]]:
        if self._there is None:
            return {}
        golden = self._there.golden()
        if not np.array_equal(golden.images, self._samples.images):
            return {}
        before = self._there.manifest.files
        same = {}
        for artifact in self._there.manifest.artifacts:
            used = [*artifact.graphs.values(), *([artifact.weights] if artifact.weights else [])]
            if all(before[name] == self._files.get(name) for name in used):
                same[artifact.name] = artifact.parity, golden.logits[artifact.name]
        return same

    def _artifact(self, job: Job, checked: Parity) -> Artifact:
        subnet = self._geometry.subnet(job.heads)
        return Artifact(
            name=job.name,
            heads=job.heads,
            precision=job.precision.name,
            dtype=job.precision.dtype,
            input=job.input,
            quantisation=job.quantisation,
            batch=job.batch,
            graphs={dialect: job.graph_file(dialect) for dialect in job.precision.dialects},
            weights=None if job.standalone else job.weights_file,
            sha256=self._content[job.name],
            graph_sha256=self._digests[job.name],
            parameters=subnet.parameters,
            macs=subnet.macs,
            size_bytes=0,
            parity=checked,
        )


def _existing(path: Path, supernet_sha256: str, *, force: bool) -> Bundle | None:
    """The bundle to add to, None where there is none or where `force` starts afresh."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not holds_bundle(path):
        raise UsageError(f"{path} exists and is no bundle; it is left as it is", hint="name another with --bundle")
    try:
        there = open_bundle(path, "always")  # its golden samples are kept
    except IntegrityError as error:
        if force:
            return None
        raise IntegrityError(error.message, hint="export --force replaces the damaged bundle") from error
    if there.manifest.supernet_sha256 == supernet_sha256:
        return there
    if force:
        return None
    raise UsageError(
        f"{path} holds artifacts of another supernet "
        f"({there.manifest.supernet_sha256[:12]}, not {supernet_sha256[:12]})",
        hint="replace them with --force, or name another bundle with --bundle",
    )


def _merged(there: Bundle | None, new: Iterable[Job]) -> list[Job]:
    """The jobs that make the bundle: what is there, and what is new in its place or beside it; in a fixed order."""
    artifacts = there.manifest.artifacts if there is not None else ()
    jobs = {artifact.name: job_of(artifact) for artifact in artifacts} | {job.name: job for job in new}
    order = list(PRECISIONS)
    return sorted(jobs.values(), key=lambda job: (order.index(job.precision.name), job.input, job.heads))


def _samples_of(there: Bundle | None) -> samples.Samples | None:
    return samples.Samples(there.golden().images, there.manifest.samples) if there is not None else None


def _carry_over(bundle: Path, stage: Path, manifest: Manifest) -> None:
    """Take along what others keep in the bundle: accuracy, engines of what is still in it, notes. What export writes is
    written anew."""
    if not bundle.is_dir():
        return
    ours = _own_files(bundle)
    for entry in bundle.iterdir():
        target = stage / entry.name
        if entry.name in ours or target.exists():
            continue
        if entry.is_symlink() or entry.is_file():
            shutil.copy2(entry, target, follow_symlinks=False)
        elif entry.name == ENGINES:
            engines.carry_over(entry, target, {artifact.sha256 for artifact in manifest.artifacts})
        elif entry.is_dir():
            shutil.copytree(entry, target, symlinks=True, copy_function=link_or_copy)


def _own_files(bundle: Path) -> set[str]:
    """The names export wrote: from the manifest, or by their endings where a damaged one is being replaced."""
    try:
        written = set(read_manifest(bundle).files)
    except IntegrityError:
        written = {entry.name for entry in bundle.iterdir() if entry.suffix in (".onnx", ".weights")}
    return written | {MANIFEST, GOLDEN, STAMP}


def _tools(runner: Backend) -> dict[str, str]:
    names = ("hydradeploy", "numpy", "onnx", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    # The module's: ONNX Runtime's distribution for GPUs has another name.
    return {"python": platform.python_version(), **versions, **runner.software()}
