"""Poison messages, two evictors, lost leadership, clocks that jump: nothing happens twice."""

from __future__ import annotations

import asyncio
import json
import time

import aio_pika
import pytest

from distributor_node.services.demo.objects import MIB, generated_object
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness, frozen, mixed_objects
from tests.chaos.http import cache_all, completed_downloads, events, get_correct
from tests.chaos.invariants import wait_until_settled
from tests.end_to_end.client import get

POISON = {
    "not_json": b"\x00\xff{{{",
    "unknown_version": b'{"version": 99, "object_id": "1"}',
    "id_with_dots": json.dumps(
        {"version": 1, "object": {"object_id": "../../etc/passwd", "size": 5}}
    ).encode(),
    "list": b"[]",
    "empty": b"",
}


@pytest.mark.timeout(120)
async def test_poison_is_dead_lettered_and_the_consumer_goes_on(chaos: ChaosHarness) -> None:
    objects = mixed_objects(7)
    await chaos.up(objects, 100 * MIB)
    async with await aio_pika.connect(chaos.rabbit.url) as connection, connection.channel() as channel:
        for body in POISON.values():
            message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, f"{chaos.prefix}.jobs")
        dead = await channel.get_queue(f"{chaos.prefix}.dead")
        for _ in POISON:
            async with asyncio.timeout(20):
                while (letter := await dead.get(fail=False)) is None:  # noqa: ASYNC110 - the letter is the value
                    await asyncio.sleep(0.05)
            assert any("reason" in name and str(value) for name, value in letter.headers.items()), (
                letter.headers
            )
            await letter.ack()
    await cache_all(chaos, objects)
    assert not (chaos.stack.volume.parent / "etc").exists()
    await wait_until_settled(chaos, objects)
    record_result("poison_jobs", requests=len(POISON), failed=0)


@pytest.mark.chaos
@pytest.mark.timeout(240)
async def test_two_evictors_and_a_leader_that_loses_its_lock_in_mid_eviction(chaos: ChaosHarness) -> None:
    """The leader is stopped for longer than its term again and again, and goes on where it was."""
    objects = mixed_objects(56)
    clients = await chaos.up(objects, 14 * MIB)
    chaos.stack.add("evictor")
    await chaos.stack.ready()
    monitor = chaos.monitor_volume()
    async with monitor.running(), clients.running(8):
        for number in range(6):
            await asyncio.sleep(2)
            with frozen(chaos.stack.of("evictor")[number % 2]):
                await asyncio.sleep(4)
    clients.check()
    assert monitor.peak <= 14 * MIB
    evicted = [
        event["evicted"]
        for process in chaos.stack.of("evictor")
        for event in events(process, "object_evicted")
    ]
    assert sum(evicted) > 0, "the working set is larger than the limit"
    terms = sum(len(list(events(process, "leadership_acquired"))) for process in chaos.stack.of("evictor"))
    assert terms > 2
    record_result(
        "two_evictors",
        clients,
        terms=terms,
        most_bytes=monitor.peak,
        at_rest_after=await wait_until_settled(chaos, objects),
    )


