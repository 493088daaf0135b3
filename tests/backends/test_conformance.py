"""What every backend must do alike."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from hydradeploy import export, open_bundle
from hydradeploy.backends import BACKEND_MODULES, Options, backend, model_of, run_all
from hydradeploy.bundle import Bundle
from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import InputError, MissingError, UsageError
from tests.conftest import missing

pytestmark = pytest.mark.parametrize("name", sorted(BACKEND_MODULES))


@pytest.fixture
def runner(name):
    try:
        return backend(name)
    except MissingError as error:
        missing(name, error.message)


@pytest.fixture
def opened(shared_bundle) -> Bundle:
    return open_bundle(shared_bundle)


def images(opened: Bundle) -> np.ndarray:
    return normalise(opened.golden().images, opened.spec.preprocessing)


def model(opened: Bundle, runner, artifact: str = "h04-fp32"):
    return model_of(opened, opened.artifact(artifact), runner.dialect)


def test_every_artifact_reproduces_its_golden_logits(runner, opened):
    golden = opened.golden()
    for artifact in opened.manifest.artifacts:
        target = model(opened, runner, artifact.name)
        with runner.open(target, Options()) as session:
            logits = run_all(session, target, images(opened))
        expected = golden.logits[artifact.name]
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= artifact.parity.tolerance * np.abs(expected).max()


def test_logits_are_float32_on_the_host_and_the_callers_own(runner, opened):
    first, second = images(opened)[:1], images(opened)[1:2]
    with runner.open(model(opened, runner), Options()) as session:
        logits = session.run(first)
        kept = logits.copy()
        session.run(second)
        assert logits.dtype == np.float32
        assert np.array_equal(logits, kept)
        logits[:] = 0
        assert np.array_equal(session.run(first), kept)
    assert np.array_equal(first, images(opened)[:1]), "the input is not written to"


def test_a_view_that_is_not_contiguous_gives_the_same_logits(runner, opened):
    image = images(opened)[:1]
    strided = np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not strided.flags.c_contiguous
    with runner.open(model(opened, runner), Options()) as session:
        assert np.array_equal(session.run(strided), session.run(image))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[0],
        lambda x: x[:, :2],
        lambda x: x[:, :, :-1],
        lambda x: x.astype(np.float64),
        lambda x: np.concatenate([x, x]),
        lambda x: x[:0],
    ],
)
def test_another_shape_or_type_is_refused_with_both(runner, opened, change):
    image = images(opened)[:1]
    with runner.open(model(opened, runner), Options()) as session:
        with pytest.raises(InputError, match=r"h04-fp32: images are .* expected float32 \(1, 3, 32, 32\)"):
            session.run(change(image))
        assert session.run(image).shape == (1, 10), "the session survives"


def test_batches_fixed_and_dynamic_agree_with_single_images(runner, supernet_file, tmp_path, opened):
    batch = images(opened)[:3]
    with runner.open(model(opened, runner, "h03-fp32"), Options()) as session:
        single = np.concatenate([session.run(batch[i : i + 1]) for i in range(3)])
    for size in (3, "dynamic"):
        other = export(supernet_file, tmp_path / str(size), heads=(3,), batch=size)
        with runner.open(model(other, runner, "h03-fp32"), Options()) as session:
            together = session.run(batch)
        np.testing.assert_allclose(together, single, atol=1e-5 * np.abs(single).max())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_images_is_run_in_the_batches_the_model_wants(runner, supernet_file, tmp_path, opened, count):
    many = images(opened)[:count]
    other = export(supernet_file, tmp_path / "b", heads=(2,), batch=3)
    target = model(other, runner, "h02-fp32")
    with runner.open(target, Options()) as session:
        logits = run_all(session, target, many)
    expected = opened.golden().logits["h02-fp32"][:count]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_sessions_in_threads_do_not_disturb_each_other(runner, opened):
    batch = images(opened)
    expected = opened.golden().logits
    wrong = []

    def work(artifact: str) -> None:
        target = model(opened, runner, artifact)
        with runner.open(target, Options(threads=1)) as session:
            for _ in range(3):
                logits = run_all(session, target, batch)
                if np.abs(logits - expected[artifact]).max() > 1e-4 * np.abs(expected[artifact]).max():
                    wrong.append(artifact)

    threads = [threading.Thread(target=work, args=(f"h{k:02d}-fp32",)) for k in range(2, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_do_not_change_the_answer_and_are_on_record(runner, opened):
    with runner.open(model(opened, runner), Options(threads=1)) as session:
        one = session.run(images(opened)[:1])
        assert session.facts()["threads"] == "1"
    with runner.open(model(opened, runner), Options()) as session:
        np.testing.assert_allclose(session.run(images(opened)[:1]), one, rtol=1e-5, atol=1e-6)
        assert session.facts()["threads"] == "default"


def test_its_software_is_on_record_with_versions_and_without_loading_it(runner, name):
    """Versions decide how fast it is; asking for them must not cost what loading the runtime costs."""
    found = runner.software()
    assert found
    assert all(isinstance(package, str) and re.search(r"\d+\.\d+", version) for package, version in found.items())
    assert found == runner.software()
    code = f"""
import sys
from hydradeploy.backends import backend
before = set(sys.modules)
print(sorted(backend({name!r}).software().items()))
assert {name!r} not in set(sys.modules) - before
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(sorted(found.items()))


def test_preparing_loads_the_runtime_and_as_often_as_one_likes(runner, opened, name):
    """After it, opening a model imports nothing more, so that what opening takes is what the model takes."""
    runner.prepare()
    runner.prepare()
    with runner.open(model(opened, runner), Options(threads=1)) as session:
        assert session.run(images(opened)[:1]).shape == (1, 10)
    target = model(opened, runner)
    code = f"""
import sys
from pathlib import Path
import numpy as np
from hydradeploy.backends import Model, Options, backend
runner = backend({name!r})
assert {name!r} not in sys.modules
runner.prepare()
before = set(sys.modules)
assert {name!r} in before
with runner.open(Model("x", Path({str(target.graph.resolve())!r}), 1, (3, 32, 32), 10), Options(threads=1)) as session:
    session.run(np.zeros((1, 3, 32, 32), np.float32))
print(sorted(set(sys.modules) - before))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_a_closed_session_does_not_run(runner, opened):
    with runner.open(model(opened, runner), Options()) as session:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        session.run(images(opened)[:1])


def test_a_graph_that_is_no_graph_is_one_clear_error(runner, opened, bundle):
    (bundle / "h04-fp32.onnx").write_bytes(b"not a graph")
    from dataclasses import replace

    broken = replace(model(opened, runner), graph=bundle / "h04-fp32.onnx")
    with pytest.raises(MissingError, match=r"cannot open .*h04-fp32\.onnx"):
        runner.open(broken, Options())


def test_an_unknown_backend_names_those_there_are(name):
    with pytest.raises(UsageError) as refused:
        backend("abacus")
    assert name in str(refused.value.hint)


def test_a_backend_that_is_not_installed_says_so(name, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    module = __import__(BACKEND_MODULES[name], fromlist=["BACKEND"])
    monkeypatch.setattr(module, "find_spec", lambda n: None if n == name else original(n))
    with pytest.raises(MissingError, match=f"{name} is not installed") as refused:
        backend(name)
    assert "pip install" in str(refused.value.hint)
