"""LRU-SP picks the same victims as a textbook version that looks at everything each time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain.eviction import LruSp, PolicyEntry
from shared.domain.eviction.lru_sp import group_of
from shared.domain.objects import ObjectId
from shared.domain.space import footprint

IDS = [ObjectId(f"object-{number}") for number in range(12)]
EVERYTHING = 10**15


@dataclass
class Textbook:
    """A list in order of access; groups and costs are worked out anew for every victim."""

    items: list[PolicyEntry] = field(default_factory=list)

    def drop(self, object_id: ObjectId) -> PolicyEntry | None:
        for place, item in enumerate(self.items):
            if item.object_id == object_id:
                return self.items.pop(place)
        return None

    def add(self, entry: PolicyEntry) -> None:
        self.drop(entry.object_id)
        self.items.append(entry)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        item = self.drop(object_id)
        if item:
            last_access = max(item.last_access, now)
            self.items.append(PolicyEntry(object_id, item.size, item.frequency + views, last_access))

    def victim(self, now: float) -> PolicyEntry | None:
        oldest: dict[int, PolicyEntry] = {}
        for item in self.items:
            kilobytes = math.ceil(item.size / 1024)
            ratio = kilobytes / item.frequency
            group = 0 if ratio <= 1 else min(23, math.ceil(math.log2(ratio)))
            oldest.setdefault(group, item)
        best, highest = None, 0.0
        for group in sorted(oldest):
            item = oldest[group]
            minutes = math.ceil((now - item.last_access) / 60)
            cost = minutes * math.ceil(item.size / 1024) / item.frequency
            if cost >= highest:
                best, highest = item, cost
        return best


sizes = st.one_of(
    st.integers(0, 5000), st.integers(1, 2**34), st.sampled_from([1024 * 2**n for n in range(26)])
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "access", "access", "remove", "evict", "wait"]),
        st.sampled_from(IDS),
        sizes,
        st.integers(1, 9),
        st.one_of(st.floats(0, 59), st.sampled_from([60.0, 120.0, 3600.0, 86400.0])),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_same_victims_as_the_textbook(trace: list[tuple[str, ObjectId, int, int, float]]) -> None:
    policy, textbook, now = LruSp(), Textbook(), 1_700_000_000.0
    for what, object_id, size, number, pause in trace:
        now += pause
        match what:
            case "add":
                policy.add(PolicyEntry(object_id, size, number, now))
                textbook.add(PolicyEntry(object_id, size, number, now))
            case "access":
                policy.access(object_id, number, now)
                textbook.access(object_id, number, now)
            case "remove":
                policy.remove(object_id)
                textbook.drop(object_id)
            case "evict":
                expected = textbook.victim(now)
                assert policy.victims(1, now) == ([expected] if expected else [])
                if expected:
                    policy.remove(expected.object_id, evicted=True)
                    textbook.drop(expected.object_id)
    restored = LruSp()
    restored.restore(policy.dump(), policy.inflation)
    in_order = policy.victims(EVERYTHING, now)
    assert len(in_order) == len(policy) == len(textbook.items)
    # The same moment of last access in one group: which of them came first is not kept over a restart
    if len({entry.last_access for entry in in_order}) == len(in_order):
        assert restored.victims(EVERYTHING, now) == in_order
    for entry in in_order:
        expected = textbook.victim(now)
        assert entry == expected
        textbook.drop(entry.object_id)


@pytest.mark.parametrize(
    ("size", "frequency", "group"),
    [
        (0, 1, 0),
        (1, 1, 0),
        (1024, 1, 0),
        (1025, 1, 1),
        (2048, 1, 1),
        (2049, 1, 2),
        (1024 * 1024, 1, 10),
        (1024 * 1024, 2, 9),
        (1024 * 1024, 3, 9),
        (1024 * 1024, 5000, 0),
        (2**33, 1, 23),
        (2**40, 1, 23),
    ],
)
def test_groups(size: int, frequency: int, group: int) -> None:
    assert group_of(size, frequency) == group


def entry(name: str, size: int = 1024, frequency: int = 1, last_access: float = 0.0) -> PolicyEntry:
    return PolicyEntry(ObjectId(name), size, frequency, last_access)


def test_of_equal_costs_the_later_group_goes_first() -> None:
    policy = LruSp()
    policy.add(entry("small", 1024, 1, last_access=0))  # group 0: 2 minutes × 1 KB
    policy.add(entry("large", 2048, 1, last_access=60))  # group 1: 1 minute × 2 KB
    assert [victim.object_id for victim in policy.victims(EVERYTHING, 120)] == ["large", "small"]


def test_victims_add_up_to_what_is_wanted_and_change_nothing() -> None:
    policy = LruSp()
    for number in range(10):
        policy.add(entry(f"o{number}", last_access=number))
    two = policy.victims(footprint(1024) + 1, 100)
    assert [victim.object_id for victim in two] == ["o0", "o1"]
    assert policy.victims(footprint(1024) + 1, 100) == two
    assert len(policy.victims(EVERYTHING, 100, at_most=3)) == 3
    assert policy.victims(0, 100) == []


def test_spared_and_fresh_objects_are_passed_over_and_not_lost() -> None:
    policy = LruSp()
    for number in range(4):
        policy.add(entry(f"o{number}", last_access=number * 10))
    chosen = policy.victims(EVERYTHING, 35, min_idle=10, spared={ObjectId("o1")})
    assert [victim.object_id for victim in chosen] == ["o0", "o2"]
    assert len(policy.victims(EVERYTHING, 35)) == 4


def test_a_late_report_makes_no_object_older() -> None:
    policy = LruSp()
    policy.add(entry("one", last_access=100))
    policy.access(ObjectId("one"), 2, 50)
    known = policy.get(ObjectId("one"))
    assert known is not None
    assert (known.frequency, known.last_access) == (3, 100)
