"""Large objects are fetched as far as they are watched: a whole node, two API processes, real Redis and RabbitMQ."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from redis import asyncio as aioredis

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.chaos.figures import record_result
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.waiting import eventually

FILM = generated_object("41", 41 * MIB + 4321)
OTHER = generated_object("42", MIB + 17)
SECOND_FILM = generated_object("43", 30 * MIB + 17)
WINDOW = 4 * MIB
TENTH = FILM.size // 10
SLACK = 3 * MIB
"""What a response is ahead of its client, and what was received and not written. The kernel holds more of it."""
SETTINGS = {
    "DISTRIBUTOR_FETCH__WINDOW": "4M",
    "DISTRIBUTOR_FETCH__VIEWER_TIMEOUT": "1",
    # The film alone is above the low watermark: there is no room for what is not watched.
    "DISTRIBUTOR_STORAGE__LOW_WATERMARK": "0.02",
    "DISTRIBUTOR_STORAGE__HIGH_WATERMARK": "0.9",
    # On a busy machine nothing is proxied because it is slow: bytes can be counted.
    "DISTRIBUTOR_PUBLIC_API__FIRST_BYTE_WAIT": "30",
    "DISTRIBUTOR_PUBLIC_API__FAR_RANGE_WAIT": "20",
    "DISTRIBUTOR_PUBLIC_API__STALLED_FETCH_WAIT": "20",
}
_AGE_VIEW = """
local fetch = cmsgpack.unpack(redis.call('HGET', KEYS[1], ARGV[1]))
fetch[13][2] = fetch[13][2] - 300000
redis.call('HSET', KEYS[1], ARGV[1], cmsgpack.pack(fetch))
"""


class Viewer:
    """A client that reads when it is told to. Its buffers are small, so the node knows where it is."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.headers: dict[str, str] = {}
        self.body = bytearray()

    async def start(self) -> None:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        for line in head.split("\r\n")[1:-2]:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    async def read_to(self, position: int, rate: float = float("inf")) -> None:
        """Read on until it has so many bytes, at most `rate` a second."""
        loop = asyncio.get_running_loop()
        began, before = loop.time(), len(self.body)
        while len(self.body) < position:
            data = await self._reader.read(min(64 * 1024, position - len(self.body)))
            assert data, f"cut after {len(self.body)} bytes"
            self.body += data
            due = began + (len(self.body) - before) / rate
            await asyncio.sleep(max(0.0, due - loop.time()))


