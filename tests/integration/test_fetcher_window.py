"""A fetch of a large object reads a little ahead of its viewers, pauses, ends without them, and is completed later."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent
from distributor_node.services.fetcher import side_streams
from distributor_node.services.fetcher.download import FetchLimits
from distributor_node.services.fetcher.scheduler import (
    EVICTION_TIME,
    MIN_STAY,
    JobScheduler,
    Slot,
    SlotLimits,
)
from distributor_node.services.fetcher.side_streams import SideStreamPlaces
from distributor_node.services.fetcher.window import WindowLimits
from distributor_node.shared.domain.jobs import Ack, JobOutcome, Retry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Followed, Followers, Viewer, footprint
from distributor_node.shared.ports.state_store import FetchPhase, Granted, NoSpace
from tests.integration.fetcher_harness import OBJECT_ID, Harness, fetcher_harness
from tests.waiting import eventually

MIB = 1024 * 1024
SIZE = 24 * MIB + 17
DATA = GeneratedContent(8, SIZE).read(0, SIZE)
WINDOW = 2 * MIB
SLACK = MIB
"""What is read at once, and is written before a stream waits. The kernel holds more of each connection."""
RATE = Fault(bytes_per_second=40 * MIB)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with fetcher_harness(tmp_path / "volume", [DATA], lease=6.0) as ready:
        ready.nodes[0].faults.add(RATE)
        yield ready


def start(
    harness: Harness,
    *,
    viewer_timeout: float = 60.0,
    above: int = 0,
    slot: Slot | None = None,
    warming: bool = False,
    places: int = 8,
    spare_time: bool = False,
) -> asyncio.Task[JobOutcome]:
    async def has_spare_time(_: Slot | None) -> bool:
        return spare_time

    window = WindowLimits(WINDOW, above, 4 * MIB, viewer_timeout, has_spare_time)
    worker = harness.worker(FetchLimits(side_streams=SideStreamPlaces(places), window=window))
    job = replace(harness.job(harness.wanted(DATA)), low_priority=warming)
    return asyncio.create_task(worker.handle(job, slot))


class Viewers:
    """One API process. It tells where its viewers are, again and again."""

    def __init__(self, harness: Harness, *viewers: Viewer) -> None:
        self._harness, self.viewers, self._requested = harness, list(viewers), True

    async def run(self) -> None:
        while True:
            followed = Followed(OBJECT_ID, tuple(self.viewers), requested=self._requested)
            await self._harness.state.record_followers("api-1", [followed])
            self._requested = False
            await asyncio.sleep(0.02)

    def at(self, *positions: int) -> None:
        self.viewers = [Viewer(0, position) for position in positions]


@contextmanager
def viewers(harness: Harness, *positions: int) -> Iterator[Viewers]:
    one = Viewers(harness, *(Viewer(0, position) for position in positions))
    telling = asyncio.create_task(one.run())
    try:
        yield one
    finally:
        telling.cancel()


async def claim(harness: Harness) -> None:
    """As a request does. Viewers are told of from now on."""
    assert (await harness.state.claim(OBJECT_ID, "api-1")).won


def sent(harness: Harness) -> int:
    return sum(record.bytes_sent for record in harness.nodes[0].requests)


def ranges(harness: Harness) -> list[str | None]:
    return [record.range for record in harness.nodes[0].requests]


async def phase(harness: Harness) -> FetchPhase | None:
    fetch = (await harness.state.find(OBJECT_ID)).fetch
    return None if fetch is None else fetch.phase


async def until_still(harness: Harness) -> int:
    """Return how many bytes the source has sent once it sends no more."""
    before = -1
    while before != sent(harness) or not before:
        before = sent(harness)
        await asyncio.sleep(0.4)
    return before


async def test_it_follows_its_viewer_on_one_connection(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, 0) as viewer:
        fetching = start(harness)
        assert await until_still(harness) < SIZE
        assert WINDOW <= (harness.partial_size() or 0) <= WINDOW + SLACK
        for position in (MIB, 2 * MIB, 5 * MIB, 9 * MIB):
            viewer.at(position)
            await harness.until_partial(position + WINDOW)
            assert (harness.partial_size() or 0) <= position + WINDOW + SLACK
        assert not fetching.done()
        viewer.at(SIZE * 4 // 5 + 1)
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    assert ranges(harness) == [None]


async def test_its_first_request_does_not_wait_until_its_viewers_are_known(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = harness.state.followers

    async def is_asked() -> bool:
        return bool(harness.nodes[0].requests)

    async def followers(object_id: ObjectId) -> Followers:
        await eventually(is_asked)
        return await known(object_id)

    monkeypatch.setattr(harness.state, "followers", followers)
    await claim(harness)
    with viewers(harness, SIZE - MIB):
        assert await start(harness) == Ack("fetched")


async def test_it_reads_one_window_until_its_viewers_are_known(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, answers = harness.state.followers, asyncio.Event()

    async def followers(object_id: ObjectId) -> Followers:
        await answers.wait()
        return await known(object_id)

    monkeypatch.setattr(harness.state, "followers", followers)
    await claim(harness)
    with viewers(harness, SIZE - MIB):
        fetching = start(harness)
        assert await until_still(harness) < SIZE
        assert WINDOW <= (harness.partial_size() or 0) <= WINDOW + SLACK
        answers.set()
        assert await fetching == Ack("fetched")


async def test_without_viewers_it_ends_and_keeps_what_it_has(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, MIB) as viewer:
        fetching = start(harness, viewer_timeout=0.5)
        await harness.until_partial(MIB + WINDOW)
        await asyncio.sleep(1.0)
        assert not fetching.done()  # it has a viewer
        viewer.viewers = []
        assert await fetching == Ack("paused")
    status = await harness.state.find(OBJECT_ID)
    assert status.failure is None
    assert status.fetch is not None
    assert (status.fetch.phase, status.fetch.size) == (FetchPhase.PARKED, SIZE)
    held = harness.partial_size() or 0
    assert (await harness.state.usage()).reserved == footprint(held)
    assert held >= MIB + WINDOW
    assert harness.nodes[0].requests[0].finished
    reader = harness.volume.open_partial(OBJECT_ID)
    assert reader is not None
    assert reader.read(0, held) == DATA[:held]
    reader.close()


async def test_it_is_continued_where_it_ended_and_not_before_a_viewer_comes_near(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, 3 * MIB) as viewer:
        fetching = start(harness, viewer_timeout=0.3)
        await harness.until_partial(3 * MIB + WINDOW)
        viewer.viewers = []
        assert await fetching == Ack("paused")
        held = harness.partial_size() or 0
        await claim(harness)
        viewer.at(0)
        fetching = start(harness)
        await asyncio.sleep(1.0)
        assert ranges(harness) == [None]  # there is enough in front of the viewer
        viewer.at(held - WINDOW + 1)
        await eventually(lambda: len(ranges(harness)) == 2)
        assert ranges(harness)[1] == f"bytes={held}-{SIZE - 1}"
        viewer.at(SIZE - 1)
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA


async def test_a_second_view_completes_it_although_it_ends_at_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributor_node.shared.adapters.state_memory.tables.VIEW_WINDOW", 0.0)
    await claim(harness)
    with viewers(harness, 0) as viewer:
        fetching = start(harness)
        for position in (WINDOW, 2 * WINDOW, SIZE // 5 + 1):
            await harness.until_partial(position)
            viewer.at(position)
        await harness.until_partial(SIZE // 5 + WINDOW)
        await harness.state.record_followers("api-2", [Followed(OBJECT_ID, requested=True)])
        await harness.until_partial(SIZE // 5 + WINDOW + 2 * MIB)
        viewer.viewers = []
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA


async def test_what_is_warmed_or_ordered_is_fetched_whole(harness: Harness) -> None:
    assert await start(harness, warming=True, viewer_timeout=0.1) == Ack("fetched")
    assert harness.stored() == DATA


async def test_a_fetch_that_waits_is_completed_by_an_order(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, 0):
        fetching = start(harness)
        await until_still(harness)
        await harness.state.order_whole(OBJECT_ID)
        assert await fetching == Ack("fetched")


@pytest.mark.parametrize("told", [True, False])
async def test_clients_of_a_process_that_does_not_tell_where_they_are_get_all(
    harness: Harness, told: bool
) -> None:
    """An API process of the version before, alone or beside one that tells."""
    await claim(harness)

    async def view() -> None:
        while True:
            await harness.state.record_viewers([OBJECT_ID])
            await asyncio.sleep(0.05)

    viewing = asyncio.create_task(view())
    if told:
        with viewers(harness, 0):
            assert await start(harness) == Ack("fetched")
    else:
        assert await start(harness) == Ack("fetched")
    viewing.cancel()
    assert harness.stored() == DATA


async def test_spare_time_completes_it(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, 0):
        assert await start(harness, spare_time=True) == Ack("fetched")


async def test_small_objects_are_fetched_whole(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, 0):
        assert await start(harness, above=SIZE) == Ack("fetched")


async def test_a_viewer_that_jumps_gets_a_window_of_its_own(harness: Harness) -> None:
    await claim(harness)
    far = 15 * MIB
    with viewers(harness, 0) as viewer:
        fetching = start(harness)
        await harness.until_partial(WINDOW)
        viewer.viewers = [Viewer(far, far)]
        await harness.state.record_wanted(OBJECT_ID, [far])
        await eventually(lambda: len(ranges(harness)) == 2)
        reader = harness.volume.open_partial(OBJECT_ID)
        assert reader is not None
        await eventually(lambda: reader.state().end_from(far) >= far + WINDOW)
        await until_still(harness)
        state = reader.state()
        assert state.end_from(far) <= far + WINDOW + SLACK
        assert state.size <= WINDOW + SLACK
        reader.close()
        assert not fetching.done()
        viewer.at(SIZE - 1)
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA


async def test_a_side_stream_without_viewers_ends(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_streams, "_UNUSED_AFTER", 0.2)
    await claim(harness)
    far = 15 * MIB
    with viewers(harness, 0) as viewer:
        fetching = start(harness)
        await harness.until_partial(WINDOW)
        viewer.viewers = [Viewer(0, 0), Viewer(far, far)]
        await harness.state.record_wanted(OBJECT_ID, [far])
        await eventually(lambda: len(ranges(harness)) == 2)
        viewer.at(0)
        await eventually(lambda: harness.nodes[0].requests[1].finished)
        assert not harness.nodes[0].requests[0].finished
        assert not fetching.done()
        fetching.cancel()
        await fetching


async def test_a_source_that_closes_while_we_pause_is_asked_again_and_not_blamed(harness: Harness) -> None:
    harness.nodes[0].faults.clear()
    harness.nodes[0].faults.add(Fault(cut_after=9 * MIB, bytes_per_second=40 * MIB), Match(first=1))
    harness.nodes[0].faults.add(RATE)
    await claim(harness)
    with viewers(harness, 0) as viewer:
        fetching = start(harness)
        await harness.until_partial(WINDOW)
        await asyncio.sleep(0.5)
        position = 0
        while not fetching.done():
            position += MIB // 4
            viewer.at(position)
            await asyncio.sleep(0.05)
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    first, second = ranges(harness)
    assert (first, second) == (None, f"bytes={9 * MIB}-{SIZE - 1}")
    assert not harness.failover_reader.health.is_penalised(harness.sources[0])


async def test_a_paused_download_has_no_slot(harness: Harness) -> None:
    counts: Counter[str] = Counter()
    changes: list[bool] = []
    slot = Slot(counts, harness.sources[0], lambda one: changes.append(one.paused))
    await claim(harness)
    with viewers(harness, 0) as viewer:
        fetching = start(harness, slot=slot)
        await eventually(lambda: slot.paused)
        assert not counts
        position = 0
        while not fetching.done():
            position += MIB
            viewer.at(position)
            await asyncio.sleep(0.02)
        assert await fetching == Ack("fetched")
    assert not slot.paused
    assert changes[:2] == [True, False]
    assert sum(counts.values()) == 1


async def test_a_download_whose_place_is_needed_ends_with_viewers(harness: Harness) -> None:
    slot = Slot(Counter(), harness.sources[0])
    await claim(harness)
    with viewers(harness, 0):
        fetching = start(harness, slot=slot)
        await eventually(lambda: slot.paused)
        slot.is_displaced = True
        assert await fetching == Ack("paused")
    assert await phase(harness) is FetchPhase.PARKED


async def test_a_paused_download_gives_its_room_to_another_object_and_is_continued_later(
    tmp_path: Path,
) -> None:
    now, other, other_size = 0.0, ObjectId.parse("8"), 16 * MIB
    limit = footprint(SIZE) + 4 * MIB
    async with fetcher_harness(tmp_path / "volume", [DATA], lease=6.0, limit=limit) as harness:
        harness.nodes[0].faults.add(RATE)
        scheduler = JobScheduler(
            harness.state, "worker-0", SlotLimits(1, 1), lambda wanted: wanted.sources, lambda: now
        )
        await claim(harness)
        with viewers(harness, MIB) as viewer:
            async with scheduler.slot(harness.job(harness.wanted(DATA))) as slot:
                assert isinstance(slot, Slot)
                fetching = start(harness, slot=slot)
                await eventually(lambda: slot.paused)
                assert isinstance(await harness.state.begin(other, other_size, "other"), NoSpace)
                await harness.state.request_space(other, other_size, 60.0)
                for seconds in (MIN_STAY, EVICTION_TIME):
                    now += seconds
                    await scheduler.tick()
                assert await fetching == Ack("paused")
            held = harness.partial_size() or 0
            assert held >= MIB + WINDOW
            granted = await harness.state.begin(other, other_size, "other")
            assert isinstance(granted, Granted)
            assert (await harness.state.usage()).reserved == footprint(held) + footprint(other_size)
            assert isinstance(await start(harness), Retry)  # there is no room to go on now
            assert harness.partial_size() == held
            await harness.state.release(granted.lease)
            viewer.at(SIZE - 1)
            assert await start(harness) == Ack("fetched")
        assert harness.stored() == DATA
        assert ranges(harness) == [None, f"bytes={held}-{SIZE - 1}"]


async def test_stopped_while_it_waits_it_is_resumed(harness: Harness) -> None:
    await claim(harness)
    with viewers(harness, 0) as viewer:
        fetching = start(harness)
        await until_still(harness)
        fetching.cancel()
        await fetching
        held = harness.partial_size() or 0
        assert held >= WINDOW
        viewer.at(SIZE - 1)
        assert await start(harness) == Ack("fetched")
    assert ranges(harness) == [None, f"bytes={held}-{SIZE - 1}"]
    assert harness.stored() == DATA
