"""A TensorRT of any version that has the names which that version's bindings have, and fails on every other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_DATA = json.loads(Path(__file__).with_name("surfaces.json").read_text())
RTX = "rtx"
VERSIONS = (*_DATA["versions"], RTX)


@cache
def surface(version: str) -> Mapping[str, frozenset[str]]:
    """The names of each class of that version; `module` are the module's own."""
    found: dict[str, set[str]] = {}
    for row in _DATA["rows"]:
        if version == RTX:
            has = row["rtx"]
        else:
            order = _DATA["versions"].index
            has = row["since"] is not None and order(row["since"]) <= order(version) <= order(row["until"])
        for kind, names in row["names"].items() if has else ():
            found.setdefault(kind, set()).update(names)
    return {kind: frozenset(names) for kind, names in found.items()}


def known(kind: str) -> frozenset[str]:
    """The names of a class in any version."""
    return frozenset(name for version in VERSIONS for name in surface(version).get(kind, ()))


@dataclass(frozen=True)
class Member:
    """Of an enumeration. Values are told apart by their owner too, as pybind's are."""

    owner: str
    name: str
    value: int

    def __int__(self) -> int:
        return self.value

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


class Enumeration:
    def __init__(self, version: str, kind: str) -> None:
        names = surface(version).get(kind, frozenset())
        self.__members__ = {name: Member(kind, name, at) for at, name in enumerate(sorted(names))}

    def __getattr__(self, name: str) -> Member:
        try:
            return self.__members__[name]
        except KeyError:
            raise AttributeError(name) from None


