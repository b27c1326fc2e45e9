"""The accept loop takes all queued connections, and backs off without descriptors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any, Protocol

import pytest

import distributor_node.services.api.server as server_module
from distributor_node.services.api.listen import ListenAddress, bind
from distributor_node.services.api.server import ACCEPTED_AT_ONCE, ACCEPTED_WHILE_REQUESTS_WAIT, AcceptLoop
from tests.waiting import eventually

CROWD = 200


class Greeter(asyncio.Protocol):
    """Says hello, and is counted."""

    made = 0

    def connection_made(self, transport: Any) -> None:
        Greeter.made += 1
        self.nodelay = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.write(b"hello %d" % bool(self.nodelay))


class FullTable(socket.socket):
    """A listening socket in a process that has no descriptor left, the first time."""

    failures = 1

    def accept(self) -> tuple[socket.socket, Any]:
        if FullTable.failures:
            FullTable.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


class Listen(Protocol):
    def __call__(
        self, listener: socket.socket, requests_wait: Callable[[], bool] = lambda: False
    ) -> AcceptLoop: ...


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    Greeter.made = 0
    accept_loops: list[AcceptLoop] = []

    def start(listener: socket.socket, requests_wait: Callable[[], bool] = lambda: False) -> AcceptLoop:
        accept_loops.append(AcceptLoop(listener, lambda _: Greeter(), 1024, requests_wait=requests_wait))
        return accept_loops[-1]

    yield start
    for accept_loop in accept_loops:
        accept_loop.close()


class SlowClock:
    """In place of `time`: shows that each turn has taken this many seconds."""

    def __init__(self, turn: float) -> None:
        self._turn, self._now = turn, 0.0

    def monotonic(self) -> float:
        self._now += self._turn
        return self._now


@pytest.mark.parametrize(("turn", "at_once"), [(0.0, ACCEPTED_AT_ONCE), (0.01, 50)])
async def test_simultaneous_clients_are_accepted_some_in_each_turn(
    listen: Listen,
    monkeypatch: pytest.MonkeyPatch,
    turn: float,
    at_once: int,
) -> None:
    """Long turns serve many others. To accept more in each of them takes no more than half of the time."""
    monkeypatch.setattr(server_module, "time", SlowClock(turn))
    bound = bind(ListenAddress("127.0.0.1", 0))
    bound.listen(1024)
    clients = [socket.create_connection(bound.getsockname()) for _ in range(CROWD)]
    accept_loop = listen(bound)
    counts = [0]
    while counts[-1] < CROWD:
        await asyncio.sleep(0)
        if accept_loop.accepted_count != counts[-1]:
            counts.append(accept_loop.accepted_count)
    steps = [after - before for before, after in pairwise(counts)]
    assert steps[0] == ACCEPTED_AT_ONCE
    assert max(steps[1:]) == at_once
    await eventually(lambda: Greeter.made == CROWD)
    for client in clients:
        client.settimeout(60)
        assert await asyncio.to_thread(client.recv, 100) == b"hello 1"
        client.close()


async def test_few_clients_are_accepted_while_requests_wait(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "time", SlowClock(0.01))
    bound = bind(ListenAddress("127.0.0.1", 0))
    bound.listen(1024)
    clients = [socket.create_connection(bound.getsockname()) for _ in range(12)]
    accept_loop = listen(bound, lambda: True)
    counts = [0]
    while counts[-1] < len(clients):
        await asyncio.sleep(0)
        if accept_loop.accepted_count != counts[-1]:
            counts.append(accept_loop.accepted_count)
    assert {after - before for before, after in pairwise(counts)} == {ACCEPTED_WHILE_REQUESTS_WAIT}
    for client in clients:
        client.close()


async def test_after_close_new_clients_are_refused_and_accepted_ones_stay(
    listen: Listen,
) -> None:
    bound = bind(ListenAddress("127.0.0.1", 0))
    place = bound.getsockname()
    accept_loop = listen(bound)
    reader, writer = await asyncio.open_connection(*place)
    assert await reader.read(100) == b"hello 1"
    accept_loop.close()
    accept_loop.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*place)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)
    writer.close()


async def test_without_descriptors_the_loop_backs_off_and_the_client_is_accepted_later(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "EMFILE_BACKOFF", 0.05)
    monkeypatch.setattr(FullTable, "failures", 1)
    bound = bind(ListenAddress("127.0.0.1", 0))
    listener = FullTable(bound.family, bound.type, bound.proto, fileno=bound.detach())
    listen(listener)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    assert await asyncio.wait_for(reader.read(100), 60) == b"hello 1"
    assert FullTable.failures == 0
    writer.close()
