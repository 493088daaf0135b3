"""What runs an artifact: one file per backend, one object `BACKEND` in each, nothing imported until asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hydradeploy.bundle import Artifact, Batch, Bundle, Dialect, Extent
from hydradeploy.errors import InputError, MissingError, UsageError
from hydradeploy.spec import Geometry

BACKEND_MODULES = {"onnxruntime": "hydradeploy.backends.onnxruntime"}


@dataclass(frozen=True)
class Model:
    """A graph on disk and what it takes and gives: (batch, *image_shape) float32 in, (batch, classes) float32 out.

    `extents` are the parts of a shared weights file that it reads, for `read_ahead`.
    """

    name: str
    graph: Path
    batch: Batch
    image_shape: tuple[int, int, int]
    classes: int
    extents: tuple[Extent, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to run; None leaves it to the backend."""

    threads: int | None = None


# Protocols, not base classes: a backend shares no code with another, and a test's fake needs to inherit nothing.
class Session(Protocol):
    """An open model. Closed by leaving the `with` block."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of normalised images (batch, channels, s, s), on the host and the caller's own when it returns.

        Raises InputError for another shape or type, MissingError when the runtime fails.
        """
        ...

    def facts(self) -> Mapping[str, str]:
        """What only the session knows, for the record: versions, providers, threads."""
        ...


class Backend(Protocol):
    """A runtime."""

    @property
    def name(self) -> str: ...

    @property
    def dialect(self) -> Dialect:
        """The form of graph it wants."""
        ...

    @property
    def processor(self) -> str:
        """Where it computes: `cpu` or `cuda`."""
        ...

    def why_not(self) -> str | None:
        """None where it is usable here, else the sentence to show."""
        ...

    def software(self) -> Mapping[str, str]:
        """The version of each package that decides how fast and how it computes."""
        ...

    def prepare(self) -> None:
        """Load the runtime itself: what every session takes, whatever its model."""
        ...

    def open(self, model: Model, options: Options) -> Session:
        """Raises MissingError where the runtime is missing or cannot take the model."""
        ...


def backend(name: str | None = None) -> Backend:
    """The backend of that name, or the first usable one.

    Raises UsageError for an unknown name, MissingError where it, or every one, is not usable here.
    """
    if name is not None and name not in BACKEND_MODULES:
        raise UsageError(f"no backend {name!r}", hint=f"one of {', '.join(BACKEND_MODULES)}")
    reasons = []
    for candidate in [name] if name is not None else BACKEND_MODULES:
        found: Backend = import_module(BACKEND_MODULES[candidate]).BACKEND
        reason = found.why_not()
        if reason is None:
            return found
        reasons.append(f"{candidate}: {reason}")
    raise MissingError(f"no usable backend ({'; '.join(reasons)})", hint="pip install 'hydradeploy[ort]'")


def usable() -> tuple[Backend, ...]:
    """Every backend that runs here."""
    found: list[Backend] = [import_module(module).BACKEND for module in BACKEND_MODULES.values()]
    return tuple(candidate for candidate in found if candidate.why_not() is None)


def model_of(bundle: Bundle, artifact: Artifact, dialect: Dialect) -> Model:
    """The artifact as a backend wants it."""
    graph = bundle.graph(artifact, dialect)
    opened = model(artifact.name, graph, artifact.batch, bundle.spec.geometry)
    return replace(opened, extents=bundle.extents(artifact))


def model(name: str, graph: Path, batch: Batch, geometry: Geometry) -> Model:
    """A graph file of a supernet of this geometry."""
    return Model(name, graph, batch, (geometry.channels, geometry.image_size, geometry.image_size), geometry.classes)


def read_ahead(model: Model) -> None:
    """Ask the kernel to read what the model will read, in one go.

    Runtimes map the weights file and touch it page by page; from a cold cache each touch waits for the disk.
    """
    for path, parts in groupby(model.extents, key=lambda extent: extent.path):
        # A hint: where it cannot be given, opening only takes longer.
        with suppress(OSError), path.open("rb") as file:
            for _, offset, length in parts:
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


def check_input(model: Model, images: NDArray[np.float32]) -> None:
    """Raise InputError unless `images` is what the model takes."""
    expected = (model.batch, *model.image_shape)
    fits = images.ndim == 4 and images.shape[1:] == model.image_shape
    if not fits or images.dtype != np.float32 or len(images) == 0 or model.batch not in ("dynamic", len(images)):
        shape = "(" + ", ".join(str(size) for size in expected) + ")"
        raise InputError(f"{model.name}: images are {images.dtype} {images.shape}, expected float32 {shape}")


def run_all(session: Session, model: Model, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of any number of images, in batches of the size the model wants; the last is filled up by repetition."""
    size = 1 if model.batch == "dynamic" else model.batch
    logits = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        missing = size - len(batch)
        full = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
        logits.append(session.run(full)[: len(batch)])
    return np.concatenate(logits)
