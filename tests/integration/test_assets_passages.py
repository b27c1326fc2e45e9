"""Small ranges of proxied objects: one reading of a passage answers many of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.api.assets.decision import Span
from distributor_node.services.api.assets.passages import MAX_SMALL_RANGE, STREAM_WINDOW, Passages
from distributor_node.services.demo.faults import Fault
from distributor_node.shared.adapters.sources.client import MAX_SKIP, SourceClient
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.errors import AllSourcesFailed
from tests.integration.assets_harness import KIB, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = 3_900_000
ANSWERS = 100
MAX_BYTES_PER_ANSWER = 64 * KIB


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, state_down=True) as running:
        running.add("1", SIZE)
        yield running


def source_bytes(harness: AssetsHarness) -> int:
    return sum(record.bytes_sent for node in (harness.node, harness.second) for record in node.requests)


def requests(harness: AssetsHarness) -> int:
    return len(harness.node.requests) + len(harness.second.requests)


async def test_a_hundred_tails_cost_one_reading(harness: AssetsHarness) -> None:
    data = harness.data["1"]
    for number in range(1, ANSWERS + 1):
        answer = await harness.get("1", {"Range": f"bytes=-{number if number % 2 else 1}"})
        assert (answer.status, answer.complete) == (206, True)
        assert answer.body == data[-(number if number % 2 else 1) :]
        assert answer.headers["x-data-source"] == "external"
        assert answer.headers["cache-control"] == "max-age=180, must-revalidate"
        assert answer.headers["content-type"] == "image/png"
    assert source_bytes(harness) <= ANSWERS * MAX_BYTES_PER_ANSWER
    assert requests(harness) == 1


async def test_far_tails_of_a_source_that_ignores_ranges(harness: AssetsHarness) -> None:
    data = harness.add("2", 4_500_000)
    for node in (harness.node, harness.second):
        node.faults.add(Fault(ignore_range=True))
    for _ in range(ANSWERS):
        answer = await harness.get("2", {"Range": "bytes=-1"})
        assert (answer.status, answer.body, answer.complete) == (206, data[-1:], True)
    assert requests(harness) == 1
    assert source_bytes(harness) <= ANSWERS * MAX_BYTES_PER_ANSWER


async def test_a_range_too_far_on_for_such_a_source_is_refused_without_asking_again(
    harness: AssetsHarness,
) -> None:
    data = harness.add("2", MAX_SKIP + 1_000_000)
    for node in (harness.node, harness.second):
        node.faults.add(Fault(ignore_range=True))
    for _ in range(5):
        answer = await harness.get("2", {"Range": "bytes=-1"})
        assert (answer.status, answer.json()["type"]) == (502, "sources_failed")
    assert requests(harness) == 2  # each source once
    answer = await harness.get("2", {"Range": "bytes=1000-1000"})
    assert (answer.status, answer.body) == (206, data[1000:1001])


async def test_inner_ranges_of_a_source_that_ignores_ranges(harness: AssetsHarness) -> None:
    data = harness.data["1"]
    for node in (harness.node, harness.second):
        node.faults.add(Fault(ignore_range=True))
    for first in range(1_000_000, 1_000_000 + ANSWERS * 20_000, 20_000):
        answer = await harness.get("1", {"Range": f"bytes={first}-{first}"})
        assert (answer.status, answer.body) == (206, data[first : first + 1])
    assert requests(harness) == 1
    assert source_bytes(harness) <= ANSWERS * MAX_BYTES_PER_ANSWER


async def test_tails_and_inner_ranges_of_a_source_that_ignores_ranges(harness: AssetsHarness) -> None:
    data = harness.data["1"]
    for node in (harness.node, harness.second):
        node.faults.add(Fault(ignore_range=True))
    for number in range(ANSWERS // 2):
        first = 1_000_000 + number * 20_000
        for asked, expected in (("-1", data[-1:]), (f"{first}-{first}", data[first : first + 1])):
            answer = await harness.get("1", {"Range": f"bytes={asked}"})
            assert (answer.status, answer.body) == (206, expected)
    assert source_bytes(harness) <= ANSWERS * MAX_BYTES_PER_ANSWER
    assert requests(harness) == 1


async def test_a_small_range_is_passed_on_while_it_arrives(harness: AssetsHarness) -> None:
    """From a slow source the rest takes seconds, and here it never comes. Equal ranges are one request all the same."""
    first, last, there = 1_000_000, 1_060_000, 10_000
    for node in (harness.node, harness.second):
        node.faults.add(Fault(hang_after=there))
    request = f"GET /api/v1/assets/1 HTTP/1.1\r\nHost: node\r\nRange: bytes={first}-{last}\r\n\r\n".encode()
    readers = []
    for _ in range(2):
        reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
        harness.writers.append(writer)
        writer.write(request)
        readers.append(reader)
    for reader in readers:
        async with asyncio.timeout(60):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 206 ")
            assert await reader.readexactly(there) == harness.data["1"][first : first + there]
    asked = [record.range for node in (harness.node, harness.second) for record in node.requests]
    assert asked.count(f"bytes={first}-{last}") == 1  # others may have continued


@pytest.mark.parametrize("asked_first", ["-1", "2000000-2000000"])
async def test_a_tail_and_an_inner_range_at_once(harness: AssetsHarness, asked_first: str) -> None:
    """The second request joins the reading of the first; a source shows only by its answer that it ignores ranges."""
    data = harness.data["1"]
    harness.second.faults.add(Fault(status=404))
    harness.node.faults.add(Fault(ignore_range=True, bytes_per_second=4_000_000))
    expected = {"-1": data[-1:], "2000000-2000000": data[2_000_000:2_000_001]}
    running = {asked_first: asyncio.create_task(harness.get("1", {"Range": f"bytes={asked_first}"}))}
    await harness.node.requests.wait_for(lambda log: len(log) == 1 and log[0].bytes_sent > 0)
    for asked in expected.keys() - running.keys():
        running[asked] = asyncio.create_task(harness.get("1", {"Range": f"bytes={asked}"}))
    for asked, task in running.items():
        answer = await task
        assert (answer.status, answer.body) == (206, expected[asked])
    assert source_bytes(harness) < 1.5 * SIZE


async def test_tails_are_kept_longer_than_whole_objects(harness: AssetsHarness) -> None:
    """1. Two tails leave two whole objects. 2. Three more objects need their room. 3. Both tails are still kept."""
    tails, inner = ("2", "3"), ("4", "5", "6")
    for name in (*tails, *inner):
        harness.add(name, SIZE)
    for node in (harness.node, harness.second):
        node.faults.add(Fault(ignore_range=True))
    for name, asked, first in [
        *((name, "bytes=-1", SIZE - 1) for name in tails),
        *((name, "bytes=1000-1000", 1000) for name in inner),
        *((name, "bytes=-1", SIZE - 1) for name in tails),
    ]:
        answer = await harness.get(name, {"Range": asked})
        assert (answer.status, answer.body) == (206, harness.data[name][first : first + 1])
    assert requests(harness) == len(tails) + len(inner)


async def test_wrong_bytes_are_neither_kept_nor_sent(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(flip_byte_at=10))
    answer = await harness.get("1", {"Range": "bytes=-1"})
    assert (answer.status, answer.json()["type"]) == (502, "sources_failed")
    assert requests(harness) == 2
    for node in (harness.node, harness.second):
        node.faults.clear()
    answer = await harness.get("1", {"Range": "bytes=-1"})
    # Sources of wrong bytes are not asked for this object for a while, and nothing was kept of them.
    assert (answer.status, requests(harness)) == (502, 2)


async def test_wrong_bytes_of_one_source_are_replaced_by_another(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(flip_byte_at=SIZE - 1))
    for _ in range(3):
        answer = await harness.get("1", {"Range": "bytes=-1"})
        assert (answer.status, answer.body) == (206, harness.data["1"][-1:])
    assert (len(harness.node.requests), len(harness.second.requests)) == (1, 1)


async def test_wrong_bytes_of_a_source_that_ignores_ranges(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(ignore_range=True, flip_byte_at=10))
    harness.second.faults.add(Fault(ignore_range=True))
    for first in (2_000_000, 10):
        answer = await harness.get("1", {"Range": f"bytes={first}-{first}"})
        assert (answer.status, answer.body) == (206, harness.data["1"][first : first + 1])
    assert (len(harness.node.requests), len(harness.second.requests)) == (1, 1)


async def test_concurrent_tails_are_one_reading(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(bytes_per_second=8 * SIZE))
    answers = await asyncio.gather(*(harness.get("1", {"Range": f"bytes=-{n + 1}"}) for n in range(20)))
    assert [answer.body for answer in answers] == [harness.data["1"][-(n + 1) :] for n in range(20)]
    assert requests(harness) == 1


async def test_a_client_that_leaves_takes_no_reading_from_others(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(latency_before_body=0.5))
    _, writer = await harness.connect()
    writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\nRange: bytes=-1\r\n\r\n")
    await harness.node.requests.wait_for(lambda log: len(log) == 1)
    waiting = asyncio.create_task(harness.get("1", {"Range": "bytes=-2"}))
    await asyncio.sleep(0.1)
    writer.transport.abort()
    assert (await waiting).body == harness.data["1"][-2:]
    assert requests(harness) == 1


async def test_passages_are_bounded_in_bytes_and_time(harness: AssetsHarness) -> None:
    now = 0.0
    async with SourceClient(SourceLimits()) as client:
        reader = FailoverReader(client, SourceHealthRegistry())
        passages = Passages(reader, 2 * MAX_SMALL_RANGE, 10.0, lambda: now)
        spans = {}
        for object_id in ("2", "3", "4"):
            data = harness.add(object_id, 100_000)
            known = harness.catalog.objects[object_id]
            spans[object_id] = Span(99_999, 99_999, 100_000, partial=True)
            passage = await passages.read_tail(known, known.sources)
            assert passage is not None
            assert passage.bytes_of(spans[object_id]) == data[-1:]
            assert passages.bytes_held <= 2 * MAX_SMALL_RANGE
        found = [
            passages.find(harness.catalog.objects[name], span) is not None for name, span in spans.items()
        ]
        assert found == [False, True, True]
        harness.node.faults.add(Fault(ignore_range=True))
        large = harness.catalog.objects["1"]
        inner = Span(1000, 1000, SIZE, partial=True)
        assert await passages.read_range(large, large.sources, inner) is None
        assert passages.bytes_held <= 2 * MAX_SMALL_RANGE
        harness.node.faults.clear()
        known = harness.catalog.objects["4"]
        assert await passages.read_tail(known, known.sources) is not None
        now = 10.0
        assert passages.find(harness.catalog.objects["4"], spans["4"]) is None
        assert passages.bytes_held == 0


async def test_passages_of_tiny_objects_are_bounded_in_number(harness: AssetsHarness) -> None:
    """Each counts as MAX_SMALL_RANGE bytes: what keeps it takes more memory than its own few bytes."""
    async with SourceClient(SourceLimits()) as client:
        passages = Passages(FailoverReader(client, SourceHealthRegistry()), 3 * MAX_SMALL_RANGE)
        span = Span(9, 9, 10, partial=True)
        names = [str(number) for number in range(100, 110)]
        for name in names:
            harness.add(name, 10)
            known = harness.catalog.objects[name]
            assert await passages.read_tail(known, known.sources) is not None
        kept = [name for name in names if passages.find(harness.catalog.objects[name], span) is not None]
        assert kept == names[-3:]


async def test_a_failed_reading_holds_no_room(harness: AssetsHarness) -> None:
    async with SourceClient(SourceLimits()) as client:
        passages = Passages(FailoverReader(client, SourceHealthRegistry()))
        for node in (harness.node, harness.second):
            node.faults.add(Fault(status=404))
        known = harness.catalog.objects["1"]
        with pytest.raises(AllSourcesFailed):
            await passages.read_tail(known, known.sources)
        assert passages.bytes_held == 0


async def test_ranges_that_were_read_for_paused_clients_take_room(harness: AssetsHarness) -> None:
    """Their bytes are kept until the last client has got them, however long that takes."""
    media_object = harness.catalog.objects["1"]
    passages = Passages(harness.context.failover_reader, max_bytes=2 * STREAM_WINDOW)
    followed, length = [], 600_000
    for first in range(0, 6 * length, length):
        span = Span(first, first + length - 1, SIZE, partial=True)
        parts = passages.follow(media_object, media_object.sources, span, lambda *_: None)
        if await anext(parts, None) is not None:
            followed.append(parts)
        await eventually(lambda: not passages._streams)
    assert len(followed) == 2
    assert passages.bytes_held <= 2 * STREAM_WINDOW
    for parts in followed:
        await parts.aclose()
    assert passages.bytes_held <= 2 * length  # what is kept for others
