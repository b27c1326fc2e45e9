"""The head of the chain, over HTTP and WebSocket, also from nodes that do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from pydantic import ValidationError
from websockets.asyncio.server import ServerConnection, serve

from distributor_node.services.demo.squid import TestChain, TestSquid
from distributor_node.shared.adapters.catalogs.joystream import ChainHead
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.settings.model import Settings
from tests.waiting import eventually


@pytest.fixture
async def chain() -> AsyncIterator[TestChain]:
    async with TestChain(head=4711).run() as chain:
        yield chain


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_over_a_websocket(chain: TestChain) -> None:
    head = ChainHead(chain.url, timeout=20)
    assert await head.head() == 4711


async def test_over_http() -> None:
    async with TestSquid([]).run() as squid:
        assert await ChainHead(squid.chain_url, timeout=20).head() == squid.height + 2


async def test_it_is_polled_only_now_and_then(chain: TestChain) -> None:
    clock = Clock()
    head = ChainHead(chain.url, timeout=20, ttl=10, clock=clock)
    assert set(await asyncio.gather(*(head.head() for _ in range(20)))) == {4711}
    chain.head = 4712
    for now, number, calls in [(9.9, 4711, 1), (10, 4712, 2)]:
        clock.now = now
        assert (await head.head(), chain.calls) == (number, calls)


async def test_an_unresponsive_squid_is_waited_for_once(chain: TestChain) -> None:
    clock = Clock()
    head = ChainHead(chain.url, timeout=0.2, clock=clock)
    chain.hang = True
    for _ in range(3):
        with pytest.raises(CatalogUnavailable):
            await head.head()
    assert chain.calls == 1
    chain.hang = False

    async def answers() -> bool:
        clock.now += 2.0
        try:
            return await head.head() == 4711
        except CatalogUnavailable:
            return False

    await eventually(answers)


@pytest.mark.parametrize("scheme", ["http", "ws"])
async def test_a_node_that_is_unreachable(scheme: str) -> None:
    with pytest.raises(CatalogUnavailable):
        await ChainHead(f"{scheme}://127.0.0.1:1", timeout=20).head()


@pytest.mark.parametrize(
    "message",
    [
        "no JSON",
        "[]",
        '{"id": 1, "result": null}',
        '{"id": 1, "error": {"code": -32601}}',
        '{"id": 1, "result": {"number": "0xzz"}}',
        '{"id": 1, "result": {"number": 5}}',
        '{"id": 2, "result": {"number": "0x5"}}',
        "x" * 300_000,
    ],
)
async def test_nonsense_is_no_head(message: str) -> None:
    async def talk(connection: ServerConnection) -> None:
        await connection.recv()
        for _ in range(20):
            await connection.send(message)

    async with serve(talk, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        with pytest.raises(CatalogUnavailable):
            await ChainHead(f"ws://127.0.0.1:{port}", timeout=20).head()


@pytest.mark.parametrize(
    "url",
    ["", "ftp://node.example", "ws://", "node.example:9944", "http://[::1", "http://node.example:99999"],
)
def test_an_invalid_url_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ValidationError, match=r"catalog\.chain"):
        Settings(catalog={"kind": "joystream", "chain": url})


async def test_a_url_unusable_by_the_library_is_no_answer() -> None:
    with pytest.raises(CatalogUnavailable, match="cannot be reached"):
        await ChainHead("http://node\x7f.example", timeout=1).head()
