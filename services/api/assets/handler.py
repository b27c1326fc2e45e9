"""GET and HEAD of one object: a hit from the volume, a pending object, a miss to fetch, or a proxied response."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from enum import Enum, auto

import structlog
from sanic import Request

from distributor_node.services.api.assets.decision import (
    AssetRequest,
    Representation,
    is_cacheable,
    live_fetch,
)
from distributor_node.services.api.assets.fetch_start import FetchStarter, look_up
from distributor_node.services.api.assets.pending import PendingRequest, PendingResponder
from distributor_node.services.api.assets.proxy import OutdatedDescription, Proxy
from distributor_node.services.api.assets.response import (
    ACCEL_REQUEST_HEADER,
    AccelRedirect,
    HitResponder,
    ResponseWriter,
    select_span,
)
from distributor_node.services.api.assets.revalidation import Revalidator, Validation
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import NOT_CACHED, HttpError
from distributor_node.services.api.headers import (
    BYPASS,
    HIT,
    MISS,
    PENDING,
    REVALIDATED,
    ResponseHead,
)
from distributor_node.services.api.protocol import came_to_peer_port, send_processing
from distributor_node.shared.adapters.peers import Peers
from distributor_node.shared.adapters.volume import OpenObject
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Conditions
from distributor_node.shared.domain.errors import StateStoreUnavailable, TooManyOpenFiles, VolumeError
from distributor_node.shared.domain.http_caching import CacheControl
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.peers import HOP_AUTH_HEADER, HOP_COPY, HOP_HEADER, HopKind
from distributor_node.shared.domain.space import AdmissionQuestion
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import ADMISSION_REJECTED, PEER_ASKED
from distributor_node.shared.ports.state_store import (
    Failure,
    Fetch,
    FetchPhase,
    ObjectStatus,
)
from distributor_node.shared.runtime.process import process_name
from distributor_node.shared.settings.model import Settings

logger = structlog.get_logger()


_ORIGIN_FAILED = (502, 503)


class Hit(Enum):
    """What came of the attempt to send an object from the volume."""

    SENT = auto()
    MISSING = auto()
    OUTDATED = auto()  # it is there, and must not be sent


class AssetHandler:
    """Entry point of the asset path. One per process."""

    def __init__(self, context: ApiContext) -> None:
        self._volume = context.volume
        self._turns = context.turns
        self._peers = context.peers
        self._hit_responder = HitResponder(
            context.accesses,
            AccelRedirect(context.settings.public_api.accel_redirect_prefix),
            http_caching=context.settings.caching_rules is not None,
        )
        self._starter = FetchStarter(context.state, context.queue, process_name(), self._is_complete)
        proxy = Proxy(context)
        pending = PendingResponder(context, self._hit_responder, proxy, self._starter)
        self._revalidator = None
        if context.settings.caching_rules is not None:
            self._revalidator = Revalidator(context, self._starter)
        self._miss_handler = MissHandler(context, self._hit_responder, self._starter, pending)

    async def handle(self, request: Request, object_id: ObjectId) -> None:
        """Respond to a GET or HEAD of an object. A hit needs nothing but the volume.

        Raises HttpError if the response is an error.
        """
        asset_request, response = _asset_request(request), ResponseWriter(request, self._turns)
        by_proxy = outdated = False
        try:
            hit = await self._try_hit(asset_request, object_id, response)
            if hit is Hit.SENT:
                return
            by_proxy = outdated = hit is Hit.OUTDATED
        except TooManyOpenFiles:
            raise  # 503: a source could not be connected to either
        except VolumeError as error:
            self._volume.report_read_error(object_id, error)
            by_proxy = True
        hop = None if self._peers is None else _header(request, HOP_HEADER)
        if asset_request.only_if_cached:
            if self._peers is not None and hop == HOP_COPY and not asset_request.is_head:
                await self._miss_handler.take_copy(self._peers, object_id, response)
            raise HttpError(504, "The object is not cached", NOT_CACHED)
        if self._peers is not None and hop is not None:
            response.hop = sender_of(self._peers, request, object_id, hop)
            PEER_ASKED.labels(sender=response.hop).inc()
            await send_processing(request)
        try:
            await self._miss_handler.handle(asset_request, object_id, response, by_proxy=by_proxy)
        except HttpError as error:
            if not outdated or error.status not in _ORIGIN_FAILED:
                raise
            raise HttpError(504, "The object is stale, and its origin cannot be asked", "stale") from error

    async def _try_hit(
        self, asset_request: AssetRequest, object_id: ObjectId, response: ResponseWriter
    ) -> Hit:
        """Send the object from the volume if it is there, and current as far as that has to be known."""
        file = self._volume.open_object(object_id)
        if file is None:
            return Hit.MISSING
        with closing(file):
            stale = replace(file.record, object_id=object_id)  # this one knows its path
            if self._revalidator is None or self._revalidator.may_send(
                asset_request, stale, response.request_id
            ):
                await self._hit_responder.respond(asset_request, file, response)
                return Hit.SENT
        # Closed while the origin is asked: what is open here may be replaced.
        validation = await self._revalidator.validate(stale, response.request_id)
        if validation is Validation.OUTDATED:
            return Hit.OUTDATED
        file = self._volume.open_object(object_id)
        if file is None:
            return Hit.MISSING
        with closing(file):
            outcome = HIT
            if validation is Validation.REFRESHED and file.record.validators == stale.validators:
                outcome = REVALIDATED
            elif file.record == stale and not self._revalidator.may_send_on_error(stale):
                return Hit.OUTDATED
            await self._hit_responder.respond(asset_request, file, response, outcome)
        return Hit.SENT

    def _is_complete(self, object_id: ObjectId) -> bool:
        try:
            return self._volume.complete_record(object_id) is not None
        except VolumeError:
            return False

    async def close(self) -> None:
        """Wait for fetch jobs that are being published. Call it after the last request."""
        if self._revalidator is not None:
            await self._revalidator.close()
        await self._starter.close()


def sender_of(peers: Peers, request: Request, object_id: ObjectId, hop: str) -> HopKind:
    """Return who sent a request for this object with HOP_HEADER, whose value is `hop`."""
    auth = _header(request, HOP_AUTH_HEADER)
    return peers.kind_of(object_id, hop, auth, at_peer_port=came_to_peer_port(request))


def _asset_request(request: Request) -> AssetRequest:
    control = CacheControl(_header(request, "cache-control"))
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
        sendfile_type=request.headers.get(ACCEL_REQUEST_HEADER),
        only_if_cached="only-if-cached" in control,
        no_cache="no-cache" in control,
    )


def _header(request: Request, name: str) -> str | None:
    """Return all lines of a header, joined (RFC 9110 section 5.3), or None if it is absent."""
    values = request.headers.getall(name, None)
    return None if values is None else ", ".join(values)


class MissHandler:
    """Responds for objects that are not complete on the volume: follow a fetch, start one, or proxy."""

    def __init__(
        self,
        context: ApiContext,
        hit_responder: HitResponder,
        starter: FetchStarter,
        pending_responder: PendingResponder,
    ) -> None:
        self._context = context
        self._hit_responder = hit_responder
        self._starter = starter
        self._pending_responder = pending_responder

    async def handle(
        self,
        asset_request: AssetRequest,
        object_id: ObjectId,
        response: ResponseWriter,
        *,
        by_proxy: bool,
    ) -> None:
        """Respond for one object. `by_proxy`: what is stored cannot be sent, so it is proxied whatever its state is.

        Evidence beats memory: if a source contradicts the catalog, the catalog is asked once more, and the response is
        begun again. If the sources contradict that too, the object is passed on as a source has it now.
        """
        if not self._context.catalog.can_have(object_id):
            raise HttpError(400, "Malformed object id: this catalog has no such ids", "malformed_id")
        try:
            await self._respond(asset_request, object_id, response, by_proxy=by_proxy)
            return
        except OutdatedDescription as error:
            outdated = error
        if await self._look_up_again(object_id, response, outdated) != outdated.media_object:
            try:
                await self._respond(asset_request, object_id, response, by_proxy=by_proxy)
                return
            except OutdatedDescription as error:
                outdated = error
            await self._look_up_again(object_id, response, outdated)
        await self._pass_on(asset_request, object_id, response, outdated)

    async def take_copy(self, peers: Peers, object_id: ObjectId, response: ResponseWriter) -> None:
        """The home offers an object of which this node is to keep a second copy: have it fetched from there.

        Raises HttpError if the catalog does not have it.
        """
        request = response.request
        if sender_of(peers, request, object_id, HOP_COPY) != "peer" or not self._context.catalog.can_have(
            object_id
        ):
            return
        await send_processing(request)
        media_object = await look_up(self._context, request, object_id)
        size = media_object.size
        if (
            size is None
            or media_object.content_hash is None
            or not peers.is_second_home(object_id, size)
            or not is_cacheable(media_object, self._context.settings.storage.largest_cached_size)
            or self._context.operator_state.current.draining
        ):
            return
        await self._starter.start(media_object, response.request_id, for_peer=True, copy=True)

    async def _look_up_again(
        self, object_id: ObjectId, response: ResponseWriter, outdated: OutdatedDescription
    ) -> MediaObject:
        logger.info(
            "description_outdated", object_id=object_id, reason=str(outdated.__cause__ or outdated)[:500]
        )
        await self._context.catalog.forget(outdated.media_object)
        return await look_up(self._context, response.request, object_id)

    async def _pass_on(
        self,
        asset_request: AssetRequest,
        object_id: ObjectId,
        response: ResponseWriter,
        outdated: OutdatedDescription,
    ) -> None:
        """Proxy an object of which the catalog does not know version or size. With a hash it knows: give up."""
        media_object = await look_up(self._context, response.request, object_id)
        if media_object.content_hash is not None:
            raise outdated.failure from outdated
        size = None if outdated.of_size else media_object.size
        media_object = replace(media_object, size=size, validators=NO_VALIDATORS)
        representation = Representation.from_object(media_object)
        response.set_object_size(size)
        span = select_span(asset_request, representation, MISS)
        if isinstance(span, ResponseHead):
            await response.send_head(span)
            return
        try:
            await self._pending_responder.proxy(
                PendingRequest(response, representation, span, BYPASS, media_object)
            )
        except OutdatedDescription as error:
            raise error.failure from error

    async def _respond(
        self,
        asset_request: AssetRequest,
        object_id: ObjectId,
        response: ResponseWriter,
        *,
        by_proxy: bool,
    ) -> None:
        partial, media_object = None if by_proxy else self._partial_representation(object_id), None
        kept: bool | None = None
        if partial is None:
            # Whatever the state of its fetch is, the object has to be looked up, and unknown ids end here: a flood of
            # them costs the state store nothing.
            media_object = await look_up(self._context, response.request, object_id)
            claimable = None if by_proxy else self._claimable(asset_request, response, media_object)
            if claimable is not None:
                kept = self._is_kept(claimable)
            if claimable is not None and kept:
                await self._start_fetch(asset_request, claimable, media_object)
                return
        status = None if by_proxy else await self._find(object_id)
        fetch = live_fetch(status) if status is not None else None
        draining = self._context.operator_state.current.draining
        if fetch is not None and self._may_depend_on_asker(response, object_id):
            status = fetch = None
        if fetch is not None and (fetch.phase is FetchPhase.FETCHING or not draining):
            await self._respond_pending(asset_request, object_id, response, fetch, media_object)
            return
        if media_object is None:
            media_object = await look_up(self._context, response.request, object_id)
        representation = Representation.from_object(media_object)
        response.set_object_size(representation.size)
        # Of an object that is there in part, a GET would continue the fetch: see `_start_fetch`.
        resumes = partial is not None and status is not None and status.failure is None and not draining
        span = select_span(asset_request, representation, PENDING if resumes else MISS)
        if isinstance(span, ResponseHead):
            await response.send_head(span)
            return
        pending = PendingRequest(response, representation, span, BYPASS, media_object)
        max_size = self._context.settings.storage.largest_cached_size
        if (
            status is None
            or not (self._is_kept(pending) if kept is None else kept)
            or status.failure is not None
            or draining
            or not is_cacheable(media_object, max_size)
        ):
            await self._proxy(pending, status.failure if status is not None else None)
            return
        await self._start_fetch(asset_request, pending, media_object)

    def _claimable(
        self, asset_request: AssetRequest, response: ResponseWriter, media_object: MediaObject
    ) -> PendingRequest | None:
        """Return what to claim without asking for the object's status first: a refused claim tells it as well.

        None: the response depends on the status in another way, or does not need it.
        """
        if response.hop is not None or self._context.operator_state.current.draining:
            return None
        if not is_cacheable(media_object, self._context.settings.storage.largest_cached_size):
            return None
        representation = Representation.from_object(media_object)
        response.set_object_size(representation.size)
        span = select_span(asset_request, representation, MISS)
        if isinstance(span, ResponseHead):
            return None
        return PendingRequest(response, representation, span, BYPASS, media_object)

    def _is_kept(self, pending: PendingRequest) -> bool:
        """Whether this node of the fleet is to keep the object. Without a fleet it keeps all."""
        peers, object_id = self._context.peers, pending.representation.object_id
        if peers is None or pending.response.hop == "peer":
            return True
        size, length = pending.representation.size, pending.span.length
        share = 1.0 if not size or length is None else length / size
        return peers.keeps(object_id, size, 0.0 if pending.response.hop else share)

    def _may_depend_on_asker(self, response: ResponseWriter, object_id: ObjectId) -> bool:
        """Whether the fetch in progress may read from the node that asks for the object.

        Race: while two nodes know different members, each takes the other one for the home of an object, and asks it.
        Both fetches would wait for each other.
        """
        peers = self._context.peers
        return peers is not None and response.hop is not None and not peers.is_home(object_id)

    async def _proxy(self, pending: PendingRequest, failure: Failure | None) -> None:
        """Respond from a source. A success may refute the failure of the object's fetch."""
        verified = await self._pending_responder.proxy(pending, follows_home=True)
        if failure is not None and verified is not None and pending.span.length != 0:
            self._starter.refute(pending.representation.object_id, failure, verified=verified)

    async def _find(self, object_id: ObjectId) -> ObjectStatus | None:
        try:
            return await self._context.state.find(object_id)
        except StateStoreUnavailable as error:
            logger.warning(
                "state_store_unavailable", operation="find", object_id=object_id, reason=str(error)
            )
            return None

    async def _respond_pending(
        self,
        asset_request: AssetRequest,
        object_id: ObjectId,
        response: ResponseWriter,
        fetch: Fetch,
        media_object: MediaObject | None,
    ) -> None:
        """`media_object`: None if it was not looked up, because there was a partial file."""
        representation = self._partial_representation(object_id)
        if representation is not None:
            media_object = None  # what the catalog says may be another version
        else:
            media_object = media_object or await look_up(self._context, response.request, object_id)
            representation = Representation.from_object(media_object)
        response.set_object_size(representation.size)
        span = select_span(asset_request, representation, PENDING)
        if isinstance(span, ResponseHead):
            await response.send_head(span)
            return
        tracing.current_span().link(fetch.trace)
        self._context.accesses.record_request(object_id)
        begun = fetch.phase is FetchPhase.FETCHING
        if begun:
            self._context.fetch_capacity.record_begun(object_id)
        await self._pending_responder.respond(
            PendingRequest(response, representation, span, PENDING, media_object, fetch.source, begun)
        )

    def _partial_representation(self, object_id: ObjectId) -> Representation | None:
        try:
            record = self._context.volume.partial_record(object_id)
        except VolumeError as error:
            self._context.volume.report_read_error(object_id, error)
            return None
        return None if record is None else Representation.from_record(record, complete=False)

    async def _start_fetch(
        self, asset_request: AssetRequest, pending: PendingRequest, media_object: MediaObject
    ) -> None:
        """Start the fetch, or join one that has started, then continue like a pending request."""
        # The catalog look-up may have taken longer than a whole fetch. A claim now would publish a useless job.
        complete = self._open_complete(media_object.object_id)
        if complete is not None:
            with closing(complete):
                try:
                    await self._hit_responder.respond(asset_request, complete, pending.response)
                    return
                except VolumeError as error:
                    self._context.volume.report_read_error(media_object.object_id, error)
            await self._pending_responder.proxy(pending)
            return
        if self._context.copy_offers is not None:
            self._context.copy_offers.note_fetch(media_object.object_id)
        admission = admission_question(self._context.settings, media_object.size)
        # Bytes of an earlier fetch are sent at once, as those of one that is going on. After the claim, the file may be
        # that of the fetch which this request has started.
        resumed = self._partial_representation(media_object.object_id) is not None
        claim, start = await self._starter.start(
            media_object,
            pending.response.request_id,
            admission=admission,
            for_peer=pending.response.hop is not None,
        )
        if claim is not None and not claim.admitted:
            ADMISSION_REJECTED.inc()
            await self._proxy(pending, None)
            return
        if claim is None or (not claim.won and claim.status.failure is not None):
            await self._proxy(pending, claim.status.failure if claim is not None else None)
        elif claim.won:
            outcome = PENDING if resumed else MISS
            await self._pending_responder.respond(replace(pending, outcome=outcome), start.publish_failed)
        elif claim.status.fetch is not None:
            response, object_id = pending.response, media_object.object_id
            await self._respond_pending(asset_request, object_id, response, claim.status.fetch, media_object)
        else:
            await self._pending_responder.respond(replace(pending, outcome=PENDING))

    def _open_complete(self, object_id: ObjectId) -> OpenObject | None:
        try:
            return self._context.volume.open_object(object_id)
        except VolumeError:
            return None


def admission_question(settings: Settings, size: int | None) -> AdmissionQuestion | None:
    """What a claim asks about an object of `size` bytes. None: it is admitted (so are objects of unknown size)."""
    above = settings.admission.above_size
    if above is None or size is None:
        return None
    low_watermark = settings.storage.watermarks.low
    question = AdmissionQuestion(
        size, None if above == "auto" else above, low_watermark, settings.admission.window
    )
    return None if question.settled else question
