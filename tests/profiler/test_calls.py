"""Calls from many callers at once: what they wait for each other is theirs."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from hydradeploy.profiler.calls import Caller, Calls


def test_what_callers_wait_between_their_calls_is_not_left_out():
    """In flight over the mean latency is throughput only so. Here they wait most of their time."""

    def goes_on(calls: Calls) -> bool:
        time.sleep(0.002)
        return len(calls.latency_s) < 200

    session = SimpleNamespace(run=lambda images: time.sleep(0.0005))
    batches = np.zeros((1, 1, 2, 2, 1), np.uint8)
    caller = Caller(session, batches, lambda pixels: pixels, time.perf_counter, time.sleep, concurrency=8)
    calls = caller.call(goes_on)
    done = (len(calls.latency_s) + calls.unkept) / (calls.until_s - calls.started_s)
    assert 8 * len(calls.latency_s) / sum(calls.latency_s) == pytest.approx(done, rel=0.4)
