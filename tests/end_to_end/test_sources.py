"""The order in which real processes use storage nodes, and how fast it adapts."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack
from tests.end_to_end.test_one_get import assert_whole
from tests.waiting import eventually

SLOW, MIDDLING, SLOWED = 1.0, 0.4, 2.0
"""Seconds to the first byte: far enough from each other, and from nothing, for a busy machine."""
PROBE_SECONDS = 1.0
SHARE_SECONDS = 0.2
SIZE = 50_000


@dataclass(slots=True)
class Harness:
    """Three storage nodes hold every object; the catalog names the slowest first."""

    stack: Stack
    slow: StorageNode
    middling: StorageNode
    quick: StorageNode
    objects: list[DemoObject] = field(default_factory=list)

    @property
    def nodes(self) -> Sequence[StorageNode]:
        return (self.slow, self.middling, self.quick)

    def publish(self) -> None:
        self.objects = [generated_object(str(number), SIZE) for number in range(1, 20)]
        for node in self.nodes:
            node.objects.update({item.object_id: item for item in self.objects})
        self.stack.write_manifest(self.objects, [f"{node.api_url}/files/" for node in self.nodes])

    async def fetch(self, number: int) -> StorageNode:
        """Have one object fetched; the node that was asked first."""
        item = self.objects[number - 1]
        assert_whole(await get(self.stack.url(item.object_id)), item)
        await self.stack.until_hit(item.object_id)
        asked = [(node.requests.of(item.object_id)[0].started_at, node) for node in self.nodes
                 if node.requests.of(item.object_id)]  # fmt: skip
        return min(asked, key=lambda pair: pair[0])[1]

    async def order(self) -> list[int]:
        """Ports of the storage nodes, the first to be asked first, as the evictor's metrics say."""
        text = (await get(f"{self.stack.of('evictor')[0].health_url}/metrics")).body.decode()
        found = re.findall(r'distributor_source_rank\{source="127\.0\.0\.1:(\d+)"\} (\S+)', text)
        return [int(port) for port, _ in sorted(found, key=lambda pair: float(pair[1]))]

    async def until_order(self, *nodes: StorageNode) -> None:
        """Wait until the metrics show these first."""
        wanted = [node.port for node in nodes]

        async def reached() -> bool:
            return (await self.order())[: len(wanted)] == wanted

        await eventually(reached, pause=0.05, what=f"sources begin with {wanted}")


@pytest.fixture
async def harness(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Harness]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")
    stack.environment["DISTRIBUTOR_SOURCES__PROBE_INTERVAL"] = str(PROBE_SECONDS)
    stack.environment["DISTRIBUTOR_SOURCES__SHARE_INTERVAL"] = str(SHARE_SECONDS)
    async with AsyncExitStack() as running:
        slow, middling, quick = [await running.enter_async_context(StorageNode([]).run()) for _ in range(3)]
        made = Harness(stack, slow, middling, quick)
        made.slow.faults.add(Fault(latency_before_headers=SLOW))
        made.middling.faults.add(Fault(latency_before_headers=MIDDLING))
        made.publish()
        try:
            yield made
        finally:
            stack.kill_all()


async def test_the_fastest_is_used_first_until_it_slows_down(harness: Harness) -> None:
    await harness.stack.up()
    await harness.until_order(harness.quick, harness.middling, harness.slow)
    await asyncio.sleep(2 * SHARE_SECONDS)  # the fetcher hears of it at its next exchange
    assert await harness.fetch(1) is harness.quick
    harness.quick.faults.add(Fault(latency_before_headers=SLOWED))
    await harness.until_order(harness.middling)
    await asyncio.sleep(2 * SHARE_SECONDS)
    assert await harness.fetch(2) is harness.middling
    log = harness.stack.of("evictor")[0].log.read_text()
    assert '"source_order_changed"' in log


async def test_one_failed_download_changes_the_source_order_for_all(harness: Harness) -> None:
    stack = harness.stack
    stack.environment["DISTRIBUTOR_SOURCES__PROBE_INTERVAL"] = "3600"
    await stack.up(fetchers=2)
    await harness.until_order(harness.quick)
    await asyncio.sleep(2 * SHARE_SECONDS)
    harness.quick.faults.add(Fault(status=500), Match(endpoint="files"))
    assert await harness.fetch(1) is harness.quick, "it was the first to be asked, and failed"
    await asyncio.sleep(2 * SHARE_SECONDS)
    assert await harness.fetch(2) is harness.middling, "by whichever worker"


async def test_a_storage_node_that_is_down_ranks_last_at_the_next_probe(harness: Harness) -> None:
    await harness.stack.up()
    await harness.until_order(harness.quick)
    harness.quick.faults.add(Fault(status=503), Match(endpoint="version"))
    await harness.until_order(harness.middling, harness.slow, harness.quick)
    harness.quick.faults.clear()
    await harness.until_order(harness.quick)


async def test_a_corrupt_copy_is_not_requested_again(harness: Harness) -> None:
    """The object is dropped behind the node's back; its refetch does not ask the source that lied."""
    stack = harness.stack
    await stack.up()
    await harness.until_order(harness.quick)
    await asyncio.sleep(2 * SHARE_SECONDS)
    item = harness.objects[0]
    harness.quick.faults.add(Fault(flip_byte_at=10), Match(object_id=item.object_id))
    assert await harness.fetch(1) is harness.quick
    assert harness.quick.requests.of(item.object_id)
    await asyncio.sleep(2 * SHARE_SECONDS)
    (kept,) = (path for path in (stack.volume / "objects").rglob(item.object_id))
    kept.unlink()
    for node in harness.nodes:
        node.requests.clear()
    assert await harness.fetch(1) is not harness.quick
    assert not harness.quick.requests.of(item.object_id)


async def test_without_the_state_store_each_process_uses_its_own_statistics(harness: Harness) -> None:
    """Standalone is the plainest such process: no state store outside it."""
    stack = harness.stack
    stack.environment |= {
        "DISTRIBUTOR_STATE_STORE__URL": "memory://",
        "DISTRIBUTOR_JOB_QUEUE__URL": "memory://",
    }
    process = stack.add("standalone")
    await process.healthy()

    def probed() -> bool:
        return all(
            any(record.path.endswith("/version") and record.finished for record in node.requests)
            for node in harness.nodes
        )

    await eventually(probed)
    await asyncio.sleep(0.2)
    assert await harness.fetch(1) is harness.quick
