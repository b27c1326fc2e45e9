"""A node whose processes die and stop at any point: the state machine of `test_model.py`.

Store, queue, volume, workers and evictors are the real ones. Scripted: sources, deaths, and what the servers lose.
"""

from __future__ import annotations

import asyncio
import copy
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from distributor_node.services.fetcher.admission import Admission, AdmissionRules, LeaseTimes
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.fetcher import DeadLetterHandler, FailureRecorder, Worker
from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_memory.tables import Tables
from distributor_node.shared.adapters.volume import OpenObject, PartialFile, PartialReader, Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeFull
from distributor_node.shared.domain.extents import BLOCK
from distributor_node.shared.domain.jobs import FetchJob, JobOutcome, Nack
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import Access, Lease, StateStore, Term
from distributor_node.shared.runtime.threads import BlockingPool
from tests.chaos.model_parts import (
    IDS,
    LIMIT,
    MAX_SHARE,
    PLANS,
    RETRIES,
    SIZES,
    SNAPSHOTS,
    Killed,
    Leader,
    ScriptedSource,
    StayingNames,
    StoreOf,
    body_of,
    media_object,
)

ids = st.sampled_from(IDS).map(ObjectId)


class WorkerStore(StoreOf):
    """As the worker sees it. Where it gives up a fetch, only what the file holds stays reserved."""

    async def park(self, lease: Lease, held: int | None = None) -> None:
        if self._node.gives_up and held is None:
            held = self._node.volume.measure_partial(lease.object_id)
        await self._node.state.park(lease, held)


def _bytes_of(path: Path) -> int:
    """As in `bytes_on_volume`: of a partial file without its holes."""
    seen = path.stat()
    return min(seen.st_size, seen.st_blocks * 512) if path.suffix == ".part" else seen.st_size