@asynccontextmanager
async def viewer(harness: Harness, film: DemoObject = FILM) -> AsyncIterator[Viewer]:
    """One that has the head of the whole object. It leaves at the end of the block."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
    connection.setblocking(False)
    port = harness.stack.port
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=64 * 1024)
    try:
        path = harness.stack.url(film.object_id).partition(str(port))[2]
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        one = Viewer(reader)
        async with asyncio.timeout(60):
            await one.start()
        yield one
        assert one.body == film.content.read(0, len(one.body))
    finally:
        writer.transport.abort()


def sent(node: StorageNode) -> int:
    return sum(record.bytes_sent for record in node.requests)


def ranges(node: StorageNode) -> list[str | None]:
    return [record.range for record in node.requests.of(FILM.object_id, "GET")]


async def start(
    harness: Harness,
    settings: Mapping[str, str] | None = None,
    *,
    rate: int = 40 * MIB,
) -> None:
    harness.publish([FILM, OTHER, SECOND_FILM])
    harness.first.faults.add(Fault(bytes_per_second=rate))
    harness.stack.environment |= SETTINGS | dict(settings or {})
    await harness.stack.up(workers=2)


async def metric(harness: Harness, line: str) -> float:
    """The value of one series of the first fetcher; 0 if it has none."""
    page = (await get(f"{harness.stack.of('fetcher')[-1].health_url}/metrics")).body.decode()
    values = [text.rpartition(" ")[2] for text in page.splitlines() if text.startswith(line + " ")]
    return float(values[0]) if values else 0.0


async def received(harness: Harness) -> int:
    """Bytes that the fetcher has read from sources."""
    page = (await get(f"{harness.stack.of('fetcher')[-1].health_url}/metrics")).body.decode()
    name = "distributor_source_bytes_total{"
    return int(sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name)))


async def until_paused(harness: Harness, times: int = 1) -> None:
    """Return once a fetch has ended for lack of viewers, for the n-th time."""

    async def paused() -> bool:
        return await metric(harness, 'distributor_fetches_total{outcome="paused"}') >= times

    await eventually(paused, pause=0.1)


async def let_the_view_end(harness: Harness) -> None:
    """As if its first request had been 300 seconds earlier."""
    environment = harness.stack.environment
    client = aioredis.Redis.from_url(environment["DISTRIBUTOR_STATE_STORE__URL"], protocol=2)
    key = environment["DISTRIBUTOR_STATE_STORE__PREFIX"] + "fetches"
    await client.eval(_AGE_VIEW, 1, key, FILM.object_id)
    await client.aclose()


async def test_an_abandoned_film_costs_what_was_watched_and_a_second_view_completes_it(
    harness: Harness,
) -> None:
    await start(harness)
    async with viewer(harness) as first:
        await first.read_to(TENTH)
    await until_paused(harness)
    watched = await received(harness)
    record_result(
        "abandoned_at_a_tenth", films=watched / FILM.size, sent_films=sent(harness.first) / FILM.size
    )
    assert TENTH < watched <= TENTH + WINDOW + SLACK
    # The storage node notices a moment later that the connection is closed.
    await eventually(
        lambda: [record.aborted for record in harness.first.requests.of(FILM.object_id)] == [True]
    )
    status = await get(harness.stack.url(FILM.object_id), method="HEAD")
    assert status.headers.get("x-cache") != "hit"
    async with viewer(harness) as same_view:
        assert same_view.headers["x-cache"] == "pending"
        await same_view.read_to(2 * TENTH)
    await until_paused(harness, 2)
    assert len(ranges(harness.first)) == 2
    assert ranges(harness.first)[1] is not None
    await let_the_view_end(harness)
    async with viewer(harness) as second:
        await second.read_to(FILM.size // 5 + MIB)
        await harness.stack.until_hit(FILM.object_id)
    assert await metric(harness, 'distributor_windowed_fetches_total{reason="second_view"}') == 1
    async with viewer(harness) as third:
        assert third.headers["x-cache"] == "hit"
        await third.read_to(FILM.size)
    assert await received(harness) == FILM.size


async def test_a_slow_viewer_gets_all_and_the_source_is_never_far_ahead(harness: Harness) -> None:
    await start(harness, rate=8 * MIB)
    ahead = []
    async with viewer(harness) as one:
        watching = asyncio.create_task(one.read_to(FILM.size, rate=4 * MIB))
        while not watching.done():
            if len(one.body) < FILM.size * 3 // 4:
                ahead.append(harness.stack.bytes_on_volume() - len(one.body))
            await asyncio.sleep(0.05)
        await watching
    record_result("half_speed", furthest_ahead=max(ahead), requests=len(ranges(harness.first)))
    assert max(ahead) <= WINDOW + SLACK
    assert ranges(harness.first) == [None]
    await harness.stack.until_hit(FILM.object_id)


async def test_viewers_of_two_processes_are_followed(harness: Harness) -> None:
    """Of several viewers the furthest counts, whichever process serves it."""
    await start(harness, {"DISTRIBUTOR_FETCH__VIEWER_TIMEOUT": "60"})
    async with viewer(harness) as one, viewer(harness) as two, viewer(harness) as three:
        for position in (2 * MIB, 8 * MIB, 14 * MIB):
            for client in (one, two, three):
                await client.read_to(position)
                assert harness.stack.bytes_on_volume() <= position + WINDOW + SLACK
        for client in (three, one, two):
            await client.read_to(FILM.size)
    await harness.stack.until_hit(FILM.object_id)
    assert ranges(harness.first) == [None]


async def test_a_paused_download_leaves_its_slot_to_others(harness: Harness) -> None:
    one_slot = {"DISTRIBUTOR_FETCH__CONCURRENCY": "1", "DISTRIBUTOR_FETCH__CONCURRENCY_PER_SOURCE": "1"}
    await start(harness, one_slot)
    async with viewer(harness) as one:
        await one.read_to(MIB)

        async def paused() -> bool:
            return await metric(harness, "distributor_paused_downloads_in_progress") == 1

        await eventually(paused, pause=0.1)
        async with viewer(harness, OTHER) as other:
            await other.read_to(OTHER.size)
        await harness.stack.until_hit(OTHER.object_id)
        await one.read_to(FILM.size)
    await harness.stack.until_hit(FILM.object_id)
    assert ranges(harness.first) == [None]


async def test_a_paused_download_leaves_its_room_to_others_and_its_viewer_gets_all(harness: Harness) -> None:
    """There is no room for both films, and neither may be evicted."""
    limit = 60 * MIB
    await start(
        harness, {"DISTRIBUTOR_STORAGE__LIMIT": str(limit), "DISTRIBUTOR_FETCH__VIEWER_TIMEOUT": "60"}
    )
    async with viewer(harness) as one:
        await one.read_to(MIB)

        async def paused() -> bool:
            return await metric(harness, "distributor_paused_downloads_in_progress") == 1

        await eventually(paused, pause=0.1)
        async with viewer(harness, SECOND_FILM) as two:
            await two.read_to(SECOND_FILM.size)
        await harness.stack.until_hit(SECOND_FILM.object_id)
        assert await metric(harness, 'distributor_fetches_total{outcome="paused"}') == 1
        assert [record.range for record in harness.first.requests.of(SECOND_FILM.object_id, "GET")] == [None]
        await one.read_to(FILM.size)
    assert harness.stack.bytes_on_volume() <= limit


async def test_a_source_that_closes_during_a_pause_is_not_blamed(harness: Harness) -> None:
    harness.first.faults.add(Fault(cut_after=20 * MIB), Match(first=1, object_id=FILM.object_id))
    await start(harness)
    async with viewer(harness) as one:
        await one.read_to(MIB)
        await asyncio.sleep(1.0)
        await one.read_to(FILM.size * 3 // 4, rate=10 * MIB)
        await one.read_to(FILM.size)
    assert ranges(harness.first) == [None, f"bytes={20 * MIB}-{FILM.size - 1}"]
    page = (await get(f"{harness.stack.of('fetcher')[0].health_url}/metrics")).body.decode()
    assert "distributor_source_failures_total{" not in page


async def test_a_killed_fetcher_loses_nothing_that_it_had_named(harness: Harness) -> None:
    await start(
        harness,
        {
            "DISTRIBUTOR_FETCH__VIEWER_TIMEOUT": "60",
            "DISTRIBUTOR_FETCH__LEASE": "2",
            "DISTRIBUTOR_FETCH__LEASE_RENEWAL": "0.5",
        },
    )
    async with viewer(harness) as one:
        await one.read_to(2 * MIB)
        await harness.stack.until_on_volume(2 * MIB + WINDOW)
        harness.stack.of("fetcher")[0].kill()
        harness.stack.add("fetcher")
        await harness.stack.ready()
        await one.read_to(FILM.size)
    await harness.stack.until_hit(FILM.object_id)
    first, second = ranges(harness.first)
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").partition("-")[0]) >= 2 * MIB + WINDOW


@pytest.mark.parametrize(
    "settings",
    [{"DISTRIBUTOR_FETCH__WINDOW": "off"}, {"DISTRIBUTOR_STORAGE__LOW_WATERMARK": "0.8"}],
    ids=["off", "ample_room"],
)
async def test_all_of_an_abandoned_film_is_fetched(harness: Harness, settings: Mapping[str, str]) -> None:
    await start(harness, settings)
    async with viewer(harness) as one:
        await one.read_to(MIB)
    await harness.stack.until_hit(FILM.object_id)
    assert ranges(harness.first) == [None]


async def test_a_viewer_who_jumps_at_a_source_that_ignores_ranges_gets_the_range(harness: Harness) -> None:
    """The window does not keep the fetch from reading all that comes before the range."""
    patient = {
        "DISTRIBUTOR_PUBLIC_API__FAR_RANGE_WAIT": "0.5",
        "DISTRIBUTOR_PUBLIC_API__PROXIED_FIRST_BYTE_WAIT": "60",
        "DISTRIBUTOR_FETCH__VIEWER_TIMEOUT": "60",
    }
    harness.first.faults.add(Fault(bytes_per_second=20 * MIB, ignore_range=True))
    await start(harness, patient)
    first = 30 * MIB
    answer = await get(
        harness.stack.url(FILM.object_id), {"Range": f"bytes={first}-{first + MIB - 1}"}, timeout=120
    )
    assert (answer.status, answer.complete) == (206, True)
    assert answer.body == FILM.content.read(first, MIB)
    assert answer.headers["x-data-source"] == "local"
    assert len([asked for asked in ranges(harness.first) if asked is None]) == 1
