"""An artifact to be: what decides its graphs, its file names and the tensors it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydradeploy.bundle import Artifact, Batch, Dialect, Quantisation, in_int8
from hydradeploy.exporter import graph as graphs
from hydradeploy.exporter.precision import Precision, precision
from hydradeploy.spec import Geometry
from hydradeploy.stored import Form, Input


@dataclass(frozen=True)
class Job:
    """One artifact: its subnet, precision, batch, input, and whether its graphs carry their own weights.

    `quantisation` is None where nothing is int8.
    """

    heads: int
    precision: Precision
    batch: Batch
    standalone: bool
    input: Input = "float32"
    quantisation: Quantisation | None = None

    @property
    def name(self) -> str:
        """`h06-int8`, and `h06-int8-uint8` where images are."""
        return f"h{self.heads:02d}-{self.precision.name}" + ("-uint8" if self.input == "uint8" else "")

    @property
    def weights_file(self) -> str:
        """The weights file that it shares."""
        return f"supernet-{self.precision.weights}.weights"

    @property
    def steps(self) -> dict[str, float]:
        """The quantisation steps of activations, by the names that graphs have for them."""
        if self.quantisation is None or self.quantisation.calibration is None:
            return {}
        return {graphs.step_of(layer): step for layer, step in self.quantisation.calibration.scales.items()}

    def graph_file(self, dialect: Dialect) -> str:
        return f"{self.name}.onnx" if dialect == "ort" else f"{self.name}.{dialect}.onnx"

    def form(self, geometry: Geometry) -> Form:
        """Which stored tensors it reads."""
        return Form(dtype=self.precision.dtype, input=self.input, int8=in_int8(self.quantisation, geometry))

    def graphs(self, geometry: Geometry) -> dict[Dialect, graphs.Graph]:
        """Its graph in every dialect that the precision has."""
        subnet, form = geometry.subnet(self.heads), self.form(geometry)
        return {
            dialect: graphs.write(subnet, self.precision, form, dialect, self.batch)
            for dialect in self.precision.dialects
        }

    def with_quantisation(self, found: Quantisation) -> Job:
        return replace(self, quantisation=found)


def job_of(artifact: Artifact) -> Job:
    """The job that made an artifact."""
    return Job(
        artifact.heads,
        precision(artifact.precision),
        artifact.batch,
        artifact.weights is None,
        artifact.input,
        artifact.quantisation,
    )
