"""The evictor keeps the volume below its limit, and nobody's answer is pulled from under him."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from shared.adapters.volume import Volume
from shared.domain.errors import VolumeFull
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import Access, Granted
from tests.integration.evictor_world import (
    LIMIT,
    SIZE,
    EvictorWorld,
    body_of,
    eventually,
    evictor_world,
    record_of,
)
from tests.mounting import small_file_system

HIGH, LOW = 0.9 * LIMIT, 0.5 * LIMIT


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorWorld]:
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), request.getfixturevalue("redis_prefix"))
    async with evictor_world(tmp_path, redis) as made:
        yield made


async def test_nothing_goes_below_the_high_mark_and_down_to_the_low_one_above_it(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        names = [f"o{number}" for number in range(9)]
        await world.store(*names, age=3600)
        await asyncio.sleep(0.3)
        assert len(await world.entries()) == 9
        await world.store("o9", age=1)

        async def down() -> bool:
            return await world.used() <= LOW

        await eventually(down)
        assert sorted(await world.entries()) == ["o5", "o6", "o7", "o8", "o9"]
        assert [name for name in names if world.has(name)] == ["o5", "o6", "o7", "o8"]
        assert await world.true_to_the_volume()


async def test_accesses_decide_who_stays(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(9)], age=3600)
        await world.state.record_accesses([Access(ObjectId("o0"), 1, time.time())])
        await world.store("o9")

        async def down() -> bool:
            return await world.used() <= LOW

        await eventually(down)
        assert sorted(await world.entries()) == ["o0", "o6", "o7", "o8", "o9"]


async def test_space_is_made_at_once_when_a_worker_asks(world: EvictorWorld) -> None:
    async with world.evictor(interval=30.0):
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(8)], age=3600)
        large = ObjectId("large")
        wanted = 5 * SIZE
        assert not isinstance(await world.state.begin(large, wanted, "worker-1"), Granted)
        asked = time.monotonic()
        await world.state.request_space(large, wanted, 10.0)

        async def granted() -> bool:
            return isinstance(await world.state.begin(large, wanted, "worker-1"), Granted)

        await eventually(granted)
        assert time.monotonic() - asked < 2.0
        assert not world.has("o0")
        assert world.has("o7")


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """Where the volume will be lies a file system of 160 KiB: some objects fewer than the limit allows."""
    root = tmp_path / "volume"
    root.mkdir()
    with small_file_system(root, "160k"):
        yield tmp_path


async def test_room_is_made_on_a_device_smaller_than_the_limit(small_device: Path) -> None:
    async with evictor_world(small_device) as world, world.evictor(interval=30.0):
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(6)], age=3600)
        lease = await world.begun("new")
        partial = world.volume.open_partial_for_writing(record_of("new", body_of("new")))
        with pytest.raises(VolumeFull):
            partial.check_free_space()
        partial.discard()
        await world.state.release(lease)
        await world.state.request_space(ObjectId("new"), SIZE, 60.0)
        await eventually(lambda: world.volume.free_bytes() >= footprint(SIZE))
        partial = world.volume.open_partial_for_writing(record_of("new", body_of("new")))
        partial.check_free_space()
        partial.close()
        assert len(await world.entries()) == 5, "no more than was asked for"


class SlowDevice(Volume):
    """A device that never gives back what was removed."""

    def free_bytes(self) -> int:
        return SIZE


async def test_a_device_that_gives_nothing_back_costs_no_more_than_was_asked_for(tmp_path: Path) -> None:
    async with evictor_world(tmp_path) as world:
        world.volume = SlowDevice(world.root)
        async with world.evictor(interval=30.0):
            await eventually(world.reconciled)
            await world.store(*[f"o{number}" for number in range(6)], age=3600)
            await world.state.request_space(ObjectId("new"), 2 * SIZE, 60.0)

            async def made() -> bool:
                return len(await world.entries()) < 6

            await eventually(made)
            await asyncio.sleep(0.3)
            assert len(await world.entries()) == 5
        world.volume.close()


async def test_what_is_being_sent_is_skipped_and_its_reader_finishes(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(9)], age=3600)
        sent = world.volume.open_object(ObjectId("o0"))
        assert sent is not None
        assert sent.lock_shared()
        await world.store("o9")

        async def down() -> bool:
            return await world.used() <= LOW

        await eventually(down)
        assert "o0" in await world.entries()
        assert sent.read(0, SIZE) == body_of("o0")
        sent.unlock()
        sent.close()
        # Skipped is not forgotten: it is the first to go after a moment
        for number in range(60):
            if not world.has("o0"):
                break
            await world.store(f"p{number}")
            await asyncio.sleep(0.1)
        assert not world.has("o0")
        await eventually(world.true_to_the_volume)


async def test_what_was_just_read_stays(world: EvictorWorld) -> None:
    async with world.evictor(min_idle=60.0):
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(10)], age=0)
        await asyncio.sleep(0.5)
        assert len(await world.entries()) == 10


async def test_a_parked_fetch_is_given_up_when_nothing_else_can_go(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        lease = await world.begun("half", LIMIT - 5000)
        world.leave_partial("half", 1000, LIMIT - 5000)
        await world.state.park(lease)
        await world.state.request_space(ObjectId("new"), SIZE, 30.0)
        await asyncio.sleep(1)
        assert await world.fetch_of("half") is not None, "another worker may be about to go on with it"

        async def granted() -> bool:
            return isinstance(await world.state.begin(ObjectId("new"), SIZE, "worker-1"), Granted)

        await eventually(granted, 25)
        assert await world.fetch_of("half") is None
        assert world.volume.open_partial(ObjectId("half")) is None


async def test_a_purged_object_is_out_of_sight_at_once_and_counts_until_read(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one", "two", age=600)
        sent = world.volume.open_object(ObjectId("one"))
        assert sent is not None
        assert sent.lock_shared()
        await world.state.want_purges([ObjectId("one")])
        await eventually(lambda: world.volume.open_object(ObjectId("one")) is None)
        await asyncio.sleep(0.3)
        assert await world.used() == 2 * footprint(SIZE)
        assert sent.read(0, SIZE) == body_of("one")
        sent.close()

        async def freed() -> bool:
            return await world.used() == footprint(SIZE)

        await eventually(freed)
        assert os.listdir(world.root / "leaving") == []  # noqa: PTH208


async def test_an_object_whose_file_cannot_be_removed_does_not_stop_the_others(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(9)], age=3600)
        path = world.path_of("o0")
        path.unlink()
        path.symlink_to("/etc/hostname")
        await world.store("o9")

        async def down() -> bool:
            return await world.used() <= LOW

        await eventually(down)
        assert path.is_symlink()


def sample(name: str) -> float:
    return REGISTRY.get_sample_value(f"distributor_{name}") or 0.0


async def test_victims_are_measured_and_noticed_when_they_come_back(world: EvictorWorld) -> None:
    names = (
        "victim_idle_seconds_count",
        "victim_size_bytes_count",
        "victim_size_bytes_sum",
        "refetched_total",
    )
    before, idle = {name: sample(name) for name in names}, sample("victim_idle_seconds_sum")
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store(*[f"o{number}" for number in range(9)], age=3600)
        await world.store("o9", age=1)

        async def down() -> bool:
            return await world.used() <= LOW

        await eventually(down)  # o0 to o4 are gone
        await eventually(lambda: sample("victim_size_bytes_count") == before["victim_size_bytes_count"] + 5)
        assert {name: sample(name) - before[name] for name in names} == {
            "victim_idle_seconds_count": 5,
            "victim_size_bytes_count": 5,
            "victim_size_bytes_sum": 5 * SIZE,
            "refetched_total": 0,
        }
        expected = sum(3600 - 60 * number for number in range(5))
        assert sample("victim_idle_seconds_sum") - idle == pytest.approx(expected, abs=60)
        await world.store("o0")
        await eventually(lambda: sample("refetched_total") == before["refetched_total"] + 1)
