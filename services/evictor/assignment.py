"""Removal of objects that are not assigned to this node any more, and of versions that a manifest has replaced.

The catalog's whole list is compared with the objects that we hold. A squid that leaves one of a worker's buckets out of
its response gives a list that looks complete. So the list alone removes nothing: the catalog is asked about each object
that is not listed, and the object stays if it turns out to be assigned to us.

The list also tells the API processes which ids exist: `shared/adapters/volume/known_ids.py`.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.known_ids import KnownIdsDraft
from distributor_node.shared.adapters.volume.layout import map_os_errors, sync_directory
from distributor_node.shared.adapters.volume.records import MAX_ROOT_FILE_BYTES, atomic_write, read_capped
from distributor_node.shared.domain.conditionals import Comparison
from distributor_node.shared.domain.errors import CatalogUnavailable, InvalidInput, VolumeError
from distributor_node.shared.domain.formats import FORMAT, check_format
from distributor_node.shared.domain.objects import (
    Assignment,
    CompactIdSet,
    MediaObject,
    ObjectId,
    parse_bucket_id,
)
from distributor_node.shared.observability.metrics import RECONCILED
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.state_store import Term
from distributor_node.shared.runtime.threads import run_blocking

_LOOKUP_PAUSE = 0.1  # seconds between two look-ups of single objects, which are not urgent

logger = structlog.get_logger()


def implausible_reason(held: int, listed: int, to_drop: int) -> str | None:
    """Why a list is not plausible, in words; None if it is. All arguments are numbers of objects."""
    if held and not listed:
        return f"the list is empty, but the node holds {held} objects"
    if to_drop * 2 > held:
        return f"the list would remove {to_drop} of {held} objects, more than half"
    return None


class AssignmentCheck:
    """Compares what we hold with the catalog's list, and purges what is not assigned to us."""

    def __init__(
        self,
        catalog: Catalog,
        index: EvictionIndex,
        remover: ObjectRemover,
        assignment: Assignment,
        can_list: bool,
        root: Path,
        *,
        shares_ids: bool = False,
    ) -> None:
        """`can_list`: False for a catalog that cannot list objects (an origin): then there is nothing to do.

        `root`: of the volume. It keeps the assignment of the last check: after a change of assignment a list that
        removes most objects is plausible. `shares_ids`: write down which ids exist, for a catalog whose look-ups queue.
        """
        self._catalog, self._index, self._remover = catalog, index, remover
        self._assignment, self._can_list, self._root = assignment, can_list, root
        self._shares_ids = shares_ids
        self._initialized = False

    def change(self, assignment: Assignment) -> bool:
        """Take over the current assignment. True if it has changed, so that the list should be read soon.

        The first call after the start is no change.
        """
        changed = self._initialized and assignment.effective != self._assignment.effective
        self._assignment, self._initialized = assignment, True
        return changed

    async def run(self, term: Term) -> bool:
        """Purge what is not assigned to us, unless the list is implausible. False if the catalog has failed."""
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
        """The objects that we hold and the list does not name; None if the list is not plausible."""
        # Only objects that were here before the list was requested: later ones may be newer than the list
        older = CompactIdSet()
        older.update(await self._held())
        if not len(older) and not self._shares_ids:
            return ()
        listed = await self._listed(assignment)
        if assignment != self._assignment.effective:
            return None  # it has changed while the list was read: the next list counts
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
        """Purge those objects for which a look-up agrees with the list. False if the assignment has changed since."""
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
        listed, known = CompactIdSet(), KnownIdsDraft()
        async for batch in self._catalog.list_objects(assignment):
            listed.update(found.object_id for found in batch)
            if self._shares_ids:
                known.update(found.object_id for found in batch)
            await asyncio.sleep(0)
        if self._shares_ids and len(listed):
            known.update(await self._held())
            await self._share(known)
        return listed

    async def _share(self, known: KnownIdsDraft) -> None:
        """Without the file look-ups are only less fair: a full disk stops no check."""
        try:
            await run_blocking(known.write, self._root)
        except VolumeError as error:
            logger.warning("known_ids_not_written", reason=str(error))

    async def _held(self) -> list[ObjectId]:
        return [entry.object_id for entry in self._index.policy.dump()]


