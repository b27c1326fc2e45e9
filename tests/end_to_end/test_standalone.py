"""A standalone node keeps its cached objects however its process ends."""

from __future__ import annotations

import asyncio
import signal

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, generated_object
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness


async def test_cached_objects_are_hits_after_a_clean_stop(alone: Harness) -> None:
    item = generated_object("1", 2 * MIB)
    alone.publish([item])
    node = alone.stack.add("standalone")
    await node.healthy()
    assert (await get(alone.stack.url("1"))).headers["x-cache"] == "miss"
    await alone.stack.until_hit("1")
    assert await node.stop() == 0
    downloads = len(alone.first.requests.of("1", "GET"))
    again = alone.stack.add("standalone")
    await again.healthy()
    answer = await get(alone.stack.url("1"))
    assert (answer.headers["x-cache"], answer.body) == ("hit", item.content.read(0, item.size))
    assert len(alone.first.requests.of("1", "GET")) == downloads


async def test_nothing_is_lost_by_sigkill(alone: Harness) -> None:
    cached, interrupted = generated_object("1", 2 * MIB), generated_object("2", 8 * MIB)
    alone.publish([cached, interrupted])
    alone.first.faults.add(Fault(bytes_per_second=4 * MIB), Match(object_id="2", first=1))
    node = alone.stack.add("standalone")
    await node.healthy()
    await get(alone.stack.url("1"))
    await alone.stack.until_hit("1")
    following = asyncio.create_task(get(alone.stack.url("2")))
    await alone.stack.until_on_volume(5 * MIB)
    node.kill()
    assert not (await following).complete
    again = alone.stack.add("standalone")
    await again.healthy()
    assert (await get(alone.stack.url("1"))).headers["x-cache"] == "hit"
    answer = await get(alone.stack.url("2"))
    assert answer.body == interrupted.content.read(0, interrupted.size)
    await alone.stack.until_hit("2")
    assert any(record.range for record in alone.first.requests.of("2", "GET")[1:]), (
        "the partial file was resumed"
    )


async def test_ctrl_c_is_a_clean_stop(alone: Harness) -> None:
    alone.publish([generated_object("1", 1000)])
    node = alone.stack.add("standalone")
    await node.healthy()
    node.send(signal.SIGINT)
    assert node.process is not None
    assert await asyncio.to_thread(node.process.wait, 60) == 0
    assert "Traceback" not in node.tail()


async def test_a_second_node_on_the_same_volume_is_refused(alone: Harness) -> None:
    alone.publish([generated_object("1", 1000)])
    await alone.stack.add("standalone").healthy()
    second = alone.stack.add("standalone", DISTRIBUTOR_PUBLIC_API__PORT="0")
    assert second.process is not None
    assert await asyncio.to_thread(second.process.wait, 60) == 2
    assert "in use by another standalone node" in second.tail()


async def test_fifty_first_requests_make_one_fetch_when_the_catalog_is_slow(alone: Harness) -> None:
    item = generated_object("1", 1 * MIB)
    alone.first.objects["1"] = item
    alone.first.faults.add(Fault(latency_before_headers=0.2), Match(method="HEAD"))
    node = alone.stack.add(
        "standalone",
        DISTRIBUTOR_CATALOG__KIND="origin",
        DISTRIBUTOR_CATALOG__ORIGIN=alone.first.object_url("{id}"),
    )
    await node.healthy()
    answers = await asyncio.gather(*(get(alone.stack.url("1")) for _ in range(50)))
    assert {answer.body for answer in answers} == {item.content.read(0, item.size)}
    assert len(alone.first.requests.of("1", "GET")) == 1
    assert len(alone.first.requests.of("1", "HEAD")) == 1
