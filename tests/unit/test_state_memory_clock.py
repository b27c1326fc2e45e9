"""A clock that is set back under the memory store. test_state_redis_faults.py has the same test with a server."""

from __future__ import annotations

from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import FetchPhase, Granted, HeldElsewhere

ONE, TWO, THREE = ObjectId("1"), ObjectId("2"), ObjectId("3")
HOUR = 3600.0


async def test_a_clock_set_back_extends_no_lease_no_failure_and_no_term() -> None:
    now = 1_700_000_000.0
    times = StateTimeouts(lease_seconds=15.0, claim_seconds=5.0)
    store = MemoryStateStore(1_000_000, times, lambda: now)
    term = await store.lead("one", 10)
    assert term is not None
    await store.set_reconciled(term)
    assert isinstance(await store.begin(ONE, 100, "a worker that dies"), Granted)
    assert (await store.claim(TWO, "an api that dies")).won
    await store.record_failure(THREE, "broken", 30)

    now -= HOUR
    held = await store.begin(ONE, 100, "worker-2")
    assert isinstance(held, HeldElsewhere)
    assert held.seconds_left <= 15
    assert not (await store.claim(TWO, "api-2")).won
    failure = (await store.find(THREE)).failure
    assert failure is not None
    assert failure.seconds_left <= 30
    assert await store.lead("a standby", 10) is None

    now += 16
    fetch = (await store.find(ONE)).fetch
    assert fetch is not None
    assert fetch.phase is FetchPhase.PARKED
    assert isinstance(await store.begin(ONE, 100, "worker-2"), Granted)
    assert (await store.claim(TWO, "api-2")).won
    assert await store.lead("a standby", 10) is not None
