"""A graph becomes a plan, by TensorRT 8.6, 10.x, 11.x or TensorRT for RTX: one way for all, which asks the module what
it has.

The types of the graph are those of the engine. Networks are strongly typed wherever TensorRT has such; 8.x has none,
and is permitted what the graph's own tensors and layers call for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydradeploy.engines import cudart, nodes
from hydradeploy.engines.capabilities import Capabilities, capabilities
from hydradeploy.engines.logger import errors, logger, warnings
from hydradeploy.engines.progress import Progress, Teller, beating, monitor
from hydradeploy.errors import MissingError

Shape = tuple[int, ...]

_PARSER_ERRORS = 3  # more than that are told by their number


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    `shapes` are the smallest, the preferred and the largest shape of each input that is dynamic. `workspace_bytes` is
    the most scratch memory a kernel may take; TensorRT's own limit is all there is. `targets` are GPUs to build for
    ahead of time, for example sm86; none: the module's choice. `tf32` lets products of fp32 be computed in tf32.

    Plans without weights would be a field here, in `flags` too, with STRIP_PLAN and REFIT_IDENTICAL set in
    `_configured`; a session refits them when it opens.
    """

    graph: Path
    shapes: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    workspace_bytes: int = 1 << 30
    targets: tuple[str, ...] = ()
    tf32: bool = False


@dataclass(frozen=True)
class Built:
    """A plan, what was timed for it and before it, and what TensorRT warned of."""

    plan: bytes
    timing_cache: bytes
    warnings: tuple[str, ...]


def flags(spec: BuildSpec) -> Mapping[str, str]:
    """What of a spec decides the plan, apart from its graph."""
    shapes = {name: "/".join("x".join(map(str, shape)) for shape in three) for name, three in spec.shapes.items()}
    return {
        "shapes": ",".join(f"{name}:{three}" for name, three in sorted(shapes.items())),
        "workspace_bytes": str(spec.workspace_bytes),
        "targets": ",".join(sorted(spec.targets)),
        "tf32": "on" if spec.tf32 else "off",
    }


def build(trt: Any, spec: BuildSpec, *, timing_cache: bytes = b"", progress: Progress | None = None) -> Built:
    """Build the plan of a graph with a module `tensorrt` or `tensorrt_rtx`.

    `timing_cache` is that of an earlier build on this GPU, of any graph; one that is refused is replaced, with a
    warning. `progress(stage, fraction)` is called from other threads too, one at a time, and every two seconds at
    least; what it raises stops the build. Raises MissingError without a GPU (TensorRT for RTX needs none), for a node
    that is refused (named, with its operator and the file), and for what this TensorRT does not have.
    """
    can = capabilities(trt)
    if not can.ahead_of_time:
        # Before anything is constructed: without a GPU TensorRT can crash the process.
        reason = cudart.why_no_gpu()
        if reason is not None:
            raise MissingError(f"no engine of {spec.graph.name} can be built: {reason}")
    if spec.targets and not can.ahead_of_time:
        raise MissingError(f"this TensorRT builds for the GPU at hand only, not for {', '.join(spec.targets)}")
    teller = Teller(progress or (lambda stage, fraction: None))
    with beating(teller):
        return _built(trt, can, spec, timing_cache, teller)


def _built(trt: Any, can: Capabilities, spec: BuildSpec, timing_cache: bytes, teller: Teller) -> Built:
    log = logger(trt)
    errors(log), warnings(log)  # of an earlier build
    teller.tell("starting")
    builder = _builder(trt, log, spec)
    network = builder.create_network(_network_flags(trt, can))
    parser = trt.OnnxParser(network, log)  # kept until the plan is there: it owns the weights
    teller.tell("parsing")
    _parse(parser, spec.graph, log)
    config, remarks = _configured(trt, can, builder, network, spec, log)
    timings = None
    if not can.ahead_of_time:
        timings, refused = _timings(config, timing_cache)
        remarks += refused
    listening = monitor(trt, teller) if can.progress else None
    if listening is not None:
        config.progress_monitor = listening
    teller.tell("building")
    plan = builder.build_serialized_network(network, config)
    teller.check()  # a build that was stopped has no plan either
    if plan is None:
        raise MissingError(f"{spec.graph}: TensorRT cannot build it: {errors(log)}")
    timed = b"" if timings is None else bytes(memoryview(timings.serialize()))
    return Built(bytes(memoryview(plan)), timed, (*remarks, *warnings(log)))


def _builder(trt: Any, log: Any, spec: BuildSpec) -> Any:
    try:
        return trt.Builder(log)
    except TypeError as error:  # the binding's way to say that there is none
        raise MissingError(
            f"no engine of {spec.graph.name} can be built: TensorRT does not start: {errors(log)}"
        ) from error


def _network_flags(trt: Any, can: Capabilities) -> int:
    kinds, bits = trt.NetworkDefinitionCreationFlag, 0
    if can.explicit_batch:
        bits |= 1 << int(kinds.EXPLICIT_BATCH)
    if can.strongly_typed:
        bits |= 1 << int(kinds.STRONGLY_TYPED)
    return bits


