"""An operator changes the buckets: unassigned objects are removed, even if they are most of the cache."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributor_node.services.evictor.assignment import AssignmentCheck
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.known_ids import NAME, KnownIds
from distributor_node.shared.domain.eviction import LruSp, PolicyEntry
from distributor_node.shared.domain.objects import Assignment, DistributionBucket, MediaObject, ObjectId
from distributor_node.shared.ports.state_store import IndexEntry, Term
from tests.integration.evictor_harness import ListedCatalog

OLD, NEW = Assignment(frozenset({"0:1"})), Assignment(frozenset({"0:2"}))


@dataclass
class Harness:
    assignment: AssignmentCheck
    index: EvictionIndex
    catalog: ListedCatalog
    term: Term
    remover: ObjectRemover
    root: Path

    def restarted(self, assignment: Assignment) -> AssignmentCheck:
        """The check of another process, configured so."""
        return AssignmentCheck(self.catalog, self.index, self.remover, assignment, True, self.root)

    def held(self) -> int:
        return len(self.index.policy)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    """Eight objects of the old bucket are held; the catalog knows two of the new one as well."""
    state, volume = MemoryStateStore(10**6, StateTimeouts(lease_seconds=10), time.time), Volume(tmp_path)
    volume.prepare()
    index, catalog = EvictionIndex(state, volume, LruSp), ListedCatalog()
    remover = ObjectRemover(state, volume, index)
    term = await state.lead("one", 3600)
    assert term is not None
    for number in range(10):
        object_id = ObjectId(f"{number}")
        bucket = "0:1" if number < 8 else "0:2"
        catalog.objects[object_id] = MediaObject(object_id, 10, buckets=(DistributionBucket(bucket),))
        if number < 8:
            await state.adopt(term, IndexEntry(object_id, 10, 1, 0.0))
            index.add(PolicyEntry(object_id, 10, 1, 0.0))
    assignment = AssignmentCheck(catalog, index, remover, OLD, can_list=True, root=tmp_path)
    yield Harness(assignment, index, catalog, term, remover, tmp_path)
    volume.close()


async def test_other_buckets_by_operator_change(harness: Harness) -> None:
    assert not harness.assignment.change(OLD)
    await harness.assignment.run(harness.term)
    assert harness.held() == 8
    assert harness.assignment.change(NEW)
    await harness.assignment.run(harness.term)
    assert harness.held() == 0


async def test_an_empty_list_is_implausible_after_an_operator_change_too(harness: Harness) -> None:
    harness.assignment.change(OLD)
    harness.assignment.change(Assignment(frozenset({"0:3"})))
    await harness.assignment.run(harness.term)
    assert harness.held() == 8


async def test_other_buckets_in_the_settings_and_a_restart(harness: Harness) -> None:
    assert await harness.assignment.run(harness.term)
    assert harness.held() == 8
    assert await harness.restarted(NEW).run(harness.term)
    assert harness.held() == 0


async def test_a_change_before_another_leaders_check_is_not_lost(harness: Harness) -> None:
    await harness.assignment.run(harness.term)
    harness.assignment.change(OLD)
    assert harness.assignment.change(NEW)
    leader = harness.restarted(OLD)
    assert not leader.change(NEW)
    await leader.run(harness.term)
    assert harness.held() == 0


async def test_a_worker_named_beside_the_buckets_changes_nothing(harness: Harness) -> None:
    harness.assignment.change(OLD)
    await harness.assignment.run(harness.term)
    assert not harness.assignment.change(Assignment(OLD.bucket_ids, 7))
    harness.catalog.left_out = {ObjectId(f"{number}") for number in range(7)}
    await harness.assignment.run(harness.term)
    assert harness.held() == 8


async def test_an_object_missing_from_the_list_stays_if_a_lookup_confirms_it(harness: Harness) -> None:
    harness.catalog.left_out = {ObjectId("0"), ObjectId("1"), ObjectId("2")}
    del harness.catalog.objects[ObjectId("0")]
    assert await harness.assignment.run(harness.term)
    assert harness.held() == 7, "what does not exist any more goes"


async def test_a_catalog_failing_midway_leaves_remaining_objects(harness: Harness) -> None:
    await harness.assignment.run(harness.term)
    harness.assignment.change(OLD)
    harness.assignment.change(NEW)

    class Failing(ListedCatalog):
        async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
            self.down = len(self.asked) == 3
            return await super().look_up(object_id, client)

    failing = Failing()
    failing.objects = harness.catalog.objects
    harness.catalog = failing
    check = harness.restarted(NEW)
    assert not await check.run(harness.term)
    assert harness.held() == 5
    failing.asked, failing.down = [ObjectId("x")] * 4, False
    assert await check.run(harness.term)
    assert harness.held() == 0


async def test_the_operator_state_found_at_the_start_is_no_change(harness: Harness) -> None:
    assert not harness.assignment.change(NEW)
    await harness.assignment.run(harness.term)
    assert harness.held() == 8, "nearly all would go: it may be the catalog's fault"


@pytest.mark.parametrize("held", [True, False])
async def test_the_list_tells_api_processes_which_ids_exist(harness: Harness, held: bool) -> None:
    if not held:
        for number in range(8):
            harness.index.removed(ObjectId(f"{number}"))
    check = AssignmentCheck(
        harness.catalog, harness.index, harness.remover, NEW, True, harness.root, shares_ids=True
    )
    await check.run(harness.term)
    known = KnownIds(harness.root)
    await known.refresh()
    assert {f"{number}" for number in range(12) if ObjectId(f"{number}") in known} == {
        *("8", "9"),
        *(map(str, range(8)) if held else ()),
    }


async def test_a_list_that_names_nothing_leaves_the_known_ids_alone(harness: Harness) -> None:
    def check(assignment: Assignment) -> AssignmentCheck:
        return AssignmentCheck(
            harness.catalog, harness.index, harness.remover, assignment, True, harness.root, shares_ids=True
        )

    known = KnownIds(harness.root)
    await check(OLD).run(harness.term)
    await check(Assignment(frozenset({"7:7"}))).run(harness.term)
    await known.refresh()
    assert ObjectId("1") in known


async def test_a_volume_that_cannot_be_written_stops_no_check(harness: Harness) -> None:
    (harness.root / NAME).mkdir()
    check = AssignmentCheck(
        harness.catalog, harness.index, harness.remover, OLD, True, harness.root, shares_ids=True
    )
    assert await check.run(harness.term)
