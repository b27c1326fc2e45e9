"""The evictor keeps the volume below its limit and does not disturb running responses."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from distributor_node.services.evictor.adoption import Adoption, PartialReaper
from distributor_node.services.evictor.eviction import Eviction, EvictionRules
from distributor_node.services.evictor.evictor import Evictor
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.layout import SHARDS
from distributor_node.shared.domain.errors import VolumeFull
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.domain.eviction.policy import NO_BASIS
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import DeviceSpace, Watermarks, footprint
from distributor_node.shared.ports.state_store import Access, Fetch, FetchPhase, Granted, Term, WorkerReport
from tests.counters import counted
from tests.integration.evictor_harness import (
    LIMIT,
    SIZE,
    EvictorHarness,
    body_of,
    evictor_harness,
    record_of,
)
from tests.mounting import small_file_system
from tests.waiting import eventually

HIGH, LOW = 0.9 * LIMIT, 0.5 * LIMIT


async def test_nothing_goes_below_the_high_mark_and_down_to_the_low_one_above_it(
    harness: EvictorHarness,
) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        names = [f"o{number}" for number in range(9)]
        await harness.store(*names, age=3600)
        await asyncio.sleep(0.3)
        assert len(await harness.entries()) == 9
        await harness.store("o9", age=1)

        async def down() -> bool:
            return await harness.used() <= LOW

        await eventually(down)
        assert sorted(await harness.entries()) == ["o5", "o6", "o7", "o8", "o9"]
        assert [name for name in names if harness.has(name)] == ["o5", "o6", "o7", "o8"]
        assert await harness.matches_volume()


async def test_accesses_decide_which_objects_stay(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(9)], age=3600)
        await harness.state.record_accesses([Access(ObjectId("o0"), 1, time.time())])
        await harness.store("o9")

        async def down() -> bool:
            return await harness.used() <= LOW

        await eventually(down)
        assert sorted(await harness.entries()) == ["o0", "o6", "o7", "o8", "o9"]


async def test_space_is_freed_immediately_when_a_worker_requests_it(harness: EvictorHarness) -> None:
    async with harness.evictor(interval=30.0):
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(8)], age=3600)
        large = ObjectId("large")
        wanted = 5 * SIZE
        assert not isinstance(await harness.state.begin(large, wanted, "worker-1"), Granted)
        asked = time.monotonic()
        await harness.state.request_space(large, wanted, 10.0)

        async def granted() -> bool:
            return isinstance(await harness.state.begin(large, wanted, "worker-1"), Granted)

        await eventually(granted)
        assert time.monotonic() - asked < 15, "before the next pass"
        assert not harness.has("o0")
        assert harness.has("o7")


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """Where the volume will be lies a file system of 160 KiB: some objects fewer than the limit allows."""
    root = tmp_path / "volume"
    root.mkdir()
    with small_file_system(root, "160k"):
        yield tmp_path


async def test_room_is_made_on_a_device_smaller_than_the_limit(small_device: Path) -> None:
    async with evictor_harness(small_device) as harness, harness.evictor(interval=30.0):
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(6)], age=3600)
        lease = await harness.begin_fetch("new")
        partial = harness.volume.open_partial_for_writing(record_of("new", body_of("new")))
        with pytest.raises(VolumeFull):
            partial.check_free_space()
        partial.discard()
        await harness.state.release(lease)
        await harness.state.request_space(ObjectId("new"), SIZE, 60.0)
        await eventually(lambda: harness.volume.device_space().free_bytes >= footprint(SIZE))
        partial = harness.volume.open_partial_for_writing(record_of("new", body_of("new")))
        partial.check_free_space()
        partial.close()
        assert len(await harness.entries()) == 5, "no more than was asked for"


async def test_inodes_are_a_second_limit(tmp_path: Path) -> None:
    """Objects much smaller than the limit, on a device with inodes for fifty of them: each takes two."""
    root, inodes = tmp_path / "volume", 5 + 2 * 256 + 100
    root.mkdir()
    with small_file_system(root, f"8m,nr_inodes={inodes}"):
        for place in ("objects", "records"):
            for number in SHARDS:
                (root / place / number).mkdir(parents=True)
        async with evictor_harness(tmp_path) as harness, harness.evictor():
            await eventually(harness.reconciled)
            body = b"x" * 100

            def has_inodes() -> bool:
                return (harness.volume.device_space().free_files or 0) >= 10

            for serial in range(100):
                await eventually(has_inodes)
                lease = await harness.begin_fetch(f"o{serial}", len(body))
                harness.put_file(f"o{serial}", body)
                assert await harness.state.commit(lease, time.time())
            assert await harness.used() < LIMIT // 2, "bytes were no reason to evict"
            assert harness.has("o99"), "the oldest go first"
            assert not harness.has("o0")
            await eventually(harness.matches_volume)
        assert counted("distributor_device_inodes") == inodes


async def test_a_fetch_without_inodes_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    with small_file_system(root, "8m,nr_inodes=10"):
        volume = Volume(root)
        volume.prepare()
        with pytest.raises(VolumeFull, match="no inodes for new: expected 6 free, got"):
            volume.open_partial_for_writing(record_of("new", body_of("new")))
        assert not list((root / "incoming").iterdir())
        volume.close()


class SlowDevice(Volume):
    """A device that never gives back what was removed."""

    def device_space(self) -> DeviceSpace:
        return DeviceSpace(SIZE)


async def test_a_device_that_frees_nothing_evicts_no_more_than_requested(tmp_path: Path) -> None:
    async with evictor_harness(tmp_path) as harness:
        harness.volume = SlowDevice(harness.root)
        async with harness.evictor(interval=30.0):
            await eventually(harness.reconciled)
            await harness.store(*[f"o{number}" for number in range(6)], age=3600)
            await harness.state.request_space(ObjectId("new"), 2 * SIZE, 60.0)

            async def made() -> bool:
                return len(await harness.entries()) < 6

            await eventually(made)
            await asyncio.sleep(0.3)
            assert len(await harness.entries()) == 5
        harness.volume.close()


async def test_an_object_being_sent_is_skipped_and_its_reader_finishes(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(9)], age=3600)
        sent = harness.volume.open_object(ObjectId("o0"))
        assert sent is not None
        assert sent.lock_shared()
        await harness.store("o9")

        async def down() -> bool:
            return await harness.used() <= LOW

        await eventually(down)
        assert "o0" in await harness.entries()
        assert sent.read(0, SIZE) == body_of("o0")
        sent.close()

        async def has_room() -> bool:
            return await harness.used() + footprint(SIZE) <= LIMIT

        # A skipped object is evicted first when its pause is over.
        for number in range(60):
            if not harness.has("o0"):
                break
            await eventually(has_room)
            await harness.store(f"p{number}")
            await asyncio.sleep(0.1)
        assert not harness.has("o0")
        await eventually(harness.matches_volume)


async def test_a_just_read_object_stays(harness: EvictorHarness) -> None:
    async with harness.evictor(min_idle=60.0):
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(10)], age=0)
        await asyncio.sleep(0.5)
        assert len(await harness.entries()) == 10


async def test_a_parked_fetch_keeps_what_it_holds_once_no_worker_resumes_it(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("half", LIMIT - 5000)
        harness.leave_partial("half", 1000, LIMIT - 5000)
        await harness.state.park(lease)
        await harness.state.request_space(ObjectId("new"), SIZE, 30.0)
        await asyncio.sleep(1)
        half = await harness.fetch_of("half")
        assert half is not None
        assert not half.is_shrunk, "another worker may be about to go on with it"

        async def granted() -> bool:
            return isinstance(await harness.state.begin(ObjectId("new"), SIZE, "worker-1"), Granted)

        await eventually(granted)
        half = await harness.fetch_of("half")
        assert half is not None
        assert (half.phase, half.size, half.reserved) == (FetchPhase.PARKED, LIMIT - 5000, footprint(1000))
        assert (await harness.state.usage()).reserved == footprint(SIZE) + footprint(1000)
        assert await harness.matches_volume()


async def test_a_parked_fetch_is_discarded_when_nothing_else_is_evictable(harness: EvictorHarness) -> None:
    async with harness.evictor(min_idle=3600.0):
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("half", LIMIT - 5000)
        harness.leave_partial("half", LIMIT - 6000, LIMIT - 5000)
        await harness.state.park(lease)
        await harness.state.request_space(ObjectId("new"), SIZE, 30.0)

        async def granted() -> bool:
            return isinstance(await harness.state.begin(ObjectId("new"), SIZE, "worker-1"), Granted)

        await eventually(granted)
        assert await harness.fetch_of("half") is None
        assert harness.volume.open_partial(ObjectId("half")) is None


# Partial objects among stored ones: `film` holds about as many bytes as each of eight objects, and room for one is
# missing.

FILM, HELD = ObjectId("film"), SIZE - 2000
NAMES = [f"o{number}" for number in range(8)]


async def until_there_is_room(harness: EvictorHarness, objects: int = 2) -> None:
    await harness.state.request_space(ObjectId("new"), objects * SIZE, 30.0)

    async def granted() -> bool:
        return isinstance(await harness.state.begin(ObjectId("new"), objects * SIZE, "w"), Granted)

    await eventually(granted)
    usage = await harness.state.usage()
    assert usage.used + usage.reserved <= LIMIT
    assert await harness.matches_volume()


async def store_beside_a_partial(harness: EvictorHarness, film_views: int, other_views: int) -> None:
    await eventually(harness.reconciled)
    await harness.park(FILM, HELD, 5 * SIZE)
    await harness.store(*NAMES, age=3600)
    now, viewed = time.time(), [(ObjectId(name), other_views) for name in NAMES[1:]]
    viewed.append((FILM, film_views))
    await harness.state.record_accesses([Access(known, views, now) for known, views in viewed if views])


async def test_a_partial_object_worth_less_goes_before_objects(harness: EvictorHarness) -> None:
    async with harness.evictor() as evictor:
        await store_beside_a_partial(harness, film_views=0, other_views=5)
        await harness.state.record_accesses([Access(ObjectId("o0"), 5, time.time())])
        before = counted("distributor_evictions_total", reason="partial")
        await until_there_is_room(harness)
        assert await harness.fetch_of(FILM) is None
        assert harness.volume.open_partial(FILM) is None
        assert sorted(await harness.entries()) == NAMES
        assert counted("distributor_evictions_total", reason="partial") == before + 1
        [removed] = (await evictor.report(watched=False))["removed"]
        assert (removed["id"], removed["bytes"], removed["partial"]) == (FILM, footprint(HELD), True)


async def test_an_object_worth_less_goes_before_a_partial_one(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await store_beside_a_partial(harness, film_views=5, other_views=5)
        await until_there_is_room(harness)
        assert sorted(await harness.entries()) == NAMES[1:]
        film = await harness.fetch_of(FILM)
        assert film is not None
        assert (film.phase, film.reserved) == (FetchPhase.PARKED, footprint(HELD))


@pytest.mark.parametrize("by", ["its open file", "a report"])
async def test_a_followed_partial_object_stays(harness: EvictorHarness, by: str) -> None:
    async with harness.evictor(interval=30.0):
        await store_beside_a_partial(harness, film_views=0, other_views=5)
        await harness.state.record_accesses([Access(ObjectId("o0"), 5, time.time())])
        reader = harness.volume.open_partial(FILM)
        assert reader is not None
        if by == "a report":
            reader.close()
            await harness.state.record_viewers([FILM])
        await until_there_is_room(harness)
        assert await harness.fetch_of(FILM) is not None
        assert len(await harness.entries()) == len(NAMES) - 1
        if by == "its open file":
            assert reader.read(0, HELD) == body_of(FILM, 5 * SIZE)[:HELD]
            reader.close()


async def test_a_partial_object_being_fetched_stays(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.park(FILM, HELD, 2 * SIZE)
        await harness.store(*NAMES[:6], age=3600)
        lease = await harness.begin_fetch(FILM, 2 * SIZE)
        partial = harness.begin_partial(FILM, HELD, 2 * SIZE)
        await harness.state.request_space(ObjectId("new"), 8 * SIZE, 30.0)

        async def nothing_else_left() -> bool:
            await harness.state.renew(lease)
            return not await harness.entries()

        await eventually(nothing_else_left)
        assert await harness.fetch_of(FILM) is not None
        assert partial.size == HELD
        partial.close()


async def test_views_of_a_partial_object_survive_the_leader(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await store_beside_a_partial(harness, film_views=5, other_views=5)
        await harness.state.request_space(ObjectId("none"), 1, 1.0)  # a pass, which learns of it

        async def saved() -> bool:
            film = await harness.fetch_of(FILM)
            return film is not None and film.views >= 5 and film.priority > 0

        await eventually(saved)
    async with harness.evictor():
        await until_there_is_room(harness)
        assert sorted(await harness.entries()) == NAMES[1:]
        film = await harness.fetch_of(FILM)
        assert film is not None
        assert film.views >= 5


@pytest.mark.parametrize("removed", [False, True], ids=["before its file is removed", "after"])
async def test_a_half_done_removal_of_a_partial_object_is_counted_right(
    harness: EvictorHarness, removed: bool
) -> None:
    """The leader is killed: its lease runs out."""
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.park(FILM, HELD, 5 * SIZE)
    term = await harness.term()
    lease = await harness.state.steal_lease(term, FILM)
    assert lease is not None
    if removed:
        harness.volume.discard_partial(FILM, lease.size, unless_read=True)
    assert (await harness.state.usage()).reserved == footprint(HELD)
    await harness.state.resign(term)
    async with harness.evictor(partial_keep=100.0):

        async def settled() -> bool:
            fetch, usage = await harness.fetch_of(FILM), await harness.state.usage()
            if removed:
                return fetch is None and usage.reserved == 0
            return fetch is not None and fetch.phase is FetchPhase.PARKED

        await eventually(settled)
        if not removed:
            assert (await harness.state.usage()).reserved == footprint(HELD)
            await harness.begin_fetch(FILM, 5 * SIZE)
            assert (await harness.state.usage()).reserved == footprint(5 * SIZE)
    term = await harness.term()
    assert await harness.state.recount(term) == 0


async def test_a_purged_object_is_hidden_immediately_and_counts_until_read(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", age=600)
        sent = harness.volume.open_object(ObjectId("one"))
        assert sent is not None
        assert sent.lock_shared()
        await harness.state.request_purges([ObjectId("one")])
        await eventually(lambda: harness.volume.open_object(ObjectId("one")) is None)
        await asyncio.sleep(0.3)
        assert await harness.used() == 2 * footprint(SIZE)
        assert sent.read(0, SIZE) == body_of("one")
        sent.close()

        async def freed() -> bool:
            return await harness.used() == footprint(SIZE)

        await eventually(freed)
        assert os.listdir(harness.root / "leaving") == []  # noqa: PTH208


async def test_an_object_whose_file_cannot_be_removed_does_not_stop_the_others(
    harness: EvictorHarness,
) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(9)], age=3600)
        path = harness.path_of("o0")
        path.unlink()
        path.symlink_to("/etc/hostname")
        await harness.store("o9")

        async def down() -> bool:
            return await harness.used() <= LOW

        await eventually(down)
        assert path.is_symlink()


def sample(name: str) -> float:
    return counted(f"distributor_{name}")


async def test_evictions_are_measured_and_refetches_noticed(harness: EvictorHarness) -> None:
    names = (
        "evicted_object_idle_seconds_count",
        "evicted_object_size_bytes_count",
        "evicted_object_size_bytes_sum",
        "refetched_after_eviction_total",
    )
    before, idle = {name: sample(name) for name in names}, sample("evicted_object_idle_seconds_sum")
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store(*[f"o{number}" for number in range(9)], age=3600)
        await harness.store("o9", age=1)

        async def down() -> bool:
            return await harness.used() <= LOW

        await eventually(down)  # o0 to o4 are gone
        await eventually(
            lambda: sample("evicted_object_size_bytes_count") == before["evicted_object_size_bytes_count"] + 5
        )
        assert {name: sample(name) - before[name] for name in names} == {
            "evicted_object_idle_seconds_count": 5,
            "evicted_object_size_bytes_count": 5,
            "evicted_object_size_bytes_sum": 5 * SIZE,
            "refetched_after_eviction_total": 0,
        }
        expected = sum(3600 - 60 * number for number in range(5))
        assert sample("evicted_object_idle_seconds_sum") - idle == pytest.approx(expected, abs=60)
        await harness.store("o0")
        await eventually(
            lambda: sample("refetched_after_eviction_total") == before["refetched_after_eviction_total"] + 1
        )


async def test_one_event_per_pass_says_what_was_evicted_and_why(harness: EvictorHarness) -> None:
    with capture_logs() as logs:
        async with harness.evictor(cost_per_miss="64M"):
            await eventually(harness.reconciled)
            await harness.store(*[f"o{number}" for number in range(8)], age=36_000)
            large = SIZE + 5000
            lease = await harness.begin_fetch("large", large)
            harness.put_file("large", body_of("large", large), changed_at=time.time() - 40_000)
            assert await harness.state.commit(lease, time.time() - 40_000)

            async def down() -> bool:
                return await harness.used() <= LOW

            await eventually(down)
            await eventually(lambda: any(event["event"] == "object_evicted" for event in logs))
            # Nothing else is requested: there is one pass only
            left = set(await harness.entries())
    [event] = [event for event in logs if event["event"] == "object_evicted"]
    removed = [event for event in logs if event["event"] == "object_removed"]
    assert event["log_level"] == "info"
    assert {event["log_level"] for event in removed} == {"debug"}
    assert (event["policy"], event["evicted"], event["skipped"]) == ("gdsf", 9 - len(left), 0)
    assert event["bytes"] == sum(removal["bytes"] for removal in removed)
    assert len(removed) == event["evicted"]
    by_id = {removal["object_id"]: removal for removal in removed}
    assert set(by_id) == {"large", *(f"o{number}" for number in range(8))} - left
    largest = event["largest"]
    assert [victim["object_id"] for victim in largest][:1] == ["large"]
    assert len(largest) == min(5, event["evicted"])
    for victim in largest:
        removal = by_id[victim["object_id"]]
        assert {name: removal[name] for name in victim} == victim
        assert victim["reason"] == "high_watermark"
        assert (victim["views"], victim["inflation"]) == (1, 0.0)
        assert victim["priority"] == pytest.approx(
            NO_BASIS.first_weight * 2**20 * (1 / victim["size"] + 1 / (64 * 2**20)), abs=1e-6
        )
    assert largest[0]["idle_seconds"] == pytest.approx(40_000, abs=60)
    assert largest[0]["size"] == large


@pytest.mark.parametrize("policy", ["lru", "lru-sp"])
async def test_victims_of_a_request_are_logged_with_that_reason(harness: EvictorHarness, policy: str) -> None:
    with capture_logs() as logs:
        async with harness.evictor(policy=policy):
            await eventually(harness.reconciled)
            await harness.store(*[f"o{number}" for number in range(8)], age=36_000)
            await harness.state.request_space(ObjectId("new"), 5 * SIZE, 60.0)
            await eventually(lambda: any(event["event"] == "object_evicted" for event in logs))
    events = [event for event in logs if event["event"] == "object_evicted"]
    victims = [victim for event in events for victim in event["largest"]]
    assert victims
    assert {event["policy"] for event in events} == {policy}
    assert {victim["reason"] for victim in victims} == {"space_requested"}
    assert {(victim["priority"], victim["inflation"]) for victim in victims} == {(None, None)}


async def test_a_pass_that_evicts_nothing_logs_no_event(harness: EvictorHarness) -> None:
    with capture_logs() as logs:
        async with harness.evictor(min_idle=60.0):
            await eventually(harness.reconciled)
            await harness.store(*[f"o{number}" for number in range(10)], age=0)
            await eventually(lambda: any(event["event"] == "eviction_blocked" for event in logs))
            await harness.state.request_purges([ObjectId("o0")])
            await eventually(lambda: not harness.has("o0"))
            await eventually(lambda: any(event["event"] == "object_removed" for event in logs))
    assert [event for event in logs if event["event"] == "object_evicted"] == []
    [removal] = [event for event in logs if event["event"] == "object_removed"]
    assert removal["reason"] == "purged"


async def test_a_leader_reports_what_it_has_removed_and_why(harness: EvictorHarness) -> None:
    async with harness.evictor() as evictor:
        await eventually(harness.reconciled)
        await harness.store(*(f"o{number}" for number in range(10)), age=3600)

        async def removed() -> dict[str, str]:
            return {one["id"]: one["reason"] for one in (await evictor.report(watched=False))["removed"]}

        await eventually(removed)
        await harness.state.request_purges([ObjectId("o9")])

        async def purged() -> bool:
            return (await removed()).get("o9") == "purged"

        await eventually(purged)
        report = await evictor.report(watched=True)
        assert report["leads"]
        assert (await removed())["o0"] == "high_watermark"
        assert report["removed"][0] | {"at": 0} == {
            "id": "o0", "at": 0, "bytes": footprint(SIZE), "size": SIZE, "views": 1, "reason": "high_watermark",
        } | {name: report["removed"][0][name] for name in ("idle_seconds", "priority", "inflation")}  # fmt: skip
        assert sum(objects for objects, _ in report["map"]["cells"]) == len(await harness.entries())


async def removed_paths(evictor: Evictor) -> dict[str, str | None]:
    """Of what the evictor tells that it has removed."""
    return {one["id"]: one.get("path") for one in (await evictor.report(watched=False))["removed"]}


async def test_what_was_removed_is_told_by_the_path_that_its_id_is_the_digest_of(
    harness: EvictorHarness,
) -> None:
    films = [ObjectId.parse_path(f"films/{number}.mp4") for number in range(9)]
    async with harness.evictor() as evictor:
        await eventually(harness.reconciled)
        await harness.store(*films, "plain", age=3600)

        async def removed(count: int) -> bool:
            return len(await removed_paths(evictor)) >= count

        await eventually(lambda: removed(5))
        purged, read = films[7:]
        sent = harness.volume.open_object(read)
        assert sent is not None
        assert sent.lock_shared()
        await harness.state.request_purges([purged, read, ObjectId("plain")])
        await eventually(lambda: removed(8))
        sent.close()
        paths = await removed_paths(evictor)
        assert paths == {film: film.path for film in (*films[:5], purged, read)} | {"plain": None}


async def test_a_removed_partial_object_is_told_by_its_path(harness: EvictorHarness) -> None:
    film = ObjectId.parse_path("films/a.mp4")
    async with harness.evictor() as evictor:
        await eventually(harness.reconciled)
        await harness.park(film, HELD, 5 * SIZE)
        await harness.store(*NAMES, age=3600)
        await harness.state.record_accesses([Access(ObjectId(name), 5, time.time()) for name in NAMES])
        await until_there_is_room(harness)
        assert await removed_paths(evictor) == {film: film.path}


async def test_a_pass_reads_all_fetches_once(
    harness: EvictorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that finds nothing but partial objects to evict. There may be thousands of them."""
    state, calls, fetches = harness.state, 0, harness.state.fetches

    async def counted_fetches() -> Sequence[Fetch]:
        nonlocal calls
        calls += 1
        return await fetches()

    term = await reconciled_term(harness)
    await harness.park("half", 1000, LIMIT - 5000)
    await state.request_space(ObjectId("new"), LIMIT - footprint(500), 30.0)
    monkeypatch.setattr(state, "fetches", counted_fetches)
    await run_pass(harness, term)
    assert await harness.fetch_of("half") is None
    assert calls == 1


