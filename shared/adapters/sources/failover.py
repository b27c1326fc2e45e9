"""Reads one object from the best source. If a source fails, the next one continues at the same byte (failover)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog

from distributor_node.shared.adapters.peers import Hop, Peers, count_hop
from distributor_node.shared.adapters.sources.client import (
    NOTHING_EXPECTED,
    PAUSE,
    Expected,
    SourceAnswer,
    SourceClient,
    SourceResponse,
)
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.conditionals import ByteRange, Version
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    NotStorable,
    SourceClosed,
    SourceEncoded,
    SourceError,
    SourceOutpaced,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
    VersionChanged,
)
from distributor_node.shared.domain.objects import MediaObject, ObjectId, source_name
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.domain.source_order import RateSampler
from distributor_node.shared.observability import tracing
from distributor_node.shared.waiting import cancel_and_wait

OnSource = Callable[[str, SourceResponse], None]
"""Called for each source, with its URL, after its response has begun and before its first byte is yielded."""

_SETTLING = 0.25
"""Seconds of waiting for bytes after a pause until they come as the source sends them. Before, they come from buffers.
One wait shows nothing: a process that has to wait for a CPU waits for bytes that are there, too."""

_OPEN_END = 10**15  # beyond the end of any object; used only if the size is unknown

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of the object."""

    source: str  # URL of the source that sent them
    offset: int  # their position in the object
    data: bytes | memoryview  # a view only with SourceLimits.large_reads


@dataclass(frozen=True, slots=True)
class Preference:
    """Which sources come first."""

    last: Callable[[str], bool] | None = (
        None  # of the URLs that are asked at all, those for which it is true come last
    )
    peers: PeerUse = PeerUse.FETCH  # what is asked of peers before all sources, in a fleet


NO_PREFERENCE = Preference()


