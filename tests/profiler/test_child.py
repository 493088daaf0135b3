"""Children that are real processes: of a real bundle, and with a runtime that misbehaves as it is told."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hydradeploy import open_bundle
from hydradeploy.backends import backend, model_of
from hydradeploy.errors import MissingError
from hydradeploy.profiler.child import Request, spawn
from hydradeploy.profiler.sampling import Sampling
from tests.conftest import missing

SAMPLING = Sampling(warmup=2, warmup_s=0.0, samples=7, seconds=0.0, at_most=7)


@pytest.fixture
def request_of(shared_bundle, tmp_path) -> Callable[..., Request]:
    """A request for an artifact of a bundle."""
    np.save(tmp_path / "batches.npy", np.random.default_rng(0).standard_normal((3, 1, 3, 32, 32), dtype=np.float32))

    def make(name: str = "h02-fp32", bundle: Path = shared_bundle, **changes: object) -> Request:
        opened = open_bundle(bundle, "manifest")
        found = model_of(opened, opened.artifact(name), backend().dialect)
        made = Request(
            backend="onnxruntime",
            name=found.name,
            graph=str(found.graph),
            batch=found.batch,
            image_shape=found.image_shape,
            classes=found.classes,
            extents=tuple((str(path), offset, length) for path, offset, length in found.extents),
            threads=1,
            batches=str(tmp_path / "batches.npy"),
            sampling=SAMPLING,
        )
        return msgspec.structs.replace(made, **changes)

    return make


def test_a_child_measures_what_was_asked_for_and_nothing_else(request_of):
    found = spawn(request_of())
    assert found.load_s > 0
    assert found.first_s > 0
    assert found.warmup == 2
    assert len(found.latency_s) == 7
    assert all(0 < value < 10 for value in found.latency_s)
    assert found.memory_bytes is not None
    assert 0 < found.memory_bytes < 1 << 30
    assert found.facts["threads"] == "1"


@pytest.mark.parametrize("damage", [b"", b"not a graph"])
def test_a_damaged_graph_is_named(request_of, bundle, damage):
    (bundle / "h03-fp32.onnx").write_bytes(damage)
    with pytest.raises(MissingError, match=r"^h03-fp32: .* exit 8: onnxruntime cannot .*h03-fp32\.onnx"):
        spawn(request_of("h03-fp32", bundle))


def test_a_graph_that_is_not_there_is_named(request_of, tmp_path):
    with pytest.raises(MissingError, match=r"^h02-fp32: .*cannot open .*gone\.onnx"):
        spawn(request_of(graph=str(tmp_path / "gone.onnx")))


def test_images_the_model_does_not_take_are_the_reason(request_of, tmp_path):
    np.save(tmp_path / "batches.npy", np.zeros((2, 2, 3, 32, 32), np.float32))
    with pytest.raises(MissingError, match=r"exit 11: h02-fp32: images are .*expected float32 \(1, 3, 32, 32\)"):
        spawn(request_of())


def test_images_that_cannot_be_read_are_the_reason(request_of, tmp_path):
    (tmp_path / "batches.npy").unlink()
    with pytest.raises(MissingError, match=r"^h02-fp32: the measuring process ended with exit 1: .*batches\.npy"):
        spawn(request_of())


STAND_IN = """
    import os, signal, sys, time
    import numpy as np

    __version__ = "0"

    class SessionOptions:
        pass

    class InferenceSession:
        def __init__(self, graph, settings, providers):
            {opening}

        def run(self, names, inputs):
            {running}
            return [np.zeros((1, 10), np.float32)]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[..., None]:
    """Puts a runtime in the place of onnxruntime that does so when it opens and when it runs."""

    def make(running: str = "pass", opening: str = "pass", outside: str = "") -> None:
        package = tmp_path / "packages" / "onnxruntime"
        package.mkdir(parents=True, exist_ok=True)
        text = textwrap.dedent(STAND_IN).format(opening=opening, running=running) + outside
        (package / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))

    return make


