"""What the evictor does for the operator: purges, pins, and the copy of the orders on the volume."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.adapters.state_memory import MemoryStateStore
from shared.adapters.volume.orders_file import read_operator_state, write_operator_state
from shared.domain.objects import ObjectId
from shared.domain.orders import OperatorState, OperatorStateSnapshot
from tests.integration.evictor_world import SIZE, EvictorWorld, body_of, eventually, evictor_world

ONE, TWO, THREE = (ObjectId(name) for name in ("one", "two", "three"))


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorWorld]:
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), f"test-{uuid.uuid4().hex[:12]}:")
    async with evictor_world(tmp_path, redis) as made:
        yield made


async def no_purges_left(world: EvictorWorld) -> bool:
    return not await world.state.purges_wanted(10)


async def test_purged_objects_go_pinned_or_not(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one", "two", "three")
        await world.state.change_pins(pin=[TWO])
        await world.state.want_purges([ONE, TWO, ObjectId("unknown")])
        await eventually(lambda: no_purges_left(world))
        assert not world.has("one")
        assert not world.has("two")
        assert set(await world.entries()) == {"three"}
        assert await world.true_to_the_volume()


async def test_a_purged_object_that_is_being_sent_is_sent_to_its_end(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one")
        reader = world.volume.open_object(ONE)
        assert reader is not None
        assert reader.lock_shared()
        await world.state.want_purges([ONE])
        await eventually(lambda: no_purges_left(world))
        assert world.volume.open_object(ONE) is None
        assert reader.read(0, SIZE) == body_of("one")
        assert await world.used() > 0
        reader.close()

        async def freed() -> bool:
            return await world.used() == 0

        await eventually(freed)


async def test_a_purge_waits_for_the_fetch_under_way(world: EvictorWorld) -> None:
    async with world.evictor(partial_keep=60):
        await eventually(world.reconciled)
        lease = await world.begun("one")
        await world.state.want_purges([ONE])
        assert await world.state.renew(lease)
        world.put_file("one")
        assert not await no_purges_left(world)
        assert await world.state.commit(lease, 1.0)
        await eventually(lambda: no_purges_left(world))
        assert not world.has("one")
        assert await world.used() == 0


async def test_a_purge_takes_what_was_left_half_way(world: EvictorWorld) -> None:
    async with world.evictor(partial_keep=3600):
        await eventually(world.reconciled)
        lease = await world.begun("one")
        world.leave_partial("one", 1000)
        await world.state.park(lease)
        await world.state.want_purges([ONE])
        await eventually(lambda: no_purges_left(world))
        assert await world.fetch_of("one") is None
        assert world.volume.open_partial(ONE) is None


async def test_pinned_objects_stay_when_room_is_made(world: EvictorWorld) -> None:
    names = [f"object-{number}" for number in range(10)]
    async with world.evictor():
        await eventually(world.reconciled)
        await world.state.change_pins(pin=[ObjectId(names[0]), ObjectId(names[1])])
        await world.store(*names, age=3600)

        async def below() -> bool:
            return len(await world.entries()) <= 5

        await eventually(below)
        assert world.has(names[0])
        assert world.has(names[1])


async def test_the_copy_on_the_volume_follows_the_orders(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        assert read_operator_state(world.root) is None
        written = await world.state.change_operator_state(0, OperatorState(stopped=True))
        assert written is not None
        await eventually(lambda: read_operator_state(world.root) == OperatorStateSnapshot(written))
        await world.state.change_pins(pin=[ONE])

        def pinned() -> bool:
            snapshot = read_operator_state(world.root)
            return snapshot is not None and snapshot.pinned == {ONE} and snapshot.state.stopped

        await eventually(pinned)


async def test_pins_are_back_before_anything_is_evicted(tmp_path: Path) -> None:
    async with evictor_world(tmp_path) as world:
        write_operator_state(world.root, OperatorStateSnapshot(OperatorState(version=4), frozenset({ONE})))
        for name in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"):
            world.put_file(name)
        assert isinstance(world.state, MemoryStateStore)
        async with world.evictor():
            await eventually(world.reconciled)

            async def below() -> bool:
                return len(await world.entries()) <= 5

            await eventually(below)
            assert world.has("one")
            assert await world.state.pinned() == {ONE}


async def test_the_duty_ordered_is_the_one_that_is_checked(world: EvictorWorld) -> None:
    async with world.evictor() as evictor:
        await eventually(world.reconciled)
        await world.state.change_operator_state(
            0, OperatorState(buckets_ordered=True, buckets=frozenset({"5:5"}))
        )

        def changed() -> bool:
            return evictor._tools.duty._duty.bucket_ids == frozenset({"5:5"})

        await eventually(changed)
