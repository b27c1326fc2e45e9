from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.api.accesses import MAX_FOLLOWERS, AccessCounter, Viewers
from distributor_node.services.api.fetch_capacity import FetchEvents
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import PartialFile, Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.space import VIEW_WINDOW, Followed, Followers, Viewer
from distributor_node.shared.ports.state_store import Access, Announcement, Topic
from distributor_node.shared.waiting import background
from tests.counters import counted
from tests.waiting import eventually

ONE, TWO, THREE = ObjectId("1"), ObjectId("2"), ObjectId("3")


class FlakyStore(MemoryStateStore):
    """A store that can be away."""

    down = hangs = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked = asyncio.Event()

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        self.asked.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.down:
            raise StateStoreUnavailable("away")
        await super().record_accesses(accesses)


def make_store() -> FlakyStore:
    return FlakyStore(1000, StateTimeouts(), time.time)


async def recorded(store: FlakyStore) -> Sequence[Access]:
    return (await store.read_accesses("", 100))[1]


async def test_ranges_of_one_player_are_one_view() -> None:
    store, now = make_store(), 1000.0
    counter = AccessCounter(store, lambda: now)
    for _ in range(30):
        counter.record_request(ONE)
        now += 5
    counter.touch(ONE)
    await counter.flush()
    assert list(await recorded(store)) == [Access(ONE, 1, now)]
    now += VIEW_WINDOW
    counter.record_request(ONE)
    await counter.flush()
    assert (await recorded(store))[-1] == Access(ONE, 1, now)


async def test_store_down_keeps_the_latest() -> None:
    store = make_store()
    store.down = True
    counter = AccessCounter(store, lambda: 5.0, max_pending=2)
    for object_id in (ONE, TWO):
        counter.record_request(object_id)
    await counter.flush()
    counter.record_request(THREE)
    await counter.flush()
    store.down = False
    await counter.flush()
    assert [access.object_id for access in await recorded(store)] == [TWO, THREE]


async def test_a_cancelled_flush_loses_nothing() -> None:
    store = make_store()
    store.hangs = True
    counter = AccessCounter(store, lambda: 5.0)
    counter.record_request(ONE)
    running = asyncio.create_task(counter.run(interval=0))
    await store.asked.wait()
    counter.record_request(TWO)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    store.hangs = False
    await counter.close()
    assert [(access.object_id, access.views) for access in await recorded(store)] == [(ONE, 1), (TWO, 1)]


@pytest.mark.parametrize("trouble", ["down", "hangs"])
async def test_accesses_that_cannot_be_flushed_at_the_end_are_counted_as_dropped(trouble: str) -> None:
    store = make_store()
    setattr(store, trouble, True)
    counter = AccessCounter(store, lambda: 5.0)
    for object_id in (ONE, TWO, ONE):
        counter.record_request(object_id)
    before = lost()
    await counter.close(timeout=0.05)
    assert lost() - before == 2


def lost() -> float:
    return counted("distributor_dropped_accesses_total")


async def test_waiters_are_woken_by_their_object_alone() -> None:
    store = make_store()
    fetch_events = FetchEvents(store)
    listener = asyncio.create_task(fetch_events.run())
    try:
        async with asyncio.timeout(60):
            # The listener greets with a wake-up for everybody.
            await fetch_events.wait(TWO, 60)
            woken = asyncio.create_task(fetch_events.wait(ONE, 60))
            other = asyncio.create_task(fetch_events.wait(TWO, 60))
            await asyncio.sleep(0)
            await store.announce(Announcement(Topic.FETCH_CHANGED, ONE))
            await woken
        assert not other.done()
        other.cancel()
        await asyncio.wait({other})
        await fetch_events.wait(THREE, 0.01)
        assert fetch_events.waiting == 0
    finally:
        listener.cancel()
        await asyncio.wait({listener})


@pytest.mark.parametrize("change", [PartialFile.wake_followers, PartialFile.mark_verified])
async def test_first_bytes_and_a_verified_file_wake_waiters_without_an_announcement(
    tmp_path: Path, change: Callable[[PartialFile], None]
) -> None:
    volume = Volume(tmp_path)
    volume.prepare()
    fetch_events = FetchEvents(make_store(), volume=volume)
    listener = asyncio.create_task(fetch_events.run())
    record = StoredRecord(ONE, 5, '"a"', None, "text/plain", 1)
    try:
        async with asyncio.timeout(60):
            await fetch_events.wait(TWO, 60)  # the listener's greeting
            woken = asyncio.create_task(fetch_events.wait(ONE, 60))
            other = asyncio.create_task(fetch_events.wait(TWO, 60))
            await asyncio.sleep(0)
            partial = volume.open_partial_for_writing(record)
            partial.write(0, b"bytes")
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert not woken.done()  # nothing to look at yet
            change(partial)
            assert await woken
        assert not other.done()
        other.cancel()
        await asyncio.wait({other})
        partial.close()
    finally:
        listener.cancel()
        await asyncio.wait({listener})
        volume.close()


