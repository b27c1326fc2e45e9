"""Equal and overlapping far ranges of one process: one stream from a source serves them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.api.assets.decision import Span
from distributor_node.services.api.assets.passages import STREAM_WINDOW, Passages
from distributor_node.services.demo.faults import Fault
from distributor_node.shared.adapters.sources.client import SourceClient
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.errors import AllSourcesFailed
from tests.integration.assets_harness import KIB, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = 24 * MIB
FIRST = 12 * MIB
LENGTH = 2 * MIB
SLOW = Fault(bytes_per_second=MIB // 2)
"""So that requests of one moment find the stream's first bytes in its window, on a busy machine too."""


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, far_range_wait=0.001) as running:  # no fetcher is there to bring them
        running.add("1", SIZE)
        await running.begin("1", written=100_000)
        yield running


def requests(harness: AssetsHarness) -> list[str | None]:
    return [record.range for node in (harness.node, harness.second) for record in node.requests]


def source_bytes(harness: AssetsHarness) -> int:
    return sum(record.bytes_sent for node in (harness.node, harness.second) for record in node.requests)


async def get_range(harness: AssetsHarness, first: int, last: int) -> None:
    answer = await harness.get("1", {"Range": f"bytes={first}-{last}"})
    assert (answer.status, answer.complete, answer.headers["x-data-source"]) == (206, True, "external")
    assert answer.headers["cache-control"] == "max-age=180, must-revalidate"
    assert answer.body == harness.data["1"][first : last + 1]


async def test_ten_equal_far_ranges_are_one_source_request(harness: AssetsHarness) -> None:
    harness.node.faults.add(SLOW)
    await asyncio.gather(*(get_range(harness, FIRST, FIRST + LENGTH - 1) for _ in range(10)))
    assert requests(harness) == [f"bytes={FIRST}-{FIRST + LENGTH - 1}"]
    assert source_bytes(harness) == LENGTH


async def test_ten_equal_short_ranges_one_after_the_other_are_one_source_request(
    harness: AssetsHarness,
) -> None:
    for _ in range(10):
        await get_range(harness, FIRST, FIRST + 500 * KIB - 1)
    assert len(requests(harness)) == 1


async def test_an_overlapping_range_follows_the_same_stream_and_goes_on_beyond_it(
    harness: AssetsHarness,
) -> None:
    harness.node.faults.add(SLOW)
    first = asyncio.create_task(get_range(harness, FIRST, FIRST + 2 * MIB - 1))
    await eventually(lambda: source_bytes(harness) > 200_000)
    await asyncio.gather(first, get_range(harness, FIRST + 100_000, FIRST + 3 * MIB - 1))
    assert requests(harness) == [
        f"bytes={FIRST}-{FIRST + 2 * MIB - 1}",
        f"bytes={FIRST + 2 * MIB}-{FIRST + 3 * MIB - 1}",
    ]
    assert source_bytes(harness) == 3 * MIB


async def test_a_client_that_stops_reading_holds_up_no_other(harness: AssetsHarness) -> None:
    """The other one is served to its end, and the bytes that the first still needs are read once more."""
    last = FIRST + 10 * MIB - 1
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.to_thread(small.connect, ("127.0.0.1", harness.port))
    reader, writer = await asyncio.open_connection(sock=small, limit=64 * KIB)
    harness.writers.append(writer)
    writer.write(f"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\nRange: bytes={FIRST}-{last}\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.wait_for(get_range(harness, FIRST, last), 60)
    async with asyncio.timeout(60):
        assert await reader.readexactly(10 * MIB) == harness.data["1"][FIRST : last + 1]


async def test_a_client_that_leaves_takes_no_stream_from_others(harness: AssetsHarness) -> None:
    harness.node.faults.add(SLOW)
    _, writer = await harness.connect()
    head = f"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\nRange: bytes={FIRST}-{FIRST + LENGTH - 1}\r\n\r\n"
    writer.write(head.encode())
    await harness.node.requests.wait_for(lambda log: len(log) == 1)
    waiting = asyncio.create_task(get_range(harness, FIRST, FIRST + LENGTH - 1))
    await eventually(lambda: source_bytes(harness) > MIB)
    writer.transport.abort()
    await waiting
    assert len(requests(harness)) == 1


async def test_the_last_client_that_leaves_ends_the_stream(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(bytes_per_second=MIB))
    _, writer = await harness.connect()
    writer.write(f"GET /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\nRange: bytes={FIRST}-\r\n\r\n".encode())
    await eventually(lambda: source_bytes(harness) > 100_000)
    writer.transport.abort()
    await harness.node.requests.wait_for(lambda log: log[0].finished)
    assert harness.node.requests[0].aborted


async def test_streams_are_bounded_in_bytes(harness: AssetsHarness) -> None:
    harness.node.faults.add(Fault(bytes_per_second=MIB))
    async with SourceClient(SourceLimits()) as client:
        passages = Passages(FailoverReader(client, SourceHealthRegistry()), 2 * STREAM_WINDOW)
        known = harness.catalog.objects["1"]

        async def follow(first: int, length: int) -> int:
            span = Span(first, first + length - 1, SIZE, partial=True)
            parts = passages.follow(known, known.sources, span, lambda url, response: None)
            return sum([len(part) async for part in parts])

        running = [asyncio.create_task(follow(number * 2 * MIB, MIB)) for number in range(2)]
        await harness.node.requests.wait_for(lambda log: len(log) == 2)
        assert await follow(10 * MIB, MIB) == 0  # no room
        assert await asyncio.gather(*running) == [MIB, MIB]
        assert passages.bytes_held <= 2 * STREAM_WINDOW


async def test_a_source_that_fails_fails_all_that_follow(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(latency_before_headers=0.2, status=500))
    async with SourceClient(SourceLimits()) as client:
        passages = Passages(FailoverReader(client, SourceHealthRegistry()))
        known = harness.catalog.objects["1"]

        async def follow() -> None:
            span = Span(FIRST, FIRST + MIB, SIZE, partial=True)
            async for _ in passages.follow(known, known.sources, span, lambda url, response: None):
                pass

        found = await asyncio.gather(*(follow() for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [AllSourcesFailed] * 3
        assert passages.bytes_held == 0
