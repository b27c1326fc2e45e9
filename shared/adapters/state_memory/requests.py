"""The verbs of requests: look, claim, count accesses, announce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shared.adapters.state_memory.tables import FetchRow, Tables
from shared.domain.objects import ObjectId
from shared.domain.space import Usage
from shared.ports.state_store import Access, Announcement, Claim, FetchPhase, ObjectStatus, Topic


class MemoryRequests:
    """See the port for each verb."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        return self._tables.object_status(object_id)

    async def claim(self, object_id: ObjectId, claimant: str) -> Claim:
        tables = self._tables
        object_status = tables.object_status(object_id)
        parked = object_status.fetch is not None and object_status.fetch.phase is FetchPhase.PARKED
        if object_status.failure or (object_status.fetch and not parked):
            return Claim(won=False, status=object_status)
        now = tables.clock()
        tables.rows[object_id] = FetchRow(
            phase=FetchPhase.CLAIMED,
            reserved=parked,
            size=tables.rows[object_id].size if parked else 0,
            token=0,
            ends=now + tables.timeouts.claim_seconds,
            since=now,
            worker=claimant,
            duration=tables.timeouts.claim_seconds,
        )
        return Claim(won=True, status=ObjectStatus(fetch=None, failure=None))

    async def mark_queued(self, object_id: ObjectId, claimant: str) -> None:
        tables = self._tables
        row = tables.row(object_id)
        if row and tables.phase(row) is FetchPhase.CLAIMED and row.worker == claimant:
            now, duration = tables.clock(), tables.timeouts.queued_seconds
            tables.rows[object_id] = replace(
                row, phase=FetchPhase.QUEUED, ends=now + duration, since=now, duration=duration
            )

    async def release_claim(self, object_id: ObjectId, claimant: str) -> None:
        tables = self._tables
        row = tables.row(object_id)
        pending = (FetchPhase.CLAIMED, FetchPhase.QUEUED)
        if row and tables.phase(row) in pending and row.worker == claimant:
            if row.reserved:
                tables.park(object_id, row)
            else:
                tables.drop_fetch(object_id)
            tables.announce(Topic.FETCH_CHANGED, object_id)

    async def usage(self) -> Usage:
        tables = self._tables
        leases = sum(tables.phase(tables.row(known)) is FetchPhase.FETCHING for known in tables.rows)
        return Usage(
            limit=tables.limit,
            used=tables.used,
            reserved=tables.reserved,
            objects=len(tables.objects),
            fetches=leases,
            reconciled=tables.reconciled,
            churn=tables.churn,
        )

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        if accesses:
            self._tables.accesses.append((self._tables.next_serial(), tuple(accesses)))

    async def announce(self, announcement: Announcement) -> None:
        self._tables.announce(announcement.topic, announcement.object_id)
