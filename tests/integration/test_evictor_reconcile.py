"""Reconciliation of volume and state store after any loss or damage."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from distributor_node.services.evictor import reconcile
from distributor_node.services.evictor.adoption import PartialReaper, SweepResult
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import (
    Access,
    FetchPhase,
    IndexEntry,
    NotReconciled,
    PolicyState,
    Term,
)
from distributor_node.shared.settings.model import EvictorSettings
from tests.integration.evictor_harness import (
    LIMIT,
    SIZE,
    EvictorHarness,
    body_of,
    evictor_harness,
    media_object,
)
from tests.servers.redis_server import RedisServer
from tests.waiting import eventually


async def test_an_empty_store_is_rebuilt_from_the_volume_without_the_catalog(harness: EvictorHarness) -> None:
    harness.catalog.down = True
    for number in range(5):
        harness.put_file(f"o{number}")
    assert isinstance(await harness.state.begin(ObjectId("new"), SIZE, "worker"), NotReconciled)
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert sorted(await harness.entries()) == [f"o{number}" for number in range(5)]
        assert await harness.used() == 5 * footprint(SIZE)
        assert await harness.matches_volume()


async def test_entries_without_a_file_are_dropped(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two")
    harness.path_of("one").unlink()
    async with harness.evictor():

        async def dropped() -> bool:
            return list(await harness.entries()) == ["two"]

        await eventually(dropped)
        assert await harness.used() == footprint(SIZE)


async def test_a_half_done_eviction_is_finished_by_the_next_leader(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("before-unlink", "after-unlink", "stays")
    term = await harness.term()
    for name in ("before-unlink", "after-unlink"):
        assert await harness.state.begin_eviction(term, ObjectId(name), 0.0)
    harness.path_of("after-unlink").unlink()
    await harness.state.resign(term)
    async with harness.evictor():

        async def finished() -> bool:
            return list(await harness.entries()) == ["stays"]

        await eventually(finished)
        assert not harness.has("before-unlink")
        assert await harness.used() == footprint(SIZE)


async def test_deferred_removals_count_until_their_readers_have_finished(harness: EvictorHarness) -> None:
    for name in ("free", "read"):
        harness.put_file(name)
        harness.volume.removal(ObjectId(name)).rename_to_trash()
    reader = os.open(harness.root / "leaving" / "read", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert await harness.used() == footprint(SIZE)
        assert [path.name for path in (harness.root / "leaving").iterdir()] == ["read"]
        os.close(reader)

        async def nothing_left() -> bool:
            return await harness.used() == 0

        await eventually(nothing_left)
        assert list((harness.root / "leaving").iterdir()) == []


async def test_a_removed_file_is_not_counted_by_the_entry_of_a_smaller_one(harness: EvictorHarness) -> None:
    """1. A purge moves a file that is being sent. 2. A smaller object is stored under its id. 3. Its file is lost."""
    harness.put_file("sent")
    reader = os.open(harness.path_of("sent"), os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    harness.volume.removal(ObjectId("sent")).rename_to_trash()
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert await harness.state.commit(await harness.begin_fetch("sent", 1000), time.time())
    async with harness.evictor():

        async def counted() -> bool:
            usage = await harness.state.usage()
            return (usage.objects, usage.leaving) == (0, footprint(SIZE))

        await eventually(counted)
        assert await harness.matches_volume()
        os.close(reader)

        async def nothing_left() -> bool:
            return await harness.used() == 0

        await eventually(nothing_left)


async def test_removed_files_alone_are_no_lost_data(harness: EvictorHarness) -> None:
    """The index is empty, and a client is still being sent the only object."""
    harness.put_file("sent")
    reader = os.open(harness.path_of("sent"), os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    harness.volume.removal(ObjectId("sent")).rename_to_trash()
    with capture_logs() as logs:
        async with harness.evictor():
            await eventually(harness.reconciled)
            await asyncio.sleep(0.5)  # ten looks at the usage
    os.close(reader)
    assert [line["event"] for line in logs].count("reconciliation_finished") == 1


@pytest.mark.parametrize("stored_again", [True, False])
async def test_a_removed_file_counts_and_goes_although_its_entry_is_not_evicting(
    harness: EvictorHarness, stored_again: bool
) -> None:
    """1. A purge moves a file that is being sent. 2. Redis loses its last second. Or the object is stored again, since
    the leader that purged it was stopped before the move."""
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("sent")
    reader = os.open(harness.path_of("sent"), os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    harness.volume.removal(ObjectId("sent")).rename_to_trash()
    if stored_again:
        harness.put_file("sent")
    files = 2 if stored_again else 1
    async with harness.evictor():

        async def counted() -> bool:
            return await harness.matches_volume() and await harness.used() >= files * SIZE

        await eventually(counted)
        os.close(reader)

        async def settled() -> bool:
            return await harness.used() == (files - 1) * footprint(SIZE)

        await eventually(settled)
        assert list((harness.root / "leaving").iterdir()) == []
        assert harness.has("sent") == stored_again


async def test_partial_files_are_adopted_with_what_they_hold(harness: EvictorHarness) -> None:
    harness.leave_partial("half", 1000)
    harness.leave_partial("no-note", 1000)
    (harness.root / "incoming" / "no-note.json").unlink()
    async with harness.evictor():
        await eventually(harness.reconciled)
        half = await harness.fetch_of("half")
        assert half is not None
        assert (half.phase, half.size, half.reserved) == (FetchPhase.PARKED, SIZE, footprint(1000))
        usage = await harness.state.usage()
        assert (usage.used, usage.reserved, usage.parked) == (0, footprint(1000), 1)
        assert sorted(path.name for path in (harness.root / "incoming").iterdir()) == [
            "half.json",
            "half.part",
        ]


async def test_a_partial_file_in_use_is_left_alone(harness: EvictorHarness) -> None:
    partial = harness.begin_partial("held", 1000)
    async with harness.evictor(partial_keep=0.001):
        await eventually(harness.reconciled)
        assert partial.size == 1000
        usage = await harness.state.usage()
        assert usage.reserved == footprint(SIZE)
    partial.close()


async def test_a_partial_file_that_is_opened_just_after_the_loss_counts(
    harness: EvictorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker gets its lease. 2. The store is emptied, and the rebuild begins. 3. The worker opens the file."""
    monkeypatch.setattr(reconcile, "REBUILD_DELAY", 2.0)
    looked, sweep = asyncio.Event(), PartialReaper.sweep

    async def note(reaper: PartialReaper, term: Term, *, measure: bool = False) -> SweepResult:
        found = await sweep(reaper, term, measure=measure)
        looked.set()
        return found

    monkeypatch.setattr(PartialReaper, "sweep", note)
    async with harness.evictor():
        await looked.wait()
        await asyncio.sleep(0.5)  # the rest of the rebuild of an empty volume takes less
        partial = harness.begin_partial("late", 1000)
        await eventually(harness.reconciled)
        assert (await harness.state.usage()).reserved == footprint(SIZE)
    partial.close()


