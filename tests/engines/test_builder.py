"""One builder serves every TensorRT: with what its bindings have, and nothing else.

What these fakes cannot show, TensorRT for RTX does in test_builder_rtx.py.
"""

from __future__ import annotations

import threading
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from hydradeploy.engines import builder, cudart, progress
from hydradeploy.engines.builder import BuildSpec, build, flags
from hydradeploy.errors import ExitCode, MissingError
from tests.conftest import require
from tests.engines.surface import RTX, VERSIONS, FakeModule, Graph, Layer, Refusal, known, surface

GRAPH = Path("h06-fp32.trt.onnx")
SPEC = BuildSpec(GRAPH)
FULL = [version for version in VERSIONS if version != RTX]
WEAK = ["8.5.2", "8.6.1"]
FP16 = Graph(layers=(Layer(), Layer(types=("HALF",))))
INT8 = Graph(layers=(Layer("QUANTIZE", ("INT8",)), Layer("DEQUANTIZE"), Layer()))


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(cudart, "why_no_gpu", lambda: None)


def message(trt: FakeModule, spec: BuildSpec = SPEC, **rest) -> str:
    """What a build that fails says, in one line."""
    with pytest.raises(MissingError) as refused:
        build(trt, spec, **rest)
    assert refused.value.exit_code is ExitCode.MISSING
    assert "\n" not in refused.value.message
    return refused.value.message


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_with_the_names_that_it_has(version):
    trt = FakeModule(version)
    built = build(trt, BuildSpec(GRAPH, workspace_bytes=1 << 20))
    assert built.plan == b"the plan"
    assert trt.seen.pools == {"WORKSPACE": 1 << 20}
    assert built.warnings == ("a kernel is slow",)


