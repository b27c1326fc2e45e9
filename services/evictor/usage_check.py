"""The sums of the state store against what they are sums of: they can part when a key is lost and another kept."""

from __future__ import annotations

import structlog

from shared.domain.space import footprint
from shared.observability.metrics import RECONCILED, STATE_STORE_EVICTS
from shared.ports.state_store import StateStore, Term

_RECOUNT_THRESHOLD = 20_000
"""Entries that the store counts within some 20 ms: so many are counted without looking first."""

NOEVICTION = "noeviction"

logger = structlog.get_logger()


class UsageCheck:
    """`run` at the end of a reconciliation, before the index is said to stand for the volume."""

    def __init__(self, state: StateStore) -> None:
        self._state = state

    async def run(self, term: Term) -> None:
        """Used and reserved bytes are what entries and fetches add up to after this."""
        drift = await self._state.recount(term, entries=await self._may_be_wrong())
        if drift:
            RECONCILED.labels("recounted").inc()
            logger.warning("usage_recounted", wrong_bytes=drift)

    async def _may_be_wrong(self) -> bool:
        """Adds up all entries from here, while they come and go: what moved meanwhile may or may not be in the sum, so
        that only a difference beyond that tells of wrong figures. A smaller one is found in a quieter hour."""
        before = await self._state.usage()
        if before.objects <= _RECOUNT_THRESHOLD:
            return True
        counted = 0
        async for batch in self._state.entries():
            counted += sum(footprint(entry.size) for entry in batch)
        after = await self._state.usage()
        moved = after.churn - before.churn
        return moved < 0 or abs(after.used - counted) > moved

    async def check_maxmemory_policy(self) -> None:
        """Say so if the server drops keys when its memory is full: sums without their parts, parts without sums."""
        stats = await self._state.server_stats()
        if stats is None:
            return
        evicts = stats.eviction != NOEVICTION
        STATE_STORE_EVICTS.set(evicts)
        if evicts:
            logger.warning("state_store_eviction_enabled", maxmemory_policy=stats.eviction, wanted=NOEVICTION)
