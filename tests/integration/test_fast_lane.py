"""Long bodies on the fast lane: what else arrives meanwhile, how they end, and what is counted."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from shared.adapters.volume import RemovalState
from shared.domain.objects import ObjectId
from tests.integration.assets_world import KIB, MIB, AssetsWorld, assets_world

LARGE = 12 * MIB + 5


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[AssetsWorld]:
    async with assets_world(tmp_path) as running:
        for object_id, size in (("1", 10 * KIB), ("2", LARGE)):
            running.add(object_id, size)
            running.store(object_id)
        yield running


def ask(object_id: str, more: str = "") -> bytes:
    return f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_requests_sent_ahead_are_answered_after_a_long_body(world: AssetsWorld) -> None:
    reader, writer = await world.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    for more in (ask("1") + ask("1", "Range: bytes=5-9\r\n"), b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"):
        writer.write(more)
        await asyncio.sleep(0.01)
    assert await reader.readexactly(LARGE) == world.data["2"]
    assert (await read_answer(reader))[1] == world.data["1"]
    assert (await read_answer(reader))[1] == world.data["1"][5:10]
    assert b"ok" in (await read_answer(reader))[1]
    writer.write(ask("1"))
    assert (await read_answer(reader))[1] == world.data["1"]


async def test_a_client_that_takes_little_is_not_buffered_for(world: AssetsWorld) -> None:
    readers = []
    for _ in range(3):
        reader, writer = await world.connect()
        writer.write(ask("2"))
        await reader.readuntil(b"\r\n\r\n")
        readers.append(reader)
    await asyncio.sleep(0.2)
    reader, writer = await world.connect()  # others are served meanwhile
    writer.write(ask("1"))
    assert (await read_answer(reader))[1] == world.data["1"]
    for reader in readers:
        assert await reader.readexactly(LARGE) == world.data["2"]


async def test_a_stop_lets_a_long_body_end(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(assets_world(tmp_path))
        data = world.add("2", LARGE)
        world.store("2")
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(ask("2"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in head
        closing = asyncio.create_task(stack.aclose())
        await asyncio.sleep(0.1)
        body = bytearray()
        while piece := await reader.read(MIB):
            body += piece
        assert bytes(body) == data
        await closing
        writer.close()


async def test_a_client_that_leaves_is_noticed_and_lets_go(world: AssetsWorld) -> None:
    before = counted("distributor_cut_answers_total", reason="client_left")
    reader, writer = await world.connect()
    writer.write(ask("2"))
    await reader.readexactly(1000)
    writer.transport.abort()
    await world.until(lambda _: counted("distributor_cut_answers_total", reason="client_left") == before + 1)
    await world.until(lambda running: running.open_files() == 0)


async def test_a_file_cut_short_while_it_is_sent_ends_the_connection(world: AssetsWorld) -> None:
    before = counted("distributor_cut_answers_total", reason="object_unreadable")
    reader, writer = await world.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    os.truncate(next((world.volume.root / "objects").glob("*/2")), MIB)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(LARGE)
    assert counted("distributor_cut_answers_total", reason="object_unreadable") == before + 1


async def test_what_is_being_sent_is_in_use(world: AssetsWorld) -> None:
    reader, writer = await world.connect()
    writer.write(ask("2"))
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(1.6)  # longer than an idle object is kept open
    removal = world.volume.removal(ObjectId("2"))
    assert removal.begin() is RemovalState.IN_USE
    removal.set_aside()
    assert await reader.readexactly(LARGE) == world.data["2"]
    await world.until(lambda running: running.open_files() == 0)
    assert removal.begin() is RemovalState.READY
    removal.close()


async def test_answers_and_accesses_are_counted(world: AssetsWorld) -> None:
    names = {"method": "GET", "status": "200", "cache": "hit"}
    before = (
        counted("distributor_requests_total", **names),
        counted("distributor_sent_bytes_total", source="local"),
        counted("distributor_time_to_first_byte_seconds_count", cache="hit"),
    )
    reader, writer = await world.connect()
    for object_id in ("1", "2", "1"):
        writer.write(ask(object_id))
        assert (await read_answer(reader))[1] == world.data[object_id]
    await world.until(lambda _: counted("distributor_requests_total", **names) == before[0] + 3)
    assert counted("distributor_sent_bytes_total", source="local") == before[1] + LARGE + 20 * KIB
    assert counted("distributor_time_to_first_byte_seconds_count", cache="hit") == before[2] + 3
