"""Statistics behind the order of eviction: groups and costs, the influence of c0, a change of policy."""

from __future__ import annotations

import pytest

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction import (
    POLICY_NAMES,
    EvictionPolicy,
    Gdsf,
    Lru,
    LruSp,
    PolicyEntry,
    make_policy,
)
from distributor_node.shared.domain.eviction.lru_sp import cost_of, group_of
from distributor_node.shared.domain.objects import ObjectId

KIB, MIB, NOW = 1024, 1024**2, 1_700_000_000.0
THUMBNAIL = PolicyEntry(ObjectId("thumbnail"), 20 * KIB, 1, NOW)
VIDEO = PolicyEntry(ObjectId("video"), 500 * MIB, 1, NOW)


@pytest.mark.parametrize(
    ("size", "frequency", "group"),
    [
        (0, 1, 0),
        (1, 1, 0),
        (KIB, 1, 0),
        (KIB + 1, 1, 1),
        (2 * KIB, 1, 1),
        (2 * KIB + 1, 1, 2),
        (4 * KIB, 1, 2),
        (4 * KIB, 2, 1),
        (4 * KIB, 4, 0),
        (4 * KIB, 1000, 0),
        (5 * KIB, 4, 1),
        (MIB, 1, 10),
        (MIB, 2, 9),
        (MIB, 3, 9),
        (MIB, 5000, 0),
        (2**33, 1, 23),
        (2**33 + KIB, 1, 23),
        (2**40, 1, 23),
    ],
)
def test_lru_sp_groups(size: int, frequency: int, group: int) -> None:
    assert group_of(size, frequency) == group


@pytest.mark.parametrize(
    ("idle", "minutes"), [(-5.0, 0), (0.0, 0), (0.5, 1), (60.0, 1), (60.5, 2), (600.0, 10)]
)
def test_lru_sp_cost_counts_started_minutes(idle: float, minutes: int) -> None:
    entry = PolicyEntry(ObjectId("a"), 7 * KIB, 2, NOW)
    assert cost_of(entry, NOW + idle) == minutes * 7 / 2


def test_lru_sp_ties_go_to_the_later_group() -> None:
    policy = LruSp()
    policy.add(PolicyEntry(ObjectId("small"), 2 * KIB, 1, NOW - 240))  # 4 minutes × 2 KiB, group 1
    policy.add(PolicyEntry(ObjectId("large"), 8 * KIB, 1, NOW - 60))  # 1 minute × 8 KiB, group 3
    assert order(policy) == ["large", "small"]


@pytest.mark.parametrize(("miss_cost", "first"), [(0, "thumbnail"), (64 * MIB, "video"), (2**50, "video")])
def test_c0_decides_between_misses_and_bytes(miss_cost: int, first: str) -> None:
    policy = Gdsf(miss_cost)
    policy.add(THUMBNAIL)
    policy.add(VIDEO)
    policy.access(VIDEO.object_id, 40, NOW)
    assert order(policy)[0] == first


def test_gdsf_ages_by_its_victims() -> None:
    policy = Gdsf()
    policy.add(VIDEO)
    policy.access(VIDEO.object_id, 9, NOW)
    priority = policy.victims(1, NOW)[0].priority
    policy.remove(VIDEO.object_id, evicted=True)
    assert policy.inflation == priority
    policy.add(THUMBNAIL)
    policy.remove(THUMBNAIL.object_id)
    assert policy.inflation == priority, "what is removed for another reason is no victim"
    policy.add(VIDEO)
    assert policy.victims(1, NOW)[0].priority > priority


@pytest.mark.parametrize("former", POLICY_NAMES)
@pytest.mark.parametrize("latter", POLICY_NAMES)
def test_a_change_of_policy_keeps_every_object(former: str, latter: str) -> None:
    old, new = make_policy(former), make_policy(latter, 2**30)
    old.add(VIDEO)
    old.remove(VIDEO.object_id, evicted=True)
    old.add(THUMBNAIL)
    old.add(VIDEO)
    new.restore(old.dump(), old.inflation)
    assert sorted(order(new)) == ["thumbnail", "video"]


def test_gdsf_clamps_priorities_of_other_policies() -> None:
    policy = Gdsf(0)  # worth is the frequency
    entries = [
        PolicyEntry(ObjectId(name), KIB, 2, NOW, priority)
        for name, priority in [("none", 0.0), ("low", 0.5), ("own", 3.25), ("high", 1e12)]
    ]
    policy.restore(entries, 5.0)
    priorities = {entry.object_id: entry.priority for entry in policy.dump()}
    assert priorities == {"none": 7.0, "low": 2.0, "own": 3.25, "high": 7.0}


def test_a_later_lru_access_reported_early_keeps_its_place() -> None:
    policy = Lru()
    for name in ("a", "b"):
        policy.add(PolicyEntry(ObjectId(name), KIB, 1, NOW))
    policy.access(ObjectId("a"), 1, NOW + 9)
    policy.access(ObjectId("b"), 1, NOW + 5)
    policy.access(ObjectId("a"), 1, NOW + 1)
    assert order(policy, NOW + 10) == ["b", "a"]


def test_views_are_counted_up_to_a_bound() -> None:
    policy = Gdsf()
    policy.add(PolicyEntry(ObjectId("a"), KIB, 2**40, NOW))
    policy.access(ObjectId("a"), 2**40, NOW)
    entry = policy.get(ObjectId("a"))
    assert entry is not None
    assert entry.frequency == 2**32 - 1


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="gdsf, lru-sp, lru"):
        make_policy("clock")


def order(policy: EvictionPolicy, now: float = NOW) -> list[str]:
    return [entry.object_id for entry in policy.victims(2**60, now)]