class FailoverReader:
    """Reads objects through one client, and records successes and failures of the sources.

    In a fleet, peers are asked before the sources.
    """

    def __init__(
        self,
        client: SourceClient,
        health: SourceHealthRegistry,
        clock: Callable[[], float] = time.monotonic,
        peers: Peers | None = None,
    ) -> None:
        self._client = client
        self._peers = peers
        self.health = self._health = health
        self._clock = clock

    async def stream(
        self,
        media_object: MediaObject,
        first: int,
        last: int | None,
        sources: Sequence[str],
        on_source: OnSource | None = None,
        *,
        expected: Expected = NOTHING_EXPECTED,
        preference: Preference = NO_PREFERENCE,
    ) -> AsyncGenerator[Chunk]:
        """Yield bytes `first` to `last` (inclusive; None: to the end) in order, without gap or overlap.

        Close the generator (`contextlib.aclosing`) to stop early. Sources that sent corrupt bytes for this object are
        not asked. All bytes are of one version: of the object's, or else of the first response. Without a content hash,
        another response continues after the first byte only if a strong validator proves that it is of this version.
        Without a known size none does. `expected`: of the first response. It must match, for example,
        because its bytes follow others, or are a range under a strong tag.

        Raises:
            AllSourcesFailed: no source is left. The bytes yielded before are as the sources sent them.
        """
        span = _Span(media_object.version, first, last, expected)
        ranked = self._health.best_first(sources, media_object.object_id)
        if preference.last is not None:
            ranked = tuple(sorted(ranked, key=preference.last))
        if preference.peers is PeerUse.COPY:
            ranked = ()
        hops: Mapping[str, Hop] = {}
        if self._peers is not None:
            hops = self._hops(self._peers, media_object.object_id, preference.peers)
        rotation, home = _Rotation(ranked, tuple(hops)), None
        while span.needs_request and (url := rotation.next_source()) is not None:
            began_at = span.position
            try:
                others = rotation.others_than(url)
                one = self._from_one(url, span, others, on_source, hops.get(url))
                async with aclosing(one) as chunks:
                    async for chunk in chunks:
                        yield chunk
                self._health.record_success(url)
                return
            except SourceClosed as error:
                # Only after a pause of ours, so this does not happen again and again.
                if not span.can_continue:
                    rotation.record_failure_of(url, error, sent_bytes=True)
                    break
                logger.debug("source_closed", source=source_name(url), at=span.position)
                rotation.repeat(url)
            except SourceOutpaced as error:
                rotation.record_outpaced(url, error, by=self._health.best_rate(rotation.others_than(url))[1])
                logger.info("source_outpaced", source=source_name(url), detail=str(error), at=span.position)
            except SourceError as error:
                rotation.record_failure_of(url, error, sent_bytes=span.position > began_at)
                if url in hops:
                    self._record_failed_hop(hops[url], error, span)
                    home = home if hops[url].only_if_cached else error
                else:
                    self._record_failure(url, error, span)
                if not span.can_continue:
                    break
        if span.needs_request:
            raise AllSourcesFailed(rotation.errors, home, frozenset(hops))

    def _hops(self, peers: Peers, object_id: ObjectId, use: PeerUse) -> Mapping[str, Hop]:
        """Return the requests to peers by URL, without peers that have sent corrupt bytes of the object."""
        corrupted = self._health.has_corrupted
        return {hop.url: hop for hop in peers.hops(object_id, use) if not corrupted(object_id, hop.url)}

    def worth_downloading_from(self, media_object: MediaObject) -> Sequence[str]:
        """Return the sources of the object that have not failed lately, best first; if all have, all of them."""
        ranked = self._health.best_first(media_object.sources, media_object.object_id)
        return [url for url in ranked if not self._health.is_penalised(url)] or ranked

    async def ask(self, url: str, headers: Mapping[str, str]) -> SourceAnswer:
        """Return what one source answers to a GET with these headers, without a body. Raises SourceError."""
        return await self._client.ask(url, headers)

    def asks_peers(self, object_id: ObjectId, use: PeerUse) -> bool:
        """Whether peers are asked for the object before its sources."""
        return self._peers is not None and bool(self._hops(self._peers, object_id, use))

    def is_of_peer(self, url: str) -> bool:
        """Whether the URL is of a peer's copy, and not of a source's."""
        return self._peers is not None and self._peers.has(url)

    def report_corrupt(self, url: str, object_id: ObjectId | None) -> None:
        """Record that the source sent corrupt bytes: it ranks behind the others for a while.

        `object_id`: the source is not asked for this object for a while. None: it is not certain that the corrupt bytes
        came from this source.
        """
        self._health.record_failure(url)
        if object_id is not None:
            self._health.record_corrupted(object_id, url)

    async def _from_one(
        self,
        url: str,
        span: _Span,
        others: Sequence[str],
        on_source: OnSource | None,
        hop: Hop | None = None,
    ) -> AsyncGenerator[Chunk]:
        """Yield from one source, or from a peer by `hop`.

        Raises SourceOutpaced if one of the `others` is expected to be much faster.
        """
        sampler = RateSampler()
        asked_at = self._clock()
        client, more = self._client, None
        if hop is not None and self._peers is not None:
            client, more = self._peers.client, hop.headers
            # A peer may be slow because its source is. A source of unknown rate is no better.
            others = [other for other in others if self._health.rate_of(other) is not None]
        with tracing.span(
            "source_request", "client", current=False, attributes=_attributes(url, span)
        ) as traced:
            async with client.get(url, span.byte_range, span.expected, more) as response:
                traced.set("http.response.status_code", response.status)
                if hop is not None:
                    count_hop("hit" if response.headers.get("X-Cache") == "hit" else "fetched")
                self._health.record_first_byte(url, self._clock() - asked_at)
                if on_source is not None:
                    on_source(url, response)
                span.widen(response)
                began_at, waiting_since = span.position, self._clock()
                # Seconds of waiting in which what comes was sent while it was not read, and says nothing of the rate.
                buffered_for = 0.0
                async for data in response.chunks:
                    waited = self._clock() - waiting_since
                    buffered_for -= waited
                    rate = None if buffered_for > 0.0 else sampler.add(waited, len(data))
                    if span.position == began_at:
                        traced.event("first_byte")
                    span.begin(response)
                    offset, span.position = span.position, span.position + len(data)
                    yield Chunk(url, offset, data)
                    if rate is not None:
                        self._health.record_rate(url, rate)
                        best_other, _ = self._health.best_rate(others)
                        if sampler.is_outpaced(rate, best_other, span.left):
                            raise SourceOutpaced(
                                f"{rate:.0f} bytes a second, {best_other:.0f} expected of another"
                            )
                    returned_at, waiting_since = waiting_since + waited, self._clock()
                    if waiting_since - returned_at >= PAUSE:
                        buffered_for = _SETTLING
                if sampler.mean is not None:
                    self._health.record_rate(url, sampler.mean)

    def _record_failed_hop(self, hop: Hop, error: SourceError, span: _Span) -> None:
        """A peer is to blame for a lost connection and for wrong bytes, not for the failures of its own sources."""
        absent = isinstance(error, SourceRefused)
        count_hop("absent" if absent else "failed")
        if not absent:
            logger.info(
                "peer_failed",
                peer=source_name(hop.url),
                reason=error.reason,
                detail=str(error),
                at=span.position,
            )
        if isinstance(error, SourceUnreachable | SourceWrong) and not isinstance(error, VersionChanged):
            self._health.record_failure(hop.url)

    def _record_failure(self, url: str, error: SourceError, span: _Span) -> None:
        logger.info(
            "source_failed", source=source_name(url), reason=error.reason, detail=str(error), at=span.position
        )
        # A missing object, or a lack of free connections here, does not predict failures with other objects.
        # Nor does another version, or another coding, of an object that has no hash.
        missing = isinstance(error, SourceRefused) and 400 <= error.status < 500
        missing = missing or isinstance(error, NotStorable)
        hashed = span.expected.version.content_hash is not None
        changed = isinstance(error, VersionChanged | SourceEncoded) and not hashed
        if type(error) is not SourceError and not missing and not changed:
            self._health.record_failure(url)


