"""Probes of storage nodes: a limited number at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from distributor_node.shared.adapters.sources.health import SourceHealthRegistry, SourceProber

CONCURRENCY = 10
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class CrowdedNode:
    """Answers once so many requests are under way as there may be, so that one more would be seen."""

    def __init__(self) -> None:
        self.in_flight = self.max_in_flight = self.answered = 0
        self.full = asyncio.Event()
        self.port = 0

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                if self.in_flight >= CONCURRENCY:
                    self.full.set()
                await self.full.wait()
                self.in_flight -= 1
                self.answered += 1
                writer.write(ANSWER)
        except asyncio.IncompleteReadError:
            writer.close()


@pytest.fixture
async def node() -> AsyncIterator[CrowdedNode]:
    node = CrowdedNode()
    async with await asyncio.start_server(node.converse, "127.0.0.1", 0) as server:
        node.port = server.sockets[0].getsockname()[1]
        yield node


async def test_at_most_ten_probes_are_under_way(node: CrowdedNode) -> None:
    registry = SourceHealthRegistry()
    prober = SourceProber(registry, timeout=5, concurrency=CONCURRENCY)
    await prober.open()
    await prober.probe_all([f"http://127.0.0.1:{node.port}/{number}/" for number in range(45)])
    await prober.close()
    assert (node.answered, node.max_in_flight) == (45, CONCURRENCY)
    assert len(registry.health_of(f"127.0.0.1:{node.port}").first_bytes) == 10
