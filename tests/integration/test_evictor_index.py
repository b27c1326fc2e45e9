"""A new leader continues with statistics that its killed predecessor saved partly or not at all."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.eviction import MissCost, PolicyEntry, PriorityBasis, make_policy
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import (
    Access,
    Fetch,
    FetchPhase,
    Granted,
    IndexEntry,
    PolicyState,
    Term,
)
from tests.integration.evictor_harness import body_of, record_of
from tests.waiting import eventually

COUNT, AT_ONCE = 2500, 1000
NOW = time.time()
IDS = [ObjectId(f"object-{number}") for number in range(COUNT)]
BY_ACCESS = Random(1).sample(IDS, COUNT)


class FailingStore(MemoryStateStore):
    """Away after `batches` more of records."""

    batches = COUNT

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        if self.batches == 0:
            raise StateStoreUnavailable("away")
        self.batches -= 1
        await super().save_policy(term, entries, state)


@pytest.fixture
async def state() -> AsyncIterator[FailingStore]:
    """It knows all objects, stored an hour ago."""
    store = FailingStore(2**40, StateTimeouts(), time.time)
    await store.open()
    term = await store.lead("test", 600)
    assert term is not None
    await store.adopt_many(term, [IndexEntry(object_id, 1000, 1, NOW - 3600) for object_id in IDS])
    yield store
    await store.close()


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    volume = Volume(tmp_path)
    volume.prepare()
    return volume


async def term_of(state: FailingStore) -> Term:
    term = await state.lead("test", 600)
    assert term is not None
    return term


async def leader(state: FailingStore, volume: Volume, policy: str) -> EvictionIndex:
    index = EvictionIndex(state, volume, lambda: make_policy(policy))
    await index.load()
    return index


async def view_all(state: FailingStore) -> None:
    """Two views of each, one object after the other."""
    seen = [Access(object_id, 2, NOW - 1000 + place * 0.1) for place, object_id in enumerate(BY_ACCESS)]
    await state.record_accesses(seen)


def order(index: EvictionIndex) -> list[ObjectId]:
    return [entry.object_id for entry in index.policy.victims(2**50, NOW, at_most=COUNT)]


def views(index: EvictionIndex) -> Counter[int]:
    return Counter(entry.frequency for entry in index.policy.dump())


@pytest.mark.parametrize("policy", ["gdsf", "lru-sp", "lru"])
async def test_accesses_applied_but_not_saved_are_applied_again(
    state: FailingStore, volume: Volume, policy: str
) -> None:
    killed = await leader(state, volume, policy)
    await killed.save(await term_of(state))
    await view_all(state)
    await killed.refresh()
    assert order(killed) == BY_ACCESS
    successor = await leader(state, volume, policy)
    assert order(successor) == BY_ACCESS
    assert list(successor.policy.dump()) == list(killed.policy.dump())


async def test_after_a_crash_between_two_batches_nothing_is_lost_and_one_batch_counts_twice(
    state: FailingStore, volume: Volume
) -> None:
    killed = await leader(state, volume, "lru")
    await view_all(state)
    await killed.refresh()
    state.batches = 1
    with pytest.raises(StateStoreUnavailable):
        await killed.save(await term_of(state))
    successor = await leader(state, volume, "lru")
    assert views(killed) == {3: COUNT}
    assert views(successor) == {5: AT_ONCE, 3: COUNT - AT_ONCE}
    assert order(successor) == order(killed) == BY_ACCESS

    state.batches = COUNT
    await successor.save(await term_of(state))
    third = await leader(state, volume, "lru")
    assert (views(third), order(third)) == (views(successor), BY_ACCESS), "and from then on nothing twice"


async def test_after_a_failed_save_nothing_is_counted_twice(state: FailingStore, volume: Volume) -> None:
    index, term = await leader(state, volume, "gdsf"), await term_of(state)
    await view_all(state)
    await index.refresh()
    state.batches = 1
    with pytest.raises(StateStoreUnavailable):
        await index.save(term)
    state.batches = COUNT
    await index.save(term)
    successor = await leader(state, volume, "gdsf")
    assert views(index) == views(successor) == {3: COUNT}
    assert order(successor) == order(index)


async def test_policy_data_seen_before_the_store_had_the_entry_is_written_later(
    state: FailingStore, volume: Volume
) -> None:
    index, term = await leader(state, volume, "gdsf"), await term_of(state)
    await state.set_reconciled(term)
    new, body = ObjectId("new"), body_of("new")
    begun = await state.begin(new, len(body), "worker")
    assert isinstance(begun, Granted)
    record = record_of("new", body)
    partial = volume.open_partial_for_writing(record)
    partial.write(0, body)
    partial.mark_verified()
    partial.publish(record)
    partial.close()
    index.mark_changed(new)
    await index.refresh()
    await index.save(term)
    assert await state.commit(begun.lease, time.time())
    index.mark_changed(new)  # the commit is announced
    await index.save(term)
    [stored] = [entry async for batch in state.entries() for entry in batch if entry.object_id == new]
    known = index.policy.get(new)
    assert known is not None
    assert stored.priority == known.priority > 0


LONG_AGO = NOW - 30 * 86_400
HALF_OF_L = 40_000.0


async def stored_by_the_former_version(state: FailingStore, position: str = "") -> list[ObjectId]:
    """Priorities under c0 = 64 MiB with L = 80,000: a third of the objects was stored before L rose, a third at half of
    it, a third lately. Returns the order in which they would have gone."""
    term = await term_of(state)
    entries, priorities = [], dict[ObjectId, float]()
    for number, object_id in enumerate(IDS):
        level, views, at = [(0.0, 1, LONG_AGO), (HALF_OF_L, 1, NOW - 7200), (80_000.0, 1, NOW - 3600)][
            number % 3
        ]
        priorities[object_id] = level + views * (64 * 2**20 + 1000) / 1000
        entries.append(IndexEntry(object_id, 1000, views, at + number, priorities[object_id]))
    await state.save_policy(term, entries, PolicyState(PriorityBasis(80_000.0), position))
    return sorted(IDS, key=lambda object_id: (priorities[object_id], IDS.index(object_id)))


async def test_a_store_of_the_former_version_is_taken_over_and_its_order_made_again(
    state: FailingStore, volume: Volume
) -> None:
    await state.record_accesses([Access(IDS[0], 1, NOW - 10)])
    expected = await stored_by_the_former_version(state)
    first = await leader(state, volume, "gdsf")
    assert first.policy.basis.miss_cost == pytest.approx(28_000, rel=0.001), "the mean of what is stored"
    assert len(first.policy) == COUNT
    assert order(first) == [*expected[1:], IDS[0]], "and its log is read on"
    newcomer = first.policy.inflation + 0.4 * 2**20 * (1 / 1000 + 1 / 28_000)
    assert first.policy.inflation == pytest.approx(80_000 / 64, rel=0.001), "in views per MiB"
    fresh = [entry.priority for entry in first.policy.dump() if NOW - 3600 <= entry.last_access < NOW - 60]
    assert max(fresh) == pytest.approx(newcomer, rel=0.02), (
        "what was viewed last is worth as much as a newcomer"
    )

    await first.save(await term_of(state))
    second = await leader(state, volume, "gdsf")
    assert list(second.policy.dump()) == list(first.policy.dump())
    assert second.policy.basis == first.policy.basis
    state.batches = 0
    third = await leader(state, volume, "gdsf")
    with pytest.raises(StateStoreUnavailable):
        await third.save(await term_of(state))
    assert not third._dirty, "nothing is left to translate"


async def test_a_leader_that_dies_while_it_translates_loses_no_object(
    state: FailingStore, volume: Volume
) -> None:
    await stored_by_the_former_version(state)
    killed = await leader(state, volume, "gdsf")
    state.batches = 1
    with pytest.raises(StateStoreUnavailable):
        await killed.save(await term_of(state))
    state.batches = COUNT
    successor = await leader(state, volume, "gdsf")
    assert successor.policy.basis == killed.policy.basis
    assert views(successor) == views(killed)
    untouched = {entry.object_id: entry for entry in successor.policy.dump()}
    same = [entry for entry in killed.policy.dump() if untouched[entry.object_id] == entry]
    assert len(same) >= COUNT - AT_ONCE, "those that were written are translated twice, the others once"
    await successor.save(await term_of(state))
    third = await leader(state, volume, "gdsf")
    assert list(third.policy.dump()) == list(successor.policy.dump())


async def test_a_changed_cost_is_translated_and_a_moved_mean_survives_a_restart(
    state: FailingStore, volume: Volume
) -> None:
    index, term = await leader(state, volume, "gdsf"), await term_of(state)
    await view_all(state)
    await index.refresh()
    for victim in index.policy.victims(1, NOW):
        index.removed(victim.object_id, evicted=True)
    index.policy.store(ObjectId("large"), 10**9, NOW)
    moved = index.policy.basis
    assert moved.miss_cost > 10 * 28_000
    await index.save(term)
    assert (await leader(state, volume, "gdsf")).policy.basis == moved
    fixed = EvictionIndex(state, volume, lambda: make_policy("gdsf", MissCost(fixed=20_000)))
    await fixed.load()
    assert fixed.policy.inflation == moved.inflation
    before = {entry.object_id: entry.priority for entry in index.policy.dump()}
    raised = [entry.priority - before.get(entry.object_id, 0.0) for entry in fixed.policy.dump()]
    assert min(raised) > 0, "a miss is worth fewer bytes: each view of an object counts for more"
    assert (fixed.policy.basis.views, len(fixed.policy)) == (moved.views, COUNT)


async def test_an_emptied_store_costs_neither_l_nor_the_mean(volume: Volume, state: FailingStore) -> None:
    index = await leader(state, volume, "gdsf")
    await view_all(state)
    await index.refresh()
    for victim in index.policy.victims(1, NOW):
        index.removed(victim.object_id, evicted=True)
    before, known = index.policy.basis, index.policy.get(BY_ACCESS[-1])
    assert known is not None
    index._state = FailingStore(2**40, StateTimeouts(), time.time)
    await index._state.open()
    await index.load()
    assert index.policy.basis == before
    assert index.known_entry(known.object_id) == known
    assert list(index.with_priorities([known])) == [known]


async def test_in_a_new_store_c0_follows_what_is_adopted(volume: Volume) -> None:
    store = FailingStore(2**40, StateTimeouts(), time.time)
    await store.open()
    index = await leader(store, volume, "gdsf")
    [adopted] = index.with_priorities([PolicyEntry(ObjectId("a"), 1000, 2, NOW)])
    assert adopted.priority == pytest.approx(2 * 2**20 * (1 / 1000 + 1 / 28_000))
    assert index.policy.basis.miss_cost == 28_000


async def test_the_map_counts_objects_by_size_and_idle_time(state: FailingStore, volume: Volume) -> None:
    term = await term_of(state)
    sizes = {"small": 100, "edge": 2**20, "large": 2**31}
    entries = [
        IndexEntry(ObjectId(f"{name}-{age}"), size, 1, time.time() - age)
        for name, size in sizes.items()
        for age in (1, 100, 10**7)
    ]
    await state.adopt_many(term, entries)
    index = await leader(state, volume, "gdsf")
    found = await index.size_and_idle_map()
    columns = len(found["idle"]) + 1
    filled = {divmod(place, columns): tuple(cell) for place, cell in enumerate(found["cells"]) if cell[0]}
    last = (len(found["sizes"]), columns - 1)
    assert filled == {
        (0, 0): (1, 100), (0, 2): (1, 100), (0, 4): (COUNT, COUNT * 1000), (0, last[1]): (1, 100),
        (2, 0): (1, 2**20), (2, 2): (1, 2**20), (2, last[1]): (1, 2**20),
        (last[0], 0): (1, 2**31), (last[0], 2): (1, 2**31), last: (1, 2**31),
    }  # fmt: skip


async def test_a_map_that_took_long_stands_for_a_while(state: FailingStore, volume: Volume) -> None:
    index = await leader(state, volume, "lru")
    first = await index.size_and_idle_map()
    assert await index.size_and_idle_map() is first

    async def other() -> bool:
        return await index.size_and_idle_map() is not first

    await eventually(other)


async def test_views_of_a_partial_object_go_with_it(volume: Volume) -> None:
    """Each view begins ten minutes after the last: it is parked, resumed, parked with more, resumed, and complete."""
    now, one = [NOW], ObjectId("film")
    store = MemoryStateStore(2**40, StateTimeouts(), time.time)
    index = EvictionIndex(store, volume, lambda: make_policy("gdsf"), lambda: now[0])
    await index.load()
    fetch = Fetch(one, FetchPhase.PARKED, 9000, "w", None, 0.0, age=50.0, reserved=footprint(1000))

    def known() -> tuple[int, int]:
        entry = index.policy.get(one)
        assert entry is not None
        return entry.size, entry.frequency

    index.set_partials([fetch])
    assert known() == (1000, 1)
    [entry] = index.policy.dump()
    assert entry.last_access == pytest.approx(NOW - 50, abs=1)
    now[0] += 600
    index.set_partials([], {one})
    assert len(index.policy) == 0
    index.set_partials([replace(fetch, reserved=footprint(5000))])
    assert known() == (5000, 2)
    assert (one in index, index.is_partial(one), index.objects) == (False, True, 0)
    now[0] += 600
    partial = volume.open_partial_for_writing(record_of(one, body_of(one, 9000)))
    partial.write(0, body_of(one, 9000))
    partial.mark_verified()
    os.utime(volume.root / "incoming" / f"{one}.part", (now[0], now[0]))
    partial.publish(partial.record)
    partial.close()
    index.mark_changed(one)
    await index.refresh()
    assert known() == (9000, 3)
    assert (one in index, index.is_partial(one), index.objects) == (True, False, 1)
    index.set_partials([])
    assert known() == (9000, 3)


async def test_a_new_leader_has_the_views_that_were_saved(volume: Volume) -> None:
    store, one = MemoryStateStore(2**40, StateTimeouts(), time.time), ObjectId("film")
    index = EvictionIndex(store, volume, lambda: make_policy("gdsf"))
    await index.load()
    fetch = Fetch(one, FetchPhase.PARKED, 9000, "w", None, 0.0, age=50.0, reserved=footprint(1000))
    index.set_partials([replace(fetch, views=4, last_access=NOW - 500, priority=7.5)])
    [entry] = index.policy.dump()
    assert entry == PolicyEntry(one, 1000, 4, pytest.approx(NOW - 500, abs=1), 7.5)  # type: ignore[arg-type]


async def test_a_view_that_goes_on_is_not_counted_again_by_a_new_leader(
    state: FailingStore, volume: Volume
) -> None:
    """A player asks another API process for its next range after the leader was replaced."""
    now, film, other = NOW, IDS[0], IDS[1]
    first = EvictionIndex(state, volume, lambda: make_policy("gdsf"), lambda: now)
    await first.load()
    await state.record_accesses([Access(film, 1, now)])
    await first.save(await term_of(state))
    now += 100
    successor = EvictionIndex(state, volume, lambda: make_policy("gdsf"), lambda: now)
    await successor.load()

    async def views_of(*accesses: Access) -> tuple[int, int]:
        await state.record_accesses(accesses)
        await successor.refresh()
        known = [successor.policy.get(object_id) for object_id in (film, other)]
        return tuple(entry.frequency for entry in known if entry is not None)  # type: ignore[return-value]

    assert await views_of(Access(film, 1, now)) == (2, 1)
    assert await views_of(Access(other, 1, now)) == (2, 2), "it was viewed an hour ago"
    now += 49
    assert await views_of(Access(film, 1, now)) == (2, 2)
    now += 1
    assert await views_of(Access(film, 1, now)) == (3, 2), (
        "half a window after the last request that was known"
    )


async def test_leaders_that_come_and_go_do_not_prolong_a_view(state: FailingStore, volume: Volume) -> None:
    now, film = NOW, IDS[0]
    term = await term_of(state)
    for _ in range(10):
        leader = EvictionIndex(state, volume, lambda: make_policy("gdsf"), lambda: now)  # noqa: B023  asked while it leads
        await leader.load()
        for _ in range(2):
            now += 100
            await state.record_accesses([Access(film, 1, now)])
            await leader.refresh()
        await leader.save(term)
    last = EvictionIndex(state, volume, lambda: make_policy("gdsf"), lambda: NOW + 2000)
    await last.load()
    entry = last.policy.get(film)
    assert entry is not None
    assert 6 <= entry.frequency <= 12, "2,000 seconds are 7 windows"
