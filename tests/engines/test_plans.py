"""A plan is found or built once, is of this machine and this artifact, and nothing else is ever loaded."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydradeploy import export, open_bundle
from hydradeploy.bundle import Artifact, Bundle
from hydradeploy.engines import building, plans
from hydradeploy.engines.building import Wanted, build_missing, in_order
from hydradeploy.engines.cache import Cache, user_root
from hydradeploy.engines.plans import RTX, TENSORRT, EngineOptions, Workshop, plan
from hydradeploy.errors import ForeignError, IntegrityError, MissingError
from hydradeploy.profiler import profile as profiler
from tests.conftest import missing, require
from tests.fakes import Fake, install
from tests.profiler.virtual import Here, Launch, profile

ORIN: Mapping[str, str | int] = {
    "version": "10.3.0",
    "cuda_runtime": "12.6",
    "cuda_driver": "12.6",
    "gpu": "Orin",
    "compute_capability": "8.7",
    "sm_count": 16,
}
FIND = EngineOptions(build=False)


def in_own_types(bundle: Bundle) -> list[tuple[Artifact, str]]:
    return [(artifact, artifact.precision) for artifact in bundle.manifest.artifacts]


def wanted(name: str = "h06-fp32", weights: str = "2", **changes: object) -> Wanted:
    values: dict[str, object] = {
        "name": name,
        "compute_type": "fp32",
        "file": f"{name}.trt.onnx",
        "batch": 1,
        "image_shape": (3, 32, 32),
        "sha256": weights * 64,
        "graph_sha256": "1" * 64,
    }
    return Wanted(**(values | changes))  # type: ignore[arg-type]


@dataclass
class Builder:
    """Builds nothing; tells what it was asked."""

    specs: list[object] = field(default_factory=list)
    timings: list[bytes] = field(default_factory=list)

    def __call__(self, spec, timings, progress):
        self.specs.append(spec)
        self.timings.append(timings)
        if progress is not None:
            progress("tactics", 0.5)
        return SimpleNamespace(plan=b"plan %d" % len(self.specs), timing_cache=timings + b"+", warnings=("slow",))


def shop(builder, kind: str = TENSORRT, capability: str | None = None, **here: str | int) -> Workshop:
    return Workshop(kind, dict(ORIN) | here if kind == TENSORRT else {"version": "1.7.1"}, builder, capability)


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "bundle").mkdir()
    return tmp_path / "home"


def test_a_plan_is_built_once_and_kept_in_the_bundle(tmp_path):
    builder, told, heard = Builder(), [], []
    for _ in range(3):
        found = plan(
            TENSORRT,
            wanted(),
            tmp_path / "bundle",
            EngineOptions(),
            lambda *step: heard.append(step),
            say=told.append,
            shop=shop(builder),
        )
        assert found == b"plan 1"
    assert len(builder.specs) == 1
    assert heard == [("tactics", 0.5)]
    assert told == ["building the engine of h06-fp32"]
    (record,) = Cache(tmp_path / "bundle" / "engines").records().values()
    assert (record.artifact, record.warnings, record.key.gpu) == ("h06-fp32", ("slow",), "Orin")
    assert not user_root().exists()


def test_all_head_counts_share_one_timing_cache_of_this_gpu(tmp_path):
    builder = Builder()
    for weights in "345":
        plan(TENSORRT, wanted(weights=weights), tmp_path / "bundle", shop=shop(builder))
    plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(builder, gpu="Orin NX"))
    assert builder.timings == [b"", b"+", b"++", b""]


def test_graphs_of_any_batch_are_built_for_a_range_of_it(tmp_path):
    builder = Builder()
    plan(TENSORRT, wanted(batch="dynamic"), tmp_path / "bundle", shop=shop(builder))
    plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(builder))
    ranges = {"image": ((1, 3, 32, 32), (1, 3, 32, 32), (32, 3, 32, 32))}
    assert [dict(spec.shapes) for spec in builder.specs] == [ranges, {}]


@pytest.mark.parametrize("change", [b"", b"plan 1 and more", b"Plan 1"])
def test_a_damaged_plan_is_built_again_with_a_warning_or_refused_where_nothing_may_be_built(tmp_path, change):
    builder, told = Builder(), []
    plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(builder))
    (path,) = (tmp_path / "bundle" / "engines").glob("*/plan")
    path.write_bytes(change)
    with pytest.raises(IntegrityError) as refused:
        plan(TENSORRT, wanted(), tmp_path / "bundle", FIND, shop=shop(builder))
    assert refused.value.exit_code == 10
    assert str(path) in refused.value.message
    assert plan(TENSORRT, wanted(), tmp_path / "bundle", say=told.append, shop=shop(builder)) == b"plan 2"
    assert told[0].startswith("warning: ")
    assert str(path) in told[0]
    assert plan(TENSORRT, wanted(), tmp_path / "bundle", FIND, shop=shop(builder)) == b"plan 2"


@pytest.mark.parametrize(
    ("here", "told"),
    [
        ({"gpu": "Orin NX", "sm_count": 8}, ("GPU: Orin NX here / Orin there", "SM count: 8 here / 16 there")),
        ({"version": "10.7.0"}, ("version: 10.7.0 here / 10.3.0 there",)),
        ({"cuda_driver": "13.0"}, ("CUDA driver: 13.0 here / 12.6 there",)),
        ({"compute_capability": "11.0"}, ("compute capability: 11.0 here / 8.7 there",)),
    ],
)
def test_a_plan_of_another_machine_is_exit_7_with_what_differs_and_never_loaded(tmp_path, here, told):
    builder = Builder()
    plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(builder))
    with pytest.raises(ForeignError) as refused:
        plan(TENSORRT, wanted(), tmp_path / "bundle", FIND, shop=shop(builder, **here))
    assert refused.value.exit_code == 7
    for difference in told:
        assert difference in refused.value.message
    assert refused.value.message.count(" there") == len(told)
    assert plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(builder, **here)) == b"plan 2"
    assert plan(TENSORRT, wanted(), tmp_path / "bundle", FIND, shop=shop(builder)) == b"plan 1", "the other stays"


def test_a_plan_of_earlier_weights_is_another_one(tmp_path):
    builder = Builder()
    plan(TENSORRT, wanted(weights="3"), tmp_path / "bundle", shop=shop(builder))
    with pytest.raises(ForeignError, match="weights: 222222222222 here / 333333333333 there"):
        plan(TENSORRT, wanted(), tmp_path / "bundle", FIND, shop=shop(builder))


def test_no_plan_at_all_is_exit_8(tmp_path):
    with pytest.raises(MissingError, match=r"no engine of h06-fp32 in .*engines") as refused:
        plan(TENSORRT, wanted(), tmp_path / "bundle", FIND, shop=shop(Builder()))
    assert "profile --backend tensorrt" in (refused.value.hint or "")


def test_what_cannot_be_built_leaves_nothing(tmp_path):
    def broken(*_: object):
        raise MissingError("node /blocks.0/Gelu: no kernel")

    with pytest.raises(MissingError, match="Gelu"):
        plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(broken))
    assert list((tmp_path / "bundle" / "engines").iterdir()) == []


def test_engines_ahead_of_time_are_found_by_the_gpus_they_are_for(tmp_path):
    builder = Builder()
    for weights, targets in (("2", ("sm89", "sm86")), ("3", ())):
        plan(RTX, wanted(weights=weights), tmp_path / "bundle", EngineOptions(targets=targets), shop=shop(builder, RTX))
    for capability in ("8.6", "8.9"):
        here = shop(builder, RTX, capability)
        assert plan(RTX, wanted(), tmp_path / "bundle", FIND, shop=here) == b"plan 1"
    with pytest.raises(ForeignError, match=r"targets: .* here / sm86,sm89 there"):
        plan(RTX, wanted(), tmp_path / "bundle", FIND, shop=shop(builder, RTX, "12.0"))
    with pytest.raises(ForeignError):
        plan(RTX, wanted(weights="4"), tmp_path / "bundle", FIND, shop=shop(builder, RTX, "8.6"))
    assert plan(RTX, wanted(weights="3"), tmp_path / "bundle", FIND, shop=shop(builder, RTX, "12.0")) == b"plan 2"


def test_turing_which_rtx_builds_for_by_name_alone_is_aimed_at(tmp_path):
    builder = Builder()
    turing, ada = shop(builder, RTX, "7.5"), shop(builder, RTX, "8.9")
    assert plan(RTX, wanted(), tmp_path / "bundle", shop=turing) == b"plan 1"
    assert plan(RTX, wanted(), tmp_path / "bundle", FIND, shop=turing) == b"plan 1"
    assert plan(RTX, wanted(), tmp_path / "bundle", shop=ada) == b"plan 2", "the one for Turing is not for it"
    assert [spec.targets for spec in builder.specs] == [("sm75",), ()]
    ahead = EngineOptions(targets=("sm75", "sm89"))
    plan(RTX, wanted(weights="3"), tmp_path / "bundle", ahead, shop=shop(builder, RTX))
    assert plan(RTX, wanted(weights="3"), tmp_path / "bundle", FIND, shop=turing) == b"plan 3"


PROCESS = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from hydradeploy.engines.plans import TENSORRT, plan
from tests.engines.test_plans import shop, wanted

bundle, builds = Path(sys.argv[1]), Path(sys.argv[2])
def build(spec, timings, progress):
    with builds.open("a") as file:
        file.write("built\\n")
    print("building", flush=True)
    sys.stdin.readline()
    return SimpleNamespace(plan=b"plan of %d" % os.getpid(), timing_cache=timings, warnings=())
def say(text):
    print(text, flush=True)
found = plan(TENSORRT, wanted(), bundle, say=say, shop=shop(build))
print("got", found.decode(), flush=True)
"""


