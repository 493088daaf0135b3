"""`profile` of several backends, compute types and settings: which cells there are, and what is left out and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest

from hydradeploy import export
from hydradeploy.errors import MissingError, UsageError
from hydradeploy.measurements import read_profiles, show_settings
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.profile import Order
from hydradeploy.profiler.profile import plan as plan_of
from hydradeploy.profiler.profile import profile as real_profile
from tests.conftest import Cli
from tests.fakes import Fake, install
from tests.profiler.virtual import Here, Launch, profile

TWO = {"heads": (2, 4), "threads": (1,)}


@pytest.fixture
def abacus(monkeypatch) -> Fake:
    """Beside onnxruntime: runs fp32 only, in fp32 or bf16, with beads or stones, fast or slow."""
    fake = Fake("abacus", {"fp32": ("fp32", "bf16")}, {"hint": ("latency", "throughput"), "beads": ("wood", "stone")})
    install(monkeypatch, fake)
    return fake


def cells(bundle: Path, directory: Path, launch: Launch | None = None, **options: object) -> list[str]:
    done = profile(bundle, directory, here=Here(), launch=launch or Launch(), **TWO | options)
    ways = [(c.artifact, c.backend, c.compute_type, show_settings(c.settings)) for c in done.stored.profile.cells]
    return [" ".join(filter(None, way)) for way in ways]


def test_by_default_it_is_the_first_backend_and_the_default_type_of_each_artifact(shared_bundle, tmp_path, abacus):
    assert cells(shared_bundle, tmp_path) == [
        f"h{heads:02d}-{kind} onnxruntime {kind}" for kind in ("fp32", "fp16") for heads in (2, 4)
    ]


@pytest.mark.parametrize("names", [("onnxruntime", "abacus"), ("all",)])
def test_each_artifact_is_measured_by_every_backend_that_runs_it(shared_bundle, tmp_path, abacus, names):
    told: list[str] = []
    found = cells(shared_bundle, tmp_path, backends=names, say=told.append)
    assert found == [
        *("h02-fp32 onnxruntime fp32", "h02-fp32 abacus fp32", "h04-fp32 onnxruntime fp32", "h04-fp32 abacus fp32"),
        *("h02-fp16 onnxruntime fp16", "h04-fp16 onnxruntime fp16"),
    ]
    assert told[0] == "left out: h02-fp16, h04-fp16: abacus does not run fp16 here"


def test_on_a_gpu_there_is_one_cell_whatever_the_threads(shared_bundle, tmp_path, monkeypatch):
    """On a machine with both, every count is a cell of what computes on the processor."""

    @dataclass(frozen=True)
    class Both(Here):
        processors: tuple[str, ...] = ("cpu", "cuda")

    install(monkeypatch, Fake("lamp", {"fp32": ("fp32",)}, processor="cuda"))
    launch = Launch()
    done = profile(
        shared_bundle,
        tmp_path,
        launch=launch,
        here=Both(),
        backends=("onnxruntime", "lamp"),
        precisions=("fp32",),
        heads=(2,),
        threads=(2, 4),
    )
    found = [(cell.backend, cell.processor, cell.threads) for cell in done.cells]
    assert found == [("onnxruntime", "cpu", 2), ("onnxruntime", "cpu", 4), ("lamp", "cuda", 1)]
    assert {r.options.threads for r in launch.requests if r.backend == "lamp"} == {1}


def test_every_compute_type_asked_for_is_a_cell_and_what_the_child_is_asked_for(shared_bundle, tmp_path, abacus):
    launch = Launch()
    options = {"backends": ("abacus",), "compute_types": ("bf16", "fp32", "bf16"), "precisions": ("fp32",)}
    found = cells(shared_bundle, tmp_path, launch, **options)
    assert found == [f"h{heads:02d}-fp32 abacus {kind}" for heads in (2, 4) for kind in ("bf16", "fp32")]
    assert {r.options.compute_type for r in launch.requests} == {"bf16", "fp32"}
    assert {(r.backend, r.options.threads) for r in launch.requests} == {("abacus", 1)}


def test_settings_are_tried_on_the_backends_that_have_them_and_defaults_are_no_settings(
    shared_bundle, tmp_path, abacus
):
    launch = Launch()
    chosen = {"backends": ("onnxruntime", "abacus"), "precisions": ("fp32",), "heads": (2,)}
    settings = {"hint": ("throughput", "latency"), "beads": ("stone",)}
    found = cells(shared_bundle, tmp_path, launch, settings=settings, **chosen)
    assert found == [
        "h02-fp32 onnxruntime fp32",
        "h02-fp32 abacus fp32 beads=stone, hint=throughput",
        "h02-fp32 abacus fp32 beads=stone",
    ]
    asked = {r.backend: [] for r in launch.requests}
    for request in launch.requests[:3]:
        asked[request.backend].append(request.options.settings)
    assert asked == {"onnxruntime": [{}], "abacus": [{"hint": "throughput", "beads": "stone"}, {"beads": "stone"}]}
    assert cells(shared_bundle, tmp_path, settings={"hint": ("latency",)}, **chosen).count("h02-fp32 abacus fp32") == 1


def test_a_second_run_in_another_way_keeps_the_cells_of_the_first(shared_bundle, tmp_path, abacus):
    chosen = {"backends": ("abacus",), "precisions": ("fp32",), "heads": (2,)}
    cells(shared_bundle, tmp_path, **chosen)
    cells(shared_bundle, tmp_path, compute_types=("bf16",), **chosen)
    cells(shared_bundle, tmp_path, settings={"hint": ("throughput",)}, **chosen)
    again = cells(shared_bundle, tmp_path, compute_types=("bf16",), **chosen)
    assert sorted(again) == [
        *("h02-fp32 abacus bf16", "h02-fp32 abacus fp32", "h02-fp32 abacus fp32 hint=throughput"),
    ]


def test_a_backend_that_fails_with_one_artifact_keeps_the_others(shared_bundle, tmp_path, abacus):
    def latencies(request: Request) -> Iterator[float]:
        if (request.backend, request.artifact) == ("abacus", "h02-fp32"):
            raise MissingError("h02-fp32: abacus cannot open it")
        return repeat(1 / 64)

    chosen = {"backends": ("all",), "precisions": ("fp32",)}
    done = profile(shared_bundle, tmp_path, here=Here(), launch=Launch(latencies), **TWO | chosen)
    assert {(cell.artifact, cell.backend): cell.error for cell in done.cells} == {
        ("h02-fp32", "onnxruntime"): None,
        ("h02-fp32", "abacus"): "h02-fp32: abacus cannot open it",
        ("h04-fp32", "onnxruntime"): None,
        ("h04-fp32", "abacus"): None,
    }


@pytest.mark.parametrize(
    ("chosen", "error", "message", "hint"),
    [
        ({"precisions": ("fp16",)}, MissingError, "abacus does not run fp16 here", "abacus has fp32"),
        ({"precisions": ("fp32", "fp16")}, MissingError, "abacus does not run fp16 here", "abacus has fp32"),
        ({"compute_types": ("int8",)}, MissingError, "abacus does not compute in int8", "abacus has fp32, bf16"),
        ({"settings": {"rods": ("9",)}}, UsageError, "no setting 'rods' of abacus", "abacus has hint, beads"),
        ({"settings": {"beads": ("glass",)}}, UsageError, "beads cannot be 'glass'", "one of wood, stone"),
        ({"backends": ("quipu",)}, UsageError, "no backend 'quipu'", "one of onnxruntime, abacus"),
    ],
)
def test_what_there_is_none_of_is_refused_with_what_there_is(
    shared_bundle, tmp_path, abacus, chosen, error, message, hint
):
    launch = Launch()
    with pytest.raises(error, match=message) as refused:
        cells(shared_bundle, tmp_path, launch, **{"backends": ("abacus",)} | chosen)
    assert hint in str(refused.value.hint)
    assert launch.requests == []


def test_where_nothing_is_left_the_reason_is_told(shared_bundle, tmp_path, monkeypatch):
    install(monkeypatch, Fake("abacus", {"int8": ("int8",)}))
    with pytest.raises(MissingError, match=r"abacus does not run fp32 here; abacus does not run fp16 here") as refused:
        cells(shared_bundle, tmp_path, backends=("abacus",))
    assert refused.value.hint == "abacus has int8"


def test_a_backend_without_a_dialect_does_not_run_graphs_that_carry_their_weights(supernet_file, tmp_path, monkeypatch):
    export(supernet_file, tmp_path / "bundle", heads=(2,), standalone=True)
    install(monkeypatch, Fake("slate", {"fp32": ("fp32",)}, dialect=None))
    told: list[str] = []
    found = cells(tmp_path / "bundle", tmp_path / "p", backends=("all",), heads=(2,), say=told.append)
    assert found == ["h02-fp32 onnxruntime fp32"]
    assert told[0].startswith("left out: h02-fp32: slate computes from a weights file")


def test_a_backend_that_computes_elsewhere_is_not_measured_on_this_device(shared_bundle, tmp_path, monkeypatch):
    install(monkeypatch, Fake("lamp", {"fp32": ("fp32",)}, processor="cuda"))
    assert {name.split()[1] for name in cells(shared_bundle, tmp_path, backends=("all",))} == {"onnxruntime"}
    with pytest.raises(MissingError, match="not every backend computes on cpu: lamp does on cuda"):
        cells(shared_bundle, tmp_path, backends=("onnxruntime", "lamp"))


def test_a_switch_is_from_the_artifact_before_it_that_is_run_alike(shared_bundle, tmp_path, abacus):
    launch = Launch()
    chosen = {"heads": (2, 3, 4), "backends": ("all",), "preset": "standard"}
    profile(shared_bundle, tmp_path, here=Here(), launch=launch, **TWO | chosen)
    others = {(r.backend, r.artifact): r.other for r in launch.requests}
    assert others == {
        (backend, f"h{heads:02d}-{kind}"): f"h{other:02d}-{kind}"
        for backend, kind in (("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("abacus", "fp32"))
        for heads, other in ((2, 4), (3, 2), (4, 3))
    }


def test_a_plan_probes_each_backend_and_type_and_says_what_is_left_out(shared_bundle, tmp_path, abacus):
    launch = Launch(lambda request: repeat((1 if request.backend == "abacus" else 2) / 64))
    order = Order(backends=("all",), **TWO)
    plan = plan_of(shared_bundle, tmp_path, order, launch=launch, here=Here())
    assert sorted((r.backend, r.compute_type, r.artifact) for r in launch.requests) == [
        *(("abacus", "fp32", "h02-fp32"), ("onnxruntime", "fp16", "h02-fp16"), ("onnxruntime", "fp32", "h02-fp32")),
    ]
    call_s = {(cell.artifact, cell.backend): cell.call_s for cell in plan.cells}
    assert call_s["h02-fp32", "abacus"] == 1 / 64
    assert call_s["h02-fp32", "onnxruntime"] == 2 / 64
    assert plan.left_out == ("left out: h02-fp16, h04-fp16: abacus does not run fp16 here",)


def test_what_was_measured_in_another_way_is_no_basis_of_a_plan(shared_bundle, tmp_path, abacus):
    chosen = {"backends": ("abacus",), "precisions": ("fp32",)}
    cells(shared_bundle, tmp_path, **chosen)
    for other in ({"compute_types": ("bf16",)}, {"settings": {"hint": ("throughput",)}}):
        launch = Launch()
        plan_of(shared_bundle, tmp_path, Order(**TWO | chosen | other), launch=launch, here=Here())
        assert len(launch.requests) == 1
    plan_of(shared_bundle, tmp_path, Order(**TWO | chosen), launch=None, here=Here())  # type: ignore[arg-type]


def test_artifacts_of_both_inputs_are_cells_of_their_own_and_tell_what_preparing_took(supernet_file, tmp_path):
    export(supernet_file, tmp_path / "b", heads=(2,))
    export(supernet_file, tmp_path / "b", heads=(2,), input="uint8")
    done = profile(tmp_path / "b", tmp_path / "p", here=Here(), launch=Launch())
    assert {cell.artifact: cell.input for cell in done.cells} == {"h02-fp32": "float32", "h02-fp32-uint8": "uint8"}
    for cell in done.cells:
        assert len(cell.evidence["prepare_s"]) == 5


# ---------------------------------------------------------------- the command line


@pytest.fixture
def virtually(monkeypatch) -> Launch:
    """The command line measures children that are none."""
    launch = Launch()
    module = "hydradeploy.profiler.profile"
    monkeypatch.setattr(f"{module}.profile", lambda *a, **k: real_profile(*a, **k, launch=launch, here=Here()))
    monkeypatch.setattr(f"{module}.plan", lambda *a, **k: plan_of(*a, **k, launch=launch, here=Here()))
    return launch


def test_the_command_takes_backends_types_and_settings(shared_bundle, tmp_path, cli: Cli, abacus, virtually):
    where = ("profile", "--bundle", shared_bundle, "--profiles", tmp_path, "--heads", "2", "--threads", "1")
    how = ("--backend", "onnxruntime,abacus", "--compute-type", "fp32,bf16", "--setting", "hint=throughput,latency")
    ran = cli(*where, *how, "--setting", "beads=stone")
    assert ran.code == 0, ran.err
    assert "left out: h02-fp16: onnxruntime does not compute fp16 artifacts in fp32, bf16 here" in ran.err
    assert "left out: h02-fp16: abacus does not run fp16 here" in ran.err
    found = {(c.backend, c.compute_type, show_settings(c.settings)) for c in read_profiles(tmp_path)[0].profile.cells}
    assert found == {
        ("onnxruntime", "fp32", ""),
        *(("abacus", kind, s) for kind in ("fp32", "bf16") for s in ("beads=stone", "beads=stone, hint=throughput")),
    }
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["artifact", "backend", "compute", "type", "settings", "p50"] in [row[:6] for row in rows]
    assert ["h02-fp32", "abacus", "bf16", "beads=stone,", "hint=throughput"] in [row[:5] for row in rows]
    assert "prepare" in ran.out
    planned = cli(*where, *how, "--dry-run", "--json")
    assert len(json.loads(planned.out)["cells"]) == 5
    assert len(json.loads(planned.out)["left_out"]) == 2


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--precision", "fp16", "--backend", "abacus"], 8, ["abacus does not run fp16 here", "abacus has fp32"]),
        (["--compute-type", "bf16"], 8, ["onnxruntime does not compute in bf16", "onnxruntime has fp32"]),
        (["--precision", "fp32", "--compute-type", "bf16"], 8, ["onnxruntime does not compute in bf16 here"]),
        (
            ["--precision", "fp32,fp16", "--compute-type", "fp32"],
            8,
            ["onnxruntime does not compute in fp32 the artifacts of fp16 here"],
        ),
        (["--setting", "hint"], 2, ["--setting 'hint' is not possible", "hint=throughput"]),
        (["--setting", "hint="], 2, ["is not possible"]),
        (["--setting", "=latency"], 2, ["is not possible"]),
        (["--setting", "hint=latency"], 2, ["no setting 'hint' of onnxruntime"]),
        (["--setting", "hint=slow", "--backend", "abacus"], 2, ["hint cannot be 'slow'", "latency, throughput"]),
        (["--backend", ","], 2, ["names nothing"]),
    ],
)
def test_what_the_command_line_refuses_says_what_there_is(
    shared_bundle, tmp_path, cli: Cli, abacus, virtually, options, code, told
):
    ran = cli("profile", "--bundle", shared_bundle, "--profiles", tmp_path / "profiles", *options)
    assert ran.code == code, ran.err
    assert all(text in ran.err for text in told), ran.err
    assert "hint: " in ran.err
    assert virtually.requests == []
