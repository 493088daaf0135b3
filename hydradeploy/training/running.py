"""How a run is carried out: what changes its speed and what it tells, not its result."""

from __future__ import annotations

from hydradeploy.spec import Record


class Running(Record, frozen=True, kw_only=True):
    """The machine's side of a run.

    `device` is cpu or cuda, by default cuda where there is one. `workers` read images, in each process. A step's images
    go through in `accumulate` parts, where memory is short. `compile` uses torch.compile. The state is saved after each
    epoch and every `save_every` steps. `bad_images` is how many images that cannot be read are replaced by their next
    neighbour before the run stops. Metrics are appended to a file of JSON lines beside the supernet, and written for
    TensorBoard below `tensorboard`.
    """

    device: str | None = None
    workers: int = 4
    accumulate: int = 1
    compile: bool = False
    save_every: int | None = None
    bad_images: int = 0
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        for field, least in (("workers", 0), ("accumulate", 1), ("bad_images", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")
