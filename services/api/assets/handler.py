"""GET and HEAD of one object: the door of the asset path."""

from __future__ import annotations

import os
import socket
from contextlib import closing

import structlog
from sanic import HTTPResponse, Request

from services.api.assets.decision import AssetRequest
from services.api.assets.growing import PendingResponder
from services.api.assets.hand_over import AccelRedirect
from services.api.assets.proxy import Proxy
from services.api.assets.second_views import AdmissionControl
from services.api.assets.sender import HitResponder
from services.api.assets.starter import FetchStarter
from services.api.assets.uncached import MissHandler
from services.api.context import ApiContext
from shared.domain.conditionals import Conditions
from shared.domain.errors import VolumeError
from shared.domain.objects import ObjectId

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
            file = self._volume.open_object(object_id)
        except VolumeError:
            return False
        if file is not None:
            file.close()
        return file is not None

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
