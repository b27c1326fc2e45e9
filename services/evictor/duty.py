"""Objects that are no longer ours: the catalog's whole list against what we hold."""

from __future__ import annotations

import asyncio

import structlog

from services.evictor.index import EvictionIndex
from services.evictor.known_ids import KnownIds
from services.evictor.removals import Removals
from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import Duty, ObjectId
from shared.observability.metrics import RECONCILED
from shared.ports.catalog import Catalog
from shared.ports.state_store import Term

logger = structlog.get_logger()


def why_implausible(held: int, listed: int, to_drop: int) -> str | None:
    """Why a list is not to be believed, in words; None if it may be. All are numbers of objects."""
    if held and not listed:
        return "the catalog lists nothing, and we hold objects"
    if to_drop * 2 > held:
        return f"it would drop {to_drop} of {held} objects, more than half"
    return None


class DutyCheck:
    """`can_list`: False for catalogs that cannot (an origin); then there is nothing to do, ever."""

    def __init__(
        self, catalog: Catalog, index: EvictionIndex, removals: Removals, duty: Duty, can_list: bool
    ) -> None:
        self._catalog, self._index, self._removals = catalog, index, removals
        self._duty, self._can_list = duty, can_list
        self._told = self._changed = False

    def change(self, duty: Duty) -> bool:
        """The duty as operators have ordered it. True if that is another one than a moment ago: the next list, to be
        asked for soon, may well drop most of what we hold. The orders found at the start are no such change."""
        changed = self._told and duty != self._duty
        self._changed = self._changed or changed
        self._duty, self._told = duty, True
        return changed

    async def run(self, term: Term) -> None:
        """Purge what is no longer ours, unless the catalog fails or its list is implausible."""
        if not self._can_list or not len(self._index.policy):
            return
        # Only what was there before the list was asked for: what came later may be newer than the list
        held_before, duty = await self._held(), self._duty
        try:
            listed = await self._listed(duty)
        except CatalogUnavailable as error:
            logger.warning("duty_not_checked", reason=str(error))
            RECONCILED.labels("duty_unavailable").inc()
            return
        if duty != self._duty:
            return  # changed while the list was read: the next one counts
        held = await self._held()
        strangers = [object_id for object_id in held if object_id not in listed]
        expected = self._changed and len(listed) > 0
        reason = None if expected else why_implausible(len(held), len(listed), len(strangers))
        if reason is not None:
            logger.error("duty_list_refused", reason=reason, held=len(held), listed=len(listed))
            RECONCILED.labels("duty_refused").inc()
            return
        self._changed = False
        RECONCILED.labels("duty_checked").inc()
        older = KnownIds()
        older.update(held_before)
        for object_id in strangers:
            if object_id in older:
                logger.info("object_not_ours", object_id=object_id)
                await self._removals.purge(term, object_id, "not_ours")

    async def _listed(self, duty: Duty) -> KnownIds:
        listed = KnownIds()
        async for batch in self._catalog.list_objects(duty):
            listed.update(found.object_id for found in batch)
            await asyncio.sleep(0)
        return listed

    async def _held(self) -> list[ObjectId]:
        return [entry.object_id for entry in self._index.policy.dump()]