def process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def until(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if line.startswith(start)).strip()


def test_two_processes_at_once_build_once_and_both_get_the_plan(tmp_path):
    with process(tmp_path / "bundle", tmp_path / "builds") as one:
        until(one, "building\n")
        with process(tmp_path / "bundle", tmp_path / "builds") as two:
            assert "waiting" in until(two, "another process")
            one.communicate("go\n")
            got = until(two, "got")
    assert got == f"got plan of {one.pid}"
    assert (tmp_path / "builds").read_text() == "built\n"
    assert (one.returncode, two.returncode) == (0, 0)


def test_who_waits_for_a_builder_that_is_killed_builds_itself(tmp_path):
    with process(tmp_path / "bundle", tmp_path / "builds") as one:
        until(one, "building\n")
        with process(tmp_path / "bundle", tmp_path / "builds") as two:
            until(two, "another process")
            one.send_signal(signal.SIGKILL)
            assert f"got plan of {two.pid}" in two.communicate("go\n")[0]
    engines = tmp_path / "bundle" / "engines"
    assert {path.name for path in engines.glob("*/*")} == {"plan", "engine.json"}
    assert len(Cache(engines).records()) == 1


READ_ONLY = """
from pathlib import Path
import sys
from tests.engines.test_plans import Builder, FIND, TENSORRT, plan, shop, wanted
from hydradeploy.engines.cache import Cache, user_root

bundle, builder = Path(sys.argv[1]), Builder()
assert plan(TENSORRT, wanted(), bundle, FIND, shop=shop(builder)) == b"plan 1"
assert plan(TENSORRT, wanted(weights="3"), bundle, shop=shop(builder)) == b"plan 1"
assert plan(TENSORRT, wanted(weights="3"), bundle, FIND, shop=shop(builder)) == b"plan 1"
print(*(record.key.sha256[0] for record in Cache(user_root()).records().values()))
"""


