"""Default watermarks, and the ghost list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.services.evictor.index import GHOST_TTL, GhostList
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import watermarks_for

GIB, MIB = 1024**3, 1024**2


@pytest.mark.parametrize(
    ("limit", "largest", "high_room", "low_room"),
    [
        (20 * GIB, None, 512 * MIB, 768 * MIB),
        (100 * MIB, None, 10 * MIB, 15 * MIB),
        (500 * GIB, None, 10 * GIB, 15 * GIB),
        (500 * GIB, 2 * GIB, 10 * GIB, 15 * GIB),
        (50 * GIB, 2 * GIB, 2 * GIB, 3 * GIB),
        (10 * GIB, 5 * GIB, GIB, GIB + GIB // 2),
    ],
)
def test_default_watermarks_leave_room(
    limit: int, largest: int | None, high_room: int, low_room: int
) -> None:
    marks = watermarks_for(limit, largest)
    assert (limit - marks.high, limit - marks.low) == (high_room, low_room)


def test_a_given_watermark_is_kept_and_moves_the_other() -> None:
    assert watermarks_for(1000, None, 0.95, 0.9) == watermarks_for(1000, 5, 0.95, 0.9)
    assert watermarks_for(1000, None, 0.5).low == 450
    assert watermarks_for(1000, None, None, 0.97).high == 970
    assert watermarks_for(1000, None, 0.01).low == 0


@given(st.integers(1, 10**15), st.none() | st.integers(0, 10**15), st.none() | st.floats(0.01, 1))
def test_marks_are_in_order_and_below_the_limit(limit: int, largest: int | None, share: float | None) -> None:
    for marks in (watermarks_for(limit, largest, share), watermarks_for(limit, largest, None, share)):
        assert 0 <= marks.low <= marks.high <= limit


def test_a_ghost_hit_is_counted_once() -> None:
    now = 1000.0
    ghosts = GhostList(lambda: now, max_size=2)
    one, two, three = (ObjectId(name) for name in ("1", "2", "3"))
    for victim in (one, two, three):
        ghosts.add(victim)
    assert not ghosts.hit(one)  # forgotten: there were too many
    assert ghosts.hit(two)
    assert not ghosts.hit(two)
    now += GHOST_TTL + 1
    assert not ghosts.hit(three)
