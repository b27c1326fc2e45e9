"""Which gaps get a side stream."""

from __future__ import annotations

from time import process_time

from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.fetcher.side_streams import MAX_AHEAD, gaps_to_fill
from distributor_node.shared.domain.extents import BLOCK, Extent, Extents

SIZE = 1000 * BLOCK + 5


def test_the_gap_nearest_to_its_viewer_comes_first() -> None:
    there = Extents.of((0, 10 * BLOCK), (100 * BLOCK, 150 * BLOCK))
    wanted = [120 * BLOCK, 500 * BLOCK, 3 * BLOCK]
    assert gaps_to_fill(wanted, there, [], SIZE, 9) == [
        Extent(500 * BLOCK, SIZE),
        Extent(10 * BLOCK, 100 * BLOCK),
        Extent(150 * BLOCK, SIZE),
    ]
    assert gaps_to_fill(wanted, there, [], SIZE, 1) == [Extent(500 * BLOCK, SIZE)]
    assert gaps_to_fill(wanted, there, [], SIZE, 0) == []


def test_a_gap_that_a_stream_fills_gets_none() -> None:
    there = Extents.of((0, 10 * BLOCK), (100 * BLOCK, 150 * BLOCK))
    assert gaps_to_fill([3 * BLOCK, 120 * BLOCK], there, [10 * BLOCK], SIZE, 9) == [Extent(150 * BLOCK, SIZE)]


def test_a_stream_begins_at_a_whole_block_where_it_can() -> None:
    assert gaps_to_fill([500 * BLOCK + 9], Extents(), [], SIZE, 9) == [Extent(500 * BLOCK, SIZE)]
    there = Extents.of((0, 500 * BLOCK + 4))
    assert gaps_to_fill([500 * BLOCK + 9], there, [], SIZE, 9) == [Extent(500 * BLOCK + 4, SIZE)]
    # Its block is the one of the stream that is there already.
    assert gaps_to_fill([500 * BLOCK + 9], there, [500 * BLOCK + 4], SIZE, 9) == []


def test_a_gap_far_ahead_of_its_viewer_can_wait() -> None:
    there = Extents.of((0, 2 * MAX_AHEAD))
    size = 4 * MAX_AHEAD
    assert gaps_to_fill([MAX_AHEAD - BLOCK], there, [], size, 9) == []
    assert gaps_to_fill([MAX_AHEAD], there, [], size, 9) == [Extent(2 * MAX_AHEAD, size)]


def test_nonsense_is_ignored() -> None:
    assert gaps_to_fill([-1, SIZE, 10**15], Extents(), [], SIZE, 9) == []
    assert gaps_to_fill([0, 5], Extents.of((0, SIZE)), [], SIZE, 9) == []


@given(
    st.lists(st.integers(-5, SIZE + 5), max_size=10),
    st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=6),
    st.lists(st.integers(0, SIZE), max_size=3),
)
def test_no_byte_is_asked_for_twice(
    wanted: list[int], ranges: list[tuple[int, int]], filling: list[int]
) -> None:
    there = Extents.of(*ranges)
    for gap in gaps_to_fill(wanted, there, filling, SIZE, 99):
        assert not [extent for extent in there if extent.first < gap.end and gap.first < extent.end]
        assert gap.first not in filling
    found = gaps_to_fill(wanted, there, filling, SIZE, 99)
    assert len({gap.first for gap in found}) == len(found)


def test_many_viewers_of_many_extents_cost_no_turn_of_the_event_loop() -> None:
    mib = 1024 * 1024
    there = Extents.of((0, mib), *((number * 10 * mib, number * 10 * mib + mib) for number in range(1, 40)))
    wanted = [number * 3 * mib + 5 * mib + BLOCK - 1 for number in range(64)]
    began_at = process_time()
    assert len(gaps_to_fill(wanted, there, [], 4096 * mib, 8)) == 8
    assert process_time() - began_at < 0.05
