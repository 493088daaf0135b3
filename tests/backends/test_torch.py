"""torch's own: weights are views of one mapping, threads are given back, and it compiles where there is a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from hydradeploy import export
from hydradeploy.backends import Options, backend, model_of, prepared, run_all
from hydradeploy.backends.torch import views
from hydradeploy.errors import MissingError
from tests.conftest import geometry, write_supernet


@pytest.fixture
def runner():
    return backend("torch")


def model(bundle, name: str = "h04-fp32"):
    return model_of(bundle, bundle.artifact(name), None)


def test_subnets_are_views_of_one_mapping(everything):
    """A smaller subnet's tensor begins where the larger one's does, and has its strides."""
    smaller, larger = views(model(everything, "h03-fp32").weights), views(model(everything).weights)
    table = everything.manifest.weights["supernet-fp32.weights"]
    starts = {larger[name].data_ptr() - table[name].offset for name in larger}
    assert len(starts) == 1, "one mapping"
    for name, tensor in smaller.items():
        assert tensor.untyped_storage().data_ptr() == larger[name].untyped_storage().data_ptr()
        assert tensor.data_ptr() == larger[name].data_ptr()
        assert tensor.stride() == larger[name].stride()
        assert torch.equal(tensor, larger[name][tuple(slice(size) for size in tensor.shape)])
    assert any(not tensor.is_contiguous() for tensor in smaller.values())


def test_ten_subnets_take_no_memory_of_their_own(tmp_path):
    shape = geometry(heads=12, trained_heads=tuple(range(3, 13)), head_dim=32, depth=4)
    path = tmp_path / "bundle"
    found = export(write_supernet(tmp_path / "s.safetensors", shape), path)
    code = """
import sys
from pathlib import Path
import numpy as np
from hydradeploy.backends import Options, backend, model_of
from hydradeploy.bundle import open_bundle

def own() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

