"""Both adapters and a small model agree on every random sequence of calls. The counters always equal the sums."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import AdmissionQuestion, footprint
from distributor_node.shared.ports.state_store import (
    Fetch,
    Granted,
    IndexEntry,
    Lease,
    PolicyState,
    StateStore,
    Term,
)
from tests.contract.state_harness import LONG, Harness, memory_harness, redis_harness

LIMIT = 6000
_OBJECTS = st.sampled_from([ObjectId(str(number)) for number in range(1, 5)])
_SIZES = st.sampled_from([0, 1, 500, 1500, 3000, 4976, 4977, 10_000])
_NAMES = st.sampled_from(["one", "two"])


class Together(RuleBasedStateMachine):
    """Answers are compared without their tokens, which are each store's own."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.harnesses: list[Harness] = self.runner.run(self._open())
        self.leases: dict[ObjectId, list[Lease]] = {}
        self.stored: dict[ObjectId, int] = {}
        self.reserved: dict[ObjectId, int] = {}  # bytes that the reservation covers
        self.sizes: dict[ObjectId, int] = {}  # of the objects being fetched

    async def _open(self) -> list[Harness]:
        prefix = f"test-{uuid.uuid4().hex[:12]}:"
        harnesses = [
            await self.stack.enter_async_context(memory_harness(LONG, LIMIT)),
            await self.stack.enter_async_context(redis_harness(self.url, prefix, LONG, LIMIT)),
        ]
        for harness in harnesses:
            await harness.reconciled()
        return harnesses

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()

    def both(self, verb: Callable[[StateStore, Term], Awaitable[Any]]) -> list[Any]:
        async def run() -> list[Any]:
            return [await verb(harness.store, harness.term) for harness in self.harnesses]

        return self.runner.run(run())

    def agreed(self, verb: Callable[[StateStore, Term], Awaitable[Any]]) -> Any:
        first, second = self.both(verb)
        assert first == second
        return first

    def with_leases(self, object_id: ObjectId, verb: Callable[[StateStore, Lease], Awaitable[Any]]) -> Any:
        """Use the last lease that was granted for the object, lost or not; None if there was none."""
        leases = self.leases.get(object_id)
        if leases is None:
            return None
        by_store = {id(harness.store): lease for harness, lease in zip(self.harnesses, leases, strict=True)}
        return self.agreed(lambda store, _: verb(store, by_store[id(store)]))

    @rule(object_id=_OBJECTS, name=_NAMES, size=_SIZES, low=st.sampled_from([None, 0, LIMIT // 3]))
    def claim(self, object_id: ObjectId, name: str, size: int, low: int | None) -> None:
        """With a low watermark: large objects need a second view, which no object has within an hour."""
        question = None if low is None else AdmissionQuestion(size, 20, low, view_window=3600.0)
        first, second = self.both(lambda store, _: store.claim(object_id, name, question))
        assert (first.won, first.admitted) == (second.won, second.admitted)

    @rule(object_id=_OBJECTS, name=_NAMES, queued=st.booleans())
    def mark_queued_or_withdraw(self, object_id: ObjectId, name: str, queued: bool) -> None:
        self.both(lambda store, _: (store.mark_queued if queued else store.release_claim)(object_id, name))

    @rule(object_id=_OBJECTS, size=_SIZES, name=_NAMES)
    def begin(self, object_id: ObjectId, size: int, name: str) -> None:
        first, second = self.both(lambda store, _: store.begin(object_id, size, name))
        assert type(first) is type(second)
        if isinstance(first, Granted):
            assert first.resumed == second.resumed == (object_id in self.reserved)
            self.leases[object_id] = [first.lease, second.lease]
            self.reserved[object_id] = max(size, self.reserved.get(object_id, 0))
            self.sizes[object_id] = size
            assert first.lease.surplus == second.lease.surplus == self.reserved[object_id] - size
            taken = sum(map(footprint, itertools.chain(self.stored.values(), self.reserved.values())))
            assert taken <= LIMIT

    @rule(object_id=_OBJECTS)
    def commit(self, object_id: ObjectId) -> None:
        if self.with_leases(object_id, lambda store, lease: store.commit(lease, time.time())):
            del self.reserved[object_id]
            self.stored[object_id] = self.sizes[object_id]

    @rule(object_id=_OBJECTS)
    def return_surplus(self, object_id: ObjectId) -> None:
        if self.with_leases(object_id, lambda store, lease: store.renew(lease)):
            self.with_leases(object_id, lambda store, lease: store.return_surplus(lease))
            self.reserved[object_id] = self.sizes[object_id]

    @rule(object_id=_OBJECTS, held=st.sampled_from([None, 0, 50, 299, 650]))
    def park(self, object_id: ObjectId, held: int | None) -> None:
        if self.with_leases(object_id, lambda store, lease: store.renew(lease)) and held is not None:
            self.reserved[object_id] = min(held, self.reserved[object_id])
            self.sizes[object_id] = min(held, self.sizes[object_id])
        self.with_leases(object_id, lambda store, lease: store.park(lease, held))

    @rule(object_id=_OBJECTS, views=st.integers(1, 3))
    def save_policy(self, object_id: ObjectId, views: int) -> None:
        entry = IndexEntry(object_id, 1, views, 1.5, 0.1)
        self.both(lambda store, term: store.save_policy(term, [entry], PolicyState()))

    @rule(object_id=_OBJECTS)
    def release(self, object_id: ObjectId) -> None:
        if self.with_leases(object_id, lambda store, lease: store.renew(lease)):
            self.with_leases(object_id, lambda store, lease: store.release(lease))
            del self.reserved[object_id]

    @rule(object_id=_OBJECTS)
    def steal_lease(self, object_id: ObjectId) -> None:
        leases = self.both(lambda store, term: store.steal_lease(term, object_id))
        assert (leases[0] is None) == (leases[1] is None)
        if leases[0] is not None:
            self.leases[object_id] = leases

    @rule(object_id=_OBJECTS)
    def evict(self, object_id: ObjectId) -> None:
        self.agreed(lambda store, term: store.begin_eviction(term, object_id, 0))

    @rule(object_id=_OBJECTS, finished=st.booleans())
    def end_eviction(self, object_id: ObjectId, finished: bool) -> None:
        if not finished:
            self.both(lambda store, term: store.cancel_eviction(term, object_id))
            return
        freed = self.agreed(lambda store, term: store.finish_eviction(term, object_id))
        if freed:
            assert freed == footprint(self.stored.pop(object_id))

    @rule(object_id=_OBJECTS)
    def forget(self, object_id: ObjectId) -> None:
        async def forget(store: StateStore, _: Term) -> bool:
            seen = {entry.object_id: entry.generation async for batch in store.entries() for entry in batch}
            return await store.forget(object_id, seen.get(object_id, 0))

        if self.agreed(forget):
            del self.stored[object_id]

    @rule(object_id=_OBJECTS, size=st.sampled_from([0, 700, 1500]))
    def adopt(self, object_id: ObjectId, size: int) -> None:
        entry = IndexEntry(object_id, size, 1, 1.0)
        taken = sum(map(footprint, itertools.chain(self.stored.values(), self.reserved.values())))
        if taken + footprint(size) > LIMIT:
            return  # adopting may pass the limit; then `begin` could not be held against it
        if self.agreed(lambda store, term: store.adopt(term, entry)):
            self.stored[object_id] = size
            self.reserved.pop(object_id, None)

    @rule(object_id=_OBJECTS)
    def adopt_partial(self, object_id: ObjectId) -> None:
        taken = sum(map(footprint, itertools.chain(self.stored.values(), self.reserved.values())))
        if taken + footprint(300) > LIMIT:
            return
        if self.agreed(lambda store, term: store.adopt_partial(term, object_id, 300)):
            if object_id not in self.reserved:
                self.sizes[object_id] = 300
            self.reserved[object_id] = 300

    @invariant()
    def usage_is_the_sum_of_the_parts(self) -> None:
        usage = self.agreed(lambda store, _: store.usage())
        assert usage.used == sum(map(footprint, self.stored.values()))
        assert usage.reserved == sum(map(footprint, self.reserved.values()))
        assert usage.objects == len(self.stored)

    @invariant()
    def fetches_are_the_same(self) -> None:
        async def fetches(store: StateStore, _: Term) -> dict[ObjectId, Fetch]:
            return {
                fetch.object_id: replace(fetch, lease_left=0.0, age=0.0) for fetch in await store.fetches()
            }

        known = self.agreed(fetches)
        reserved = {object_id: fetch.reserved for object_id, fetch in known.items() if fetch.reserved}
        assert reserved == {object_id: footprint(size) for object_id, size in self.reserved.items()}

    @invariant()
    def entries_are_the_same(self) -> None:
        async def views(store: StateStore, _: Term) -> dict[ObjectId, int]:
            return {entry.object_id: entry.frequency async for batch in store.entries() for entry in batch}

        self.agreed(views)


@pytest.mark.usefixtures("redis_server")
def test_adapters_agree_whatever_happens(redis_url: str) -> None:
    Together.url = redis_url
    run_state_machine_as_test(
        Together,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
