"""Volume and state store agree again, whatever happened to either."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from shared.adapters.volume import Volume
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import Access, FetchPhase, NotReconciled
from shared.settings.model import EvictorSettings
from tests.integration.evictor_world import (
    LIMIT,
    SIZE,
    EvictorWorld,
    body_of,
    eventually,
    evictor_world,
    media_object,
)
from tests.servers.redis_server import RedisServer


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EvictorWorld]:
    redis = None
    if request.param == "redis":
        redis = (request.getfixturevalue("redis_url"), request.getfixturevalue("redis_prefix"))
    async with evictor_world(tmp_path, redis) as made:
        yield made


async def test_an_empty_store_is_rebuilt_from_the_volume_without_the_catalog(world: EvictorWorld) -> None:
    world.catalog.down = True
    for number in range(5):
        world.put_file(f"o{number}")
    assert isinstance(await world.state.begin(ObjectId("new"), SIZE, "worker"), NotReconciled)
    async with world.evictor():
        await eventually(world.reconciled)
        assert sorted(await world.entries()) == [f"o{number}" for number in range(5)]
        assert await world.used() == 5 * footprint(SIZE)
        assert await world.true_to_the_volume()


async def test_entries_without_a_file_are_dropped(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one", "two")
    world.path_of("one").unlink()
    async with world.evictor():

        async def dropped() -> bool:
            return list(await world.entries()) == ["two"]

        await eventually(dropped)
        assert await world.used() == footprint(SIZE)


async def test_what_an_evictor_left_half_done_is_finished_by_the_next(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("before-unlink", "after-unlink", "stays")
    term = await world.term()
    for name in ("before-unlink", "after-unlink"):
        assert await world.state.begin_eviction(term, ObjectId(name), 0.0)
    world.path_of("after-unlink").unlink()
    await world.state.resign(term)
    async with world.evictor():

        async def finished() -> bool:
            return list(await world.entries()) == ["stays"]

        await eventually(finished)
        assert not world.has("before-unlink")
        assert await world.used() == footprint(SIZE)


async def test_objects_in_leaving_count_until_their_readers_have_finished(world: EvictorWorld) -> None:
    for name in ("free", "read"):
        world.put_file(name)
        world.volume.removal(ObjectId(name)).set_aside()
    reader = os.open(world.root / "leaving" / "read", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    async with world.evictor():
        await eventually(world.reconciled)
        assert await world.used() == footprint(SIZE)
        assert [path.name for path in (world.root / "leaving").iterdir()] == ["read"]
        os.close(reader)

        async def nothing_left() -> bool:
            return await world.used() == 0

        await eventually(nothing_left)
        assert list((world.root / "leaving").iterdir()) == []


async def test_partial_files_are_adopted_with_the_size_they_may_reach(world: EvictorWorld) -> None:
    world.leave_partial("half", 1000)
    world.leave_partial("no-note", 1000)
    (world.root / "incoming" / "no-note.json").unlink()
    async with world.evictor():
        await eventually(world.reconciled)
        half = await world.fetch_of("half")
        assert half is not None
        assert (half.phase, half.size) == (FetchPhase.PARKED, SIZE)
        usage = await world.state.usage()
        assert (usage.used, usage.reserved) == (0, footprint(SIZE))
        assert sorted(path.name for path in (world.root / "incoming").iterdir()) == ["half.json", "half.part"]


async def test_a_partial_file_in_use_is_left_alone(world: EvictorWorld) -> None:
    partial = world.begin_partial("held", 1000)
    async with world.evictor(partial_keep=0.001):
        await eventually(world.reconciled)
        assert partial.size == 1000
        usage = await world.state.usage()
        assert usage.reserved == footprint(SIZE)
    partial.close()


async def test_abandoned_partial_files_and_fetches_without_one_go(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.state.park(await world.begun("never-written"))
        await world.state.park(await world.begun("abandoned"))
        world.leave_partial("abandoned", 1000)
        os.utime(world.root / "incoming" / "abandoned.part", (1, 1))
    async with world.evictor():

        async def nothing_left() -> bool:
            return (await world.state.usage()).reserved == 0

        await eventually(nothing_left)
        assert list((world.root / "incoming").iterdir()) == []


async def test_a_fetch_that_ended_before_it_could_tell_is_adopted(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.begun("published")  # and then its worker dies
        world.put_file("published")
        await asyncio.sleep(0.6)  # its lease runs out
    async with world.evictor():

        async def adopted() -> bool:
            return list(await world.entries()) == ["published"]

        await eventually(adopted)
        usage = await world.state.usage()
        assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


async def test_a_live_fetch_is_never_adopted_over(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        lease = await world.begun("live")
        world.put_file("live")
        async with world.evictor(reconcile_interval=0.01):
            for _ in range(10):
                assert await world.state.renew(lease)
                await asyncio.sleep(0.05)
        assert await world.entries() == {}
        assert await world.state.commit(lease, time.time())
        assert list(await world.entries()) == ["live"]


async def test_foreign_files_and_links_are_left_alone(world: EvictorWorld, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    world.put_file("one")
    folder = world.path_of("one").parent
    (folder / "link").symlink_to(outside)
    (folder / "not an id").write_bytes(b"mine")
    (folder / "folder").mkdir()
    (world.root / "incoming" / "notes.txt").write_bytes(b"mine")
    async with world.evictor(reconcile_interval=0.05):
        await eventually(world.reconciled)
        await asyncio.sleep(0.3)
        assert list(await world.entries()) == ["one"]
    assert outside.read_bytes() == b"precious"
    assert (folder / "link").is_symlink()
    assert (folder / "folder").is_dir()
    assert (folder / "not an id").exists()
    assert (world.root / "incoming" / "notes.txt").exists()


async def test_files_without_a_record_are_repaired_removed_or_kept(world: EvictorWorld) -> None:
    for name in ("good", "wrong-size", "wrong-bytes", "unknown"):
        world.put_file(name)
        world.record_path_of(name).unlink()
    world.catalog.down = True
    async with world.evictor():
        await eventually(world.reconciled)
        assert await world.used() == 4 * footprint(SIZE)
        assert world.volume.open_object(ObjectId("good")) is None
    world.catalog.down = False
    for known in (
        media_object("good", body_of("good")),
        media_object("wrong-size", b"short"),
        media_object("wrong-bytes", body_of("other")),
    ):
        world.catalog.objects[known.object_id] = known
    async with world.evictor():
        await eventually(lambda: world.volume.read_record(ObjectId("good")) is not None)
        await eventually(lambda: not world.has("wrong-size"))
        await eventually(lambda: not world.has("wrong-bytes"))
        assert world.has("unknown")

        async def settled() -> bool:
            return sorted(await world.entries()) == ["good", "unknown"]

        await eventually(settled)
        await eventually(world.true_to_the_volume)
    opened = world.volume.open_object(ObjectId("good"))
    assert opened is not None
    assert opened.record.etag == media_object("good", body_of("good")).etag
    opened.close()


async def test_files_cut_short_behind_our_back_leave(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("cut", "whole")
    os.truncate(world.path_of("cut"), 5)
    world.put_file("cut-and-unknown")
    os.truncate(world.path_of("cut-and-unknown"), 5)
    async with world.evictor():

        async def gone() -> bool:
            return list(await world.entries()) == ["whole"]

        await eventually(lambda: not world.has("cut") and not world.has("cut-and-unknown"))
        await eventually(gone)
        assert await world.used() == footprint(SIZE)


async def test_a_damaged_file_whose_entry_was_dropped_counts_until_it_is_gone(world: EvictorWorld) -> None:
    async with world.evictor(partial_keep=0.2):  # sweeps as often
        await eventually(world.reconciled)
        await world.store("cut", "whole")
        await asyncio.sleep(0.1)
        os.truncate(world.path_of("cut"), 5)
        assert await world.state.forget(ObjectId("cut"), (await world.entries())["cut"].generation)

        async def gone() -> bool:
            return not world.has("cut") and list(await world.entries()) == ["whole"]

        await eventually(gone)
        await eventually(world.true_to_the_volume)


async def test_recency_survives_a_restart(world: EvictorWorld) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one", "two", age=3600)
        await world.state.record_accesses([Access(ObjectId("one"), 41, time.time())])
        await asyncio.sleep(1.2)  # the log is read each second
    assert (await world.entries())["one"].frequency == 42
    async with world.evictor():
        await asyncio.sleep(0.3)
        # What had been applied is not applied again
    assert (await world.entries())["one"].frequency == 42


async def test_a_volume_that_is_replaced_is_counted_anew(world: EvictorWorld, tmp_path: Path) -> None:
    async with world.evictor():
        await eventually(world.reconciled)
        await world.store("one", "two")
        other = Volume(tmp_path / "other")
        other.prepare()
        world.root.rename(tmp_path / "former")
        other.root.rename(world.root)
        other.close()

        async def empty() -> bool:
            return await world.entries() == {} and await world.used() == 0

        await eventually(empty)
        world.root.rename(tmp_path / "other")
        (tmp_path / "former").rename(world.root)

        async def back() -> bool:
            return sorted(await world.entries()) == ["one", "two"]

        await eventually(back)
        await eventually(world.true_to_the_volume)


@pytest.mark.servers
async def test_an_emptied_redis_is_noticed_and_filled_again(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_world(tmp_path, (own_redis.url, redis_prefix)) as world, world.evictor(interval=1.0):
        await eventually(world.reconciled)
        await world.store("one", "two", "three")
        await world.state.record_accesses([Access(ObjectId("one"), 9, time.time())])
        await asyncio.sleep(1.2)
        await own_redis.command("FLUSHALL")
        emptied = time.monotonic()
        assert not await world.reconciled()
        await eventually(world.reconciled)
        assert time.monotonic() - emptied < 2.5
        assert sorted(await world.entries()) == ["one", "three", "two"]
        assert await world.true_to_the_volume()
        # The leader remembered what the store had lost
        assert (await world.entries())["one"].frequency == 10


@pytest.mark.servers
async def test_an_emptied_redis_is_filled_with_every_file_while_the_scrub_reads(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_world(tmp_path, (own_redis.url, redis_prefix)) as world:
        names = [f"o{number}" for number in range(150)]
        for name in names:
            world.put_file(name, b"tiny")
        defaults = EvictorSettings()
        settings = world.settings().model_copy(update={"evictor": defaults})
        standing = (
            world.volume.scan_objects()
        )  # a scan that stays in one directory, as a scrub does at a large file
        async with world.evictor_of(settings):
            await eventually(world.reconciled, 20.0)
            for _ in range(3):
                next(standing)
                await own_redis.command("FLUSHALL")
                assert not await world.reconciled()
                await eventually(world.reconciled, 20.0)
                assert (await world.state.usage()).objects == len(names)


@pytest.mark.servers
async def test_a_redis_that_restarts_empty_is_filled_again(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_world(tmp_path, (own_redis.url, redis_prefix)) as world, world.evictor():
        await eventually(world.reconciled)
        await world.store("one", "two", "three")
        own_redis.kill()
        await asyncio.sleep(1.0)
        own_redis.start()

        async def filled() -> bool:
            try:
                return await world.reconciled() and len(await world.entries()) == 3
            except StateStoreUnavailable:
                return False

        await eventually(filled, 20.0)
        assert await world.used() <= LIMIT


class BadSector(Volume):
    """A volume with one file that can be opened and not be read."""

    unreadable = ObjectId("bad")

    def open_raw(self, object_id: ObjectId) -> int | None:
        descriptor = super().open_raw(object_id)
        if descriptor is None or object_id != self.unreadable:
            return descriptor
        os.close(descriptor)
        [path] = self.root.glob(f"objects/*/{object_id}")
        return os.open(path, os.O_WRONLY)


@pytest.mark.parametrize("hashed", [True, False])
async def test_one_file_that_cannot_be_read_holds_up_no_other(tmp_path: Path, hashed: bool) -> None:
    async with evictor_world(tmp_path) as world:
        world.volume = BadSector(world.root)
        names = ["bad", *(f"o{number}" for number in range(4))]
        for name in names:
            world.put_file(name)
            world.record_path_of(name).unlink()
            known = media_object(name, body_of(name))
            world.catalog.objects[known.object_id] = known if hashed else replace(known, content_hash=None)
        with capture_logs() as logs:
            async with world.evictor():
                await eventually(lambda: all(world.volume.read_record(ObjectId(n)) for n in names[1:]))
                await eventually(
                    lambda: (
                        ("objects_without_record", 1) in [(line["event"], line.get("count")) for line in logs]
                    )
                )
        assert world.has("bad")
        world.volume.close()


@pytest.mark.servers
@pytest.mark.parametrize("lost", ["usage", "objects", "fetches"])
async def test_sums_are_those_of_the_volume_whichever_key_is_lost(
    tmp_path: Path, redis_url: str, redis_prefix: str, lost: str
) -> None:
    async with evictor_world(tmp_path, (redis_url, redis_prefix)) as world:
        async with world.evictor():
            await eventually(world.reconciled)
            await world.store("one", "two")
            await world.state.park(await world.begun("three"))
            world.leave_partial("three", 100)
            async with Redis.from_url(redis_url) as client:
                await client.delete(f"{redis_prefix}{lost}")

            async def right() -> bool:
                usage = await world.state.usage()
                return usage.reconciled and (usage.objects, usage.used, usage.reserved) == (
                    2,
                    2 * footprint(SIZE),
                    footprint(SIZE),
                )

            if lost != "fetches":  # noticed by itself within a look of the evictor's
                await eventually(right)
        async with world.evictor():
            await eventually(right)


@pytest.mark.servers
async def test_a_server_that_may_drop_keys_is_told_of(redis_server: RedisServer, tmp_path: Path) -> None:
    assert await redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru") == "+OK"
    try:
        async with evictor_world(tmp_path, (redis_server.url, "policy:")) as world:
            with capture_logs() as logs:
                async with world.evictor():
                    await eventually(world.reconciled)
        assert "state_store_evicts" in [line["event"] for line in logs]
    finally:
        assert await redis_server.command("CONFIG", "SET", "maxmemory-policy", "noeviction") == "+OK"
