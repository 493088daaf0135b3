"""Engines at work on a GPU in the host's memory, with a TensorRT as 8.6 and as 10.3 that computes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hydradeploy.engines import cudart, execution, loading
from hydradeploy.engines.execution import Execution
from hydradeploy.errors import EnvironmentFailed, InputError, MissingError
from tests.engines.fakes import FakeCuda, FakeEngine, FakeTensorRT, nothing_left

SHAPE, CLASSES = (3, 2, 2), 5


def function(scale: float = 1.0):
    def compute(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1).astype(np.float32)
        return scale * np.stack([flat.sum(1) * (at + 1) for at in range(CLASSES)], 1)

    return compute


@pytest.fixture
def cuda(monkeypatch):
    found = FakeCuda()
    monkeypatch.setattr(cudart, "why_no_gpu", lambda: None)
    with nothing_left(found):
        yield found
    found.fake.fake_reset()


@pytest.fixture(params=["8.6", "10.3", "rtx"])
def trt(cuda, request):
    return FakeTensorRT(cuda, request.param)


def opened(trt, *, batch=1, scale=1.0, graph=True, dtype="float32", **engine) -> Execution:
    shape = (-1 if batch is None else batch, *SHAPE)
    trt.engines[b"plan"] = FakeEngine(trt, function(scale), shape, CLASSES, **engine)
    return Execution(
        trt,
        trt.cuda,
        loading.load(trt, b"plan"),
        image_shape=SHAPE,
        dtype=dtype,
        classes=CLASSES,
        batch=batch,
        graph=graph,
    )


def images(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("integrated", [0, 1])
def test_logits_are_the_engines_and_the_callers_own(trt, graph, integrated):
    trt.cuda.fake.fake_gpu(integrated, 8, 7)
    running = opened(trt, graph=graph)
    assert running.device_s is None
    first = running.run(images(seed=1))
    kept = first.copy()
    second = running.run(images(seed=2))
    np.testing.assert_allclose(kept, function()(images(seed=1)))
    np.testing.assert_allclose(second, function()(images(seed=2)))
    np.testing.assert_array_equal(first, kept)
    assert trt.cuda.copies() == (0 if integrated else 4), "an integrated GPU sees the host's memory"
    assert running.device_s > 0
    running.close()
    running.close()


def test_a_captured_engine_is_enqueued_no_more(trt):
    running = opened(trt)
    assert (trt.enqueues, trt.contexts) == (2, 1), "before the capture and in it"
    for seed in range(3):
        running.run(images(seed=seed))
    assert trt.enqueues == 2
    assert trt.ran == 4
    running.close()
    plain = opened(trt, graph=False)
    assert trt.enqueues == 3
    plain.run(images())
    assert trt.enqueues == 4
    assert plain.graph_failed == ""
    plain.close()


@pytest.mark.parametrize("function_", ["cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_where_it_cannot_be_captured_it_runs_without_and_says_why(trt, function_):
    trt.cuda.fail(function_, 900)
    running = opened(trt)
    assert function_ in running.graph_failed
    assert "not permitted when stream is capturing" in running.graph_failed
    np.testing.assert_allclose(running.run(images()), function()(images()))
    running.close()


def test_any_batch_the_engine_takes_has_its_own_graph_and_larger_ones_go_in_turn(trt):
    running = opened(trt, batch=None, profile=(1, 2, 4))
    assert running.batches == (1, 4)
    assert trt.contexts == 0
    for count in (1, 3, 4, 9, 2, 1):
        np.testing.assert_allclose(running.run(images(count)), function()(images(count)), rtol=1e-6)
    assert trt.contexts == 4
    enqueues = trt.enqueues
    running.run(images(3))
    assert trt.enqueues == enqueues
    running.close()


def test_only_so_many_batch_sizes_are_kept(trt):
    running = opened(trt, batch=None, profile=(1, 2, 8))
    running.run(images(1))
    one = trt.cuda.live()
    for count in (2, 3, 4, 5, 6, 7, 8, 1):
        np.testing.assert_allclose(running.run(images(count)), function()(images(count)), rtol=1e-6)
    assert trt.cuda.live()["executables"] == 4 * one["executables"]
    running.close()


def test_fewer_images_than_the_engine_takes_are_refused_with_what_it_takes(trt):
    running = opened(trt, batch=None, profile=(2, 2, 4))
    with pytest.raises(InputError, match="a batch of 1 images; the engine takes 2 to 4"):
        running.run(images(5))
    running.close()


def test_pixels_are_taken_as_they_are(trt):
    running = opened(trt, dtype="uint8", types={"image": "UINT8"})
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    np.testing.assert_allclose(running.run(pixels), function()(pixels))
    running.close()


def test_all_engines_share_one_scratch_as_large_as_the_largest(trt):
    small = opened(trt, context_bytes=1000)
    alone = trt.cuda.used()
    large = opened(trt, context_bytes=5000, scale=2.0)
    assert small.scratch_bytes == large.scratch_bytes == 5000
    third = opened(trt, context_bytes=3000, scale=3.0)
    tensors = alone - 1000
    assert trt.cuda.used() == 5000 + 3 * tensors
    for scale, running in ((1.0, small), (2.0, large), (3.0, third), (1.0, small)):
        np.testing.assert_allclose(running.run(images()), function(scale)(images()), rtol=1e-6)
    large.close()
    np.testing.assert_allclose(small.run(images()), function()(images()))
    small.close()
    third.close()
    assert trt.cuda.used() == 0


def test_a_graph_is_captured_anew_when_the_scratch_has_moved(trt):
    small = opened(trt, context_bytes=1000)
    small.run(images())
    large = opened(trt, context_bytes=5000)
    before = trt.enqueues
    small.run(images())
    assert trt.enqueues == before + 2
    small.run(images())
    assert trt.enqueues == before + 2
    small.close()
    large.close()


def test_an_engine_that_needs_no_scratch_takes_none(trt):
    running = opened(trt, context_bytes=0)
    np.testing.assert_allclose(running.run(images()), function()(images()))
    assert running.scratch_bytes == running.context_bytes == 0
    running.close()


def test_an_engine_too_large_is_refused_and_those_before_it_go_on(trt):
    small = opened(trt, context_bytes=1000)
    trt.cuda.fake.fake_limit(4000)
    with pytest.raises(EnvironmentFailed, match="cudaMalloc: out of memory"):
        opened(trt, context_bytes=50000)
    np.testing.assert_allclose(small.run(images()), function()(images()))
    assert small.scratch_bytes == 1000
    small.close()


CALLS = [
    "cudaMalloc",
    "cudaHostAlloc",
    "cudaStreamCreateWithFlags",
    "cudaEventCreateWithFlags",
    "cudaStreamSynchronize",
    "cudaDeviceGetAttribute",
]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_whatever_fails_while_opening_nothing_is_left(trt, call, after):
    trt.cuda.fail(call, 2, after)
    try:
        opened(trt).close()
    except EnvironmentFailed as error:
        assert call in error.message  # noqa: PT017 - the call may be made less often than it is to fail
    trt.cuda.fail("", 0)
    assert trt.cuda.used() == 0


@pytest.mark.parametrize(
    "call",
    ["cudaMemcpyAsync", "cudaEventRecord", "cudaGraphLaunch", "cudaStreamSynchronize", "cudaEventElapsedTime"],
)
def test_what_fails_while_running_is_told_and_the_next_call_runs(trt, call):
    running = opened(trt)
    trt.cuda.fail(call, 700)
    with pytest.raises(MissingError, match=f"{call}: an illegal memory access was encountered"):
        running.run(images())
    np.testing.assert_allclose(running.run(images(seed=1)), function()(images(seed=1)))
    running.close()


@pytest.mark.parametrize(
    ("refuses", "words"),
    [
        ("context", "makes no execution context: it logged no reason"),
        ("shape", "refuses a batch of 1 images"),
        ("address", "refuses the memory of image"),
        ("enqueue", "cannot run the engine: no kernel for it"),
    ],
)
def test_what_tensorrt_refuses_is_told_with_its_words_and_nothing_is_left(trt, refuses, words):
    trt.refuses = refuses
    with pytest.raises(MissingError, match=words):
        opened(trt)
    assert trt.cuda.used() == 0


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"types": {"image": "HALF"}}, r"its image is HALF \(1, 3, 2, 2\)"),
        ({"types": {"logits": "HALF"}}, r"its logits is HALF \(1, 5\)"),
    ],
)
def test_an_engine_of_another_model_is_refused(trt, engine, words):
    with pytest.raises(MissingError, match=words):
        opened(trt, **engine)


def test_another_batch_or_other_tensors_are_another_model(trt):
    trt.engines[b"plan"] = engine = FakeEngine(trt, function(), (2, *SHAPE), CLASSES)
    rest = {"image_shape": SHAPE, "dtype": "float32", "classes": CLASSES, "batch": 1, "graph": True}
    with pytest.raises(MissingError, match=r"its image is FLOAT \(2, 3, 2, 2\)"):
        Execution(trt, trt.cuda, loading.load(trt, b"plan"), **rest)
    engine.shapes = {"pixels": (1, *SHAPE), "logits": (1, CLASSES)}
    with pytest.raises(MissingError, match="its tensors are logits, pixels"):
        Execution(trt, trt.cuda, loading.load(trt, b"plan"), **rest)


def test_a_plan_that_tensorrt_refuses_is_told_with_its_words(trt):
    with pytest.raises(MissingError, match="refuses the plan: Error Code 1: the plan is of another device"):
        loading.load(trt, b"another")


def test_no_runtime_is_made_where_there_is_no_gpu(trt, monkeypatch):
    monkeypatch.setattr(cudart, "why_no_gpu", lambda: "no CUDA device: none")
    monkeypatch.setattr(trt, "Runtime", lambda log: pytest.fail("it can crash the process"))
    with pytest.raises(MissingError, match="no CUDA device: none"):
        loading.load(trt, b"plan")


def test_engines_in_threads_do_not_compute_in_the_scratch_at_once(trt):
    inside, worst = [0], [0]

    def watched(images: np.ndarray) -> np.ndarray:
        inside[0] += 1
        worst[0] = max(worst[0], inside[0])
        pause.wait(0.002)
        inside[0] -= 1
        return function()(images)

    pause = threading.Event()
    running = [opened(trt) for _ in range(3)]
    for one in running:
        one._engine.function = watched
    wrong: list[int] = []

    def work(at: int) -> None:
        for seed in range(5):
            if not np.allclose(running[at].run(images(seed=10 * at + seed)), function()(images(seed=10 * at + seed))):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert worst[0] == 1
    for one in running:
        one.close()


def test_the_scratch_of_a_process_is_one(trt):
    assert execution.scratch(trt.cuda) is execution.scratch(trt.cuda)
