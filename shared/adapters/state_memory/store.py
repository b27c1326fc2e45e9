"""The state store port in the memory of one process. No method awaits before it returns, so each is atomic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice

from distributor_node.shared.adapters.state_common import AnnouncementQueue, StateTimeouts
from distributor_node.shared.adapters.state_memory.tables import NOT_FOLLOWED, FetchRow, Tables
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import (
    OperatorState,
    OperatorStateSnapshot,
    Warming,
    WarmingScope,
)
from distributor_node.shared.domain.space import AdmissionQuestion, Followed, Followers, Usage, footprint
from distributor_node.shared.ports.state_store import (
    MAX_VIEWED,
    VIEWER_MEMORY,
    Access,
    AlreadyStored,
    Announcement,
    BeginResult,
    Claim,
    FailureCause,
    Fetch,
    FetchPhase,
    Granted,
    HeldElsewhere,
    IndexEntry,
    Lease,
    NeverFits,
    NoSpace,
    NotReconciled,
    ObjectStatus,
    PolicyState,
    ProcessReport,
    PurgeRequest,
    Superseded,
    Term,
    Topic,
    WorkerReport,
)

_ENTRIES_BATCH = 1000


class MemoryStateStore:
    """See the port for each method. All tasks of the process share one instance."""

    def __init__(self, limit: int, timeouts: StateTimeouts, clock: Callable[[], float]) -> None:
        """`limit`: of the volume, in bytes. `clock`: POSIX seconds."""
        self._tables = Tables(limit, timeouts, clock)

    @property
    def tables(self) -> Tables:
        """All that the store holds, for tests that lose a part of it as a server would."""
        return self._tables

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def ping(self) -> None:
        """Always available."""

    async def server_stats(self) -> None:
        """None: there is no server."""

    async def problems(self) -> Sequence[str]:
        return ()

    # Requests

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        return self._tables.object_status(object_id)

    async def claim(
        self,
        object_id: ObjectId,
        claimant: str,
        admission: AdmissionQuestion | None = None,
        trace: str = "",
    ) -> Claim:
        tables = self._tables
        object_status = tables.object_status(object_id)
        parked = object_status.fetch is not None and object_status.fetch.phase is FetchPhase.PARKED
        if object_status.failure or (object_status.fetch and not parked):
            return Claim(won=False, status=object_status)
        now, row = tables.clock(), tables.row(object_id)
        if row is not None and tables.job_waits(row):
            duration = tables.timeouts.queued_seconds
            tables.rows[object_id] = replace(row, ends=now + duration, duration=duration)
            return Claim(won=False, status=tables.object_status(object_id))
        if admission is not None and not parked and not tables.admits(object_id, admission):
            return Claim(won=False, status=ObjectStatus(fetch=None, failure=None), admitted=False)
        serial = tables.next_serial()
        kept = row if row is not None and parked else FetchRow(FetchPhase.CLAIMED, False, 0, 0, now, now, "")
        tables.rows[object_id] = replace(
            kept,
            phase=FetchPhase.CLAIMED,
            token=0,
            ends=now + tables.timeouts.claim_seconds,
            since=now,
            worker=claimant,
            source=None,
            duration=tables.timeouts.claim_seconds,
            job=serial,
            trace=trace,
        )
        return Claim(won=True, status=ObjectStatus(fetch=None, failure=None), serial=serial)

    async def mark_queued(self, object_id: ObjectId, claimant: str, serial: int = 0) -> None:
        tables = self._tables
        row = tables.row(object_id)
        claimed = row is not None and tables.phase(row) is FetchPhase.CLAIMED
        if row and claimed and row.worker == claimant and serial in (0, row.job):
            now, duration = tables.clock(), tables.timeouts.queued_seconds
            tables.rows[object_id] = replace(
                row, phase=FetchPhase.QUEUED, ends=now + duration, since=now, duration=duration
            )

    async def release_claim(self, object_id: ObjectId, claimant: str | None, serial: int = 0) -> None:
        tables = self._tables
        row = tables.row(object_id)
        claimed = row is not None and row.phase in (FetchPhase.CLAIMED, FetchPhase.QUEUED)
        if row and claimed and claimant in (None, row.worker) and serial in (0, row.job):
            if row.reserved:
                tables.park(object_id, row)
            else:
                tables.drop_fetch(object_id)
            tables.announce(Topic.FETCH_CHANGED, object_id)

    async def usage(self) -> Usage:
        tables = self._tables
        phases = [tables.phase(tables.row(known)) for known in tables.rows]
        rows = zip(phases, tables.rows.values(), strict=True)
        return Usage(
            limit=tables.limit,
            used=tables.used + tables.leaving,
            reserved=tables.reserved,
            objects=len(tables.objects),
            fetches=phases.count(FetchPhase.FETCHING),
            reconciled=tables.reconciled,
            churn=tables.churn,
            queued=phases.count(FetchPhase.QUEUED),
            leaving=tables.leaving,
            parked=phases.count(FetchPhase.PARKED),
            parked_bytes=sum(row.reservation for phase, row in rows if phase is FetchPhase.PARKED),
        )

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        if accesses:
            self._tables.log_accesses(accesses)

    # Fetching

    async def begin(
        self, object_id: ObjectId, size: int, worker: str, claim: int = 0, trace: str = ""
    ) -> BeginResult:
        tables = self._tables
        entry, row, now = tables.objects.get(object_id), tables.row(object_id), tables.clock()
        if entry:
            return HeldElsewhere(seconds_left=0.0) if entry.evicting else AlreadyStored(entry.generation)
        if row and tables.phase(row) is FetchPhase.FETCHING:
            if claim and row.job and claim != row.job:
                return Superseded()
            return HeldElsewhere(seconds_left=row.ends - now)
        if footprint(size) > tables.limit:
            return NeverFits()
        if not tables.reconciled:
            return NotReconciled()
        resumed = row is not None and row.reserved
        # Never less than before: the larger file of before may still be on the volume
        held = max(size, row.held_size) if row and resumed else size
        more = footprint(held) - (row.reservation if row else 0)
        missing = tables.used + tables.leaving + tables.reserved + more - tables.limit
        if more > 0 and missing > 0:
            return NoSpace(missing)
        lease = Lease(object_id, tables.next_serial(), size, worker, surplus=held - size)
        duration = tables.timeouts.lease_seconds
        tables.rows[object_id] = FetchRow(
            FetchPhase.FETCHING,
            True,
            size,
            lease.token,
            now + duration,
            now,
            worker,
            duration=duration,
            job=claim,
            held=held if held > size else 0,
            trace=trace or (row.trace if row else ""),
            views=row.views if row else 0,
            last_access=row.last_access if row else 0.0,
            priority=row.priority if row else 0.0,
            following=row.following if row else NOT_FOLLOWED,
        )
        tables.reserved += more
        tables.space_requests.pop(object_id, None)
        if resumed:
            tables.announce(Topic.FETCH_CHANGED, object_id)
        return Granted(lease, resumed)

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        tables = self._tables
        row, now = tables.leased(lease), tables.clock()
        if row is None:
            return False
        tables.rows[lease.object_id] = replace(
            row,
            ends=now + tables.timeouts.lease_seconds,
            duration=tables.timeouts.lease_seconds,
            since=row.since if row.ends > now else now,
            source=source or row.source,
        )
        if source and source != row.source:
            tables.announce(Topic.FETCH_CHANGED, lease.object_id)
        return True

    async def resize(self, lease: Lease, size: int) -> bool:
        tables = self._tables
        row = tables.leased(lease)
        if row is None:
            return False
        more = footprint(size) - row.reservation
        if more > 0 and tables.used + tables.leaving + tables.reserved + more > tables.limit:
            return False
        tables.rows[lease.object_id] = replace(row, size=size, held=0)
        tables.reserved += more
        if more < 0:
            tables.announce(Topic.SPACE_FREED, lease.object_id)
        return True

    async def return_surplus(self, lease: Lease) -> None:
        row = self._tables.leased(lease)
        if row and row.held:
            self._tables.rows[lease.object_id] = replace(row, held=0)
            self._tables.reserved -= row.reservation - footprint(row.size)
            self._tables.announce(Topic.SPACE_FREED, lease.object_id)

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        tables = self._tables
        row = tables.leased(lease)
        if row is None:
            return False
        last_access = min(stored_at, tables.clock())
        tables.put_object(IndexEntry(lease.object_id, row.size, max(1, row.views), last_access))
        tables.drop_fetch(lease.object_id)
        tables.failures.pop(lease.object_id, None)
        tables.announce(Topic.FETCH_CHANGED, lease.object_id)
        return True

    async def park(self, lease: Lease, held: int | None = None) -> None:
        row = self._tables.leased(lease)
        if row:
            freed = self._tables.park(lease.object_id, row, held)
            self._tables.announce(Topic.FETCH_CHANGED, lease.object_id)
            if freed:
                self._tables.announce(Topic.SPACE_FREED, lease.object_id)

    async def release(self, lease: Lease) -> None:
        if self._tables.leased(lease):
            self._tables.drop_fetch(lease.object_id)
            self._tables.announce(Topic.FETCH_CHANGED, lease.object_id)
            self._tables.announce(Topic.SPACE_FREED, lease.object_id)

    async def record_failure(
        self,
        object_id: ObjectId,
        reason: str,
        seconds: float,
        cause: FailureCause = FailureCause.OTHER,
    ) -> None:
        tables, now = self._tables, self._tables.clock()
        for expired in [known for known, (_, ends, *_) in tables.failures.items() if ends <= now]:
            del tables.failures[expired]
        tables.failures[object_id] = (reason, now + seconds, seconds, cause)
        tables.announce(Topic.FETCH_CHANGED, object_id)

    async def refute_failure(self, object_id: ObjectId, cause: FailureCause) -> bool:
        failed = self._tables.object_status(object_id).failure
        if failed is None or failed.cause is not cause:
            return False
        del self._tables.failures[object_id]
        return True

    async def request_space(self, object_id: ObjectId, size: int, seconds: float) -> None:
        tables = self._tables
        tables.space_requests[object_id] = (footprint(size), tables.clock() + seconds)
        tables.announce(Topic.SPACE_REQUESTED, object_id)

    async def forget(self, object_id: ObjectId, generation: int) -> bool:
        entry = self._tables.objects.get(object_id)
        if entry is None or entry.generation != generation:
            return False
        self._tables.drop_object(entry)
        return True

    # Workers and viewers

    async def report_worker(self, report: WorkerReport, seconds: float) -> None:
        self._tables.workers[report.worker] = (report, self._tables.clock(), seconds)

    async def withdraw_worker(self, worker: str) -> None:
        self._tables.workers.pop(worker, None)

    async def workers(self) -> Sequence[WorkerReport]:
        tables, now = self._tables, self._tables.clock()
        tables.workers = {
            worker: known for worker, known in tables.workers.items() if 0 <= now - known[1] < known[2]
        }
        return [replace(report, age=now - at) for _, (report, at, _) in sorted(tables.workers.items())]

    async def record_viewers(self, object_ids: Sequence[ObjectId]) -> None:
        viewed, now = self._tables.viewed, self._tables.clock()
        for object_id in object_ids:
            viewed.pop(object_id, None)
            viewed[object_id] = now
        while len(viewed) > MAX_VIEWED:
            del viewed[next(iter(viewed))]

    async def last_viewed(self, object_ids: Sequence[ObjectId]) -> Sequence[float | None]:
        viewed, now = self._tables.viewed, self._tables.clock()
        ages = [max(0.0, now - viewed[known]) if known in viewed else None for known in object_ids]
        return [age if age is not None and age < VIEWER_MEMORY else None for age in ages]

    async def record_wanted(self, object_id: ObjectId, positions: Sequence[int]) -> None:
        if positions:
            self._tables.record_wanted(object_id, positions)

    async def wanted_positions(self, object_ids: Sequence[ObjectId]) -> Sequence[Sequence[int]]:
        return [self._tables.wanted_positions(object_id) for object_id in object_ids]

    async def record_followers(self, process: str, followed: Sequence[Followed]) -> None:
        await self.record_viewers([one.object_id for one in followed])
        for one in followed:
            self._tables.record_followers(process, one)

    async def followers(self, object_id: ObjectId) -> Followers:
        return self._tables.followers(object_id)

    async def order_whole(self, object_id: ObjectId) -> None:
        self._tables.order_whole(object_id)

    # Reports of processes

    async def report_process(self, process: str, content: str, seconds: float) -> bool:
        tables, now = self._tables, self._tables.clock()
        tables.reports[process] = (content, now, seconds)
        return tables.reports_watched_until > now

    async def withdraw_process(self, process: str) -> None:
        self._tables.reports.pop(process, None)

    async def process_reports(self) -> Sequence[ProcessReport]:
        tables, now = self._tables, self._tables.clock()
        tables.reports = {
            name: known for name, known in tables.reports.items() if 0 <= now - known[1] < known[2]
        }
        return [
            ProcessReport(name, content, now - at)
            for name, (content, at, _) in sorted(tables.reports.items())
        ]

    async def watch_reports(self, seconds: float) -> None:
        self._tables.reports_watched_until = self._tables.clock() + seconds

    # Eviction, reconciliation, policy: the leading evictor

    async def lead(self, holder: str, seconds: float) -> Term | None:
        tables, now = self._tables, self._tables.clock()
        if tables.term is None or tables.term_ends <= now:
            tables.term = Term(holder, tables.next_serial())
        elif tables.term.holder != holder:
            tables.term_ends = min(tables.term_ends, now + seconds)  # the clock may have been set back
            return None
        tables.term_ends = now + seconds
        return tables.term

    async def resign(self, term: Term) -> None:
        if self._tables.is_leader(term):
            self._tables.term = None

    async def is_leader(self, term: Term) -> bool:
        return self._tables.is_leader(term)

    async def space_requests(self) -> Sequence[int]:
        return self._tables.live_space_requests()

    async def begin_eviction(
        self, term: Term, object_id: ObjectId, min_idle: float, *, even_pinned: bool = False
    ) -> bool:
        tables = self._tables
        entry = tables.objects.get(object_id)
        if not tables.is_leader(term) or entry is None or entry.evicting:
            return False
        if object_id in tables.pins and not even_pinned:
            return False
        if tables.clock() - entry.last_access < min_idle:
            return False
        # A new generation, so that a process that saw the object before cannot forget it while its file may be open
        tables.objects[object_id] = replace(entry, evicting=True, generation=tables.next_serial())
        return True

    async def finish_eviction(self, term: Term, object_id: ObjectId) -> int:
        entry = self._tables.objects.get(object_id)
        if not self._tables.is_leader(term) or entry is None or not entry.evicting:
            return 0
        self._tables.drop_object(entry)
        return footprint(entry.size)

    async def detach_eviction(self, term: Term, object_id: ObjectId) -> bool:
        entry = self._tables.objects.get(object_id)
        if not self._tables.is_leader(term) or entry is None or not entry.evicting:
            return False
        self._tables.drop_object(entry)
        self._tables.leaving += footprint(entry.size)
        return True

    async def begin_evictions(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[bool]:
        return [await self.begin_eviction(term, object_id, min_idle) for object_id in object_ids]

    async def finish_evictions(self, term: Term, object_ids: Sequence[ObjectId]) -> Sequence[int]:
        return [await self.finish_eviction(term, object_id) for object_id in object_ids]

    async def cancel_eviction(self, term: Term, object_id: ObjectId) -> None:
        entry = self._tables.objects.get(object_id)
        if self._tables.is_leader(term) and entry and entry.evicting:
            self._tables.objects[object_id] = replace(entry, evicting=False)

    async def adopt(self, term: Term, entry: IndexEntry) -> bool:
        tables, object_id = self._tables, entry.object_id
        if not tables.is_leader(term) or object_id in tables.objects:
            return False
        if tables.phase(tables.row(object_id)) is FetchPhase.FETCHING:
            return False
        tables.put_object(entry)
        if object_id in tables.rows:
            tables.drop_fetch(object_id)
            tables.announce(Topic.FETCH_CHANGED, object_id)
        return True

    async def adopt_many(self, term: Term, entries: Sequence[IndexEntry]) -> Sequence[bool]:
        return [await self.adopt(term, entry) for entry in entries]

    async def adopt_partial(self, term: Term, object_id: ObjectId, size: int) -> bool:
        tables, now = self._tables, self._tables.clock()
        row = tables.row(object_id)
        if not tables.is_leader(term):
            return False
        if row and row.reserved:
            if tables.phase(row) is FetchPhase.FETCHING or row.held_size >= size:
                return False
            adopted = replace(row, held=size)
        elif row and tables.phase(row):
            adopted = replace(row, reserved=True, size=size)
        else:
            adopted = FetchRow(FetchPhase.PARKED, True, size, 0, now, now, "")
        tables.rows[object_id] = adopted
        tables.reserved += adopted.reservation - (row.reservation if row else 0)
        return True

    async def steal_lease(self, term: Term, object_id: ObjectId) -> Lease | None:
        tables, now = self._tables, self._tables.clock()
        row = tables.row(object_id)
        if not tables.is_leader(term) or row is None or tables.phase(row) is not FetchPhase.PARKED:
            return None
        lease = Lease(object_id, tables.next_serial(), row.held_size, term.holder)
        duration = tables.timeouts.lease_seconds
        tables.rows[object_id] = replace(
            row,
            phase=FetchPhase.FETCHING,
            token=lease.token,
            ends=now + duration,
            since=now,
            worker=term.holder,
            source=None,
            duration=duration,
            job=0,
        )
        return lease

    async def recount(self, term: Term, *, entries: bool = True) -> int:
        tables = self._tables
        if not tables.is_leader(term):
            return 0
        before = (tables.used, tables.reserved)
        if entries:
            tables.used = sum(footprint(entry.size) for entry in tables.objects.values())
        tables.reserved = sum(row.reservation for row in tables.rows.values())
        return abs(before[0] - tables.used) + abs(before[1] - tables.reserved)

    async def set_leaving(self, term: Term, count: int) -> None:
        if self._tables.is_leader(term):
            self._tables.leaving = count

    async def set_reconciled(self, term: Term) -> None:
        if self._tables.is_leader(term):
            self._tables.reconciled = True

    async def entries(self) -> AsyncIterator[Sequence[IndexEntry]]:
        known = list(self._tables.objects)
        for start in range(0, len(known), _ENTRIES_BATCH):
            found = (
                self._tables.objects.get(object_id) for object_id in known[start : start + _ENTRIES_BATCH]
            )
            yield [entry for entry in found if entry]

    async def fetches(self) -> Sequence[Fetch]:
        tables = self._tables
        for object_id in list(tables.rows):
            row = tables.row(object_id)
            if tables.phase(row) is None and not tables.job_waits(row):
                del tables.rows[object_id]
        return [fetch for object_id in tables.rows if (fetch := tables.fetch(object_id))]

    async def read_accesses(self, position: str, at_most: int) -> tuple[str, Sequence[Access]]:
        after = int(position or 0)
        accesses: list[Access] = []
        for serial, batch in islice((kept for kept in self._tables.accesses if kept[0] > after), at_most):
            accesses.extend(batch)
            position = str(serial)
        return position, accesses

    async def entry(self, object_id: ObjectId) -> IndexEntry | None:
        return self._tables.objects.get(object_id)

    async def load_policy_state(self) -> PolicyState:
        return self._tables.policy

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        tables = self._tables
        if not tables.is_leader(term):
            return
        for entry in entries:
            known = tables.objects.get(entry.object_id)
            if known:
                tables.objects[entry.object_id] = replace(
                    known, frequency=entry.frequency, last_access=entry.last_access, priority=entry.priority
                )
            elif (row := tables.rows.get(entry.object_id)) is not None and row.reserved:
                tables.rows[entry.object_id] = replace(
                    row, views=entry.frequency, last_access=entry.last_access, priority=entry.priority
                )
        tables.policy = state
        while tables.accesses and tables.accesses[0][0] < int(state.position or 0):
            tables.drop_oldest_accesses()

    # Operator: state, pins, purges, warming, token ids

    async def operator_state(self) -> OperatorState | None:
        return self._tables.operator_state

    async def change_operator_state(
        self, expected_version: int, state: OperatorState
    ) -> OperatorState | None:
        known = self._tables.operator_state
        if (known.version if known else 0) != expected_version:
            return None
        return self._write_operator_state(state)

    async def restore_operator_state(self, snapshot: OperatorStateSnapshot) -> bool:
        if self._tables.operator_state is not None:
            return False
        self._tables.pins.update(snapshot.pinned)
        self._write_operator_state(snapshot.state)
        return True

    async def pinned(self) -> frozenset[ObjectId]:
        return frozenset(self._tables.pins)

    async def change_pins(
        self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()
    ) -> frozenset[ObjectId]:
        tables = self._tables
        changed = frozenset(set(pin) - tables.pins) | (tables.pins & set(unpin))
        tables.pins.update(pin)
        tables.pins.difference_update(unpin)
        if changed:
            self._write_operator_state(tables.operator_state or OperatorState())
        return changed

    async def request_purges(self, object_ids: Sequence[ObjectId]) -> None:
        serial = self._tables.next_serial()
        self._tables.purges.update(dict.fromkeys(object_ids, serial))
        self._tables.announce(Topic.PURGE_REQUESTED)

    async def pending_purges(self, at_most: int) -> Sequence[PurgeRequest]:
        return [PurgeRequest(*request) for request in islice(self._tables.purges.items(), at_most)]

    async def complete_purge(self, term: Term, request: PurgeRequest) -> None:
        tables = self._tables
        if tables.is_leader(term) and tables.purges.get(request.object_id) == request.serial:
            del tables.purges[request.object_id]

    async def start_warming(self, scope: WarmingScope) -> Warming | None:
        tables = self._tables
        if tables.warming is not None and not tables.warming.is_finished:
            return None
        tables.warming, tables.warming_lease = Warming(tables.next_serial(), scope), None
        return tables.warming

    async def warming(self) -> Warming | None:
        return self._tables.warming

    async def lease_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        tables, now = self._tables, self._tables.clock()
        warming = tables.warming
        if warming is None or warming.is_finished:
            return None
        if (
            tables.warming_lease is not None
            and tables.warming_lease[0] != holder
            and tables.warming_lease[1] > now
        ):
            return None
        tables.warming_lease = (holder, now + seconds)
        if progress is not None and progress.serial == warming.serial:
            tables.warming = warming = progress
        return warming

    async def consume_token_id(self, token_id: str, issued: float, seconds: float) -> bool:
        tables, now = self._tables, self._tables.clock()
        if issued < int(tables.started_at):
            return False
        for expired in [known for known, ends in tables.token_ids.items() if ends <= now]:
            del tables.token_ids[expired]
        if token_id in tables.token_ids:
            return False
        tables.token_ids[token_id] = now + seconds
        return True

    def _write_operator_state(self, state: OperatorState) -> OperatorState:
        written = self._tables.operator_state = replace(state, version=self._tables.next_serial())
        self._tables.announce(Topic.SETTINGS_CHANGED)
        return written

    # Announcements

    async def announce(self, announcement: Announcement) -> None:
        self._tables.announce(announcement.topic, announcement.object_id)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[AsyncIterator[Announcement]]:
        queue = AnnouncementQueue()
        queue.put(Announcement(Topic.SETTINGS_CHANGED))
        self._tables.listeners.add(queue)
        try:
            yield queue
        finally:
            self._tables.listeners.discard(queue)