opened, runner = open_bundle(Path(sys.argv[1])), backend("torch")
models = [model_of(opened, artifact, None) for artifact in opened.manifest.artifacts]
image = np.zeros((1, 3, 32, 32), np.float32)
with runner.open(models[-1], Options(threads=1)) as session:
    session.run(image)  # what torch takes once
    before = own()
    sessions = [runner.open(model, Options(threads=1)) for model in models]
    for session in sessions:
        session.run(image)
    print(own() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    copies = sum(artifact.parameters * 4 for artifact in found.manifest.artifacts)
    assert copies > 100 * 2**20
    assert int(ran.stdout) < copies / 50


def test_each_session_runs_with_its_threads_and_the_last_one_gives_them_back(runner, everything, monkeypatch):
    ran_with = []
    original = torch.inference_mode
    monkeypatch.setattr(torch, "inference_mode", lambda: ran_with.append(torch.get_num_threads()) or original())
    image, before = np.zeros((1, 3, 32, 32), np.float32), torch.get_num_threads()
    first = runner.open(model(everything), Options(threads=before + 1))
    second = runner.open(model(everything, "h03-fp32"), Options(threads=before + 2))
    third = runner.open(model(everything, "h03-fp32"), Options())
    for session in (first, second, first, third):
        session.run(image)
    assert ran_with == [before + 1, before + 2, before + 1, before]
    first.run(image)
    for session in (first, third, second, second):
        session.__exit__(None, None, None)
    assert torch.get_num_threads() == before


def test_a_session_that_cannot_be_opened_keeps_no_threads(runner, everything, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match="torch compiles with no-such-compiler, which is not installed") as refused:
        runner.open(model(everything), Options(threads=before + 1, settings={"mode": "compiled"}))
    assert "mode=eager" in str(refused.value.hint)
    with runner.open(model(everything), Options(threads=before + 1)) as session:
        session.run(np.zeros((1, 3, 32, 32), np.float32))
    assert torch.get_num_threads() == before


def test_a_compiler_that_fails_is_one_sentence_with_its_reason(runner, everything, monkeypatch):
    """A compiler that is there and cannot: without headers, say."""

    def refuse(forward, **_: object):
        def run(*_: object):
            raise RuntimeError("Python.h: No such file or directory\nand much more")

        return run

    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(MissingError, match=r"^torch cannot compile h04-fp32: Python\.h: No such file or directory$"):
        runner.open(model(everything), Options(settings={"mode": "compiled"}))


@pytest.mark.parametrize("artifact", ["h04-fp32", "h04-fp16", "h04-bf16"])
@pytest.mark.parametrize("suffix", ["", "-uint8"])
def test_narrow_types_are_computed_in_where_the_processor_has_them(runner, everything, monkeypatch, artifact, suffix):
    """torch computes in them everywhere, where the processor has no such products one number after the other."""
    monkeypatch.setattr("hydradeploy.backends.torch._narrow", lambda: ("bf16", "fp16"))
    found = everything.artifact(artifact + suffix)
    target, golden = model(everything, found.name), everything.golden()
    kinds = runner.compute_types(found.precision)
    assert kinds == {"fp32": ("fp32", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",)}[found.precision]
    for kind in kinds:
        with runner.open(target, Options(threads=1, compute_type=kind)) as session:
            images = prepared(golden.images, found.input, everything.spec.preprocessing)
            logits = run_all(session, target, images)
            assert session.facts()["compute_type"] == kind
            assert session.facts()["weights"] == ("mapped" if kind == found.precision else f"a copy in {kind}")
        allowed = everything.artifact(f"h04-{kind}").parity.tolerance
        expected = golden.logits[found.name]
        assert np.abs(logits - expected).max() <= allowed * np.abs(expected).max()


def test_narrow_types_are_left_out_where_the_processor_lacks_them(runner, monkeypatch):
    monkeypatch.setattr("hydradeploy.backends.torch._narrow", lambda: ())
    assert [runner.compute_types(name) for name in ("fp32", "fp16", "bf16")] == [("fp32",), (), ()]


def test_int8_is_left_to_others(runner):
    assert runner.compute_types("int8") == runner.compute_types("int8dyn") == ()


def test_graphs_that_carry_their_weights_are_refused_with_what_would_do(runner, supernet_file, tmp_path):
    found = export(supernet_file, tmp_path / "alone", heads=(3,), standalone=True)
    with pytest.raises(MissingError, match="torch computes from a weights file") as refused:
        runner.open(model(found, "h03-fp32"), Options())
    assert "--standalone" in str(refused.value.hint)


def test_a_weights_file_that_was_replaced_is_mapped_anew(runner, bundle, everything):
    from hydradeploy.bundle import open_bundle

    target = model(open_bundle(bundle))
    image = np.ones((1, 3, 32, 32), np.float32)
    with runner.open(target, Options(threads=1)) as session:
        before = session.run(image)
        file = target.weights.path
        other = file.with_suffix(".new")
        other.write_bytes(bytes(file.stat().st_size))
        other.replace(file)
        with runner.open(target, Options(threads=1)) as zeros:
            assert not zeros.run(image).any()
        assert np.array_equal(session.run(image), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its compiler uses what torch has deprecated
def test_what_is_compiled_computes_the_same_and_more_than_eight_are(runner, tmp_path):
    """torch by itself stops compiling at eight, in silence."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    shape = geometry(heads=10, trained_heads=tuple(range(1, 11)), depth=1)
    found = export(write_supernet(tmp_path / "s.safetensors", shape), tmp_path / "bundle")
    images = prepared(found.golden().images, "float32", found.spec.preprocessing)
    for artifact in found.manifest.artifacts:
        target = model(found, artifact.name)
        with runner.open(target, Options(threads=1, settings={"mode": "compiled"})) as session:
            logits = run_all(session, target, images)
            assert session.facts()["mode"] == "compiled"
        expected = found.golden().logits[artifact.name]
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
