"""Warming: asking for fetches that nobody waits for, a few at a time, as long as there is room.

One API process at a time does it, by a lease in the state store; should it die, another begins the same warming anew
(what was fetched meanwhile is then skipped). Nothing is evicted for it: the plan ends at the low watermark, and so do
the fetchers for jobs of low priority.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import structlog

from distributor_node.services.api.context import ApiContext
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
from distributor_node.shared.ports.state_store import FetchPhase, ObjectStatus

LEASE_SECONDS, REPORT_INTERVAL = 10.0, 0.5
MAX_CONCURRENT_FETCHES = 8
FETCH_TIMEOUT = 20.0
"""Seconds without a live fetch after which an object is given up."""
_LISTING_ATTEMPTS, _LISTING_RETRY_DELAY = 3, 5.0
_LIVE = (FetchPhase.CLAIMED, FetchPhase.QUEUED, FetchPhase.FETCHING)

logger = structlog.get_logger()


@dataclass(slots=True)
class _Progress:
    """How far the warming of this process is."""

    now: Warming
    planned: deque[MediaObject] = field(default_factory=deque)

    def count(self, **more: int) -> None:
        self.now = replace(
            self.now, **{name: getattr(self.now, name) + number for name, number in more.items()}
        )


class CacheWarmer:
    """`run` is a task of every API process. `holder`: unique to it; `fetch_timeout`: see FETCH_TIMEOUT."""

    def __init__(self, context: ApiContext, holder: str, fetch_timeout: float = FETCH_TIMEOUT) -> None:
        self._context, self._holder, self._fetch_timeout = context, holder, fetch_timeout
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """A warming was ordered here: no need to wait for the next look."""
        self._woken.set()

    async def run(self) -> None:
        """Look for a warming to carry out, until cancelled."""
        while True:
            try:
                warming = await self._context.state.lease_warming(self._holder, LEASE_SECONDS)
                if warming is not None:
                    await self._execute(warming)
            except StateStoreUnavailable as error:
                logger.debug("warming_poll_failed", reason=str(error))
            try:
                async with asyncio.timeout(2 * REPORT_INTERVAL):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()

    async def _execute(self, warming: Warming) -> None:
        """To its end, or until the lease is lost."""
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
                    await asyncio.sleep(
                        REPORT_INTERVAL
                    )  # the work may be done, and then nothing else waits here
                    continue
                if leased is None or leased.serial != warming.serial:
                    logger.warning("warming_lease_lost", serial=warming.serial)
                    return
                if leased.is_finished:
                    logger.info(
                        "warming_finished", done=leased.done, skipped=leased.skipped, failed=leased.failed
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
        progress.now = replace(progress.now, state="finished")

    async def _plan(self, progress: _Progress) -> None:
        """Which objects may be fetched; the others are skipped right away, those without room too. A list may know
        neither sources nor assignment: those are looked at when an object's turn comes."""
        settings, usage = self._context.settings, await self._context.state.usage()
        room = settings.storage.watermarks.low - usage.used - usage.reserved
        largest = settings.storage.largest_cached_size
        async for batch in self._list(progress.now.scope):
            for known in batch:
                progress.count(total=1)
                size = known.size if known is not None and known.accepted else None
                if (
                    known is None
                    or size is None
                    or size > largest
                    or footprint(size) > room
                    or await self._is_cached(known.object_id)
                ):
                    progress.count(skipped=1)
                    continue
                room -= footprint(size)
                progress.planned.append(known)

    async def _list(self, scope: WarmingScope) -> AsyncIterator[Sequence[MediaObject | None]]:
        catalog = self._context.catalog
        if scope.object_ids is not None:
            for object_id in scope.object_ids:
                yield [await catalog.look_up(object_id)]
            return
        assignment = self._context.assignment.current
        if scope.bucket_id is not None:
            assignment = Assignment(bucket_ids=frozenset({scope.bucket_id}))
        async for batch in catalog.list_objects(assignment):
            yield batch

    async def _fetch_planned(self, progress: _Progress) -> None:
        while progress.planned:
            await self._context.operator_state.wait_until(_not_draining)
            if not progress.planned:
                return
            listed = progress.planned.popleft()
            while (outcome := await self._outcome(listed, progress)) is None:
                pass
            progress.count(**{outcome: 1})

    async def _outcome(self, listed: MediaObject, progress: _Progress) -> str | None:
        """`done`, `skipped` or `failed`; None, after a pause: state store or job queue are away."""
        try:
            outcome = await self._fetch(listed.object_id, f"warming-{progress.now.serial}")
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
        return outcome

    async def _fetch(self, object_id: ObjectId, request_id: str) -> str:
        """`done`, `skipped` or `failed`."""
        state = self._context.state
        if await self._is_cached(object_id):
            return "skipped"
        known = await self._known(object_id)
        if known is None or not known.accepted or not self._context.assignment.current.covers(known):
            return "skipped"
        claim = await state.claim(object_id, self._holder)
        if claim.won:
            job = FetchJob(known, request_id, time.time(), low_priority=True)
            try:
                await self._context.queue.publish(job)
            except JobQueueUnavailable:
                await state.release_claim(object_id, self._holder)
                raise
            await state.mark_queued(object_id, self._holder)
        elif claim.status.failure is not None:
            return "failed"
        return await self._wait_until_done(known)

    async def _known(self, object_id: ObjectId) -> MediaObject | None:
        """The catalog's whole word on one object; a catalog that is down for a moment is asked again."""
        for _ in range(_LISTING_ATTEMPTS - 1):
            try:
                return await self._context.catalog.look_up(object_id)
            except CatalogUnavailable:
                await asyncio.sleep(_LISTING_RETRY_DELAY)
        return await self._context.catalog.look_up(object_id)

    async def _wait_until_done(self, known: MediaObject) -> str:
        last_live_at = time.monotonic()
        while True:
            await self._context.fetch_events.wait(known.object_id, REPORT_INTERVAL)
            object_status = await self._context.state.find(known.object_id)
            if _is_live(object_status):
                last_live_at = time.monotonic()
            elif await self._is_cached(known.object_id):
                return "done"
            elif object_status.failure is not None:
                return "failed"
            elif not await self._has_room(known):
                return "skipped"
            elif time.monotonic() - last_live_at > self._fetch_timeout:
                return "failed"

    async def _has_room(self, known: MediaObject) -> bool:
        usage = await self._context.state.usage()
        needed = usage.used + usage.reserved + footprint(known.size or 0)
        return needed <= self._context.settings.storage.watermarks.low

    async def _is_cached(self, object_id: ObjectId) -> bool:
        return await asyncio.to_thread(self._check_cached, object_id)

    def _check_cached(self, object_id: ObjectId) -> bool:
        """Whether a request would be a hit. Blocks."""
        try:
            return self._context.volume.complete_record(object_id) is not None
        except VolumeError:
            return False


def _is_live(object_status: ObjectStatus) -> bool:
    return object_status.fetch is not None and object_status.fetch.phase in _LIVE


def _not_draining(state: OperatorState) -> bool:
    return not state.draining
