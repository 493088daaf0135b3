"""The images that artifacts are measured with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np

from hydradeploy.bundle import Bundle
from hydradeploy.errors import environment

_IMAGES = 16


@contextmanager
def batches(bundle: Bundle, sizes: set[int]) -> Iterator[Mapping[int, str]]:
    """Per batch size the name of a file of uint8 batches (b, n, s, s, channels): the golden images and their mirror
    images, so that inputs change.

    The files are in memory, and gone with this process however it ends; raises EnvironmentFailed.
    """
    golden = bundle.golden().images
    images = np.concatenate([golden, golden[:, :, ::-1]])
    with ExitStack() as stack, environment("keeping the images to measure with"):
        names = {}
        for size in sizes:
            count = max(2, -(-_IMAGES // size))
            chosen = np.arange(count * size) % len(images)
            file = stack.enter_context(os.fdopen(os.memfd_create("batches"), "wb"))
            np.save(file, images[chosen].reshape(count, size, *images.shape[1:]))
            file.flush()
            names[size] = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        stack_of_files = stack.pop_all()
    with stack_of_files:
        yield names
