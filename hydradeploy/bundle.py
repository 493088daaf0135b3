"""A bundle on disk: its records, opening and verifying it.

    bundle/
      manifest.json            spec, artifacts, weight tables, every file's SHA-256
      supernet-fp32.weights    each tensor once, page-aligned
      h03-fp32.onnx ...        graphs whose initialisers point into the weights file
      h03-fp32.trt.onnx ...    the same for TensorRT
      golden.npz               sample images and the logits each artifact must reproduce
      accuracy.json            top-1 per artifact, backend and data set, measured or declared
      evaluation.npz           what each artifact said of each image, and how sure it was
      .stamp.json              sizes, times, inodes and hashes of the last full verification

History of the manifest's schema: 1, the first.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from hydradeploy.errors import IntegrityError, MissingError, UsageError, environment
from hydradeploy.files import (
    inside,
    locked,
    moved_aside,
    sha256_bytes,
    sha256_file,
    try_writing,
    user_cache,
    write_together,
)
from hydradeploy.spec import Geometry, Record, Spec, Subnet, decode
from hydradeploy.stored import ITEM_BYTES, Dtype, Form, Input, layers, stored

if TYPE_CHECKING:  # picking reads bundles too, and starts twice as fast without numpy
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
ACCURACY = "accuracy.json"
EVALUATION = "evaluation.npz"
STAMP = ".stamp.json"

Dialect = Literal["ort", "trt"]
Batch = int | Literal["dynamic"]
Check = Literal["stamp", "always", "manifest"]


class FileRecord(Record, frozen=True, kw_only=True):
    """What a file must be."""

    sha256: str
    size_bytes: int


class StoredTensor(Record, frozen=True, kw_only=True):
    """Where a tensor lies in a weights file: row-major, little-endian, matrices as [in, out]."""

    dtype: Dtype
    shape: tuple[int, ...]
    offset: int


class Parity(Record, frozen=True, kw_only=True):
    """How the artifact compared with the torch subnet in fp32 when it was exported.

    `max_difference` is the largest |logit difference| over samples and dialects, `tolerance` what was allowed, both as
    fractions of the largest |logit|; `cosine` is the smallest between the logits of a sample, where at least
    `least_cosine` was asked for; `top1_agreement` is a fraction of the samples, None where they are not real images.
    """

    samples: int
    max_difference: float
    tolerance: float
    cosine: float
    least_cosine: float
    top1_agreement: float | None


class Calibration(Record, frozen=True, kw_only=True):
    """Where the ranges of activations come from. `scales` has the step of each int8 layer's input."""

    method: str
    data: str
    images: int
    scales: dict[str, float]


class Drop(Record, frozen=True, kw_only=True):
    """What int8 costs: top-1 of the artifact and of its fp32 twin on the same `n` images, and what was allowed."""

    data: str
    n: int
    top1: float
    fp32_top1: float
    limit: float


class Quantisation(Record, frozen=True, kw_only=True):
    """How an int8 artifact was quantised.

    `kept` are the layers that stay in float, `calibration` is None where ranges are found at run time, `drop` where
    nobody asked for it.
    """

    kept: tuple[str, ...]
    calibration: Calibration | None
    drop: Drop | None


class Artifact(Record, frozen=True, kw_only=True):
    """One subnet in one precision.

    `sha256` is of its content: graph and weight values; `graph_sha256` of graph, shapes and precision alone. `weights`
    is None where the graphs carry their own. `dtype` is that of all but int8 matrices. `size_bytes` is what `pack`
    writes for it.
    """

    name: str
    heads: int
    precision: str
    dtype: Dtype
    input: Input
    quantisation: Quantisation | None
    batch: Batch
    graphs: dict[Dialect, str]
    weights: str | None
    sha256: str
    graph_sha256: str
    parameters: int
    macs: int
    size_bytes: int
    parity: Parity


