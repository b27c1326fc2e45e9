"""Answers from a file that is still growing, with a source to fall back on."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass, replace
from time import monotonic

import structlog
from sanic import HTTPResponse, Request

from services.api.assets.answer import StreamingResponse
from services.api.assets.decision import Representation, Span, is_far
from services.api.assets.follower import PartialFileStreamer, StreamEnd
from services.api.assets.heads import BYPASS, CacheOutcome, content_head
from services.api.assets.lookup import look_up
from services.api.assets.proxy import ProxiedResponse, Proxy
from services.api.assets.sender import HitResponder
from services.api.assets.watch import FetchPoller
from services.api.context import ApiContext
from services.api.errors import AbortResponse, HttpError
from shared.adapters.volume import OpenObject, PartialReader
from shared.domain.errors import VolumeError
from shared.domain.objects import MediaObject

_RESUME_GRACE = 5.0
"""Seconds beyond a dead worker's lease in which another one is expected to resume."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A GET that needs bytes which are not on the volume yet. `media_object` is None where the volume told enough so
    far; `source` is the one that the fetch uses."""

    request: Request
    representation: Representation
    span: Span
    outcome: CacheOutcome
    media_object: MediaObject | None = None
    source: str | None = None


class PendingResponder:
    """Follows where that is quick, proxies where it is not."""

    def __init__(self, context: ApiContext, hit_responder: HitResponder, proxy: Proxy) -> None:
        self._context = context
        self._hit_responder = hit_responder
        self._proxy = proxy

    async def respond(
        self, pending: PendingRequest, publish_failed: asyncio.Event | None = None
    ) -> HTTPResponse | None:
        """Answer while the object is fetched; `publish_failed` is set when its job could not be published."""
        if pending.span.length == 0:
            head = content_head(pending.representation, pending.outcome, pending.span, "local")
            return HTTPResponse(b"", status=head.status, headers=head.headers)
        publish_failed = publish_failed or asyncio.Event()
        try:
            responded, response = await self._try_streaming(pending, publish_failed)
        except VolumeError as error:
            logger.error("volume_read_failed", object_id=pending.representation.object_id, reason=str(error))
            responded, response = False, None
        if responded:
            return response
        await self.proxy(replace(pending, outcome=BYPASS) if publish_failed.is_set() else pending)
        return None

    async def proxy(self, pending: PendingRequest, response: StreamingResponse | None = None) -> None:
        """Answer from a source."""
        await self._proxy.respond(
            await self._proxied_response(pending, response or StreamingResponse(pending.request))
        )

    async def _try_streaming(
        self, pending: PendingRequest, publish_failed: asyncio.Event
    ) -> tuple[bool, HTTPResponse | None]:
        """Whether it was answered, and the answer if it was not streamed. VolumeError: nothing was sent."""
        settings, span = self._context.settings.public_api, pending.span
        if not settings.follow_growing_files:
            return False, None
        streamer = self._streamer(pending)
        if is_far(span.first, streamer.on_disk(), settings.far_range_distance):
            return False, None
        deadline = monotonic() + settings.first_byte_wait
        while True:
            found = await streamer.wait_for_first_byte(deadline, publish_failed)
            if found is None:
                return False, None
            with closing(found):
                if isinstance(found, OpenObject):
                    representation = replace(pending.representation, media_type=found.record.media_type)
                    return True, await self._hit_responder.send(
                        pending.request, found, representation, span, pending.outcome
                    )
                if await self._stream(pending, streamer, found):
                    return True, None

    async def _stream(
        self, pending: PendingRequest, streamer: PartialFileStreamer, reader: PartialReader
    ) -> bool:
        """False: nothing was sent, and the file is not what it was; there may be a new one."""
        response = StreamingResponse(pending.request)
        end = await streamer.stream(response, reader, pending.outcome)
        if end is StreamEnd.FILE_REPLACED:
            if response.started:
                raise AbortResponse("object_gone")
            return False
        if end is StreamEnd.FETCH_ENDED:
            logger.warning(
                "fetch_ended_while_streaming", object_id=pending.representation.object_id, sent=response.sent
            )
            if response.started:
                await self._proxy.resume(await self._proxied_response(pending, response), reader)
            else:
                await self.proxy(pending, response)
        return True

    async def _proxied_response(
        self, pending: PendingRequest, response: StreamingResponse
    ) -> ProxiedResponse:
        try:
            media_object = pending.media_object or await self._look_up_matching(pending.representation)
        except HttpError as error:
            if response.started:
                raise AbortResponse("source_unknown") from error
            raise
        return ProxiedResponse(
            response, media_object, pending.representation, pending.span, pending.outcome, pending.source
        )

    async def _look_up_matching(self, representation: Representation) -> MediaObject:
        """The catalog's word on what the volume has described. HttpError 503 if that is something else by now."""
        media_object = await look_up(self._context, representation.object_id)
        if (media_object.size, media_object.etag) != (representation.size, representation.etag):
            raise HttpError(503, "The object has just changed", "unavailable", {"Retry-After": "1"})
        return media_object

    def _streamer(self, pending: PendingRequest) -> PartialFileStreamer:
        context, object_id = self._context, pending.representation.object_id
        poller = FetchPoller(object_id, context.state, context.fetch_events)
        stall_timeout = context.settings.fetch.lease + _RESUME_GRACE
        return PartialFileStreamer(
            context.volume, context.accesses, poller, pending.representation, pending.span, stall_timeout
        )
