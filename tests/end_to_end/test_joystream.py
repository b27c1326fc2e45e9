"""A node on the joystream catalog, in bucket and in worker mode, also while the squid fails."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.squid import SquidFaults, TestChain, TestSquid
from distributor_node.services.demo.squid.data import make_squid_data
from distributor_node.services.demo.squid.sdl import BIGINT_WORKER
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.operator_client import OperatorClient
from tests.end_to_end.stack import Stack
from tests.end_to_end.test_one_get import (
    assert_whole,
    test_a_killed_fetchers_download_is_resumed_by_another,
    test_a_miss_then_a_hit,
    test_fifty_first_requests_make_one_download,
    test_ranges_of_a_pending_object_near_and_far,
    test_small_corrupt_objects_are_served_correctly_at_the_first_request,
    test_wrong_bytes_from_the_first_source_never_arrive_as_complete,
)
from tests.servers.redis_server import free_port
from tests.waiting import eventually

# The scenarios of the manifest's node, collected here once more for the fixture below.
__all__ = [
    "test_a_killed_fetchers_download_is_resumed_by_another",
    "test_a_miss_then_a_hit",
    "test_fifty_first_requests_make_one_download",
    "test_ranges_of_a_pending_object_near_and_far",
    "test_small_corrupt_objects_are_served_correctly_at_the_first_request",
    "test_wrong_bytes_from_the_first_source_never_arrive_as_complete",
]

WORKER = 7
MAX_IN_FLIGHT = 16
LOOKUP_TIMEOUT = 2.0
"""Seconds that a request waits for the catalog by default."""
ASSIGNMENTS = {
    "buckets": {"DISTRIBUTOR_BUCKETS": '["0:1"]'},
    "worker": {"DISTRIBUTOR_WORKER_ID": str(WORKER)},
}


@dataclass(slots=True)
class JoystreamHarness(Harness):
    """As any other, with a squid for a catalog."""

    squid: TestSquid
    chain: TestChain

    def publish(self, objects: Sequence[DemoObject], *, both: bool = False) -> None:
        nodes = (self.first, self.second) if both else (self.first,)
        for node in nodes:
            node.objects.update({item.object_id: item for item in objects if item.held})
        endpoints = [nodes[0].url + "/", *(node.url for node in nodes[1:])]
        self.squid.data = make_squid_data(objects, endpoints, workers={WORKER: ["0:1"], 8: ["9:9"]})


@pytest.fixture(params=list(ASSIGNMENTS))
async def harness(
    request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, amqp_url: str
) -> AsyncIterator[JoystreamHarness]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")
    async with (
        StorageNode([]).run() as first,
        StorageNode([]).run() as second,
        TestSquid([]).run() as squid,
        TestChain().run() as chain,
    ):
        stack.environment |= ASSIGNMENTS[request.param]
        stack.environment |= {
            "DISTRIBUTOR_CATALOG__KIND": "joystream",
            "DISTRIBUTOR_CATALOG__REFUSE_PRIVATE_SOURCES": "false",
            "DISTRIBUTOR_CATALOG__SQUID": squid.url,
            "DISTRIBUTOR_CATALOG__CHAIN": chain.url,
            "DISTRIBUTOR_CATALOG__MAX_IN_FLIGHT": str(MAX_IN_FLIGHT),
        }
        try:
            yield JoystreamHarness(stack, first, second, squid, chain)
        finally:
            stack.kill_all()


async def test_what_is_not_served(harness: JoystreamHarness) -> None:
    ours, theirs = (
        generated_object("1", 1000),
        DemoObject("900", generated_object("900", 10).content, bucket="9:9"),
    )
    announced = DemoObject("901", generated_object("901", 10).content, held=False)
    harness.publish([ours, theirs, announced])
    await harness.stack.up()
    for object_id, status, message in [
        ("404", 404, "Data object does not exist"),
        ("900", 421, "Data object not served by this node"),
        ("901", 404, "Data object has not been uploaded yet"),
    ]:
        answer = await get(harness.stack.url(object_id))
        assert (answer.status, answer.json()["message"]) == (status, message)
        assert (await get(harness.stack.url(object_id), method="HEAD")).status == status
    assert_whole(await get(harness.stack.url("1")), ours)


async def test_a_thousand_heads_are_one_call(harness: JoystreamHarness) -> None:
    harness.publish([generated_object("1", 1000)])
    await harness.stack.up(workers=2)
    harness.squid.requests.clear()
    harness.squid.faults = SquidFaults(latency=0.2)
    turns = asyncio.Semaphore(50)

    async def head() -> int:
        async with turns:
            return (await get(harness.stack.url("1"), method="HEAD")).status

    assert set(await asyncio.gather(*(head() for _ in range(1000)))) == {200}
    assert harness.squid.requests.count_for("1") == 1


async def test_a_hanging_squid(harness: JoystreamHarness) -> None:
    cached, known = generated_object("1", MIB), generated_object("2", MIB)
    harness.publish([cached, known])
    await harness.stack.up()
    assert_whole(await get(harness.stack.url("1")), cached)
    await harness.stack.until_hit("1")
    assert (await get(harness.stack.url("2"), method="HEAD")).status == 200
    harness.squid.faults = SquidFaults(hang=True)
    harness.squid.requests.clear()
    ids = [str(1000 + number) for number in range(200)]
    began = time.monotonic()
    asking = asyncio.gather(*(get(harness.stack.url(object_id)) for object_id in ids))
    await harness.squid.requests.wait_for(lambda requests: requests.in_flight > 0)
    hit = await get(harness.stack.url("1"))
    assert hit.headers["x-cache"] == "hit"
    assert not asking.done()
    assert_whole(await get(harness.stack.url("2")), known)
    answers = await asking
    assert {answer.status for answer in answers} == {503}
    assert all("retry-after" in answer.headers for answer in answers)
    one_after_another = len(ids) / MAX_IN_FLIGHT * LOOKUP_TIMEOUT
    assert time.monotonic() - began < one_after_another / 2
    assert harness.squid.requests.max_in_flight <= MAX_IN_FLIGHT
    assert max(harness.squid.requests.count_for(object_id) for object_id in ids) <= 1
    harness.squid.faults = SquidFaults()
    assert (await get(harness.stack.url(ids[0]))).status == 404


async def test_a_node_that_starts_without_a_squid_serves_what_it_has(harness: JoystreamHarness) -> None:
    cached, known = generated_object("1", MIB), generated_object("2", MIB)
    harness.publish([cached, known])
    await harness.stack.up()
    assert_whole(await get(harness.stack.url("1")), cached)
    await harness.stack.until_hit("1")
    assert (await get(harness.stack.url("2"), method="HEAD")).status == 200
    (api,) = harness.stack.of("api")
    assert await api.stop() == 0
    await harness.squid.start_outage()
    api.start()
    await api.healthy()
    assert (await get(harness.stack.url("1"))).headers["x-cache"] == "hit"
    assert_whole(await get(harness.stack.url("2")), known)
    unknown = await get(harness.stack.url("3"))
    assert (unknown.status, unknown.json()["type"]) == (503, "catalog_unavailable")
    await harness.squid.end_outage()


@pytest.mark.parametrize("scope", [{"all": True}, {"bucket": "0:1"}], ids=["all", "bucket"])
async def test_warming_fetches_the_assignment(harness: JoystreamHarness, scope: dict[str, Any]) -> None:
    items = [generated_object(str(number), 10_000) for number in range(1, 6)]
    theirs = DemoObject("900", generated_object("900", 10).content, bucket="9:9")
    announced = DemoObject("901", generated_object("901", 10).content, held=False)
    harness.publish([*items, theirs, announced])
    operator = OperatorClient(free_port())
    harness.stack.environment |= operator.environment
    await harness.stack.up()
    await operator.command("warm", scope)

    async def over() -> bool:
        return bool((await operator.query("warm"))["state"] == "finished")

    await eventually(over)
    # The list says that it holds what is not accepted yet; the look-up knows better.
    assert {**(await operator.query("warm")), "reason": ""} == {
        "state": "finished", "total": 6, "done": 5, "skipped": 1, "failed": 0, "reason": "",
        "skippedFor": {"not_uploaded": 1}, "notWarmed": [{"id": "901", "reason": "not_uploaded"}],
    }  # fmt: skip
    for item in items:
        assert (await get(harness.stack.url(item.object_id), method="HEAD")).headers["x-cache"] == "hit"
    # A bucket that is not ours is asked about, and left alone.
    await operator.command("warm", {"bucket": "9:9"})
    await eventually(over)
    warmed = await operator.query("warm")
    assert (warmed["total"], warmed["skipped"]) == (1, 1)


async def test_a_squid_whose_worker_ids_are_decimal_strings(harness: JoystreamHarness) -> None:
    """The next release: objects are ours, and the node is ready."""
    item = generated_object("1", 1000)
    harness.publish([item])
    harness.squid.faults = SquidFaults(schema=BIGINT_WORKER)
    await harness.stack.up()
    assert_whole(await get(harness.stack.url("1")), item)
    (api,) = harness.stack.of("api")
    ready = await get(f"{api.health_url}/readyz")
    assert not [text for text in ready.json().get("degraded", []) if text.startswith("catalog")]


async def test_status_shows_squid_and_chain(harness: JoystreamHarness) -> None:
    harness.publish([])
    await harness.stack.up()

    async def told() -> bool:
        found = (await harness.stack.status())["queryNodeStatus"]
        return bool(found["chainHead"] == harness.chain.head and found["blocksProcessed"])

    await eventually(told)