def test_engines_of_a_read_only_bundle_are_kept_in_the_users_cache_and_its_own_are_found(tmp_path):
    plan(TENSORRT, wanted(), tmp_path / "bundle", shop=shop(Builder()))
    (tmp_path / "run.py").write_text(READ_ONLY)
    script = f"""
        mount --bind {tmp_path}/bundle {tmp_path}/bundle && mount -o remount,ro,bind {tmp_path}/bundle || exit 77
        {sys.executable} {tmp_path}/run.py {tmp_path}/bundle
    """
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*unshare, "sh", "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if ran.returncode == 77 or "unshare failed" in ran.stderr or "Operation not permitted" in ran.stderr:
        missing("mount", f"this kernel lets us mount nothing ({ran.stderr.strip()})")
    assert (ran.returncode, ran.stdout) == (0, "3\n"), ran.stderr
    assert len(Cache(tmp_path / "bundle" / "engines").records()) == 1


def test_the_most_likely_picks_come_first():
    def artifact(name: str) -> Artifact:
        return SimpleNamespace(name=name, heads=int(name[1:3]), precision=name[4:])  # type: ignore[return-value]

    names = ["h03-fp32", "h06-fp32", "h06-int8", "h12-fp32", "h12-bf16", "h12-fp16"]
    wanted = [(artifact(name), name[4:]) for name in names] + [(artifact("h12-fp32"), "tf32")]
    ordered = [(found.name, kind) for found, kind in in_order(wanted)]
    assert ordered == [
        ("h12-fp16", "fp16"),
        ("h12-bf16", "bf16"),
        ("h12-fp32", "tf32"),
        ("h12-fp32", "fp32"),
        ("h06-int8", "int8"),
        ("h06-fp32", "fp32"),
        ("h03-fp32", "fp32"),
    ]


