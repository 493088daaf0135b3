"""What is kept ready for each batch size that a session is called with, of the sizes called last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

# Batch sizes of a dynamic model whose memory and CUDA graphs are kept.
SIZES = 4


class Closes(Protocol):
    """A lane: it gives back what it holds."""

    def close(self) -> None: ...


Lane = TypeVar("Lane", bound=Closes)


class Lanes(Generic[Lane]):
    """Lanes by batch size, made by `new(batch)` at the first call of a size; those called longest ago are closed."""

    def __init__(self, new: Callable[[int], Lane]) -> None:
        self._new = new
        self._kept: OrderedDict[int, Lane] = OrderedDict()

    def of(self, batch: int) -> Lane:
        """The one for that many images; raises what `new` does, and then keeps the others."""
        if batch not in self._kept:
            # First out, then in: the GPU may not have room for one more.
            while len(self._kept) >= SIZES:
                self._kept.popitem(last=False)[1].close()
            self._kept[batch] = self._new(batch)
        self._kept.move_to_end(batch)
        return self._kept[batch]

    def close(self) -> None:
        """Close them all, the one called last first."""
        while self._kept:
            self._kept.popitem()[1].close()
