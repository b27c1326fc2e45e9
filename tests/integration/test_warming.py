"""Warming while what it stands on is away: it waits, without turning in circles, and goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services.api.operator.warming import REPORT_INTERVAL, CacheWarmer
from shared.adapters.state_memory import MemoryStateStore
from shared.adapters.state_times import StateTimeouts
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.warming import Warming, WarmingScope
from shared.ports.state_store import Claim
from tests.integration.assets_world import LIMIT, AssetsWorld, assets_world

ONE = WarmingScope(object_ids=(ObjectId("1"),))


class AwayStore(MemoryStateStore):
    """Gone when the next `claims` and the next `reports` come."""

    def __init__(self) -> None:
        super().__init__(LIMIT, StateTimeouts(), time.time)
        self.claims = self.reports = 0

    async def claim(self, object_id: ObjectId, claimant: str) -> Claim:
        if self.claims:
            self.claims -= 1
            raise StateStoreUnavailable("away")
        return await super().claim(object_id, claimant)

    async def lease_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        if progress is not None and self.reports:
            self.reports -= 1
            raise StateStoreUnavailable("away")
        return await super().lease_warming(holder, seconds, progress)


@asynccontextmanager
async def warming_world(root: Path, store: AwayStore) -> AsyncIterator[AssetsWorld]:
    """A warmer at work beside the API."""
    async with assets_world(root, store=store) as world:
        warming = asyncio.create_task(CacheWarmer(world.context, "here").run())
        try:
            yield world
        finally:
            warming.cancel()
            await asyncio.wait({warming})


async def state_of(world: AssetsWorld) -> str:
    warming = await world.context.state.warming()
    return "" if warming is None else warming.state


async def test_what_is_done_but_cannot_be_reported_is_reported_later_at_leisure(tmp_path: Path) -> None:
    store = AwayStore()
    async with warming_world(tmp_path, store) as world:
        store.reports = 3
        began = time.monotonic()
        assert await store.start_warming(ONE) is not None
        await world.until(lambda _: store.reports == 0)
        assert time.monotonic() - began >= 2 * REPORT_INTERVAL

        async def finished(world: AssetsWorld) -> bool:
            return await state_of(world) == "finished"

        await world.until(finished)


async def test_without_the_state_store_nothing_counts_as_failed(tmp_path: Path) -> None:
    store = AwayStore()
    async with warming_world(tmp_path, store) as world:
        world.add("1", 1000)
        store.claims = 2
        assert await store.start_warming(ONE) is not None

        async def waits(_: AssetsWorld) -> bool:
            warming = await store.warming()
            return warming is not None and (warming.state, warming.reason) == ("fetching", "away")

        await world.until(waits)
        await world.until(AssetsWorld.has_job)
        await (await world.begin("1")).complete()

        async def finished(world: AssetsWorld) -> bool:
            return await state_of(world) == "finished"

        await world.until(finished)
        warming = await store.warming()
        assert warming is not None
        assert (warming.done, warming.failed, warming.reason) == (1, 0, "")
