"""Pending and missed objects: whether to follow, to proxy, or to refuse; and who starts the fetch."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import structlog
from sanic import HTTPResponse, Request

from services.api.assets.answer import answer_head
from services.api.assets.decision import Asked, Description, Span, fits, live_fetch, select
from services.api.assets.growing import GrowingAnswerer, Wanted
from services.api.assets.heads import BYPASS, MISS, PENDING, content_head, refuse
from services.api.assets.lookup import look_up
from services.api.assets.second_views import SecondViews
from services.api.assets.sender import ObjectSender
from services.api.assets.starter import FetchStarter
from services.api.context import ApiContext
from services.api.exchange import request_record
from shared.adapters.volume import OpenObject
from shared.domain.errors import StateStoreUnavailable, VolumeError
from shared.domain.objects import MediaObject, ObjectId
from shared.ports.state_store import Fetch, FetchPhase, ObjectStatus

logger = structlog.get_logger()


class UncachedAnswerer:
    """Answers for objects that were not complete on the volume when the request came."""

    def __init__(
        self,
        context: ApiContext,
        sender: ObjectSender,
        starter: FetchStarter,
        growing: GrowingAnswerer,
        admission: SecondViews,
    ) -> None:
        self._context = context
        self._sender = sender
        self._starter = starter
        self._growing = growing
        self._admission = admission

    async def answer(
        self, request: Request, asked: Asked, object_id: ObjectId, *, degraded: bool
    ) -> HTTPResponse | None:
        """`degraded`: the volume has failed for this object, so it is proxied whatever the state store says."""
        found = None if degraded else await self._find(object_id)
        fetch = live_fetch(found) if found is not None else None
        draining = self._context.operator_state.current.draining
        if fetch is not None and (fetch.phase is FetchPhase.FETCHING or not draining):
            return await self._pending(request, asked, object_id, fetch)
        known = await look_up(self._context, object_id)
        described = Description.of_object(known)
        request_record(request).size = described.size
        span = select(asked, described)
        if not isinstance(span, Span):
            return refuse(span, described, MISS)
        if asked.head:
            return await answer_head(request, content_head(described, MISS, span, None))
        wanted = Wanted(request, described, span, BYPASS, known)
        largest = self._context.settings.storage.largest_cached_size
        if found is None or found.failure is not None or draining or not fits(known.size, largest):
            await self._growing.proxied(wanted)
            return None
        if not await self._admission.admits(object_id, known.size):
            await self._growing.proxied(wanted)
            return None
        return await self._missed(asked, wanted, known)

    async def _find(self, object_id: ObjectId) -> ObjectStatus | None:
        try:
            return await self._context.state.find(object_id)
        except StateStoreUnavailable as error:
            logger.warning(
                "state_store_unavailable", operation="find", object_id=object_id, reason=str(error)
            )
            return None

    async def _pending(
        self, request: Request, asked: Asked, object_id: ObjectId, fetch: Fetch
    ) -> HTTPResponse | None:
        known: MediaObject | None = None
        described = self._expected(object_id)
        if described is None:
            known = await look_up(self._context, object_id)
            described = Description.of_object(known)
        request_record(request).size = described.size
        span = select(asked, described)
        if not isinstance(span, Span):
            return refuse(span, described, PENDING)
        if asked.head:
            return await answer_head(request, content_head(described, PENDING, span, None))
        self._context.accesses.record_request(object_id)
        return await self._growing.answer(Wanted(request, described, span, PENDING, known, fetch.source))

    def _expected(self, object_id: ObjectId) -> Description | None:
        try:
            record = self._context.volume.partial_record(object_id)
        except VolumeError as error:
            logger.error("volume_read_failed", object_id=object_id, reason=str(error))
            return None
        return None if record is None else Description.of_record(record, complete=False)

    def _complete(self, object_id: ObjectId) -> OpenObject | None:
        try:
            return self._context.volume.open_object(object_id)
        except VolumeError:
            return None

    async def _missed(self, asked: Asked, wanted: Wanted, known: MediaObject) -> HTTPResponse | None:
        """Start the fetch, or learn that somebody else has; then go on like a pending request."""
        # The catalog may have taken longer than a whole fetch: a claim now would publish a job for nothing.
        complete = self._complete(known.object_id)
        if complete is not None:
            with closing(complete):
                try:
                    return await self._sender.answer(wanted.request, asked, complete)
                except VolumeError as error:
                    logger.warning("volume_read_failed", object_id=known.object_id, reason=str(error))
            await self._growing.proxied(wanted)
            return None
        claim, start = await self._starter.start(known, request_record(wanted.request).request_id)
        if claim is None or (not claim.won and claim.status.failure is not None):
            await self._growing.proxied(wanted)
            return None
        if claim.won:
            return await self._growing.answer(replace(wanted, outcome=MISS), start.unpublished)
        fetch = claim.status.fetch
        source = fetch.source if fetch is not None else None
        return await self._growing.answer(replace(wanted, outcome=PENDING, source=source))