# Replaced entries of a manifest: objects that we hold in another version than the catalog lists now.

_CHECK_INTERVAL = 1.0  # seconds between two looks at the catalog's revision
_ROUNDS = (0.0, 3.0, 10.0, 30.0, 120.0)
"""Seconds between the comparisons after a change. Race: 1. a fetcher begins with the old entry; 2. we compare; 3. it
stores the old version. The next comparison finds that."""


class VersionCheck:
    """Purges objects whose version differs from their entry, after each change of the catalog, and after the start."""

    def __init__(
        self, catalog: Catalog, revision: Callable[[], Awaitable[int]], volume: Volume, remover: ObjectRemover
    ) -> None:
        """`revision`: changes whenever the catalog's list was replaced."""
        self._catalog, self._revision, self._volume, self._remover = catalog, revision, volume, remover
        self._checked: int | None = None  # the revision of the last comparison
        self._rounds: deque[float] = deque()
        self._next_at = -math.inf

    async def step(self, term: Term) -> float:
        """Compare if that is due. Returns the seconds until the next call."""
        revision = await self._revision()
        if revision != self._checked:
            self._checked, self._rounds = revision, deque(_ROUNDS)
            self._next_at = time.monotonic() + self._rounds.popleft()
        if time.monotonic() >= self._next_at:
            await self._compare(term)
            self._next_at = time.monotonic() + self._rounds.popleft() if self._rounds else math.inf
        return _CHECK_INTERVAL

    async def _compare(self, term: Term) -> None:
        replaced = 0
        async for batch in self._catalog.list_objects(Assignment()):
            for wanted in await run_blocking(self._replaced, batch):
                logger.info("object_replaced_in_catalog", object_id=wanted.object_id, size=wanted.size)
                await self._remover.purge(term, wanted.object_id, "replaced")
                replaced += 1
        if replaced:
            logger.info("replaced_objects_purged", objects=replaced)

    def _replaced(self, batch: Sequence[MediaObject]) -> list[MediaObject]:
        """Those that we hold in another version. Blocking."""
        return [wanted for wanted in batch if self._is_replaced(wanted)]

    def _is_replaced(self, wanted: MediaObject) -> bool:
        try:
            record = self._volume.complete_record(wanted.object_id)
        except VolumeError:
            return False  # the scrub and the reconciliation look after it
        if record is None:
            return False
        unverified = wanted.content_hash is not None and record.content_hash is None
        return unverified or wanted.version.compare(record.version) is Comparison.DIFFERENT


# The assignment of the last check, on the volume. If the current one differs, most objects may be unassigned.

NAME = "duty.json"


def read_checked_assignment(root: Path) -> Assignment | None:
    """The assignment of the last check. None: there was none, or the file is invalid. VolumeError: the disk fails.

    Blocking: call from a worker thread.
    """
    with map_os_errors(f"read {NAME}"):
        text = read_capped(root / NAME, limit=MAX_ROOT_FILE_BYTES)
    if text is None:
        return None
    try:
        document = json.loads(text)
        check_format(document, NAME)
        buckets, worker_id = document["buckets"], document["workerId"]
        if worker_id is not None and type(worker_id) is not int:
            raise ValueError("workerId: expected a whole number or null")
        return Assignment(None if buckets is None else frozenset(map(parse_bucket_id, buckets)), worker_id)
    except (ValueError, TypeError, KeyError, RecursionError, InvalidInput) as error:
        reason = str(error) if isinstance(error, InvalidInput) else type(error).__name__
        logger.error("assignment_file_invalid", file=NAME, reason=reason)
        return None


def write_checked_assignment(root: Path, assignment: Assignment) -> None:
    """Replace the file atomically. VolumeError if that fails. Blocking: call from a worker thread."""
    buckets = None if assignment.bucket_ids is None else sorted(assignment.bucket_ids)
    text = json.dumps({"format": FORMAT, "buckets": buckets, "workerId": assignment.worker_id}) + "\n"
    with map_os_errors(f"write {NAME}"):
        atomic_write(root / NAME, text.encode())
        sync_directory(root)
