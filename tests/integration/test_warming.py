"""Warming while the state store or the queue is unavailable: it waits, then continues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from distributor_node.services.api.operator.warming import REPORT_INTERVAL, CacheWarmer
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import Warming, WarmingScope
from distributor_node.shared.domain.space import AdmissionQuestion
from distributor_node.shared.ports.state_store import Claim
from tests.integration.assets_harness import LIMIT, AssetsHarness, assets_harness
from tests.waiting import eventually

ONE = WarmingScope(object_ids=(ObjectId("1"),))


class UnreachableStore(MemoryStateStore):
    """Gone when the next `claims` and the next `reports` come."""

    def __init__(self) -> None:
        super().__init__(LIMIT, StateTimeouts(), time.time)
        self.claims = self.reports = 0

    async def claim(
        self,
        object_id: ObjectId,
        claimant: str,
        admission: AdmissionQuestion | None = None,
        trace: str = "",
    ) -> Claim:
        if self.claims:
            self.claims -= 1
            raise StateStoreUnavailable("away")
        return await super().claim(object_id, claimant, admission, trace)

    async def lease_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        if progress is not None and self.reports:
            self.reports -= 1
            raise StateStoreUnavailable("away")
        return await super().lease_warming(holder, seconds, progress)


@asynccontextmanager
async def warming_harness(root: Path, store: UnreachableStore) -> AsyncIterator[AssetsHarness]:
    """A warmer at work beside the API."""
    async with assets_harness(root, store=store) as harness:
        warming = asyncio.create_task(CacheWarmer(harness.context, "here").run())
        try:
            yield harness
        finally:
            warming.cancel()
            await asyncio.wait({warming})


async def state_of(harness: AssetsHarness) -> str:
    warming = await harness.context.state.warming()
    return "" if warming is None else warming.state


async def test_finished_work_that_cannot_be_reported_is_reported_later(tmp_path: Path) -> None:
    store = UnreachableStore()
    async with warming_harness(tmp_path, store) as harness:
        store.reports = 3
        began = time.monotonic()
        assert await store.start_warming(ONE) is not None
        await eventually(lambda: store.reports == 0)
        assert time.monotonic() - began >= 2 * REPORT_INTERVAL

        async def finished() -> bool:
            return await state_of(harness) == "finished"

        await eventually(finished)


async def test_without_the_state_store_nothing_counts_as_failed(tmp_path: Path) -> None:
    store = UnreachableStore()
    async with warming_harness(tmp_path, store) as harness:
        harness.add("1", 1000)
        store.claims = 2
        assert await store.start_warming(ONE) is not None

        async def waits() -> bool:
            warming = await store.warming()
            return warming is not None and (warming.state, warming.reason) == ("fetching", "away")

        await eventually(waits)
        await eventually(harness.has_job)
        await (await harness.begin("1")).complete()

        async def finished() -> bool:
            return await state_of(harness) == "finished"

        await eventually(finished)
        warming = await store.warming()
        assert warming is not None
        assert (warming.done, warming.failed, warming.reason) == (1, 0, "")


async def test_objects_that_are_skipped_are_counted_by_their_reason(tmp_path: Path) -> None:
    store = UnreachableStore()
    async with warming_harness(tmp_path, store) as harness:
        harness.add("1", 1000)
        harness.store("1")
        harness.add("2", 1000, accepted=False)
        harness.add("3", 1000, size=2**50)
        ids = tuple(map(ObjectId, ("1", "2", "3", "unknown", "other")))
        assert await store.start_warming(WarmingScope(object_ids=ids)) is not None

        async def finished() -> bool:
            return await state_of(harness) == "finished"

        await eventually(finished)
        warming = await store.warming()
        assert warming is not None
        assert (warming.total, warming.skipped) == (5, 5)
        assert warming.skipped_for == {"stored": 1, "unknown": 2, "not_uploaded": 1, "too_large": 1}
        assert warming.not_warmed == (
            ("2", "not_uploaded"),
            ("3", "too_large"),
            ("unknown", "unknown"),
            ("other", "unknown"),
        )