# Requests that cannot be met now. MIN_IDLE keeps what was stored just now.

MIN_IDLE = 60.0
IDLE = ["i0", "i1"]


async def reconciled_term(harness: EvictorHarness) -> Term:
    term = await harness.term()
    await harness.state.set_reconciled(term)
    return term


async def run_pass(harness: EvictorHarness, term: Term) -> list[str]:
    """One pass. Returns the complete objects that are left."""
    state, volume = harness.state, harness.volume
    index = EvictionIndex(state, volume, lambda: make_policy("gdsf"))
    await index.load()
    reaper = PartialReaper(state, volume, Adoption(state, volume, index), index, keep=3600.0, space_wait=10.0)
    rules = EvictionRules(Watermarks(low=LIMIT // 2, high=LIMIT * 9 // 10), MIN_IDLE)
    eviction = Eviction(state, index, ObjectRemover(state, volume, index), reaper, rules)
    await eviction.run(term, await state.usage(), DeviceSpace(free_bytes=10 * LIMIT))
    return sorted(await harness.entries())


async def store_idle_and_others(harness: EvictorHarness, others: int) -> list[str]:
    """Two objects that may be evicted, and others that may not. Returns all of their names."""
    names = [f"n{number}" for number in range(others)]
    await harness.store(*IDLE, age=3600)
    await harness.store(*names)
    return [*IDLE, *names]


async def test_nothing_is_evicted_for_a_request_that_cannot_be_met(harness: EvictorHarness) -> None:
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 6)
    await harness.state.request_space(ObjectId("large"), 5 * SIZE, 30.0)
    with capture_logs() as logs:
        assert await run_pass(harness, term) == names
    [blocked] = [event for event in logs if event["event"] == "eviction_blocked"]
    assert blocked["missing_bytes"] == footprint(5 * SIZE) - 4 * footprint(SIZE)  # two are free, two are idle


async def test_nothing_is_evicted_where_running_downloads_have_the_room(harness: EvictorHarness) -> None:
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 0)
    lease = await harness.begin_fetch("running", 6 * SIZE)
    await harness.state.request_space(ObjectId("large"), 5 * SIZE, 30.0)
    assert await harness.state.renew(lease)
    assert await run_pass(harness, term) == names