class Manifest(Record, frozen=True, kw_only=True):
    """The bundle's description. `sha256` is of the rest of it, so that an edited manifest is noticed."""

    schema: int
    spec: Spec
    supernet_sha256: str
    samples: str
    artifacts: tuple[Artifact, ...]
    weights: dict[str, dict[str, StoredTensor]]
    files: dict[str, FileRecord]
    tools: dict[str, str]
    sha256: str = ""

    def __post_init__(self) -> None:
        for artifact in self.artifacts:
            self.spec.geometry.subnet(artifact.heads)
            used = [*artifact.graphs.values(), *([artifact.weights] if artifact.weights else [])]
            for name in used:
                if name not in self.files:
                    raise ValueError(f"artifact {artifact.name} uses {name}, which is not among the files")
            if artifact.weights is not None and artifact.weights not in self.weights:
                raise ValueError(f"artifact {artifact.name}: no table of tensors for {artifact.weights}")
        if len({artifact.name for artifact in self.artifacts}) != len(self.artifacts):
            raise ValueError("an artifact is named twice")

    def encode(self) -> bytes:
        """The manifest as it is written, with its own hash."""
        sealed = msgspec.structs.replace(self, sha256=self.digest())
        return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"

    def digest(self) -> str:
        """SHA-256 of everything but `sha256` itself."""
        return sha256_bytes(msgspec.json.encode(msgspec.structs.replace(self, sha256="")))


class AccuracyRow(Record, frozen=True, kw_only=True):
    """How often an artifact was right. `sha256` is the artifact's: accuracy of other weights is no accuracy of these.

    `backend`, `compute_type`, `instruction_set` and the artifact's `input` are what rounding depends on; they and
    `data_sha256` are None where the figure is declared, not measured. `lower` and `upper` are a 95 % Wilson interval.
    `right` has a bit per image, the first image the highest bit of the first byte: whether it was right. `outcomes`
    names the row's arrays in evaluation.npz.
    """

    artifact: str
    sha256: str
    backend: str | None
    compute_type: str | None
    instruction_set: str | None
    input: Input | None
    dataset: str
    data_sha256: str | None
    correct: int
    n: int
    top1: float
    lower: float
    upper: float
    source: Literal["measured", "declared"]
    right: bytes | None
    outcomes: str | None

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n or self.n < 1:
            raise ValueError(f"{self.correct} of {self.n} cannot be right")
        if abs(self.top1 - self.correct / self.n) > 0.5 / self.n + 1e-9:
            raise ValueError(f"top1 is {self.top1}, but {self.correct} of {self.n} are right")
        if not -1e-9 <= self.lower <= self.top1 + 1e-9 <= self.upper + 2e-9 <= 1 + 4e-9:
            raise ValueError(f"top1 {self.top1} is not from lower {self.lower} to upper {self.upper} in 0 to 1")
        if self.right is not None and (
            len(self.right) != (self.n + 7) // 8 or int.from_bytes(self.right, "big").bit_count() != self.correct
        ):
            raise ValueError(f"`right` does not say of {self.n} images that {self.correct} are")

    @property
    def measurement(self) -> tuple[str | None, ...]:
        """Which one this is: of what, by what, on what."""
        return self.sha256, self.backend, self.compute_type, self.instruction_set, self.dataset, self.source

    def replaces(self, other: AccuracyRow) -> bool:
        """Whether both are the same measurement, taken again."""
        return self.measurement == other.measurement


class AccuracyFile(Record, frozen=True, kw_only=True):
    """accuracy.json. `evaluation_sha256` is of the evaluation.npz it belongs to, None where there is none."""

    schema: int
    evaluation_sha256: str | None
    rows: tuple[AccuracyRow, ...]


@dataclass(frozen=True)
class Outcomes:
    """Per image (n,): the class an artifact named, the probability it gave it, and whether it is right."""

    prediction: NDArray[np.int32]
    probability: NDArray[np.float32]
    right: NDArray[np.bool_]


class Stamped(Record, frozen=True, kw_only=True):
    """What a file was when it was last hashed."""

    size_bytes: int
    mtime_ns: int
    inode: int
    sha256: str


class Stamp(Record, frozen=True, kw_only=True):
    """The last full verification; `manifest` is the hash of the manifest it belongs to."""

    manifest: str
    files: dict[str, Stamped]