class Node(RuleBasedStateMachine):
    """Over the store in memory, whose clock is the test's."""

    times = StateTimeouts()
    leadership = 10.0  # seconds
    failure_recorder: type[FailureRecorder] = FailureRecorder

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.volume = Volume(Path(self.folder.name) / "volume")
        self.volume.prepare()
        self.old_node = StayingNames(Path(self.folder.name) / "old")
        self.old_node.mkdir()
        self.now = time.time()
        self.sizes = dict.fromkeys(IDS, SIZES[1])  # as the catalog has it
        self.full = 0.0  # see fill_store
        self.snapshots: list[Any] = []
        self.readers: list[OpenObject | PartialReader] = []
        self.followers: list[PartialReader] = []  # of partial files that may be incomplete
        self.gives_up = False
        self.purged: set[ObjectId] = set()  # and neither fetched nor requested since
        self.fetched_in_between: ObjectId | None = None
        self.source, self.dies_before, self.dies_after = ScriptedSource(), "", ""
        self.runner.run(self._start())
        self.reconcile()

    async def _start(self) -> None:
        self.queue = MemoryJobQueue(RETRIES)
        await self.queue.open()
        self.state = await self._make_store()
        self.disk = BlockingPool(4)
        worker_store = cast("StateStore", WorkerStore(self, self._die_at))
        # Nothing waits: the clock of the store moves by rules only
        rules = AdmissionRules(LIMIT, space_wait=0.0, lease=0.0)
        times = LeaseTimes(self.times.lease_seconds, self.times.lease_seconds / 3)
        self.worker = Worker(
            Admission(worker_store, self.volume, self.disk, rules, "worker"),
            FetchRunner(worker_store, self.volume, self.source, self.disk, times),
            self.failure_recorder(worker_store, RETRIES, 1.0),
        )
        self.dead_letter_handler = DeadLetterHandler(
            self.state, self.volume, self.disk, "worker", failure_memory=1.0
        )
        self.acting, self.standby = Leader(self, "one"), Leader(self, "two")

    def teardown(self) -> None:
        try:
            self.make_room_in_store()
            self._quiesce()
        finally:
            self.runner.run(self._close())
            self.runner.close()
            self.volume.close()
            self.folder.cleanup()

    async def _close(self) -> None:
        if self.standby.task is not None:
            self.standby.task.cancel()
            await asyncio.wait({self.standby.task})
        await self.disk.close()
        await self.queue.close()
        await self.state.close()

    # What differs with the store

    async def _make_store(self) -> Any:
        return MemoryStateStore(LIMIT, self.times, lambda: self.now)

    async def _empty_store(self) -> None:
        self.state._tables = Tables(LIMIT, self.times, lambda: self.now)

    async def _snapshot(self) -> Any:
        return copy.deepcopy(self.state.tables)

    async def _restore(self, snapshot: Any) -> None:
        self.state._tables = tables = copy.deepcopy(snapshot)
        tables.reconciled = False  # the server was restarted

    async def _set_full(self, share: float) -> None:
        """`share` of the server's memory that is in use, 0: it has room. In memory nothing is ever full."""

    async def _pass(self, seconds: float) -> None:
        self.now += seconds

    # Rules

    async def _term(self) -> Term:
        while True:
            term: Term | None = await self.state.lead(self.acting.holder, self.leadership)
            if term is not None:
                return term
            await self._pass(1800.0)  # the clock was put back during the term of the other one

    async def _die_at(self, name: str, after: bool) -> None:
        if name == (self.dies_after if after else self.dies_before):
            raise Killed

    @rule(object_id=ids, dies=st.booleans())
    def request(self, object_id: ObjectId, dies: bool) -> None:
        """A miss; `dies`: the API process is killed between claim and publishing."""
        self.runner.run(self._ask(object_id, dies))

    async def _ask(self, object_id: ObjectId, dies: bool = False) -> None:
        if self.volume.complete_record(object_id) is not None:
            return
        try:
            claim = await self.state.claim(object_id, "api")
        except StateStoreUnavailable:
            assert self.full > MAX_SHARE, "a server that is just full takes claims"
            return
        if claim.won and not dies:
            known = media_object(object_id, self.sizes[object_id])
            await self.queue.publish(FetchJob(known, "", self.now, claim=claim.serial))
            await self.state.mark_queued(object_id, "api")

    async def fetch_in_between(self) -> None:
        """The fetch of `import_files`, whose worker dies."""
        object_id, self.fetched_in_between = self.fetched_in_between, None
        if object_id is not None:
            await self._ask(object_id)
            await self._one_job("die_in_mid_body", 0.5)

    @rule(object_id=ids, plan=st.sampled_from(PLANS), share=st.floats(0, 1))
    def request_and_work(self, object_id: ObjectId, plan: str, share: float) -> None:
        self.request(object_id, False)
        self.work(plan, share)

    @rule(wanted=st.sets(ids, min_size=2))
    def fetch_many(self, wanted: set[ObjectId]) -> None:
        """More than there is room for."""
        for object_id in sorted(wanted):
            self.request(object_id, False)
            self.work("finish", 1.0)

    @rule(object_id=ids, sizes=st.permutations(SIZES), plan=st.sampled_from(PLANS), share=st.floats(0.5, 1))
    def change_size_in_mid_fetch(
        self, object_id: ObjectId, sizes: Sequence[int], plan: str, share: float
    ) -> None:
        """The catalog describes other content while a job waits for so long that it counts as lost.

        The second job finds the partial file of the first.
        """
        for size in sizes[:2]:
            self.sizes[object_id] = size
            self.request(object_id, False)
            self.advance_clock(3600.0)
        self.work("sources_fail", share)
        self.work(plan, share)

    @rule(object_id=ids, size=st.sampled_from(SIZES))
    def change_size(self, object_id: ObjectId, size: int) -> None:
        """The catalog describes other content from now on. Jobs that are published keep what they say."""
        self.sizes[object_id] = size

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
                self.purged.discard(job.object_id)
                return await self._fetch(job, plan, share)
            finally:
                ended.set()

        task = asyncio.create_task(self.queue.consume(handle, 1, self.dead_letter_handler.handle))
        await asyncio.wait({asyncio.ensure_future(ended.wait()), task}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return True

    async def _fetch(self, job: FetchJob, plan: str, share: float) -> JobOutcome:
        self.source.plan, self.source.share, self.gives_up = plan, share, plan == "give_up"
        self.dies_after = "begin" if plan == "die_after_begin" else ""
        self.dies_before = "commit" if plan == "die_before_commit" else ""
        errors = {"die_before_publish": Killed(), "full_at_publication": VolumeFull("full")}
        with ExitStack() as stack:
            if plan in errors:
                stack.enter_context(patch.object(PartialFile, "publish", side_effect=errors[plan]))
            try:
                return await asyncio.create_task(self.worker.handle(job))
            except Killed:
                return Nack()  # the broker delivers it again; the lease is left to run out

    @rule(
        object_id=ids, block=st.integers(0, 2), named=st.booleans(), torn=st.booleans(), unread=st.booleans()
    )
    def leave_a_sparse_file(
        self, object_id: ObjectId, block: int, named: bool, torn: bool, unread: bool
    ) -> None:
        """A fetcher with side streams was killed: its partial file has a hole, and perhaps more than it has named.

        `named`: a block behind the hole. `torn`: wrong bytes, which were never named. `unread`: its sidecar is lost.
        """
        record, reader = self.volume.partial_record(object_id), self.volume.open_partial(object_id)
        fetch = self.runner.run(self.state.find(object_id)).fetch
        if reader is None:
            return
        with closing(reader):
            if record is None or reader.state().verified:
                return
        if fetch is not None and (
            fetch.is_shrunk or fetch.worker in (self.acting.holder, self.standby.holder)
        ):
            return  # the fetcher has ended in good order, or its file was looked at since
        partial_file = self.volume.open_partial_for_writing(record)
        body, first = body_of(object_id, record.size), block * BLOCK
        written = partial_file.extents
        if not partial_file.is_sparse:
            partial_file.make_sparse(written.prefix)
        if named and first < record.size:
            partial_file.write(first, body[first : first + BLOCK])
            written = written.adding(first, min(first + BLOCK, record.size))
        partial_file.name_extents(written)
        missing = written.gap_at(0, record.size)
        if torn and missing is not None:
            partial_file.write(missing.first, b"?" * missing.length)
        partial_file.close()
        if unread:
            (self.volume.root / "incoming" / f"{object_id}.json").write_bytes(b"{")

    @rule(object_id=ids)
    def evict(self, object_id: ObjectId) -> None:
        async def evict() -> None:
            await self.acting.work("evict", self._existing(object_id), await self._term())

        self.runner.run(evict())

    @rule(object_id=ids, seconds=st.sampled_from([0.0, 10.0]))
    def make_room(self, object_id: ObjectId, seconds: float) -> None:
        """Whole and partial objects compete. After ten seconds no worker resumes what was parked."""

        async def make_room() -> None:
            await self._pass(seconds)
            spared = self._followed()
            await self.acting.work("make_room", object_id, await self._term())
            for reader in spared:
                assert not reader.state().unlinked, "a follower keeps it"

        self.runner.run(make_room())

    @rule(object_id=ids)
    def evict_partial(self, object_id: ObjectId) -> None:
        async def evict() -> None:
            spared = self._followed()
            await self.acting.work("evict_partial", object_id, await self._term())
            for reader in spared:
                assert not reader.state().unlinked, "a follower keeps it"

        self.runner.run(evict())

    def _followed(self) -> Sequence[PartialReader]:
        """Followers of files that are not verified, and are all that there is of their objects."""
        return [
            reader
            for reader in self.followers
            if not (reader.state().unlinked or reader.state().verified)
            and self.volume.find_object(reader.object_id) is None
        ]

    @rule(object_id=ids)
    def follow(self, object_id: ObjectId) -> None:
        """A client begins to be sent a partial object."""
        reader = self.volume.open_partial(object_id)
        if reader is not None:
            self.followers.append(reader)

    @rule()
    def finish_following(self) -> None:
        if self.followers:
            self.followers.pop(0).close()

    @rule(object_id=ids, plan=st.sampled_from(PLANS), shares=st.tuples(st.floats(0.1, 1), st.floats(0, 1)))
    def give_up_and_resume(self, object_id: ObjectId, plan: str, shares: tuple[float, float]) -> None:
        """Its viewers leave, room is made, and another one comes."""
        self.request(object_id, False)
        self.work("give_up", shares[0])
        self.make_room(object_id, 10.0)
        self.request(object_id, False)
        self.work(plan, shares[1])

    @rule()
    def reconcile(self) -> None:
        async def reconcile() -> None:
            await self.acting.work("reconcile", ObjectId("1"), await self._term())

        self.runner.run(reconcile())

    @rule(object_id=ids)
    def purge_while_it_is_read(self, object_id: ObjectId) -> None:
        self.read(object_id)
        self.purge(self._existing(object_id))

    @rule(object_id=ids)
    def purge(self, object_id: ObjectId) -> None:
        """The operator's purge. Once it is completed, nothing but a request may bring the object back."""

        async def purge() -> None:
            await self.state.request_purges([object_id])
            await self.acting.purger.step(await self._term())
            if object_id not in [request.object_id for request in await self.state.pending_purges(100)]:
                self.purged.add(object_id)

        self.runner.run(purge())

    @rule(
        files=st.dictionaries(ids, st.tuples(st.sampled_from(SIZES), st.booleans()), min_size=1, max_size=3),
        fetched=st.booleans(),
        again=st.booleans(),
    )
    def import_files(self, files: Mapping[ObjectId, tuple[int, bool]], fetched: bool, again: bool) -> None:
        """As at the start of a term. There must be room: the import itself asks for none, so objects are evicted.

        `files`: sizes, which need not be those of the catalog, and whether the object is purged before. `fetched`: the
        fetch of the first begins when the files are in their places and not yet in the index. `again`: what was
        imported is evicted, and another term begins.
        """
        for object_id, (size, purged) in files.items():
            path = Path(self.old_node / object_id)
            path.unlink(missing_ok=True)  # its inode may be that of an object
            path.write_bytes(body_of(object_id, size))
            if purged:
                self.purge(object_id)

        async def import_files() -> None:
            term = await self._term()
            await self.acting.work("reconcile", ObjectId("1"), term)
            pending = sum(footprint(path.stat().st_size) for path in self.old_node.iterdir())
            needed = pending + footprint(max(SIZES))
            for entry in list(self.acting.index.policy.dump()):
                if (await self.state.usage()).free < needed:
                    await self.acting.work("evict", entry.object_id, term)
            usage = await self.state.usage()
            if usage.reconciled and usage.free >= needed:
                self.fetched_in_between = min(files) if fetched else None
                await self.acting.node_import.link_files(partial(self.acting.reconciliation.recheck, term))
                self.fetched_in_between = None
                await self.acting.work("reconcile", ObjectId("1"), term)

        self.runner.run(import_files())
        if again:
            for object_id in files:
                self.evict(object_id)
            self.runner.run(import_files())

    @rule(
        kind=st.sampled_from(
            ("evict", "purge", "settle", "sweep", "shrink", "evict_partial", "make_room", "reconcile")
        ),
        object_id=ids,
        steps=st.integers(0, 12),
    )
    def stop_leader(self, kind: str, object_id: ObjectId, steps: int) -> None:
        """The leader is stopped in the middle of its work, for longer than its term; the other one takes over."""
        if self.standby.task is not None and not self.standby.task.done():
            return

        async def stop() -> None:
            if await self.acting.run(self.acting.work(kind, object_id, await self._term()), steps):
                self.acting, self.standby = self.standby, self.acting
                await self._pass(self.leadership + 0.01)

        self.runner.run(stop())

    @rule()
    def resume_leader(self) -> None:
        self.runner.run(self.standby.resume())

    @rule(object_id=ids, views=st.integers(1, 5))
    def access(self, object_id: ObjectId, views: int) -> None:
        async def access() -> None:
            try:
                await self.state.record_accesses([Access(object_id, views, self.now)])
            except StateStoreUnavailable:
                assert self.full

        self.runner.run(access())

    @rule(object_id=ids)
    def read(self, object_id: ObjectId) -> None:
        """A client begins to be sent a complete or a verified object, which may not go before it ends."""
        object_id = self._existing(object_id)
        reader = self.volume.open_object(object_id) or self.volume.open_partial(object_id)
        if reader is None:
            return
        verified = isinstance(reader, OpenObject) or reader.state().verified
        if verified and reader.lock_shared():
            self.readers.append(reader)
        else:
            reader.close()

    @rule()
    def finish_reading(self) -> None:
        if self.readers:
            self.readers.pop(0).close()

    @rule()
    def lose_store(self) -> None:
        """FLUSHALL: claims, leases, counters and the index are gone."""
        self.snapshots.clear()
        self.runner.run(self._empty_store())

    @rule(steps=st.integers(1, SNAPSHOTS))
    def lose_last_second(self, steps: int) -> None:
        """The store is killed and started again: what it was told last is gone."""
        kept = self.snapshots[:-steps]
        if kept:
            self.runner.run(self._restore(kept[-1]))
            self.snapshots = kept

    @rule(share=st.sampled_from((1.0, 2.0)))
    def fill_store(self, share: float) -> None:
        """The store refuses to hold more: what holds, frees and ends things works all the same.

        2.0: its index alone is larger than its memory, because an operator has taken memory away.
        """
        self.full = share
        self.runner.run(self._set_full(share))

    @rule()
    def make_room_in_store(self) -> None:
        self.full = 0.0
        self.runner.run(self._set_full(0.0))

    @rule(seconds=st.sampled_from([1.0, 20.0, 100.0, 3600.0, -3600.0]))
    def advance_clock(self, seconds: float) -> None:
        """An hour either way: the store's clock is put right."""
        self.runner.run(self._pass(seconds))

    @rule(object_id=ids)
    def lose_a_file(self, object_id: ObjectId) -> None:
        for path in self.volume.root.glob(f"objects/*/{object_id}"):
            path.unlink()

    # What holds after each of them

    @invariant()
    def store_is_on_disk(self) -> None:
        """In case it is killed soon."""
        self.snapshots.append(self.runner.run(self._snapshot()))
        del self.snapshots[: -SNAPSHOTS - 1]

    @invariant()
    def usage_is_within_limit(self) -> None:
        usage = self.runner.run(self.state.usage())
        if usage.reconciled:
            assert usage.used + usage.reserved <= LIMIT, usage
            assert self._bytes() <= usage.used + usage.reserved, (self._files(), usage)
        assert self._bytes() <= LIMIT

    @invariant()
    def every_object_is_complete(self) -> None:
        for path in self.volume.root.glob("objects/*/*"):
            size = path.stat().st_size
            assert size in SIZES
            assert path.read_bytes() == body_of(path.name, size)
            record = self.volume.read_record(ObjectId(path.name))
            assert record is None or self.volume.complete_record(ObjectId(path.name)) in (None, record)

    @invariant()
    def what_a_follower_may_read_is_right(self) -> None:
        """Of a partial file, unless its source has sent something else."""
        for path in self.volume.root.glob("incoming/*.part"):
            object_id = ObjectId(path.stem)
            record, reader = self.volume.partial_record(object_id), self.volume.open_partial(object_id)
            if reader is None:
                continue
            with closing(reader):
                state = reader.state()
                if record is None or state.extents is None:
                    continue
                for extent in state.extents:
                    data = reader.read(extent.first, extent.length)
                    assert data in (
                        body_of(object_id, record.size)[extent.first : extent.end],
                        b"!" * len(data),
                    )

    @invariant()
    def what_was_purged_stays_away(self) -> None:
        there = {path.name for path in self.volume.root.glob("objects/*/*")}
        assert not there & self.purged, f"{there} of {self.purged}"

    @invariant()
    def what_is_being_sent_is_whole(self) -> None:
        for reader in self.readers:
            size = os.fstat(reader.descriptor).st_size
            object_id = reader.object_id if isinstance(reader, PartialReader) else reader.record.object_id
            assert size in SIZES
            assert reader.read(0, size) == body_of(object_id, size)

    def _existing(self, object_id: ObjectId) -> ObjectId:
        """The object, or another one that is on the volume."""
        there = sorted(path.name for path in self.volume.root.glob("objects/*/*"))
        return ObjectId(there[0]) if there and object_id not in there else object_id

    def _files(self) -> Sequence[tuple[str, int]]:
        globs = ("objects/*/*", "incoming/*.part", "leaving/*")
        paths = [path for pattern in globs for path in self.volume.root.glob(pattern)]
        return [(str(path.relative_to(self.volume.root)), _bytes_of(path)) for path in paths]

    def _bytes(self) -> int:
        return sum(size for _, size in self._files())

    def _quiesce(self) -> None:
        """Time passes, the evictor looks, workers work: every job ends, and nothing is promised any more."""
        while self.readers:
            self.finish_reading()
        while self.followers:
            self.finish_following()
        self.resume_leader()

        async def rest() -> None:
            jobs = (await self.queue.depth()).ready
            for _ in range(40 + (1 + len(RETRIES.delays)) * jobs):
                await self._pass(100)
                term = await self._term()
                await self.acting.work("reconcile", ObjectId("1"), term)
                for entry in list(self.acting.index.policy.dump()):
                    await self.acting.work("evict", entry.object_id, term)
                await self.acting.purger.step(term)
                if not await self._one_job("finish", 1.0) and not (await self.queue.depth()).delayed:
                    break
            depth = await self.queue.depth()
            assert (depth.ready, depth.delayed) == (0, 0), depth
            await self._pass(100)
            term = await self._term()
            for fetch in await self.state.fetches():
                await self.acting.reaper.discard(term, fetch.object_id)
            await self.acting.work("reconcile", ObjectId("1"), term)
            # Of objects whose lease was live until now: a clock that was put back has prolonged it
            await self.acting.purger.step(term)
            usage = await self.state.usage()
            assert usage.reconciled
            assert usage.reserved == 0, await self.state.fetches()
            stored = {
                f"{entry.object_id}": entry.size async for batch in self.state.entries() for entry in batch
            }
            files = self._files()
            assert stored == {path.rpartition("/")[2]: size for path, size in files}, files
            assert usage.used == sum(footprint(size) for _, size in files)
            assert not await self.state.pending_purges(100)

        self.runner.run(rest())
