"""Objects that are no longer ours: the catalog's whole list against what we hold, each confirmed before it goes.

A squid that leaves one of a worker's buckets out of its answer gives a list that looks whole. So no object goes on the
word of a list alone: asked for that object, the catalog must not say that it is ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from services.evictor.file_calls import run_blocking
from services.evictor.index import EvictionIndex
from services.evictor.known_ids import KnownIds
from services.evictor.removals import Removals
from shared.adapters.volume.duty_file import read_checked_duty, write_checked_duty
from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import Duty, ObjectId
from shared.observability.metrics import RECONCILED
from shared.ports.catalog import Catalog
from shared.ports.state_store import Term

_QUESTION_PAUSE = 0.1  # seconds between two questions about single objects: nobody waits for the answers

logger = structlog.get_logger()


def why_implausible(held: int, listed: int, to_drop: int) -> str | None:
    """Why a list is not to be believed, in words; None if it may be. All are numbers of objects."""
    if held and not listed:
        return "the catalog lists nothing, and we hold objects"
    if to_drop * 2 > held:
        return f"it would drop {to_drop} of {held} objects, more than half"
    return None


class DutyCheck:
    """`can_list`: False for catalogs that cannot (an origin); then there is nothing to do, ever. `root`: of the volume,
    which keeps the duty of the last check: where that was another one, most of what we hold may well have to go."""

    def __init__(
        self,
        catalog: Catalog,
        index: EvictionIndex,
        removals: Removals,
        duty: Duty,
        can_list: bool,
        root: Path,
    ) -> None:
        self._catalog, self._index, self._removals = catalog, index, removals
        self._duty, self._can_list, self._root = duty, can_list, root
        self._told = False

    def change(self, duty: Duty) -> bool:
        """The duty as operators have ordered it. True if that is another one than a moment ago: the list is to be
        asked for soon. The orders found at the start are no such change."""
        changed = self._told and duty.deciding != self._duty.deciding
        self._duty, self._told = duty, True
        return changed

    async def run(self, term: Term) -> bool:
        """Purge what is no longer ours, unless the list is implausible; False if the catalog has failed."""
        if not self._can_list:
            return True
        duty = self._duty.deciding
        try:
            strangers = await self._strangers(duty)
            if strangers is None or not await self._purge(term, duty, strangers):
                return True
        except CatalogUnavailable as error:
            logger.warning("duty_not_checked", reason=str(error))
            RECONCILED.labels("duty_unavailable").inc()
            return False
        if await run_blocking(read_checked_duty, self._root) != duty:
            await run_blocking(write_checked_duty, self._root, duty)
        return True

    async def _strangers(self, duty: Duty) -> Sequence[ObjectId] | None:
        """What we hold and the list does not name; None if the list is not to be believed."""
        # Only what was there before the list was asked for: what came later may be newer than the list
        older = KnownIds()
        older.update(await self._held())
        if not len(older):
            return ()
        listed = await self._listed(duty)
        if duty != self._duty.deciding:
            return None  # changed while the list was read: the next one counts
        held = await self._held()
        strangers = [object_id for object_id in held if object_id not in listed]
        checked = await run_blocking(read_checked_duty, self._root)
        expected = checked is not None and checked != duty and len(listed) > 0
        reason = None if expected else why_implausible(len(held), len(listed), len(strangers))
        if reason is not None:
            logger.error("duty_list_refused", reason=reason, held=len(held), listed=len(listed))
            RECONCILED.labels("duty_refused").inc()
            return None
        RECONCILED.labels("duty_checked").inc()
        return [object_id for object_id in strangers if object_id in older]

    async def _purge(self, term: Term, duty: Duty, strangers: Sequence[ObjectId]) -> bool:
        """Those of which the catalog, asked one by one, says the same; False if the duty has changed meanwhile."""
        contradicted = 0
        for object_id in strangers:
            known = await self._catalog.look_up(object_id)
            if duty != self._duty.deciding:
                return False
            if known is not None and duty.covers(known):
                contradicted += 1
            else:
                logger.info("object_not_ours", object_id=object_id)
                await self._removals.purge(term, object_id, "not_ours")
            await asyncio.sleep(_QUESTION_PAUSE)
        if contradicted:
            logger.error("duty_list_contradicted", objects=contradicted, strangers=len(strangers))
            RECONCILED.labels("duty_contradicted").inc()
        return True

    async def _listed(self, duty: Duty) -> KnownIds:
        listed = KnownIds()
        async for batch in self._catalog.list_objects(duty):
            listed.update(found.object_id for found in batch)
            await asyncio.sleep(0)
        return listed

    async def _held(self) -> list[ObjectId]:
        return [entry.object_id for entry in self._index.policy.dump()]