# With the real compiler, which needs no GPU.


@pytest.fixture
def rtx() -> None:
    require("tensorrt_rtx")


def engines(bundle: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (bundle / "engines").glob("*/engine.json"))
    return {record["artifact"]: record for record in found}


def test_export_builds_engines_ahead_of_time(rtx, cli, supernet_file, tmp_path):
    bundle = tmp_path / "exported"
    command = ["export", "--supernet", supernet_file, "--bundle", bundle, "--heads", "3,6", "--precision"]
    command += ["fp32,int8dyn", "--engine", "tensorrt-rtx", "--target", "sm86,sm89"]
    ran = cli(*command)
    assert ran.code == 0, ran.err
    built = engines(bundle)
    assert set(built) == {"h03-fp32", "h06-fp32"}
    assert built["h06-fp32"]["key"]["flags"]["targets"] == "sm86,sm89"
    assert ran.err.index("building the engine of h06-fp32") < ran.err.index("building the engine of h03-fp32")
    assert "no engine of h06-int8dyn, h03-int8dyn" in ran.err or "no engine of h03-int8dyn, h06-int8dyn" in ran.err
    assert "engines of tensorrt-rtx: 2 ready" in ran.err
    assert cli("verify", "--bundle", bundle).code == 0
    again = cli(*command)
    assert again.code == 0
    assert "building the engine" not in again.err
    assert engines(bundle) == built
    artifact = open_bundle(bundle).artifact("h06-fp32")
    subject = wanted("h06-fp32", sha256=artifact.sha256, graph_sha256=artifact.graph_sha256)
    real = plans.workshop(RTX)
    here = Workshop(RTX, real.here, real.build, "8.6")
    assert len(plan(RTX, subject, bundle, FIND, shop=here)) == built["h06-fp32"]["plan"]["size_bytes"]


def test_one_graph_that_cannot_be_built_does_not_keep_the_others(rtx, supernet_file, tmp_path):
    written = export(supernet_file, tmp_path / "exported", heads=(2, 3, 4))
    graph = tmp_path / "exported" / "h03-fp32.trt.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"Softmax", b"Sopmaxx"))
    heard: list[str] = []
    found = build_missing(RTX, written, in_own_types(written), report=lambda what, *_: heard.append(what))
    assert found.ready == ("h04-fp32", "h02-fp32")
    assert set(found.failed) == {"h03-fp32"}
    assert "\n" not in found.failed["h03-fp32"]
    assert {what.partition(":")[0] for what in heard} >= {"engine h04-fp32 (1 of 3)", "engine h02-fp32 (3 of 3)"}