@pytest.mark.chaos
@pytest.mark.timeout(240)
async def test_objects_being_read_are_not_evicted(chaos: ChaosHarness) -> None:
    """Slow readers of hits and of growing files, while everything else is evicted around them."""
    slow = [generated_object(str(number), 4 * MIB) for number in range(9001, 9003)]
    others = mixed_objects(56)
    clients = await chaos.up([*slow, *others], 14 * MIB)
    clients.objects = others
    await cache_all(chaos, slow[:1])

    async def read_slowly(object_id: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", chaos.stack.port, limit=64 * 1024)
        writer.write(
            f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head
        body = bytearray()
        while piece := await reader.read(64 * 1024):
            body += piece
            await asyncio.sleep(0.3)
        writer.close()
        return bytes(body)

    monitor = chaos.monitor_volume()
    async with monitor.running(), clients.running(6):
        bodies = await asyncio.gather(*(read_slowly(item.object_id) for item in slow))
    clients.check()
    for item, body in zip(slow, bodies, strict=True):
        assert body == item.content.read(0, item.size)
    assert monitor.peak <= 14 * MIB
    record_result(
        "evicting_while_read",
        clients,
        most_bytes=monitor.peak,
        at_rest_after=await wait_until_settled(chaos, [*slow, *others]),
    )


@pytest.mark.chaos
@pytest.mark.timeout(240)
@pytest.mark.parametrize("jump", [3600, -3600])
async def test_the_clock_jumps_by_an_hour(chaos: ChaosHarness, jump: int, faketime_library: str) -> None:
    """For every process of the node, under load. (Redis, whose clock times leases, cannot be given a clock of its own:
    its allocator and libfaketime do not agree. The store's clock jumps in test_model.)"""
    objects = mixed_objects(28)
    place = chaos.stack.folder / "clock"
    place.write_text("+0")
    clock = {
        "LD_PRELOAD": faketime_library,
        "FAKETIME_TIMESTAMP_FILE": str(place),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    chaos.stack.environment |= clock
    clients = await chaos.up(objects, 400 * MIB, fetchers=2)
    async with clients.running(4):
        await asyncio.sleep(4)
        place.write_text(f"{jump:+d}")
        await asyncio.sleep(6)
        place.write_text("+0")
        await asyncio.sleep(4)
    clients.check()
    await cache_all(chaos, objects)
    downloads = completed_downloads(chaos)
    assert max(downloads.values()) == 1, (
        f"a lease granted twice, or objects evicted: {downloads.most_common(5)}"
    )
    assert not [event for process in chaos.stack.of("evictor") for event in events(process, "object_evicted")]
    record_result(
        f"clock_{jump:+d}s", clients, evicted=0, at_rest_after=await wait_until_settled(chaos, objects)
    )


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_a_stop_of_everything_under_load(chaos: ChaosHarness) -> None:
    """SIGTERM to all at once: answers under way end whole, downloads are kept and gone on from, exit code 0."""
    objects = mixed_objects(28)
    large = generated_object("9001", 24 * MIB)
    clients = await chaos.up([*objects, large], 400 * MIB)
    clients.objects = objects
    await cache_all(chaos, objects)
    hit = generated_object("9001", 24 * MIB)

    async def slow_download() -> bool:
        return (await get(chaos.stack.url(hit.object_id), timeout=90)).complete

    chaos.to_first.bytes_per_second = chaos.to_second.bytes_per_second = 4 * MIB
    async with clients.running(4):
        following = asyncio.create_task(slow_download())
        await chaos.stack.until_on_volume(sum(item.size for item in objects) + 4 * MIB)
        began = time.monotonic()
        with clients.fault(grace=1):
            codes = await asyncio.gather(*(process.stop(60) for process in chaos.stack.processes))
            took = time.monotonic() - began
            kept = [path.stat().st_size for path in (chaos.stack.volume / "incoming").glob("*.part")]
            chaos.to_first.heal()
            chaos.to_second.heal()
            for process in chaos.stack.processes:
                process.start()
            await chaos.stack.ready()
    assert codes == [0, 0, 0]
    assert not [failure for failure in clients.failures if "cut" in failure.description], (
        "answers under way end whole"
    )
    clients.check()
    assert await following, "an answer that follows a download ends whole, too"
    assert kept, "the download is kept"
    await get_correct(chaos, large)
    await cache_all(chaos, [large])
    asked = [
        record.range for node in (chaos.first, chaos.second) for record in node.requests.of("9001", "GET")
    ]
    assert any(text and not text.startswith("bytes=0-") for text in asked), asked
    record_result(
        "sigterm",
        clients,
        stopped_after=took,
        at_rest_after=await wait_until_settled(chaos, [*objects, large]),
    )
