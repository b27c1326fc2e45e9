"""State store, queue and volume together, driven in random order by requests, workers that die anywhere, evictors and
lost stores: no byte too many, no half object, no job lost, and everything comes to rest."""

from __future__ import annotations

import asyncio
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from distributor_node.services.evictor.adoption import Adoption, PartialReaper
from distributor_node.services.evictor.eviction import ObjectRemover
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.reconcile import Reconciliation
from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import PartialHeld, Volume
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome, Nack, Retry, RetryPlan
from distributor_node.shared.domain.objects import (
    ContentHash,
    MediaObject,
    ObjectId,
    StoredRecord,
    entity_tag,
)
from distributor_node.shared.ports.state_store import AlreadyStored, Granted, Lease, Term

SIZES = {"1": 1000, "2": 5000, "3": 9000, "4": 2500}
LIMIT = 24_000
TIMES = StateTimeouts()
PLANS = ("finish", "die_in_mid_body", "die_before_commit", "park", "wrong_bytes")


def body_of(object_id: str) -> bytes:
    return (object_id * SIZES[object_id]).encode()


def record_of(object_id: ObjectId) -> StoredRecord:
    body = body_of(object_id)
    content_hash = ContentHash("blake3", blake3(body).digest())
    etag = entity_tag(content_hash)
    return StoredRecord(object_id, len(body), etag, content_hash, "text/plain", int(time.time()))


