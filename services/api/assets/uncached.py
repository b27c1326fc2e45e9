"""Pending and missed objects: whether to follow, to proxy, or to refuse; and who starts the fetch."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import structlog
from sanic import HTTPResponse, Request

from services.api.assets.answer import head_response
from services.api.assets.decision import (
    AssetRequest,
    Representation,
    Span,
    is_cacheable,
    live_fetch,
    select_range,
)
from services.api.assets.growing import PendingRequest, PendingResponder
from services.api.assets.heads import BYPASS, MISS, PENDING, content_head, precondition_response
from services.api.assets.lookup import look_up
from services.api.assets.second_views import AdmissionControl
from services.api.assets.sender import HitResponder
from services.api.assets.starter import FetchStarter
from services.api.context import ApiContext
from services.api.exchange import request_record
from shared.adapters.volume import OpenObject
from shared.domain.errors import StateStoreUnavailable, VolumeError
from shared.domain.objects import MediaObject, ObjectId
from shared.ports.state_store import Fetch, FetchPhase, ObjectStatus

logger = structlog.get_logger()


class MissHandler:
    """Answers for objects that were not complete on the volume when the request came."""

    def __init__(
        self,
        context: ApiContext,
        hit_responder: HitResponder,
        starter: FetchStarter,
        pending_responder: PendingResponder,
        admission: AdmissionControl,
    ) -> None:
        self._context = context
        self._hit_responder = hit_responder
        self._starter = starter
        self._pending_responder = pending_responder
        self._admission = admission

    async def handle(
        self, request: Request, asset_request: AssetRequest, object_id: ObjectId, *, degraded: bool
    ) -> HTTPResponse | None:
        """`degraded`: the volume has failed for this object, so it is proxied whatever the state store says."""
        status = None if degraded else await self._find(object_id)
        fetch = live_fetch(status) if status is not None else None
        draining = self._context.operator_state.current.draining
        if fetch is not None and (fetch.phase is FetchPhase.FETCHING or not draining):
            return await self._respond_pending(request, asset_request, object_id, fetch)
        media_object = await look_up(self._context, object_id)
        representation = Representation.from_object(media_object)
        request_record(request).size = representation.size
        span = select_range(asset_request, representation)
        if not isinstance(span, Span):
            return precondition_response(span, representation, MISS)
        if asset_request.is_head:
            return await head_response(request, content_head(representation, MISS, span, None))
        pending = PendingRequest(request, representation, span, BYPASS, media_object)
        max_size = self._context.settings.storage.largest_cached_size
        if (
            status is None
            or status.failure is not None
            or draining
            or not is_cacheable(media_object.size, max_size)
        ):
            await self._pending_responder.proxy(pending)
            return None
        if not await self._admission.admits(object_id, media_object.size):
            await self._pending_responder.proxy(pending)
            return None
        return await self._start_fetch(asset_request, pending, media_object)

    async def _find(self, object_id: ObjectId) -> ObjectStatus | None:
        try:
            return await self._context.state.find(object_id)
        except StateStoreUnavailable as error:
            logger.warning(
                "state_store_unavailable", operation="find", object_id=object_id, reason=str(error)
            )
            return None

    async def _respond_pending(
        self, request: Request, asset_request: AssetRequest, object_id: ObjectId, fetch: Fetch
    ) -> HTTPResponse | None:
        media_object: MediaObject | None = None
        representation = self._partial_representation(object_id)
        if representation is None:
            media_object = await look_up(self._context, object_id)
            representation = Representation.from_object(media_object)
        request_record(request).size = representation.size
        span = select_range(asset_request, representation)
        if not isinstance(span, Span):
            return precondition_response(span, representation, PENDING)
        if asset_request.is_head:
            return await head_response(request, content_head(representation, PENDING, span, None))
        self._context.accesses.record_request(object_id)
        return await self._pending_responder.respond(
            PendingRequest(request, representation, span, PENDING, media_object, fetch.source)
        )

    def _partial_representation(self, object_id: ObjectId) -> Representation | None:
        try:
            record = self._context.volume.partial_record(object_id)
        except VolumeError as error:
            logger.error("volume_read_failed", object_id=object_id, reason=str(error))
            return None
        return None if record is None else Representation.from_record(record, complete=False)

    def _open_complete(self, object_id: ObjectId) -> OpenObject | None:
        try:
            return self._context.volume.open_object(object_id)
        except VolumeError:
            return None

    async def _start_fetch(
        self, asset_request: AssetRequest, pending: PendingRequest, media_object: MediaObject
    ) -> HTTPResponse | None:
        """Start the fetch, or learn that somebody else has; then go on like a pending request."""
        # The catalog may have taken longer than a whole fetch: a claim now would publish a job for nothing.
        complete = self._open_complete(media_object.object_id)
        if complete is not None:
            with closing(complete):
                try:
                    return await self._hit_responder.respond(pending.request, asset_request, complete)
                except VolumeError as error:
                    logger.warning("volume_read_failed", object_id=media_object.object_id, reason=str(error))
            await self._pending_responder.proxy(pending)
            return None
        claim, start = await self._starter.start(media_object, request_record(pending.request).request_id)
        if claim is None or (not claim.won and claim.status.failure is not None):
            await self._pending_responder.proxy(pending)
            return None
        if claim.won:
            return await self._pending_responder.respond(replace(pending, outcome=MISS), start.publish_failed)
        fetch = claim.status.fetch
        source = fetch.source if fetch is not None else None
        return await self._pending_responder.respond(replace(pending, outcome=PENDING, source=source))
