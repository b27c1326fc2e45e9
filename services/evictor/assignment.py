"""Objects that are no longer ours: the catalog's whole list against what we hold, each confirmed before it goes.

A squid that leaves one of a worker's buckets out of its answer gives a list that looks whole. So no object goes on the
word of a list alone: asked for that object, the catalog must not say that it is ours.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import structlog

from distributor_node.services.evictor.eviction import ObjectRemover
from distributor_node.services.evictor.index import CompactIdSet, EvictionIndex
from distributor_node.shared.adapters.volume.layout import map_os_errors, sync_directory
from distributor_node.shared.adapters.volume.records import MAX_ROOT_FILE_BYTES, atomic_write, read_capped
from distributor_node.shared.domain.errors import CatalogUnavailable, InvalidInput
from distributor_node.shared.domain.objects import Assignment, ObjectId, parse_bucket_id
from distributor_node.shared.observability.metrics import RECONCILED
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.state_store import Term
from distributor_node.shared.runtime.threads import run_blocking

_LOOKUP_PAUSE = 0.1  # seconds between two questions about single objects: nobody waits for the answers

logger = structlog.get_logger()


def implausible_reason(held: int, listed: int, to_drop: int) -> str | None:
    """Why a list is not to be believed, in words; None if it may be. All are numbers of objects."""
    if held and not listed:
        return "the catalog lists nothing, and we hold objects"
    if to_drop * 2 > held:
        return f"it would drop {to_drop} of {held} objects, more than half"
    return None


class AssignmentCheck:
    """`can_list`: False for catalogs that cannot (an origin); then there is nothing to do, ever. `root`: of the volume,
    which keeps the assignment of the last check: where that was another one, most of what we hold may well have
    to go."""

    def __init__(
        self,
        catalog: Catalog,
        index: EvictionIndex,
        remover: ObjectRemover,
        assignment: Assignment,
        can_list: bool,
        root: Path,
    ) -> None:
        self._catalog, self._index, self._remover = catalog, index, remover
        self._assignment, self._can_list, self._root = assignment, can_list, root
        self._initialized = False

    def change(self, assignment: Assignment) -> bool:
        """The assignment as operators have ordered it. True if that is another one than a moment ago: the list is to be
        asked for soon. The orders found at the start are no such change."""
        changed = self._initialized and assignment.effective != self._assignment.effective
        self._assignment, self._initialized = assignment, True
        return changed

    async def run(self, term: Term) -> bool:
        """Purge what is no longer ours, unless the list is implausible; False if the catalog has failed."""
        if not self._can_list:
            return True
        assignment = self._assignment.effective
        try:
            unassigned = await self._unassigned(assignment)
            if unassigned is None or not await self._purge_unassigned(term, assignment, unassigned):
                return True
        except CatalogUnavailable as error:
            logger.warning("assignment_check_failed", reason=str(error))
            RECONCILED.labels("assignment_unavailable").inc()
            return False
        if await run_blocking(read_checked_assignment, self._root) != assignment:
            await run_blocking(write_checked_assignment, self._root, assignment)
        return True

    async def _unassigned(self, assignment: Assignment) -> Sequence[ObjectId] | None:
        """What we hold and the list does not name; None if the list is not to be believed."""
        # Only what was there before the list was asked for: what came later may be newer than the list
        older = CompactIdSet()
        older.update(await self._held())
        if not len(older):
            return ()
        listed = await self._listed(assignment)
        if assignment != self._assignment.effective:
            return None  # changed while the list was read: the next one counts
        held = await self._held()
        unassigned = [object_id for object_id in held if object_id not in listed]
        checked = await run_blocking(read_checked_assignment, self._root)
        expected = checked is not None and checked != assignment and len(listed) > 0
        reason = None if expected else implausible_reason(len(held), len(listed), len(unassigned))
        if reason is not None:
            logger.error("assignment_list_rejected", reason=reason, held=len(held), listed=len(listed))
            RECONCILED.labels("assignment_rejected").inc()
            return None
        RECONCILED.labels("assignment_checked").inc()
        return [object_id for object_id in unassigned if object_id in older]

    async def _purge_unassigned(
        self, term: Term, assignment: Assignment, unassigned: Sequence[ObjectId]
    ) -> bool:
        """Those of which the catalog, asked one by one, says the same; False if the assignment has changed
        meanwhile."""
        contradicted = 0
        for object_id in unassigned:
            known = await self._catalog.look_up(object_id)
            if assignment != self._assignment.effective:
                return False
            if known is not None and assignment.covers(known):
                contradicted += 1
            else:
                logger.info("object_unassigned", object_id=object_id)
                await self._remover.purge(term, object_id, "unassigned")
            await asyncio.sleep(_LOOKUP_PAUSE)
        if contradicted:
            logger.error("assignment_list_contradicted", objects=contradicted, unassigned=len(unassigned))
            RECONCILED.labels("assignment_contradicted").inc()
        return True

    async def _listed(self, assignment: Assignment) -> CompactIdSet:
        listed = CompactIdSet()
        async for batch in self._catalog.list_objects(assignment):
            listed.update(found.object_id for found in batch)
            await asyncio.sleep(0)
        return listed

    async def _held(self) -> list[ObjectId]:
        return [entry.object_id for entry in self._index.policy.dump()]


# The assignment that what lies on the volume was last checked against:
# another one now may well make most of it strange.

NAME = "duty.json"


def read_checked_assignment(root: Path) -> Assignment | None:
    """Blocks. None: nobody has checked yet, or the file cannot be read. VolumeError: disk trouble."""
    with map_os_errors(f"read {NAME}"):
        text = read_capped(root / NAME, limit=MAX_ROOT_FILE_BYTES)
    if text is None:
        return None
    try:
        document = json.loads(text)
        buckets, worker_id = document["buckets"], document["workerId"]
        if worker_id is not None and type(worker_id) is not int:
            raise ValueError("a worker that is no number")
        return Assignment(None if buckets is None else frozenset(map(parse_bucket_id, buckets)), worker_id)
    except (ValueError, TypeError, KeyError, RecursionError, InvalidInput) as error:
        logger.error("assignment_file_invalid", file=NAME, reason=type(error).__name__)
        return None


def write_checked_assignment(root: Path, assignment: Assignment) -> None:
    """Blocks; in one step. VolumeError if that fails."""
    buckets = None if assignment.bucket_ids is None else sorted(assignment.bucket_ids)
    text = json.dumps({"buckets": buckets, "workerId": assignment.worker_id}) + "\n"
    with map_os_errors(f"write {NAME}"):
        atomic_write(root / NAME, text.encode())
        sync_directory(root)
