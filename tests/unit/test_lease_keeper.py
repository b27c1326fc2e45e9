"""A lease is kept while it can be, and ends its fetch when it cannot."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.fetcher.lease_keeper import LeaseKeeper, LeaseLost, LeaseTimes
from shared.adapters.state_memory import MemoryStateStore
from shared.adapters.state_times import StateTimeouts
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.ports.state_store import Granted, Lease

OBJECT_ID = ObjectId.parse("7")
TIMES = LeaseTimes(lease=0.4, renewal=0.05)


class FarStore(MemoryStateStore):
    """A state store that can be out of reach."""

    def __init__(self) -> None:
        super().__init__(10**9, StateTimeouts(lease_seconds=TIMES.lease), time.time)
        self.reachable = True
        self.renewals = 0
        self.heard = asyncio.Event()

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        if not self.reachable:
            raise StateStoreUnavailable("out of reach")
        self.renewals += 1
        self.heard.set()
        return await super().renew(lease, source)


async def granted(store: FarStore) -> LeaseKeeper:
    term = await store.lead("evictor", 60)
    assert term is not None
    await store.set_reconciled(term)
    asked_at = time.monotonic()
    begun = await store.begin(OBJECT_ID, 10, "worker")
    assert isinstance(begun, Granted)
    return LeaseKeeper(store, begun.lease, TIMES, asked_at)


async def heard_again(store: FarStore) -> None:
    store.heard.clear()
    async with asyncio.timeout(2):
        await store.heard.wait()


async def work_for_ever(keeper: LeaseKeeper) -> None:
    async with keeper.kept():
        await asyncio.Event().wait()


async def test_a_kept_lease_outlives_its_time() -> None:
    store = FarStore()
    keeper = await granted(store)
    async with keeper.kept():
        while store.renewals < 10:
            await heard_again(store)
        assert keeper.holds
        await keeper.confirm()


async def test_a_source_is_told_soon() -> None:
    store = FarStore()
    keeper = await granted(store)
    async with keeper.kept():
        await heard_again(store)
        keeper.use_source("http://a/7")
        await heard_again(store)
        fetch = (await store.find(OBJECT_ID)).fetch
        assert fetch is not None
        assert fetch.source == "http://a/7"


async def test_a_source_that_has_given_all_at_once_is_not_told() -> None:
    store = FarStore()
    keeper = await granted(store)
    async with keeper.kept():
        keeper.use_source("http://a/7")
        for _ in range(10):
            await asyncio.sleep(0)
    assert store.renewals == 0


async def test_a_lost_lease_ends_the_body() -> None:
    store = FarStore()
    keeper = await granted(store)
    await store.release(keeper.lease)
    with pytest.raises(LeaseLost):
        await work_for_ever(keeper)
    assert not keeper.holds
    with pytest.raises(LeaseLost):
        await keeper.confirm()


async def test_a_short_absence_of_the_store_is_survived() -> None:
    store = FarStore()
    keeper = await granted(store)
    async with keeper.kept():
        await heard_again(store)
        store.reachable = False
        await asyncio.sleep(TIMES.lease / 2)
        store.reachable = True
        await heard_again(store)
        assert keeper.holds


async def test_a_long_absence_of_the_store_ends_the_body_with_the_lease() -> None:
    store = FarStore()
    keeper = await granted(store)
    began_at = time.monotonic()
    store.reachable = False
    with pytest.raises(LeaseLost):
        await work_for_ever(keeper)
    assert time.monotonic() - began_at < 2 * TIMES.lease


async def test_after_a_long_stop_the_store_is_asked_before_anything_is_written() -> None:
    store = FarStore()
    await granted(store)
    begun = await store.begin(OBJECT_ID, 10, "worker")
    assert not isinstance(begun, Granted)
    now = 0.0
    lease = Lease(OBJECT_ID, token=-1, size=10, worker="worker")
    keeper = LeaseKeeper(store, lease, TIMES, asked_at=0.0, clock=lambda: now)
    await keeper.confirm()
    now = 1000.0
    with pytest.raises(LeaseLost):
        await keeper.confirm()


async def test_a_cancellation_from_outside_stays_one() -> None:
    store = FarStore()
    keeper = await granted(store)
    entered = asyncio.Event()

    async def body() -> None:
        async with keeper.kept():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_bodys_own_error_comes_out() -> None:
    keeper = await granted(FarStore())
    with pytest.raises(TimeoutError, match="mine"):
        async with keeper.kept():
            raise TimeoutError("mine")
