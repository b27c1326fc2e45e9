"""Proxied responses: bytes from a source to the client, verified while they pass where that is possible."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES, Representation, Span
from distributor_node.services.api.assets.passages import (
    NoCorrectSource,
    Passage,
    Passages,
    is_shareable,
    is_small,
    report_corruption,
)
from distributor_node.services.api.assets.response import ResponseWriter
from distributor_node.services.api.clients import client_of_request
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import (
    RETRY_LATER,
    RETRY_SOON,
    AbortResponse,
    HttpError,
    RangeNotFetchedYet,
    RangeOutOfReach,
)
from distributor_node.services.api.headers import CacheOutcome, content_head
from distributor_node.shared.adapters.sources import SourceResponse
from distributor_node.shared.adapters.sources.client import MAX_SKIP, Expected
from distributor_node.shared.adapters.sources.failover import Chunk, Preference
from distributor_node.shared.adapters.volume import PartialReader
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    VolumeError,
)
from distributor_node.shared.domain.http_caching import (
    CachingRules,
    Freshness,
    freshness_of,
    passed_cache_control,
    why_not_stored,
)
from distributor_node.shared.domain.objects import ContentHash, Hasher, MediaObject
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.observability.metrics import PROXIED_IN_PROGRESS
from distributor_node.shared.waiting import background, wait_event

MANY_OF_ONE_CLIENT = 16
"""Proxied responses in progress from which on a client's others begin more slowly. No browser asks for as many."""
_HASH_CHUNK = 1024 * 1024
_SOURCE_FAILED = "source_failed"


class OutdatedDescription(Exception):
    """The catalog's answer seems to be outdated, and nothing has been sent: the response can be begun again.

    `failure`: the response if a new answer does not help. `of_size`: the size is wrong.
    """

    def __init__(self, media_object: MediaObject, failure: HttpError, *, of_size: bool = False) -> None:
        super().__init__(str(failure))
        self.media_object = media_object
        self.failure = failure
        self.of_size = of_size


