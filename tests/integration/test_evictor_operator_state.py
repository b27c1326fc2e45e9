"""The evictor applies purges and pins, and backs up the operator state on the volume."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume.operator_state_file import (
    read_operator_state,
    write_operator_state,
)
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot
from tests.integration.evictor_harness import SIZE, EvictorHarness, body_of, evictor_harness
from tests.waiting import eventually

ONE, TWO, THREE = (ObjectId(name) for name in ("one", "two", "three"))


@pytest.fixture(params=["memory", "redis"])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorHarness]:
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), f"test-{uuid.uuid4().hex[:12]}:")
    async with evictor_harness(tmp_path, redis) as made:
        yield made


async def no_purges_left(harness: EvictorHarness) -> bool:
    return not await harness.state.pending_purges(10)


async def test_purged_objects_go_pinned_or_not(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", "three")
        await harness.state.change_pins(pin=[TWO])
        await harness.state.request_purges([ONE, TWO, ObjectId("unknown")])
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("one")
        assert not harness.has("two")
        assert set(await harness.entries()) == {"three"}
        assert await harness.matches_volume()


async def test_a_purged_object_in_transfer_is_sent_completely(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one")
        reader = harness.volume.open_object(ONE)
        assert reader is not None
        assert reader.lock_shared()
        await harness.state.request_purges([ONE])
        await eventually(lambda: no_purges_left(harness))
        assert harness.volume.open_object(ONE) is None
        assert reader.read(0, SIZE) == body_of("one")
        assert await harness.used() > 0
        reader.close()

        async def freed() -> bool:
            return await harness.used() == 0

        await eventually(freed)


async def test_a_purge_waits_for_the_fetch_under_way(harness: EvictorHarness) -> None:
    async with harness.evictor(partial_keep=60):
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("one")
        await harness.state.request_purges([ONE])
        assert await harness.state.renew(lease)
        harness.put_file("one")
        assert not await no_purges_left(harness)
        assert await harness.state.commit(lease, 1.0)
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("one")
        assert await harness.used() == 0


async def test_a_purge_finishes_a_half_done_removal(harness: EvictorHarness) -> None:
    async with harness.evictor(partial_keep=3600):
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("one")
        harness.leave_partial("one", 1000)
        await harness.state.park(lease)
        await harness.state.request_purges([ONE])
        await eventually(lambda: no_purges_left(harness))
        assert await harness.fetch_of("one") is None
        assert harness.volume.open_partial(ONE) is None


async def test_pinned_objects_stay_when_room_is_made(harness: EvictorHarness) -> None:
    names = [f"object-{number}" for number in range(10)]
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.state.change_pins(pin=[ObjectId(names[0]), ObjectId(names[1])])
        await harness.store(*names, age=3600)

        async def below() -> bool:
            return len(await harness.entries()) <= 5

        await eventually(below)
        assert harness.has(names[0])
        assert harness.has(names[1])


async def test_the_backup_on_the_volume_follows_the_operator_state(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert read_operator_state(harness.root) is None
        written = await harness.state.change_operator_state(0, OperatorState(stopped=True))
        assert written is not None
        await eventually(lambda: read_operator_state(harness.root) == OperatorStateSnapshot(written))
        await harness.state.change_pins(pin=[ONE])

        def pinned() -> bool:
            snapshot = read_operator_state(harness.root)
            return snapshot is not None and snapshot.pinned == {ONE} and snapshot.state.stopped

        await eventually(pinned)


async def test_pins_are_back_before_anything_is_evicted(tmp_path: Path) -> None:
    async with evictor_harness(tmp_path) as harness:
        write_operator_state(harness.root, OperatorStateSnapshot(OperatorState(version=4), frozenset({ONE})))
        for name in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"):
            harness.put_file(name)
        assert isinstance(harness.state, MemoryStateStore)
        async with harness.evictor():
            await eventually(harness.reconciled)

            async def below() -> bool:
                return len(await harness.entries()) <= 5

            await eventually(below)
            assert harness.has("one")
            assert await harness.state.pinned() == {ONE}


async def test_the_operators_assignment_is_the_one_that_is_checked(harness: EvictorHarness) -> None:
    async with harness.evictor() as evictor:
        await eventually(harness.reconciled)
        await harness.state.change_operator_state(
            0, OperatorState(buckets_ordered=True, buckets=frozenset({"5:5"}))
        )

        def changed() -> bool:
            return evictor._parts.assignment._assignment.bucket_ids == frozenset({"5:5"})

        await eventually(changed)