class Node(RuleBasedStateMachine):
    """The real store (in memory), queue (in memory), volume and evictor's parts; workers as scripted here."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.volume = Volume(Path(self.folder.name))
        self.volume.prepare()
        self.now = time.time()
        self.queue = MemoryJobQueue(RetryPlan((0.0, 0.0, 0.0)))
        self.runner.run(self.queue.open())
        self.trusted = False
        self._new_store()
        self.reconcile()

    def teardown(self) -> None:
        try:
            self._quiesce()
        finally:
            self.runner.run(self.queue.close())
            self.runner.close()
            self.volume.close()
            self.folder.cleanup()

    def _new_store(self) -> None:
        self.state = MemoryStateStore(LIMIT, TIMES, lambda: self.now)
        self.index = EvictionIndex(self.state, self.volume, partial(make_policy, "lru-sp"), lambda: self.now)
        self.remover = ObjectRemover(self.state, self.volume, self.index)
        adoption = Adoption(self.state, self.volume, self.index)
        reaper = PartialReaper(self.state, self.volume, adoption, keep=3600, space_wait=10)
        self.reaper = reaper
        self.reconciliation = Reconciliation(
            self.state, self.volume, self.index, self.remover, adoption, reaper
        )
        self.trusted = False

    async def _term(self) -> Term:
        term = await self.state.lead("one", 10)
        assert term is not None
        return term

    @rule(object_id=st.sampled_from(sorted(SIZES)), dies=st.booleans())
    def request(self, object_id: str, dies: bool) -> None:
        """A miss; `dies`: the API process is killed between claim and publishing."""
        wanted = ObjectId(object_id)

        async def ask() -> None:
            if (
                self.volume.open_object(wanted) is None
                and (await self.state.claim(wanted, "api")).won
                and not dies
            ):
                known = MediaObject(wanted, SIZES[wanted], record_of(wanted).content_hash, "text/plain")
                await self.queue.publish(FetchJob(known, "", self.now))
                await self.state.mark_queued(wanted, "api")

        self.runner.run(ask())

    @rule(plan=st.sampled_from(PLANS), share=st.floats(0, 1))
    def work(self, plan: str, share: float) -> None:
        """One job, by a worker to which this happens after that share of the body."""
        self.runner.run(self._one_job(plan, share))

    async def _one_job(self, plan: str, share: float) -> bool:
        if not (await self.queue.depth()).ready:
            await asyncio.sleep(0)
            if not (await self.queue.depth()).ready:
                return False
        ended = asyncio.Event()

        async def handle(job: FetchJob) -> JobOutcome:
            if ended.is_set():  # one only
                await asyncio.Event().wait()
            try:
                return await self._fetch(job.object_id, plan, share)
            finally:
                ended.set()

        async def on_dead_letter(job: FetchJob, reason: str) -> None:
            await self.state.record_failure(job.object_id, reason, 1)

        task = asyncio.create_task(self.queue.consume(handle, 1, on_dead_letter))
        await asyncio.wait({asyncio.ensure_future(ended.wait()), task}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return True

    async def _fetch(self, object_id: ObjectId, plan: str, share: float) -> JobOutcome:
        if (found := self.volume.open_object(object_id)) is not None:
            found.close()
            return Ack("already_cached")
        begun = await self.state.begin(object_id, SIZES[object_id], "worker")
        if isinstance(begun, AlreadyStored):
            await self.state.forget(object_id, begun.generation)
            return Retry("an entry without its file")
        if not isinstance(begun, Granted):
            return Retry(type(begun).__name__)
        try:
            return await self._download(begun.lease, plan, share)
        except PartialHeld:
            await self.state.park(begun.lease)
            return Retry("held")

    async def _download(self, lease: Lease, plan: str, share: float) -> JobOutcome:
        object_id, body = lease.object_id, body_of(lease.object_id)
        file = self.volume.open_partial_for_writing(record_of(object_id))
        try:
            file.write(0, body[: int(len(body) * share)])
            if plan == "die_in_mid_body":
                return Nack()  # the broker delivers it again; the lease is left to run out
            if plan == "park":
                await self.state.park(lease)
                return Nack()
            if plan == "wrong_bytes":
                file.discard()
                await self.state.release(lease)
                return Retry("wrong bytes")
            file.write(0, body)
            file.mark_verified()
            file.publish(record_of(object_id))
            if plan == "die_before_commit":
                return Nack()
            await self.state.commit(lease, self.now)
            return Ack()
        finally:
            file.close()

    @rule(object_id=st.sampled_from(sorted(SIZES)))
    def evict(self, object_id: str) -> None:
        async def evict() -> None:
            await self.remover.evict(await self._term(), ObjectId(object_id), 0.0, "room")

        self.runner.run(evict())

    @rule()
    def reconcile(self) -> None:
        async def reconcile() -> None:
            self.trusted = await self.reconciliation.run(await self._term())

        self.runner.run(reconcile())

    @rule()
    def lose_store(self) -> None:
        """FLUSHALL: claims, leases, counters and the index are gone."""
        self._new_store()

    @rule(seconds=st.sampled_from([1.0, 20.0, 100.0, 3600.0, -3600.0]))
    def advance_clock(self, seconds: float) -> None:
        """An hour either way: the store's clock is put right."""
        self.now += seconds

    @rule(object_id=st.sampled_from(sorted(SIZES)))
    def lose_a_file(self, object_id: str) -> None:
        for path in self.volume.root.glob(f"objects/*/{object_id}"):
            path.unlink()

    @invariant()
    def usage_is_within_limit(self) -> None:
        usage = self.runner.run(self.state.usage())
        if usage.reconciled:
            assert usage.used + usage.reserved <= LIMIT
            assert self._bytes() <= usage.used + usage.reserved
        assert self._bytes() <= LIMIT

    @invariant()
    def every_object_is_complete(self) -> None:
        for path in self.volume.root.glob("objects/*/*"):
            assert path.read_bytes() == body_of(path.name)

    def _bytes(self) -> int:
        files = (*self.volume.root.glob("objects/*/*"), *self.volume.root.glob("incoming/*.part"))
        return sum(path.stat().st_size for path in files)

    def _quiesce(self) -> None:
        """Time passes, the evictor looks, workers work: every job ends, and nothing is promised any more."""

        async def rest() -> None:
            for _ in range(40):
                self.now += 100
                term = await self._term()
                await self.reconciliation.run(term)
                for entry in list(self.index.policy.dump()):
                    await self.remover.evict(term, entry.object_id, 0.0, "room")
                if not await self._one_job("finish", 1.0) and not (await self.queue.depth()).delayed:
                    break
            depth = await self.queue.depth()
            assert (depth.ready, depth.delayed) == (0, 0), depth
            self.now += 100
            term = await self._term()
            for fetch in await self.state.fetches():
                await self.reaper.discard(term, fetch.object_id)
            await self.reconciliation.run(term)
            usage = await self.state.usage()
            assert usage.reconciled
            assert usage.reserved == 0, await self.state.fetches()
            assert self._bytes() <= usage.used

        self.runner.run(rest())


def run_model(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Node,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.timeout(120)
def test_store_queue_and_volume_stay_consistent() -> None:
    run_model(8, 30)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_store_queue_and_volume_stay_consistent_for_longer() -> None:
    run_model(100, 60)
