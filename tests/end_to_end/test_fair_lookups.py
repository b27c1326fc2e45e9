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
from redis.asyncio import Redis

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
    redis_url: str

    async def scripts_run(self) -> int:
        """How many scripts Redis has run so far, for all processes."""
        client = Redis.from_url(self.redis_url)
        counts = await client.info("commandstats")
        await client.aclose()
        return int(counts.get("cmdstat_evalsha", {"calls": 0})["calls"])

    async def ask_until(self, object_id: str, status: int) -> None:
        """Ask again and again until both processes have answered so, as ten such answers in a row show."""
        in_a_row = 0

        async def all_agree() -> bool:
            nonlocal in_a_row
            in_a_row = in_a_row + 1 if (await self.ask(object_id, VIEWER)).status == status else 0
            return in_a_row >= 10

        await eventually(all_agree, pause=0.1)

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
        yield World(stack, squid, redis_url)


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
    answered = 0

    async def stranger(number: int) -> set[int]:
        nonlocal answered
        statuses = set()
        while not over.is_set():
            answer = await world.ask(str(next(made_up)), f"198.51.100.{number % addresses}", method="HEAD")
            statuses.add(answer.status)
            answered += 1
        return statuses

    loop = asyncio.get_running_loop()
    began, scripts_before = loop.time(), await world.scripts_run()
    strangers = [asyncio.create_task(stranger(number)) for number in range(STRANGERS)]
    await world.squid.requests.wait_for(lambda _: len(world.queries()) > 2 * PROCESSES)
    answers, sent_before = [], []
    for object_id in LATER:
        sent_before.append(len(world.queries()))
        answers.append(await world.ask(object_id, VIEWER))
    over.set()
    statuses = set().union(*await asyncio.gather(*strangers))
    took = loop.time() - began
    scripts = await world.scripts_run() - scripts_before

    assert [answer.status for answer in answers] == [200] * len(LATER)
    assert statuses <= {404, 503}
    assert len(world.queries()) <= RATE * (took + 1)
    # A stranger has no round trip to Redis for itself. Heartbeats and polls of all processes are some 15 a second.
    assert scripts < answered / 2 + 20 * took, (scripts, answered, took)
    positions = {object_id: at for at, query in enumerate(world.queries()) for object_id in query}
    overtaken_by = [
        positions[object_id] - before for object_id, before in zip(LATER, sent_before, strict=True)
    ]
    # The other process goes on sending at the same rate, and one query may be on its way.
    assert sum(overtaken_by) / len(LATER) <= 2 * PROCESSES, overtaken_by


async def test_an_answer_is_kept_although_its_client_has_left(world: World) -> None:
    world.squid.faults = SquidFaults(latency=1.0)
    object_id = LATER[0]
    leaving = asyncio.create_task(world.ask(object_id, VIEWER))
    await eventually(lambda: [object_id] in world.queries(), what="the query is sent")
    leaving.cancel()
    await asyncio.wait({leaving})
    await asyncio.sleep(1.5)  # the squid answers
    # Whichever process answers them.
    answers = await ask_at_once(world.stack.port, [object_id] * 10)
    assert [answer.status for answer in answers] == [200] * 10
    assert world.queries() == [[object_id]]


async def test_ids_that_the_squid_cannot_have_cost_no_query(world: World) -> None:
    for number in range(10 * PROCESSES):
        assert (await world.ask(f"made-up-{number}", VIEWER)).status == 400
    assert world.queries() == []


async def test_an_object_that_was_unknown_is_found_by_every_process(world: World) -> None:
    """While it is unknown, one query each five seconds or more is enough for both processes."""
    object_id = LATER[0]
    world.squid.faults = SquidFaults(missing_objects=(object_id,))
    await world.ask_until(object_id, 404)
    for _ in range(10 * PROCESSES):
        assert (await world.ask(object_id, VIEWER, method="HEAD")).status == 404
    world.squid.faults = SquidFaults()
    await world.ask_until(object_id, 200)
    assert len(world.queries()) <= 4


async def test_a_crowded_queue_is_not_taken_for_an_outage_of_the_squid(world: World) -> None:
    (api,) = world.stack.of("api")
    await api.stop()
    # A process sends a query each four seconds, so each has seconds to be answered in before its clients give up.
    crowded = {"LOOKUP_WAIT": "6", "MAX_QUERY_RATE": "1", "MAX_IN_FLIGHT": "1"}
    world.stack.environment |= {f"DISTRIBUTOR_CATALOG__{name}": value for name, value in crowded.items()}
    api = world.stack.add("api", DISTRIBUTOR_PUBLIC_API__WORKERS=str(PROCESSES))
    await api.healthy()
    world.squid.faults = SquidFaults(latency=0.3)
    crowd = await ask_at_once(world.stack.port, [str(UNKNOWN + number) for number in range(600)])
    assert {answer.status for answer in crowd} == {404, 503}
    assert {answer.json()["type"] for answer in crowd if answer.status == 503} == {"lookup_refused"}
    degraded = (await get(f"{api.health_url}/readyz")).json()["degraded"]
    assert not any(reason.startswith("catalog") for reason in degraded), degraded
    assert any("look-up" in reason for reason in degraded), degraded
    asked = sum(len(query) for query in world.queries())
    assert sum(answer.status == 404 for answer in crowd) >= 0.95 * asked, "what is asked is used"
    assert [answer.status for answer in await ask_at_once(world.stack.port, LATER[:4])] == [200] * 4
