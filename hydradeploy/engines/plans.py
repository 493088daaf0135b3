"""The plan of an artifact for this machine: found in the cache, or built and kept there.

A plan of TensorRT is for one GPU, one version and one artifact; everything of that is in its key. One of TensorRT for
RTX is built ahead of time for several GPUs, on any machine: its key has the targets in place of a GPU.

A damaged plan is built again, with a warning; where nothing may be built it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from hydradeploy.bundle import Batch
from hydradeploy.engines import builder, cudart, module
from hydradeploy.engines.builder import BuildSpec, Built
from hydradeploy.engines.cache import Cache, EngineRecord, Key, roots
from hydradeploy.engines.module import RTX, RTX_BY_NAME_ALONE, TENSORRT
from hydradeploy.engines.progress import Progress
from hydradeploy.errors import ForeignError, IntegrityError, MissingError, UsageError
from hydradeploy.units import show_cuda_version

KINDS = (TENSORRT, RTX)

# The smallest number of images, the one to be fastest at and the largest, of graphs that take any.
_BATCHES = (1, 1, 32)

Build = Callable[[BuildSpec, bytes, Progress | None], Built]

_log = logging.getLogger(__name__)


class Subject(Protocol):
    """What a plan is of: a `Model`, or whatever else says as much."""

    @property
    def name(self) -> str: ...

    @property
    def graph(self) -> Path | None: ...

    @property
    def batch(self) -> Batch: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def sha256(self) -> str | None: ...

    @property
    def graph_sha256(self) -> str | None: ...


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built.

    `targets` are GPUs to build for ahead of time, for example sm86; none is TensorRT for RTX's own choice. `tf32` lets
    products of fp32 be computed in tf32. Where not `build`, plans are only looked for.
    """

    targets: tuple[str, ...] = ()
    tf32: bool = False
    build: bool = True


DEFAULTS = EngineOptions()


@dataclass(frozen=True)
class Workshop:
    """What builds engines here: the part of a key that is this machine's, and the builder.

    `capability` is that of the GPU at hand, also where plans are for no one GPU; None without one.
    """

    kind: str
    here: Mapping[str, str | int]
    build: Build
    capability: str | None = None


def in_tf32(compute_type: str) -> bool:
    """Whether engines of that type may compute in tf32: where it is asked for, and what narrower ones leave in fp32."""
    return compute_type != "fp32"


def why_no_build(kind: str) -> str | None:
    """None where engines of that kind can be built on this machine, else the sentence to show."""
    absent = module.why_not(kind)
    return absent if absent is not None or kind == RTX else cudart.why_no_gpu()


def check_can_build(kind: str, targets: Sequence[str] = ()) -> None:
    """Raise UsageError for a kind or targets that make no sense, MissingError where nothing can be built here."""
    if kind not in KINDS:
        raise UsageError(f"no engines of kind {kind!r}", hint=f"one of {', '.join(KINDS)}")
    if targets and kind != RTX:
        raise UsageError(
            f"engines of {kind} are for the GPU they are built on, not for {', '.join(targets)}",
            hint=f"--target is for --engine {RTX}",
        )
    reason = why_no_build(kind)
    if reason is not None:
        hint = f"engines of {kind} are built on the device they are for: hydradeploy profile --backend {kind}, there"
        raise MissingError(f"no engine of {kind} can be built here: {reason}", hint=None if kind == RTX else hint)
    if targets:
        _check_targets(targets)


def _check_targets(targets: Sequence[str]) -> None:
    known = module.module(RTX).ComputeCapability.__members__
    names = [name.lower() for name in known if name.startswith("SM")]
    for target in targets:
        if target not in names:
            raise UsageError(f"no target {target!r} of {RTX}", hint=f"it builds for {', '.join(names)}")


def workshop(kind: str) -> Workshop:
    """The one of this machine; raises MissingError where there is none."""
    reason = why_no_build(kind)
    if reason is not None:
        raise MissingError(f"{kind}: {reason}")
    trt = module.module(kind)
    here: dict[str, str | int] = {"version": module.version(kind)}
    gpu = None
    if cudart.why_no_gpu() is None:
        cuda = cudart.load()
        gpu = cuda.gpu()
        if kind == TENSORRT:
            runtime, driver = cuda.versions()
            here |= {
                "cuda_runtime": show_cuda_version(runtime) if runtime else "none",
                "cuda_driver": show_cuda_version(driver) if driver else "none",
                "gpu": gpu.name,
                "compute_capability": gpu.capability,
                "sm_count": gpu.sm_count,
            }

    def build(spec: BuildSpec, timings: bytes, progress: Progress | None) -> Built:
        return builder.build(trt, spec, timing_cache=timings, progress=progress)

    return Workshop(kind, here, build, None if gpu is None else gpu.capability)


def spec_of(model: Subject, options: EngineOptions) -> BuildSpec:
    """What is to be built; raises MissingError for a model without a graph."""
    if model.graph is None:
        raise MissingError(f"{model.name} has no graph to build an engine of")
    shapes = {}
    if model.batch == "dynamic":
        least, best, most = ((count, *model.image_shape) for count in _BATCHES)
        shapes["image"] = (least, best, most)
    return BuildSpec(
        graph=model.graph,
        shapes=shapes,
        targets=options.targets,
        tf32=options.tf32,
    )


