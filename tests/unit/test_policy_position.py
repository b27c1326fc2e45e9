"""The place of an object in the order of eviction, as told from the index, is the place that the policy gives it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributor_node.shared.domain.eviction import POLICY_NAMES, PolicyEntry, make_policy
from distributor_node.shared.domain.eviction.position import Position, position_of
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

NOW, MISS_COST = 1_700_000_000.0, 2**20


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
@given(index=indexes, inflation=st.sampled_from([0.0, 2.5, 1e6]), shuffle=st.randoms(use_true_random=False))
def test_each_object_has_the_place_that_the_policy_gives_it(
    policy: str, index: list[PolicyEntry], inflation: float, shuffle: Random
) -> None:
    entries = [replace(entry, object_id=ObjectId(f"o{number}")) for number, entry in enumerate(index)]
    order = make_policy(policy, MISS_COST)
    order.restore(entries, inflation)
    shuffle.shuffle(entries)
    stored, before = {entry.object_id: entry for entry in entries}, 0
    for number, victim in enumerate(order.victims(2**60, NOW)):
        position = fed(position_of(policy, MISS_COST, stored[victim.object_id], inflation, NOW), entries)
        assert (position.objects_before, position.bytes_before) == (number, before)
        assert position.priority == (victim.priority or None)
        before += footprint(victim.size)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_target_that_the_index_no_longer_lists_has_a_place_all_the_same(policy: str) -> None:
    old = PolicyEntry(ObjectId("old"), 1000, 1, NOW - 3600)
    new = PolicyEntry(ObjectId("new"), 1000, 5, NOW - 60)
    assert fed(position_of(policy, MISS_COST, new, 0.0, NOW), [old]).bytes_before == footprint(1000)
    assert fed(position_of(policy, MISS_COST, old, 0.0, NOW), [new]).bytes_before == 0
