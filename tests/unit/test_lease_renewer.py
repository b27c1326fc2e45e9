"""LeaseRenewer: renews the lease, and ends the fetch when the lease is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from distributor_node.services.evictor.leader_election import LeaderElection
from distributor_node.services.fetcher.admission import LeaseLost, LeaseRenewer, LeaseTimes
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Granted, Lease, Term
from distributor_node.shared.waiting import boot_time
from tests.waiting import DEFAULT_LIMIT

OBJECT_ID = ObjectId.parse("7")
TIMES = LeaseTimes(lease=1.5, renewal=0.1)


class UnreachableStore(MemoryStateStore):
    """A state store that can be unreachable."""

    def __init__(self) -> None:
        super().__init__(10**9, StateTimeouts(lease_seconds=TIMES.lease), time.time)
        self.reachable = True
        self.renewals = 0
        self.renewed = asyncio.Event()

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        if not self.reachable:
            raise StateStoreUnavailable("unreachable")
        self.renewals += 1
        self.renewed.set()
        return await super().renew(lease, source)


async def granted(store: UnreachableStore) -> LeaseRenewer:
    term = await store.lead("evictor", 60)
    assert term is not None
    await store.set_reconciled(term)
    requested_at = boot_time()
    result = await store.begin(OBJECT_ID, 10, "worker")
    assert isinstance(result, Granted)
    return LeaseRenewer(store, result.lease, TIMES, requested_at)


async def wait_for_renewal(store: UnreachableStore) -> None:
    store.renewed.clear()
    async with asyncio.timeout(DEFAULT_LIMIT):
        await store.renewed.wait()


async def run_forever(renewer: LeaseRenewer) -> None:
    async with renewer.running():
        await asyncio.Event().wait()


async def test_a_renewed_lease_outlives_its_duration() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    async with renewer.running():
        while store.renewals < 2 * TIMES.lease / TIMES.renewal:
            await wait_for_renewal(store)
        assert renewer.is_valid
        await renewer.ensure_valid()


async def test_a_new_source_is_reported_soon() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    async with renewer.running():
        await wait_for_renewal(store)
        renewer.set_source("http://a/7")
        await wait_for_renewal(store)
        fetch = (await store.find(OBJECT_ID)).fetch
        assert fetch is not None
        assert fetch.source == "http://a/7"


async def test_a_source_that_sent_everything_immediately_is_not_reported() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    async with renewer.running():
        renewer.set_source("http://a/7")
        for _ in range(10):
            await asyncio.sleep(0)
    assert store.renewals == 0


async def test_a_lost_lease_ends_the_body() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    await store.release(renewer.lease)
    with pytest.raises(LeaseLost):
        await run_forever(renewer)
    assert not renewer.is_valid
    with pytest.raises(LeaseLost):
        await renewer.ensure_valid()


async def test_a_short_store_outage_is_survived() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    async with renewer.running():
        await wait_for_renewal(store)
        store.reachable = False
        await asyncio.sleep(TIMES.lease / 2)
        store.reachable = True
        await wait_for_renewal(store)
        assert renewer.is_valid


async def test_a_long_store_outage_ends_the_body_with_the_lease() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    store.reachable = False
    with pytest.raises(LeaseLost):
        await run_forever(renewer)
    assert not renewer.is_valid


async def test_after_a_long_pause_the_lease_is_renewed_before_anything_is_written() -> None:
    store = UnreachableStore()
    await granted(store)
    result = await store.begin(OBJECT_ID, 10, "worker")
    assert not isinstance(result, Granted)
    now = 0.0
    lease = Lease(OBJECT_ID, token=-1, size=10, worker="worker")
    renewer = LeaseRenewer(store, lease, TIMES, requested_at=0.0, clock=lambda: now)
    await renewer.ensure_valid()
    now = 1000.0
    with pytest.raises(LeaseLost):
        await renewer.ensure_valid()


async def test_an_outer_cancellation_is_propagated() -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    entered = asyncio.Event()

    async def body() -> None:
        async with renewer.running():
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_bodys_own_error_is_raised() -> None:
    renewer = await granted(UnreachableStore())
    with pytest.raises(TimeoutError, match="mine"):
        async with renewer.running():
            raise TimeoutError("mine")


@pytest.fixture
def suspend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Suspends the machine for so many seconds: its monotonic clock stands still, the clock since its boot goes on."""
    read, slept = time.clock_gettime, [0.0]
    monkeypatch.setattr(
        time, "clock_gettime", lambda which: read(which) + (slept[0] if which == time.CLOCK_BOOTTIME else 0)
    )

    def add(seconds: float) -> None:
        slept[0] += seconds

    return add


async def test_a_lease_expires_while_the_machine_is_suspended(suspend: Callable[[float], None]) -> None:
    store = UnreachableStore()
    renewer = await granted(store)
    store.reachable = False
    before = renewer.is_valid
    suspend(TIMES.lease)
    assert (before, renewer.is_valid) == (True, False)
    with pytest.raises(LeaseLost):
        await renewer.ensure_valid()


async def test_a_term_ends_while_the_machine_is_suspended(suspend: Callable[[float], None]) -> None:
    class Silent(MemoryStateStore):
        terms = 0

        async def lead(self, holder: str, seconds: float) -> Term | None:
            self.terms += 1
            if self.terms > 1:
                raise StateStoreUnavailable("silent")
            return await super().lead(holder, seconds)

    led, ended = asyncio.Event(), asyncio.Event()

    async def main(_: Term) -> None:
        led.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    store = Silent(10**9, StateTimeouts(), time.time)
    serving = asyncio.create_task(LeaderElection(store, "one", 3600, 0.05).serve(main))
    async with asyncio.timeout(DEFAULT_LIMIT):
        await led.wait()
        suspend(3600)
        await ended.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
