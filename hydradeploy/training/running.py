"""How a run is carried out: what changes its speed and what it tells, not its result."""

from __future__ import annotations

from hydradeploy.spec import Record


class Running(Record, frozen=True, kw_only=True):
    """The machine's side of a run.

    `device` is cpu or cuda, by default cuda where there is one. `workers` read images for each process, by default as
    many as it has cores, 8 at most. A step's images go through in `accumulate` parts, where memory is short. `compile`
    uses torch.compile. The state is saved after each epoch and every `save_every` steps. `bad_images` is how many
    images that cannot be read are replaced by their next neighbour before the run stops. Metrics are appended to a file
    of JSON lines beside the supernet, and written for TensorBoard below `tensorboard`.
    """

    device: str | None = None
    workers: int | None = None
    accumulate: int = 1
    compile: bool = False
    save_every: int | None = None
    bad_images: int = 0
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        for field, least in (("workers", 0), ("accumulate", 1), ("bad_images", 0), ("save_every", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} must be at least {least}, got {value}")
