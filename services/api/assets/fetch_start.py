"""Catalog look-up of a missed object, and the singleflight that starts its fetch: claim, publish, mark as queued."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from math import inf
from typing import Any

import structlog
from sanic import Request

from distributor_node.services.api.clients import client_of_request
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import RETRY_LATER, RETRY_SOON, HttpError
from distributor_node.services.api.request_log import phase
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    JobQueueUnavailable,
    LookupRefused,
    StateStoreUnavailable,
)
from distributor_node.shared.domain.jobs import FetchJob
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.space import AdmissionQuestion
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.state_store import (
    Claim,
    Failure,
    FailureCause,
    Fetch,
    FetchPhase,
    ObjectStatus,
    StateStore,
)

REFUTATION_INTERVAL = 5.0
"""Seconds between two refutations for one object: a source may send ranges, and fail at the whole object again."""
START_AGAIN_INTERVAL = 2.0
"""Seconds between two jobs, from the same process, for an object whose fetch its followers find parked: if such a job
ends at once (it is refused, or cannot be published), the fetch is parked again, and all of them are told."""
_MAX_NOTED = 1_000
_MARK_DELAY = 0.05
"""Seconds from a job's publishing until its claim is marked as queued; a claim lasts far longer. Until then loop and
state store work for the first byte. Most fetches have begun by then, and the mark changes nothing."""

LATE = 60.0
"""Seconds from publishing after which a job that has not begun may be lost: its queue was deleted, or its broker."""
LOST_JOB_INTERVAL = 5.0
"""Seconds between two looks for lost jobs."""

logger = structlog.get_logger()


async def look_up(context: ApiContext, request: Request, object_id: ObjectId) -> MediaObject:
    """Return an object that exists, is assigned to this node and has been uploaded.

    Raises HttpError 404, 421 or 503 otherwise.
    """
    client = client_of_request(context.client_addresses, request)
    try:
        with phase("catalog"):
            media_object = await context.catalog.look_up(object_id, client)
    except LookupRefused as error:
        # Counted by reason, and seen in the request's own event: under overload there are hundreds a second.
        logger.debug("lookup_refused", object_id=object_id, reason=str(error))
        context.refused_lookups.note()
        raise HttpError(
            503,
            "Too many look-ups wait for the catalog, and the object is not cached",
            "lookup_refused",
            RETRY_SOON,
        ) from error
    except CatalogUnavailable as error:
        logger.warning("catalog_unavailable", object_id=object_id, reason=str(error))
        raise HttpError(
            503,
            "The catalog is unavailable, and the object is not cached",
            "catalog_unavailable",
            RETRY_LATER,
        ) from error
    if media_object is None:
        raise HttpError(404, "Data object does not exist", "does_not_exist")
    if not context.assignment.current.covers(media_object):
        raise HttpError(421, "Data object not served by this node", "not_served")
    if not media_object.accepted:
        raise HttpError(404, "Data object has not been uploaded yet", "not_uploaded")
    return media_object


class PendingStart:
    """One attempt to start a fetch."""

    def __init__(self) -> None:
        # None: the state store is unavailable.
        self.claim: asyncio.Future[Claim | None] = asyncio.get_running_loop().create_future()
        self.publish_failed = asyncio.Event()


class FetchStarter:
    """Starts one fetch per object, however many requests miss it (singleflight).

    Each start runs in a task of its own: a client that disconnects never leaves a claim without a job.
    """

    def __init__(
        self, state: StateStore, queue: JobQueue, claimant: str, is_complete: Callable[[ObjectId], bool]
    ) -> None:
        """`claimant`: names this process in claims. `is_complete`: whether an object is on the volume."""
        self._state = state
        self._is_complete = is_complete
        self._queue = queue
        self._claimant = claimant
        self._tasks: set[asyncio.Task[None]] = set()
        self._refuted_at: OrderedDict[ObjectId, float] = OrderedDict()
        self._started_again_at: OrderedDict[ObjectId, float] = OrderedDict()
        # In monotonic seconds. Jobs published before this that have not begun were lost, and the next look for others
        self._lost_before = self._next_look_at = -inf
        self._looking = asyncio.Lock()

    async def start(
        self,
        media_object: MediaObject,
        request_id: str,
        revalidates: float | None = None,
        admission: AdmissionQuestion | None = None,
        *,
        for_peer: bool = False,
        copy: bool = False,
    ) -> tuple[Claim | None, PendingStart]:
        """Claim the object. If the claim is won, publish its job in the background.

        The claim is None if the state store is unavailable. `revalidates`, `for_peer`, `copy`: see FetchJob.
        `admission`: see StateStore.claim.
        """
        start = PendingStart()
        job = FetchJob(
            media_object,
            request_id,
            time.time(),
            low_priority=copy,
            revalidates=revalidates,
            for_peer=for_peer,
            copy=copy,
        )
        self._run(self._claim_and_publish(job, start, admission))
        return await asyncio.shield(start.claim), start

    def refute(self, object_id: ObjectId, failure: Failure, *, verified: bool) -> None:
        """A source has sent bytes of an object whose fetch had failed: let the next request fetch it, if that is
        evidence against the failure.

        `verified`: they were the whole object, and the right bytes.
        """
        refuted = failure.cause is FailureCause.SOURCES or (
            failure.cause is FailureCause.CORRUPT and verified
        )
        if refuted and _is_due(self._refuted_at, object_id, REFUTATION_INTERVAL):
            self._run(self._refute(object_id, failure.cause))

    def may_start_again(self, object_id: ObjectId) -> bool:
        """Whether a follower may start a parked fetch of this object again now. If so, that is noted."""
        return _is_due(self._started_again_at, object_id, START_AGAIN_INTERVAL)

    async def _refute(self, object_id: ObjectId, cause: FailureCause) -> None:
        try:
            if await self._state.refute_failure(object_id, cause):
                logger.info("failure_refuted", object_id=object_id, cause=cause)
        except StateStoreUnavailable as error:
            logger.info("failure_not_refuted", object_id=object_id, reason=str(error))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for jobs that are being published. The queue's timeout bounds the wait."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _claim_and_publish(
        self, job: FetchJob, start: PendingStart, admission: AdmissionQuestion | None
    ) -> None:
        object_id, request_id = job.object_id, job.request_id
        try:
            try:
                with phase("claim") as span:
                    claim = await self._state.claim(object_id, self._claimant, admission, span.traceparent)
            except StateStoreUnavailable as error:
                self._log_state_error("claim", request_id, error)
                return
            # Race: 1. this request sees no file; 2. a fetcher renames the complete file and commits; 3. this request
            # claims and wins. The commit follows the rename, so looking once more after the claim is enough.
            if claim.won and job.revalidates is None and self._is_complete(object_id):
                start.claim.set_result(Claim(won=False, status=ObjectStatus(None, None)))
                await self._update_claim(self._state.release_claim, object_id, claim.serial, request_id)
                return
            start.claim.set_result(claim)
            if not claim.won:
                await self._release_if_lost(claim.status.fetch, request_id)
            else:
                await self._publish(replace(job, published_at=time.time(), claim=claim.serial), start)
        finally:
            if not start.claim.done():
                start.claim.set_result(None)

    async def _release_if_lost(self, fetch: Fetch | None, request_id: str) -> None:
        """Let the next request publish another job, if this one waits nowhere.

        A heartbeat may be older than a delivery. Then there are two jobs: the one of the older claim ends at once.
        """
        if fetch is None or fetch.phase is not FetchPhase.QUEUED:
            return
        published_at = time.monotonic() - fetch.age
        async with self._looking:  # many are late together, and one look tells of all of them
            if published_at > self._lost_before and fetch.age >= LATE:
                await self._look_for_lost(fetch)
        if published_at > self._lost_before:
            return
        logger.warning("job_lost", object_id=fetch.object_id, request_id=request_id, age=round(fetch.age, 1))
        try:
            await self._state.release_claim(fetch.object_id, fetch.worker)
        except StateStoreUnavailable as error:
            self._log_state_error("release_claim", request_id, error)

    async def _look_for_lost(self, fetch: Fetch) -> None:
        now = time.monotonic()
        if now < self._next_look_at:
            return
        self._next_look_at = now + LOST_JOB_INTERVAL
        try:
            depth = await self._queue.depth()
            if depth.ready or depth.delayed or any(one.waiting for one in await self._state.workers()):
                return
        except (JobQueueUnavailable, StateStoreUnavailable) as error:
            logger.info("lost_job_not_told", object_id=fetch.object_id, reason=str(error))
            return
        self._lost_before, self._next_look_at = now - LATE, -inf  # others were lost with it

    async def _publish(self, job: FetchJob, start: PendingStart) -> None:
        published = False
        try:
            with phase("publish", "producer") as span:
                await self._queue.publish(replace(job, trace=span.traceparent) if span.traceparent else job)
            published = True
        except JobQueueUnavailable as error:
            logger.warning(
                "job_publish_failed", object_id=job.object_id, request_id=job.request_id, reason=str(error)
            )
        finally:
            if not published:
                start.publish_failed.set()
        if published:
            await asyncio.sleep(_MARK_DELAY)
        update = self._state.mark_queued if published else self._state.release_claim
        await self._update_claim(update, job.object_id, job.claim, job.request_id)

    async def _update_claim(
        self,
        update: Callable[[ObjectId, str, int], Awaitable[None]],
        object_id: ObjectId,
        serial: int,
        request_id: str,
    ) -> None:
        """Mark the claim as queued, or release it: this one, and none that this process has made since."""
        try:
            await update(object_id, self._claimant, serial)
        except StateStoreUnavailable as error:
            # The claim expires by itself. Until then requests wait as pending, and are proxied after first_byte_wait.
            self._log_state_error(update.__name__, request_id, error)

    def _log_state_error(self, operation: str, request_id: str, error: StateStoreUnavailable) -> None:
        logger.warning(
            "state_store_unavailable", operation=operation, request_id=request_id, reason=str(error)
        )


def _is_due(times: OrderedDict[ObjectId, float], object_id: ObjectId, interval: float) -> bool:
    """Whether `interval` seconds have passed since this was last true for the object. `times`: when that was."""
    now = time.monotonic()
    if now - times.get(object_id, -inf) < interval:
        return False
    times[object_id] = now
    times.move_to_end(object_id)
    if len(times) > _MAX_NOTED:
        times.popitem(last=False)
    return True
