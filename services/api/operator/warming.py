"""Cache warming: fetches listed objects with low priority, a few at a time, while there is room.

One API process at a time runs a warming, under a lease in the state store. If it dies, another process starts the same
warming again and skips what has been fetched. Warming evicts nothing: it plans up to the low watermark, and fetchers
reject jobs of low priority above it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

import structlog

from distributor_node.services.api.assets.decision import live_fetch
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.operator.commands import ObjectState, state_in_catalog
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    JobQueueUnavailable,
    StateStoreUnavailable,
    VolumeError,
)
from distributor_node.shared.domain.jobs import FetchJob
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, Warming, WarmingScope
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.waiting import wait_event

LEASE_SECONDS, REPORT_INTERVAL = 10.0, 0.5
MAX_CONCURRENT_FETCHES = 8
FETCH_TIMEOUT = 20.0
"""Seconds without a fetch in progress after which an object counts as failed."""
_MOST_FETCHES = 5
"""Fetches of one object that may end before it is complete: for lack of clients, or because a fetcher refused it."""
_LISTING_ATTEMPTS, _LISTING_RETRY_DELAY = 3, 5.0

_DRAINING = "the node drains, until `drain --off`"
"""Why a warming waits."""
_MOST_NAMED = 10
"""Objects that were not fetched whose ids a warming keeps."""

logger = structlog.get_logger()


class _Skipped(StrEnum):
    """Why an object is not fetched, besides its ObjectState."""

    MALFORMED = "malformed"  # this catalog has no such ids
    TOO_LARGE = "too_large"  # or of unknown size
    KEPT_BY_PEER = "kept_by_peer"
    NO_ROOM = "no_room"


_Outcome = Literal["done", "failed"] | ObjectState | _Skipped
"""What became of an object. The last two: it was skipped."""


_NOT_MISSING: frozenset[_Outcome] = frozenset({"done", ObjectState.STORED, _Skipped.KEPT_BY_PEER})


@dataclass(slots=True)
class _Progress:
    """The progress of the warming that this process runs."""

    now: Warming
    planned: deque[MediaObject] = field(default_factory=deque)

    def add_object(self) -> None:
        self.now = replace(self.now, total=self.now.total + 1)

    def end(self, outcome: _Outcome, object_id: ObjectId) -> None:
        """Count what became of one object, and name it if it is missing afterwards."""
        if outcome not in _NOT_MISSING:
            self._name(outcome, object_id)
        now = self.now
        if outcome == "done":
            self.now = replace(now, done=now.done + 1)
        elif outcome == "failed":
            self.now = replace(now, failed=now.failed + 1)
        else:
            counts = {**now.skipped_for, outcome.value: now.skipped_for.get(outcome.value, 0) + 1}
            self.now = replace(now, skipped=now.skipped + 1, skipped_for=counts)

    def _name(self, outcome: _Outcome, object_id: ObjectId) -> None:
        """Keep the id. A failure replaces the last id of another reason: it is what has to be looked into."""
        named = [*self.now.not_warmed, (str(object_id), str(outcome))]
        if len(named) > _MOST_NAMED:
            others = [one for one in named if one[1] != "failed"]
            named.remove(others[-1] if others else named[-1])
        self.now = replace(self.now, not_warmed=tuple(named))


class CacheWarmer:
    """Runs warmings while it holds their lease. One per API process."""

    def __init__(self, context: ApiContext, holder: str, fetch_timeout: float = FETCH_TIMEOUT) -> None:
        """`holder`: a name unique to this process."""
        self._context, self._holder, self._fetch_timeout = context, holder, fetch_timeout
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Check for a warming now instead of at the next poll."""
        self._woken.set()

    async def run(self) -> None:
        """Poll for a warming and run it, until cancelled."""
        while True:
            try:
                warming = await self._context.state.lease_warming(self._holder, LEASE_SECONDS)
                if warming is not None:
                    await self._execute(warming)
            except StateStoreUnavailable as error:
                logger.debug("warming_poll_failed", reason=str(error))
            await wait_event(self._woken, 2 * REPORT_INTERVAL)
            self._woken.clear()

    async def _execute(self, warming: Warming) -> None:
        """Run a warming to its end, or until the lease is lost."""
        initial = Warming(warming.serial, warming.scope, "listing")
        progress = _Progress(initial)
        logger.info("warming_started", serial=warming.serial)
        work = asyncio.create_task(self._work(progress), name="warming")
        try:
            while True:
                await asyncio.wait({work}, timeout=REPORT_INTERVAL)
                if work.done():
                    work.result()
                try:
                    leased = await self._context.state.lease_warming(
                        self._holder, LEASE_SECONDS, progress.now
                    )
                except StateStoreUnavailable as error:
                    logger.warning("warming_report_failed", reason=str(error))
                    # Once the work is done, the wait above returns at once.
                    await asyncio.sleep(REPORT_INTERVAL)
                    continue
                if leased is None or leased.serial != warming.serial:
                    logger.warning("warming_lease_lost", serial=warming.serial)
                    return
                if leased.is_finished:
                    logger.info(
                        "warming_finished",
                        done=leased.done,
                        skipped=leased.skipped,
                        skipped_for=dict(leased.skipped_for),
                        failed=leased.failed,
                    )
                    return
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def _work(self, progress: _Progress) -> None:
        for attempt in range(1, _LISTING_ATTEMPTS + 1):
            try:
                await self._plan(progress)
                break
            except (CatalogUnavailable, StateStoreUnavailable) as error:
                progress.planned.clear()
                progress.now = Warming(
                    progress.now.serial, progress.now.scope, "listing", reason=str(error)[:200]
                )
                if attempt == _LISTING_ATTEMPTS:
                    progress.now = replace(progress.now, state="finished")
                    return
                await asyncio.sleep(_LISTING_RETRY_DELAY)
        progress.now = replace(progress.now, state="fetching", reason="")
        async with asyncio.TaskGroup() as group:
            for number in range(MAX_CONCURRENT_FETCHES):
                group.create_task(self._fetch_planned(progress), name=f"warming-{number}")
        # A pause that has ended is no reason: with one, a finished warming has ended early.
        progress.now = replace(progress.now, state="finished", reason="")

    async def _plan(self, progress: _Progress) -> None:
        """Plan the fetches. Objects that are too large, cached already or without room are skipped.

        A listing may lack sources and assignment. These are looked up before each fetch.
        """
        settings, usage = self._context.settings, await self._context.state.usage()
        room = settings.storage.watermarks.low - usage.used - usage.reserved
        named = progress.now.scope.object_ids is not None
        async for batch in self._list(progress.now.scope):
            for known in batch:
                progress.add_object()
                if not isinstance(known, MediaObject):
                    can_be = self._context.catalog.can_have(known)
                    progress.end(ObjectState.UNKNOWN if can_be else _Skipped.MALFORMED, known)
                    continue
                skipped = await self._reason_to_skip(known, room, named=named)
                if skipped is not None:
                    progress.end(skipped, known.object_id)
                    continue
                room -= footprint(known.size or 0)
                progress.planned.append(known)

    async def _reason_to_skip(
        self, known: MediaObject, room: int, *, named: bool
    ) -> ObjectState | _Skipped | None:
        """`room`: in bytes. In a fleet each node fetches what it keeps, unless the operator has `named` the object."""
        if not known.accepted:
            return ObjectState.NOT_UPLOADED
        size, peers = known.size, self._context.peers
        if size is None or size > self._context.settings.storage.largest_cached_size:
            return _Skipped.TOO_LARGE
        if peers is not None and not named and not peers.keeps_cold(known.object_id, size):
            return _Skipped.KEPT_BY_PEER
        if await self._is_cached(known.object_id):
            return ObjectState.STORED
        return _Skipped.NO_ROOM if footprint(size) > room else None

    async def _list(self, scope: WarmingScope) -> AsyncIterator[Sequence[MediaObject | ObjectId]]:
        """Yield the objects of the scope; the id where the catalog does not know it."""
        catalog = self._context.catalog
        if scope.object_ids is not None:
            for object_id in scope.object_ids:
                yield [await catalog.look_up(object_id) or object_id]
            return
        assignment = self._context.assignment.current
        if scope.bucket_id is not None:
            assignment = Assignment(bucket_ids=frozenset({scope.bucket_id}))
        async for batch in catalog.list_objects(assignment):
            yield batch

    async def _fetch_planned(self, progress: _Progress) -> None:
        while progress.planned:
            if not _not_draining(self._context.operator_state.current):
                progress.now = replace(progress.now, reason=_DRAINING)
                await self._context.operator_state.wait_until(_not_draining)
                progress.now = replace(progress.now, reason="")
            if not progress.planned:
                return
            listed = progress.planned.popleft()
            while (outcome := await self._outcome(listed, progress)) is None:
                pass
            progress.end(outcome, listed.object_id)

    async def _outcome(self, listed: MediaObject, progress: _Progress) -> _Outcome | None:
        """Fetch one object. None, after a pause: to be tried again."""
        outcome: _Outcome | None = None
        try:
            for _ in range(_MOST_FETCHES):
                outcome = await self._fetch(listed.object_id, f"warming-{progress.now.serial}")
                if outcome is not None:
                    break
        except (StateStoreUnavailable, JobQueueUnavailable) as error:
            if not progress.now.reason:
                logger.warning("warming_paused", reason=str(error))
            progress.now = replace(progress.now, reason=str(error)[:200])
            await asyncio.sleep(REPORT_INTERVAL)
            return None
        except CatalogUnavailable as error:
            logger.info("object_warming_failed", object_id=listed.object_id, reason=str(error))
            return "failed"
        progress.now = replace(progress.now, reason="")
        return outcome or "failed"

    async def _fetch(self, object_id: ObjectId, request_id: str) -> _Outcome | None:
        """Return what became of it. None: a fetch has ended for lack of clients, another one is needed."""
        state = self._context.state
        if await self._is_cached(object_id):
            return ObjectState.STORED
        known = await self._known(object_id)
        found = state_in_catalog(known, self._context.assignment.current)
        if known is None or found is not ObjectState.ABSENT:
            return found
        claim = await state.claim(object_id, self._holder)
        if claim.won:
            job = FetchJob(known, request_id, time.time(), claim=claim.serial, low_priority=True)
            try:
                await self._context.queue.publish(job)
            except JobQueueUnavailable:
                await state.release_claim(object_id, self._holder, claim.serial)
                raise
            await state.mark_queued(object_id, self._holder, claim.serial)
        elif claim.status.failure is not None:
            return "failed"
        else:
            await state.order_whole(object_id)  # clients have started its fetch, which may wait for them
        return await self._wait_until_done(known)

    async def _known(self, object_id: ObjectId) -> MediaObject | None:
        """Look up one object. Retries while the catalog is unavailable."""
        for _ in range(_LISTING_ATTEMPTS - 1):
            try:
                return await self._context.catalog.look_up(object_id)
            except CatalogUnavailable:
                await asyncio.sleep(_LISTING_RETRY_DELAY)
        return await self._context.catalog.look_up(object_id)

    async def _wait_until_done(self, known: MediaObject) -> _Outcome | None:
        last_live_at = time.monotonic()
        while True:
            await self._context.fetch_events.wait(known.object_id, REPORT_INTERVAL)
            object_status = await self._context.state.find(known.object_id)
            if live_fetch(object_status) is not None:
                last_live_at = time.monotonic()
            elif await self._is_cached(known.object_id):
                return "done"
            elif object_status.failure is not None:
                return "failed"
            elif not await self._has_room(known):
                return _Skipped.NO_ROOM
            elif object_status.fetch is not None and object_status.fetch.age >= REPORT_INTERVAL:
                return None
            elif time.monotonic() - last_live_at > self._fetch_timeout:
                return "failed"

    async def _has_room(self, known: MediaObject) -> bool:
        usage = await self._context.state.usage()
        needed = usage.used + usage.reserved + footprint(known.size or 0)
        return needed <= self._context.settings.storage.watermarks.low

    async def _is_cached(self, object_id: ObjectId) -> bool:
        return await asyncio.to_thread(self._check_cached, object_id)

    def _check_cached(self, object_id: ObjectId) -> bool:
        """Whether a request would be a hit. Blocking: call from a worker thread."""
        try:
            return self._context.volume.complete_record(object_id) is not None
        except VolumeError:
            return False


def _not_draining(state: OperatorState) -> bool:
    return not state.draining
