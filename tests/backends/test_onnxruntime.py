"""ONNX Runtime's own: what of the settings reaches it, and what it must not do to the process it runs in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hydradeploy.backends import Options, backend, model_of
from tests.conftest import require


@pytest.fixture(autouse=True)
def runner():
    require("onnxruntime")
    return backend("onnxruntime")


@pytest.fixture
def asked(monkeypatch):
    """The options that sessions were made with."""
    import onnxruntime

    seen = []
    original = onnxruntime.InferenceSession

    def made(path: str, options, **rest: object):
        seen.append(options)
        return original(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    return seen


def entry(options, name: str) -> str | None:
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:
        return None


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_the_user_has_an_opinion(given, kept):
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    code = (
        "import os; from hydradeploy.backends import backend; backend('onnxruntime').prepare();"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout == f"{kept}\n", ran.stderr


def test_settings_reach_the_runtime(runner, everything, asked):
    import onnxruntime

    target = model_of(everything, everything.artifact("h03-fp32"), "ort")
    for settings in ({}, {"spinning": "off", "arena": "off", "optimisation": "basic"}):
        with runner.open(target, Options(threads=1, settings=settings)):
            pass
    default, chosen = asked
    assert default.enable_cpu_mem_arena
    assert entry(default, "session.intra_op.allow_spinning") == "1"
    assert default.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert not chosen.enable_cpu_mem_arena
    assert entry(chosen, "session.intra_op.allow_spinning") == "0"
    assert chosen.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC


@pytest.mark.parametrize(
    ("machine", "has", "types"),
    [
        ("aarch64", {"asimd", "bf16"}, ("fp32", "bf16")),
        ("aarch64", {"asimd", "asimddp"}, ("fp32",)),
        ("x86_64", {"avx512_bf16", "bf16"}, ("fp32",)),
    ],
)
def test_products_in_bf16_are_those_of_arm_processors_that_have_them(
    runner, everything, asked, monkeypatch, machine, has, types
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("hydradeploy.backends.onnxruntime.features", lambda: frozenset(has))
    assert runner.compute_types("fp32") == types
    assert runner.compute_types("bf16") == types, "its weights are widened when they are loaded"
    assert runner.compute_types("int8") == ("int8",)
    for name in types:
        target = model_of(everything, everything.artifact("h03-fp32"), "ort")
        with runner.open(target, Options(threads=1, compute_type=name)):
            assert entry(asked[-1], "mlas.enable_gemm_fastmath_arm64_bfloat16") == ("1" if name == "bf16" else None)
