"""The verbs of fetchers: begin, renew and end a fetch."""

from __future__ import annotations

from dataclasses import replace

from shared.adapters.state_memory.requests import MemoryRequests
from shared.adapters.state_memory.tables import FetchRow
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import (
    AlreadyStored,
    BeginResult,
    FetchPhase,
    Granted,
    HeldElsewhere,
    IndexEntry,
    Lease,
    NeverFits,
    NoSpace,
    NotReconciled,
    Topic,
)


class MemoryFetching(MemoryRequests):
    """See the port for each verb."""

    async def begin(self, object_id: ObjectId, size: int, worker: str) -> BeginResult:
        tables = self._tables
        entry, row, now = tables.objects.get(object_id), tables.row(object_id), tables.clock()
        if entry:
            return HeldElsewhere(seconds_left=0.0) if entry.evicting else AlreadyStored(entry.generation)
        if row and tables.phase(row) is FetchPhase.FETCHING:
            return HeldElsewhere(seconds_left=row.ends - now)
        if footprint(size) > tables.limit:
            return NeverFits()
        if not tables.reconciled:
            return NotReconciled()
        resumed = row is not None and row.reserved
        more = footprint(size) - (footprint(row.size) if row and resumed else 0)
        missing = tables.used + tables.reserved + more - tables.limit
        if more > 0 and missing > 0:
            return NoSpace(missing)
        lease = Lease(object_id, tables.next_serial(), size, worker)
        duration = tables.timeouts.lease_seconds
        tables.rows[object_id] = FetchRow(
            FetchPhase.FETCHING, True, size, lease.token, now + duration, now, worker, duration=duration
        )
        tables.reserved += more
        tables.space_requests.pop(object_id, None)
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

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        tables = self._tables
        row = tables.leased(lease)
        if row is None:
            return False
        last_access = min(stored_at, tables.clock())
        tables.put_object(IndexEntry(lease.object_id, row.size, frequency=1, last_access=last_access))
        tables.drop_fetch(lease.object_id)
        tables.failures.pop(lease.object_id, None)
        tables.announce(Topic.FETCH_CHANGED, lease.object_id)
        return True

    async def park(self, lease: Lease) -> None:
        row = self._tables.leased(lease)
        if row:
            self._tables.park(lease.object_id, row)
            self._tables.announce(Topic.FETCH_CHANGED, lease.object_id)

    async def release(self, lease: Lease) -> None:
        if self._tables.leased(lease):
            self._tables.drop_fetch(lease.object_id)
            self._tables.announce(Topic.FETCH_CHANGED, lease.object_id)
            self._tables.announce(Topic.SPACE_FREED, lease.object_id)

    async def record_failure(self, object_id: ObjectId, reason: str, seconds: float) -> None:
        tables, now = self._tables, self._tables.clock()
        for expired in [known for known, (_, ends, _) in tables.failures.items() if ends <= now]:
            del tables.failures[expired]
        tables.failures[object_id] = (reason, now + seconds, seconds)
        tables.announce(Topic.FETCH_CHANGED, object_id)

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
