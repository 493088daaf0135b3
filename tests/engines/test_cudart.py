"""CUDA's runtime by ctypes, against one in the host's memory, and against the real one without a driver."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydradeploy.engines import cudart
from hydradeploy.errors import EnvironmentFailed, ExitCode, MissingError
from tests.conftest import missing
from tests.engines.fakes import FakeCuda, library, nothing_left


@pytest.fixture
def cuda():
    found = FakeCuda()
    with nothing_left(found):
        yield found
    found.fake.fake_reset()


def real() -> str:
    """A libcudart of NVIDIA's."""
    for path in cudart.candidates():
        if os.path.exists(path):
            return path
    return missing("nvidia-cuda-runtime", "not installed")


def test_a_gpu_is_described_by_runtime_and_driver(cuda):
    gpu = cuda.gpu()
    assert gpu == cudart.Gpu("Fake GPU", "8.7", 16, False)
    assert cuda.versions() == (12060, 12060)
    cuda.fake.fake_gpu(1, 11, 0)
    assert cuda.gpu().integrated
    assert cuda.gpu().capability == "11.0"


@pytest.mark.parametrize("code", [3, 34, 35, 100, 999])
def test_without_a_device_there_are_none_with_cudas_reason(cuda, code):
    cuda.fake.fake_devices(0, code)
    assert cuda.device_count() == 0
    assert f"(CUDA error {code})" in cuda.why_no_device
    with pytest.raises(MissingError, match="no CUDA device: cudaGetDeviceCount") as refused:
        cuda.gpu()
    assert refused.value.exit_code is ExitCode.MISSING
    cuda.fake.fake_devices(1, 0)
    assert cuda.device_count() == 1
    assert cuda.why_no_device == ""


def test_another_error_of_the_count_is_not_taken_for_no_device(cuda):
    cuda.fail("cudaGetDeviceCount", 700)
    with pytest.raises(cudart.CudaFailed, match="illegal memory access") as failed:
        cuda.device_count()
    assert failed.value.code == 700


def test_a_copy_there_and_back_gives_what_was_sent_once_it_was_waited_for(cuda):
    sent = np.random.default_rng(0).random((3, 5), np.float32)
    with cuda.stream() as stream, cuda.allocate(60) as memory, cuda.host(60) as there, cuda.host(64) as back:
        there.array((3, 5), np.float32)[:] = sent
        cuda.copy_in(memory, there, 60, stream)
        cuda.copy_out(back, memory, 60, stream)
        assert not np.array_equal(back.array((3, 5), np.float32), sent), "the fake does nothing before it is waited for"
        cuda.wait(stream)
        np.testing.assert_array_equal(back.array((3, 5), np.float32), sent)
        with pytest.raises(ValueError, match="61 bytes from 60 to 64"):
            cuda.copy_out(back, memory, 61, stream)
        with pytest.raises(ValueError, match="buffer"):
            there.array((3, 6), np.float32)


def test_mapped_memory_has_an_address_for_the_gpu(cuda):
    with cuda.host(8, mapped=True) as both, cuda.host(8) as one:
        assert both.device_address
        assert one.device_address is None
    cuda.fail("cudaHostGetDevicePointer", 1)
    with pytest.raises(cudart.CudaFailed):
        cuda.host(8, mapped=True)


def test_what_was_given_back_is_not_given_back_twice_and_not_used(cuda):
    memory = cuda.allocate(8)
    memory.close()
    memory.close()
    with pytest.raises(RuntimeError, match="given back"):
        _ = memory.address


@pytest.mark.parametrize(
    ("call", "function"),
    [(lambda c: c.allocate(2000), "cudaMalloc"), (lambda c: c.host(2000), "cudaHostAlloc")],
)
def test_no_memory_left_is_the_environments_fault_and_passes(cuda, call, function):
    cuda.fake.fake_limit(1000)
    with pytest.raises(EnvironmentFailed, match=f"{function}: out of memory") as failed:
        call(cuda)
    assert failed.value.exit_code is ExitCode.ENVIRONMENT
    assert failed.value.hint
    cuda.allocate(900).close()


def test_an_error_is_raised_with_cudas_words_and_not_reported_again(cuda):
    with pytest.raises(cudart.CudaFailed, match=r"cudaFree: invalid argument \(CUDA error 1\)"):
        cuda.call("cudaFree", 0x1234)
    assert cuda.fake.fake_last_error() == 0


@pytest.mark.parametrize(
    "make",
    [lambda c: c.stream(), lambda c: c.event(), lambda c: c.allocate(1), lambda c: c.host(1)],
)
def test_giving_back_hides_no_error_by_another(cuda, make):
    handle = make(cuda)
    destroy = handle._give_back.args[0]
    cuda.fail(destroy, 700)
    address = handle.address
    handle.close()
    assert cuda.fake.fake_last_error() == 0
    cuda.call(destroy, address)


