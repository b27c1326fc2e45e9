"""Far ranges of a source that ignores ranges, at a node of a fleet that leaves the fetch to the object's home."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from distributor_node.services.api.assets.proxy import ProxiedResponse, Proxy
from distributor_node.services.demo.faults import Fault
from distributor_node.services.demo.objects import MIB, DemoObject
from tests.end_to_end.client import Answer
from tests.integration.fleet_harness import Fleet, fleet_of, start_all

FIRST = 20 * MIB


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two nodes, not started."""
    async with fleet_of(2, tmp_path) as made:
        yield made


def publish(fleet: Fleet, home: str, bytes_per_second: int) -> DemoObject:
    item = fleet.homed_at(home, 24 * MIB)
    fleet.publish(item)
    fleet.far.faults.add(Fault(ignore_range=True, bytes_per_second=bytes_per_second))
    return item


async def far_range(fleet: Fleet, item: DemoObject, length: int = MIB) -> Answer:
    """Ask the node that does not keep the object."""
    return await fleet.get(fleet.bases[1], item.object_id, Range=f"bytes={FIRST}-{FIRST + length - 1}")


@pytest.mark.parametrize("length", [MIB, 1000])
async def test_a_range_is_waited_for_that_the_fetch_of_the_home_brings(fleet: Fleet, length: int) -> None:
    """Longer than one request to the home may take."""
    item = publish(fleet, fleet.bases[0], 8 * MIB)
    fleet.waits = {"public_api": {"proxied_first_byte_wait": 60}, "fetch": {"first_byte_timeout": 1}}
    await start_all(fleet, hot_views=1000)
    answer = await far_range(fleet, item, length)
    assert (answer.status, answer.body) == (206, item.content.read(FIRST, length))
    assert not fleet.stored(fleet.bases[1], item.object_id)
    wholes = [one for one in fleet.far.requests.of(item.object_id, "GET") if one.range is None]
    assert len(wholes) == 1


async def test_a_range_that_comes_too_late_is_to_be_asked_for_again(fleet: Fleet) -> None:
    item = publish(fleet, fleet.bases[0], MIB)
    fleet.waits = {"public_api": {"proxied_first_byte_wait": 1.5}, "fetch": {"first_byte_timeout": 1}}
    await start_all(fleet, hot_views=1000)
    for _ in range(2):
        answer = await far_range(fleet, item)
        assert (answer.status, answer.json()["type"]) == (503, "range_not_fetched_yet")
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_source_is_not_asked_again_for_a_range_that_it_ignores(fleet: Fleet) -> None:
    """Neither by the home, nor by the node that asks it."""

    def asked() -> int:
        return sum(one.range is not None for one in fleet.far.requests.of(item.object_id, "GET"))

    item = publish(fleet, fleet.bases[0], MIB)
    fleet.waits = {"public_api": {"proxied_first_byte_wait": 1.5}, "fetch": {"first_byte_timeout": 1}}
    await start_all(fleet, hot_views=1000)
    assert (await far_range(fleet, item)).status == 503
    before = asked()
    assert (await far_range(fleet, item)).json()["type"] == "range_not_fetched_yet"
    assert asked() == before


@asynccontextmanager
async def scripted_home(answer: bytes) -> AsyncIterator[str]:
    """The base URL of a node that is alive, and answers each request for an object with `answer`, if with anything."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" if b"/status" in head else answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("said", "status", "kind", "retry_after"),
    [
        (b"503 Busy\r\nRetry-After: 7", 503, "range_not_fetched_yet", "7"),
        (b"503 Busy\r\nRetry-After: soon", 503, "range_not_fetched_yet", "5"),
        (b"502 Failed", 502, "sources_failed", None),
        (b"404 Unknown", 502, "sources_failed", None),
        (b"", 503, "range_not_fetched_yet", "2"),
    ],
)
async def test_what_the_home_says_of_the_range_is_passed_on(
    fleet: Fleet, said: bytes, status: int, kind: str, retry_after: str | None
) -> None:
    response = b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % said if said else b""
    async with scripted_home(response) as home:
        fleet.bases[0] = home
        item = publish(fleet, home, 8 * MIB)
        await fleet.start(fleet.bases[1], hot_views=1000)
        answer = await far_range(fleet, item)
        assert (answer.status, answer.json()["type"]) == (status, kind)
        assert answer.headers.get("retry-after") == retry_after


async def test_a_range_is_to_be_asked_for_again_whose_home_leaves_while_it_is_waited_for(
    fleet: Fleet,
) -> None:
    """As a node does that loses its power: it has said that it fetches the object, and answers nothing any more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/status" not in head:
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        fleet.bases[0] = home = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        item = publish(fleet, home, 8 * MIB)
        fleet.waits = {"public_api": {"proxied_first_byte_wait": 60}, "fetch": {"first_byte_timeout": 5}}
        await fleet.start(fleet.bases[1], hot_views=1000, first_byte_wait=1, probe_interval=0.1)
        answer = await far_range(fleet, item)
        assert (answer.status, answer.json()["type"]) == (503, "range_not_fetched_yet")
        assert answer.headers["retry-after"] == "2"


async def test_a_range_that_the_home_has_brought_is_not_taken_for_the_verified_object(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond, verified = Proxy.respond, []

    async def noted(self: Proxy, proxied: ProxiedResponse, *, follows_home: bool = False) -> bool | None:
        verified.append(await respond(self, proxied, follows_home=follows_home))
        return verified[-1]

    monkeypatch.setattr(Proxy, "respond", noted)
    item = publish(fleet, fleet.bases[0], 8 * MIB)
    fleet.waits = {"public_api": {"proxied_first_byte_wait": 60}, "fetch": {"first_byte_timeout": 1}}
    await start_all(fleet, hot_views=1000)
    assert (await far_range(fleet, item)).status == 206
    assert True not in verified