@dataclass(frozen=True)
class Golden:
    """uint8 images (n, s, s, channels) and per artifact the logits (n, classes) it gave when it was exported."""

    images: NDArray[np.uint8]
    logits: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Made by `open_bundle`."""

    path: Path
    manifest: Manifest

    @property
    def spec(self) -> Spec:
        return self.manifest.spec

    def artifact(self, name: str) -> Artifact:
        """The artifact of that name; raises UsageError that names those there are."""
        for artifact in self.manifest.artifacts:
            if artifact.name == name:
                return artifact
        names = ", ".join(artifact.name for artifact in self.manifest.artifacts)
        raise UsageError(f"{self.path}: no artifact {name!r}", hint=f"it has {names}")

    def subnet(self, artifact: Artifact) -> Subnet:
        return self.spec.geometry.subnet(artifact.heads)

    def graph(self, artifact: Artifact, dialect: Dialect) -> Path:
        """The graph's file; raises MissingError where the artifact has none in that dialect."""
        if dialect not in artifact.graphs:
            raise MissingError(
                f"{artifact.name} has no graph in dialect {dialect}", hint=f"it has {', '.join(artifact.graphs)}"
            )
        return inside(self.path, artifact.graphs[dialect])

    def form(self, artifact: Artifact) -> Form:
        """Which stored tensors the artifact reads."""
        return form_of(self.spec, artifact)

    def extents(self, artifact: Artifact) -> tuple[Extent, ...]:
        """The parts of the weights file that the artifact's graphs read; none where they carry their own weights."""
        if artifact.weights is None:
            return ()
        path, table = inside(self.path, artifact.weights), self.manifest.weights[artifact.weights]
        parts = []
        for name, tensor in stored(self.subnet(artifact), self.form(artifact)).items():
            if name not in table:
                raise IntegrityError(f"{self.path / MANIFEST}: the table of {artifact.weights} has no tensor {name}")
            there = table[name]
            size = math.prod(leading_rows(there.shape, tensor.shape)) * ITEM_BYTES[there.dtype]
            parts.append(Extent(path, there.offset, size))
        return tuple(parts)

    def golden(self) -> Golden:
        """The golden samples; raises IntegrityError where they cannot be read."""
        from zipfile import BadZipFile

        import numpy as np

        path = inside(self.path, GOLDEN)
        try:
            # numpy leaves a file open that it opened and cannot read.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                logits = {name.removeprefix("logits."): arrays[name] for name in arrays.files if name != "images"}
                return Golden(arrays["images"], logits)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise IntegrityError(f"{path}: cannot be read ({error})", hint=_COPY_AGAIN) from error


class Extent(NamedTuple):
    """A contiguous part of a file."""

    path: Path
    offset: int
    length: int


def form_of(spec: Spec, artifact: Artifact) -> Form:
    """Which stored tensors an artifact reads."""
    return Form(dtype=artifact.dtype, input=artifact.input, int8=in_int8(artifact.quantisation, spec.geometry))


def in_int8(quantisation: Quantisation | None, geometry: Geometry) -> tuple[str, ...]:
    """The layers whose matrices are int8, in forward order: none where nothing is quantised."""
    return () if quantisation is None else tuple(one for one in layers(geometry) if one not in quantisation.kept)


