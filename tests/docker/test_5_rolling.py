"""`docker compose up` with a changed setting while clients send requests."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from tests.docker.compose import ROOT
from tests.docker.harness import NOTES, Harness, Traffic
from tests.end_to_end.client import get

pytestmark = pytest.mark.docker

RETRY_AFTER = float(re.findall(r"asks again after (\d+) s", (ROOT / "docs" / "deployment.md").read_text())[0])
"""Seconds; what docs/deployment.md tells clients without an edge to wait."""
MIB = 1024**2


def replaced(harness: Harness) -> str:
    """The id of the API's container: another one once it was replaced."""
    return harness.stack.compose("ps", "--quiet", "api")


def own_address(harness: Harness) -> str:
    """Where the API's container is reached without a published port."""
    (container,) = [
        one
        for one in harness.stack.containers()
        if one["Config"]["Labels"]["com.docker.compose.service"] == "api"
    ]
    (address,) = [
        network["IPAddress"]
        for name, network in container["NetworkSettings"]["Networks"].items()
        if name.endswith("_outside")
    ]
    return f"{address}:3334"


async def test_a_changed_setting_costs_no_request(harness: Harness) -> None:
    """With the edge in front no client notices. Without it a client that is refused succeeds at its next attempt.
    Docker's forwarder accepts connections before the container does. Without the forwarder, the container answers
    every connection that it has not refused."""
    await harness.cached(["1"])
    before = replaced(harness)
    harness.stack.settings["LOG_LEVEL"] = "debug"
    body = harness.body_of("1")
    async with (
        Traffic(harness.stack.edge_url("/api/v1/assets/1"), body) as edge,
        Traffic(harness.stack.url("1"), body, retry_after=RETRY_AFTER, forwarded=True) as direct,
        Traffic(harness.stack.url("1"), body, clients=1, forwarded=True) as watch,
        Traffic(
            f"http://{own_address(harness)}/api/v1/assets/1", body, clients=16, until_refused=True
        ) as inside,
    ):
        await asyncio.sleep(1)
        await asyncio.to_thread(harness.stack.up)
        await asyncio.sleep(1)
    NOTES.append(
        f"API replaced: edge: {edge.asked} requests, slowest {edge.slowest:.1f} s; "
        f"without it no answer for {watch.longest_gap:.1f} s, {direct.refused} of {direct.asked} asked twice; "
        f"{inside.asked} connections to the container itself until it refused, "
        f"{len(inside.failures)} of them closed unanswered"
    )
    assert replaced(harness) != before
    assert edge.failures == []
    assert direct.failures == []
    assert direct.refused > 0
    assert inside.failures == []
    assert inside.refused == inside.clients
    assert inside.asked > 0
    assert watch.longest_gap < RETRY_AFTER
    assert edge.asked > 200


async def test_the_edge_waits_for_as_long_as_a_stop_may_take(harness: Harness) -> None:
    """A client that reads slowly keeps the container that leaves for all of the shutdown deadline."""
    await harness.cached(["1", "64"])
    address = own_address(harness)
    reading = asyncio.create_task(_slowly(f"http://{address}/api/v1/assets/64", 64 * MIB, seconds=90))
    harness.stack.settings["LOG_LEVEL"] = "warning"
    async with Traffic(harness.stack.edge_url("/api/v1/assets/1"), harness.body_of("1")) as edge:
        await asyncio.sleep(1)
        began = time.monotonic()
        await asyncio.to_thread(harness.stack.up)
        took = time.monotonic() - began
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    NOTES.append(f"API replaced in {took:.1f} s past a slow client: the edge's slowest {edge.slowest:.1f} s")
    assert took > 30
    assert edge.failures == []


async def test_responses_in_progress_complete(harness: Harness) -> None:
    """A replaced container sends what it has begun, through the edge and without it. (Without it: at the container's
    own address: Docker's forwarder on 127.0.0.1 ends with the container, whatever it still holds for its client.)"""
    await harness.cached(["64"])
    slow = [
        asyncio.create_task(_slowly(url, harness.objects["64"].size))
        for url in (
            harness.stack.edge_url("/api/v1/assets/64"),
            f"http://{own_address(harness)}/api/v1/assets/64",
        )
    ]
    await asyncio.sleep(1)
    harness.stack.settings["LOG_LEVEL"] = "info"
    await asyncio.to_thread(harness.stack.up)
    assert await asyncio.gather(*slow) == [True, True]


async def _slowly(url: str, size: int, seconds: float = 8) -> bool:
    """A client that takes about so many seconds for a whole answer."""
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
            await asyncio.sleep(seconds * len(piece) / size)
        return received == size
    finally:
        writer.transport.abort()
