"""What runs an artifact: one file per backend, one object `BACKEND` in each, nothing imported until asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hydradeploy.bundle import Artifact, Batch, Bundle, Dialect, Extent, StoredTensor
from hydradeploy.data.preprocess import normalise
from hydradeploy.engines.module import HINTS, RTX, TENSORRT
from hydradeploy.errors import InputError, MissingError, UsageError
from hydradeploy.files import inside
from hydradeploy.spec import Geometry, Preprocessing, Subnet
from hydradeploy.stored import Form, Input, image_shape

# Every precision that an artifact can have, the widest first.
PRECISION_NAMES = ("fp32", "fp16", "bf16", "int8dyn", "int8")

# The first usable one is the default.
BACKEND_MODULES = {
    "onnxruntime": "hydradeploy.backends.onnxruntime",
    "openvino": "hydradeploy.backends.openvino",
    "torch": "hydradeploy.backends.torch",
    "torch-cuda": "hydradeploy.backends.torch_cuda",
    "tensorrt": "hydradeploy.backends.tensorrt",
    "tensorrt-rtx": "hydradeploy.backends.tensorrt_rtx",
    "onnxruntime-cuda": "hydradeploy.backends.onnxruntime_cuda",
}
# What brings each.
REMEDIES = {
    "onnxruntime": "pip install 'hydradeploy[ort]'",
    "openvino": "pip install 'hydradeploy[openvino]'",
    "torch": "pip install 'hydradeploy[export]'",
    # The extra has torch too, but which build of it pip takes is not ours to say.
    "torch-cuda": "a build of torch for the GPU: https://pytorch.org/get-started/locally",
    "tensorrt": HINTS[TENSORRT],
    "tensorrt-rtx": HINTS[RTX],
    "onnxruntime-cuda": "pip install 'hydradeploy[cuda]'",
}


@dataclass(frozen=True)
class Weights:
    """A weights file, for a backend that computes without a graph: where each tensor lies, and which are read."""

    path: Path
    table: Mapping[str, StoredTensor]
    subnet: Subnet
    form: Form


@dataclass(frozen=True)
class Model:
    """An artifact on disk and what it takes and gives: images (batch, *image_shape) of the type `input` in, logits
    (batch, classes) float32 out.

    `graph` is None for a backend without a dialect, `weights` where graphs carry their own. `extents` are the parts of
    a shared weights file that it reads, for `read_ahead`. `sha256` and `graph_sha256` are the artifact's: engines are
    kept under them.
    """

    name: str
    graph: Path | None
    batch: Batch
    image_shape: tuple[int, int, int]
    classes: int
    extents: tuple[Extent, ...] = ()
    input: Input = "float32"
    precision: str = "fp32"
    weights: Weights | None = None
    sha256: str | None = None
    graph_sha256: str | None = None


@dataclass(frozen=True)
class Options:
    """How to run; None leaves it to the backend.

    `compute_type` is one of those the backend has for the artifact's precision, `settings` are of those it has.
    """

    threads: int | None = None
    compute_type: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


Images = NDArray[np.float32] | NDArray[np.uint8]


# Protocols, not base classes: a backend shares no code with another, and a test's fake needs to inherit nothing.
class Session(Protocol):
    """An open model. Closed by leaving the `with` block."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, images: Images) -> NDArray[np.float32]:
        """Logits of images as the model takes them (see `prepared`), on the host and the caller's own when it returns.

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
    def dialect(self) -> Dialect | None:
        """The form of graph it wants, None where it computes from the weights file alone."""
        ...

    @property
    def processor(self) -> str:
        """Where it computes: `cpu` or `cuda`."""
        ...

    @property
    def settings(self) -> Mapping[str, tuple[str, ...]]:
        """What can be set, with the possible values, the default first."""
        ...

    def why_not(self) -> str | None:
        """None where it is usable here, else the sentence to show."""
        ...

    def compute_types(self, precision: str) -> tuple[str, ...]:
        """The types it can do the products of an artifact of that precision in on this processor, the default first;
        none where it cannot run such artifacts."""
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
    remedy = REMEDIES[name or next(iter(BACKEND_MODULES))]
    # Nothing that is installed helps where there is no GPU.
    where = "on a machine with an NVIDIA GPU: " if name is not None and found.processor == "cuda" else ""
    raise MissingError(f"no usable backend ({'; '.join(reasons)})", hint=where + remedy)


def usable() -> tuple[Backend, ...]:
    """Every backend that runs here."""
    found: list[Backend] = [import_module(module).BACKEND for module in BACKEND_MODULES.values()]
    return tuple(candidate for candidate in found if candidate.why_not() is None)


def precisions_of(runner: Backend) -> list[str]:
    """Those that the backend runs here."""
    return [name for name in PRECISION_NAMES if runner.compute_types(name)]


def check_options(runner: Backend, options: Options, precision: str) -> None:
    """Raise MissingError for a backend that does not run here, or with what there is for a precision or a compute type
    that it lacks here, and UsageError for a setting or a value it does not know."""
    check_usable(runner)
    types = runner.compute_types(precision)
    if not types:
        raise MissingError(
            f"{runner.name} does not run {precision} here", hint=f"it has {', '.join(precisions_of(runner))}"
        )
    if options.compute_type is not None and options.compute_type not in types:
        raise MissingError(
            f"{runner.name} does not compute {precision} artifacts in {options.compute_type} here",
            hint=f"it has {', '.join(types)}",
        )
    for name, value in options.settings.items():
        if name not in runner.settings:
            known = ", ".join(runner.settings) or "none"
            raise UsageError(f"{runner.name} has no setting {name!r}", hint=f"it has {known}")
        check_setting(runner, name, value)


def check_usable(runner: Backend) -> None:
    """Raise MissingError, which says why, for a backend that does not run here."""
    reason = runner.why_not()
    if reason is not None:
        raise MissingError(f"{runner.name} cannot run here: {reason}")


def check_setting(runner: Backend, name: str, value: str) -> None:
    """Raise UsageError for a value that one of the backend's settings cannot have."""
    values = runner.settings[name]
    if value not in values:
        raise UsageError(f"{runner.name}: {name} cannot be {value!r}", hint=f"one of {', '.join(values)}")


