"""Responses for objects that are being fetched: streamed from the growing partial file, or continued from a source."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf
from time import monotonic

import structlog

from distributor_node.services.api.accesses import Follower
from distributor_node.services.api.assets.decision import (
    Representation,
    Span,
    is_far,
    is_fetched_ahead,
)
from distributor_node.services.api.assets.fetch_start import FetchStarter, look_up
from distributor_node.services.api.assets.growing_file import (
    FetchPoller,
    FetchRates,
    PartialFileStreamer,
    StreamEnd,
)
from distributor_node.services.api.assets.proxy import OutdatedDescription, ProxiedResponse, Proxy
from distributor_node.services.api.assets.response import (
    HitResponder,
    ResponseWriter,
)
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import AbortResponse, HttpError, RangeNotFetchedYet, RangeOutOfReach
from distributor_node.services.api.headers import BYPASS, CacheOutcome, content_head
from distributor_node.shared.adapters.volume import OpenObject, PartialReader
from distributor_node.shared.domain.conditionals import Comparison
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.domain.space import VIEW_BEGINS
from distributor_node.shared.observability.metrics import STALLED_FETCHES_BRIDGED, VAIN_WAITS
from distributor_node.shared.waiting import background

_RESUME_GRACE = 5.0
"""Seconds after a dead worker's lease has expired in which another worker is expected to resume the fetch."""

_MAX_REPLACED = 10
"""Times that one response begins again with another file, because the one before was replaced. Then it is proxied."""

_MAX_BRIDGES = 5
"""Times that one response continues from a source because its fetch has stalled. Each hashes what was sent."""

_SHORTEST_WAIT = 1.0
"""Seconds that a request waits for the first byte of a fetch, however late it is when it begins to wait."""

_LONGEST_RETRY = 600
"""Seconds after which a client is told to ask again for a range that its fetch reaches later, at most."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A GET that needs bytes which are not on the volume yet."""

    response: ResponseWriter
    representation: Representation
    span: Span
    outcome: CacheOutcome
    media_object: MediaObject | None = None  # None: not looked up yet, the partial file's record was enough
    source: str | None = None  # the source that the fetch uses
    begun: bool = False  # a worker fetches the object; otherwise its job waits
    follower: Follower | None = None  # if the object is large, and fetched no faster than it is watched


