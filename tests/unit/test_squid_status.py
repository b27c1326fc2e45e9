"""/status reports squid and chain field by field, in time, also when one of them does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from distributor_node.services.api.status import (
    FIRST_READ_TIMEOUT,
    POLL_INTERVAL,
    STALE_AFTER,
    SquidAndChainStatus,
    SquidStatusPoller,
)
from distributor_node.services.demo.squid import SquidFaults, TestChain, TestSquid
from distributor_node.shared.adapters.catalogs.joystream import ChainHead, JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.catalogs.manifest import ManifestCatalog

LIMITS = SquidLimits(timeout=1.5, list_timeout=1.5, list_batch=10, list_pause=0)


class Clock:
    """Runs by itself, and can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@asynccontextmanager
async def running_poller(squid: str, chain: str | None, clock: Clock) -> AsyncIterator[SquidStatusPoller]:
    head = None if chain is None else ChainHead(chain, LIMITS.timeout, clock=clock)
    catalog = JoystreamCatalog(squid, LIMITS, refuse_private=False, chain=head)
    await catalog.open()
    poller = SquidStatusPoller(catalog, clock)
    try:
        yield poller
    finally:
        await poller.close()
        await catalog.close()


async def settled(poller: SquidStatusPoller) -> SquidAndChainStatus:
    """The status after the poll that a read starts."""
    await poller.read()
    polls = [task for task in asyncio.all_tasks() if task.get_name() == "poll-squid-status"]
    await asyncio.gather(*polls, return_exceptions=True)
    return await poller.read()


async def test_all_fields_then_each_by_itself() -> None:
    clock = Clock()
    async with (
        TestSquid([]).run() as squid,
        TestChain(head=777).run() as chain,
        running_poller(squid.url, chain.url, clock) as poller,
    ):
        whole = await settled(poller)
        assert whole.chain_head == 777
        assert whole.blocks_processed > 0
        assert whole.version
        squid.faults = SquidFaults(hang=True)
        clock.ahead += STALE_AFTER - POLL_INTERVAL / 2
        assert await settled(poller) == whole, "believed for a while"
        clock.ahead += STALE_AFTER
        chain.head = 778
        assert await settled(poller) == SquidAndChainStatus(chain_head=778)
        squid.faults = SquidFaults()
        chain.hang = True
        clock.ahead += STALE_AFTER + POLL_INTERVAL
        found = await settled(poller)
        assert (found.chain_head, found.version) == (0, whole.version)
        squid.faults = SquidFaults(nulls=("squidStatus",))
        clock.ahead += STALE_AFTER + POLL_INTERVAL
        assert await settled(poller) == SquidAndChainStatus(version=whole.version)


async def test_never_slow_and_never_often() -> None:
    clock = Clock()
    async with TestSquid([]).run() as squid, running_poller(squid.url, "http://127.0.0.1:1", clock) as poller:
        squid.faults = SquidFaults(hang=True)
        one_after_another = 200 * FIRST_READ_TIMEOUT
        began = time.monotonic()
        answers = await asyncio.gather(*(poller.read() for _ in range(200)))
        assert time.monotonic() - began < one_after_another / 4
        assert set(answers) == {SquidAndChainStatus()}
        assert len(list(squid.requests)) <= 1


async def test_closed_while_it_asks() -> None:
    async with TestSquid([]).run() as squid, running_poller(squid.url, None, Clock()) as poller:
        squid.faults = SquidFaults(hang=True)
        await poller.read()


async def test_a_catalog_without_a_server_reports_nothing() -> None:
    catalog = ManifestCatalog(Path("unused.yaml"))
    assert await SquidStatusPoller(catalog).read() == SquidAndChainStatus()