def leading_rows(stored: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the smallest contiguous leading part of a row-major tensor that holds the wanted block."""
    axis = next((axis for axis, size in enumerate(stored) if size > 1), 0)
    return (*stored[:axis], wanted[axis], *stored[axis + 1 :])


def open_bundle(path: Path, check: Check = "stamp") -> Bundle:
    """Open a bundle.

    `stamp`: hash manifest and graphs, and the other files too unless they are those of the last verification;
    `always`: hash everything; `manifest`: hash the manifest alone, for those who read nothing else.

    Raises UsageError when there is no bundle, IntegrityError when a file is missing, changed or leads out of it.
    """
    if moved_aside(path):
        with locked(path, lambda _: None):
            pass
    if not path.is_dir():
        raise UsageError(f"{path}: no bundle here", hint="write one with hydradeploy export, or name it with --bundle")
    manifest = read_manifest(path)
    bundle = Bundle(path, manifest)
    if check == "manifest":
        return bundle
    try:
        _verify(bundle, trust_stamp=check == "stamp")
    except IntegrityError:
        if read_manifest(path).sha256 == manifest.sha256:
            raise
        return open_bundle(path, check)  # another one has taken its place since its manifest was read
    return bundle


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`, checked against its own hash."""
    file = path / MANIFEST
    try:
        data = inside(path, MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(f"{file}: missing", hint="this is no bundle, or it was copied incompletely") from error
    except OSError as error:
        raise IntegrityError(f"{file}: cannot be read ({error.strerror})") from error
    manifest = decode(data, Manifest, str(file), SCHEMA)
    if manifest.sha256 != manifest.digest():
        raise IntegrityError(f"{file}: changed since it was written (its sha256 does not agree)", hint=_COPY_AGAIN)
    return manifest


_COPY_AGAIN = "copy the bundle again, or export it again"


def read_accuracy(bundle: Bundle) -> tuple[AccuracyRow, ...]:
    """Every row of the bundle's accuracy file, none where there is no file; raises IntegrityError for a damaged one.

    Rows of artifacts that have since been replaced are among them: compare `sha256`.
    """
    return _accuracy(bundle).rows


def read_outcomes(bundle: Bundle) -> dict[str, Outcomes]:
    """The per-image outcomes by the `outcomes` name of their row.

    Raises IntegrityError where evaluation.npz is damaged or not the one accuracy.json was written with.
    """
    import numpy as np

    found = _accuracy(bundle)
    path = inside(bundle.path, EVALUATION)
    if found.evaluation_sha256 is None:
        return {}
    outcomes = {}
    try:
        data = path.read_bytes()
        if sha256_bytes(data) != found.evaluation_sha256:
            if _accuracy(bundle) != found:  # another process has evaluated in between
                return read_outcomes(bundle)
            raise IntegrityError(f"{path}: is not the one {ACCURACY} belongs to", hint="evaluate again")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for row in found.rows:
                if row.outcomes is not None and row.right is not None:
                    right = np.unpackbits(np.frombuffer(row.right, np.uint8), count=row.n).astype(bool)
                    prediction, probability = (arrays[f"{row.outcomes}.{part}"] for part in _OUTCOME_PARTS)
                    outcomes[row.outcomes] = Outcomes(prediction, probability, right)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise IntegrityError(f"{path}: cannot be read ({error})", hint="evaluate again") from error
    return outcomes


def holds_bundle(path: Path) -> bool:
    """Whether a directory is a bundle, whole or damaged: others have files of the name manifest.json too."""
    try:
        begins = (path / MANIFEST).read_bytes()[:4096]
    except OSError:
        return False
    return b'"schema"' in begins or (path / GOLDEN).exists()


def check_writable(bundle: Bundle) -> None:
    """Raise EnvironmentFailed where accuracy could not be written into the bundle."""
    with locked(bundle.path, lambda _: None), environment(f"writing accuracy into {bundle.path}"):
        try_writing(bundle.path)


def write_accuracy(bundle: Bundle, fresh: Mapping[AccuracyRow, Outcomes | None]) -> None:
    """Add rows; those they replace go, all others stay. Raises EnvironmentFailed when the disk fails."""
    import numpy as np

    with locked(bundle.path, lambda _: None):
        before = _accuracy(bundle).rows
        kept = [row for row in before if not any(new.replaces(row) for new in fresh)]
        outcomes: dict[str, Outcomes] = {}
        with suppress(IntegrityError):  # outcomes that do not belong to the rows are of no use to anybody
            outcomes = read_outcomes(bundle)
        # What was damaged is lost; that row's figures are not.
        kept = [row if row.outcomes in outcomes else msgspec.structs.replace(row, outcomes=None) for row in kept]
        outcomes |= {row.outcomes: found for row, found in fresh.items() if row.outcomes and found is not None}
        rows = (*kept, *fresh)
        wanted = {row.outcomes for row in rows}
        arrays = {
            f"{name}.{part}": getattr(found, part)
            for name, found in outcomes.items()
            if name in wanted
            for part in _OUTCOME_PARTS
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        record = AccuracyFile(schema=1, evaluation_sha256=sha256_bytes(buffer.getvalue()), rows=rows)
        with environment(f"writing accuracy into {bundle.path}"):
            text = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
            write_together({bundle.path / EVALUATION: buffer.getvalue(), bundle.path / ACCURACY: text})


_OUTCOME_PARTS = ("prediction", "probability")


def _accuracy(bundle: Bundle) -> AccuracyFile:
    path = inside(bundle.path, ACCURACY)
    try:
        return decode(path.read_bytes(), AccuracyFile, str(path))
    except FileNotFoundError:
        return AccuracyFile(schema=1, evaluation_sha256=None, rows=())
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from error


def golden_bytes(golden: Golden) -> bytes:
    """The golden file. Not compressed: the bytes then depend on the content alone."""
    import numpy as np

    buffer = io.BytesIO()
    logits = {f"logits.{name}": golden.logits[name] for name in sorted(golden.logits)}
    np.savez(buffer, images=golden.images, **logits)  # type: ignore[arg-type]  # the stubs take ** for allow_pickle
    return buffer.getvalue()


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a file of a staged bundle durably and return what it is."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(sha256=sha256_bytes(data), size_bytes=len(data))


def _verify(bundle: Bundle, *, trust_stamp: bool) -> None:
    manifest = bundle.manifest
    stamp = _read_stamp(bundle) if trust_stamp else None
    graphs = {name for artifact in manifest.artifacts for name in artifact.graphs.values()}
    seen: dict[str, Stamped] = {}
    for name, record in manifest.files.items():
        path = inside(bundle.path, name)
        try:
            status = path.stat()
            now = Stamped(
                size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino, sha256=record.sha256
            )
            if now.size_bytes != record.size_bytes:
                raise IntegrityError(
                    f"{path}: {now.size_bytes} bytes, the manifest says {record.size_bytes}", hint=_COPY_AGAIN
                )
            if name in graphs or stamp is None or stamp.files.get(name) != now:
                if sha256_file(path) != record.sha256:
                    raise IntegrityError(f"{path}: changed, its sha256 is not the manifest's", hint=_COPY_AGAIN)
        except FileNotFoundError as error:
            raise IntegrityError(f"{path}: missing", hint=_COPY_AGAIN) from error
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from error
        seen[name] = now
    fresh = Stamp(manifest=manifest.sha256, files=seen)
    if fresh != stamp:
        _write_stamp(bundle, fresh)


def _stamp_files(bundle: Bundle) -> tuple[Path, Path]:
    """In the bundle, and for a bundle that cannot be written to, in the user's cache."""
    name = sha256_bytes(os.fsencode(bundle.path.resolve()))[:32]
    return bundle.path / STAMP, user_cache() / "stamps" / f"{name}.json"


def _read_stamp(bundle: Bundle) -> Stamp | None:
    """The stamp that belongs to this manifest; whatever cannot be read is as good as none."""
    for file in _stamp_files(bundle):
        with suppress(OSError, msgspec.DecodeError):
            stamp = msgspec.json.decode(file.read_bytes(), type=Stamp)
            if stamp.manifest == bundle.manifest.sha256:
                return stamp
    return None


def _write_stamp(bundle: Bundle, stamp: Stamp) -> None:
    """Leave the stamp where it can be left; without one the next open only takes longer.

    Written in place, so that a kill leaves a torn stamp, which is as good as none, and no temporary file for good.
    """
    for file in _stamp_files(bundle):
        with suppress(OSError):
            if file.parent != bundle.path:
                file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb", opener=_not_through_a_link) as out:
                out.write(msgspec.json.encode(stamp))
            return


def _not_through_a_link(path: str, flags: int) -> int:
    """What a stranger's bundle has under the stamp's name may be a link to a file of the user's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
