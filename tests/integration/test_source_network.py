"""Connections to sources, and bodies that are read past the HTTP library."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from distributor_node.services.demo.faults import Fault
from distributor_node.services.demo.objects import GeneratedContent, bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits
from distributor_node.shared.adapters.sources.client import Expected
from distributor_node.shared.adapters.sources.network import connect, reload_certificates
from distributor_node.shared.domain.conditionals import ByteRange, Version
from distributor_node.shared.domain.errors import SourceTooSlow, SourceUnreachable
from tests.servers.unresponsive_server import unresponsive_server

SIZE = 12_000_000
LARGE = GeneratedContent(2, SIZE).read(0, SIZE)
SMALL = b"\n\r\n\n".join([b"a text with blank lines"] * 40_000)
LIMITS = SourceLimits(connect_timeout=2.0, first_byte_timeout=2.0, stall_timeout=2.0, minimum_rate=20_000)


@pytest.fixture
async def node() -> AsyncIterator[StorageNode]:
    async with StorageNode([bytes_object("1", LARGE), bytes_object("2", SMALL)]).run() as node:
        yield node


@pytest.fixture(params=[False, True], ids=["pieces", "views"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[SourceClient]:
    async with SourceClient(replace(LIMITS, large_reads=request.param)) as client:
        yield client


async def read(client: SourceClient, url: str, size: int, byte_range: ByteRange | None = None) -> bytes:
    async with client.get(url, byte_range, Expected(Version(size=size))) as answer:
        return b"".join([chunk async for chunk in answer.chunks])


async def test_a_large_unread_body_closes_the_connection_a_small_one_does_not(
    node: StorageNode, client: SourceClient
) -> None:
    assert await read(client, node.object_url("2"), len(SMALL)) == SMALL
    assert await read(client, node.object_url("1"), SIZE) == LARGE
    assert await read(client, node.object_url("2"), len(SMALL)) == SMALL
    assert [record.connection for record in node.requests] == [1, 1, 2]


async def test_a_large_range(node: StorageNode, client: SourceClient) -> None:
    wanted = ByteRange(1_000_001, SIZE - 1)
    assert await read(client, node.object_url("1"), SIZE, wanted) == LARGE[1_000_001:]


async def test_a_large_body_without_length_is_read_by_the_library(
    node: StorageNode, client: SourceClient
) -> None:
    node.faults.add(Fault(omit_content_length=True))
    assert await read(client, node.object_url("1"), SIZE) == LARGE


async def test_a_large_body_that_is_aborted(node: StorageNode, client: SourceClient) -> None:
    node.faults.add(Fault(cut_after=SIZE - 1))
    with pytest.raises(SourceUnreachable):
        await read(client, node.object_url("1"), SIZE)


async def test_a_large_body_that_stalls(node: StorageNode, client: SourceClient) -> None:
    node.faults.add(Fault(hang_after=SIZE // 2))
    with pytest.raises(SourceTooSlow):
        await read(client, node.object_url("1"), SIZE)


async def test_large_reads_use_memory_again_once_it_is_not_held(node: StorageNode) -> None:
    async with SourceClient(replace(LIMITS, large_reads=True)) as client:
        url, expected = node.object_url("1"), Expected(Version(size=SIZE))
        kept: list[bytes | memoryview] = []
        slabs: set[int] = set()
        async with client.get(url, None, expected) as answer:
            async for chunk in answer.chunks:
                if isinstance(chunk, memoryview):
                    slabs.add(id(chunk.obj))
                    if len(kept) < 2:
                        kept.append(chunk)
                del chunk
        assert 2 <= len(slabs) <= 4
        assert b"".join(kept) in LARGE  # neither was written again


async def test_a_reader_that_pauses_makes_the_source_wait(node: StorageNode, client: SourceClient) -> None:
    async with client.get(node.object_url("1"), None, Expected(Version(size=SIZE))) as answer:
        received = len(await anext(aiter(answer.chunks)))
        await asyncio.sleep(0.2)
        assert node.requests[0].bytes_sent < SIZE  # the rest is not in our memory
        async for chunk in answer.chunks:
            received += len(chunk)
    assert received == SIZE


@asynccontextmanager
async def answering(reply: bytes, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that gives each connection the same bytes in small pieces, and closes it; its port."""

    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await reader.readuntil(b"\r\n\r\n")
            for begin in range(min(200, len(reply))):
                writer.write(reply[begin : begin + 1])
                await writer.drain()
            writer.write(reply[200:])
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return  # the client has left
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*filter(None, serving))


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: %d\n\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n",
    ],
)
async def test_the_body_begins_where_the_head_ends(client: SourceClient, head: bytes) -> None:
    async with answering(head % SIZE + LARGE) as port:
        assert await read(client, f"http://127.0.0.1:{port}/1", SIZE) == LARGE


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for `localhost`, and its key, in one file."""
    made = tmp_path / "localhost.pem"
    key = tmp_path / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    made.write_bytes(made.read_bytes() + key.read_bytes())
    return made


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.parametrize("body", [LARGE, SMALL], ids=["large", "small"])
async def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    limits = replace(LIMITS, large_reads=True)
    async with SourceClient(limits) as client, answering(reply, server_context(certificate)) as port:
        assert await read(client, f"https://localhost:{port}/1", len(body)) == body
        with pytest.raises(SourceUnreachable):  # the certificate is another host's
            await read(client, f"https://127.0.0.1:{port}/1", len(body))


async def test_an_untrusted_certificate(client: SourceClient, certificate: Path) -> None:
    async with answering(b"", server_context(certificate)) as port:
        with pytest.raises(SourceUnreachable):
            await read(client, f"https://localhost:{port}/1", 1)


async def test_a_certificate_is_trusted_after_a_reload(
    client: SourceClient, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(SMALL) + SMALL
    async with answering(reply, server_context(certificate)) as port:
        with pytest.raises(SourceUnreachable):
            await read(client, f"https://localhost:{port}/1", len(SMALL))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "missing.pem"))
        await reload_certificates()  # is logged, and changes nothing
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        await reload_certificates()
        assert await read(client, f"https://localhost:{port}/1", len(SMALL)) == SMALL


async def test_a_handshake_that_never_ends() -> None:
    limits = SourceLimits(connect_timeout=0.3)
    async with SourceClient(limits) as client, answering(b"") as port:
        with pytest.raises(SourceUnreachable) as failed:
            await read(client, f"https://127.0.0.1:{port}/1", 1)
    assert failed.value.timed_out


async def test_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, unresponsive_server() as silent:
        mapped = f"::ffff:{silent[0]}"  # the flow label makes thirty addresses of it
        six = [
            (socket.AF_INET6, socket.SOCK_STREAM, 0, "", (mapped, silent[1], label, 0)) for label in range(30)
        ]
        found = [*six, (socket.AF_INET, socket.SOCK_STREAM, 0, "", server.getsockname())]

        async def resolve(*_: object, **__: object) -> list[object]:
            return list(found)

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        async with asyncio.timeout(60):  # the other family has the second turn, after 0.25 s
            with await connect("several.example", 80) as connected:
                assert connected.getpeername() == server.getsockname()


async def test_an_address_that_refuses_or_is_silent_does_not_keep_the_next_one_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.2", 0))
        with unresponsive_server() as silent:
            await check_dialling(monkeypatch, closed.getsockname(), silent, server.getsockname())


async def check_dialling(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]

    async def resolve(*_: object, **__: object) -> list[object]:
        return list(found)

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with asyncio.timeout(60):
        with await connect("several.example", 80) as connected:
            assert connected.getpeername() == addresses[-1]
    del found[1:]
    with pytest.raises(ConnectionRefusedError):
        await connect("several.example", 80)


@pytest.mark.parametrize("large_reads", [False, True])
def test_on_the_loop_of_the_services(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, large_reads: bool
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE + LARGE

    async def main() -> None:
        async with SourceClient(replace(LIMITS, large_reads=large_reads)) as client:
            for context, scheme in ((None, "http"), (server_context(certificate), "https")):
                async with answering(reply, context) as port:
                    assert await read(client, f"{scheme}://localhost:{port}/1", SIZE) == LARGE
                    await expect_refusal(client, port, scheme)

    uvloop.run(main())


async def expect_refusal(client: SourceClient, port: int, scheme: str) -> None:
    if scheme == "https":
        with pytest.raises(SourceUnreachable):  # the certificate is another host's
            await read(client, f"https://127.0.0.1:{port}/1", SIZE)


async def test_an_address_that_is_not_admitted_is_not_even_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as inner, socket.create_server(("127.0.0.1", 0)) as outer:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", server.getsockname()) for server in (inner, outer)
        ]

        async def resolve(*_: object, **__: object) -> list[object]:
            return list(found)

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        with await connect("several.example", 80, lambda address: address != "127.0.0.2") as connected:
            assert connected.getpeername() == outer.getsockname()
        del found[1:]
        with pytest.raises(OSError, match="private address"):
            await connect("several.example", 80, lambda address: address != "127.0.0.2")
        inner.setblocking(False)
        with pytest.raises(BlockingIOError):
            inner.accept()
