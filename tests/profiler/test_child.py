"""Children that are real processes: of a real bundle, and with a runtime that misbehaves as it is told."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hydradeploy import export, open_bundle
from hydradeploy.errors import MissingError
from hydradeploy.profiler.child import Request, spawn
from hydradeploy.profiler.sampling import Sampling
from hydradeploy.profiler.watched import oom_kills
from tests.conftest import geometry, missing, write_supernet

SAMPLING = Sampling(warmup=2, warmup_s=0.0, samples=7, seconds=0.0, at_most=7)


@pytest.fixture
def request_of(shared_bundle, tmp_path) -> Callable[..., Request]:
    """A request for an artifact of a bundle."""
    np.save(tmp_path / "batches.npy", np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32, 3), dtype=np.uint8))

    def make(name: str = "h02-fp32", bundle: Path = shared_bundle, **changes: object) -> Request:
        artifact = open_bundle(bundle, "manifest").artifact(name)
        made = Request(
            bundle=str(bundle),
            artifact=name,
            graph_sha256=artifact.graph_sha256,
            backend="onnxruntime",
            compute_type=artifact.precision,
            settings={},
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


def test_a_child_leaves_nothing_where_the_user_lives(request_of, tmp_path, monkeypatch):
    """ONNX Runtime has telemetry: a database in the home directory, a file among the temporary ones."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, place in (("HOME", tmp_path / "home"), ("TMPDIR", tmp_path / "home" / "tmp")):
        place.mkdir()
        monkeypatch.setenv(name, str(place))
    spawn(request_of())
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("damage", [b"", b"not a graph"])
def test_a_damaged_graph_is_named(request_of, bundle, damage):
    (bundle / "h03-fp32.onnx").write_bytes(damage)
    with pytest.raises(MissingError, match=r"^h03-fp32: .* exit 8: onnxruntime cannot .*h03-fp32\.onnx"):
        spawn(request_of("h03-fp32", bundle))


def test_a_graph_that_is_not_there_is_named(request_of, bundle):
    (bundle / "h02-fp32.onnx").unlink()
    with pytest.raises(MissingError, match=r"^h02-fp32: .*cannot open .*h02-fp32\.onnx"):
        spawn(request_of(bundle=bundle))


def test_a_bundle_that_was_exported_again_meanwhile_is_not_measured(request_of, bundle, supernet_file):
    """Graphs of another batch size have the same names."""
    asked = request_of(bundle=bundle)
    export(supernet_file, bundle, heads=(2,), batch=2, force=True)
    with pytest.raises(MissingError, match=r"^h02-fp32: .* exit 10: .*bundle: was exported again"):
        spawn(asked)


def test_pixels_are_what_an_artifact_of_uint8_input_takes_and_preparing_them_is_no_work(request_of, tmp_path):
    export(write_supernet(tmp_path / "s", geometry(image_size=256)), tmp_path / "b", heads=(2,), input="uint8")
    export(tmp_path / "s", tmp_path / "b", heads=(2,))
    np.save(tmp_path / "batches.npy", np.zeros((2, 1, 256, 256, 3), np.uint8))
    pixels, scaled = (spawn(request_of(name, tmp_path / "b")) for name in ("h02-fp32-uint8", "h02-fp32"))
    assert 0 <= pixels.prepare_s < scaled.prepare_s < min(scaled.latency_s), "it is a part of a call"
    assert len(pixels.latency_s) == 7


def test_images_the_model_does_not_take_are_the_reason(request_of, tmp_path):
    np.save(tmp_path / "batches.npy", np.zeros((2, 2, 32, 32, 3), np.uint8))
    with pytest.raises(MissingError, match=r"exit 11: h02-fp32: images are .*expected float32 \(1, 3, 32, 32\)"):
        spawn(request_of())


def test_images_that_cannot_be_read_are_the_reason(request_of, tmp_path):
    (tmp_path / "batches.npy").unlink()
    with pytest.raises(MissingError, match=r"^h02-fp32: the measuring process ended with exit 1: .*batches\.npy"):
        spawn(request_of())


