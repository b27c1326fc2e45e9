"""Responses of the asset path: hits sent from the volume, and the writer that every response leaves through."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from time import perf_counter

import structlog
from sanic import HTTPResponse, Request

from distributor_node.services.api.accesses import AccessCounter, AccessRenewal
from distributor_node.services.api.assets.decision import AssetRequest, Representation, Span, select_range
from distributor_node.services.api.errors import AbortResponse
from distributor_node.services.api.headers import (
    CONTENT_LENGTH,
    HIT,
    CacheOutcome,
    DataSource,
    ResponseHead,
    content_head,
    precondition_head,
    requested_disposition,
)
from distributor_node.services.api.protocol import ApiHttp, RawBody, end_chunked_head_response
from distributor_node.services.api.request_log import observe_first_byte, request_record
from distributor_node.shared.adapters.volume import OpenObject
from distributor_node.shared.adapters.volume.layout import object_path
from distributor_node.shared.domain.conditionals import Conditions, parse_content_range
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.peers import HopKind, PeerUse
from distributor_node.shared.observability.logging import OncePerKey
from distributor_node.shared.observability.metrics import SENT_BYTES, sent_bytes
from distributor_node.shared.waiting import TurnBudget

PAGE_SIZE = 4096
PROBE_STRIDE = 64 * 1024
_PROBE_BUFFER = (bytearray(1),)
MAX_PEEK = 4096
_PEEK_BUFFER = memoryview(bytearray(MAX_PEEK))
"""One per process. Only the loop's thread uses it, and never across an await."""
_COLD_READ_POOL = ThreadPoolExecutor(max_workers=16, thread_name_prefix="cold-read")
"""A separate pool, so that cold reads of hits do not queue behind hashing in the default executor. Threads start
lazily."""
_NOWAIT_ERRNOS = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


async def read_chunk(descriptor: int, offset: int, length: int) -> memoryview:
    """Read `length` bytes at `offset`, fewer only at the end of the file. Raises OSError if the disk fails.

    Bytes in the page cache are read at once, the others in a thread.
    """
    buffer = bytearray(length)
    view = memoryview(buffer)
    got = _read_cached(descriptor, view, offset)
    if got < length:
        loop = asyncio.get_running_loop()
        got += await loop.run_in_executor(_COLD_READ_POOL, _read_rest, descriptor, view[got:], offset + got)
    return view[:got]


async def load_into_cache(descriptor: int, offset: int, length: int) -> None:
    """Have these bytes read into the page cache, in a thread. Raises OSError if the disk fails.

    Nothing is copied: one byte in each PROBE_STRIDE is read, and the kernel reads what lies around it.
    """
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(_COLD_READ_POOL, _touch, descriptor, offset, length)


def _touch(descriptor: int, offset: int, length: int) -> None:
    last = offset + length - 1
    for position in (*range(offset, last, PROBE_STRIDE), last):
        os.pread(descriptor, 1, position)


