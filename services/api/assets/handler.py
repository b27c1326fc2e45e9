"""GET and HEAD of one object: the door of the asset path."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import structlog
from sanic import HTTPResponse, Request

from distributor_node.services.api.assets.decision import (
    AssetRequest,
    Representation,
    Span,
    is_cacheable,
    live_fetch,
    select_range,
)
from distributor_node.services.api.assets.fetch_start import FetchStarter, look_up
from distributor_node.services.api.assets.headers import (
    BYPASS,
    MISS,
    PENDING,
    content_head,
    precondition_response,
)
from distributor_node.services.api.assets.pending import PendingRequest, PendingResponder
from distributor_node.services.api.assets.proxy import Proxy
from distributor_node.services.api.assets.response import AccelRedirect, HitResponder, head_response
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.request_log import request_record
from distributor_node.shared.adapters.volume import OpenObject
from distributor_node.shared.domain.admission import SecondHitAdmission
from distributor_node.shared.domain.conditionals import Conditions
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.observability.metrics import ADMISSION_REJECTED
from distributor_node.shared.ports.state_store import Fetch, FetchPhase, ObjectStatus, StateStore
from distributor_node.shared.settings.model import Settings

logger = structlog.get_logger()


class AssetHandler:
    """One for each process. `close` it after the last request: jobs may still be on their way to the queue."""

    def __init__(self, context: ApiContext) -> None:
        self._volume = context.volume
        self._hit_responder = HitResponder(
            context.accesses, AccelRedirect(context.settings.public_api.accel_redirect_prefix)
        )
        claimant = f"{socket.gethostname()}:{os.getpid()}"
        self._starter = FetchStarter(context.state, context.queue, claimant, self._is_complete)
        proxy = Proxy(context.failover_reader, context.settings.public_api)
        pending = PendingResponder(context, self._hit_responder, proxy)
        admission = AdmissionControl(context.settings, context.state, context.clock)
        self._miss_handler = MissHandler(context, self._hit_responder, self._starter, pending, admission)

    async def handle(self, request: Request, object_id: ObjectId) -> HTTPResponse | None:
        """The answer, or None if it was streamed.

        A cached object is answered from the volume alone. HttpError for every other end than content.
        """
        asset_request = _asset_request(request)
        degraded = False
        try:
            file = self._volume.open_object(object_id)
            if file is not None:
                with closing(file):
                    return await self._hit_responder.respond(request, asset_request, file)
        except VolumeError as error:
            logger.error("volume_read_failed", object_id=object_id, reason=str(error))
            degraded = True
        return await self._miss_handler.handle(request, asset_request, object_id, degraded=degraded)

    def _is_complete(self, object_id: ObjectId) -> bool:
        try:
            return self._volume.complete_record(object_id) is not None
        except VolumeError:
            return False

    async def close(self) -> None:
        """See that no claim is left without its job."""
        await self._starter.close()


def _asset_request(request: Request) -> AssetRequest:
    return AssetRequest(
        is_head=request.method == "HEAD",
        conditions=Conditions(
            if_match=_header(request, "if-match"),
            if_unmodified_since=_header(request, "if-unmodified-since"),
            if_none_match=_header(request, "if-none-match"),
            if_modified_since=_header(request, "if-modified-since"),
        ),
        range_header=_header(request, "range"),
        if_range=_header(request, "if-range"),
    )


def _header(request: Request, name: str) -> str | None:
    """All lines of a header joined (RFC 9110 section 5.3); None if there is none."""
    values = request.headers.getall(name, None)
    return None if values is None else ", ".join(values)


# Pending and missed objects: whether to follow, to proxy, or to refuse; and who starts the fetch.


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


# Whether a missed object is fetched at all: a large one only on its second view, while the cache is under pressure.

_USAGE_TTL = 2.0


class AdmissionControl:
    """Off unless `admission.above_size` is set. Each process remembers the first views that it has seen itself: with
    several of them a second view may take a third. `clock`: POSIX seconds."""

    def __init__(self, settings: Settings, state: StateStore, clock: Callable[[], float] = time.time) -> None:
        admission = settings.admission
        self._above = admission.above_size
        self._policy = (
            None
            if admission.above_size is None
            else SecondHitAdmission(admission.above_size, admission.window)
        )
        self._state, self._clock = state, clock
        self._low_watermark = settings.storage.watermarks.low
        self._pressure, self._checked_at = False, float("-inf")

    async def admits(self, object_id: ObjectId, size: int | None) -> bool:
        """Fetch it, or only proxy it? Objects of unknown size are none of ours to judge."""
        if self._policy is None or self._above is None or size is None or size <= self._above:
            return True
        now = self._clock()
        admitted = self._policy.admits(object_id, size, now, pressure=await self._under_pressure(now))
        if not admitted:
            ADMISSION_REJECTED.inc()
        return admitted

    async def _under_pressure(self, now: float) -> bool:
        """More than the low watermark is taken: something else will have to go. When nobody can tell, nothing is
        kept out."""
        if not 0 <= now - self._checked_at < _USAGE_TTL:
            try:
                usage = await self._state.usage()
            except StateStoreUnavailable:
                return False
            self._pressure = usage.used + usage.reserved > self._low_watermark
            self._checked_at = now
        return self._pressure
