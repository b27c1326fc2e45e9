"""`docker compose up` with a changed setting, while clients are there."""

from __future__ import annotations

import asyncio

import pytest

from tests.docker.world import NOTES, Traffic, World
from tests.end_to_end.client import get

pytestmark = pytest.mark.docker

RETRY_AFTER = 45.0
"""Seconds; longer than one API container takes to be replaced, on a busy machine too."""


def replaced(world: World) -> str:
    """The id of the API's container: another one once it was replaced."""
    return world.stack.compose("ps", "--quiet", "api")


def own_address(world: World) -> str:
    """Where the API's container is reached without a published port."""
    (container,) = [
        one
        for one in world.stack.containers()
        if one["Config"]["Labels"]["com.docker.compose.service"] == "api"
    ]
    (address,) = [
        network["IPAddress"]
        for name, network in container["NetworkSettings"]["Networks"].items()
        if name.endswith("_outside")
    ]
    return f"{address}:3334"


async def test_a_changed_setting_costs_no_request(world: World) -> None:
    """With the edge in front nobody notices; without it, whoever finds nobody there and asks once more is answered."""
    await world.cached(["1"])
    before = replaced(world)
    world.stack.settings["LOG_LEVEL"] = "debug"
    body = world.body_of("1")
    async with (
        Traffic(world.stack.edge_url("/api/v1/assets/1"), body) as edge,
        Traffic(world.stack.url("1"), body, retry_after=RETRY_AFTER) as direct,
    ):
        await asyncio.sleep(1)
        await asyncio.to_thread(world.stack.up)
        await asyncio.sleep(1)
    NOTES.append(
        f"edge: {edge.asked} requests, slowest {edge.slowest:.1f} s; direct: {direct.asked}, {direct.refused} twice"
    )
    assert replaced(world) != before
    assert edge.failures == []
    assert direct.failures == []
    assert edge.asked > 200


async def test_answers_under_way_end_well(world: World) -> None:
    """A replaced container sends what it has begun, through the edge and without it. (Without it: at the container's
    own address: Docker's forwarder on 127.0.0.1 ends with the container, whatever it still holds for its client.)"""
    await world.cached(["64"])
    slow = [
        asyncio.create_task(_slowly(url, world.objects["64"].size))
        for url in (
            world.stack.edge_url("/api/v1/assets/64"),
            f"http://{own_address(world)}/api/v1/assets/64",
        )
    ]
    await asyncio.sleep(1)
    world.stack.settings["LOG_LEVEL"] = "info"
    await asyncio.to_thread(world.stack.up)
    assert await asyncio.gather(*slow) == [True, True]


async def _slowly(url: str, size: int) -> bool:
    """A client that takes about eight seconds for a whole answer."""
    answer = await get(url, {"Range": "bytes=0-0"})
    assert answer.status == 206
    host, _, path = url.removeprefix("http://").partition("/")
    reader, writer = await asyncio.open_connection(*host.split(":"), limit=64 * 1024)
    try:
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        received = 0
        while piece := await reader.read(1024**2):
            received += len(piece)
            await asyncio.sleep(8 * len(piece) / size)
        return received == size
    finally:
        writer.transport.abort()
