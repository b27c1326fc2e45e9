"""Ranges far ahead of a fetch: the fetch brings their bytes first, or they are proxied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault
from distributor_node.services.fetcher.admission import Admission, AdmissionRules, LeaseTimes
from distributor_node.services.fetcher.download import FetchLimits
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.fetcher import DeadLetterHandler, FailureRecorder, Worker
from distributor_node.services.fetcher.side_streams import SideStreamPlaces
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.jobs import RetryPlan
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.runtime.threads import BlockingPool
from distributor_node.shared.waiting import background
from tests.counters import counted
from tests.end_to_end.client import Answer
from tests.integration.assets_harness import LIMIT, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = 16 * MIB + 99
ID = ObjectId("1")
WAIT = 20.0
"""Seconds for the first byte of a range ahead: long, so that a slow machine proxies nothing."""


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(
        tmp_path, first_byte_wait=30.0, far_range_wait=WAIT, stalled_fetch_wait=30.0
    ) as running:
        running.add("1", SIZE)
        for node in (running.node, running.second):
            node.faults.add(Fault(bytes_per_second=2 * MIB))
        yield running


@asynccontextmanager
async def fetcher(harness: AssetsHarness) -> AsyncIterator[None]:
    """Takes jobs during the block."""
    context, disk = harness.context, BlockingPool(16)
    limits = FetchLimits(side_streams=SideStreamPlaces(16))
    worker = Worker(
        Admission(context.state, context.volume, disk, AdmissionRules(LIMIT, 1.0, 1.0, LIMIT), "worker"),
        FetchRunner(
            context.state, context.volume, context.failover_reader, disk, LeaseTimes(1.0, 0.3), limits
        ),
        FailureRecorder(context.state, RetryPlan(), 60.0),
    )
    dead = DeadLetterHandler(context.state, context.volume, disk, "last", failure_memory=60.0)
    async with background(harness.queue.consume(worker.handle, 4, dead.handle), "fetcher"):
        yield
    await disk.close()


def sent(harness: AssetsHarness) -> int:
    return sum(record.bytes_sent for node in (harness.node, harness.second) for record in node.requests)


async def view(harness: AssetsHarness, first: int, last: int) -> Answer:
    answer = await harness.get("1", {"Range": f"bytes={first}-{last}"})
    assert (answer.status, answer.complete) == (206, True)
    assert answer.body == harness.data["1"][first : last + 1]
    return answer


async def begin(harness: AssetsHarness) -> asyncio.Task[Answer]:
    whole = asyncio.create_task(harness.get("1"))
    await eventually(lambda: sent(harness) > MIB // 2)
    return whole


async def test_viewers_who_jump_are_served_from_the_volume(harness: AssetsHarness) -> None:
    async with fetcher(harness):
        whole = await begin(harness)
        answers = await asyncio.gather(
            view(harness, 9 * MIB + 5, 10 * MIB),
            view(harness, 13 * MIB, 14 * MIB),
            view(harness, 13 * MIB + 77, 15 * MIB),
            view(harness, 11 * MIB, SIZE - 1),
        )
        for answer in answers:
            assert answer.headers["x-data-source"] == "local"
            assert answer.headers["x-cache"] == "pending"
            assert answer.headers["cache-control"] == "max-age=180, must-revalidate"
            assert answer.headers["content-type"] == "image/png"
        assert (await whole).body == harness.data["1"]
        await eventually(lambda: harness.is_hit("1"))
    assert sent(harness) <= 1.05 * SIZE


async def test_a_cold_object_that_is_asked_for_in_pieces_is_read_once(harness: AssetsHarness) -> None:
    async with fetcher(harness):
        await asyncio.gather(
            *(view(harness, first, min(first + MIB, SIZE) - 1) for first in range(0, SIZE, MIB))
        )
        await eventually(lambda: harness.is_hit("1"))
    assert sent(harness) <= 1.1 * SIZE


async def test_the_end_of_an_object_comes_before_the_rest(tmp_path: Path) -> None:
    """As a player reads the index of an MP4. Its last bytes, which are not verified yet, are read twice."""
    bridged = counted("distributor_stalled_fetches_bridged_total", end="complete")
    async with (
        assets_harness(tmp_path, far_range_wait=4.0, stalled_fetch_wait=60.0) as harness,
        fetcher(harness),
    ):
        harness.add("1", SIZE)
        for node in (harness.node, harness.second):
            node.faults.add(Fault(bytes_per_second=MIB))
        whole = await begin(harness)
        reader, writer = await harness.connect()
        writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\nRange: bytes=-500000\r\n\r\n")
        assert b"x-data-source: local" in (await reader.readuntil(b"\r\n\r\n")).lower()
        assert await reader.readexactly(500_000) == harness.data["1"][-500_000:]
        await eventually(
            lambda: counted("distributor_stalled_fetches_bridged_total", end="complete") == bridged + 1
        )
        last = await view(harness, SIZE - 1000, SIZE - 1)
        assert last.headers["x-data-source"] == "external"
        assert not whole.done()
        assert (await whole).complete
        await eventually(lambda: harness.is_hit("1"))
        assert sent(harness) <= 1.05 * SIZE


async def test_what_does_not_come_soon_is_proxied(tmp_path: Path) -> None:
    """The worker reads in order, as one of the version before does."""
    async with assets_harness(tmp_path, far_range_wait=0.3) as harness:
        harness.add("1", SIZE)
        fetch = await harness.begin("1", written=MIB)
        answer = await view(harness, 9 * MIB, 10 * MIB)
        assert answer.headers["x-data-source"] == "external"
        assert list(await harness.context.state.wanted_positions([ID])) == [[9 * MIB]]
        fetch.partial.close()


async def test_an_object_without_a_hash_is_not_fetched_ahead(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, far_range_wait=WAIT) as harness:
        harness.add("1", SIZE, content_hash=None)
        fetch = await harness.begin("1", written=MIB)
        answer = await harness.get("1", {"Range": f"bytes={9 * MIB}-{10 * MIB}"})
        assert answer.body == harness.data["1"][9 * MIB : 10 * MIB + 1]
        assert answer.headers["x-data-source"] == "external"
        assert list(await harness.context.state.wanted_positions([ID])) == [[]]
        fetch.partial.close()


async def test_a_fetch_that_dies_behind_a_gap_is_continued_from_a_source(tmp_path: Path) -> None:
    """A range that began far on, and one that reaches the end from a near byte: that is verified from its first."""
    async with assets_harness(
        tmp_path, far_range_wait=WAIT, far_range_distance=5 * MIB, stalled_fetch_wait=60.0
    ) as harness:
        data = harness.add("1", SIZE)
        fetch = await harness.begin("1", written=MIB)
        fetch.partial.make_sparse(MIB)
        fetch.partial.write(4 * MIB, data[4 * MIB : 12 * MIB])
        fetch.partial.name_extents(Extents.of((0, MIB), (4 * MIB, 12 * MIB)))
        far = asyncio.create_task(view(harness, 10 * MIB, SIZE - 1))
        near = asyncio.create_task(view(harness, 4 * MIB, SIZE - 1))
        await harness.until_pending("1", 2)
        await asyncio.sleep(0.3)
        assert not sent(harness)
        fetch.partial.close()
        await harness.context.state.record_failure(ID, "given up", 60)
        await harness.context.state.park(fetch.lease)
        await asyncio.gather(far, near)
        ranges = {record.range for node in (harness.node, harness.second) for record in node.requests}
        assert ranges == {None, f"bytes={12 * MIB}-{SIZE - 1}"}


async def test_bytes_that_were_not_named_are_never_sent(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, far_range_wait=0.3) as harness:
        data = harness.add("1", SIZE)
        fetch = await harness.begin("1", written=MIB)
        fetch.partial.make_sparse(MIB)
        fetch.partial.write(9 * MIB, b"?" * MIB)  # not synced, and not what the object has
        answer = await view(harness, 9 * MIB, 10 * MIB - 1)
        assert answer.headers["x-data-source"] == "external"
        fetch.partial.write(9 * MIB, data[9 * MIB : 10 * MIB])
        fetch.partial.name_extents(Extents.of((0, MIB), (9 * MIB, 10 * MIB)))
        answer = await view(harness, 9 * MIB, 10 * MIB - 1)
        assert answer.headers["x-data-source"] == "local"
        fetch.partial.close()


# Sources that ignore ranges: only the fetch brings a range that begins far on.


def ignore_ranges(harness: AssetsHarness, bytes_per_second: int | None) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(ignore_range=True, bytes_per_second=bytes_per_second))


def requests(harness: AssetsHarness) -> int:
    return len(harness.node.requests) + len(harness.second.requests)


@pytest.mark.parametrize("last", [13 * MIB, SIZE - 1])
@pytest.mark.parametrize("changes", [{}, {"content_hash": None}])
async def test_a_source_that_ignores_ranges_is_read_once(
    tmp_path: Path, changes: dict[str, None], last: int
) -> None:
    async with (
        assets_harness(tmp_path, far_range_wait=0.2, proxied_first_byte_wait=60.0) as harness,
        fetcher(harness),
    ):
        harness.add("1", SIZE, **changes)
        ignore_ranges(harness, 12 * MIB)
        answer = await view(harness, 12 * MIB, last)
        assert answer.headers["x-data-source"] == "local"
        await eventually(lambda: harness.is_hit("1"))
        wholes = [one for one in (*harness.node.requests, *harness.second.requests) if one.range is None]
        assert len(wholes) == 1


async def test_the_last_bytes_of_a_source_that_ignores_ranges_come_with_the_whole(tmp_path: Path) -> None:
    async with (
        assets_harness(tmp_path, far_range_wait=0.2, proxied_first_byte_wait=60.0) as harness,
        fetcher(harness),
    ):
        harness.add("1", SIZE)
        ignore_ranges(harness, 12 * MIB)
        assert (await view(harness, SIZE - 1000, SIZE - 1)).headers["x-data-source"] == "local"


async def test_a_range_that_comes_too_late_is_to_be_asked_for_again(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, far_range_wait=0.1, proxied_first_byte_wait=0.5) as harness:
        data = harness.add("1", SIZE, content_hash=None)
        ignore_ranges(harness, None)
        fetch = await harness.begin("1", written=MIB)
        for _ in range(3):
            answer = await harness.get("1", {"Range": f"bytes={12 * MIB}-{13 * MIB}"})
            assert (answer.status, answer.json()["type"]) == (503, "range_not_fetched_yet")
            assert int(answer.headers["retry-after"]) >= 1
        assert requests(harness) == 2, "each source was asked once, and then known to ignore ranges"
        fetch.write_to(14 * MIB)
        assert (await view(harness, 12 * MIB, 13 * MIB)).body == data[12 * MIB : 13 * MIB + 1]
        fetch.partial.close()


async def test_a_range_is_not_waited_for_when_its_fetch_has_failed(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, far_range_wait=0.1, proxied_first_byte_wait=600.0) as harness:
        harness.add("1", SIZE, content_hash=None)
        ignore_ranges(harness, None)
        fetch = await harness.begin("1", written=MIB)
        waiting = asyncio.create_task(harness.get("1", {"Range": f"bytes={12 * MIB}-{13 * MIB}"}))
        await eventually(lambda: requests(harness) == 2)
        fetch.partial.close()
        await harness.context.state.record_failure(ID, "given up", 60)
        await harness.context.state.park(fetch.lease)
        for answer in (await waiting, await harness.get("1", {"Range": f"bytes={12 * MIB}-{13 * MIB}"})):
            assert (answer.status, answer.json()["type"]) == (502, "sources_failed")