@dataclass(slots=True)
class ProxiedResponse:
    """A response that one client is being sent from sources."""

    response: ResponseWriter
    media_object: MediaObject
    representation: Representation
    span: Span
    outcome: CacheOutcome
    preferred: str | None = None  # the source to try first: the one that the object's fetch uses
    contributors: set[str] = field(default_factory=set)  # sources whose bytes have passed
    media_type: str | None = None  # as stated by the first source that responded
    deadline: asyncio.Timeout | None = None  # for the first byte
    avoided: str | None = None  # the source to try last
    sent_hash: Hasher | None = None  # of the bytes sent from sources, if they are to be compared
    caching_rules: CachingRules | None = None  # None: the source is not an HTTP origin
    peer_use: PeerUse = PeerUse.FETCH  # what is asked of peers before the sources
    passed_headers: dict[str, str] = field(default_factory=dict)  # of a response that must not be stored
    client: str = ""  # its address
    out_of_reach: bool = False  # no source sends the range by itself: peers alone are asked

    def on_source_response(self, url: str, response: SourceResponse) -> None:
        """Take the media type and the size from a source's response, if the catalog does not state them."""
        if not self.response.started:
            freshness = None
            if response.encoding is not None:
                self.passed_headers = {"Content-Encoding": response.encoding, "Accept-Ranges": "none"}
            if self.caching_rules is not None and self.representation.content_hash is None:
                freshness = self._pass_caching_headers(response, self.caching_rules)
            self.representation = self.representation.with_validators(response.validators, freshness)
            self.media_type = response.media_type
            if self.span.last is None and response.total is not None:
                self.span = replace(self.span, last=response.total - 1, size=response.total)
                self.response.set_object_size(response.total)

    def _pass_caching_headers(self, response: SourceResponse, rules: CachingRules) -> Freshness | None:
        """Take what the origin says of caching. Returns None if the response must not be stored."""
        headers = response.headers
        if why_not_stored(200, headers) is None:  # of a range, what its 200 would say
            return freshness_of(headers, time.time(), response.delay, rules)
        self.passed_headers["Cache-Control"] = passed_cache_control(headers)
        self.passed_headers |= {name: headers[name] for name in ("Vary", "Age") if name in headers}
        return None

    @property
    def accepted_encodings(self) -> frozenset[str]:
        """Content codings in which the client takes the whole object. None, where its bytes can be verified."""
        if self.representation.content_hash is not None or self.span.size is not None:
            return frozenset()
        return self.response.accepted_encodings

    async def emit(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Send chunks to the client, after the head if it has not been sent."""
        for chunk in chunks:
            if self.sent_hash is not None:
                self.sent_hash.update(chunk)
            if self.response.started:
                await self.response.send(chunk, "external")
            else:
                await self._start(chunk)

    async def finish(self) -> None:
        """End the response. Sends the head of an empty body if nothing has been sent."""
        if not self.response.started:
            await self._start(b"")
        await self.response.finish()

    @property
    def position(self) -> int:
        """The offset in the object of the next byte to send."""
        return self.span.first + self.response.sent

    async def _start(self, chunk: bytes | memoryview) -> None:
        if self.deadline is not None:
            self.deadline.reschedule(None)  # from here on the client sets the pace
        head = content_head(self.representation, self.outcome, self.span, "external", self.media_type)
        head.headers.update(self.passed_headers)
        if "Content-Encoding" in self.passed_headers:
            # The client gets what it would not get with another Accept-Encoding.
            head.headers["Vary"] = "Accept-Encoding"
        await self.response.start(head, chunk)


class Proxy:
    """Responds from sources. One per process: it limits the number of concurrent proxied responses."""

    def __init__(self, context: ApiContext) -> None:
        settings = context.settings.public_api
        self._failover_reader = context.failover_reader
        self.passages = Passages(context.failover_reader, turns=context.turns)
        self._slow_clients, self._addresses = context.slow_clients, context.client_addresses
        self._free_slots = settings.max_proxied
        self._of_client: Counter[str] = Counter()  # responses in progress, those included that wait to begin
        self._first_byte_wait = settings.proxied_first_byte_wait
        self._max_prefix = min(settings.far_range_distance, MAX_SKIP)

    async def respond(self, proxied: ProxiedResponse, *, follows_home: bool = False) -> bool | None:
        """Respond from a source. The first byte must come within `proxied_first_byte_wait`, over all sources.

        Returns whether all bytes of the object were read and verified; None if no source was asked. `follows_home`: no
        fetch of this node brings a range that no source sends by itself, but that of the object's home may.

        Raises HttpError 502, 503 (too many proxied responses) or 504 while nothing has been sent, AbortResponse later.
        """
        with self._slot(proxied, started=False):
            try:
                async with asyncio.timeout(self._first_byte_wait) as proxied.deadline:
                    try:
                        return await self._respond(proxied)
                    except RangeOutOfReach as error:
                        if not follows_home:
                            raise
                        proxied.out_of_reach = True
                        return await self._respond_by_home(proxied, error)
            except TimeoutError as error:
                if proxied.deadline is None or not proxied.deadline.expired():
                    raise
                raise (RangeNotFetchedYet() if proxied.out_of_reach else _too_slow()) from error

    async def _respond(self, proxied: ProxiedResponse) -> bool | None:
        if is_small(proxied.media_object, proxied.span):
            return await self._respond_small(proxied)
        if self._may_share(proxied):
            return await self._respond_shared(proxied)
        return await self._respond_verified(proxied)

    async def _respond_by_home(self, proxied: ProxiedResponse, error: RangeOutOfReach) -> bool:
        """Ask the object's home for as long as it says nothing: its fetch may be on the way to the range.

        Returns False: what comes is not verified. Raises RangeNotFetchedYet if the home says that it takes longer, or
        cannot be asked (any more), so that another node, perhaps this one, is the home of the next request. Raises
        `error` if it cannot bring the range either.
        """
        home = error.home
        if home is None:
            raise error
        while isinstance(home, SourceTooSlow):
            try:
                await self._attempt(proxied, (), None, proxied.position)
            except RangeOutOfReach as again:
                error, home = again, again.home
            else:
                return False
        match home:
            case SourceRefused(status=503, retry_after=str(after)):
                raise RangeNotFetchedYet(
                    {"Retry-After": after} if after.isdecimal() else RETRY_LATER
                ) from error
            case SourceUnreachable() | None:
                raise RangeNotFetchedYet(RETRY_SOON) from error
        raise error

    async def _respond_small(self, proxied: ProxiedResponse) -> bool | None:
        """Respond to a small range from a passage, which others may share."""
        media_object, span = proxied.media_object, proxied.span
        kept = self.passages.find(media_object, span)
        if kept is not None:
            await self._send_passage(proxied, kept)
            return None
        sources = self._within_reach(proxied, span.first, _in_order(proxied))
        if proxied.peer_use is not PeerUse.FETCH:
            return await self._respond_verified(proxied)  # a passage may be read on behalf of the asking peer
        try:
            if self._is_verified(media_object, span):
                passage = await self.passages.read_tail(media_object, sources)
            else:
                passage = await self.passages.read_range(
                    media_object, sources, span, lambda arrived: self._send_arrived(proxied, arrived)
                )
        except AllSourcesFailed as error:
            raise self._failure(error, proxied) from error
        except NoCorrectSource as error:
            raise _no_correct_source() from error
        if passage is None or not passage.covers(span):
            return await self._respond_verified(proxied)
        await self._send_passage(proxied, passage)
        return passage.verified

    def _may_share(self, proxied: ProxiedResponse) -> bool:
        """Whether the range is passed on as it comes, so that other responses can follow the same bytes."""
        if proxied.peer_use is not PeerUse.FETCH:
            return False  # others may follow what is read on behalf of the asking peer
        media_object, span = proxied.media_object, proxied.span
        return is_shareable(media_object, span) and not self._is_verified(media_object, span)

    async def _respond_shared(self, proxied: ProxiedResponse) -> bool | None:
        """Respond to a range of any length: equal and overlapping ones at the same time are read once."""
        media_object, span = proxied.media_object, proxied.span
        kept = self.passages.find(media_object, span)
        if kept is not None:
            await self._send_passage(proxied, kept)
            return None
        sources = self._within_reach(proxied, span.first, _in_order(proxied))
        parts = self.passages.follow(media_object, sources, span, proxied.on_source_response)
        try:
            async with aclosing(parts):
                async for part in parts:
                    await proxied.response.take_turn(len(part))
                    await proxied.emit((part,))
        except AllSourcesFailed as error:
            raise self._failure(error, proxied) from error
        if proxied.response.sent < (span.length or 0):
            return await self._respond_verified(proxied)  # without sharing: there is no room
        await proxied.finish()
        return False

    async def _send_arrived(self, proxied: ProxiedResponse, passage: Passage) -> None:
        """Send what the client does not have yet of a passage that grows."""
        data = passage.bytes_of(proxied.span)[proxied.response.sent :]
        if not data:
            return
        if not proxied.response.started:
            proxied.representation = proxied.representation.with_validators(passage.validators)
            proxied.media_type = passage.media_type
        await proxied.response.take_turn(len(data))
        await proxied.emit((data,))

    async def _send_passage(self, proxied: ProxiedResponse, passage: Passage) -> None:
        await self._send_arrived(proxied, passage)
        await proxied.finish()

    async def _respond_verified(self, proxied: ProxiedResponse) -> bool:
        sources = _in_order(proxied)
        while True:
            buffer = self._verifying_buffer(proxied.media_object, proxied.span)
            first = proxied.position if buffer is None else 0
            if await self._attempt(proxied, sources, buffer, first):
                return buffer is not None
            # Nothing has been sent yet: another source may hold the correct bytes.
            proxied.peer_use = PeerUse.NONE
            if proxied.contributors <= set(sources):  # else a peer may have sent the wrong bytes
                sources = [url for url in sources if url not in proxied.contributors]
            if not sources or not proxied.contributors:
                raise _no_correct_source()
            proxied.contributors = set()

    def _verifying_buffer(self, media_object: MediaObject, span: Span) -> VerifyingBuffer | None:
        """Return a buffer that verifies the object from its first byte, if the span reaches the object's end.

        Inner ranges, and ranges that begin far into the object, are passed on unverified and marked short-lived.
        """
        if media_object.content_hash is None or not self._is_verified(media_object, span):
            return None
        return VerifyingBuffer(media_object.content_hash, media_object.size, first=span.first)

    def _is_verified(self, media_object: MediaObject, span: Span) -> bool:
        return media_object.content_hash is not None and span.reaches_end and span.first <= self._max_prefix

    async def resume(self, proxied: ProxiedResponse, reader: PartialReader) -> None:
        """Complete a response from a source after the fetch of its partial file has ended.

        The bytes on disk, which were sent, are hashed first so that the whole object is verified. Raises AbortResponse
        on failure.
        """
        with self._slot(proxied, started=True):
            buffer, first = await self._resumed_buffer(proxied, reader)
            await self._attempt(proxied, proxied.media_object.sources, buffer, first)

    @property
    def has_free_slot(self) -> bool:
        """Whether another response can be proxied."""
        return self._free_slots > 0

    async def bridge(
        self, proxied: ProxiedResponse, reader: PartialReader, caught_up: asyncio.Event, patience: float
    ) -> bool:
        """Continue a response from a source while its partial file does not grow.

        Returns True when the response is complete, False once `caught_up` is set: the file has the bytes that were sent
        from sources, and the same ones. If the sources fail, the file has `patience` seconds to catch up. Raises
        AbortResponse on failure.
        """
        first = proxied.position
        with self._slot(proxied, started=True):
            buffer, begin = await self._resumed_buffer(proxied, reader)
            proxied.sent_hash = sha256()
            try:
                await self._attempt(proxied, proxied.media_object.sources, buffer, begin, caught_up)
                return True
            except _FileCaughtUp:
                pass
            except AbortResponse as abort:
                if abort.reason != _SOURCE_FAILED or not await wait_event(caught_up, patience):
                    raise
            sent_hash, proxied.sent_hash = proxied.sent_hash, None
            try:
                on_disk = await asyncio.to_thread(_hash_range, reader, first, proxied.position)
            except (OSError, VolumeError) as error:
                raise AbortResponse("object_unreadable") from error
            if on_disk != sent_hash.digest():
                # The file may be the wrong one: it is not verified yet.
                self._report_corruption(proxied, resumed=True)
                raise AbortResponse("verification_failed")
            return False

    async def _resumed_buffer(
        self, proxied: ProxiedResponse, reader: PartialReader
    ) -> tuple[VerifyingBuffer | None, int]:
        """Return a buffer that has hashed the bytes on disk which were sent, and the next byte to read.

        No buffer, if the rest needs no verification. Where bytes in front of those that were sent are not on disk, a
        range that begins far on is passed on as a far range is. Others are read from the object's first byte on, and
        what was sent is compared with that.
        """
        content_hash, position = proxied.media_object.content_hash, proxied.position
        if content_hash is None or not proxied.span.reaches_end:
            return None, position
        state, size, first = reader.state(), proxied.media_object.size, proxied.span.first
        has_gap = state.extents is not None and state.size < position
        if has_gap and first > self._max_prefix:
            return None, position
        try:
            if has_gap:
                sent = await asyncio.to_thread(_hash_range, reader, first, position)
                buffer = VerifyingBuffer(content_hash, size, first=position, sent=(first, sent))
            else:
                buffer = VerifyingBuffer(content_hash, size)
                await asyncio.to_thread(_hash_file, reader, position, buffer)
        except (OSError, VolumeError) as error:
            raise AbortResponse("object_unreadable") from error
        if reader.state().unlinked:
            raise AbortResponse("object_gone")
        return buffer, 0 if has_gap else position

    async def _attempt(
        self,
        proxied: ProxiedResponse,
        sources: Sequence[str],
        buffer: VerifyingBuffer | None,
        first: int,
        caught_up: asyncio.Event | None = None,
    ) -> bool:
        """Send everything. Returns False if the bytes were corrupt and nothing has been sent to the client.

        Raises _FileCaughtUp once `caught_up` is set.
        """
        sources = self._within_reach(proxied, first, sources)
        last = proxied.span.last
        version = proxied.representation.version
        wanted = replace(proxied.media_object, validators=version.validators)
        must_match = version.if_range is not None and proxied.span.partial
        # A peer asks on behalf of many clients.
        has_many = proxied.response.hop != "peer" and self._of_client[proxied.client] > MANY_OF_ONE_CLIENT
        await proxied.response.take_request_turn(proxied.client if has_many else None)
        try:
            async with aclosing(
                self._failover_reader.stream(
                    wanted,
                    first,
                    last,
                    sources,
                    proxied.on_source_response,
                    expected=Expected(
                        must_match=must_match or proxied.response.started,
                        encodings=proxied.accepted_encodings,
                    ),
                    preference=Preference(lambda url: url == proxied.avoided, proxied.peer_use),
                )
            ) as chunks:
                async for chunk in chunks if caught_up is None else _take_until(chunks, caught_up):
                    data = bytes(chunk.data)  # not a view here: no copy
                    await proxied.response.take_turn(len(chunk.data))
                    proxied.contributors.add(chunk.source)
                    await proxied.emit(buffer.feed(data) if buffer else (data,))
        except AllSourcesFailed as error:
            raise self._failure(error, proxied) from error
        if buffer is not None:
            if not buffer.verify():
                self._report_corruption(proxied, resumed=buffer.resumed)
                if proxied.response.started:
                    raise AbortResponse("verification_failed")
                return False
            await proxied.emit(buffer.drain())
        await proxied.finish()
        return True

    def _within_reach(self, proxied: ProxiedResponse, first: int, sources: Sequence[str]) -> Sequence[str]:
        """Return the sources to ask for a range that begins at `first`: none if they are known to ignore it.

        Then peers alone are asked: one may have it by now. If there are none, raises at once.
        """
        media_object = proxied.media_object
        if not self.passages.is_out_of_reach(media_object, first):
            return sources
        if not self._failover_reader.asks_peers(media_object.object_id, proxied.peer_use):
            raise AbortResponse(_SOURCE_FAILED) if proxied.response.started else RangeOutOfReach()
        proxied.out_of_reach = True
        return ()

    def _failure(self, error: AllSourcesFailed, proxied: ProxiedResponse) -> Exception:
        if error.ranges_ignored:
            self.passages.note_ranges_ignored(proxied.media_object)
        return _failure(error, proxied)

    def _report_corruption(self, proxied: ProxiedResponse, *, resumed: bool) -> None:
        object_id = proxied.media_object.object_id
        report_corruption(self._failover_reader, object_id, proxied.contributors, resumed=resumed)

    @contextmanager
    def _slot(self, proxied: ProxiedResponse, *, started: bool) -> Iterator[None]:
        """A place among `max_proxied`. If all are taken, a slow client's response is ended for it."""
        request = proxied.response.request
        stream: Any = request.stream
        client = proxied.client = client_of_request(self._addresses, request)
        if self._free_slots <= 0 and not self._slow_clients.free_place(client):
            if started:
                raise AbortResponse("too_many_proxied")
            raise HttpError(503, "Too many responses are being proxied", "unavailable", RETRY_LATER)
        self._free_slots -= 1
        self._of_client[client] += 1
        PROXIED_IN_PROGRESS.inc()
        try:
            with self._slow_clients.place(stream.protocol, client):
                yield
        finally:
            self._free_slots += 1
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]
            PROXIED_IN_PROGRESS.dec()


