"""Clients that connect during a shutdown are answered or refused, never accepted and dropped."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from sanic import Request

from distributor_node.services.api import protocol, server
from distributor_node.services.api.graceful_shutdown import DRAIN_TIMEOUT, drain_accept_queue
from tests.servers.api_fixture import FakeAssets, running_api

ASK = b"GET /api/v1/assets/any HTTP/1.1\r\nHost: a\r\n\r\n"
TABLE_HEAD = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner


def ask_once(port: int) -> str:
    """`answered`, `refused`, or what went wrong after the connection was made."""
    with socket.socket() as client:
        client.settimeout(60)
        try:
            client.connect(("127.0.0.1", port))
            client.sendall(ASK)
        except ConnectionRefusedError:
            return "refused"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "timeout")
        return answer_on(client)


def answer_on(client: socket.socket) -> str:
    """What comes, and closes the connection."""
    received = b""
    try:
        while not received.endswith(b"\r\n\r\nhello"):
            piece = client.recv(65536)
            if not piece:
                return f"closed after {len(received)} bytes"
            received += piece
    except OSError as error:
        return f"{errno.errorcode.get(error.errno or 0, 'timeout')} after {len(received)} bytes"
    finally:
        client.close()
    return "answered" if received.startswith(b"HTTP/1.1 200 ") else "wrong"


@pytest.mark.parametrize("seconds", [DRAIN_TIMEOUT, 0.0])
def test_connections_in_the_accept_queue_are_answered(
    runner: asyncio.Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """At the moment of the stop the loop has seen none of them: it is not running. On a busy machine it may not see
    them in time, which is as if there were none."""
    monkeypatch.setattr(server, "DRAIN_TIMEOUT", seconds)

    async def stop() -> list[str]:
        async with running_api(tmp_path, FakeAssets()) as api:
            clients = [socket.create_connection(("127.0.0.1", api.server.port)) for _ in range(200)]
            for client in clients:
                client.sendall(ASK)
            await api.server.close(10)
            return [answer_on(client) for client in clients]

    assert Counter(runner.run(stop())) == {"answered": 200}


def test_every_client_is_answered_or_refused_while_the_port_closes_and_opens(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    over = threading.Event()
    closings: list[asyncio.Task[None]] = []

    def client(port: int) -> None:
        while not over.is_set():
            outcome = ask_once(port)
            seen[outcome] += 1
            if outcome == "refused":
                time.sleep(0.01)

    async def open_and_close() -> None:
        async with running_api(tmp_path, FakeAssets()) as api:
            threads = [threading.Thread(target=client, args=(api.server.port,)) for _ in range(24)]
            for thread in threads:
                thread.start()
            try:
                for _ in range(20):
                    await asyncio.sleep(0.1)
                    closings.append(asyncio.create_task(api.server.close(5)))
                    await asyncio.sleep(0.1)
                    await api.server.open()
                await asyncio.gather(*closings)
            finally:
                over.set()
                for thread in threads:
                    await asyncio.to_thread(thread.join)

    runner.run(open_and_close())
    assert set(seen) == {"answered", "refused"}, seen


def test_the_port_reopens_immediately_when_a_stop_has_just_begun(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    """While answers of before are still under way."""
    fake_assets = FakeAssets()

    async def reopen() -> bytes:
        async with running_api(tmp_path, fake_assets) as api:
            slow = asyncio.create_task(api.get("/api/v1/assets/waiting"))
            await fake_assets.entered.wait()
            closing = asyncio.create_task(api.server.close(10))
            await asyncio.sleep(0)
            assert not api.server.is_open
            await api.server.open()
            assert not closing.done()
            assert await asyncio.to_thread(ask_once, api.server.port) == "answered"
            fake_assets.release.set()
            await closing
            return await slow

    assert runner.run(reopen()).endswith(b"hello")


class SlowToEnd:
    """Requests take until they are cancelled, and then a moment."""

    def __init__(self) -> None:
        self.entered, self.ended = asyncio.Event(), False

    async def handle(self, request: Request, object_id: str) -> None:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)
            self.ended = True


@pytest.mark.parametrize("leaves", [True, False])
def test_a_stop_waits_for_requests_that_came_during_it(
    runner: asyncio.Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, leaves: bool
) -> None:
    """On a connection without a request so far: there is no task for it when the stop begins."""
    monkeypatch.setattr(protocol, "KEEPALIVE_DRAIN_GRACE", 60.0)
    assets = SlowToEnd()

    async def stop() -> None:
        async with running_api(tmp_path, assets) as api:
            with socket.create_connection(("127.0.0.1", api.server.port)) as client:
                closing = asyncio.create_task(api.server.close(60 if leaves else 3))
                await asyncio.sleep(0)
                await api.server.open()  # possible once the stop has closed the port
                client.sendall(ASK)
                await assets.entered.wait()
                if leaves:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                await closing
                assert assets.ended

    runner.run(stop())


@pytest.mark.parametrize(
    ("family", "host", "to"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
)
def test_new_connections_are_refused_while_draining_and_open_ones_stay(
    family: socket.AddressFamily, host: str, to: str
) -> None:
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((to, port)) as inside:
            asyncio.run(drain_accept_queue(listener, lambda: 0, 0.1))
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((to, port))
            accepted, _ = listener.accept()
            with accepted:
                inside.sendall(b"still heard")
                assert accepted.recv(100) == b"still heard"


async def test_half_open_connections_are_waited_for(tmp_path: Path) -> None:
    """The kernel's table is played: between two programs of one machine no connection is ever half made for long."""
    table = tmp_path / "tcp"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        row = f"   1: 0100007F:{port:04X} 0100007F:D2E4 {{}} 00000000:00000000 01:00000064 00000000     0        0 0\n"
        table.write_text(TABLE_HEAD + row.format("03"))
        waiting = asyncio.create_task(drain_accept_queue(listener, lambda: 0, 3600, tables=[table]))
        assert not (await asyncio.wait({waiting}, timeout=0.3))[0]
        table.write_text(TABLE_HEAD + row.format("01"))
        async with asyncio.timeout(60):
            await waiting
        table.write_text(TABLE_HEAD + row.format("03"))
        async with asyncio.timeout(60):
            await drain_accept_queue(listener, lambda: 0, 0.2, tables=[table])
