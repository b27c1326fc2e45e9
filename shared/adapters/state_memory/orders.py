"""The operator's part: orders, pins, purges, warming, tickets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from shared.adapters.state_memory.eviction import MemoryEviction
from shared.domain.objects import ObjectId
from shared.domain.orders import KeptOrders, Orders
from shared.domain.warming import Warming, WarmingScope
from shared.ports.order_book import PurgeWish
from shared.ports.state_store import Term, Topic


class MemoryOrders(MemoryEviction):
    """See the port for each verb."""

    async def orders(self) -> Orders | None:
        return self._tables.orders

    async def change_orders(self, expected_version: int, orders: Orders) -> Orders | None:
        known = self._tables.orders
        if (known.version if known else 0) != expected_version:
            return None
        return self._write_orders(orders)

    async def restore_orders(self, kept: KeptOrders) -> bool:
        if self._tables.orders is not None:
            return False
        self._tables.pins.update(kept.pinned)
        self._write_orders(kept.orders)
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
            self._write_orders(tables.orders or Orders())
        return changed

    async def want_purges(self, object_ids: Sequence[ObjectId]) -> None:
        serial = self._tables.next_serial()
        self._tables.purges.update(dict.fromkeys(object_ids, serial))
        self._tables.announce(Topic.PURGE_WANTED)

    async def purges_wanted(self, at_most: int) -> Sequence[PurgeWish]:
        return [PurgeWish(*wish) for wish in islice(self._tables.purges.items(), at_most)]

    async def end_purge(self, term: Term, wish: PurgeWish) -> None:
        tables = self._tables
        if tables.in_office(term) and tables.purges.get(wish.object_id) == wish.serial:
            del tables.purges[wish.object_id]

    async def order_warming(self, scope: WarmingScope) -> Warming | None:
        tables = self._tables
        if tables.warming is not None and not tables.warming.is_over:
            return None
        tables.warming, tables.warmer = Warming(tables.next_serial(), scope), None
        return tables.warming

    async def warming(self) -> Warming | None:
        return self._tables.warming

    async def tend_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        tables, now = self._tables, self._tables.clock()
        warming = tables.warming
        if warming is None or warming.is_over:
            return None
        if tables.warmer is not None and tables.warmer[0] != holder and tables.warmer[1] > now:
            return None
        tables.warmer = (holder, now + seconds)
        if progress is not None and progress.serial == warming.serial:
            tables.warming = warming = progress
        return warming

    async def use_ticket(self, ticket: str, issued: float, seconds: float) -> bool:
        tables, now = self._tables, self._tables.clock()
        if issued < int(tables.begun):
            return False
        for gone in [known for known, ends in tables.tickets.items() if ends <= now]:
            del tables.tickets[gone]
        if ticket in tables.tickets:
            return False
        tables.tickets[ticket] = now + seconds
        return True

    def _write_orders(self, orders: Orders) -> Orders:
        written = self._tables.orders = replace(orders, version=self._tables.next_serial())
        self._tables.announce(Topic.SETTINGS_CHANGED)
        return written
