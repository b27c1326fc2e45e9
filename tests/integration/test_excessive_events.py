"""Servers that are not ours and respond in as many parts as they can: sources, origins, squids, chain nodes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve

from distributor_node.shared.adapters.catalogs.joystream import ChainHead
from distributor_node.shared.adapters.catalogs.joystream.endpoint import STATUS, GraphqlEndpoint
from distributor_node.shared.adapters.catalogs.origin import OriginCatalog
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits
from distributor_node.shared.adapters.sources.client import Expected
from distributor_node.shared.domain.conditionals import Version
from distributor_node.shared.domain.errors import CatalogUnavailable, SourceWrong
from distributor_node.shared.domain.objects import ObjectId

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"
LONG = 20.0  # seconds; reached only without the bounds
LIMITS = SourceLimits(first_byte_timeout=LONG, stall_timeout=LONG)


@asynccontextmanager
async def server(
    pieces: Callable[[], Iterable[bytes]], connections: list[object] | None = None
) -> AsyncIterator[str]:
    """A server that sends these bytes, each write by itself, and its URL. Connections are added to `connections`."""
    serving: set[asyncio.Task[None] | None] = set()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        if connections is not None:
            connections.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                for piece in pieces():
                    writer.write(piece)
                    await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return  # the client has left
        finally:
            writer.close()

    listener = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    await asyncio.gather(*filter(None, serving))


async def read_sizes(client: SourceClient, url: str, size: int) -> list[int]:
    async with client.get(f"{url}/1", None, Expected(Version(size=size))) as response:
        return [len(chunk) async for chunk in response.chunks]


def interim_without_end() -> Iterable[bytes]:
    return itertools.repeat(INTERIM * 500)


def tiny_chunks() -> Iterable[bytes]:
    return itertools.chain([CHUNKED], itertools.repeat(b"1\r\n \r\n" * 2_000, 300))


def header_lines() -> Iterable[bytes]:
    return itertools.chain([HEAD], itertools.repeat(b"a:b\r\n" * 500, 100))


HOSTILE = pytest.mark.parametrize("pieces", [interim_without_end, tiny_chunks, header_lines])


@HOSTILE
async def test_a_source(pieces: Callable[[], Iterable[bytes]]) -> None:
    async with server(pieces) as url, SourceClient(LIMITS) as client:
        with pytest.raises(SourceWrong, match="expected"):
            await read_sizes(client, url, 600_000)


@HOSTILE
async def test_a_squid(pieces: Callable[[], Iterable[bytes]]) -> None:
    async with server(pieces) as url:
        endpoint = GraphqlEndpoint(f"{url}/graphql")
        await endpoint.open()
        with pytest.raises(CatalogUnavailable, match="ExcessiveEvents"):
            await endpoint.ask(STATUS, {}, LONG, 1_000_000)
        await endpoint.close()


@HOSTILE
async def test_a_chain_node(pieces: Callable[[], Iterable[bytes]]) -> None:
    async with server(pieces) as url:
        with pytest.raises(CatalogUnavailable, match="ExcessiveEvents"):
            await ChainHead(url, LONG).head()


@pytest.mark.parametrize("pieces", [interim_without_end, header_lines])
async def test_an_origin(pieces: Callable[[], Iterable[bytes]]) -> None:
    async with server(pieces) as url:
        catalog = OriginCatalog(url + "/{id}", LONG)
        await catalog.open()
        with pytest.raises(CatalogUnavailable, match="expected at most"):
            await catalog.look_up(ObjectId("1"))
        await catalog.close()


async def test_a_chain_node_that_sends_pings_without_end() -> None:
    async def ping(connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.write(b"\x89\x00" * 100_000)
        await connection.wait_closed()

    async with serve(ping, "127.0.0.1", 0) as listener:
        host, port = listener.sockets[0].getsockname()[:2]
        with pytest.raises(CatalogUnavailable, match="cannot be reached"):
            await ChainHead(f"ws://{host}:{port}", LONG).head()


async def test_a_body_in_segments_of_one_byte_is_read_in_few_pieces() -> None:
    size = 20_000

    def pieces() -> Iterable[bytes]:
        return itertools.chain([HEAD + b"Content-Length: %d\r\n\r\n" % size], itertools.repeat(b"x", size))

    async with server(pieces) as url, SourceClient(LIMITS) as client:
        read = await read_sizes(client, url, size)
    assert sum(read) == size
    assert len(read) < size // 10


async def test_a_chunked_body_leaves_its_connection_usable() -> None:
    connections: list[object] = []
    content = b"content of an object" * 50

    def pieces() -> Iterable[bytes]:
        return [CHUNKED, b"%x\r\n" % len(content), content + b"\r\n0\r\n", b"\r\n"]

    async with server(pieces, connections) as url, SourceClient(LIMITS) as client:
        for _ in range(3):
            async with client.get(f"{url}/1", None, Expected(Version(size=len(content)))) as response:
                assert b"".join([chunk async for chunk in response.chunks]) == content
    assert len(connections) == 1