def read_cached(descriptor: int, offset: int, length: int) -> bytes:
    """Read up to `length` bytes at `offset`, as far as they are in the page cache. Raises OSError if the disk fails."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: _read_cached(descriptor, memoryview(buffer), offset)])


def peek_cached(descriptor: int, offset: int, length: int) -> memoryview | None:
    """Return exactly these bytes, at most MAX_PEEK, or None if they are not all in the page cache.

    The next call overwrites them: send or copy them at once.
    """
    view = _PEEK_BUFFER[:length]
    if not length:
        return view
    try:
        return view if os.preadv(descriptor, (view,), offset, os.RWF_NOWAIT) == length else None
    except OSError:
        return None  # not in memory, or the disk fails; the read that follows tells which


def is_cached(
    descriptor: int, offset: int, length: int, *, first_resident: bool = False, stride: int = PROBE_STRIDE
) -> bool:
    """Whether these bytes seem to be in the page cache.

    Probes one byte in each `stride` and the last one. `first_resident`: the first byte is known to be there. The
    kernel reads ahead and evicts in larger steps, so a hole between two probes is rare. It costs one read from disk.
    """
    last = offset + length - 1
    try:
        for position in (
            *range(offset + stride if first_resident else offset, last, stride),
            last,
        ):
            if os.preadv(descriptor, _PROBE_BUFFER, position, os.RWF_NOWAIT) == 0:
                return False
    except OSError:
        return False
    return True


def _read_cached(descriptor: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(descriptor, [view], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _NOWAIT_ERRNOS:
            return 0
        raise


def _read_rest(descriptor: int, view: memoryview, offset: int) -> int:
    got = 0
    while got < len(view):
        count = os.preadv(descriptor, [view[got:]], offset + got)
        if count == 0:
            break
        got += count
    return got


CHUNK_BYTES = 256 * 1024
SENDFILE_ADVANTAGE = 4
"""Bytes by sendfile count so many times less: 256 KiB take 30 to 45 µs, and 80 to 100 to be read and written. The
Python around a piece costs as much again, and a larger piece has it once."""
_BUFFERED_CHUNK = 32 * 1024
"""Bytes left to the transport while the socket is full."""

logger = structlog.get_logger()


def select_span(
    asset_request: AssetRequest, representation: Representation, outcome: CacheOutcome
) -> Span | ResponseHead:
    """Return the bytes to send, or the head of a response without a body: to a HEAD, or 304, 412, 416."""
    span = select_range(asset_request, representation)
    if not isinstance(span, Span):
        return precondition_head(span, representation, outcome)
    return content_head(representation, outcome, span, None) if asset_request.is_head else span


class HitResponder:
    """Responds with complete objects. The caller closes the object's file."""

    def __init__(
        self, accesses: AccessCounter, accel_redirect: AccelRedirect, *, http_caching: bool = False
    ) -> None:
        """`http_caching`: the objects are those of an HTTP origin, and may be stale."""
        self._http_caching = http_caching
        self._accesses = accesses
        self._accel_redirect = accel_redirect
        self._read_errors = OncePerKey()

    async def respond(
        self,
        asset_request: AssetRequest,
        file: OpenObject,
        response: ResponseWriter,
        outcome: CacheOutcome = HIT,
    ) -> None:
        """Respond to one request for a complete object. A HEAD does not count as an access.

        Raises VolumeError if nothing could be read. Nothing has been sent then.
        """
        representation = Representation.of_hit(file.record, http_caching=self._http_caching)
        response.set_object_size(representation.size)
        span = select_span(asset_request, representation, outcome)
        if isinstance(span, ResponseHead):
            await response.send_head(span)
        elif self._accel_redirect.applies(asset_request, span):
            self._accesses.record_request(representation.object_id)
            head = self._accel_redirect.head(representation, span)
            await response.send_redirect(head, span.length or 0)
        else:
            await self.send(file, representation, span, outcome, response)

    async def send(
        self,
        file: OpenObject,
        representation: Representation,
        span: Span,
        outcome: CacheOutcome,
        response: ResponseWriter,
    ) -> None:
        """Send a span of a complete object. `outcome`: what the cache held when the request came.

        Raises VolumeError if nothing could be read. Nothing has been sent then.
        """
        head = content_head(representation, outcome, span, "local")
        length = span.length or 0
        if length > CHUNK_BYTES and not file.lock_shared():
            # The evictor may delete the bytes at any moment, in the middle of the response.
            raise VolumeError(f"{representation.object_id} is being removed")
        if length > CHUNK_BYTES:
            await response.take_turn(CHUNK_BYTES)
        # Read before the head is sent, so that a failing disk still gives a proper error response.
        chunk = await self._read(file, span.first, min(CHUNK_BYTES, length))
        self._accesses.record_request(representation.object_id)
        if len(chunk) == length:
            await response.send_whole(head, chunk)
            return
        await response.start(head, chunk)
        await self._send_rest(response, file, span.first, length)
        await response.finish()

    async def _send_rest(self, response: ResponseWriter, file: OpenObject, first: int, length: int) -> None:
        renewal = AccessRenewal(self._accesses, file.record.object_id)
        while response.sent < length:
            renewal.touch_if_due()
            piece = min(CHUNK_BYTES, length - response.sent)
            try:
                sent = await response.send_file(file.descriptor, first + response.sent, piece)
            except OSError as error:
                raise AbortResponse("object_unreadable") from self._unreadable(file, error)
            if not sent:
                raise AbortResponse("object_unreadable") from self._truncated(file)

    async def _read(self, file: OpenObject, offset: int, length: int) -> memoryview:
        """Read exactly these bytes. Raises VolumeError if the disk fails or the file has become too short."""
        try:
            chunk = await read_chunk(file.descriptor, offset, length)
        except OSError as error:
            raise self._unreadable(file, error) from error
        if len(chunk) < length:
            raise self._truncated(file)
        return chunk

    def _unreadable(self, file: OpenObject, error: OSError) -> VolumeError:
        object_id = file.record.object_id
        if self._read_errors.is_due(object_id):
            logger.error("object_unreadable", object_id=object_id, reason=error.strerror)
        return VolumeError(f"read {object_id}: {error.strerror}")

    def _truncated(self, file: OpenObject) -> VolumeError:
        object_id = file.record.object_id
        if self._read_errors.is_due(object_id):
            logger.error("object_truncated", object_id=object_id, size=file.record.size)
        return VolumeError(f"{object_id} is truncated")


