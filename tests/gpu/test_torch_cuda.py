"""torch on a real GPU: the same answers, one set of weights for all subnets, and a profile with what NVML tells."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hydradeploy.backends import Options, backend, model_of, prepared, run_all
from hydradeploy.errors import ExitCode, MissingError
from tests.conftest import missing

pytestmark = pytest.mark.gpu

# Of the largest logit, by compute type: what rounding every product to 24, 11, 11 and 8 bits may come to.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 6e-2}
MODES = ("graph", "eager")


@pytest.fixture
def runner():
    try:
        return backend("torch-cuda")
    except MissingError as error:
        missing("gpu", error.message)


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_subnet_gives_its_golden_logits_in_every_compute_type(runner, everything, precision, mode):
    golden = everything.golden()
    for artifact in (each for each in everything.manifest.artifacts if each.precision == precision):
        model = model_of(everything, artifact, None)
        images = prepared(golden.images, artifact.input, everything.spec.preprocessing)
        for kind in runner.compute_types(precision):
            with runner.open(model, Options(compute_type=kind, settings={"mode": mode})) as session:
                off = difference(run_all(session, model, images), golden.logits[artifact.name])
                assert off <= max(TOLERANCES[kind], artifact.parity.tolerance), (artifact.name, kind)


def test_int8_is_refused_with_what_there_is(runner, everything):
    for artifact in (each for each in everything.manifest.artifacts if each.precision.startswith("int8")):
        with pytest.raises(MissingError, match="does not run int8") as refused:
            runner.open(model_of(everything, artifact, None), Options())
        assert refused.value.exit_code is ExitCode.MISSING


@pytest.mark.parametrize("mode", MODES)
def test_subnets_in_turns_do_not_disturb_each_other(runner, everything, mode):
    """Their graphs share the memory of what is between input and output."""
    golden = everything.golden()
    artifacts = [each for each in everything.manifest.artifacts if each.precision == "fp32" and each.input == "float32"]
    models = [model_of(everything, each, None) for each in artifacts]
    images = prepared(golden.images, "float32", everything.spec.preprocessing)
    sessions = [runner.open(model, Options(settings={"mode": mode})) for model in models]
    for _ in range(3):
        for session, model, artifact in zip(sessions, models, artifacts, strict=True):
            off = difference(run_all(session, model, images), golden.logits[artifact.name])
            assert off <= TOLERANCES["fp32"], artifact.name
    for session in sessions:
        session.__exit__(None, None, None)


def test_closing_every_session_gives_the_weights_back(runner, everything):
    import gc

    import torch

    artifact = everything.artifact("h04-fp32")
    model = model_of(everything, artifact, None)

    def in_use() -> int:
        gc.collect()
        return torch.cuda.memory_allocated()

    runner.open(model, Options(settings={"mode": "eager"})).__exit__(None, None, None)
    before = in_use()
    for _ in range(5):
        with runner.open(model, Options(settings={"mode": "eager"})):
            assert in_use() > before
    assert in_use() == before


def test_a_profile_of_the_gpu_has_what_nvml_tells(runner, shared_bundle, cli, tmp_path):
    out = tmp_path / "profiles"
    done = cli("profile", "--bundle", shared_bundle, "--profiles", out, "--device", "cuda", "--heads", "4", "--json")
    assert done.code == 0, done.err
    (path,) = out.glob("*.json")
    profile = json.loads(path.read_text())
    assert profile["device"]["kind"] == "cuda"
    assert profile["device"]["memory_bytes"] > 1 << 30
    assert "driver" in json.dumps(profile["conditions"])
    for cell in profile["cells"]:
        assert cell["backend"] == "torch-cuda"
        assert cell.get("error") is None
        assert min(cell["latency_s"]) > 0
        assert cell["memory_bytes"] > 0
    told = json.dumps([cell["evidence"] for cell in profile["cells"]])
    assert "temperature_c.gpu" in told


def test_golden_logits_through_the_command_line(runner, shared_bundle, cli):
    done = cli("verify", "--bundle", shared_bundle, "--backend", "torch-cuda")
    assert done.code == 0, done.err
