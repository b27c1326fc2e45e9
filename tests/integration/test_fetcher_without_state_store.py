"""The state store is unreachable while objects are fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.jobs import Ack, JobOutcome, Retry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import BeginResult, Lease
from tests.integration.fetcher_harness import Harness, fetcher_harness

SIZE = 2 * 1024 * 1024
DATA = GeneratedContent(7, SIZE).read(0, SIZE)


class UnreachableStore(MemoryStateStore):
    """Operations of fetches fail while it is unreachable."""

    reachable = True

    def _check(self) -> None:
        if not self.reachable:
            raise StateStoreUnavailable("unreachable")

    async def begin(
        self, object_id: ObjectId, size: int, worker: str, claim: int = 0, trace: str = ""
    ) -> BeginResult:
        self._check()
        return await super().begin(object_id, size, worker, claim, trace)

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        self._check()
        return await super().renew(lease, source)

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        self._check()
        return await super().commit(lease, stored_at)

    async def park(self, lease: Lease, held: int | None = None) -> None:
        self._check()
        await super().park(lease, held)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with fetcher_harness(tmp_path, [DATA], lease=0.8, state_kind=UnreachableStore) as ready:
        yield ready


def start(harness: Harness) -> asyncio.Task[JobOutcome]:
    return asyncio.create_task(harness.worker().handle(harness.job(harness.wanted(DATA))))


def reach(harness: Harness, reachable: bool) -> None:
    assert isinstance(harness.state, UnreachableStore)
    harness.state.reachable = reachable


async def test_before_the_start_the_job_waits(harness: Harness) -> None:
    reach(harness, False)
    assert await start(harness) == Retry("unreachable")
    assert len(harness.nodes[0].requests) == 0


async def test_a_cached_object_needs_no_state_store(harness: Harness) -> None:
    await start(harness)
    reach(harness, False)
    assert await start(harness) == Ack("already_cached")


async def test_a_short_removal_goes_unnoticed(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(bytes_per_second=2 * SIZE), Match(first=1))
    running = start(harness)
    await harness.until_partial(SIZE // 10)
    reach(harness, False)
    await harness.until_partial(SIZE // 2)
    reach(harness, True)
    assert await running == Ack("fetched")


async def test_an_outage_longer_than_the_lease_ends_the_writing(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(bytes_per_second=SIZE // 4), Match(first=1))
    running = start(harness)
    await harness.until_partial(SIZE // 10)
    reach(harness, False)
    outcome = await running
    assert isinstance(outcome, Retry)
    assert "lease" in outcome.reason or "renewal" in outcome.reason
    assert 0 < (harness.partial_size() or 0) < SIZE
    reach(harness, True)
    assert await start(harness) == Ack("fetched")
    assert harness.stored() == DATA


async def test_at_the_end_the_object_is_stored_and_made_known_later(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(bytes_per_second=4 * SIZE), Match(first=1))
    running = start(harness)
    await harness.until_partial(SIZE // 2)
    reach(harness, False)
    outcome = await running
    assert isinstance(outcome, Retry)
    assert harness.stored() == DATA
    reach(harness, True)
    assert await start(harness) == Ack("already_cached")
    await asyncio.sleep(1.0)  # the lease of the first attempt expires
    assert await start(harness) == Ack("already_cached")
    usage = await harness.state.usage()
    assert (usage.used, usage.reserved) == (footprint(SIZE), 0)