STAND_IN = """
    import os, signal, subprocess, sys, time
    import numpy as np

    __version__ = "0"

    class SessionOptions:
        def add_session_config_entry(self, name, value):
            pass

    class GraphOptimizationLevel:
        ORT_ENABLE_ALL = ORT_DISABLE_ALL = ORT_ENABLE_BASIC = ORT_ENABLE_EXTENDED = 0

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
    with pytest.raises(MissingError, match=r"^h02-fp32: the measuring process ended with SIGKILL: it said nothing$"):
        spawn(request_of())


def test_the_last_words_of_a_child_that_crashes_are_told(request_of, stand_in):
    stand_in("print('illegal instruction', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(MissingError, match=r"ended with SIGSEGV: illegal instruction$"):
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


def test_the_window_of_the_samples_is_on_the_clock_of_this_process_too(request_of):
    before = time.perf_counter()
    found = spawn(request_of())
    assert before < found.started_s < found.ended_s < time.perf_counter()
    assert found.ended_s - found.started_s >= sum(found.latency_s) * 0.999


def sampling(**changes: object) -> Sampling:
    return msgspec.structs.replace(SAMPLING, **changes)


def test_several_callers_of_a_real_artifact_give_their_samples(request_of):
    how = sampling(warmup=30, samples=60, at_most=60, concurrency=3)
    found = spawn(request_of(sampling=how))
    assert len(found.latency_s) == 60
    assert found.steady is not None
    assert found.ended_s > found.started_s
    assert 0 < min(found.latency_s) <= max(found.latency_s) <= found.ended_s - found.started_s


def test_switches_from_another_artifact_are_measured_and_its_memory_is_not(request_of):
    found = spawn(request_of(other="h06-fp32", sampling=sampling(switches=4)))
    assert len(found.switch_s) == 4
    assert all(0 < value < 10 for value in found.switch_s)
    assert spawn(request_of(sampling=sampling(switches=4))).switch_s == ()


def test_calls_on_a_schedule_are_on_that_schedule(request_of):
    """Ten calls at 50 Hz: the last is due nine periods after the first."""
    found = spawn(request_of(sampling=sampling(samples=10, at_most=10, pace_hz=50.0)))
    assert len(found.latency_s) == 10
    assert found.ended_s - found.started_s >= 9 / 50


FAST = """
import time
real = time.perf_counter
time.perf_counter = lambda: 50 * real()
"""


@pytest.mark.parametrize("answers", [None, [False, False, True]], ids=["unasked", "asked"])
def test_a_sustained_run_ends_when_calls_are_steady_and_the_parent_says_so(request_of, stand_in, tmp_path, answers):
    """On a clock that runs fifty times as fast, so that minutes are seconds."""
    stand_in("time.sleep(0.005)")
    (tmp_path / "packages" / "sitecustomize.py").write_text(FAST)
    left = list(answers or ())
    how = sampling(samples=5, at_most=5, settle_s=1e5, sustain=True)
    started = time.monotonic()
    found = spawn(request_of(sampling=how), patience_s=120, settled=None if answers is None else lambda: left.pop(0))
    assert found.settled_from is not None
    assert len(found.latency_s) > found.settled_from + 30
    assert left == []
    assert answers is None or time.monotonic() - started > 2, "it is asked once a second"


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def written(path: Path) -> str:
    """The content of a file, once it is there."""
    for _ in range(600):
        with suppress(FileNotFoundError):
            if text := path.read_text():
                return text
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_a_child_that_hangs_is_killed_and_its_last_words_are_told(request_of, stand_in, tmp_path):
    stand_in()
    (tmp_path / "packages" / "sitecustomize.py").write_text(
        f"import os, time; os.write(2, b'loading\\n'); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    for patience_s in (0.5, 4, 32):  # as long as it takes to say them
        with pytest.raises(MissingError, match=f"^h02-fp32: no answer within {patience_s:g} s: ") as error:
            spawn(request_of(), patience_s=patience_s)
        if (tmp_path / "pid").exists():
            break
    assert error.value.message.endswith(": loading")
    with pytest.raises(ProcessLookupError):
        os.kill(int(written(tmp_path / "pid")), 0)


def test_a_child_that_has_closed_its_pipes_and_hangs_is_killed_too(request_of, stand_in):
    stand_in(outside="\nos.closerange(0, 200); time.sleep(600)\n")
    with pytest.raises(MissingError, match=r"no answer within 1 s: it said nothing$"):
        spawn(request_of(), patience_s=1)


def test_an_interrupt_kills_the_child_and_waits_for_it(request_of, stand_in, tmp_path):
    stand_in(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    pids = []

    def interrupt() -> bool:
        pids.append(int(written(tmp_path / "pid")))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spawn(request_of(), settled=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"])
def test_what_a_child_started_dies_with_it_and_does_not_keep_the_parent_waiting(request_of, stand_in, tmp_path, end):
    """Though it holds the child's pipes."""
    stand_in(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); {end}")
    started = time.monotonic()
    with pytest.raises(MissingError, match="ended with"):
        spawn(request_of())
    assert time.monotonic() - started < 300
    assert gone(int((tmp_path / "pid").read_text()))


