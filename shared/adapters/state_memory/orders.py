"""The operator's part: orders, pins, purges, warming, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from shared.adapters.state_memory.eviction import MemoryEviction
from shared.domain.objects import ObjectId
from shared.domain.orders import OperatorState, OperatorStateSnapshot
from shared.domain.warming import Warming, WarmingScope
from shared.ports.order_book import PurgeRequest
from shared.ports.state_store import Term, Topic


class MemoryOrders(MemoryEviction):
    """See the port for each verb."""

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

    async def change_pins(self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()) -> int:
        tables = self._tables
        wrong = set(pin) - tables.pins, tables.pins & set(unpin)
        tables.pins.update(pin)
        tables.pins.difference_update(unpin)
        changed = sum(map(len, wrong))
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