class Names:
    """A class of which only its names are asked."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __getattr__(self, name: str) -> str:
        if name in self.names:
            return name
        raise AttributeError(name)


class Strict:
    """An object that has what its class has in that version; its values and methods are in `has`."""

    def __init__(self, version: str, kind: str, **has: Any) -> None:
        self.__dict__.update({"_names": surface(version)[kind], "_has": has, "_kind": kind})
        unknown = set(has) - known(kind)
        assert not unknown, f"no version of {kind} has {unknown}"

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"this version's {self._kind} has no {name}")
        return self._has[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            object.__setattr__(self, name, value)
        elif name not in self._names:
            raise AttributeError(f"this version's {self._kind} has no {name}")
        else:
            self._has[name] = value


@dataclass
class Layer:
    kind: str = "MATRIX_MULTIPLY"
    types: tuple[str, ...] = ("FLOAT",)


@dataclass
class Refusal:
    """What the parser says of a node."""

    node: int
    name: str
    operator: str
    desc: str = "false"
    code: str = "ErrorCode.UNSUPPORTED_NODE"


@dataclass
class Graph:
    inputs: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=lambda: {"image": ((1, 8), "FLOAT")})
    layers: tuple[Layer, ...] = (Layer(),)
    refusals: tuple[Refusal, ...] = ()


@dataclass
class Seen:
    """What a build asked for."""

    built: int = 0
    network_flags: int | None = None
    flags: set[str] = field(default_factory=set)
    cleared: set[str] = field(default_factory=set)
    pools: dict[str, int] = field(default_factory=dict)
    profile: dict[str, tuple] = field(default_factory=dict)
    caches: list[bytes] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    previews: set[str] = field(default_factory=set)
    values: dict[str, Any] = field(default_factory=dict)


class FakeModule:
    """The module. `refuses` names what it does not do: builder, plan, profile, cache, caches."""

    def __init__(self, version: str, graph: Graph | None = None, refuses: str = "", events: bool = True) -> None:
        self.version, self.graph, self.refuses, self.events = version, graph or Graph(), refuses, events
        self.seen = Seen()
        names = surface(version)
        for kind in (
            "BuilderFlag",
            "DataType",
            "LayerType",
            "MemoryPoolType",
            "NetworkDefinitionCreationFlag",
            "PreviewFeature",
        ):
            setattr(self, kind, Enumeration(version, kind))
        for kind in ("IBuilderConfig", "OnnxParser"):
            setattr(self, kind, Names(names[kind]))
        self.ILogger = type("ILogger", (), {})
        self.OnnxParser = self._parser
        self.Builder = self._builder
        if "ComputeCapability" in names["module"]:
            self.ComputeCapability = Enumeration(version, "ComputeCapability")
        if "IProgressMonitor" in names["module"]:
            self.IProgressMonitor = type("IProgressMonitor", (), {})

    def said(self, text: str, severity: str = "ERROR") -> None:
        self.log.log(f"Severity.{severity}", text)

    def _builder(self, log: Any) -> Strict:
        self.log = log
        if self.refuses == "builder":
            self.said("CUDA initialization failure\n with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Strict(
            self.version,
            "Builder",
            create_network=self._network,
            create_builder_config=self._config,
            create_optimization_profile=lambda: Strict(self.version, "IOptimizationProfile", set_shape=self._shape),
            build_serialized_network=self._build,
        )

    def _network(self, flags: int) -> Strict:
        self.seen.network_flags = flags
        tensors = [
            Strict(self.version, "ITensor", name=name, shape=shape, dtype=getattr(self.DataType, kind))
            for name, (shape, kind) in self.graph.inputs.items()
        ]
        layers = [self._layer(layer) for layer in self.graph.layers]
        return Strict(
            self.version,
            "INetworkDefinition",
            num_inputs=len(tensors),
            get_input=tensors.__getitem__,
            num_layers=len(layers),
            get_layer=layers.__getitem__,
        )

    def _layer(self, layer: Layer) -> Strict:
        kinds = [getattr(self.DataType, kind) for kind in layer.types]
        outputs = [Strict(self.version, "ITensor", name="", shape=(1,), dtype=kind) for kind in kinds]
        return Strict(
            self.version,
            "ILayer",
            type=getattr(self.LayerType, layer.kind),
            # An output that is not used is None.
            num_outputs=len(outputs) + 1,
            get_output=[*outputs, None].__getitem__,
        )

    def _parser(self, network: Strict, log: Any) -> Strict:
        assert log is self.log
        return Strict(
            self.version,
            "OnnxParser",
            parse_from_file=lambda path: not self.graph.refusals,
            num_errors=len(self.graph.refusals),
            get_error=lambda at: self._error(self.graph.refusals[at]),
        )

    def _error(self, refusal: Refusal) -> Strict:
        return Strict(
            self.version,
            "ParserError",
            code=lambda: refusal.code,
            desc=lambda: refusal.desc,
            node=lambda: refusal.node,
            node_name=lambda: refusal.name,
            node_operator=lambda: refusal.operator,
        )

    def _shape(self, name: str, *three: tuple[int, ...]) -> None:
        if self.refuses == "shape":
            raise ValueError("Shape provided is invalid")
        self.seen.profile[name] = three

    def _config(self) -> Strict:
        seen = self.seen

        def aim(member: Member, at: int) -> bool:
            seen.targets.append(member.name)
            return True

        def limit(pool: Member, size: int) -> None:
            seen.pools[pool.name] = size

        def preview(feature: Member, on: bool) -> None:
            assert on
            seen.previews.add(feature.name)

        self.config = Strict(
            self.version,
            "IBuilderConfig",
            set_flag=lambda flag: seen.flags.add(flag.name),
            clear_flag=lambda flag: seen.cleared.add(flag.name),
            set_preview_feature=preview,
            set_memory_pool_limit=limit,
            add_optimization_profile=lambda profile: -1 if self.refuses == "profile" else 0,
            create_timing_cache=self._cache,
            set_timing_cache=self._takes,
            set_compute_capability=aim,
        )
        return self.config

    def _cache(self, data: bytes) -> Strict | None:
        assert self.version != RTX, "deprecated there"
        self.seen.caches.append(data)
        if self.refuses == "garbage" and data:
            return None
        return Strict(self.version, "ITimingCache", serialize=lambda: data + b"+", combine=data)

    def _takes(self, cache: Strict, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return not (self.refuses == "caches" or (self.refuses == "cache" and cache.combine))

    def _build(self, network: Strict, config: Strict) -> bytes | None:
        self.seen.built += 1
        assert self.seen.pools == {"WORKSPACE": self.seen.pools["WORKSPACE"]}, "a limit is always set"
        self.said("a kernel\n is slow", "WARNING")
        self.said("a kernel\n is slow", "WARNING")
        self.said("hello", "INFO")
        monitor = config._has.get("progress_monitor")
        if monitor is not None and self.events:
            monitor.phase_start("Building engine", None, 2)
            monitor.phase_start("Tactics", "Building engine", 4)
            for step in range(4):
                if not monitor.step_complete("Tactics", step):
                    return None
            monitor.phase_finish("Tactics")
            monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
        if self.refuses == "plan":
            self.said("Error Code 10: no kernel\n for node {blocks.0}")
            return None
        return b"the plan"