def _hash_file(reader: PartialReader, end: int, buffer: VerifyingBuffer) -> None:
    """Hash the first `end` bytes on disk. Raises OSError, or VolumeError if there are fewer."""
    position = 0
    while position < end:
        data = reader.read(position, min(_HASH_CHUNK, end - position))
        if not data:
            raise VolumeError(f"partial file of {reader.object_id}: expected {end} bytes, got {position}")
        buffer.hash_only(data)
        position += len(data)


def _hash_range(reader: PartialReader, first: int, end: int) -> bytes:
    """Return the SHA-256 of bytes `first` to `end` (exclusive) on disk. Raises OSError, or VolumeError."""
    hasher = sha256()
    while first < end:
        data = reader.read(first, min(_HASH_CHUNK, end - first))
        if not data:
            raise VolumeError(f"partial file of {reader.object_id}: expected {end} bytes, got {first}")
        hasher.update(data)
        first += len(data)
    return hasher.digest()


class _FileCaughtUp(Exception):
    """The partial file can continue the response."""


async def _take_until(chunks: AsyncGenerator[Chunk], stop: asyncio.Event) -> AsyncGenerator[Chunk]:
    """Yield the chunks. Raises _FileCaughtUp once `stop` is set, also while a chunk is awaited."""
    async with background(stop.wait(), "file-caught-up") as stopped:
        while not stop.is_set():
            async with background(_next_chunk(chunks), "next-chunk") as arriving:
                await asyncio.wait({arriving, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not arriving.done():
                    break
                chunk = arriving.result()
            if chunk is None:
                return
            yield chunk
    raise _FileCaughtUp


async def _next_chunk(chunks: AsyncGenerator[Chunk]) -> Chunk | None:
    return await anext(chunks, None)


def _in_order(proxied: ProxiedResponse) -> list[str]:
    return sorted(proxied.media_object.sources, key=lambda url: url != proxied.preferred)


def _no_correct_source() -> HttpError:
    return HttpError(502, "Every source sent bytes that do not match the hash", "sources_failed")


def _failure(error: AllSourcesFailed, proxied: ProxiedResponse) -> Exception:
    if proxied.out_of_reach and not proxied.response.started:
        return RangeOutOfReach(error.home)
    failure = _source_failure(error, proxied.response)
    encoded = error.encoding is not None and proxied.media_object.size is not None
    if isinstance(failure, HttpError) and (error.contradicts_catalog or encoded):
        return OutdatedDescription(proxied.media_object, failure, of_size=encoded or error.contradicts_size)
    return failure


def _source_failure(error: AllSourcesFailed, response: ResponseWriter) -> HttpError | AbortResponse:
    if response.started:
        return AbortResponse(_SOURCE_FAILED)
    if error.too_slow:
        return _too_slow()
    if error.encoding is not None:
        return HttpError(
            502,
            f"The origin sends the object only with Content-Encoding {error.encoding}, which the request does not"
            " accept",
            "encoded",
        )
    if error.has_source_in_order:
        return RangeOutOfReach(error.home)
    return HttpError(502, "No source could deliver the object", "sources_failed")


def _too_slow() -> HttpError:
    return HttpError(504, "Every source is too slow", "sources_too_slow")


class VerifyingBuffer:
    """Hashes the bytes of an object as they pass, and holds back the last ones until the hash is verified."""

    def __init__(
        self,
        content_hash: ContentHash,
        size: int | None,
        tail_bytes: int = UNVERIFIED_TAIL_BYTES,
        first: int = 0,
        sent: tuple[int, bytes] | None = None,
    ) -> None:
        """`size`: of the object in bytes. While it is None, any byte may be among the last `tail_bytes`.

        `first`: bytes before this offset are hashed but not returned. `sent`: the client has got bytes from this offset
        to `first` from elsewhere, with this SHA-256.
        """
        self._expected = content_hash.digest
        self._hasher = content_hash.hasher()
        self._size = size
        self._tail_bytes = tail_bytes
        self._first = first
        self._sent_first = first if sent is None else sent[0]
        self._sent_digest = None if sent is None else sent[1]
        self._sent_hasher = sha256()
        self.resumed = sent is not None
        """Part of the bytes came from elsewhere, so a mismatch does not blame the source."""
        self._chunks: deque[memoryview] = deque()
        self._received = self._released = 0

    def hash_only(self, data: bytes) -> None:
        """Hash bytes that the client was sent from elsewhere, and mark the buffer as `resumed`."""
        self.resumed = True
        self._hasher.update(data)
        self._received += len(data)
        self._released += len(data)

    def feed(self, data: bytes) -> list[memoryview]:
        """Hash the next bytes. Returns the bytes that may be sent now."""
        self._hasher.update(data)
        dropped = min(len(data), max(0, self._first - self._received))
        if self._sent_digest is not None:
            self._sent_hasher.update(memoryview(data)[max(0, self._sent_first - self._received) : dropped])
        self._received += len(data)
        self._released += dropped
        if dropped < len(data):
            self._chunks.append(memoryview(data)[dropped:])
        end = (self._received if self._size is None else self._size) - self._tail_bytes
        return self._release(min(end, self._received) - self._released)

    def verify(self) -> bool:
        """Whether all bytes so far have the object's hash. If so, send what `drain` returns."""
        if self._sent_digest not in (None, self._sent_hasher.digest()):
            return False
        return self._hasher.digest() == self._expected

    def drain(self) -> list[memoryview]:
        """Return the bytes held back."""
        return self._release(self._received - self._released)

    def _release(self, length: int) -> list[memoryview]:
        released: list[memoryview] = []
        while length > 0:
            chunk = self._chunks.popleft()
            if len(chunk) > length:
                self._chunks.appendleft(chunk[length:])
                chunk = chunk[:length]
            released.append(chunk)
            length -= len(chunk)
            self._released += len(chunk)
        return released
