"""What every backend must do alike: those of the processor always, those of a GPU where the tests for one are run."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from hydradeploy import export, open_bundle
from hydradeploy.backends import BACKEND_MODULES, PRECISION_NAMES, Options, backend, model_of, prepared, run_all
from hydradeploy.bundle import Bundle
from hydradeploy.data.preprocess import normalise
from hydradeploy.errors import ExitCode, InputError, MissingError, UsageError
from tests.conftest import missing

# Their modules; on a GPU it is the runtime itself that is asked whether there is one, and so loaded.
PACKAGES = {"torch-cuda": "torch", "onnxruntime-cuda": "onnxruntime", "tensorrt-rtx": "tensorrt_rtx"}
ON_GPU = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "torch-cuda")


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu if n in ON_GPU else ()) for n in sorted(BACKEND_MODULES)])
def name(request):
    return request.param


@pytest.fixture
def runner(name):
    try:
        return backend(name)
    except MissingError as error:
        # TensorRT is not needed for the tests on a GPU to mean something, a GPU is.
        missing("gpu" if name.endswith("-cuda") else name, error.message)


@pytest.fixture
def opened(shared_bundle) -> Bundle:
    return open_bundle(shared_bundle)


def images(opened: Bundle) -> np.ndarray:
    return normalise(opened.golden().images, opened.spec.preprocessing)


def model(opened: Bundle, runner, artifact: str = "h04-fp32"):
    return model_of(opened, opened.artifact(artifact), runner.dialect)


def off(bundle: Bundle, artifact, logits) -> float:
    """The largest difference from the golden logits, of what the artifact may differ by."""
    expected = bundle.golden().logits[artifact.name]
    assert logits.shape == expected.shape
    return float(np.abs(logits - expected).max() / np.abs(expected).max() / artifact.parity.tolerance)


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_every_artifact_reproduces_its_golden_logits_or_is_refused_with_what_would_run(runner, everything, precision):
    types = runner.compute_types(precision)
    for artifact in (found for found in everything.manifest.artifacts if found.precision == precision):
        target = model(everything, runner, artifact.name)
        if not types:
            with pytest.raises(MissingError, match=f"{runner.name} does not run {precision} here") as refused:
                runner.open(target, Options())
            assert refused.value.exit_code is ExitCode.MISSING
            has = [name for name in PRECISION_NAMES if runner.compute_types(name)]
            assert refused.value.hint == f"it has {', '.join(has)}"
            continue
        pixels = prepared(everything.golden().images, artifact.input, everything.spec.preprocessing)
        with runner.open(target, Options(threads=1)) as session:
            assert off(everything, artifact, run_all(session, target, pixels)) <= 1
            assert session.facts()["compute_type"] == types[0]


def test_it_runs_fp32_and_that_in_fp32_by_default(runner):
    assert runner.compute_types("fp32")[0] == "fp32"


def test_every_compute_type_is_taken_and_on_record(runner, everything):
    artifact, narrow = everything.artifact("h04-fp32"), everything.artifact("h04-bf16")
    target = model(everything, runner)
    for kind in runner.compute_types("fp32"):
        with runner.open(target, Options(threads=1, compute_type=kind)) as session:
            assert session.facts()["compute_type"] == kind
            allowed = artifact if kind == "fp32" else narrow
            expected = everything.golden().logits[artifact.name]
            logits = run_all(session, target, images(everything))
            assert np.abs(logits - expected).max() <= allowed.parity.tolerance * np.abs(expected).max()


def test_a_compute_type_it_lacks_is_refused_with_those_it_has(runner, everything):
    with pytest.raises(MissingError, match=f"{runner.name} does not compute fp32 artifacts in fp8 here") as refused:
        runner.open(model(everything, runner), Options(compute_type="fp8"))
    assert refused.value.hint == f"it has {', '.join(runner.compute_types('fp32'))}"


def test_every_setting_is_taken_is_on_record_and_leaves_the_answer(runner, opened):
    with runner.open(model(opened, runner), Options(threads=1)) as session:
        expected = session.run(images(opened)[:1])
        defaults = {name: session.facts()[name] for name in runner.settings}
    assert defaults == {name: values[0] for name, values in runner.settings.items()}
    for name, values in runner.settings.items():
        for value in values:
            if value == "compiled":  # takes long, has a test of its own
                continue
            with runner.open(model(opened, runner), Options(threads=1, settings={name: value})) as session:
                np.testing.assert_allclose(session.run(images(opened)[:1]), expected, rtol=1e-4, atol=1e-5)
                assert {key: session.facts()[key] for key in runner.settings} == defaults | {name: value}


def test_a_setting_or_a_value_it_does_not_know_is_refused_with_those_it_knows(runner, opened):
    with pytest.raises(UsageError, match="has no setting 'colour'") as refused:
        runner.open(model(opened, runner), Options(settings={"colour": "red"}))
    assert refused.value.hint == f"it has {', '.join(runner.settings)}"
    for name, values in runner.settings.items():
        with pytest.raises(UsageError, match=f"{name} cannot be 'sideways'") as refused:
            runner.open(model(opened, runner), Options(settings={name: "sideways"}))
        assert refused.value.hint == f"one of {', '.join(values)}"


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


def test_several_callers_of_one_session_each_have_their_own_logits(runner, opened):
    """As `profile --concurrency` calls it."""
    batch, target, wrong = images(opened), model(opened, runner), []
    with runner.open(target, Options(threads=1)) as session:
        expected = run_all(session, target, batch)

        def call(first: int) -> None:
            try:
                for at in range(first, first + 20):
                    logits = session.run(batch[at % len(batch)][None])
                    np.testing.assert_allclose(logits[0], expected[at % len(batch)], rtol=1e-4, atol=1e-4)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


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


def test_threads_do_not_change_the_answer(runner, opened):
    with runner.open(model(opened, runner), Options(threads=1)) as session:
        one = session.run(images(opened)[:1])
    with runner.open(model(opened, runner), Options()) as session:
        np.testing.assert_allclose(session.run(images(opened)[:1]), one, rtol=1e-5, atol=1e-6)


def test_threads_are_on_record_where_a_runtime_is_given_them(runner, opened):
    ignored = runner.name in ("tensorrt", "tensorrt-rtx", "torch-cuda")
    for threads, told in ((1, "1"), (None, "default")):
        with runner.open(model(opened, runner), Options(threads=threads)) as session:
            assert session.facts().get("threads") == (None if ignored else told)


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
assert {name in ON_GPU} or {name!r} not in set(sys.modules) - before
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
    code = f"""