PARENT = """
import sys, msgspec
from pathlib import Path
from hydradeploy.profiler.child import Request, spawn
spawn(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Request))
"""


def test_a_child_dies_with_its_parent(request_of, stand_in, tmp_path):
    stand_in(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    (tmp_path / "request").write_bytes(msgspec.json.encode(request_of()))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "request")])
    try:
        child = int(written(tmp_path / "pid"))
    finally:
        parent.kill()
        parent.wait()
    assert gone(child)


def test_a_child_of_a_thread_is_as_good_as_any(request_of):
    """It dies with the thread that waits for it, which outlives it."""
    found = []
    thread = threading.Thread(target=lambda: found.append(spawn(request_of())))
    thread.start()
    thread.join()
    assert len(found[0].latency_s) == 7


def test_last_words_are_told_after_megabytes_of_others(request_of, stand_in):
    stand_in("[os.write(2, b'warning\\n' * 1000) for _ in range(1000)]; os.write(2, b'out of luck\\n'); os.abort()")
    with pytest.raises(MissingError, match=r"ended with SIGABRT: out of luck$"):
        spawn(request_of())


def test_the_parent_uses_no_processor_time_while_it_waits(request_of, stand_in):
    """Under a hundredth of the time it waits, also while it asks whether temperatures have settled."""
    stand_in("time.sleep(0.3)")
    used = []

    def settled() -> bool:
        if not used:  # asked first when the child has been started
            used.extend([time.thread_time(), time.monotonic()])
        return False

    spawn(request_of(), settled=settled)
    assert time.thread_time() - used[0] < 0.01 * (time.monotonic() - used[1])


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 96 MiB; whoever is written into its cgroup.procs is in it."""
    tops = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    top = next((top for top in tops if any(top.glob("memory.*")) or (top / "cgroup.controllers").exists()), None)
    if top is None:
        missing("cgroup", "no memory controller here")
    group = top / f"hydradeploy-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        missing("cgroup", f"this kernel lets us make no control group ({error.strerror})")
    try:
        limits = [group / name for name in ("memory.limit_in_bytes", "memory.max")]
        limit = next((path for path in limits if path.exists()), None)
        if limit is None:
            missing("cgroup", "its memory controller is not ours to use")
        limit.write_text(str(96 << 20))
        for name, value in (("memory.swap.max", "0"), ("memory.memsw.limit_in_bytes", str(96 << 20))):
            with suppress(OSError):
                (group / name).write_text(value)
        yield group
    finally:
        group.rmdir()


def test_a_child_that_the_kernel_kills_for_lack_of_memory_is_told_as_such(request_of, stand_in, small_group):
    enter = f"open({str(small_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
    stand_in("np.ones(512 << 20, np.uint8)", opening=enter)
    with pytest.raises(MissingError, match=r"^h02-fp32: the measuring process was killed for lack of memory: "):
        spawn(request_of())


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/vmstat": "nr_free_pages 3\noom_kill 7\nallocstall 2\n"}, 7),
        ({"proc/self/cgroup": "0::/a.slice\n", "sys/fs/cgroup/a.slice/memory.events": "oom 1\noom_kill 3\n"}, 3),
        (
            {
                "proc/self/cgroup": "4:memory:/b\n1:cpu:/\n0::/\n",
                "sys/fs/cgroup/memory/b/memory.oom_control": "under_oom 0\noom_kill 5\n",
                "proc/vmstat": "oom_kill 5\n",
            },
            10,
        ),
        ({"proc/vmstat": "nr_free_pages 3\n"}, 0),
        ({}, 0),
    ],
)
def test_kills_for_lack_of_memory_are_counted_where_the_kernel_counts_them(tmp_path, files, count):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == count


def test_an_interpreter_that_is_not_there_is_the_reason(request_of, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(MissingError, match="/no/such/python cannot be started: No such file"):
        spawn(request_of())