@pytest.mark.parametrize("target", ["sm87", "8.6", "current"])
def test_a_target_that_there_is_not_is_refused_first(rtx, cli, supernet_file, tmp_path, target):
    command = ["export", "--supernet", supernet_file, "--bundle", tmp_path / "exported", "--engine", "tensorrt-rtx"]
    ran = cli(*command, "--target", target)
    assert ran.code == 2
    assert f"no target '{target}'" in ran.err
    assert "sm86, sm89" in ran.err
    assert not (tmp_path / "exported").exists()


def test_a_builder_that_is_killed_costs_its_engine_alone(rtx, supernet_file, tmp_path, monkeypatch):
    """The process that builds is killed at the second of three; another one builds the third."""
    written = export(supernet_file, tmp_path / "exported", heads=(2, 3, 4))
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def started(*arguments, **options):
        children.append(start(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", started)

    def say(text: str) -> None:
        if "h03" in text:
            os.kill(children[-1].pid, signal.SIGKILL)

    found = build_missing(RTX, written, in_own_types(written), say=say)
    assert found.ready == ("h04-fp32", "h02-fp32")
    assert found.failed["h03-fp32"].startswith("its builder ended with SIGKILL")
    assert len(children) == 2
    assert set(engines(tmp_path / "exported")) == {"h04-fp32", "h02-fp32"}


def test_there_is_a_sign_of_life_where_a_builder_says_nothing(rtx, supernet_file, tmp_path, monkeypatch):
    """An interpreter alone takes longer to start than these ticks are apart."""
    monkeypatch.setattr(building, "_TICK_S", 0.01)
    written = export(supernet_file, tmp_path / "exported", heads=(2,))
    heard: list[tuple[str, int, int]] = []
    build_missing(RTX, written, in_own_types(written), report=lambda *call: heard.append(call))
    assert heard.count(("engine h02-fp32 (1 of 1)", 0, 0)) > 2


def test_a_lone_plan_is_built_in_another_process_once_and_told_of(rtx, supernet_file, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_LINE_S", 0.0)
    written = export(supernet_file, tmp_path / "exported", heads=(2,))
    artifact = written.artifact("h02-fp32")
    subject = wanted(
        "h02-fp32",
        file=str(written.graph(artifact, "trt")),
        sha256=artifact.sha256,
        graph_sha256=artifact.graph_sha256,
        image_shape=(3, 32, 32),
    )
    told: list[str] = []
    built = building.plan_of(RTX, subject, written.path, "fp32", say=told.append)
    assert told[0] == "building the engine of h02-fp32"
    assert any(line.startswith("engine h02-fp32 (1 of 1)") for line in told[1:])
    before = len(told)
    assert building.plan_of(RTX, subject, written.path, "fp32", say=told.append) == built
    assert len(told) == before
    building.plan_of(RTX, subject, written.path, "tf32", say=told.append)
    assert len(Cache(written.path / "engines").records()) == 2

    (damaged,) = (path for path in written.path.rglob("plan") if path.read_bytes() == built)
    damaged.write_bytes(built[:-1])
    assert building.plan_of(RTX, subject, written.path, "fp32", say=told.append)
    assert any("it is built again" in line for line in told[before:])

    graph = written.path / "h02-fp32.trt.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"Softmax", b"Sopmaxx"))
    shutil.rmtree(written.path / "engines")
    with pytest.raises(MissingError, match="Sopmaxx"):
        building.plan_of(RTX, subject, written.path, "fp32", say=told.append)


ASKS = """
import os, subprocess, sys
from pathlib import Path
from hydradeploy import open_bundle
from hydradeploy.engines.building import build_missing

start = subprocess.Popen
def started(*arguments, **options):
    child = start(*arguments, **options)
    print(child.pid, flush=True)
    return child
subprocess.Popen = started
bundle = open_bundle(Path(sys.argv[1]))
def say(text):
    print(text, flush=True)
    sys.stdin.read()
build_missing("tensorrt-rtx", bundle, [(one, one.precision) for one in bundle.manifest.artifacts], say=say)
"""


def test_the_process_that_builds_dies_with_the_one_that_asked(rtx, supernet_file, tmp_path):
    written = export(supernet_file, tmp_path / "exported", heads=(2, 3, 4, 5, 6))
    command = [sys.executable, "-c", ASKS, str(written.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        child = int(asking.stdout.readline())
        assert asking.stdout.readline() == "building the engine of h06-fp32\n"
        descriptor = os.pidfd_open(child)
        asking.send_signal(signal.SIGKILL)
    assert select.select([descriptor], [], [], 60)[0], "it ended"
    os.close(descriptor)
    found = build_missing(RTX, written, in_own_types(written))
    assert len(found.ready) == 5
    assert len(engines(written.path)) == 5


def test_profile_builds_what_is_missing_before_it_measures_and_leaves_out_what_cannot_be_built(
    rtx, supernet_file, tmp_path, monkeypatch
):
    types = {"fp32": ("fp32", "tf32"), "fp16": ("fp16",)}
    install(monkeypatch, Fake(RTX, types, dialect="trt"))
    written = export(supernet_file, tmp_path / "exported", heads=(2, 3))
    graph = tmp_path / "exported" / "h03-fp32.trt.onnx"
    broken = graph.read_bytes().replace(b"Softmax", b"Sopmaxx")
    told: list[str] = []
    launched: list[set[str]] = []

    class Measuring(Launch):
        def __call__(self, request, **options):
            launched.append(set(engines(tmp_path / "exported")))
            return super().__call__(request, **options)

    def measured(**options):
        return profile(
            written.path, tmp_path / "profiles", here=Here(), launch=Measuring(), backends=(RTX,), say=told.append,
            **options,
        )  # fmt: skip

    with pytest.raises(MissingError, match="no engine of h03-fp32 in"):
        measured(build=False)
    assert not launched
    assert len(measured().cells) == 2
    assert launched
    assert all(there == {"h02-fp32", "h03-fp32"} for there in launched)
    assert not measured(build=False).left_out

    with pytest.raises(ForeignError, match=r"no engine of h03-fp32 .*: tf32: on here / off there"):
        measured(compute_types=("fp32", "tf32"), build=False)
    assert len(measured(compute_types=("fp32", "tf32")).cells) == 4
    built = [record.key.flags["tf32"] for record in Cache(tmp_path / "exported" / "engines").records().values()]
    assert sorted(built) == ["off", "off", "on", "on"]

    shutil.rmtree(tmp_path / "exported" / "engines")
    monkeypatch.setattr(profiler, "open_bundle", lambda path: written)  # which would find the graph changed
    graph.write_bytes(broken)
    done = measured()
    assert [cell.artifact for cell in done.cells] == ["h02-fp32"]
    assert done.left_out[0].startswith("left out: h03-fp32: no engine of tensorrt-rtx: ")
    assert done.left_out[0] in told


def test_without_a_gpu_nothing_is_exported_for_hours_first(cli, supernet_file, tmp_path, monkeypatch):
    from hydradeploy.engines import cudart, module

    monkeypatch.setattr(cudart, "why_no_gpu", lambda: "no CUDA device: none")
    monkeypatch.setattr(module, "why_not", lambda kind: None)
    bundle = tmp_path / "exported"
    ran = cli("export", "--supernet", supernet_file, "--bundle", bundle, "--engine", "tensorrt")
    assert ran.code == 8
    assert "no CUDA device" in ran.err
    assert "on the device" in ran.err
    assert "reading the supernet" not in ran.err
    assert not bundle.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "openvino"], "one of tensorrt, tensorrt-rtx"),
        (["--engine", "tensorrt", "--target", "sm86"], "--target is for --engine tensorrt-rtx"),
        (["--target", "sm86"], "--target without --engine"),
        (["--engine", "tensorrt-rtx", "--target", ","], "names nothing"),
    ],
)
def test_orders_that_make_no_sense_are_refused_first(cli, supernet_file, tmp_path, options, told):
    ran = cli("export", "--supernet", supernet_file, "--bundle", tmp_path / "exported", *options)
    assert ran.code == 2
    assert told in ran.err
    assert not (tmp_path / "exported").exists()