UNSENT_LIMIT = 128 * 1024
"""Bytes of a streamed body that wait in the kernel for a client whose window is full. Its buffer would take megabytes,
read from a source for a client that may never want them. What is on its way to the client does not count, so the limit
slows no client."""


class _AssetResponse(HTTPResponse):
    """A response with the headers that it was given, without a Content-Type if there is none among them."""

    @property
    def processed_headers(self) -> Iterator[tuple[bytes, bytes]]:
        return (
            (name.encode("ascii"), self._sanitize_header_value(str(value)).encode("latin-1"))
            for name, value in self.headers.items()
        )


_ZERO_WEIGHT = re.compile(r"q=0(\.0*)?")


class ResponseWriter:
    """The response to one asset request: without a body, in one piece, or chunk by chunk at the client's pace.

    Call one of `send_head`, `send_redirect`, `send_whole` or `start`, once. Until then every
    failure can become an error response (HttpError). After `start` the only ways out are `finish` and AbortResponse.

    Sanic sends a response in one piece when the handler returns. `start` sends the head with the first chunk.

    The connection enforces how long a client may read nothing, and notices when the client leaves.
    """

    def __init__(self, request: Request, turns: TurnBudget) -> None:
        """`turns`: shared by all responses of the process that are sent chunk by chunk."""
        self._request = request
        self._record = request_record(request)
        self._turns = turns
        self._response: HTTPResponse | None = None
        self._raw: RawBody | None = None  # the rest of the body, if sendfile may send it
        self.hop: HopKind | None = None  # who asks, if another node of the fleet does, or says so
        self.sent = 0  # bytes of the body sent so far by `start` and `send`

    @property
    def started(self) -> bool:
        """Whether there is a response, so that an error response is no longer possible."""
        return self._response is not None

    @property
    def request(self) -> Request:
        return self._request

    @property
    def request_id(self) -> str:
        return self._record.request_id

    @property
    def request_age(self) -> float:
        """Seconds since the request arrived."""
        return perf_counter() - self._record.started

    @property
    def peer_use(self) -> PeerUse:
        """What is asked of peers for this request: one of a peer is not forwarded."""
        return PeerUse.FETCH if self.hop is None else PeerUse.CACHED

    @property
    def accepted_encodings(self) -> frozenset[str]:
        """The content codings that the request names and accepts (RFC 9110 section 12.5.3)."""
        header = ", ".join(self._request.headers.getall("accept-encoding", ()))
        named = (item.partition(";") for item in header.lower().split(","))
        return frozenset(
            name.strip() for name, _, weight in named if not _ZERO_WEIGHT.fullmatch(weight.strip())
        )

    def set_object_size(self, size: int | None) -> None:
        """Note the size of the whole object in bytes for the request log."""
        self._record.size = size

    async def send_head(self, head: ResponseHead) -> None:
        """Send a response that has no body: to a HEAD, or 304, 412, 416.

        Without a known length a GET with 200 would be chunked, and the head says so.
        """
        if CONTENT_LENGTH in head.headers or head.status != HTTPStatus.OK:
            await self._respond(head)
            return
        response = await self._respond(head)
        # Sanic would state a length of 0 by itself. Told to stream, it cannot end the response to a HEAD.
        await response.send(b"", end_stream=False)
        end_chunked_head_response(self._request)

    async def send_redirect(self, head: ResponseHead, length: int) -> None:
        """Send the head of a body that the web server in front adds. Its `length` bytes count as sent."""
        observe_first_byte(self._request, head.result)
        self._record.sent = length
        SENT_BYTES.labels(source="local").inc(length)
        await self._respond(head)

    async def send_whole(self, head: ResponseHead, body: bytes | memoryview) -> None:
        """Send the head and all of the body."""
        observe_first_byte(self._request, head.result)
        SENT_BYTES.labels(source=head.source or "local").inc(len(body))
        await self._respond(head, body)

    async def start(self, head: ResponseHead, chunk: bytes | memoryview) -> None:
        """Send the head and the first chunk. The head states the body's length if it is known."""
        observe_first_byte(self._request, head.result)
        self._limit_unsent(UNSENT_LIMIT)
        await self._write(await self._respond(head), chunk, head.source or "local")
        http = self._request.stream
        self._raw = http.raw_body() if isinstance(http, ApiHttp) else None

    async def take_turn(self, size: int) -> None:
        """Wait for the turn in which the next chunk, of `size` bytes, may be got and sent.

        For a client that takes everything at once nothing else waits, and other requests would starve.
        """
        await self._turns.take(size)

    async def take_request_turn(self, client: str | None) -> None:
        """Wait for the turn in which a source may be asked for the body. `client`: see `TurnBudget.take_request`."""
        await self._turns.take_request(client)

    async def send(self, chunk: bytes | memoryview, source: DataSource) -> None:
        """Send a chunk once the client has taken those before. Call `take_turn` first."""
        if self._response is None:
            raise RuntimeError("send was called before start")
        await self._write(self._response, chunk, source)

    async def send_file(
        self, descriptor: int, offset: int, length: int, *, cached: bool | None = None
    ) -> int:
        """Send up to `length` bytes of a file, the next ones of the body, in a turn of their own. Not all of more than
        CHUNK_BYTES, if they have to be read.

        Returns how many, 0 if the file ends at `offset`. Raises OSError if the disk fails. `cached`: whether they were
        in the page cache just now, if that is known.

        Bytes in the page cache are sent by sendfile, which copies nothing. While the socket is full, a few bytes are
        left to the transport, which tells when there is room again.
        """
        sent, raw = 0, self._raw
        if raw is not None and length > (admitted := raw.admitted):
            # Most of the last bytes, up to the end of a page. Few are as quickly read.
            if admitted > CHUNK_BYTES:
                length = admitted - (offset + admitted) % PAGE_SIZE
            else:
                raw = None
        if raw is not None and raw.is_held_up:
            await raw.wait_until_empty()
            cached = None
        if raw is not None and not (is_cached(descriptor, offset, length) if cached is None else cached):
            raw = None
        if raw is None:
            length = min(length, CHUNK_BYTES - offset % PAGE_SIZE)
        await self._turns.take(length if raw is None else length // SENDFILE_ADVANTAGE)
        if raw is not None:
            sent = raw.send_file(descriptor, offset, length)
            self._count(sent, "local")
            if sent == length:
                return sent
            offset += sent
            length = min(length - sent, _BUFFERED_CHUNK - offset % PAGE_SIZE)
        chunk = await read_chunk(descriptor, offset, length)
        if chunk:
            await self.send(chunk, "local")
        return sent + len(chunk)

    async def finish(self) -> None:
        """End the body."""
        if self._response is not None:
            await self._response.send(end_stream=True)
            self._limit_unsent(0)
            if self._raw is not None:
                self._raw.end()

    def _limit_unsent(self, limit: int) -> None:
        """Limit what the kernel takes before it can send it to `limit` bytes. 0: to what its buffer holds."""
        connection = self._request.transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            with suppress(OSError):  # the client has left
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limit)

    async def _respond(self, head: ResponseHead, body: bytes | memoryview | None = None) -> HTTPResponse:
        query, usual = self._request.query_string, head.headers.get("Content-Disposition")
        wanted = requested_disposition(query, usual) if query and usual is not None else None
        headers = head.headers if wanted is None else {**head.headers, "Content-Disposition": wanted}
        response = _AssetResponse(body, status=head.status, headers=headers)
        if head.status == HTTPStatus.PARTIAL_CONTENT:
            given = parse_content_range(head.headers.get("Content-Range", ""))
            self._record.range_start = None if given is None else given[0].first
        self._response = await self._request.respond(response)
        return response

    async def _write(self, response: HTTPResponse, chunk: bytes | memoryview, source: DataSource) -> None:
        # Counted before: the connection may log the request as soon as it has the last byte.
        self._count(len(chunk), source)
        await response.send(chunk)  # type: ignore[type-var]

    def _count(self, size: int, source: DataSource) -> None:
        self.sent += size
        self._record.sent = self.sent
        sent_bytes(source).inc(size)


