"""The order in which look-ups are sent, and which are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.adapters.catalogs.batches import LookupQueue
from distributor_node.shared.domain.objects import ObjectId


def queued(*lookups: tuple[str, str], seen: str = "") -> LookupQueue:
    """`lookups`: client and object, in the order of arrival; `seen`: the objects seen before."""
    queue = LookupQueue()
    for now, (client, object_id) in enumerate(lookups):
        queue.add(ObjectId(object_id), client, now, seen_before=object_id in seen.split())
    return queue


def taken(queue: LookupQueue, count: int = 100) -> list[str]:
    return [str(lookup.object_id) for lookup in queue.take(count)]


def test_objects_seen_before_go_first() -> None:
    assert taken(queued(("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), seen="1"))[0] == "1"


def test_clients_take_turns() -> None:
    flood = [("flood", str(number)) for number in range(100)]
    assert set(taken(queued(("a", "1000"), *flood, ("b", "1001")), 3)) == {"1000", "99", "1001"}


@pytest.mark.parametrize("count", [10, 3, 1])  # 1: an origin's
def test_clients_that_ask_again_at_once_do_not_keep_others_waiting(count: int) -> None:
    """Those that were answered are the newest ones again: newest first alone, the same ones would fill every take."""
    strangers = [(f"stranger-{number}", str(number)) for number in range(40)]
    queue = queued(*strangers[:10], ("viewer", "wanted"), *strangers[10:])
    made_up, takes = 40, 0
    while ObjectId("wanted") in queue:
        answered = queue.take(count)
        takes += 1
        for lookup in answered:
            queue.add(ObjectId(str(made_up)), next(iter(lookup.clients)), made_up, seen_before=False)
            made_up += 1
        assert takes <= 100 / count


def test_the_newest_of_a_client_goes_first() -> None:
    assert taken(queued(("a", "1"), ("a", "2"), ("a", "3"))) == ["3", "2", "1"]


def test_an_object_waits_once_and_for_all_its_clients() -> None:
    queue = queued(("flood", "1"), ("flood", "2"), ("flood", "3"), ("a", "1"))
    assert len(queue) == 3
    assert set(taken(queue, 2)) == {"1", "3"}
    assert taken(queue) == ["2"]
    assert not len(queue)


def test_the_oldest_of_the_client_with_the_most_is_refused() -> None:
    queue = queued(("a", "1"), ("flood", "2"), ("flood", "3"), ("b", "4"))
    assert [queue.drop(), queue.drop()] == ["2", "1"]


@pytest.mark.parametrize("arriving", [2, 3, 4, 8])
def test_in_an_overload_nothing_waits_in_vain(arriving: int) -> None:
    """As many clients with one look-up each may wait as are answered in four rounds, and more keep coming."""
    queue, rounds, answered = LookupQueue(), 60, list[int]()
    for now in range(rounds):
        for number in range(arriving * 10):
            queue.add(ObjectId(f"{now}-{number}"), f"{now}-{number}", now, seen_before=True)
            if len(queue) > 40:
                queue.drop()
        answered += [now - int(lookup.queued_at) for lookup in queue.take(10)]
    assert len(answered) == rounds * 10
    assert max(answered) < 4


def test_objects_seen_before_are_refused_last() -> None:
    queue = queued(("a", "1"), ("a", "2"), ("b", "3"), seen="1 2")
    assert [queue.drop(), queue.drop(), queue.drop(), queue.drop()] == ["3", "1", "2", None]


def test_what_others_wait_for_too_is_not_refused_first() -> None:
    queue = queued(("flood", "1"), ("flood", "2"), ("flood", "3"), ("a", "1"))
    assert queue.drop() == "2"


def test_the_age_is_that_of_the_oldest() -> None:
    queue = queued(("a", "1"), ("a", "2"))
    assert queue.oldest_at() == 0
    assert queue.remove(ObjectId("1"))
    assert not queue.remove(ObjectId("1"))
    assert queue.oldest_at() == 1
    queue.take(1)
    assert queue.oldest_at() is None


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("123456")), max_size=30),
    st.lists(st.sampled_from(["take", "drop", "remove"]), max_size=30),
)
def test_each_object_leaves_once(lookups: list[tuple[str, str]], steps: list[str]) -> None:
    queue = queued(*lookups, seen="1 2")
    left: list[str] = []
    for step in steps:
        if step == "take":
            left += taken(queue, 2)
        elif step == "drop":
            dropped = queue.drop()
            left += [] if dropped is None else [dropped]
        elif queue.remove(ObjectId("3")):
            left.append("3")
    left += taken(queue)
    assert sorted(left) == sorted({object_id for _, object_id in lookups})
    assert (len(queue), queue.oldest_at(), queue.drop()) == (0, None, None)