def key_of(shop: Workshop, model: Subject, options: EngineOptions) -> Key:
    """The key of a model's plan on this machine."""
    if model.sha256 is None or model.graph_sha256 is None:
        raise MissingError(f"{model.name} is no artifact of a bundle; only their engines are kept")
    flags = builder.flags(spec_of(model, options))
    what = {"kind": shop.kind, "graph_sha256": model.graph_sha256, "sha256": model.sha256, "flags": flags}
    return msgspec.convert(what | dict(shop.here), Key)


def plan(
    kind: str,
    model: Subject,
    bundle: Path,
    options: EngineOptions = DEFAULTS,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] = _log.warning,
    shop: Workshop | None = None,
) -> bytes:
    """The plan of an artifact of the bundle for this machine, its hash verified: found, else built and kept.

    `progress(stage, fraction)` hears of a build, `say` of what was damaged and who is waited for. Processes that want
    the same plan build it once. Raises MissingError (nothing to build with, a graph that cannot be built; with the
    node's name), EnvironmentFailed (disk), and where nothing may be built ForeignError (engines of the artifact there
    are, but of another GPU, version or weights), MissingError (none) and IntegrityError (a damaged one).
    """
    shop = shop or workshop(kind)
    wanted, options = options, _aimed(options, shop)
    key = key_of(shop, model, options)
    places = [Cache(root) for root in roots(bundle)]
    warn: Callable[[str], None] | None = say if options.build else None
    found = _found(places, key, shop, wanted, warn)
    if found is not None:
        return found
    if not options.build:
        raise _absent(places, key, model)
    with places[0].lock(key, say):
        # Whoever was waited for has built it; of what is damaged was told.
        found = _found(places, key, shop, wanted, lambda text: None)
        if found is not None:
            return found
        say(f"building the engine of {model.name}")
        return _built(places[0], key, shop, model, options, progress, say)


def _aimed(options: EngineOptions, shop: Workshop) -> EngineOptions:
    """The options, aimed at the GPU at hand where it is one that TensorRT for RTX builds for by name alone."""
    here = shop.capability
    if shop.kind != RTX or options.targets or here is None or here not in RTX_BY_NAME_ALONE:
        return options
    return replace(options, targets=(_target(here),))


def _target(capability: str) -> str:
    """The name of a GPU's compute capability among targets: sm86 of 8.6."""
    return "sm" + capability.replace(".", "")


def _built(
    cache: Cache,
    key: Key,
    shop: Workshop,
    model: Subject,
    options: EngineOptions,
    progress: Progress | None,
    say: Callable[[str], None],
) -> bytes:
    spec = spec_of(model, options)
    if shop.kind == RTX:  # which has no timing cache, and nothing to time
        built = shop.build(spec, b"", progress)
        cache.store(key, built.plan, artifact=model.name, warnings=built.warnings)
        return built.plan
    with cache.timing(key, say) as timings:
        built = shop.build(spec, timings.data, progress)
        # First: a disk with no room for the timings has room for this yet.
        cache.store(key, built.plan, artifact=model.name, warnings=built.warnings)
        timings.data = built.timing_cache
    return built.plan


def _found(
    places: Sequence[Cache], key: Key, shop: Workshop, options: EngineOptions, warn: Callable[[str], None] | None
) -> bytes | None:
    """The first whole plan; `warn` is told of damaged ones, without it they are raised if there is no whole one."""
    damaged: list[IntegrityError] = []
    for cache in places:
        for wanted in (key, *_covering(cache, key, shop, options)):
            try:
                found = cache.find(wanted)
            except IntegrityError as refused:
                damaged.append(refused)
                continue
            if found is not None:
                return found
    for error in damaged:
        if warn is None:
            raise error
        warn(f"warning: {error.message}; it is built again")
    return None


def _covering(cache: Cache, key: Key, shop: Workshop, options: EngineOptions) -> list[Key]:
    """Keys that differ in their targets alone, among which the GPU at hand is: those ahead of time are for it too."""
    if shop.kind != RTX or options.targets or shop.capability is None:
        return []
    name = _target(shop.capability)
    others = (record.key for record in cache.records().values())
    return [
        other
        for other in others
        if name in other.flags.get("targets", "").split(",")
        and msgspec.structs.replace(other, flags=other.flags | {"targets": key.flags["targets"]}) == key
    ]


def _absent(places: Sequence[Cache], key: Key, model: Subject) -> ForeignError | MissingError:
    """What to say where there is no plan and none may be built: the nearest one and how it differs."""
    hint = f"build it on this machine: hydradeploy profile --backend {key.kind}"

    def near(record: EngineRecord) -> tuple[bool, int]:
        return record.key.sha256 != key.sha256, len(key.differences(record.key))

    records = [record for cache in places for record in cache.records().values()]
    alike = [r for r in records if r.key.kind == key.kind and (r.key.sha256 == key.sha256 or r.artifact == model.name)]
    if not alike:
        return MissingError(f"no engine of {model.name} in {places[0].root} or {places[1].root}", hint=hint)
    nearest = min(alike, key=near)
    told = "; ".join(key.differences(nearest.key))
    return ForeignError(f"no engine of {model.name} for this machine, only another one: {told}", hint=hint)