def test_events_take_the_time_between_them(cuda):
    with (
        cuda.stream() as stream,
        cuda.event() as start,
        cuda.event() as end,
        cuda.allocate(8) as memory,
        cuda.host(8) as host,
    ):
        with pytest.raises(cudart.CudaFailed, match="cudaEventElapsedTime"):
            cuda.elapsed_s(start, end)
        cuda.record(start, stream)
        cuda.copy_in(memory, host, 8, stream)
        cuda.record(end, stream)
        cuda.wait(stream)
        assert cuda.elapsed_s(start, end) == pytest.approx(1e-3)


def test_a_graph_does_what_was_captured_as_often_as_it_is_launched(cuda):
    with cuda.stream() as stream, cuda.allocate(4) as memory, cuda.host(4) as there, cuda.host(4) as back:
        given, taken = there.array((1,), np.int32), back.array((1,), np.int32)
        taken[:] = 0

        def both() -> None:
            cuda.copy_in(memory, there, 4, stream)
            cuda.copy_out(back, memory, 4, stream)

        with cuda.capture(stream, both) as graph:
            cuda.wait(stream)
            assert taken[0] == 0, "captured, not done"
            for value in (7, 8):
                given[0] = value
                cuda.launch(graph, stream)
                cuda.wait(stream)
                assert taken[0] == value


def test_a_capture_that_fails_leaves_a_stream_that_works(cuda):
    with cuda.stream() as stream, cuda.allocate(4) as memory, cuda.host(4) as host:

        def copies() -> None:
            cuda.copy_in(memory, host, 4, stream)

        def waits() -> None:
            copies()
            cuda.wait(stream)

        def gives_up() -> None:
            copies()
            raise KeyError("mine")

        with pytest.raises(cudart.CudaFailed, match="not permitted when stream is capturing"):
            cuda.capture(stream, waits)
        with pytest.raises(KeyError, match="mine"):
            cuda.capture(stream, gives_up)
        for function in ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"):
            cuda.fail(function, 900)
            with pytest.raises(cudart.CudaFailed, match=function):
                cuda.capture(stream, copies)
        before = cuda.copies()
        copies()
        cuda.wait(stream)
        assert cuda.copies() == before + 1
        cuda.capture(stream, copies).close()


@pytest.fixture
def fresh():
    for asked in (cudart.load, cudart.why_no_gpu, cudart.why_no_driver):
        asked.cache_clear()
    yield
    for asked in (cudart.load, cudart.why_no_gpu, cudart.why_no_driver):
        asked.cache_clear()


def test_the_first_library_that_has_everything_is_taken(fresh, monkeypatch, tmp_path):
    old = tmp_path / "libcudart.so.9"
    subprocess.run(["cc", "-shared", "-o", old, "-x", "c", "-"], input=b"int cudaFree;", check=True)
    monkeypatch.setattr(cudart, "candidates", lambda: iter(["nowhere.so", str(old), str(library())]))
    assert cudart.load().path == str(library())
    assert cudart.load() is cudart.load()
    assert cudart.why_no_gpu() is None


def test_a_library_that_is_too_new_for_the_driver_makes_room_for_an_older_one(fresh, monkeypatch, tmp_path):
    newer, newest = (Path(shutil.copy(library(), tmp_path / name)) for name in ("newer.so", "newest.so"))
    for path in (newer, newest):
        ctypes.CDLL(str(path)).fake_devices(0, 35)
    monkeypatch.setattr(cudart, "_DRIVER", str(library()))
    monkeypatch.setattr(cudart, "candidates", lambda: iter([str(newest), str(newer), str(library())]))
    assert cudart.load().path == str(library())
    assert cudart.why_no_gpu() is None
    cudart.load.cache_clear()
    cudart.why_no_gpu.cache_clear()
    monkeypatch.setattr(cudart, "candidates", lambda: iter([str(newest), str(newer)]))
    assert cudart.load().path == str(newest)
    assert "driver version is insufficient" in str(cudart.why_no_gpu())


def test_no_library_is_one_clear_error(fresh, monkeypatch):
    monkeypatch.setattr(cudart, "candidates", lambda: iter(["nowhere.so"]))
    with pytest.raises(MissingError, match="libcudart, CUDA's runtime, is not found") as refused:
        cudart.load()
    assert "pip install nvidia-cuda-runtime" in str(refused.value.hint)
    assert cudart.why_no_gpu() == refused.value.message


def test_it_is_looked_for_where_the_loader_looks_then_in_pythons_packages(monkeypatch, tmp_path):
    for part in ("cu13", "cuda_runtime"):
        (tmp_path / "nvidia" / part / "lib").mkdir(parents=True)
        (tmp_path / "nvidia" / part / "lib" / "libcudart.so.13").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = list(cudart.candidates())
    assert found[0] == "libcudart.so.13"
    assert found.index("/usr/local/cuda/lib64/libcudart.so.12") > found.index("libcudart.so")
    assert {Path(path).parent.parent.name for path in found[-2:]} == {"cu13", "cuda_runtime"}


def test_the_real_runtime_answers_without_a_driver():
    """In a process of its own: where there is a GPU this must not take one."""
    code = f"""
from hydradeploy.engines.cudart import Cuda
cuda = Cuda({real()!r})
runtime, driver = cuda.versions()
assert runtime >= 11000, runtime
print(cuda.device_count(), cuda.why_no_device)
"""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("0 cudaGetDeviceCount: ")