async def test_abandoned_partial_files_and_fetches_without_one_are_removed(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.state.park(await harness.begin_fetch("never-written"))
        await harness.state.park(await harness.begin_fetch("abandoned"))
        harness.leave_partial("abandoned", 1000)
        os.utime(harness.root / "incoming" / "abandoned.part", (1, 1))
    async with harness.evictor():

        async def nothing_left() -> bool:
            return (await harness.state.usage()).reserved == 0

        await eventually(nothing_left)
        assert list((harness.root / "incoming").iterdir()) == []


async def test_what_was_viewed_a_short_time_ago_is_not_abandoned(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.park("viewed", 1000)
        os.utime(harness.root / "incoming" / "viewed.part", (1, 1))
    term = await harness.term()
    entry = IndexEntry(ObjectId("viewed"), 1000, 1, time.time())
    await harness.state.save_policy(term, [entry], PolicyState())
    await harness.state.resign(term)
    async with harness.evictor(partial_keep=3600):
        lease = await harness.begin_fetch("lost")
        await harness.state.park(lease)

        async def swept() -> bool:
            return await harness.fetch_of("lost") is None

        await eventually(swept)
        assert await harness.fetch_of("viewed") is not None


@pytest.mark.parametrize("writing", [False, True])
async def test_a_parked_fetch_whose_resume_the_store_has_forgotten(
    harness: EvictorHarness, writing: bool
) -> None:
    """1. It was parked with little. 2. A worker claimed the rest and wrote. 3. The store lost its last second."""
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.park("half", 1000)
    worker = harness.begin_partial("half", 9000)
    if not writing:
        worker.close()
    async with harness.evictor():

        async def counted_right() -> bool:
            half = await harness.fetch_of("half")
            return half is not None and half.reserved == footprint(SIZE if writing else 9000)

        await eventually(counted_right)
        assert await harness.matches_volume()
    if writing:
        worker.close()


async def test_a_partial_file_larger_than_its_object_is_counted_and_removed(harness: EvictorHarness) -> None:
    """1. A fetch is parked. 2. The object is smaller now, a worker begins. 3. It dies before it cuts the file."""
    async with harness.evictor():
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("shrunk")
        harness.leave_partial("shrunk", SIZE - 1000)
        await harness.state.park(lease)
        await harness.begin_fetch("shrunk", 1000)
        assert await harness.matches_volume()
    async with harness.evictor(partial_keep=0.2):  # sweeps as often

        async def nothing_left() -> bool:
            return (await harness.state.usage()).reserved == 0

        await eventually(nothing_left)
        assert list((harness.root / "incoming").iterdir()) == []


async def test_a_fetch_that_ended_before_its_commit_is_adopted(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.begin_fetch("published")  # and then its worker dies
        harness.put_file("published")
        await asyncio.sleep(0.6)  # its lease runs out
    async with harness.evictor():

        async def adopted() -> bool:
            return list(await harness.entries()) == ["published"]

        await eventually(adopted)
        usage = await harness.state.usage()
        assert (usage.used, usage.reserved) == (footprint(SIZE), 0)


async def test_a_live_fetch_is_never_adopted_over(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("live")
        harness.put_file("live")
        async with harness.evictor(reconcile_interval=0.01):
            for _ in range(10):
                assert await harness.state.renew(lease)
                await asyncio.sleep(0.05)
        assert await harness.entries() == {}
        assert await harness.state.commit(lease, time.time())
        assert list(await harness.entries()) == ["live"]


async def test_unknown_files_and_links_are_left_alone(harness: EvictorHarness, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    harness.put_file("one")
    folder = harness.path_of("one").parent
    (folder / "link").symlink_to(outside)
    (folder / "not an id").write_bytes(b"mine")
    (folder / "folder").mkdir()
    (harness.root / "incoming" / "notes.txt").write_bytes(b"mine")
    async with harness.evictor(reconcile_interval=0.05):
        await eventually(harness.reconciled)
        await asyncio.sleep(0.3)
        assert list(await harness.entries()) == ["one"]
    assert outside.read_bytes() == b"precious"
    assert (folder / "link").is_symlink()
    assert (folder / "folder").is_dir()
    assert (folder / "not an id").exists()
    assert (harness.root / "incoming" / "notes.txt").exists()


async def test_files_without_a_record_are_repaired_removed_or_kept(harness: EvictorHarness) -> None:
    for name in ("good", "wrong-size", "wrong-bytes", "unknown"):
        harness.put_file(name)
        harness.record_path_of(name).unlink()
    harness.catalog.down = True
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert await harness.used() == 4 * footprint(SIZE)
        assert harness.volume.open_object(ObjectId("good")) is None
    harness.catalog.down = False
    for known in (
        media_object("good", body_of("good")),
        media_object("wrong-size", b"short"),
        media_object("wrong-bytes", body_of("other")),
    ):
        harness.catalog.objects[known.object_id] = known
    async with harness.evictor():
        await eventually(lambda: harness.volume.read_record(ObjectId("good")) is not None)
        await eventually(lambda: not harness.has("wrong-size"))
        await eventually(lambda: not harness.has("wrong-bytes"))
        assert harness.has("unknown")

        async def settled() -> bool:
            return sorted(await harness.entries()) == ["good", "unknown"]

        await eventually(settled)
        await eventually(harness.matches_volume)
    opened = harness.volume.open_object(ObjectId("good"))
    assert opened is not None
    assert opened.record.etag == media_object("good", body_of("good")).etag
    opened.close()


async def test_truncated_files_are_removed(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("cut", "whole")
    os.truncate(harness.path_of("cut"), 5)
    harness.put_file("cut-and-unknown")
    os.truncate(harness.path_of("cut-and-unknown"), 5)
    async with harness.evictor():

        async def gone() -> bool:
            return list(await harness.entries()) == ["whole"]

        await eventually(lambda: not harness.has("cut") and not harness.has("cut-and-unknown"))
        await eventually(gone)
        assert await harness.used() == footprint(SIZE)


async def test_an_object_that_is_replaced_while_the_entries_are_read_stays(
    harness: EvictorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store reads ahead, so an entry may be older than the file that is looked at."""
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one")
    read, sizes = harness.state.entries, iter(range(SIZE + 1, 2 * SIZE))

    async def entries() -> AsyncIterator[Sequence[IndexEntry]]:
        async for batch in read():
            for entry in batch:
                assert await harness.state.forget(entry.object_id, entry.generation)
                body = body_of(entry.object_id, next(sizes))
                lease = await harness.begin_fetch(entry.object_id, len(body))
                harness.put_file(entry.object_id, body)
                assert await harness.state.commit(lease, time.time())
            yield batch

    monkeypatch.setattr(harness.state, "entries", entries)
    with capture_logs() as logs:
        async with harness.evictor():
            await eventually(lambda: "reconciliation_finished" in [line["event"] for line in logs])
    assert "object_damaged" not in [line["event"] for line in logs]
    assert harness.has("one")


async def test_a_damaged_file_without_entry_counts_until_it_is_removed(harness: EvictorHarness) -> None:
    async with harness.evictor(partial_keep=0.2):  # sweeps as often
        await eventually(harness.reconciled)
        await harness.store("cut", "whole")
        await asyncio.sleep(0.1)
        os.truncate(harness.path_of("cut"), 5)
        assert await harness.state.forget(ObjectId("cut"), (await harness.entries())["cut"].generation)

        async def gone() -> bool:
            return not harness.has("cut") and list(await harness.entries()) == ["whole"]

        await eventually(gone)
        await eventually(harness.matches_volume)


async def test_recency_survives_a_restart(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", age=3600)
        await harness.state.record_accesses([Access(ObjectId("one"), 41, time.time())])
        await asyncio.sleep(1.2)  # the log is read each second
    assert (await harness.entries())["one"].frequency == 42
    async with harness.evictor():
        await asyncio.sleep(0.3)
        # What had been applied is not applied again
    assert (await harness.entries())["one"].frequency == 42


async def test_a_replaced_volume_is_recounted(harness: EvictorHarness, tmp_path: Path) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two")
        other = Volume(tmp_path / "other")
        other.prepare()
        harness.root.rename(tmp_path / "former")
        other.root.rename(harness.root)
        other.close()

        async def empty() -> bool:
            return await harness.entries() == {} and await harness.used() == 0

        await eventually(empty)
        harness.root.rename(tmp_path / "other")
        (tmp_path / "former").rename(harness.root)

        async def back() -> bool:
            return sorted(await harness.entries()) == ["one", "two"]

        await eventually(back)
        await eventually(harness.matches_volume)


@pytest.mark.servers
async def test_an_emptied_redis_is_noticed_and_refilled(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with (
        evictor_harness(tmp_path, (own_redis.url, redis_prefix)) as harness,
        harness.evictor(interval=1.0),
    ):
        await eventually(harness.reconciled)
        await harness.store("one", "two", "three")
        await harness.state.record_accesses([Access(ObjectId("one"), 9, time.time())])
        await asyncio.sleep(1.2)
        await own_redis.command("FLUSHALL")
        assert not await harness.reconciled()
        await eventually(harness.reconciled)
        assert sorted(await harness.entries()) == ["one", "three", "two"]
        assert await harness.matches_volume()
        # The leader remembered what the store had lost
        assert (await harness.entries())["one"].frequency == 10


@pytest.mark.servers
async def test_an_emptied_redis_is_filled_with_every_file_while_the_scrub_reads(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_harness(tmp_path, (own_redis.url, redis_prefix)) as harness:
        names = [f"o{number}" for number in range(150)]
        for name in names:
            harness.put_file(name, b"tiny")
        defaults = EvictorSettings()
        settings = harness.settings().model_copy(update={"evictor": defaults})
        standing = (
            harness.volume.scan_objects()
        )  # a scan that stays in one directory, as a scrub does at a large file
        async with harness.evictor_of(settings):
            await eventually(harness.reconciled)
            for _ in range(3):
                next(standing)
                await own_redis.command("FLUSHALL")
                assert not await harness.reconciled()
                await eventually(harness.reconciled)
                assert (await harness.state.usage()).objects == len(names)


@pytest.mark.servers
async def test_a_redis_that_restarts_empty_is_filled_again(
    tmp_path: Path, own_redis: RedisServer, redis_prefix: str
) -> None:
    async with evictor_harness(tmp_path, (own_redis.url, redis_prefix)) as harness, harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", "three")
        own_redis.kill()
        await asyncio.sleep(1.0)
        own_redis.start()

        async def filled() -> bool:
            try:
                return await harness.reconciled() and len(await harness.entries()) == 3
            except StateStoreUnavailable:
                return False

        await eventually(filled)
        assert await harness.used() <= LIMIT


@pytest.mark.servers
@pytest.mark.parametrize("lost", ["usage", "objects", "fetches"])
async def test_counters_match_the_volume_whichever_key_is_lost(
    tmp_path: Path, redis_url: str, redis_prefix: str, lost: str
) -> None:
    async with evictor_harness(tmp_path, (redis_url, redis_prefix)) as harness:
        async with harness.evictor():
            await eventually(harness.reconciled)
            await harness.store("one", "two")
            await harness.state.park(await harness.begin_fetch("three"))
            harness.leave_partial("three", 100)
            async with Redis.from_url(redis_url) as client:
                await client.delete(f"{redis_prefix}{lost}")

            async def right() -> bool:
                usage = await harness.state.usage()
                return usage.reconciled and (usage.objects, usage.used, usage.reserved) == (
                    2,
                    2 * footprint(SIZE),
                    footprint(SIZE),
                )

            if lost != "fetches":  # noticed by itself within a look of the evictor's
                await eventually(right)
        async with harness.evictor():
            await eventually(right)


@pytest.mark.servers
async def test_a_server_that_may_drop_keys_is_reported(redis_server: RedisServer, tmp_path: Path) -> None:
    assert await redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru") == "+OK"
    try:
        async with evictor_harness(tmp_path, (redis_server.url, "policy:")) as harness:
            with capture_logs() as logs:
                async with harness.evictor():
                    await eventually(harness.reconciled)
        assert "state_store_eviction_enabled" in [line["event"] for line in logs]
    finally:
        assert await redis_server.command("CONFIG", "SET", "maxmemory-policy", "noeviction") == "+OK"