def test_a_child_that_is_killed_is_told_by_its_signal(request_of, stand_in):
    stand_in("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(MissingError, match=r"^h02-fp32: the measuring process ended with signal 9: it said nothing$"):
        spawn(request_of())


def test_the_last_words_of_a_child_that_crashes_are_told(request_of, stand_in):
    stand_in("print('illegal instruction', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(MissingError, match=r"ended with signal 11: illegal instruction$"):
        spawn(request_of())


def test_words_that_are_no_text_are_told_as_well_as_can_be(request_of, stand_in):
    stand_in(r"os.write(2, b'no \xff memory\n'); os._exit(3)")
    with pytest.raises(MissingError, match=r"ended with exit 3: no \ufffd memory$"):
        spawn(request_of())


def test_an_exception_of_the_runtime_is_the_reason(request_of, stand_in):
    stand_in(opening="raise RuntimeError('no kernel for that\\nand much more')")
    with pytest.raises(MissingError, match=r"exit 8: onnxruntime cannot open .*: no kernel for that$"):
        spawn(request_of())


@pytest.mark.parametrize("leaving", ["os._exit(0)", "sys.exit(0)"])
def test_a_child_that_leaves_without_an_answer_is_an_error_of_its_own(request_of, stand_in, leaving):
    stand_in(leaving)
    with pytest.raises(MissingError, match=r"^h02-fp32: the measuring process ended without an answer$"):
        spawn(request_of())


def test_an_interpreter_that_is_none_is_an_error_and_no_crash(request_of, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(MissingError, match="ended without an answer"):
        spawn(request_of())


@pytest.mark.parametrize("noise", ["print('noise', flush=True)", "os.write(1, b'noise')", "print('{}')"])
def test_what_a_runtime_prints_does_not_get_into_the_answer(request_of, stand_in, noise):
    stand_in(noise, opening=noise, outside=f"\nimport atexit\natexit.register(lambda: {noise})\n{noise}\n")
    assert len(spawn(request_of()).latency_s) == 7


def test_what_an_installation_prints_when_python_starts_does_not_get_into_the_answer(request_of, stand_in, tmp_path):
    stand_in()
    (tmp_path / "packages" / "sitecustomize.py").write_text("print('welcome, no newline', end='', flush=True)")
    assert len(spawn(request_of()).latency_s) == 7


def test_a_runtime_that_floods_stderr_does_not_block(request_of, stand_in):
    stand_in("os.write(2, b'warning ' * 20000)")
    assert len(spawn(request_of()).latency_s) == 7


def test_samples_are_the_seconds_the_runtime_took(request_of, stand_in):
    stand_in("time.sleep(0.03)", opening="time.sleep(0.2)")
    found = spawn(request_of())
    assert 0.2 <= found.load_s < 2
    assert found.first_s >= 0.03
    assert min(found.latency_s) >= 0.03
    assert sorted(found.latency_s)[3] < 1


HOLD = "self.held = np.ones({} << 20, np.uint8)"


def test_memory_is_what_the_session_takes(request_of, stand_in):
    """96 MiB when it opens and 32 MiB more for a moment in each run; the peak is kept."""
    stand_in("np.ones(32 << 20, np.uint8).sum()", opening=HOLD.format(96))
    taken = spawn(request_of()).memory_bytes
    if taken is None:
        missing("VmHWM", "this kernel tells no peak of resident memory")
    assert 125 << 20 < taken < 140 << 20


def test_what_the_runtime_takes_without_a_model_does_not_count(request_of, stand_in):
    stand_in(outside="\nheld = np.ones(96 << 20, np.uint8)\n")
    taken = spawn(request_of()).memory_bytes
    if taken is None:
        missing("VmHWM", "this kernel tells no peak of resident memory")
    assert taken < 16 << 20


def test_the_memory_of_the_parent_is_not_the_childs(request_of, stand_in):
    stand_in(opening=HOLD.format(64))
    before = spawn(request_of()).memory_bytes
    if before is None:
        missing("VmHWM", "this kernel tells no peak of resident memory")
    held = np.ones(300 << 20, np.uint8)
    after = spawn(request_of()).memory_bytes
    assert held[-1] == 1
    assert abs(after - before) < 8 << 20
    assert 60 << 20 < after < 80 << 20


def test_a_child_is_fresh(request_of, stand_in, tmp_path):
    stand_in(outside=f"\nopen({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}} {{os.getppid()}}\\n')\n")
    for _ in range(2):
        spawn(request_of())
    seen = [tuple(map(int, line.split())) for line in (tmp_path / "pids").read_text().splitlines()]
    assert len(set(seen)) == 2
    assert {parent for _, parent in seen} == {os.getpid()}


@pytest.mark.parametrize("name", ["numpy.py", "hydradeploy.py"])
def test_a_file_in_the_working_directory_does_not_stand_in_for_a_module(request_of, tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path / "work")
    assert len(spawn(request_of()).latency_s) == 7


def test_paths_with_spaces_and_other_letters_reach_the_child(request_of, bundle, tmp_path):
    moved = bundle.rename(tmp_path / "büñdle 'of' \"mine\" 模型")
    assert len(spawn(request_of("h02-fp16", moved)).latency_s) == 7


def test_settings_of_the_environment_reach_the_child(request_of, stand_in, monkeypatch):
    """Such as OMP_NUM_THREADS, on which some runtimes' speed depends."""
    monkeypatch.setenv("HYDRADEPLOY_TEST_SETTING", "kept")
    stand_in(opening="assert os.environ['HYDRADEPLOY_TEST_SETTING'] == 'kept'")
    assert len(spawn(request_of()).latency_s) == 7
