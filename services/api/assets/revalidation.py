"""Stale objects of an HTTP origin: whether a stored object may be sent, and asking the origin about it (RFC 9111).

The API may have the volume read-only, so a fetcher asks. One job at a time per object, in the whole deployment:

1. A request finds a stale object. In each process one task per object does the rest, and other requests wait for it.
2. The task claims the object, as for a fetch. Processes that lose the claim wait for the winner's job.
3. The fetcher asks, and rewrites the record or has the file removed. If the origin cannot be asked, it records a
   failure. Then it releases the claim.
4. The tasks see the newer record, the missing file or the failure.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from enum import Enum, auto
from time import monotonic

import structlog

from distributor_node.services.api.assets.decision import AssetRequest, freshness_in_use, live_fetch
from distributor_node.services.api.assets.fetch_start import FetchStarter
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import NOT_CACHED, HttpError
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.http_caching import Use
from distributor_node.shared.domain.objects import MediaObject, ObjectId, StoredRecord
from distributor_node.shared.observability.metrics import REVALIDATIONS
from distributor_node.shared.ports.state_store import FetchPhase
from distributor_node.shared.waiting import cancel_and_wait

_POLL_INTERVAL = 0.1
"""Seconds between two looks at record and state store, if no event comes before."""
_RESULT_GRACE = 1.0
"""Seconds to wait for a result after the claim has ended."""
_PAUSE = 2.0
"""Seconds for which a process does not try again after a failure."""
_MAX_PAUSES = 10_000
_MAX_TASKS = 1_000
_MARGIN = 5.0
"""Seconds for queue and fetcher, in addition to the time that the origin has."""

logger = structlog.get_logger()


class Validation(Enum):
    """How asking the origin about a stored object has ended."""

    REFRESHED = auto()  # it is current
    REMOVED = auto()  # it was replaced or is gone at the origin, and is not stored any more
    OUTDATED = auto()  # likewise, but it could not be removed
    FAILED = auto()  # the origin could not be asked


class Revalidator:
    """Decides about stored objects of an HTTP origin. One per process."""

    def __init__(self, context: ApiContext, starter: FetchStarter) -> None:
        self._context = context
        self._starter = starter
        self._honours_no_cache = context.settings.origin.honour_client_no_cache
        self._wait = context.settings.public_api.first_byte_wait
        fetch = context.settings.fetch
        self._limit = fetch.connect_timeout + fetch.first_byte_timeout + _MARGIN
        self._tasks: dict[ObjectId, asyncio.Task[Validation]] = {}
        self._paused_until: OrderedDict[ObjectId, float] = OrderedDict()

    async def close(self) -> None:
        """Cancel what is under way. Claims expire by themselves, and published jobs go on."""
        await cancel_and_wait(*self._tasks.values())

    def may_send(self, asset_request: AssetRequest, record: StoredRecord, request_id: str) -> bool:
        """Whether to send the stored object at once. If it is stale, the origin is asked in the background.

        Raises HttpError 504 if it must not be sent, and the client wants no request to the origin.
        """
        freshness = freshness_in_use(record)
        if freshness is None:
            return True
        use = freshness.use(
            time.time(),
            no_cache=asset_request.no_cache and self._honours_no_cache,
            only_if_cached=asset_request.only_if_cached,
        )
        if use is Use.REFUSE:
            raise HttpError(504, "The object is stale, and only a cached one was wanted", NOT_CACHED)
        if use is Use.STALE:
            self._start(record, request_id)
        return use is not Use.REVALIDATE

    def may_send_on_error(self, record: StoredRecord) -> bool:
        """Whether to send the stored object although the origin could not be asked."""
        freshness = freshness_in_use(record)
        return freshness is None or freshness.may_serve_on_error(time.time())

    async def validate(self, record: StoredRecord, request_id: str) -> Validation:
        """Ask the origin, or join a request that does. Waits as long as a miss waits for its first byte."""
        task = self._start(record, request_id)
        if task is None:
            return Validation.FAILED
        await asyncio.wait({task}, timeout=self._wait)
        if not task.done() or task.cancelled():
            return Validation.FAILED
        return task.result()

    def _start(self, record: StoredRecord, request_id: str) -> asyncio.Task[Validation] | None:
        """Return the task that asks about the object. None: not now, a moment ago that has failed."""
        object_id = record.object_id
        if object_id in self._tasks:
            return self._tasks[object_id]
        paused = monotonic() < self._paused_until.get(object_id, 0.0)
        if paused or len(self._tasks) >= _MAX_TASKS or self._context.operator_state.current.draining:
            return None
        task = asyncio.create_task(self._run(record, request_id), name=f"revalidate-{object_id}")
        self._tasks[object_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(object_id, None))
        return task

    async def _run(self, record: StoredRecord, request_id: str) -> Validation:
        try:
            async with asyncio.timeout(self._limit):
                validation = await self._validate(record, request_id)
        except (StateStoreUnavailable, VolumeError, TimeoutError) as error:
            logger.warning("revalidation_failed", object_id=record.object_id, reason=str(error) or "too slow")
            validation = Validation.FAILED
        REVALIDATIONS.labels(validation.name.lower()).inc()
        if validation is Validation.FAILED:
            self._pause(record.object_id)
        elif validation is not Validation.REFRESHED:
            # Whatever was looked up describes the old version.
            await self._context.catalog.forget_object(record.object_id)
        return validation

    async def _validate(self, record: StoredRecord, request_id: str) -> Validation:
        object_id = record.object_id
        asked_about = 0.0 if record.freshness is None else record.freshness.checked_at
        wanted = MediaObject(
            object_id,
            record.size,
            media_type=record.media_type,
            sources=tuple(self._context.catalog.sources_of(object_id)),
            validators=record.validators,
            name=object_id.path if object_id.is_digest else record.name,
        )
        claim, start = await self._starter.start(wanted, request_id, revalidates=asked_about)
        if claim is None or start.publish_failed.is_set():
            return Validation.FAILED
        ended_at: float | None = None
        while True:
            # The state before the record: a fetcher writes the record before it releases the claim.
            status = await self._context.state.find(object_id)
            found = self._context.volume.complete_record(object_id)
            fetch = live_fetch(status)
            if found is None and (fetch is None or fetch.phase is FetchPhase.FETCHING):
                return Validation.REMOVED  # and a new claim can be won
            if found is not None and found.freshness is not None and found.freshness.checked_at > asked_about:
                return Validation.REFRESHED
            if status.failure is not None or start.publish_failed.is_set():
                return Validation.FAILED
            if fetch is not None:
                ended_at = None
            elif ended_at is None:
                # The job has ended without a result, or an evictor that has just started has dropped the claim.
                ended_at = monotonic()
            elif monotonic() - ended_at > _RESULT_GRACE:
                return Validation.OUTDATED
            await self._context.fetch_events.wait(object_id, _POLL_INTERVAL)

    def _pause(self, object_id: ObjectId) -> None:
        self._paused_until[object_id] = monotonic() + _PAUSE
        self._paused_until.move_to_end(object_id)
        if len(self._paused_until) > _MAX_PAUSES:
            self._paused_until.popitem(last=False)