def _attributes(url: str, span: _Span) -> tracing.Attributes:
    return {
        "http.request.method": "GET",
        "server.address": source_name(url),
        "distributor.first_byte": span.position,
    }


class EarlyStream:
    """All of an object, asked for before it is known whether the bytes can be taken. To be closed in any case.

    A task waits for the first chunk, so that the request is on its way while something else is waited for.
    """

    def __init__(
        self,
        reader: FailoverReader,
        media_object: MediaObject,
        sources: Sequence[str],
        preference: Preference,
    ) -> None:
        """`media_object`: with a hash and a known size above 0. The reader of another may refuse a response."""
        self.first_chunk_after: float | None = None  # seconds; None: it has not come
        self.is_closed = False
        self._asked_at = time.monotonic()
        self._begun: list[tuple[str, SourceResponse]] = []  # before there was a reader
        self._on_source: OnSource | None = None
        self._stream = reader.stream(media_object, 0, None, sources, self._on_response, preference=preference)
        self._first = asyncio.create_task(self._read_first(), name="early-request")

    async def _read_first(self) -> Chunk:
        chunk = await anext(self._stream)
        self.first_chunk_after = time.monotonic() - self._asked_at
        return chunk

    def _on_response(self, url: str, response: SourceResponse) -> None:
        if self._on_source is None:
            self._begun.append((url, response))
        else:
            self._on_source(url, response)

    async def chunks(self, on_source: OnSource) -> AsyncGenerator[Chunk]:
        """As FailoverReader.stream. To be read once, and not after `close`."""
        self._on_source = on_source
        for url, response in self._begun:
            on_source(url, response)
        async with aclosing(self._stream) as stream:
            yield await self._first
            async for chunk in stream:
                yield chunk

    async def close(self) -> None:
        """End the request, wherever it is."""
        self.is_closed = True
        if not self._first.done():
            await cancel_and_wait(self._first)
        if not self._first.cancelled():
            self._first.exception()  # retrieved, so that asyncio does not log it: there may have been no reader
        await self._stream.aclose()


