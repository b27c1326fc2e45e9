"""A fetch with side streams: each byte is read once, whatever the order in which viewers want them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.fetcher.download import FetchLimits
from distributor_node.services.fetcher.side_streams import SideStreamPlaces
from distributor_node.shared.adapters.volume import PartialState
from distributor_node.shared.domain.extents import BLOCK, Extents
from distributor_node.shared.domain.jobs import Ack, JobOutcome, Retry
from distributor_node.shared.ports.state_store import Granted
from tests.integration.fetcher_harness import OBJECT_ID, Harness, fetcher_harness
from tests.waiting import eventually

MIB = 1024 * 1024
SIZE = 12 * MIB + 17
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
RATE = 2 * MIB
SLOW = Fault(bytes_per_second=RATE)
SLACK = SIZE // 20
"""Bytes that sources may have sent in vain when a stream ends early."""


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with fetcher_harness(tmp_path / "volume", [DATA, DATA], lease=3.0) as ready:
        ready.nodes[0].faults.add(SLOW)
        ready.nodes[1].faults.add(SLOW)
        yield ready


def start(harness: Harness, places: int = 8) -> asyncio.Task[JobOutcome]:
    worker = harness.worker(FetchLimits(side_streams=SideStreamPlaces(places)))
    return asyncio.create_task(worker.handle(harness.job(harness.wanted(DATA))))


def state(harness: Harness) -> PartialState | None:
    reader = harness.volume.open_partial(OBJECT_ID)
    if reader is None:
        return None
    try:
        return reader.state()
    finally:
        reader.close()


def readable(harness: Harness, position: int) -> int:
    """Bytes that a viewer at `position` can read."""
    seen = state(harness)
    return 0 if seen is None else seen.end_from(position) - position


@contextmanager
def viewers(harness: Harness, *positions: int) -> Iterator[None]:
    """Clients that wait at these bytes, and say so again and again."""

    async def want() -> None:
        while True:
            await harness.state.record_wanted(OBJECT_ID, positions)
            await asyncio.sleep(0.3)

    wanting = asyncio.create_task(want())
    try:
        yield
    finally:
        wanting.cancel()


def sent(*nodes: StorageNode) -> int:
    return sum(record.bytes_sent for node in nodes for record in node.requests)


async def test_bytes_that_a_viewer_wants_come_first_and_no_byte_comes_twice(harness: Harness) -> None:
    fetching = start(harness)
    with viewers(harness, 8 * MIB):
        await eventually(lambda: readable(harness, 8 * MIB) > 100_000)
        seen = state(harness)
        assert seen is not None
        assert seen.size < 6 * MIB
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    assert sent(*harness.nodes) <= SIZE + SLACK
    ranges = [record.range for node in harness.nodes for record in node.requests]
    assert f"bytes={8 * MIB}-{SIZE - 1}" in ranges
    assert len(ranges) == 2


async def test_what_viewers_can_read_is_right_at_every_moment(harness: Harness) -> None:
    fetching = start(harness)
    reader = None
    with viewers(harness, 3 * MIB, 6 * MIB, 9 * MIB, 11 * MIB):
        looks = 0
        while not fetching.done():
            reader = reader or harness.volume.open_partial(OBJECT_ID)
            if reader is not None:
                seen = reader.state()
                for extent in seen.extents or Extents.of((0, seen.size)):
                    assert reader.read(extent.first, extent.length) == DATA[extent.first : extent.end]
                    looks += 1
            await asyncio.sleep(0.02)
        assert looks > 20
    assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    assert sent(*harness.nodes) <= SIZE + SLACK
    assert sum(len(node.requests) for node in harness.nodes) >= 5
    assert reader is not None
    reader.close()


async def test_there_are_no_more_streams_than_places(harness: Harness) -> None:
    fetching = start(harness, places=2)
    with viewers(harness, *range(2 * MIB, 12 * MIB, 2 * MIB)):
        most = 0
        while not fetching.done():
            running = [r for node in harness.nodes for r in node.requests if not r.finished]
            most = max(most, len(running))
            await asyncio.sleep(0.01)
    assert await fetching == Ack("fetched")
    assert 2 <= most <= 3
    assert harness.stored() == DATA
    assert sent(*harness.nodes) <= SIZE + SLACK


async def test_without_places_all_bytes_come_in_order(harness: Harness) -> None:
    harness.nodes[0].faults.clear()
    fetching = start(harness, places=0)
    with viewers(harness, 8 * MIB):
        assert await fetching == Ack("fetched")
    assert [record.range for node in harness.nodes for record in node.requests] == [None]


async def test_a_stopped_fetch_is_resumed_with_all_its_extents(harness: Harness) -> None:
    fetching = start(harness)
    with viewers(harness, 4 * MIB, 8 * MIB):
        await eventually(lambda: min(readable(harness, 4 * MIB), readable(harness, 8 * MIB)) > MIB // 2)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
    before = state(harness)
    assert before is not None
    assert before.extents is not None
    assert len(before.extents) >= 2
    assert (await harness.state.usage()).reserved > 0
    for node in harness.nodes:
        node.faults.clear()
    assert await start(harness) == Ack("fetched")
    assert harness.stored() == DATA
    assert sent(*harness.nodes) <= SIZE + SLACK
    assert (await harness.state.usage()).reserved == 0


async def test_a_sparse_file_is_completed_without_side_streams_too(harness: Harness) -> None:
    fetching = start(harness)
    with viewers(harness, 8 * MIB):
        await eventually(lambda: readable(harness, 8 * MIB) > MIB // 2)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
    for node in harness.nodes:
        node.faults.clear()
    assert await start(harness, places=0) == Ack("fetched")
    assert harness.stored() == DATA
    assert sent(*harness.nodes) <= SIZE + SLACK


async def test_what_a_killed_writer_has_not_named_is_fetched_again(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.clear()
    fetching = start(harness)
    await fetching
    record = harness.volume.read_record(OBJECT_ID)
    assert record is not None
    path = next((harness.volume.root / "objects").glob("*/7"))
    path.unlink()
    term = harness.term
    assert await harness.state.begin_eviction(term, OBJECT_ID, 0.0)
    await harness.state.finish_eviction(term, OBJECT_ID)
    killed = harness.volume.open_partial_for_writing(record)
    killed.write(0, DATA[: 2 * MIB])
    killed.make_sparse(2 * MIB)
    killed.write(4 * MIB, DATA[4 * MIB : 5 * MIB])
    killed.name_extents(Extents.of((0, 2 * MIB), (4 * MIB, 5 * MIB)))
    killed.write(7 * MIB, b"?" * MIB)  # and something else, which a crash has torn
    killed.close()
    requests = [len(node.requests) for node in harness.nodes]
    assert await start(harness) == Ack("fetched")
    assert harness.stored() == DATA
    ranges = [
        record.range
        for node, count in zip(harness.nodes, requests, strict=True)
        for record in list(node.requests)[count:]
    ]
    assert ranges == [f"bytes={2 * MIB}-{4 * MIB - 1}", f"bytes={5 * MIB}-{SIZE - 1}"]


async def test_wrong_bytes_in_any_extent_are_never_published(harness: Harness) -> None:
    harness.nodes[0].faults.clear()
    harness.nodes[0].faults.add(Fault(bytes_per_second=RATE, flip_byte_at=9 * MIB))
    harness.nodes[1].faults.clear()
    fetching = start(harness)
    with viewers(harness, 8 * MIB):
        await eventually(lambda: readable(harness, 8 * MIB) > BLOCK)
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    assert len(harness.nodes[0].requests) >= 2
    assert sent(harness.nodes[1]) >= SIZE  # nothing of the first attempt was kept


async def test_of_several_sources_the_one_that_sent_wrong_bytes_is_blamed(tmp_path: Path) -> None:
    """1. The first sends wrong bytes and is cut. 2. The second continues. 3. The hash is wrong, and the third sends all
    of it. Then the bytes on disk tell which of the two it was."""
    async with fetcher_harness(tmp_path / "volume", [DATA, DATA, DATA]) as harness:
        corrupt, innocent, third = harness.nodes
        corrupt.faults.add(Fault(flip_byte_at=MIB, cut_after=3 * MIB))
        innocent.faults.add(Fault(latency_before_headers=0.05))
        third.faults.add(Fault(latency_before_headers=0.3))
        reader = harness.failover_reader
        for node, seconds in ((corrupt, 0.001), (innocent, 0.05), (third, 0.3)):
            reader._health.record_first_byte(node.object_url(OBJECT_ID), seconds)
        assert await start(harness) == Ack("fetched")
        assert harness.stored() == DATA
        usable = reader._health.best_first(harness.sources, OBJECT_ID)
        assert set(usable) == {innocent.object_url(OBJECT_ID), third.object_url(OBJECT_ID)}
        assert sent(innocent) > 0


async def test_wrong_bytes_of_all_sources_leave_nothing(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.clear()
        node.faults.add(Fault(bytes_per_second=4 * RATE, flip_byte_at=9 * MIB))
    fetching = start(harness)
    with viewers(harness, 8 * MIB):
        assert isinstance(await fetching, Retry)
    assert harness.stored() is None
    assert state(harness) is None
    assert (await harness.state.usage()).reserved == 0


async def test_a_side_stream_that_fails_leaves_its_gap_to_the_main_stream(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.clear()
        node.faults.add(Fault(status=500), Match(ranged=True))
        node.faults.add(SLOW)
    fetching = start(harness)
    with viewers(harness, 8 * MIB):
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    ranges = [record.range for node in harness.nodes for record in node.requests]
    assert ranges.count(None) == 1
    assert len(ranges) > 1


@pytest.mark.parametrize("position", [5 * MIB, 9 * MIB])
async def test_a_source_that_ignores_ranges_is_read_in_order(harness: Harness, position: int) -> None:
    """Near enough to be skipped to, or not."""
    for node in harness.nodes:
        node.faults.clear()
        node.faults.add(Fault(ignore_range=True, bytes_per_second=RATE))
    fetching = start(harness)
    with viewers(harness, position):
        assert await fetching == Ack("fetched")
    assert harness.stored() == DATA
    whole = [record for node in harness.nodes for record in node.requests if record.bytes_sent == SIZE]
    assert len(whole) == 1
    assert sum(len(node.requests) for node in harness.nodes) <= 3


async def test_no_extent_is_made_where_its_source_could_not_go_on_behind_it(tmp_path: Path) -> None:
    """1. A source that ignores ranges skips to a side stream's first byte. 2. It is cut. 3. What is behind these bytes
    is too far on to be skipped to."""
    async with fetcher_harness(tmp_path / "volume", [DATA]) as harness:
        faults = harness.nodes[0].faults
        faults.add(Fault(ignore_range=True, bytes_per_second=RATE), Match(nth=1))
        faults.add(Fault(ignore_range=True, cut_after=9 * MIB), Match(nth=2))
        faults.add(Fault(ignore_range=True))
        fetching = start(harness)
        with viewers(harness, 5 * MIB):
            assert await fetching == Ack("fetched")
        assert harness.stored() == DATA
        ranges = [record.range for record in harness.nodes[0].requests]
        assert ranges == [None, f"bytes={5 * MIB}-{SIZE - 1}"], ranges


async def test_a_lost_lease_ends_all_streams(harness: Harness) -> None:
    fetching = start(harness)
    with viewers(harness, 4 * MIB, 8 * MIB):
        await eventually(lambda: readable(harness, 8 * MIB) > BLOCK)
        fetch = (await harness.state.find(OBJECT_ID)).fetch
        assert fetch is not None
        harness.state.tables.drop_fetch(OBJECT_ID)  # and another worker has it
        assert isinstance(await harness.state.begin(OBJECT_ID, SIZE, "other"), Granted)
        assert isinstance(await fetching, Retry)
        before = sent(*harness.nodes)
        await asyncio.sleep(0.3)
        assert sent(*harness.nodes) - before <= MIB // 4
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "side-stream"]