import sys
from pathlib import Path
import numpy as np
from hydradeploy.backends import Options, backend, model_of
from hydradeploy.bundle import open_bundle
runner = backend({name!r})
assert {name in ON_GPU} or {name!r} not in sys.modules
opened = open_bundle(Path({str(opened.path.resolve())!r}))
target = model_of(opened, opened.artifact("h04-fp32"), runner.dialect)
runner.prepare()
before = set(sys.modules)
assert {PACKAGES.get(name, name)!r} in before
with runner.open(target, Options(threads=1)) as session:
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


def test_a_file_that_is_none_of_ours_is_one_clear_error(runner, opened, bundle):
    broken = model(open_bundle(bundle), runner)
    file = broken.graph or broken.weights.path
    file.write_bytes(b"not a graph")
    with pytest.raises(MissingError, match=rf"{runner.name} cannot open .*{re.escape(file.name)}: .*\w"):
        runner.open(broken, Options())


@pytest.mark.parametrize("name", sorted(BACKEND_MODULES))
def test_an_unknown_backend_names_those_there_are(name):
    with pytest.raises(UsageError) as refused:
        backend("abacus")
    assert name in str(refused.value.hint)


# tests/backends/test_tensorrt.py has it of TensorRT.
@pytest.mark.parametrize("name", sorted(name for name in BACKEND_MODULES if not name.startswith("tensorrt")))
def test_a_backend_that_is_not_installed_says_so(name, monkeypatch):
    import importlib.util

    original, package = importlib.util.find_spec, name.removesuffix("-cuda")
    module = __import__(BACKEND_MODULES[name], fromlist=["BACKEND"])
    monkeypatch.setattr(module, "find_spec", lambda n: None if n == package else original(n))
    with pytest.raises(MissingError, match=f"{package} is not installed") as refused:
        backend(name)
    hints = {
        "onnxruntime": "pip install 'hydradeploy[ort]'",
        "openvino": "pip install 'hydradeploy[openvino]'",
        "torch": "pip install 'hydradeploy[export]'",
        "torch-cuda": "on a machine with an NVIDIA GPU: a build of torch for the GPU: https://pytorch.org/get-started/locally",
        "onnxruntime-cuda": "on a machine with an NVIDIA GPU: pip install 'hydradeploy[cuda]'",
    }
    assert refused.value.hint == hints[name]
