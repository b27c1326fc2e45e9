"""When a request that waits for a fetch gives up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from distributor_node.services.api.assets.growing_file import FetchPoller
from distributor_node.services.api.fetch_capacity import FetchEvents
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Announcement, Topic

OBJECT_ID = ObjectId("1")


@pytest.fixture
def state() -> MemoryStateStore:
    return MemoryStateStore(1_000_000, StateTimeouts(), time.time)


@pytest.fixture
async def poller(state: MemoryStateStore) -> AsyncIterator[FetchPoller]:
    fetch_events = FetchEvents(state)
    listening = asyncio.create_task(fetch_events.run())
    await asyncio.sleep(0)
    yield FetchPoller(OBJECT_ID, state, fetch_events)
    listening.cancel()
    with suppress(asyncio.CancelledError):
        await listening


async def check(poller: FetchPoller, state: MemoryStateStore) -> bool:
    """Let the poller ask the store now: something was announced, and nothing has grown for a moment."""
    asyncio.get_running_loop().call_later(
        0.03, lambda: asyncio.ensure_future(state.announce(Announcement(Topic.FETCH_CHANGED, OBJECT_ID)))
    )
    for _ in range(8):
        await poller.wait(100)
    return await poller.has_ended()


async def test_a_live_fetch_has_not_ended(poller: FetchPoller, state: MemoryStateStore) -> None:
    await state.claim(OBJECT_ID, "api-1")
    assert not await check(poller, state)
    assert not await check(poller, state)


async def test_an_unknown_fetch_has_ended_at_the_second_poll(
    poller: FetchPoller, state: MemoryStateStore
) -> None:
    assert not await check(poller, state)
    assert await check(poller, state)


async def test_growth_revives_the_fetch(poller: FetchPoller, state: MemoryStateStore) -> None:
    assert not await check(poller, state)
    poller.observe(50)
    assert poller.idle < 0.02
    assert not await check(poller, state)


async def test_a_failure_ends_the_fetch_immediately(poller: FetchPoller, state: MemoryStateStore) -> None:
    await state.record_failure(OBJECT_ID, "dead-lettered", 60)
    assert await check(poller, state)