def with_defaults(runner: Backend, options: Options, precision: str) -> Options:
    """The options with what they leave to the backend filled in: the compute type, and a value for every setting."""
    kind = options.compute_type or runner.compute_types(precision)[0]
    settings = {name: values[0] for name, values in runner.settings.items()}
    return replace(options, compute_type=kind, settings=settings | dict(options.settings))


def model_of(bundle: Bundle, artifact: Artifact, dialect: Dialect | None) -> Model:
    """The artifact as a backend of that dialect wants it; raises MissingError where it has no such graph."""
    graph = None if dialect is None else bundle.graph(artifact, dialect)
    opened = model(artifact.name, graph, artifact.batch, bundle.spec.geometry, artifact.input, artifact.precision)
    weights = None
    if artifact.weights is not None:
        weights = Weights(
            inside(bundle.path, artifact.weights),
            bundle.manifest.weights[artifact.weights],
            bundle.subnet(artifact),
            bundle.form(artifact),
        )
    return replace(
        opened,
        extents=bundle.extents(artifact),
        weights=weights,
        sha256=artifact.sha256,
        graph_sha256=artifact.graph_sha256,
    )


def model(
    name: str, graph: Path | None, batch: Batch, g: Geometry, kind: Input = "float32", precision: str = "fp32"
) -> Model:
    """A graph file of a supernet of this geometry."""
    return Model(name, graph, batch, image_shape(g, kind), g.classes, input=kind, precision=precision)


def prepared(pixels: NDArray[np.uint8], kind: Input, preprocessing: Preprocessing) -> Images:
    """Resized and cropped images (n, s, s, channels) as a model of that input takes them."""
    return pixels if kind == "uint8" else normalise(pixels, preprocessing)


def read_ahead(model: Model) -> None:
    """Ask the kernel to read what the model will read, in one go.

    Runtimes map the weights file and touch it page by page; from a cold cache each touch waits for the disk.
    """
    for path, parts in groupby(model.extents, key=lambda extent: extent.path):
        # A hint: where it cannot be given, opening only takes longer.
        with suppress(OSError), path.open("rb") as file:
            for _, offset, length in parts:
                os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


def check_input(model: Model, images: Images) -> None:
    """Raise InputError unless `images` is what the model takes."""
    expected = (model.batch, *model.image_shape)
    fits = images.ndim == 4 and images.shape[1:] == model.image_shape and images.dtype == np.dtype(model.input)
    if not fits or not len(images) or model.batch not in ("dynamic", len(images)):
        shape = "(" + ", ".join(str(size) for size in expected) + ")"
        raise InputError(f"{model.name}: images are {images.dtype} {images.shape}, expected {model.input} {shape}")


def run_all(session: Session, model: Model, images: Images) -> NDArray[np.float32]:
    """Logits of any number of images, in batches of the size the model wants; the last is filled up by repetition."""
    size = 1 if model.batch == "dynamic" else model.batch
    logits = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        missing = size - len(batch)
        full = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
        logits.append(session.run(full)[: len(batch)])
    return np.concatenate(logits)