# X-Accel-Redirect: hits whose bytes a web server in front sends by itself, from the shared volume.
#
# The response states where the file is and carries the usual headers; nginx adds the body. nginx evaluates ranges by
# itself, and would evaluate preconditions with its own validators. Only requests without preconditions are therefore
# redirected, and ranges only if nginx reads them as we do.

ACCEL_REQUEST_HEADER, ACCEL_RESPONSE_HEADER = "x-sendfile-type", "X-Accel-Redirect"
"""The web server in front adds the first to each request. Without it the client would receive no body."""

_NO_CONDITIONS = Conditions()
# nginx adds these to what it sends. It adds Accept-Ranges to whole objects only, a second time if we send it too.
_BODY_HEADERS = frozenset({"content-length", "content-range"})
_FULL_BODY_HEADERS = _BODY_HEADERS | {"accept-ranges"}


class AccelRedirect:
    """Decides which hits are redirected, and makes their headers."""

    def __init__(self, prefix: str) -> None:
        """`prefix`: nginx's internal location for the volume. Empty: no response is redirected."""
        self._prefix = prefix.rstrip("/")

    def applies(self, asset_request: AssetRequest, span: Span) -> bool:
        """Whether the web server in front may send the bytes of this response."""
        return (
            bool(self._prefix)
            and asset_request.sendfile_type == ACCEL_RESPONSE_HEADER
            and not asset_request.is_head
            and asset_request.conditions == _NO_CONDITIONS
            and asset_request.if_range is None
            and (asset_request.range_header is None or span.partial)
        )

    def head(self, representation: Representation, span: Span) -> ResponseHead:
        """Return the head of a response without its body, with the path of the body's file."""
        head = content_head(representation, HIT, span, "local")
        left_to_nginx = _BODY_HEADERS if span.partial else _FULL_BODY_HEADERS
        headers = {name: value for name, value in head.headers.items() if name.lower() not in left_to_nginx}
        headers[ACCEL_RESPONSE_HEADER] = f"{self._prefix}/{object_path(representation.object_id)}"
        return replace(head, headers=headers)
