"""Waiting until the kernel has sent all bytes."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from distributor_node.services.api.graceful_shutdown import wait_until_flushed


def listening() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return server


async def test_unsent_bytes_are_waited_for() -> None:
    with listening() as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.setblocking(False)
        sent = 0
        try:
            while True:
                sent += accepted.send(bytes(65536))
        except BlockingIOError:
            accepted.close()
        assert not await wait_until_flushed(port, 0.3)
        waiting = asyncio.create_task(wait_until_flushed(port, 10))

        def take_all() -> int:
            with client:
                return sum(len(piece) for piece in iter(lambda: client.recv(1 << 20), b""))

        assert await asyncio.to_thread(take_all) == sent
        assert await waiting


async def test_open_connections_and_other_ports_are_not() -> None:
    with (
        listening() as server,
        listening() as other,
        socket.create_connection(server.getsockname()) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            accepted.send(b"not taken")
            async with asyncio.timeout(60):
                assert await wait_until_flushed(server.getsockname()[1], 600)
                assert await wait_until_flushed(other.getsockname()[1], 600)
            assert client.recv(20) == b"not taken"


async def test_without_kernel_information_there_is_no_wait(tmp_path: Path) -> None:
    assert await wait_until_flushed(80, 5, [tmp_path / "missing"])
