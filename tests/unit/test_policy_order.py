"""Every eviction policy names the same victims in the same order as its textbook version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributor_node.shared.domain.eviction import EvictionPolicy, Gdsf, Lru, LruSp, MissCost, PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from tests.unit.textbook_policies import Textbook, TextbookGdsf, TextbookLru, TextbookLruSp

MIB = 1024**2
POLICIES: dict[str, tuple[Callable[[], EvictionPolicy], Callable[[], Textbook]]] = {
    "lru": (Lru, TextbookLru),
    "lru-sp": (LruSp, TextbookLruSp),
    "gdsf": (Gdsf, TextbookGdsf),
    "gdsf, 30x": (partial(Gdsf, MissCost(30.0)), partial(TextbookGdsf, miss_cost=96.0 * MIB, multiple=30.0)),
    "gdsf, bytes count": (partial(Gdsf, MissCost(fixed=0)), partial(TextbookGdsf, fixed=0.0)),
    "gdsf, misses count": (partial(Gdsf, MissCost(fixed=2**60)), partial(TextbookGdsf, fixed=2.0**60)),
}

# Few ids, sizes and times: ties, replaced entries and late reports are what goes wrong.
ids = st.integers(0, 24).map(lambda number: ObjectId(f"object-{number}"))
sizes = st.one_of(
    st.sampled_from([0, 1, 1023, 1024, 1025, 20_000, 2 * MIB, 80 * MIB, 2**31, 2**45]),
    st.sampled_from([1024 * 2**power for power in range(26)]),  # where the groups of lru-sp begin
)
steps = st.sampled_from([0.0, 0.0, 0.25, 1.0, 30.0, 60.0, 61.0, 120.0, 3600.0, 86_400.0])


@dataclass(frozen=True)
class Added:
    object_id: ObjectId
    size: int
    frequency: int


@dataclass(frozen=True)
class Stored:
    object_id: ObjectId
    size: int
    begins_view: bool


@dataclass(frozen=True)
class Accessed:
    object_id: ObjectId
    views: int
    late: float


@dataclass(frozen=True)
class Removed:
    object_id: ObjectId
    evicted: bool


@dataclass(frozen=True)
class Chosen:
    wanted: int
    min_idle: float
    spared: frozenset[ObjectId]
    at_most: int
    evict: bool


@dataclass(frozen=True)
class Restored:
    twice: bool


added = st.builds(Added, ids, sizes, st.sampled_from([1, 1, 1, 2, 3, 7, 1000]))
stored = st.builds(Stored, ids, sizes, st.booleans())
actions = st.one_of(
    added,
    stored,
    stored,
    st.builds(
        Accessed, ids, st.sampled_from([0, 1, 1, 2, 5, 30_000]), st.sampled_from([0.0, 0.0, 2.0, 100.0])
    ),
    st.builds(Removed, ids, st.booleans()),
    st.builds(
        Chosen,
        st.sampled_from([0, 1, 30_000, 3 * MIB, 2**33, 2**50]),
        st.sampled_from([0.0, 0.0, 1.0, 120.0]),
        st.frozensets(ids, max_size=4),
        st.sampled_from([1, 3, 1000]),
        st.booleans(),
    ),
    st.builds(Restored, st.booleans()),
)
traces = st.lists(st.tuples(steps, actions), max_size=80)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=400, deadline=None)
@given(trace=traces)
def test_same_victims_as_the_textbook(name: str, trace: list[tuple[float, object]]) -> None:
    make, make_textbook = POLICIES[name]
    policy, textbook = make(), make_textbook()
    now = 1_700_000_000.0
    for step, action in trace:
        now += step
        match action:
            case Added(object_id, size, frequency):
                entry = PolicyEntry(object_id, size, frequency, now)
                policy.add(entry)
                textbook.add(entry)
            case Stored(object_id, size, begins_view):
                policy.store(object_id, size, now, begins_view=begins_view)
                textbook.store(object_id, size, now, begins_view=begins_view)
            case Accessed(object_id, views, late):
                policy.access(object_id, views, now - late)
                textbook.access(object_id, views, now - late)
            case Removed(object_id, evicted):
                policy.remove(object_id, evicted=evicted)
                textbook.remove(object_id, evicted=evicted)
            case Chosen():
                choose(policy, textbook, action, now)
            case Restored(twice):
                entries = list(policy.dump())
                textbook = restored_textbook(textbook)
                basis, policy = policy.basis, make()
                policy.restore(reversed(entries * 2 if twice else entries), basis)
                policy.end_restore()
        assert len(policy) == len(textbook.entries)
    whole_order = Chosen(2**60, -1e9, frozenset(), 1000, evict=False)
    choose(policy, textbook, whole_order, now)
    assert policy.inflation == textbook.inflation
    assert figures(policy) == {
        key: (entry.size, entry.frequency, entry.last_access, entry.priority)
        for key, entry in textbook.entries.items()
    }


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_same_victims_among_hundreds(name: str, seed: int) -> None:
    make, make_textbook = POLICIES[name]
    policy, textbook = make(), make_textbook()
    random, now = Random(seed), 1_700_000_000.0
    for _ in range(4000):
        now += random.choice([0.0, 1.0, 20.0])
        object_id = ObjectId(str(random.randrange(1500)))
        if object_id in policy:
            policy.access(object_id, 1, now)
            textbook.access(object_id, 1, now)
        else:
            size, begins_view = int(20_000 * 10 ** random.uniform(0, 5)), random.random() < 0.8
            policy.store(object_id, size, now, begins_view=begins_view)
            textbook.store(object_id, size, now, begins_view=begins_view)
        if random.random() < 0.03:
            choose(policy, textbook, Chosen(2**60, 120.0, frozenset(), 10, evict=True), now)
    choose(policy, textbook, Chosen(2**60, 0.0, frozenset(), 1000, evict=False), now)


@pytest.mark.parametrize("holds", [200, 100_000])
def test_the_weights_of_views_move_as_in_the_textbook(holds: int) -> None:
    """`holds`: for so many requests an object is as popular as it is."""
    policy, textbook, random, now = Gdsf(), TextbookGdsf(), Random(3), 1_700_000_000.0
    for number in range(12_000):
        now += 1.0
        rank = int(random.paretovariate(0.7)) + number // holds * 37
        object_id, size = ObjectId(str(rank % 3000)), 1000 + rank % 7 * 500
        if object_id in policy:
            policy.access(object_id, 1, now)
            textbook.access(object_id, 1, now)
            continue
        policy.store(object_id, size, now)
        textbook.store(object_id, size, now, begins_view=True)
        if len(policy) > 150:
            choose(policy, textbook, Chosen(1, 0.0, frozenset(), 1, evict=True), now)
    weights = policy.basis.exponent, policy.basis.first_weight
    assert weights == (textbook.exponent, textbook.first)
    assert policy.basis.miss_cost == textbook.miss_cost
    assert policy.basis.cost_factor == textbook.factor != 28.0
    assert (weights[0] < 0.8) == (holds == 200), "where popularity moves, many views are worth less"


def choose(policy: EvictionPolicy, textbook: Textbook, action: Chosen, now: float) -> None:
    before = figures(policy)
    victims = policy.victims(
        action.wanted, now, min_idle=action.min_idle, spared=action.spared, at_most=action.at_most
    )
    expected = textbook.victims(action.wanted, now, action.min_idle, action.spared, action.at_most)
    assert [entry.object_id for entry in victims] == expected
    assert figures(policy) == before, "choosing changes nothing"
    if action.evict:
        for object_id in expected:
            policy.remove(object_id, evicted=True)
            textbook.remove(object_id, evicted=True)


def figures(policy: EvictionPolicy) -> dict[ObjectId, tuple[int, int, float, float]]:
    return {
        entry.object_id: (entry.size, entry.frequency, entry.last_access, entry.priority)
        for entry in policy.dump()
    }


def restored_textbook(textbook: Textbook) -> Textbook:
    """Only what was evicted is forgotten, and how much of it came back."""
    if isinstance(textbook, TextbookGdsf):
        unknown = TextbookGdsf()
        return replace(
            textbook, cells=256, evicted={}, victims_seen=0, move_at=500, gone=unknown.gone, back=unknown.back,
            classic=unknown.classic, compared=0, counted=0.0, ahead=0.0,
        )  # fmt: skip
    return textbook
