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
    MissCost,
    PolicyEntry,
    PriorityBasis,
    make_policy,
)
from distributor_node.shared.domain.eviction.gdsf import ClassicMiniature, CostFactor, EvictedViews
from distributor_node.shared.domain.eviction.lru_sp import cost_of, group_of
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

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
    policy = Gdsf(MissCost(fixed=miss_cost))
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
    old, new = make_policy(former), make_policy(latter, MissCost(fixed=2**30))
    old.add(VIDEO)
    old.remove(VIDEO.object_id, evicted=True)
    old.add(THUMBNAIL)
    old.add(VIDEO)
    new.restore(old.dump(), old.basis)
    assert sorted(order(new)) == ["thumbnail", "video"]


SMALL = 2**10  # bytes; with a c0 of 2^20 one view is worth 1025, in views per MiB and in units of before
FORMER = PriorityBasis(inflation=64_000.0)  # as versions wrote it that had c0 = 64 MiB and w(1) = 1


def translated(basis: PriorityBasis, cost: MissCost, priority: float, views: int = 2) -> float:
    policy = Gdsf(cost)
    policy.restore([PolicyEntry(ObjectId("a"), SMALL, views, NOW, priority)], basis)
    return policy.victims(1, NOW)[0].priority


@pytest.mark.parametrize(
    ("priority", "level"),
    [(0.0, 1000.0), (2 * 65_537.0, 0.0), (2 * 65_537.0 + 32_000.0, 500.0), (1e12, 1000.0), (5.0, 0.0)],
    ids=["none", "never aged", "half of L", "another policy's", "less than possible"],
)
def test_priorities_of_an_earlier_version_keep_their_share_of_inflation(
    priority: float, level: float
) -> None:
    """c0 was 64 MiB and is 1 MiB now: all that came from L shrinks to a 64th."""
    basis = FORMER.counting([(2**20 // 20 + 1, 1)])
    cost = MissCost(factor=2**20 / (2**20 // 20 + 1))
    assert translated(basis, cost, priority) == pytest.approx(level + 2 * 1025.0)


def test_an_earlier_version_with_a_cost_of_its_own_is_translated_by_that_cost() -> None:
    priority = 3 * 1025.0 + 7.0
    assert translated(PriorityBasis(9.0), MissCost(fixed=2**20), priority, 3) == pytest.approx(priority)


@pytest.mark.parametrize("cost", [MissCost(factor=20), MissCost(factor=30), MissCost(fixed=2**22)])
@pytest.mark.parametrize("policy", ["gdsf", Gdsf.mark])
def test_after_a_change_of_cost_what_came_from_inflation_is_kept(cost: MissCost, policy: str) -> None:
    """By the version before, priorities were so many times views per MiB."""
    unit = 20 * 1024 / MIB if policy == "gdsf" else 1.0
    basis = PriorityBasis(640.0 * unit, policy, 20 * 1024.0, views=10.0, viewed_bytes=10_240.0)
    stored = unit * (64.0 + 2 * MIB * (1 / SMALL + 1 / (20 * 1024)))
    now = cost.by_mean(1024.0)
    assert translated(basis, cost, stored) == pytest.approx(64.0 + 2 * MIB * (1 / SMALL + 1 / now))


def test_priorities_given_while_c0_was_higher_are_taken_as_they_are() -> None:
    basis = PriorityBasis(1.0, Gdsf.mark, 28 * 1024.0, views=10.0, viewed_bytes=10_240.0)
    assert translated(basis, MissCost(), 5_000.0) == 5_000.0


def test_c0_follows_the_mean_of_the_views_and_lowers_no_priority() -> None:
    policy = Gdsf()
    policy.store(ObjectId("a"), 1000, NOW)
    assert policy.basis.miss_cost == 28_000
    first = policy.get(ObjectId("a"))
    assert first is not None
    assert first.priority == pytest.approx(0.4 * MIB * (1 / 1000 + 1 / 28_000))
    policy.store(ObjectId("b"), 3000, NOW)
    assert policy.basis.miss_cost == 56_000
    policy.access(ObjectId("b"), 2, NOW)
    assert policy.basis.miss_cost == 28 * 10_000 / 4
    for _ in range(2000):
        policy.access(ObjectId("b"), 1, NOW)
    assert policy.basis.miss_cost > 28 * 2950
    policy.access(ObjectId("a"), 20_000, NOW)
    assert policy.basis.miss_cost < 28 * 1250
    entry = policy.get(ObjectId("a"))
    assert entry is not None
    assert entry.frequency == 20_001
    assert entry.priority == pytest.approx(20_001 * MIB * (1 / 1000 + 1 / policy.basis.miss_cost))


def test_old_views_count_less_and_less() -> None:
    policy = Gdsf()
    policy.store(ObjectId("a"), 1000, NOW)
    policy.store(ObjectId("b"), 100_000, NOW)
    for _ in range(40_000):
        policy.access(ObjectId("a"), 1, NOW)
        assert policy.basis.views < 32 * 2 + 20_000
    before = policy.basis.miss_cost
    for _ in range(40_000):
        policy.access(ObjectId("b"), 1, NOW)
    assert before == pytest.approx(28_000, rel=0.01)
    assert policy.basis.miss_cost > 28 * 85_000, "of the last views most were of b"


def test_an_object_that_comes_back_has_its_views() -> None:
    policy = Gdsf()
    for begins_view, views in ((True, 8), (False, 7)):
        policy.add(PolicyEntry(ObjectId("a"), 1000, 7, NOW))
        policy.remove(ObjectId("a"), evicted=True)
        policy.store(ObjectId("a"), 1000, NOW, begins_view=begins_view)
        entry = policy.get(ObjectId("a"))
        assert entry is not None
        assert entry.frequency == views
        policy.remove(ObjectId("a"))
        policy.store(ObjectId("a"), 1000, NOW, begins_view=begins_view)
        entry = policy.get(ObjectId("a"))
        assert entry is not None
        assert entry.frequency == 1, "removed for another reason than room: it starts again"


def test_the_memory_of_the_evicted_has_cells_for_about_as_many_as_the_objects() -> None:
    evicted = EvictedViews()
    for number in range(100_000):
        evicted.put(ObjectId(str(number)), 300, residents=20_000)
    assert 20_000 * 2 / 3 <= evicted.cells < 20_000 * 4 / 3
    known = [evicted.take(ObjectId(str(number))) for number in range(100_000)]
    assert set(known) == {0, 255}
    assert sum(map(bool, known)) == evicted.cells, "every cell is used"
    recent = known[-evicted.cells // 2 :]
    assert sum(map(bool, recent)) > 0.9 * len(recent), "those evicted last are known"
    assert not any(evicted.take(ObjectId(str(number))) for number in range(100_000)), "each is taken once"


def test_weights_out_of_their_bounds_are_taken_as_the_nearest() -> None:
    """A damaged basis must not stop the leader."""
    policy = Gdsf()
    for damage, expected in ((1e9, (1.0, 0.5, 50.0)), (0.0, (0.2, 0.1, 1.5))):
        damaged = PriorityBasis(1.0, Gdsf.mark, 1.0, 1.0, 1.0, damage, damage, damage)
        policy.restore([PolicyEntry(ObjectId("a"), KIB, 2**32, NOW)], damaged)
        basis = policy.basis
        assert (basis.exponent, basis.first_weight, basis.cost_factor) == expected
        assert policy.victims(1, NOW)[0].priority < 2**32 * MIB


def test_the_views_of_an_object_that_comes_back_count_less_until_its_next_view() -> None:
    policy = Gdsf(MissCost(fixed=1000))
    policy.add(PolicyEntry(ObjectId("a"), 1000, 10, NOW))
    policy.remove(ObjectId("a"), evicted=True)
    level, worth = policy.inflation, 2 * MIB / 1000
    for expected in (0.4 * 10 + 1, 12):
        policy.store(ObjectId("a"), 1000, NOW) if expected == 5 else policy.access(ObjectId("a"), 1, NOW)
        entry = policy.get(ObjectId("a"))
        assert entry is not None
        assert entry.priority == pytest.approx(level + expected * worth)


def test_the_miniature_holds_a_sample_in_as_many_bytes_as_that_has_in_the_cache() -> None:
    residents: dict[str, int] = {}
    classic = ClassicMiniature(
        lambda samples: sum(footprint(size) for name, size in residents.items() if samples(name)), most=64
    )
    for number in range(1000):
        name = ObjectId(f"o{number}")
        residents[name] = 1000 + number % 7
        if classic.count_resident(name, residents[name]):
            answer = classic.view(name, residents[name], 1)
            assert answer is None, "nothing is evicted: there is nothing to compare"
        assert len(classic) <= 64
    assert classic.sampled == 2**32 // 16
    sampled = len(classic)
    assert sampled == sum(map(classic.samples, residents)) >= 40
    for gone in list(residents)[:500]:
        classic.count_resident(gone, residents.pop(gone), here=False)
    newcomers = [ObjectId(f"new{number}") for number in range(2000)]
    answers = [classic.view(name, 1000, 1) for name in newcomers if classic.samples(name)]
    assert answers.count(False) > 50, (
        "a smaller cache: the miniature evicts too, and is compared from then on"
    )
    assert len(classic) < sampled


class Compared(Gdsf):
    """Notes which view was compared with the classic form last."""

    compared: ObjectId | None = None
    classic: ClassicMiniature

    def _find_factor(
        self, search: CostFactor, object_id: ObjectId, size: int, views: int, *, hit: bool
    ) -> None:
        self.compared, self.classic = object_id, search.classic
        super()._find_factor(search, object_id, size, views, hit=hit)

    def is_compared(self, object_id: ObjectId) -> bool:
        self.compared = None
        self.access(object_id, 1, NOW)
        return self.compared is not None


def test_only_views_of_objects_in_the_sample_are_compared() -> None:
    """The sample is halved at 8192 objects: while they come, and when they are restored."""
    policy, restored = Compared(), Compared()
    ids = [ObjectId(f"o{number}") for number in range(9000)]
    for object_id in ids:
        policy.store(object_id, 1000, NOW)
    restored.restore(policy.dump(), policy.basis)
    restored.end_restore()
    for one in (policy, restored):
        compared = [object_id for object_id in ids if one.is_compared(object_id)]
        assert compared == [object_id for object_id in ids if one.classic.samples(object_id)]
        assert 4000 < len(compared) < 5000
    gone = next(object_id for object_id in ids if restored.classic.samples(object_id))
    newcomer = next(object_id for object_id in ids if not restored.classic.samples(object_id))
    restored.remove(newcomer)
    restored.remove(gone)
    restored.store(newcomer, 1000, NOW)
    assert not restored.is_compared(newcomer), "it may have the place of one in the sample"


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