async def test_the_partial_files_of_a_volume_that_is_mounted_later_are_watched(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "volume")
    volume.prepare()
    fetch_events = FetchEvents(make_store(), volume=volume)
    listener = asyncio.create_task(fetch_events.run())
    try:
        async with asyncio.timeout(60):
            await fetch_events.wait(TWO, 60)
            volume.root.rename(tmp_path / "before")
            later = Volume(volume.root)
            later.prepare()
            volume.check()
            woken = asyncio.create_task(fetch_events.wait(ONE, 60))
            await asyncio.sleep(0)
            partial = later.open_partial_for_writing(StoredRecord(ONE, 5, '"a"', None, "text/plain", 1))
            partial.mark_verified()
            assert await woken
        partial.close()
        later.close()
    finally:
        listener.cancel()
        await asyncio.wait({listener})
        volume.close()


MIB = 1024 * 1024
WINDOW = 8 * MIB


class ReportedStore(MemoryStateStore):
    """One that keeps what was reported."""

    def __init__(self) -> None:
        super().__init__(1000, StateTimeouts(), time.time)
        self.reports: list[Followed] = []
        self.down = False

    async def record_followers(self, process: str, followed: Sequence[Followed]) -> None:
        if self.down:
            raise StateStoreUnavailable("away")
        self.reports += followed
        await super().record_followers(process, followed)


class TestFollowers:
    async def test_where_a_viewer_is_counts_while_it_follows(self) -> None:
        store, position = ReportedStore(), 5
        await store.claim(ONE, "api-1")
        viewers = Viewers(store, WINDOW)
        with viewers.viewing(ONE, lambda: position), viewers.requesting(ONE, 3, lambda: position) as one:
            await viewers.report()
            assert await store.followers(ONE) == Followers((), views=1, told=True)
            viewers.follow(one)
            await viewers.report()
            position = 9
            await viewers.report()
            assert (await store.followers(ONE)).viewers == (Viewer(3, 9),)
        await viewers.report()
        assert await store.followers(ONE) == Followers((), views=1, told=True)
        assert [report.requested for report in store.reports] == [True, False, False, False]
        await viewers.report()
        assert len(store.reports) == 4  # nothing is left to tell

    async def test_a_request_and_news_of_its_viewer_are_told_at_once(self) -> None:
        store, position = ReportedStore(), 0
        viewers = Viewers(store, WINDOW)
        async with background(viewers.run(), "viewers"):
            with viewers.requesting(ONE, 0, lambda: position) as one:
                viewers.follow(one)
                await eventually(lambda: Followed(ONE, (Viewer(0, 0),), requested=True) in store.reports)
                before = len(store.reports)
                while position < 6 * MIB:
                    position += 64 * 1024
                    viewers.come_near(one)
                    await asyncio.sleep(0)
                await eventually(lambda: len(store.reports) > before)
                viewers.come_near(one)
                told = len(store.reports) - before
                assert told <= 4  # not for each piece that was sent
                assert store.reports[-1].viewers[0].position >= 2 * MIB

    async def test_viewers_at_one_place_are_one_and_at_too_many_are_unknown(self) -> None:
        store = ReportedStore()
        await store.claim(ONE, "api-1")
        viewers = Viewers(store, WINDOW)

        def follow(position: int) -> None:
            one = viewers.requesting(ONE, 0, lambda: position)
            opened.append(one)
            viewers.follow(one.__enter__())

        opened: list[Any] = []
        for number in range(3 * MAX_FOLLOWERS):
            follow(100 + number)
        await viewers.report()
        assert (await store.followers(ONE)).viewers == (Viewer(0, 99 + 3 * MAX_FOLLOWERS),)
        await asyncio.sleep(0.002)
        for number in range(MAX_FOLLOWERS + 1):
            follow(number * 3 * MIB)
        await viewers.report()
        assert (await store.followers(ONE)).untold
        for one in opened:
            one.__exit__(None, None, None)

    async def test_a_viewer_that_leaves_while_its_news_is_told_is_not_one_of_unknown_place(self) -> None:
        """Otherwise its fetch would read on without a limit until that is forgotten."""
        store = ReportedStore()
        await store.claim(ONE, "api-1")
        viewers = Viewers(store, WINDOW)
        async with background(viewers.run(), "viewers"):
            with viewers.viewing(ONE, lambda: 0), viewers.requesting(ONE, 0, lambda: 0) as one:
                viewers.follow(one)
            await eventually(lambda: store.reports)
        await viewers.report()
        assert await store.followers(ONE) == Followers((), views=1, told=True)

    async def test_a_request_that_could_not_be_told_is_told_later(self) -> None:
        store = ReportedStore()
        viewers = Viewers(store, WINDOW)
        store.down = True
        with viewers.requesting(ONE, 0, lambda: 0):
            await viewers.report()
        store.down = False
        await viewers.report()
        assert store.reports == [Followed(ONE, requested=True)]
