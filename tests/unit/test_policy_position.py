"""The place of an object in the order of eviction, as told from the index, is the place that the policy gives it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributor_node.shared.domain.eviction import (
    POLICY_NAMES,
    MissCost,
    PolicyEntry,
    PriorityBasis,
    make_policy,
)
from distributor_node.shared.domain.eviction.position import Position, position_of
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

NOW, COST = 1_700_000_000.0, MissCost(fixed=2**20)


BASES = [
    *(PriorityBasis(inflation) for inflation in (0.0, 2.5, 1e6)),  # written before there was a basis
    PriorityBasis(2.5, "gdsf", 2.0**20),
    PriorityBasis(1e6, "gdsf", 2.0**18),
    PriorityBasis(1e6, "gdsf", 0.0),
    PriorityBasis(1e6, "gdsf", 2.0**18, exponent=0.6, first_weight=0.2),
    PriorityBasis(0.0, "lru"),
]


def fed(position: Position, entries: list[PolicyEntry], batch: int = 3) -> Position:
    for _ in range(position.passes):
        for start in range(0, len(entries), batch):
            position.feed(entries[start : start + batch])
        position.end_pass()
    return position


indexes = st.lists(
    st.builds(
        PolicyEntry,
        st.just(ObjectId("a")),
        st.sampled_from([0, 1, 1024, 3000, 5000, 7000, 100_000, 2**22, 2**31]),
        st.sampled_from([1, 1, 2, 3, 9]),
        st.sampled_from([NOW, NOW - 30, NOW - 90, NOW - 600, NOW - 86_400]),
        st.sampled_from([0.0, 0.0, 3.0, 300.0, 1e12]),
    ),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=300, deadline=None)
@given(index=indexes, basis=st.sampled_from(BASES), shuffle=st.randoms(use_true_random=False))
def test_each_object_has_the_place_that_the_policy_gives_it(
    policy: str, index: list[PolicyEntry], basis: PriorityBasis, shuffle: Random
) -> None:
    entries = [replace(entry, object_id=ObjectId(f"o{number}")) for number, entry in enumerate(index)]
    order = make_policy(policy, COST)
    order.restore(entries, basis)
    shuffle.shuffle(entries)
    stored, before = {entry.object_id: entry for entry in entries}, 0
    for number, victim in enumerate(order.victims(2**60, NOW)):
        position = fed(position_of(policy, COST, stored[victim.object_id], basis, NOW), entries)
        assert (position.objects_before, position.bytes_before) == (number, before)
        assert position.priority == (victim.priority or None)
        assert position.inflation == (None if position.priority is None else order.inflation)
        before += footprint(victim.size)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_target_that_the_index_no_longer_lists_has_a_place_all_the_same(policy: str) -> None:
    old = PolicyEntry(ObjectId("old"), 1000, 1, NOW - 3600)
    new = PolicyEntry(ObjectId("new"), 1000, 5, NOW - 60)
    assert fed(position_of(policy, COST, new, PriorityBasis(), NOW), [old]).bytes_before == footprint(1000)
    assert fed(position_of(policy, COST, old, PriorityBasis(), NOW), [new]).bytes_before == 0


def test_without_counted_views_the_mean_is_that_of_the_objects() -> None:
    entries = [PolicyEntry(ObjectId("a"), 1000, 3, NOW), PolicyEntry(ObjectId("b"), 5000, 1, NOW)]
    basis = PriorityBasis().counting((entry.size, entry.frequency) for entry in entries)
    position = position_of("gdsf", MissCost(), entries[1], basis, NOW)
    assert position.priority == pytest.approx(0.4 * 2**20 * (1 / 5000 + 1 / (28 * 2000)))
