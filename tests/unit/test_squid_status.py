"""/status reports squid and chain field by field, with ages, also when one of them does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from distributor_node.services.api.status import (
    FIRST_READ_TIMEOUT,
    SquidAndChainStatus,
    SquidStatusPoller,
)
from distributor_node.services.demo.squid import SquidFaults, TestChain, TestSquid
from distributor_node.shared.adapters.catalogs.joystream import ChainHead, JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.catalogs.manifest import ManifestCatalog
from distributor_node.shared.waiting import background
from tests.waiting import eventually

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
    try:
        yield SquidStatusPoller(catalog, clock)
    finally:
        await catalog.close()


async def poll(poller: SquidStatusPoller) -> None:
    await asyncio.gather(poller.poll_squid(), poller.poll_chain())


async def test_each_figure_is_the_last_known_one_with_its_age() -> None:
    clock = Clock()
    async with (
        TestSquid([]).run() as squid,
        TestChain(head=777).run() as chain,
        running_poller(squid.url, chain.url, clock) as poller,
    ):
        await poll(poller)
        first = await poller.read()
        assert (first.chain_head, first.blocks_processed) == (777, squid.height)
        assert first.version
        assert first.age is not None
        squid.faults, chain.head = SquidFaults(status=503), 778
        clock.ahead += 3600
        await poll(poller)
        second = await poller.read()
        assert (second.chain_head, second.blocks_processed, second.version) == (
            778,
            squid.height,
            first.version,
        )
        assert second.age is not None
        assert second.age >= 3600
        assert second.chain_head_age is not None
        assert second.chain_head_age < 3600
        squid.faults, chain.hang = SquidFaults(nulls=("squidStatus",)), True
        clock.ahead += 3600
        await poll(poller)
        third = await poller.read()
        assert (third.chain_head, third.blocks_processed) == (778, squid.height)
        assert third.age is not None
        assert third.age >= 7200, "a height of null is no news"
        assert third.chain_head_age is not None
        assert third.chain_head_age >= 3600


async def test_reads_cause_no_polls_and_need_none() -> None:
    """An hour after the last request, /status has the figures that were polled in the background."""
    async with TestSquid([]).run() as squid, running_poller(squid.url, None, Clock()) as poller:
        async with background(poller.run(), "polls"):
            await eventually(lambda: len(squid.requests) == 1)
            answers = await asyncio.gather(*(poller.read() for _ in range(200)))
        assert {answer.blocks_processed for answer in answers} == {squid.height}
        assert len(squid.requests) == 1


async def test_polls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributor_node.services.api.status.POLL_INTERVAL", 0.01)
    clock = Clock()
    async with (
        TestSquid([]).run() as squid,
        TestChain(head=777).run() as chain,
        running_poller(squid.url, chain.url, clock) as poller,
        background(poller.run(), "polls"),
    ):
        await eventually(lambda: len(squid.requests) > 3)
        squid.faults, chain.head = SquidFaults(hang=True), 778
        clock.ahead += 60  # what the chain has said is kept for some seconds

        async def chain_goes_on() -> bool:
            return (await poller.read()).chain_head == 778

        await eventually(chain_goes_on)


async def test_a_slow_squid_is_waited_for_in_the_background() -> None:
    """Its answer takes longer than a look-up may take."""
    limits = SquidLimits(timeout=0.2, list_timeout=30)
    async with TestSquid([]).run() as squid:
        squid.faults = SquidFaults(latency=0.6, operations=("Status",))
        catalog = JoystreamCatalog(squid.url, limits, refuse_private=False)
        await catalog.open()
        poller = SquidStatusPoller(catalog)
        async with background(poller.run(), "polls"):
            assert (await poller.read()).age is None, "a reader does not wait for it"

            async def known() -> bool:
                return (await poller.read()).blocks_processed == squid.height

            await eventually(known)
        await catalog.close()


async def test_readers_of_nothing_wait_a_little_together() -> None:
    async with (
        TestSquid([]).run() as squid,
        running_poller(squid.url, "http://127.0.0.1:1", Clock()) as poller,
    ):
        squid.faults = SquidFaults(hang=True)
        one_after_another = 200 * FIRST_READ_TIMEOUT
        async with background(poller.run(), "polls"):
            began = time.monotonic()
            answers = await asyncio.gather(*(poller.read() for _ in range(200)))
            assert time.monotonic() - began < one_after_another / 4
        assert set(answers) == {SquidAndChainStatus()}


async def test_a_catalog_without_a_server_reports_nothing() -> None:
    poller = SquidStatusPoller(ManifestCatalog(Path("unused.yaml")))
    await poll(poller)
    assert await poller.read() == SquidAndChainStatus()
