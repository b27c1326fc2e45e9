"""What /status says of squid and chain: field by field, in time, whoever is silent."""

from __future__ import annotations

import asyncio
import time

from services.api.query_node import ASKED_EVERY, BELIEVED, QueryNode, QueryNodeStatus, shown_url
from services.demo.squid import SquidKnobs, TestChain, TestSquid
from shared.adapters.catalogs.joystream import ChainHead, JoystreamCatalog, SquidLimits

LIMITS = SquidLimits(timeout=0.5, list_timeout=0.5, list_batch=10, list_pause=0)


class Clock:
    """Runs by itself, and can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def query_node(squid: str, chain: str | None, clock: Clock) -> QueryNode:
    head = None if chain is None else ChainHead(chain, 0.5, clock=clock)
    return QueryNode(JoystreamCatalog(squid, LIMITS, refuse_private=False), head, clock)


async def settled(node: QueryNode) -> QueryNodeStatus:
    """The status after the question that a read begins."""
    await node.read()
    await asyncio.sleep(0.8)
    return await node.read()


async def test_all_fields_then_each_by_itself() -> None:
    clock = Clock()
    async with TestSquid([]).run() as squid, TestChain(head=777).run() as chain:
        node = query_node(squid.url, chain.url, clock)
        whole = await settled(node)
        assert whole.chain_head == 777
        assert whole.blocks_processed > 0
        assert whole.version
        squid.knobs = SquidKnobs(hang=True)
        clock.ahead += BELIEVED - ASKED_EVERY / 2
        assert await settled(node) == whole, "believed for a while"
        clock.ahead += BELIEVED
        chain.head = 778
        assert await settled(node) == QueryNodeStatus(chain_head=778)
        squid.knobs = SquidKnobs()
        chain.hang = True
        clock.ahead += BELIEVED + ASKED_EVERY
        found = await settled(node)
        assert (found.chain_head, found.version) == (0, whole.version)
        squid.knobs = SquidKnobs(nulls=("squidStatus",))
        clock.ahead += BELIEVED + ASKED_EVERY
        assert await settled(node) == QueryNodeStatus(version=whole.version)
        await node.close()


async def test_never_slow_and_never_often() -> None:
    clock = Clock()
    async with TestSquid([]).run() as squid:
        squid.knobs = SquidKnobs(hang=True)
        node = query_node(squid.url, "http://127.0.0.1:1", clock)
        began = time.monotonic()
        answers = await asyncio.gather(*(node.read() for _ in range(200)))
        assert time.monotonic() - began < 1.0
        assert set(answers) == {QueryNodeStatus()}
        assert len(list(squid.questions)) <= 1
        await node.close()


async def test_closed_while_it_asks() -> None:
    async with TestSquid([]).run() as squid:
        squid.knobs = SquidKnobs(hang=True)
        node = query_node(squid.url, None, Clock())
        await node.read()
        await node.close()


def test_credentials_are_not_shown() -> None:
    assert (
        shown_url("https://me:secret@squid.example:8443/graphql?key=1")
        == "https://squid.example:8443/graphql"
    )