def _parse(parser: Any, graph: Path, log: Any) -> None:
    # By its path: only so are weights found beside the graph.
    if parser.parse_from_file(str(graph)):
        return
    count = parser.num_errors
    told = [_parser_error(parser.get_error(at), graph) for at in range(min(count, _PARSER_ERRORS))]
    more = f"; and {count - len(told)} more" if count > len(told) else ""
    raise MissingError(f"{graph}: TensorRT refuses {'; '.join(told) or f'it: {errors(log)}'}{more}")


def _parser_error(error: Any, graph: Path) -> str:
    """The node and why. The reason alone can be as short as "false"."""
    said = " ".join(error.desc().split())
    if hasattr(error, "node_name") and hasattr(error, "node_operator"):
        named: tuple[str, str] | None = (error.node_name(), error.node_operator())
    else:
        named = nodes.node(graph, error.node())
    code = str(error.code()).rsplit(".", 1)[-1]
    if named is None or not any(named):
        return f"it: {said} ({code})"
    name, operator = named
    return f"node {name or error.node()} ({operator}): {said} ({code})"


def _configured(
    trt: Any, can: Capabilities, builder: Any, network: Any, spec: BuildSpec, log: Any
) -> tuple[Any, tuple[str, ...]]:
    """The configuration, and what is to be known of it."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    if not spec.tf32:
        # On by default, where fp32 would not be fp32.
        config.clear_flag(trt.BuilderFlag.TF32)
    permitted = _permitted(trt, can, network)
    for name in permitted:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if can.user_allocation:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if can.profile_sharing:
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if spec.targets:
        _aim(trt, config, spec.targets)
    _profile(builder, config, network, spec, log)
    if not permitted:
        return config, ()
    return config, (f"networks of this TensorRT are not strongly typed: any layer may run in {' or '.join(permitted)}",)


def _permitted(trt: Any, can: Capabilities, network: Any) -> tuple[str, ...]:
    """Builder flags that the graph's types call for. Those of its inputs do not tell: fp16 often has fp32 inputs."""
    if not can.type_flags and not can.quantised_flag:
        return ()
    found = {name for kind, name in can.type_flags.items() if getattr(trt.DataType, kind) in set(_types(network))}
    quantised = (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
    if can.quantised_flag and any(network.get_layer(at).type in quantised for at in range(network.num_layers)):
        found.add("INT8")
    return tuple(sorted(found))


def _types(network: Any) -> Iterator[Any]:
    for at in range(network.num_inputs):
        yield network.get_input(at).dtype
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        outputs = (layer.get_output(place) for place in range(layer.num_outputs))
        yield from (tensor.dtype for tensor in outputs if tensor is not None)


def _aim(trt: Any, config: Any, targets: tuple[str, ...]) -> None:
    members = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(targets)
    for at, name in enumerate(targets):
        member = members.get(name.upper())
        if member is None or not config.set_compute_capability(member, at):
            has = ", ".join(known.lower() for known in members if known.startswith("SM"))
            raise MissingError(f"TensorRT for RTX does not build for {name}, only for {has}")


def _profile(builder: Any, config: Any, network: Any, spec: BuildSpec, log: Any) -> None:
    """Bounds for each input that is dynamic; raises MissingError for one without, and for bounds of none."""
    inputs = [network.get_input(at) for at in range(network.num_inputs)]
    dynamic = {tensor.name: tuple(tensor.shape) for tensor in inputs if -1 in tuple(tensor.shape)}
    for name in spec.shapes:
        if name not in dynamic:
            raise MissingError(f"{spec.graph}: shapes are given for {name}, which is no dynamic input of it")
    for name, shape in dynamic.items():
        if name not in spec.shapes:
            raise MissingError(f"{spec.graph}: the input {name} of shape {shape} is dynamic and has no bounds")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    try:
        for name in dynamic:
            profile.set_shape(name, *spec.shapes[name])
        accepted = config.add_optimization_profile(profile) >= 0
    except (RuntimeError, TypeError, ValueError) as error:
        raise MissingError(f"{spec.graph}: TensorRT refuses the bounds {flags(spec)['shapes']}: {error}") from error
    if not accepted:
        raise MissingError(f"{spec.graph}: TensorRT refuses the bounds {flags(spec)['shapes']}: {errors(log)}")


def _timings(config: Any, data: bytes) -> tuple[Any, tuple[str, ...]]:
    """The timing cache to build with, which is an empty one where that of before is refused, and a remark then."""
    for given in dict.fromkeys((data, b"")):
        cache = config.create_timing_cache(given)
        # Kernels that were timed elsewhere are no guide here.
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache, () if given == data else ("the timing cache of before was refused, all is timed anew",)
    return None, ("TensorRT takes no timing cache: nothing that was timed is kept",)
