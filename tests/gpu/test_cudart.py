"""CUDA's runtime by ctypes on a real GPU."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from hydradeploy.engines import cudart
from hydradeploy.errors import EnvironmentFailed
from tests.conftest import missing

pytestmark = pytest.mark.gpu

SIZE = 1 << 20


@pytest.fixture
def cuda():
    reason = cudart.why_no_gpu()
    if reason is not None:
        missing("gpu", reason)
    return cudart.load()


def test_the_gpu_is_described(cuda):
    gpu = cuda.gpu()
    assert gpu.name.strip()
    assert re.fullmatch(r"\d+\.\d", gpu.capability)
    assert gpu.sm_count > 0
    runtime, driver = cuda.versions()
    assert runtime >= 11000
    assert driver >= 11000


def test_torch_and_the_driver_agree_with_it(cuda):
    """Another road to the same figures."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        missing("gpu", "torch sees none")
    theirs, ours = torch.cuda.get_device_properties(0), cuda.gpu()
    assert (ours.name, ours.sm_count) == (theirs.name, theirs.multi_processor_count)
    assert ours.capability == f"{theirs.major}.{theirs.minor}"
    assert ours.integrated == bool(theirs.is_integrated)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_copy_there_and_back_gives_what_was_sent(cuda, mapped):
    sent = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    with (
        cuda.stream() as stream,
        cuda.allocate(SIZE) as memory,
        cuda.host(SIZE, mapped=mapped) as there,
        cuda.host(SIZE, mapped=mapped) as back,
    ):
        assert bool(there.device_address) == mapped
        there.array((SIZE,), np.uint8)[:] = sent
        back.array((SIZE,), np.uint8)[:] = 0
        cuda.copy_in(memory, there, SIZE, stream)
        cuda.copy_out(back, memory, SIZE, stream)
        cuda.wait(stream)
        np.testing.assert_array_equal(back.array((SIZE,), np.uint8), sent)


def test_events_take_the_time(cuda):
    with (
        cuda.stream() as stream,
        cuda.event() as start,
        cuda.event() as end,
        cuda.allocate(64 * SIZE) as memory,
        cuda.host(64 * SIZE) as host,
    ):
        began = time.perf_counter()
        cuda.record(start, stream)
        cuda.copy_in(memory, host, 64 * SIZE, stream)
        cuda.record(end, stream)
        cuda.wait(stream)
        assert 0 < cuda.elapsed_s(start, end) <= time.perf_counter() - began


def test_a_graph_is_captured_and_replayed(cuda):
    with cuda.stream() as stream, cuda.allocate(SIZE) as memory, cuda.host(SIZE) as there, cuda.host(SIZE) as back:
        given, taken = there.array((SIZE,), np.uint8), back.array((SIZE,), np.uint8)
        taken[:] = 0

        def both() -> None:
            cuda.copy_in(memory, there, SIZE, stream)
            cuda.copy_out(back, memory, SIZE, stream)

        given[:] = 1
        with cuda.capture(stream, both) as graph:
            cuda.wait(stream)
            assert not taken.any(), "captured, not done"
            for value in (7, 8):
                given[:] = value
                cuda.launch(graph, stream)
                cuda.wait(stream)
                assert (taken == value).all()


def test_a_capture_that_fails_leaves_a_stream_that_works(cuda):
    with cuda.stream() as stream, cuda.allocate(SIZE) as memory, cuda.host(SIZE) as there, cuda.host(SIZE) as back:

        def waits() -> None:
            cuda.copy_in(memory, there, SIZE, stream)
            cuda.wait(stream)

        with pytest.raises(cudart.CudaFailed, match="captur"):
            cuda.capture(stream, waits)
        there.array((SIZE,), np.uint8)[:] = 9
        cuda.copy_in(memory, there, SIZE, stream)
        cuda.copy_out(back, memory, SIZE, stream)
        cuda.wait(stream)
        assert (back.array((SIZE,), np.uint8) == 9).all()


def test_an_error_is_cudas_own_and_the_next_call_does_not_report_it(cuda):
    with pytest.raises(cudart.CudaFailed, match=r"cudaFree: .*invalid argument"):
        cuda.call("cudaFree", 0x12345)
    cuda.call("cudaGetLastError")
    cuda.allocate(16).close()


def test_more_than_there_is_is_the_environments_fault_and_passes(cuda):
    with pytest.raises(EnvironmentFailed, match="out of memory"):
        cuda.allocate(1 << 50)
    cuda.allocate(16).close()


def test_nothing_is_lost_over_a_hundred_times(cuda):
    def once() -> None:
        with (
            cuda.stream() as stream,
            cuda.event() as start,
            cuda.event() as end,
            cuda.allocate(8 * SIZE) as memory,
            cuda.host(8 * SIZE) as host,
        ):

            def copy() -> None:
                cuda.copy_in(memory, host, 8 * SIZE, stream)

            with cuda.capture(stream, copy) as graph:
                cuda.record(start, stream)
                cuda.launch(graph, stream)
                cuda.record(end, stream)
                cuda.wait(stream)

    once()
    free, _ = cuda.memory()
    for _ in range(100):
        once()
    # One cycle's memory: another process may take some meanwhile, a hundred lost ones would be 800 MiB.
    assert free - cuda.memory()[0] < 8 * SIZE