@pytest.mark.parametrize("graph", [Graph(), FP16, INT8], ids=["fp32", "fp16", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_wherever_there_are_such(version, graph):
    trt = FakeModule(version, graph)
    built = build(trt, SPEC)
    kinds = trt.NetworkDefinitionCreationFlag
    if version in WEAK:
        asked = 1 << int(kinds.EXPLICIT_BATCH)
    elif version == RTX or version.startswith("11."):
        asked = 0
    else:
        asked = 1 << int(kinds.STRONGLY_TYPED)
    assert trt.seen.network_flags == asked
    # Only a weakly typed network is told what it may use.
    wanted = {id(FP16): {"FP16"}, id(INT8): {"INT8"}}.get(id(graph), set()) if version in WEAK else set()
    # TensorRT for RTX could allocate while it runs, which no CUDA graph may.
    assert trt.seen.flags == (wanted | {"REQUIRE_USER_ALLOCATION"} if version == RTX else wanted)
    remark = [text for text in built.warnings if "not strongly typed" in text]
    assert len(remark) == len(wanted)
    assert all(name in remark[0] for name in wanted)


@pytest.mark.parametrize("version", VERSIONS)
def test_fp32_is_fp32_unless_tf32_is_asked_for(version):
    for tf32, cleared in ((False, {"TF32"}), (True, set())):
        trt = FakeModule(version)
        build(trt, BuildSpec(GRAPH, tf32=tf32))
        assert trt.seen.cleared == cleared


def test_types_of_inputs_count_too_and_several_are_permitted_together():
    inputs = {"image": ((1, 8), "HALF")}
    trt = FakeModule("8.6.1", Graph(inputs, INT8.layers))
    build(trt, SPEC)
    assert trt.seen.flags == {"FP16", "INT8"}


@pytest.mark.parametrize("version", VERSIONS)
def test_contexts_share_a_profile_where_they_would_not_unasked(version):
    """From 10.0 on they do, and what asked for it is deprecated."""
    trt = FakeModule(version)
    build(trt, SPEC)
    assert trt.seen.previews == ({"PROFILE_SHARING_0806"} if version == "8.6.1" else set())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dynamic_input_gets_its_bounds(version):
    trt = FakeModule(version, Graph({"image": ((-1, 8), "FLOAT"), "fixed": ((1, 8), "FLOAT")}))
    three = ((1, 8), (4, 8), (32, 8))
    build(trt, BuildSpec(GRAPH, {"image": three}))
    assert trt.seen.profile == {"image": three}


def test_a_dynamic_input_without_bounds_is_refused_by_name():
    trt = FakeModule("10.3.0", Graph({"image": ((-1, 3, 8, 8), "FLOAT")}))
    told = message(trt)
    assert told == f"{GRAPH}: the input image of shape (-1, 3, 8, 8) is dynamic and has no bounds"
    assert trt.seen.built == 0


def test_bounds_of_what_is_not_dynamic_are_refused():
    told = message(FakeModule("10.3.0"), BuildSpec(GRAPH, {"image": ((1, 8), (1, 8), (2, 8))}))
    assert "image, which is no dynamic input" in told


@pytest.mark.parametrize("refuses", ["shape", "profile"])
def test_bounds_that_are_refused_are_told(refuses):
    trt = FakeModule("10.3.0", Graph({"image": ((-1, 8), "FLOAT")}), refuses)
    told = message(trt, BuildSpec(GRAPH, {"image": ((2, 8), (1, 8), (4, 8))}))
    assert told.startswith(f"{GRAPH}: TensorRT refuses the bounds image:2x8/1x8/4x8: ")


@pytest.mark.parametrize("version", FULL)
def test_what_was_timed_is_taken_and_given_back(version):
    trt = FakeModule(version)
    first = build(trt, SPEC)
    second = build(trt, SPEC, timing_cache=first.timing_cache)
    assert (first.timing_cache, second.timing_cache) == (b"+", b"++")
    assert trt.seen.caches == [b"", b"+"]


@pytest.mark.parametrize("refuses", ["cache", "garbage"])
@pytest.mark.parametrize("version", FULL)
def test_a_timing_cache_of_another_gpu_is_replaced_with_a_warning(version, refuses):
    trt = FakeModule(version, refuses=refuses)
    built = build(trt, SPEC, timing_cache=b"of an Orin")
    assert built.timing_cache == b"+"
    assert trt.seen.caches == [b"of an Orin", b""]
    assert "refused" in built.warnings[0]


def test_no_timing_cache_at_all_is_a_warning():
    built = build(FakeModule("10.3.0", refuses="caches"), SPEC, timing_cache=b"x")
    assert (built.plan, built.timing_cache) == (b"the plan", b"")
    assert "nothing that was timed is kept" in built.warnings[0]


def test_tensorrt_for_rtx_times_nothing():
    trt = FakeModule(RTX)
    assert build(trt, SPEC, timing_cache=b"x").timing_cache == b""
    assert trt.seen.caches == []


def test_tensorrt_for_rtx_builds_for_targets():
    trt = FakeModule(RTX)
    build(trt, BuildSpec(GRAPH, targets=("sm86", "sm89", "sm120")))
    assert trt.seen.targets == ["SM86", "SM89", "SM120"]
    assert trt.config.num_compute_capabilities == 3


@pytest.mark.parametrize("target", ["sm87", "9.0", "8.6", "nonsense"])
def test_a_target_it_does_not_have_is_refused_with_those_it_has(target):
    told = message(FakeModule(RTX), BuildSpec(GRAPH, targets=("sm86", target)))
    assert f"not build for {target}, only for" in told
    assert {"sm75", "sm120"} <= set(told.replace(",", "").split())


def test_targets_are_of_tensorrt_for_rtx():
    assert "GPU at hand only, not for sm86" in message(FakeModule("11.4.0"), BuildSpec(GRAPH, targets=("sm86",)))


@pytest.mark.parametrize("version", FULL)
def test_nothing_of_tensorrt_is_constructed_without_a_gpu(version, monkeypatch):
    """It can crash the process."""
    monkeypatch.setattr(cudart, "why_no_gpu", lambda: "no CUDA device: none")
    trt = FakeModule(version)
    for name in ("Builder", "OnnxParser", "ILogger", "IProgressMonitor"):
        if hasattr(trt, name):
            setattr(trt, name, lambda *rest: pytest.fail("constructed"))
    trt.OnnxParser = surface(version)["OnnxParser"]
    assert message(trt) == f"no engine of {GRAPH.name} can be built: no CUDA device: none"


def test_tensorrt_for_rtx_builds_without_a_gpu(monkeypatch):
    monkeypatch.setattr(cudart, "why_no_gpu", lambda: "no CUDA device: none")
    assert build(FakeModule(RTX), SPEC).plan == b"the plan"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_builder_that_does_not_start_says_why(version):
    told = message(FakeModule(version, refuses="builder"))
    assert told.endswith("TensorRT does not start: CUDA initialization failure with error: 35")


@pytest.mark.parametrize("version", VERSIONS)
def test_no_plan_is_one_error_with_what_tensorrt_logged(version):
    told = message(FakeModule(version, refuses="plan"))
    assert told == f"{GRAPH}: TensorRT cannot build it: Error Code 10: no kernel for node {{blocks.0}}"


def test_what_was_logged_before_a_build_is_not_told_with_it():
    trt = FakeModule("10.3.0")
    build(trt, SPEC)
    trt.said("of another engine")
    trt.said("of another engine", "WARNING")
    assert build(trt, SPEC).warnings == ("a kernel is slow",)
    trt.said("of another engine")
    trt.refuses = "plan"
    assert "another" not in message(trt)


def broken(path: Path) -> Path:
    """A graph whose second node TensorRT has no idea of."""
    nodes = [
        helper.make_node("Relu", ["image"], ["a"], name="first"),
        helper.make_node("Bernoulli", ["a"], ["logits"], name="blocks.0.mlp.coin"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("image", "logits")]
    graph = helper.make_graph(nodes, "broken", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("version", VERSIONS)
def test_a_node_that_is_refused_is_named_with_its_operator_and_the_file(version, tmp_path):
    """Before 10.0 TensorRT tells no more of it than its number."""
    graph = broken(tmp_path / "h06.trt.onnx")
    trt = FakeModule(version, Graph(refusals=(Refusal(1, "blocks.0.mlp.coin", "Bernoulli", "no\nimporter"),)))
    told = message(trt, BuildSpec(graph))
    why = "no importer (UNSUPPORTED_NODE)"
    assert told == f"{graph}: TensorRT refuses node blocks.0.mlp.coin (Bernoulli): {why}"


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_what_is_refused_of_no_node_is_told_without_one(version, tmp_path):
    trt = FakeModule(version, Graph(refusals=(Refusal(-1, "", "", "no such file", "ErrorCode.INVALID_GRAPH"),)))
    told = message(trt, BuildSpec(tmp_path / "absent.onnx"))
    assert told.endswith("TensorRT refuses it: no such file (INVALID_GRAPH)")


def test_many_refusals_are_told_by_their_number():
    refusals = tuple(Refusal(at, f"n{at}", "Erf") for at in range(7))
    told = message(FakeModule("10.3.0", Graph(refusals=refusals)))
    assert told.count("node n") == 3
    assert told.endswith("; and 4 more")


@pytest.mark.parametrize("version", [version for version in VERSIONS if version not in WEAK])
def test_events_of_tensorrt_are_progress(version):
    heard = []
    build(FakeModule(version), SPEC, progress=lambda *step: heard.append(step))
    assert heard[:3] == [("starting", None), ("parsing", None), ("building", None)]
    assert heard[3] == ("Building engine", 0.0)
    assert [step for step in heard if step[0] == "Tactics"] == [("Tactics", part / 8) for part in range(5)]
    assert heard[-1] == ("Building engine", 0.5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_silent_build_gives_signs_of_life(version, monkeypatch):
    """Without events, or between them: the builder ends only when three beats were heard."""
    trt, beats, enough = FakeModule(version, events=False), [], threading.Event()
    whole = trt._build

    def silent(network, config):
        assert enough.wait(30), "not a sign of life"
        return whole(network, config)

    def hear(stage, fraction):
        beats.append(stage)
        if beats.count("building") >= 4:
            enough.set()

    monkeypatch.setattr(trt, "_build", silent)
    monkeypatch.setattr(builder, "beating", lambda teller: progress.beating(teller, 0.001))
    assert build(trt, SPEC, progress=hear).plan == b"the plan"


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", RTX])
def test_what_the_listener_raises_ends_the_build_and_is_raised(version):
    """Not through TensorRT, whose threads it would end."""

    def hear(stage, fraction):
        if stage in ("building", "Tactics"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(FakeModule(version), SPEC, progress=hear)


def test_flags_are_what_decides_the_plan():
    other = [
        BuildSpec(GRAPH, {"image": ((1, 8), (1, 8), (2, 8))}),
        BuildSpec(GRAPH, workspace_bytes=1),
        BuildSpec(GRAPH, targets=("sm86",)),
        BuildSpec(GRAPH, tf32=True),
    ]
    told = [tuple(flags(spec).items()) for spec in (SPEC, *other)]
    assert len(set(told)) == len(told)
    assert flags(SPEC) == flags(BuildSpec(Path("another.onnx")))
    assert flags(BuildSpec(GRAPH, targets=("sm86", "sm89"))) == flags(BuildSpec(GRAPH, targets=("sm89", "sm86")))


@pytest.mark.parametrize("kind", sorted({kind for version in VERSIONS for kind in surface(version)}))
def test_the_surface_of_rtx_is_that_of_the_real_package(kind):
    """Names it has and names it lacks, in the data that the fakes are made of."""
    require("tensorrt_rtx")
    import tensorrt_rtx

    owner = tensorrt_rtx if kind == "module" else getattr(tensorrt_rtx, kind)
    listed = surface(RTX).get(kind, frozenset())
    assert {name for name in known(kind) if hasattr(owner, name)} == listed