class _Span:
    """The part of the object that is still to be read, and the version that all of it must be of."""

    def __init__(self, version: Version, first: int, last: int | None, expected: Expected) -> None:
        self._first_expected = expected  # of the first response; its version is not used
        self._version = version  # its size is None while it is unknown
        self._begun = False  # bytes were yielded
        self.position = first  # of the next byte
        size = version.size
        self._last = last if last is not None or size is None else size - 1

    @property
    def needs_request(self) -> bool:
        """Whether something is missing. That an object without a hash is empty, a source must confirm."""
        if self._version.size == 0 and self._version.content_hash is None:
            return True
        return self._last is None or self.position <= self._last

    @property
    def can_continue(self) -> bool:
        """Whether another response may follow the bytes so far."""
        return not self._begun or (self._version.size is not None and self._version.is_strong)

    @property
    def expected(self) -> Expected:
        if self._begun:
            return Expected(self._version, must_match=True)
        return replace(self._first_expected, version=self._version)

    @property
    def left(self) -> int:
        """Bytes that another source could continue with. 0 if none can, or the size is unknown."""
        return self._last + 1 - self.position if self._last is not None and self.can_continue else 0

    @property
    def byte_range(self) -> ByteRange | None:
        """The range to request. None: the whole object."""
        size = self._version.size
        to_the_end = self._last is None or (size is not None and self._last == size - 1)
        if self.position == 0 and to_the_end:
            return None
        return ByteRange(self.position, _OPEN_END if self._last is None else self._last)

    def widen(self, response: SourceResponse) -> None:
        """Take all bytes of a first response that has more of them than were asked for (`Expected.may_widen`)."""
        if self._begun or not self._first_expected.may_widen or response.length is None:
            return
        self.position = min(self.position, response.first)
        if self._last is not None:
            self._last = max(self._last, response.first + response.length - 1)

    def begin(self, response: SourceResponse) -> None:
        """Note that bytes arrive. The first response decides what is not known of version and size."""
        if self._begun:
            return
        self._begun = True
        if self._version.content_hash is None:
            self._version = replace(self._version, validators=response.validators)
        if self._version.size is None and response.total is not None:
            self._version = replace(self._version, size=response.total)
            end = response.total - 1
            self._last = end if self._last is None else min(self._last, end)


class _Rotation:
    """Gives each source one turn. A source that may recover gets a second one, after all others have failed."""

    def __init__(self, urls: Sequence[str], peers: Sequence[str] = ()) -> None:
        """`peers`: have one turn, before the others, and do not count among the errors."""
        self._peers = frozenset(peers)
        self._waiting = deque((url, 1) for url in (*peers, *urls))
        self._round = 0
        self.errors: dict[str, SourceError] = {}

    def next_source(self) -> str | None:
        if not self._waiting:
            return None
        url, self._round = self._waiting.popleft()
        return url

    def others_than(self, url: str) -> Sequence[str]:
        """Return the sources that can continue in place of this one. In the second round none does."""
        return [other for other, _ in self._waiting if other != url] if self._round == 1 else []

    def repeat(self, url: str) -> None:
        """The source has its turn once more."""
        self._waiting.appendleft((url, self._round))

    def record_outpaced(self, url: str, error: SourceError, by: str | None) -> None:
        """The source gets a second turn if the others fail. `by`: the next one to ask."""
        if url in self._peers:
            return
        self.errors[url] = error
        self._waiting = deque(sorted(self._waiting, key=lambda turn: turn[0] != by))
        self._waiting.append((url, 2))

    def record_failure_of(self, url: str, error: SourceError, *, sent_bytes: bool) -> None:
        if url in self._peers:
            return
        self.errors[url] = error
        if self._round == 1 and _is_worth_retrying(error, sent_bytes=sent_bytes):
            self._waiting.append((url, 2))


def _is_worth_retrying(error: SourceError, *, sent_bytes: bool) -> bool:
    """Whether a source gets a second turn.

    Yes, if it had sent bytes, refused the connection, or responded 5xx. No, if it timed out before its first byte: that
    would take the same time again.
    """
    if isinstance(error, SourceTooSlow):
        return sent_bytes
    if isinstance(error, SourceRefused):
        return error.status >= 500
    if isinstance(error, SourceUnreachable):
        return not error.timed_out
    return not isinstance(error, SourceWrong | NotStorable)
