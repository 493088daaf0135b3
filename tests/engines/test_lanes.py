"""What is kept for each batch size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.engines.lanes import SIZES, Lanes


class Lane:
    def __init__(self, batch: int, closed: list[int]) -> None:
        self.batch, self._closed = batch, closed

    def close(self) -> None:
        self._closed.append(self.batch)


@given(st.lists(st.integers(1, 2 * SIZES), max_size=40))
def test_the_sizes_called_last_are_kept_and_each_is_closed_once(calls):
    made, closed = [], []
    lanes = Lanes(lambda batch: made.append(batch) or Lane(batch, closed))
    for at, batch in enumerate(calls):
        last = list(dict.fromkeys(reversed(calls[:at])))[:SIZES]
        before = len(made)
        assert lanes.of(batch).batch == batch
        assert (len(made) == before) == (batch in last)
        assert len(made) - len(closed) <= SIZES
    lanes.close()
    assert sorted(closed) == sorted(made)


def test_room_is_made_before_one_more_is_wanted_and_the_others_outlive_its_failure():
    closed = []

    def new(batch):
        if batch == SIZES:
            assert closed == [0]
            raise MemoryError
        return Lane(batch, closed)

    lanes = Lanes(new)
    for batch in range(SIZES):
        lanes.of(batch)
    with pytest.raises(MemoryError):
        lanes.of(SIZES)
    assert [lanes.of(batch).batch for batch in range(1, SIZES)] == list(range(1, SIZES))
    lanes.close()
    assert closed == [0, *reversed(range(1, SIZES))]