async def test_what_can_be_met_is_met_beside_what_cannot(harness: EvictorHarness) -> None:
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 6)
    await harness.state.request_space(ObjectId("large"), 5 * SIZE, 30.0)
    await harness.state.request_space(ObjectId("small"), SIZE + 1, 30.0)
    await harness.state.request_space(ObjectId("second"), SIZE, 30.0)
    with capture_logs() as logs:
        assert await run_pass(harness, term) == names[1:]
    assert [event["event"] for event in logs if event["event"] == "eviction_blocked"]
    await harness.begin_fetch("small", SIZE + 1)
    await harness.begin_fetch("second")


async def test_the_request_is_met_when_more_objects_are_idle(harness: EvictorHarness) -> None:
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 5)
    await harness.state.request_space(ObjectId("large"), 6 * SIZE, 30.0)
    assert await run_pass(harness, term) == names
    await harness.store("i2", age=3600)
    assert await run_pass(harness, term) == [*IDLE, "i2", *names[2:]]
    await harness.state.request_space(ObjectId("large"), 5 * SIZE - 5000, 30.0)
    assert await run_pass(harness, term) == names[2:]
    await harness.begin_fetch("large", 5 * SIZE - 5000)


async def test_the_low_mark_is_reached_whatever_is_requested(harness: EvictorHarness) -> None:
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 8)
    await harness.state.request_space(ObjectId("large"), 5 * SIZE, 30.0)
    assert await run_pass(harness, term) == names[2:]


