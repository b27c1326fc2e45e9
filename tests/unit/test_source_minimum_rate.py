"""A source is too slow if it sends less than the minimum rate while it is waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.adapters.sources.client import MinimumRate


def test_the_first_bytes_may_take_a_window() -> None:
    minimum_rate = MinimumRate(10, 1000)
    assert minimum_rate.time_left == 10
    minimum_rate.record(4, 0)
    assert minimum_rate.time_left == 6


def test_silence_is_tolerated_for_one_window_after_the_last_bytes() -> None:
    minimum_rate = MinimumRate(10, 1000)
    minimum_rate.record(7, 50_000)
    assert minimum_rate.time_left == 10
    minimum_rate.record(3, 0)
    assert minimum_rate.time_left == 7


def test_a_trickle_is_too_slow() -> None:
    minimum_rate = MinimumRate(10, 1000)
    for _ in range(200):
        minimum_rate.record(0.1, 5)
        if minimum_rate.time_left <= 0:
            break
    assert 10 <= minimum_rate.waited <= 11


def test_just_enough_is_enough() -> None:
    minimum_rate = MinimumRate(10, 1000)
    for _ in range(500):
        minimum_rate.record(0.1, 11)
        assert minimum_rate.time_left > 0


def test_a_trickle_after_a_burst_is_noticed_one_window_later() -> None:
    minimum_rate = MinimumRate(10, 1000)
    minimum_rate.record(5, 10**9)
    while minimum_rate.time_left > 0:
        minimum_rate.record(0.5, 10)
    assert 15 <= minimum_rate.waited <= 16


def test_one_byte_at_least_is_demanded() -> None:
    minimum_rate = MinimumRate(10, 0)
    minimum_rate.record(10, 0)
    assert minimum_rate.time_left <= 0


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 500))), st.integers(0, 1000))
def test_time_left_never_exceeds_the_window(arrivals: list[tuple[float, int]], minimum: int) -> None:
    minimum_rate = MinimumRate(10, minimum)
    for waited, received in arrivals:
        minimum_rate.record(waited, received)
        assert minimum_rate.time_left <= 10 + 1e-9


@given(st.lists(st.tuples(st.floats(0.01, 3), st.integers(100, 500)), min_size=1))
def test_enough_bytes_in_every_window_is_never_too_slow(arrivals: list[tuple[float, int]]) -> None:
    # At most 3 s between arrivals of at least 100 bytes: at least 3 arrivals in any 10 s.
    minimum_rate = MinimumRate(10, 300)
    for waited, received in arrivals:
        assert minimum_rate.time_left >= min(waited, 3) - 1e-9
        minimum_rate.record(waited, received)


@pytest.mark.parametrize("chunks", [10_000])
def test_many_added_objects_keep_few_slots(chunks: int) -> None:
    minimum_rate = MinimumRate(10, 1000)
    for _ in range(chunks):
        minimum_rate.record(0.01, 1_000_000)
    assert len(minimum_rate._slots) <= 12
