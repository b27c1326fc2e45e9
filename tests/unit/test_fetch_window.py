"""How far the streams of one fetch read ahead of viewers, and when all of an object is fetched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.domain.extents import BLOCK, Extents
from distributor_node.shared.domain.space import Completion, FetchWindow, Viewer

MIB = 1024 * 1024
SIZE, WINDOW = 100 * MIB, 8 * MIB


def rule(*positions: int, first: int = 0) -> FetchWindow:
    """One whose viewers are known to be there."""
    window = FetchWindow(SIZE, WINDOW, 0.0)
    window.update(0.0, [Viewer(first, position) for position in positions])
    return window


def reason(window: FetchWindow) -> Completion | None:
    return window.completion


def prefix(size: int) -> Extents:
    return Extents.of((0, size))


@pytest.mark.parametrize(
    ("viewer", "read", "goes_on"),
    [
        (0, 0, True),
        (0, WINDOW - 1, True),
        (0, WINDOW, False),
        (5 * MIB, WINDOW, True),
        (5 * MIB, 5 * MIB + WINDOW, False),
        (10 * MIB, 5 * MIB, True),  # the viewer waits for it
        (40 * MIB, 5 * MIB, False),  # this one gets a stream of its own
    ],
)
def test_the_main_stream_reads_a_window_ahead(viewer: int, read: int, goes_on: bool) -> None:
    assert rule(viewer).may_read(read, prefix(read)) is goes_on


def test_the_main_stream_goes_to_viewers_that_wait_for_it() -> None:
    window = FetchWindow(SIZE, MIB, 0.0, near=4 * MIB)
    window.update(0.0, [Viewer(3 * MIB, 3 * MIB)])
    assert window.may_read(0, prefix(0))
    assert not window.may_read(4 * MIB, prefix(4 * MIB))


def test_the_furthest_of_several_viewers_counts() -> None:
    assert rule(MIB, 30 * MIB, 2 * MIB).may_read(30 * MIB, prefix(30 * MIB))
    assert not rule(MIB, 30 * MIB, 2 * MIB).may_read(38 * MIB, prefix(38 * MIB))


def test_each_stream_reads_for_the_viewer_behind_it() -> None:
    there = Extents.of((0, 12 * MIB), (50 * MIB, 53 * MIB))
    filling = (12 * MIB, 53 * MIB)
    window = rule(MIB, 51 * MIB)
    assert not window.may_read(12 * MIB, there, filling)
    assert window.may_read(53 * MIB, there, filling, main=False)
    assert not rule(MIB).may_read(53 * MIB, there, filling, main=False)
    assert rule(MIB, 51 * MIB).has_viewer_of(53 * MIB, there)
    assert not rule(MIB).has_viewer_of(53 * MIB, there)


def test_a_viewer_ahead_for_whom_another_stream_reads_is_left_to_it() -> None:
    there = Extents.of((0, 12 * MIB), (15 * MIB, 16 * MIB))
    assert not rule(15 * MIB).may_read(12 * MIB, there, [16 * MIB])
    assert rule(15 * MIB).may_read(12 * MIB, there, [])


def test_a_stream_that_begins_with_the_block_of_its_viewer_serves_it() -> None:
    wanted = 50 * MIB + 17
    assert rule(wanted).may_read(50 * MIB, prefix(MIB), main=False)
    assert not rule(wanted).may_read(50 * MIB - BLOCK, prefix(MIB), main=False)


def test_without_viewers_streams_stay_where_the_last_ones_were() -> None:
    window = rule(10 * MIB)
    window.update(1.0, [])
    assert window.may_read(17 * MIB, prefix(17 * MIB))
    assert not window.may_read(18 * MIB, prefix(18 * MIB))
    assert window.alone_for(1.0) == 0
    window.update(31.0, [])
    assert window.alone_for(31.0) == 30
    window.update(32.0, [Viewer(0, 0)])
    assert window.alone_for(32.0) == 0


def test_viewers_are_unknown_until_a_process_has_told_or_had_the_time_to() -> None:
    window = FetchWindow(SIZE, WINDOW, 0.0)
    assert window.may_read(WINDOW - 1, prefix(WINDOW - 1))  # before they were looked at for the first time
    assert not window.may_read(WINDOW, prefix(WINDOW))
    window.update(1.0, [], told=False)
    assert reason(window) is Completion.VIEWERS_UNKNOWN
    assert window.may_read(90 * MIB, prefix(90 * MIB))
    assert window.alone_for(4.0) == 0
    window.update(6.0, [], told=False)
    assert not window.may_read(90 * MIB, prefix(90 * MIB))
    told = FetchWindow(SIZE, WINDOW, 0.0)
    told.update(0.1, [Viewer(0, 0)])
    assert told.completion is None


def test_clients_of_a_process_that_does_not_tell_where_they_are_never_wait() -> None:
    window = rule(0)
    window.update(2.0, [Viewer(0, MIB)], untold=True)
    assert window.may_read(90 * MIB, prefix(90 * MIB))
    window.update(4.0, [Viewer(0, MIB)])  # between two reports of the other process
    assert reason(window) is Completion.VIEWERS_UNKNOWN
    assert window.alone_for(4.0) == 0
    window.update(7.5, [])
    assert reason(window) is None


def test_a_second_view_that_stays_completes_it_for_good() -> None:
    window, fifth = rule(MIB), SIZE // 5 + 1
    window.update(1.0, [Viewer(0, fifth)], views=1)
    assert reason(window) is None
    window.update(2.0, [Viewer(0, fifth - MIB)], views=2)
    assert reason(window) is None  # it only looks in
    window.update(3.0, [Viewer(0, fifth)], views=2)
    window.update(4.0, [], views=1)
    assert reason(window) is Completion.SECOND_VIEW
    assert window.may_read(50 * MIB, prefix(50 * MIB))
    assert window.has_viewer_of(50 * MIB, prefix(50 * MIB))


def test_what_the_operator_orders_is_complete() -> None:
    assert FetchWindow(SIZE, WINDOW, 0.0, ordered=True).completion is Completion.ORDERED
    window = rule(MIB)
    window.update(1.0, [], ordered=True)
    assert reason(window) is Completion.ORDERED


def test_spare_time_is_used_while_it_lasts() -> None:
    window = rule(MIB)
    window.update(1.0, [Viewer(0, MIB)], spare_time=True)
    assert reason(window) is Completion.SPARE_TIME
    window.update(2.0, [Viewer(0, MIB)])
    assert reason(window) is None


@pytest.mark.parametrize(
    ("first", "position", "watched"),
    [
        (0, 80 * MIB - 1, False),
        (0, 80 * MIB, True),
        (50 * MIB, 80 * MIB, True),
        (97 * MIB, 97 * MIB, False),  # a player that reads the index at the end
        (97 * MIB, SIZE - 64 * 1024, False),
        (85 * MIB, 90 * MIB, True),
    ],
)
def test_a_viewer_that_has_passed_four_fifths_wants_all(first: int, position: int, watched: bool) -> None:
    assert (rule(position, first=first).completion is Completion.WATCHED) is watched


@given(
    st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=4),
)
def test_no_viewer_waits_for_a_stream_that_waits(
    positions: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> None:
    """Of the streams at the ends of all extents, the one in front of a viewer that has nothing to read goes on."""
    window, there = rule(*positions), Extents.of((0, 0), *ranges)
    filling = {extent.end for extent in there} | {there.prefix}
    for position in positions:
        if there.end_at(position) == position and position in filling:
            main = position == there.prefix
            assert window.may_read(position, there, filling - {position}, main=main)


@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=5), st.integers(0, SIZE))
def test_no_stream_is_a_window_ahead_of_all_viewers(positions: Sequence[int], read: int) -> None:
    window = rule(*positions)
    if window.completion is None and window.may_read(read, prefix(read)):
        assert read < max(positions) + WINDOW
