"""Bodies that are streamed piece by piece share the turns of the event loop: other requests wait for one piece only."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.api.assets.handler import AssetHandler
from distributor_node.services.api.assets.response import (
    CHUNK_BYTES,
    SENDFILE_ADVANTAGE,
    UNSENT_LIMIT,
    ResponseWriter,
)
from distributor_node.services.api.protocol import RawBody
from distributor_node.shared.waiting import REQUEST_SPACING, TURN_BYTES, TurnBudget
from distributor_node.shared.waiting import Turns as WaitingTurns
from tests.counters import counted
from tests.integration.assets_harness import KIB, MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

CLIENTS, SIZE = 24, 3 * MIB


class Turns:
    """Numbers the turns of the running loop, and counts what each of them handled."""

    def __init__(self) -> None:
        self._number = 0
        self._handled: Counter[int] = Counter()
        self.total = 0

    def count(self, size: int, cost: int | None = None) -> None:
        """`cost`: what a turn may have TURN_BYTES of."""
        self._handled[self._number] += size if cost is None else cost
        self.total += size

    @property
    def number(self) -> int:
        return self._number

    @property
    def most(self) -> int:
        return max(self._handled.values())

    @contextmanager
    def numbered(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        ending = False

        def next_turn() -> None:
            self._number += 1
            if not ending:
                loop.call_soon(next_turn)

        next_turn()
        yield
        ending = True


def sent_bytes() -> float:
    return sum(counted("distributor_sent_bytes_total", source=source) for source in ("local", "external"))


async def read_nothing(harness: AssetsHarness, turns: Turns) -> int:
    """Ask for an object and read none of it. Returns the bytes that were sent after the first piece."""
    loop = asyncio.get_running_loop()
    before = sent_bytes()
    with socket.socket() as client, turns.numbered():
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", harness.port))
        await loop.sock_sendall(client, b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: node\r\n\r\n")
        await eventually(lambda: sent_bytes() > before)
        sent = -1
        while sent != turns.total:
            sent = turns.total
            await asyncio.sleep(1.0)
    return sent


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Counts the bytes that responses send after their first piece."""
    counted, send, send_file = Turns(), ResponseWriter.send, RawBody.send_file

    async def counting(writer: ResponseWriter, chunk: Any, source: Any) -> None:
        counted.count(len(chunk))
        await send(writer, chunk, source)

    def counting_file(raw: RawBody, descriptor: int, offset: int, length: int) -> int:
        sent = send_file(raw, descriptor, offset, length)
        counted.count(sent, cost=sent // SENDFILE_ADVANTAGE)
        return sent

    monkeypatch.setattr(ResponseWriter, "send", counting)
    monkeypatch.setattr(RawBody, "send_file", counting_file)
    return counted


async def ask_together(harness: AssetsHarness, turns: Turns) -> None:
    with turns.numbered():
        answers = await asyncio.gather(*(harness.get("1") for _ in range(CLIENTS)))
    assert all(answer.body == harness.data["1"] for answer in answers)


async def test_proxied_responses_share_a_turn(tmp_path: Path, turns: Turns) -> None:
    async with assets_harness(tmp_path, first_byte_wait=0.05) as harness:
        harness.add("1", SIZE)
        await ask_together(harness, turns)
    assert turns.most <= 2 * TURN_BYTES


async def test_responses_from_a_growing_file_share_a_turn(tmp_path: Path, turns: Turns) -> None:
    async with assets_harness(tmp_path) as harness:
        harness.add("1", SIZE)
        fetch = await harness.begin("1", written=SIZE)
        fetch.verify()
        await ask_together(harness, turns)
        await fetch.complete()
    assert turns.most <= 2 * TURN_BYTES


async def test_responses_from_a_complete_file_share_a_turn(tmp_path: Path, turns: Turns) -> None:
    async with assets_harness(tmp_path, fast_lane=False) as harness:
        harness.add("1", SIZE)
        harness.store("1")
        await ask_together(harness, turns)
    assert turns.most <= 2 * TURN_BYTES


async def test_little_is_got_for_a_client_that_reads_nothing(tmp_path: Path, turns: Turns) -> None:
    async with assets_harness(tmp_path, first_byte_wait=0.05) as harness:
        harness.add("1", 16 * MIB)
        sent = await read_nothing(harness, turns)
    # The transport takes a piece while it holds less than 64 KiB, and the kernel one beyond its limit.
    assert sent <= UNSENT_LIMIT + 3 * CHUNK_BYTES


async def test_little_of_a_growing_file_is_sent_to_a_client_that_reads_nothing(
    tmp_path: Path, turns: Turns
) -> None:
    async with assets_harness(tmp_path) as harness:
        harness.add("1", 16 * MIB)
        fetch = await harness.begin("1", written=SIZE)
        sent = await read_nothing(harness, turns)
        await fetch.complete()
    assert sent <= UNSENT_LIMIT + 2 * CHUNK_BYTES


async def test_the_framework_begins_one_request_in_each_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, handle = Turns(), AssetHandler.handle

    async def counting(handler: AssetHandler, request: Any, object_id: Any) -> None:
        counted.count(1)
        await handle(handler, request, object_id)

    monkeypatch.setattr(AssetHandler, "handle", counting)
    loop = asyncio.get_running_loop()
    async with assets_harness(tmp_path) as harness:
        with ExitStack() as opened, counted.numbered():
            clients = [opened.enter_context(socket.socket()) for _ in range(CLIENTS)]
            for client in clients:
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", harness.port))
            for client in clients:
                client.send(b"HEAD /api/v1/assets/7 HTTP/1.1\r\nHost: node\r\n\r\n")
            for client in clients:
                assert (await loop.sock_recv(client, 4 * KIB)).startswith(b"HTTP/1.1 404 ")
    assert counted.total == CLIENTS
    assert counted.most <= 2  # the number is incremented somewhere in a turn


async def test_requests_to_sources_begin_one_after_the_other() -> None:
    budget = TurnBudget()
    begun: list[float] = []

    async def ask() -> None:
        await budget.take_request()
        begun.append(asyncio.get_running_loop().time())

    asking = [asyncio.create_task(ask()) for _ in range(20)]
    await asyncio.sleep(0)
    assert len(begun) == 1
    await budget.take(TURN_BYTES)  # the streams that are there do not wait for them
    assert len(begun) < len(asking)
    await asyncio.wait(asking)
    assert begun[-1] - begun[0] >= REQUEST_SPACING * len(asking) / 4  # timers count in milliseconds


async def test_streams_get_their_turns_in_order_and_a_cancelled_one_takes_none() -> None:
    budget, taken = TurnBudget(), Turns()
    order: list[str] = []

    async def stream(name: str, size: int) -> None:
        for _ in range(3):
            await budget.take(size)
            taken.count(size)
            order.append(name)

    with taken.numbered():
        streams = [asyncio.create_task(stream(name, TURN_BYTES)) for name in "abcd"]
        await asyncio.sleep(0)
        streams[1].cancel()
        await asyncio.wait(streams)
    assert order == list("aacdacdcd"), (
        "the first one asks for its second turn before the others have asked at all"
    )
    assert taken.most == TURN_BYTES


async def test_a_stream_alone_waits_for_no_turn() -> None:
    budget, taken = TurnBudget(), Turns()
    with taken.numbered():
        await budget.take(TURN_BYTES // 2)
        taken.count(1)
        await budget.take(TURN_BYTES // 2)
        taken.count(1)
    assert taken.most == 2


async def test_a_stream_alone_has_a_piece_in_every_turn_of_the_loop() -> None:
    budget, taken = TurnBudget(), Turns()
    with taken.numbered():
        for _ in range(20):
            await budget.take(TURN_BYTES)
            taken.count(TURN_BYTES)
    assert taken.number <= 21
    assert taken.most == TURN_BYTES


async def test_a_stream_that_waits_alone_gives_way_to_those_that_wait_after_it() -> None:
    budget, taken, order = TurnBudget(), Turns(), list[str]()

    async def stream(name: str) -> None:
        for _ in range(3):
            await budget.take(TURN_BYTES)
            taken.count(TURN_BYTES)
            order.append(name)

    async def request() -> None:
        await budget.take_whole()
        order.append("request")

    with taken.numbered():
        first = asyncio.create_task(stream("a"))
        for _ in range(2):  # it has had a piece, and waits
            await asyncio.sleep(0)
        await asyncio.gather(first, stream("b"), request())
    assert max(order.index("request"), order.index("b")) <= 4
    assert taken.most <= 2 * TURN_BYTES


async def test_tiny_pieces_are_bounded_too() -> None:
    budget, taken = TurnBudget(), Turns()

    async def stream() -> None:
        await budget.take(1)
        taken.count(1)

    with taken.numbered():
        await asyncio.gather(*(stream() for _ in range(1000)))
    assert taken.most <= 2 * TURN_BYTES // (32 * KIB)


async def test_requests_of_one_client_begin_further_apart_and_others_pass_them() -> None:
    budget, begun = TurnBudget(), list[str]()

    async def ask(client: str) -> None:
        await budget.take_request(client)
        begun.append(client)

    crowd = [asyncio.create_task(ask("10.0.0.1")) for _ in range(30)]
    await asyncio.sleep(0)
    other = asyncio.create_task(ask("10.0.0.2"))
    await asyncio.wait([*crowd, other])
    assert begun.index("10.0.0.2") <= 10
    assert begun.count("10.0.0.1") == len(crowd)


async def test_a_request_and_a_large_piece_have_a_turn_each() -> None:
    budget, taken = TurnBudget(), Turns()

    async def stream() -> None:
        await budget.take(TURN_BYTES)
        taken.count(1)

    async def request() -> None:
        await budget.take_whole()
        taken.count(1)

    with taken.numbered():
        await asyncio.gather(*(work() for work in [stream, request] * 20))
    assert taken.most == 1


async def test_a_request_does_not_wait_for_all_streams() -> None:
    budget, order = TurnBudget(), list[str]()

    async def stream() -> None:
        await budget.take(TURN_BYTES)
        order.append("piece")

    async def request() -> None:
        await budget.take_whole()
        order.append("request")

    await asyncio.gather(*(stream() for _ in range(40)), request(), request())
    assert [at for at, what in enumerate(order) if what == "request"][-1] <= 5


async def test_a_turn_that_has_lasted_is_over_although_its_timer_has_not_fired() -> None:
    turns = WaitingTurns(1, seconds=0.001)
    await turns.take()
    time.sleep(0.002)  # noqa: ASYNC251  the loop cannot run the timer
    with pytest.raises(StopIteration):
        turns.take().send(None)


async def test_turns_that_last_are_not_shortened_by_the_timer_of_the_one_before() -> None:
    turns = WaitingTurns(1, seconds=0.05)
    begun: list[float] = []
    for _ in range(6):
        await turns.take()
        begun.append(time.monotonic())
        if len(begun) % 2:
            time.sleep(0.06)  # noqa: ASYNC251  the timer is late, and the next turn begins without it
    assert min(later - earlier for earlier, later in pairwise(begun)) >= 0.045
