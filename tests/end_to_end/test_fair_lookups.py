"""Look-ups of a node with two API processes that share Redis, while the squid is slow or strangers ask for more."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from distributor_node.services.demo.objects import generated_object
from distributor_node.services.demo.squid import SquidFaults, TestSquid
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import Answer, get, read_answer
from tests.end_to_end.stack import Stack
from tests.waiting import eventually

pytestmark = pytest.mark.servers

PAGE = [str(number) for number in range(1, 101)]
LATER = [str(number) for number in range(1001, 1024)]  # 23 objects that no one has asked for
UNKNOWN = 10**9
SIZE = 2000
STRANGERS = 200
RATE = 20  # queries a second, by default
BATCH = 50
PROCESSES = 2
VIEWER = "203.0.113.7"


@dataclass(slots=True)
class World:
    """The node and its squid."""

    stack: Stack
    squid: TestSquid

    def queries(self) -> list[list[str]]:
        """What each look-up query has asked for, in order."""
        return [record.object_ids for record in self.squid.requests if record.object_ids]

    async def ask(self, object_id: str, client: str, *, method: str = "GET") -> Answer:
        return await get(self.stack.url(object_id), {"X-Forwarded-For": client}, method=method, timeout=60)


@pytest.fixture
async def world(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[World]:
    objects = [generated_object(object_id, SIZE) for object_id in (*PAGE, *LATER)]
    async with AsyncExitStack() as resources:
        node = await resources.enter_async_context(StorageNode(objects).run())
        squid = await resources.enter_async_context(TestSquid(objects, [node.url]).run())
        stack = Stack(tmp_path, redis_url, amqp_url, f"fair-{uuid.uuid4().hex[:8]}")
        resources.callback(stack.kill_all)
        stack.environment |= {
            "DISTRIBUTOR_CATALOG__KIND": "joystream",
            "DISTRIBUTOR_CATALOG__SQUID": squid.url,
            "DISTRIBUTOR_CATALOG__REFUSE_PRIVATE_SOURCES": "false",
            "DISTRIBUTOR_CATALOG__LOOKUP_WAIT": "20",  # what is counted must not depend on the machine's speed
            "DISTRIBUTOR_PUBLIC_API__TRUSTED_PROXIES": '["127.0.0.1"]',
        }
        await stack.up(fetchers=2, workers=PROCESSES)
        yield World(stack, squid)


async def ask_at_once(port: int, object_ids: Sequence[str]) -> list[Answer]:
    """As a browser that has its connections already: all requests leave within a moment."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in object_ids]
    began = asyncio.get_running_loop().time()
    for (_, writer), object_id in zip(connections, object_ids, strict=True):
        writer.write(f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
    answers = await asyncio.gather(*(read_answer(reader, began) for reader, _ in connections))
    for _, writer in connections:
        writer.transport.abort()
    return answers


async def test_a_cold_page_of_a_hundred_thumbnails_is_a_few_queries(world: World) -> None:
    world.squid.faults = SquidFaults(latency=0.6)
    answers = await ask_at_once(world.stack.port, PAGE)
    assert [(answer.status, len(answer.body)) for answer in answers] == [(200, SIZE)] * len(PAGE)
    asked = [object_id for query in world.queries() for object_id in query]
    assert sorted(asked) == sorted(PAGE), "each object is asked for once"
    assert len(world.queries()) <= 5


@pytest.mark.parametrize("addresses", [1, STRANGERS])
async def test_strangers_who_ask_for_unknown_ids_keep_no_one_out(world: World, addresses: int) -> None:
    """In 200 connections, all from one address or each from its own."""
    await eventually((world.stack.volume / "known-ids").exists, what="the evictor writes which ids exist")
    world.squid.faults = SquidFaults(latency=0.05)
    over = asyncio.Event()
    made_up = count(UNKNOWN)

    async def stranger(number: int) -> set[int]:
        statuses = set()
        while not over.is_set():
            answer = await world.ask(str(next(made_up)), f"198.51.100.{number % addresses}", method="HEAD")
            statuses.add(answer.status)
        return statuses

    loop = asyncio.get_running_loop()
    began = loop.time()
    strangers = [asyncio.create_task(stranger(number)) for number in range(STRANGERS)]
    await world.squid.requests.wait_for(lambda _: len(world.queries()) > 2 * PROCESSES)
    answers, sent_before = [], []
    for object_id in LATER:
        sent_before.append(len(world.queries()))
        answers.append(await world.ask(object_id, VIEWER))
    over.set()
    statuses = set().union(*await asyncio.gather(*strangers))
    took = loop.time() - began

    assert [answer.status for answer in answers] == [200] * len(LATER)
    assert statuses <= {404, 503}
    assert len(world.queries()) <= RATE * (took + 1)
    positions = {object_id: at for at, query in enumerate(world.queries()) for object_id in query}
    overtaken_by = [
        positions[object_id] - before for object_id, before in zip(LATER, sent_before, strict=True)
    ]
    # The other process goes on sending at the same rate, and one query may be on its way.
    assert sum(overtaken_by) / len(LATER) <= 2 * PROCESSES, overtaken_by