@pytest.mark.parametrize("spare", [0, 2 * SIZE])
async def test_objects_make_room_together_with_paused_downloads(harness: EvictorHarness, spare: int) -> None:
    """Workers wait with them until the evictor has done its part."""
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 0)
    lease = await harness.begin_fetch("paused", 6 * SIZE)
    await harness.state.report_worker(WorkerReport("w", 8, 0, 1, 0.0, spare=spare), 30.0)
    await harness.state.request_space(ObjectId("large"), 6 * SIZE, 30.0)
    assert await harness.state.renew(lease)
    assert await run_pass(harness, term) == ([] if spare else names)


@pytest.mark.parametrize("is_read", [False, True])
async def test_objects_make_room_together_with_a_partial_object(
    harness: EvictorHarness, is_read: bool
) -> None:
    """It was viewed a short time ago, and goes as the last resort, unless a client has it open."""
    term = await reconciled_term(harness)
    names = await store_idle_and_others(harness, 3)
    await harness.park(FILM, HELD, 5 * SIZE)
    await harness.state.record_accesses([Access(FILM, 1, time.time())])
    reader = harness.volume.open_partial(FILM) if is_read else None
    await harness.state.request_space(ObjectId("large"), 6 * SIZE + 8000, 30.0)
    left = await run_pass(harness, term)
    if reader is None:
        assert left == names[2:]
        assert await harness.fetch_of(FILM) is None
        await harness.begin_fetch("large", 6 * SIZE + 8000)
    else:
        assert left == names
        reader.close()