class PendingResponder:
    """Streams from the partial file where that is quick, and proxies otherwise."""

    def __init__(
        self, context: ApiContext, hit_responder: HitResponder, proxy: Proxy, starter: FetchStarter
    ) -> None:
        self._context = context
        self._hit_responder = hit_responder
        self._proxy = proxy
        self._starter = starter
        self._rates = FetchRates()

    async def respond(self, pending: PendingRequest, publish_failed: asyncio.Event | None = None) -> None:
        """Respond while the object is being fetched. `publish_failed`: set if its job could not be published."""
        response, representation = pending.response, pending.representation
        if pending.span.length == 0 and representation.is_verified_empty:
            await response.send_whole(
                content_head(representation, pending.outcome, pending.span, "local"), b""
            )
            return
        first = pending.span.first

        def position() -> int:
            return first + response.sent

        viewers, object_id = self._context.viewers, representation.object_id
        needed_from = first if self._is_fetched_ahead(pending) else 0
        with ExitStack() as stack:
            stack.enter_context(viewers.viewing(object_id, position))
            if self._is_windowed(representation):
                follower = stack.enter_context(
                    viewers.requesting(
                        object_id, needed_from, position, begins_view=needed_from < VIEW_BEGINS
                    )
                )
                pending = replace(pending, follower=follower)
            await self._respond(pending, publish_failed or asyncio.Event())

    def _is_windowed(self, representation: Representation) -> bool:
        """Whether the object's fetch may wait for its viewers. Never where none follows the partial file."""
        settings, size = self._context.settings, representation.size
        if not settings.public_api.follow_growing_files or settings.fetch.window is None:
            return False
        hashed = representation.content_hash is not None
        return hashed and size is not None and size > settings.fetch.window_above

    def _is_fetched_ahead(self, pending: PendingRequest) -> bool:
        """Whether the fetch may bring the response's first bytes before those in front of them."""
        settings = self._context.settings
        return (
            settings.fetch.side_streams > 0
            and pending.representation.content_hash is not None
            and is_fetched_ahead(pending.span, settings.public_api.far_range_distance)
        )

    async def _respond(self, pending: PendingRequest, publish_failed: asyncio.Event) -> None:
        settings, response = self._context.settings.public_api, pending.response
        # Counted from the request's arrival: a slow look-up leaves less to wait for.
        arrived_at = monotonic() - response.request_age
        if settings.follow_growing_files:
            await self._stream_from_volume(pending, publish_failed, arrived_at)
        if response.started:
            return
        if pending.follower is not None:
            self._context.viewers.follow(pending.follower, False)
        try:
            await self.proxy(replace(pending, outcome=BYPASS) if publish_failed.is_set() else pending)
        except RangeOutOfReach as error:
            if publish_failed.is_set() or not settings.follow_growing_files:
                raise
            failure = await self._stream_from_volume(pending, publish_failed, arrived_at, in_order=True)
            if not response.started:
                raise (failure or error) from error

    async def _stream_from_volume(
        self,
        pending: PendingRequest,
        publish_failed: asyncio.Event,
        arrived_at: float,
        *,
        in_order: bool = False,
    ) -> HttpError | None:
        """See `_try_streaming`. A disk that fails counts as nothing sent."""
        try:
            return await self._try_streaming(pending, publish_failed, arrived_at, in_order=in_order)
        except VolumeError as error:
            self._context.volume.report_read_error(pending.representation.object_id, error)
            if pending.response.started:
                raise AbortResponse("object_unreadable") from error
            return None

    async def proxy(self, pending: PendingRequest, *, follows_home: bool = False) -> bool | None:
        """Respond from a source. Returns whether all bytes of the object were read and verified.

        None: the bytes were in memory, and no source was asked. `follows_home`: see Proxy.
        """
        return await self._proxy.respond(await self._proxied_response(pending), follows_home=follows_home)

    async def _try_streaming(
        self,
        pending: PendingRequest,
        publish_failed: asyncio.Event,
        arrived_at: float,
        *,
        in_order: bool,
    ) -> HttpError | None:
        """Respond from the volume if it has, or soon will have, the first byte. Otherwise send nothing.

        `in_order`: no source sends the range by itself, so it is waited for as long as for a proxied response. Returns
        the error for a range that the fetch may still reach, later.
        """
        settings, span = self._context.settings.public_api, pending.span
        wait = settings.proxied_first_byte_wait if in_order else settings.first_byte_wait
        streamer = self._streamer(pending, in_order=in_order)
        far = not in_order and is_far(span.first, streamer.on_disk(), settings.far_range_distance)
        if far and streamer.want is None:
            return None
        if pending.follower is not None:
            self._context.viewers.follow(pending.follower)
            if in_order:
                await self._order_whole(pending.representation.object_id)
        deadline = max(arrived_at + wait, monotonic() + min(wait, _SHORTEST_WAIT))
        give_up = self._give_up(pending, publish_failed)
        for _ in range(_MAX_REPLACED):
            found = await streamer.wait_for_first_byte(deadline, give_up, far=far)
            if found is None:
                break
            self._context.fetch_capacity.record_begun(pending.representation.object_id)
            with closing(found):
                if isinstance(found, OpenObject):
                    representation = replace(
                        pending.representation.with_validators(
                            found.record.validators, found.record.freshness
                        ),
                        media_type=found.record.media_type,
                    )
                    size = found.record.size
                    if span.last is None:
                        span = replace(span, last=size - 1, size=size)
                    await self._hit_responder.send(
                        found, representation, span, pending.outcome, pending.response
                    )
                    return None
                end = await self._stream(pending, streamer, found)
            if end is not StreamEnd.FILE_REPLACED:
                return None
            if pending.response.started:
                raise AbortResponse("object_gone")
        waited_in_vain = monotonic() >= deadline and not streamer.has_begun and not pending.begun
        if waited_in_vain and not publish_failed.is_set():
            self._context.fetch_capacity.record_vain(pending.representation.object_id, arrived_at)
        if not in_order or streamer.fetch_ended or publish_failed.is_set():
            return None
        return _not_reached(streamer.seconds_until_first_byte())

    async def _order_whole(self, object_id: ObjectId) -> None:
        """Have the fetch read on, however far behind it its viewers are.

        A part that it left out could not be fetched later without all that comes before it.
        """
        try:
            await self._context.state.order_whole(object_id)
        except StateStoreUnavailable as error:
            logger.debug("whole_not_ordered", object_id=object_id, reason=str(error))

    def _give_up(self, pending: PendingRequest, publish_failed: asyncio.Event) -> Callable[[], bool]:
        """Return the check whether to wait no longer for the fetch to begin."""
        object_id = pending.representation.object_id
        sources = pending.media_object.sources if pending.media_object is not None else ()
        may_wait = False

        def give_up() -> bool:
            nonlocal may_wait
            if publish_failed.is_set():
                return True
            capacity = self._context.fetch_capacity
            # A circuit breaker lets single requests wait: the one that was let through is not asked again.
            reason = None if pending.begun else capacity.vain_reason(object_id, sources, waits=may_wait)
            may_wait = True
            if reason is not None:
                VAIN_WAITS.labels(reason=reason).inc()
            return reason is not None

        return give_up

    async def _stream(
        self, pending: PendingRequest, streamer: PartialFileStreamer, reader: PartialReader
    ) -> StreamEnd:
        """Send from the file, and from a source while its fetch is stalled."""
        bridges = 0
        while True:
            # Of an object of unknown length nothing tells when the file has caught up.
            may_bridge = (
                bridges < _MAX_BRIDGES and self._proxy.has_free_slot and pending.span.last is not None
            )
            max_stall = self._context.settings.public_api.stalled_fetch_wait if may_bridge else inf
            end = await streamer.stream(pending.response, reader, pending.outcome, max_stall)
            if end is StreamEnd.FETCH_ENDED:
                await self._on_fetch_ended(pending, reader)
            if end is not StreamEnd.STALLED:
                return end
            bridges += 1
            if await self._bridge(pending, streamer, reader):
                return StreamEnd.DONE

    async def _bridge(
        self, pending: PendingRequest, streamer: PartialFileStreamer, reader: PartialReader
    ) -> bool:
        """Continue from another source than the stalled one until the file has caught up.

        Returns whether everything was sent.
        """
        object_id = pending.representation.object_id
        logger.info("fetch_stalled_while_streaming", object_id=object_id, sent=pending.response.sent)
        proxied = await self._proxied_response(pending)
        proxied.avoided = streamer.source or pending.source
        proxied.peer_use = PeerUse.NONE  # the fetch may be stalled because a peer's is
        caught_up = asyncio.Event()
        watch = streamer.watch(pending.response, reader, caught_up, proxied.position)
        async with background(watch, "catch-up"):
            complete = await self._proxy.bridge(proxied, reader, caught_up, streamer.stall_timeout)
        STALLED_FETCHES_BRIDGED.labels(end="complete" if complete else "caught_up").inc()
        return complete

    async def _on_fetch_ended(self, pending: PendingRequest, reader: PartialReader) -> None:
        response = pending.response
        logger.warning(
            "fetch_ended_while_streaming", object_id=pending.representation.object_id, sent=response.sent
        )
        if response.started:
            await self._proxy.resume(await self._proxied_response(pending), reader)

    async def _proxied_response(self, pending: PendingRequest) -> ProxiedResponse:
        try:
            media_object = pending.media_object or await self._look_up_matching(pending)
        except (HttpError, OutdatedDescription) as error:
            if pending.response.started:
                raise AbortResponse("source_unknown") from error
            raise
        return ProxiedResponse(
            pending.response,
            media_object,
            pending.representation,
            pending.span,
            pending.outcome,
            pending.source,
            caching_rules=self._context.settings.caching_rules,
            peer_use=pending.response.peer_use,
        )

    async def _look_up_matching(self, pending: PendingRequest) -> MediaObject:
        """Look up the object. Raises OutdatedDescription if the volume described another version."""
        representation = pending.representation
        media_object = await look_up(self._context, pending.response.request, representation.object_id)
        if media_object.version.compare(representation.version) is not Comparison.DIFFERENT:
            return media_object
        # Which of the two is outdated is not known. The catalog can be asked again.
        failure = HttpError(503, "The object has just changed", "unavailable", {"Retry-After": "1"})
        raise OutdatedDescription(media_object, failure)

    async def _start_again(self, pending: PendingRequest) -> None:
        """Publish another job for a fetch that has ended for lack of viewers, just before this one came.

        Whatever fails, the response goes on as with a fetch that is stalled.
        """
        if self._context.operator_state.current.draining:
            return
        peers, representation = self._context.peers, pending.representation
        if peers is not None and not peers.keeps_cold(representation.object_id, representation.size):
            return
        if not self._starter.may_start_again(representation.object_id):
            return
        try:
            media_object = pending.media_object or await self._look_up_matching(pending)
        except (HttpError, OutdatedDescription):
            return
        response = pending.response
        await self._starter.start(media_object, response.request_id, for_peer=response.hop is not None)

    def _streamer(self, pending: PendingRequest, *, in_order: bool) -> PartialFileStreamer:
        context, object_id = self._context, pending.representation.object_id
        settings = context.settings.public_api
        poller = FetchPoller(object_id, context.state, context.fetch_events, self._rates)
        streamer = PartialFileStreamer(
            context.volume,
            context.accesses,
            poller,
            pending.representation,
            pending.span,
            stall_timeout=context.settings.fetch.lease + _RESUME_GRACE,
            far_range_wait=settings.proxied_first_byte_wait if in_order else settings.far_range_wait,
        )
        if not in_order and self._is_fetched_ahead(pending):
            streamer.want = partial(context.viewers.want, object_id)
        if pending.follower is not None:
            streamer.on_near = partial(context.viewers.come_near, pending.follower)
            streamer.near = (context.settings.fetch.window or 0) // 2
        # Also for objects without a window: the lease that this request saw may have been the evictor's, which measures
        # a parked file under it.
        poller.on_parked = partial(self._start_again, pending)
        return streamer


def _not_reached(seconds: float | None) -> HttpError:
    """The error for a range that only the fetch in order brings. `seconds`: until it is expected; None: unknown."""
    if seconds is None:
        return RangeNotFetchedYet()
    return RangeNotFetchedYet({"Retry-After": str(max(1, min(ceil(seconds), _LONGEST_RETRY)))})
