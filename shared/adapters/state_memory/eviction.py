"""The leader's verbs: eviction, reconciliation, policy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import islice

from shared.adapters.state_memory.fetching import MemoryFetching
from shared.adapters.state_memory.tables import FetchRow
from shared.domain.objects import ObjectId
from shared.domain.space import footprint
from shared.ports.state_store import (
    Access,
    Fetch,
    FetchPhase,
    IndexEntry,
    Lease,
    PolicyState,
    Term,
    Topic,
)

_ENTRIES_BATCH = 1000


class MemoryEviction(MemoryFetching):
    """See the port for each verb."""

    async def lead(self, holder: str, seconds: float) -> Term | None:
        tables, now = self._tables, self._tables.clock()
        if tables.term is None or tables.term_ends <= now:
            tables.term = Term(holder, tables.next_serial())
        elif tables.term.holder != holder:
            tables.term_ends = min(tables.term_ends, now + seconds)  # the clock may have been put back
            return None
        tables.term_ends = now + seconds
        return tables.term

    async def resign(self, term: Term) -> None:
        if self._tables.is_leader(term):
            self._tables.term = None

    async def space_requested(self) -> int:
        tables, now = self._tables, self._tables.clock()
        tables.space_requests = {
            known: request for known, request in tables.space_requests.items() if request[1] > now
        }
        return sum(wanted for wanted, _ in tables.space_requests.values())

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
        # A new generation, so that nobody who saw the object before can forget it while its file may still be open
        tables.objects[object_id] = replace(entry, evicting=True, generation=tables.next_serial())
        return True

    async def finish_eviction(self, term: Term, object_id: ObjectId) -> int:
        entry = self._tables.objects.get(object_id)
        if not self._tables.is_leader(term) or entry is None or not entry.evicting:
            return 0
        self._tables.drop_object(entry)
        return footprint(entry.size)

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
        if not tables.is_leader(term) or (row and row.reserved):
            return False
        if row and tables.phase(row):
            tables.rows[object_id] = replace(row, reserved=True, size=size)
        else:
            tables.rows[object_id] = FetchRow(FetchPhase.PARKED, True, size, 0, now, now, "")
        tables.reserved += footprint(size)
        return True

    async def steal_lease(self, term: Term, object_id: ObjectId) -> Lease | None:
        tables, now = self._tables, self._tables.clock()
        row = tables.row(object_id)
        if not tables.is_leader(term) or row is None or tables.phase(row) is not FetchPhase.PARKED:
            return None
        lease = Lease(object_id, tables.next_serial(), row.size, term.holder)
        duration = tables.timeouts.lease_seconds
        tables.rows[object_id] = FetchRow(
            FetchPhase.FETCHING,
            True,
            row.size,
            lease.token,
            now + duration,
            now,
            term.holder,
            duration=duration,
        )
        return lease

    async def recount(self, term: Term, *, entries: bool = True) -> int:
        tables = self._tables
        if not tables.is_leader(term):
            return 0
        before = (tables.used, tables.reserved)
        if entries:
            tables.used = sum(footprint(entry.size) for entry in tables.objects.values())
        tables.reserved = sum(footprint(row.size) for row in tables.rows.values() if row.reserved)
        return abs(before[0] - tables.used) + abs(before[1] - tables.reserved)

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
        for object_id in [known for known in tables.rows if tables.phase(tables.row(known)) is None]:
            del tables.rows[object_id]
        return [fetch for object_id in tables.rows if (fetch := tables.fetch(object_id))]

    async def read_accesses(self, position: str, at_most: int) -> tuple[str, Sequence[Access]]:
        after = int(position or 0)
        accesses: list[Access] = []
        for serial, batch in islice((kept for kept in self._tables.accesses if kept[0] > after), at_most):
            accesses.extend(batch)
            position = str(serial)
        return position, accesses

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
        tables.policy = state
        while tables.accesses and tables.accesses[0][0] < int(state.position or 0):
            tables.accesses.popleft()
