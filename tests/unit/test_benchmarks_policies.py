"""The benchmarks' SIEVE and S3-FIFO do what their papers say."""

from __future__ import annotations

from random import Random

import pytest

from benchmarks.policies import SETTINGS, policy_of
from distributor_node.services.replay.comparison import S3Fifo, Sieve
from distributor_node.services.replay.scenarios import Setting
from distributor_node.shared.domain.eviction import EvictionPolicy, PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

SIZE, NOW = 1000, 1_700_000_000.0


def add(policy: EvictionPolicy, *names: str) -> None:
    for name in names:
        policy.add(PolicyEntry(ObjectId(name), SIZE, 1, NOW))


def evict(policy: EvictionPolicy, count: int) -> str:
    gone = ""
    for _ in range(count):
        (victim,) = policy.victims(1, NOW)
        policy.remove(victim.object_id, evicted=True)
        gone += victim.object_id
    return gone


def test_sieve_spares_the_visited_once_and_its_hand_stays() -> None:
    policy = Sieve()
    add(policy, *"abcdef")
    for name in "ab":
        policy.access(ObjectId(name), 1, NOW)
    assert evict(policy, 2) == "cd"
    add(policy, "g")
    assert evict(policy, 3) == "efg"
    assert evict(policy, 2) == "ab", "second round, and not visited since"
    assert policy.victims(1, NOW) == []


def test_s3_fifo_evicts_one_hit_objects_and_recognises_ghosts() -> None:
    policy = S3Fifo(20 * footprint(SIZE))  # two objects are the small queue's share
    add(policy, *"abcd")
    for name in "aab":
        policy.access(ObjectId(name), 1, NOW)
    assert evict(policy, 1) == "b", "a was seen twice more and moves to main, b once"
    add(policy, "b")  # a ghost: to main at once
    assert evict(policy, 2) == "ca"
    policy.access(ObjectId("b"), 1, NOW)
    add(policy, "e")
    assert evict(policy, 1) == "d"
    assert evict(policy, 2) == "be"


@pytest.mark.parametrize("setting", SETTINGS[:3], ids=lambda setting: setting.name)
def test_columns_return_what_was_stored(setting: Setting) -> None:
    policy, random, held = policy_of(setting, 100 * footprint(SIZE)), Random(1), set[ObjectId]()
    for _ in range(5000):
        object_id = ObjectId(str(random.randrange(300)))
        if object_id in policy:
            policy.access(object_id, 1, NOW)
        else:
            policy.add(PolicyEntry(object_id, SIZE, 1, NOW))
            held.add(object_id)
        while len(policy) > 100:
            (victim, *_) = policy.victims(1, NOW)
            policy.remove(victim.object_id, evicted=True)
            held.remove(victim.object_id)
        assert set(policy.ids()) == held
