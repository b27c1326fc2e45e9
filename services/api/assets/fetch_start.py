"""Asking the catalog: what it says of an object, or the answer that this ends in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import RETRY_LATER, HttpError
from distributor_node.services.api.request_log import phase
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    JobQueueUnavailable,
    StateStoreUnavailable,
)
from distributor_node.shared.domain.jobs import FetchJob
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.state_store import Claim, ObjectStatus, StateStore

logger = structlog.get_logger()


async def look_up(context: ApiContext, object_id: ObjectId) -> MediaObject:
    """An object that exists, is ours, and has been uploaded; HttpError 404, 421 or 503 for any other."""
    try:
        with phase("catalog"):
            media_object = await context.catalog.look_up(object_id)
    except CatalogUnavailable as error:
        logger.warning("catalog_unavailable", object_id=object_id, reason=str(error))
        raise HttpError(
            503,
            "The catalog is out of reach, and the object is not cached",
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


# The singleflight that starts fetches: claim, publish, mark. Once begun it is carried through, whatever becomes of the
# client.


class PendingStart:
    """One attempt to start a fetch: whether the claim was won, and later whether the job could be published."""

    def __init__(self) -> None:
        self.claim: asyncio.Future[Claim | None] = asyncio.get_running_loop().create_future()
        self.publish_failed = asyncio.Event()


class FetchStarter:
    """Owns the tasks that start fetches, so that a client that leaves never leaves a claim without a job."""

    def __init__(
        self, state: StateStore, queue: JobQueue, claimant: str, is_complete: Callable[[ObjectId], bool]
    ) -> None:
        """`claimant` names this process in claims; `is_complete`: whether an object is on the volume."""
        self._state = state
        self._is_complete = is_complete
        self._queue = queue
        self._claimant = claimant
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, media_object: MediaObject, request_id: str) -> tuple[Claim | None, PendingStart]:
        """Claim the object and, if won, publish its job in the background; None: the state store is out of reach."""
        start = PendingStart()
        task = asyncio.create_task(self._claim_and_publish(media_object, request_id, start))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(start.claim), start

    async def close(self) -> None:
        """Wait for the jobs that are being published; the queue's time limit bounds that."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _claim_and_publish(
        self, media_object: MediaObject, request_id: str, start: PendingStart
    ) -> None:
        object_id = media_object.object_id
        try:
            try:
                with phase("claim"):
                    claim = await self._state.claim(object_id, self._claimant)
            except StateStoreUnavailable as error:
                self._log_state_error("claim", request_id, error)
                return
            # Looked for on the volume, being fetched by another, there and committed, claimed here: such a claim is won
            # for nothing. A fetch commits after its object is in place, so whoever looks once more now sees it.
            if claim.won and self._is_complete(object_id):
                claim = Claim(won=False, status=ObjectStatus(None, None))
                start.claim.set_result(claim)
                await self._update_claim(self._state.release_claim, object_id, request_id)
                return
            start.claim.set_result(claim)
            if claim.won:
                await self._publish(FetchJob(media_object, request_id, time.time()), start)
        finally:
            if not start.claim.done():
                start.claim.set_result(None)

    async def _publish(self, job: FetchJob, start: PendingStart) -> None:
        published = False
        try:
            with phase("publish"):
                await self._queue.publish(job)
            published = True
        except JobQueueUnavailable as error:
            logger.warning(
                "job_publish_failed", object_id=job.object_id, request_id=job.request_id, reason=str(error)
            )
        finally:
            if not published:
                start.publish_failed.set()
        update = self._state.mark_queued if published else self._state.release_claim
        await self._update_claim(update, job.object_id, job.request_id)

    async def _update_claim(
        self, update: Callable[[ObjectId, str], Awaitable[None]], object_id: ObjectId, request_id: str
    ) -> None:
        """The state store, what has become of the claim."""
        try:
            await update(object_id, self._claimant)
        except StateStoreUnavailable as error:
            # The claim runs out by itself; meanwhile requests are pending, and proxied after the first-byte wait.
            self._log_state_error(update.__name__, request_id, error)

    def _log_state_error(self, operation: str, request_id: str, error: StateStoreUnavailable) -> None:
        logger.warning(
            "state_store_unavailable", operation=operation, request_id=request_id, reason=str(error)
        )
