"""Answers from a file that is still growing, with a source to fall back on."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import dataclass, replace
from time import monotonic

import structlog
from sanic import HTTPResponse, Request

from services.api.assets.answer import AnswerStream
from services.api.assets.decision import Description, Span, is_far
from services.api.assets.follower import FollowEnd, Follower
from services.api.assets.heads import BYPASS, CacheOutcome, content_head
from services.api.assets.lookup import look_up
from services.api.assets.proxy import Passing, Proxy
from services.api.assets.sender import ObjectSender
from services.api.assets.watch import FetchWatch
from services.api.context import ApiContext
from services.api.errors import AbortResponse, HttpError
from shared.adapters.volume import OpenObject, PartialReader
from shared.domain.errors import VolumeError
from shared.domain.objects import MediaObject

_RESUME_GRACE = 5.0
"""Seconds beyond a dead worker's lease in which another one is expected to resume."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A GET that needs bytes which are not on the volume yet. `known` is None where the volume told enough so far;
    `source` is the one that the fetch uses."""

    request: Request
    described: Description
    span: Span
    outcome: CacheOutcome
    known: MediaObject | None = None
    source: str | None = None


class GrowingAnswerer:
    """Follows where that is quick, proxies where it is not."""

    def __init__(self, context: ApiContext, sender: ObjectSender, proxy: Proxy) -> None:
        self._context = context
        self._sender = sender
        self._proxy = proxy

    async def answer(self, wanted: Wanted, abandoned: asyncio.Event | None = None) -> HTTPResponse | None:
        """Answer while the object is fetched; `abandoned` is set when its job could not be published."""
        if wanted.span.length == 0:
            head = content_head(wanted.described, wanted.outcome, wanted.span, "local")
            return HTTPResponse(b"", status=head.status, headers=head.headers)
        given_up = abandoned or asyncio.Event()
        try:
            answered, response = await self._try_following(wanted, given_up)
        except VolumeError as error:
            logger.error("volume_read_failed", object_id=wanted.described.object_id, reason=str(error))
            answered, response = False, None
        if answered:
            return response
        await self.proxied(replace(wanted, outcome=BYPASS) if given_up.is_set() else wanted)
        return None

    async def proxied(self, wanted: Wanted, answer: AnswerStream | None = None) -> None:
        """Answer from a source."""
        await self._proxy.answer(await self._passing(wanted, answer or AnswerStream(wanted.request)))

    async def _try_following(
        self, wanted: Wanted, abandoned: asyncio.Event
    ) -> tuple[bool, HTTPResponse | None]:
        """Whether it was answered, and the answer if it was not streamed. VolumeError: nothing was sent."""
        settings, span = self._context.settings.public_api, wanted.span
        if not settings.follow_growing_files:
            return False, None
        follower = self._follower(wanted)
        if is_far(span.first, follower.on_disk(), settings.far_range_distance):
            return False, None
        deadline = monotonic() + settings.first_byte_wait
        while True:
            found = await follower.wait_for_first_byte(deadline, abandoned)
            if found is None:
                return False, None
            with closing(found):
                if isinstance(found, OpenObject):
                    described = replace(wanted.described, media_type=found.record.media_type)
                    return True, await self._sender.send(
                        wanted.request, found, described, span, wanted.outcome
                    )
                if await self._follow(wanted, follower, found):
                    return True, None

    async def _follow(self, wanted: Wanted, follower: Follower, reader: PartialReader) -> bool:
        """False: nothing was sent, and the file is not what it was; there may be a new one."""
        answer = AnswerStream(wanted.request)
        end = await follower.follow(answer, reader, wanted.outcome)
        if end is FollowEnd.TORN:
            if answer.begun:
                raise AbortResponse("object_gone")
            return False
        if end is FollowEnd.STOPPED:
            logger.warning(
                "fetch_ended_while_streaming", object_id=wanted.described.object_id, sent=answer.sent
            )
            if answer.begun:
                await self._proxy.go_on(await self._passing(wanted, answer), reader)
            else:
                await self.proxied(wanted, answer)
        return True

    async def _passing(self, wanted: Wanted, answer: AnswerStream) -> Passing:
        try:
            known = wanted.known or await self._look_up_same(wanted.described)
        except HttpError as error:
            if answer.begun:
                raise AbortResponse("source_unknown") from error
            raise
        return Passing(answer, known, wanted.described, wanted.span, wanted.outcome, wanted.source)

    async def _look_up_same(self, described: Description) -> MediaObject:
        """The catalog's word on what the volume has described. HttpError 503 if that is something else by now."""
        known = await look_up(self._context, described.object_id)
        if (known.size, known.etag) != (described.size, described.etag):
            raise HttpError(503, "The object has just changed", "unavailable", {"Retry-After": "1"})
        return known

    def _follower(self, wanted: Wanted) -> Follower:
        context, object_id = self._context, wanted.described.object_id
        watch = FetchWatch(object_id, context.state, context.fetch_events)
        patience = context.settings.fetch.lease + _RESUME_GRACE
        return Follower(context.volume, context.accesses, watch, wanted.described, wanted.span, patience)
