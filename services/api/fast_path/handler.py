"""The fast path: parses simple requests, prepares and records their responses. One handler serves all connections."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from time import perf_counter, time
from typing import Any, NamedTuple

import structlog

from distributor_node.services.api.access_log import AccessLog, forwarded_for
from distributor_node.services.api.accesses import AccessCounter
from distributor_node.services.api.assets.decision import AssetRequest, PreconditionResult, Span, select_range
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.fast_path.object_cache import MAX_OPEN_FILES, CachedObject, OpenObjectCache
from distributor_node.services.api.headers import end_of_head
from distributor_node.services.api.request_log import (
    ASSET_ROUTE,
    BufferedHitMetrics,
    ClientOf,
    RequestRecord,
    asset_attributes,
    asset_span,
    is_request_id,
    log_request,
)
from distributor_node.shared.domain.conditionals import ByteRange, Conditions, Unsatisfiable, parse_range
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import TRACE_SPANS
from distributor_node.shared.runtime.process import descriptor_limit

_GET, _HEAD, _VERSION = b"GET /api/v1/assets/", b"HEAD /api/v1/assets/", b" HTTP/1.1"
_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 4096
# RFC 9110 section 5: token, colon, a value of visible ASCII. Sanic handles empty values, other bytes and folded lines.
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[\x21-\x7e][\t\x20-\x7e]*\r\n)+")
_RANGE = re.compile(rb"\r\n[Rr]ange: (bytes=([0-9]{1,15})-([0-9]{0,15}))(?=\r\n)")
_RANGE_MARK = b"ange: bytes="

_CONDITIONS = {
    b"if-match": "if_match",
    b"if-unmodified-since": "if_unmodified_since",
    b"if-none-match": "if_none_match",
    b"if-modified-since": "if_modified_since",
}
_SUPPORTED_FIELDS = {*_CONDITIONS, b"range", b"if-range", b"x-request-id", b"host", b"connection"}
_UNSUPPORTED_FIELDS = {
    b"content-length",
    b"transfer-encoding",
    b"expect",
    b"upgrade",
    b"te",
    b"trailer",
    b"http2-settings",
    b"x-sendfile-type",  # Sanic's path may respond with X-Accel-Redirect
}

PARSE_CACHE_SIZE = 2048
_MAX_CACHED_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Fields:
    """The parsed header fields of a request."""

    conditions: Conditions
    range_header: str | None
    if_range: str | None
    request_id: bytes | None  # None: absent or not valid
    unconditional: bool  # neither conditions nor a range


class ParsedRequest(NamedTuple):
    """A GET or HEAD of one object."""

    is_head: bool
    object_id: bytes  # not validated
    fields: Fields
    range_header: str | None  # may be absent from `fields`, which are cached without it
    bounds: tuple[int, int] | None = None  # both numbers of a simple range, in any order


class RequestParser:
    """Parses heads. Clients repeat their header fields, so parsed ones are cached, a few megabytes at most."""

    def __init__(self, left_to_sanic: Iterable[bytes] = ()) -> None:
        """`left_to_sanic`: names of more header fields that the fast path does not support, in lower case."""
        self._unsupported = _UNSUPPORTED_FIELDS.union(left_to_sanic)
        self._cache: dict[bytes, Fields] = {}

    def parse(self, data: bytes) -> ParsedRequest | None:
        """Return the request if `data` is exactly the head of a simple one, else None."""
        if data.startswith(_GET):
            is_head, start = False, len(_GET)
        elif data.startswith(_HEAD):
            is_head, start = True, len(_HEAD)
        else:
            return None
        line_end = data.find(b"\r\n")
        path_end = line_end - len(_VERSION)
        if path_end <= start or data[path_end:line_end] != _VERSION or not data.endswith(_END):
            return None
        block = data[line_end + 2 : -2]
        range_header = bounds = None
        if _RANGE_MARK in block:
            # Players request another range each time. Without it their fields stay equal and are found in the cache.
            found = _RANGE.search(data, line_end)
            if found is not None:
                block = data[line_end + 2 : found.start() + 2] + data[found.end() + 2 : -2]
                range_header = found[1].decode()
                bounds = (int(found[2]), int(found[3])) if found[3] else None
        fields = self._cache.get(block)
        if fields is None:
            fields = self._parse_fields(block)
            if fields is None:
                return None
        if range_header is not None and fields.range_header is not None:
            return None
        return ParsedRequest(
            is_head, data[start:path_end], fields, range_header or fields.range_header, bounds
        )

    def _parse_fields(self, block: bytes) -> Fields | None:
        fields = parse_fields(block, self._unsupported)
        if fields is not None and fields.request_id is None and len(block) <= _MAX_CACHED_BLOCK:
            if len(self._cache) >= PARSE_CACHE_SIZE:
                self._cache.clear()
            self._cache[block] = fields
        return fields


def parse_fields(
    block: bytes, unsupported: AbstractSet[bytes] = frozenset(_UNSUPPORTED_FIELDS)
) -> Fields | None:
    """Parse the header fields of a head (all lines but the first, each with its CRLF).

    Returns None if there is a field that the fast path does not support.
    """
    if len(block) > _MAX_HEAD_BYTES or _FIELDS.fullmatch(block) is None:
        return None
    found: dict[bytes, str] = {}
    for line in block[:-2].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in unsupported or name in found:
            return None
        if name in _SUPPORTED_FIELDS:
            found[name] = value.lstrip(b" \t").decode("ascii")
    if b"host" not in found or found.pop(b"connection", "keep-alive").lower() != "keep-alive":
        return None
    del found[b"host"]
    offered = found.pop(b"x-request-id", None)
    request_id = offered.encode() if offered is not None and is_request_id(offered) else None
    return Fields(
        Conditions(**{field: found.get(name) for name, field in _CONDITIONS.items()}),
        found.get(b"range"),
        found.get(b"if-range"),
        request_id,
        unconditional=not found,
    )


_ACCESS_COUNT_INTERVAL = 0.5
"""Seconds in which further accesses to one object are not counted. They belong to the same view."""
_ID_BATCH = 128
_ID_DIGITS = 32

logger = structlog.get_logger()


class PreparedResponse(NamedTuple):
    """What to send: the head, then `length` bytes of the object from offset `first`."""

    request: ParsedRequest
    cached: CachedObject
    request_id: bytes
    status: int
    head: bytes
    first: int
    length: int  # 0 for a head alone
    started: float  # perf_counter()
    received: bytes  # the request


class FastPath:
    """Prepares responses from the cache of open objects, and records them."""

    def __init__(
        self,
        objects: OpenObjectCache,
        accesses: AccessCounter,
        *,
        log_hits: bool = False,
        log_aborts: bool = True,
        access_log: AccessLog | None = None,
        client_of: ClientOf | None = None,
        honour_no_cache: bool = False,
    ) -> None:
        """`log_hits`: log each response as an event. `log_aborts`: log those that were aborted.

        `honour_no_cache`: leave requests with Cache-Control to Sanic.
        """
        self.objects = objects
        self.accesses = accesses
        self.hit_metrics = BufferedHitMetrics()
        self._parser = RequestParser((b"cache-control",) if honour_no_cache else ())
        self._log_hits, self._log_aborts = log_hits, log_aborts
        self.access_log = access_log
        self._client_of = client_of
        self.needs_peer = access_log is not None or client_of is not None
        self._head_end = b""
        self._head_end_until = 0.0
        self._ids = b""
        self._next_id = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self, data: bytes, now: float) -> PreparedResponse | None:
        """Return the response to received bytes, or None if Sanic must respond. `now`: monotonic seconds."""
        started = perf_counter()
        request = self._parser.parse(data)
        if request is None:
            return None
        cached = self.objects.get(request.object_id, now)
        if cached is None or (now >= cached.tail_until and not cached.renew_tail(now)):
            return None
        fields, headers, size = request.fields, cached.headers, cached.size
        status, first, length = 200, 0, 0 if request.is_head else size
        head = headers.head if request.is_head else headers.whole
        if fields.conditions is cached.not_modified_for:
            # Clients repeat their conditions, and preconditions come before the range (RFC 9110 section 13.2.2).
            status, head, length = 304, headers.not_modified, 0
        elif request.range_header is not None or not fields.unconditional:
            span = _select_range(request, cached)
            if isinstance(span, tuple):
                first, last = span
                length = last - first + 1
                status, head = 206, headers.for_range(first, last, size)
            elif isinstance(span, Span):
                first, length = span.first, 0 if request.is_head else span.length or 0
                if span.partial:
                    status, head = 206, headers.for_range(first, first + length - 1, size)
            elif span is PreconditionResult.NOT_MODIFIED:
                status, head, length = 304, headers.not_modified, 0
                cached.not_modified_for = fields.conditions
            else:
                return None
        if length:
            # Only responses with bytes lock an object and count as an access, not HEAD and 304.
            if now >= cached.acquired_until:
                acquired = self.objects.acquire(request.object_id, cached)
                if acquired is None:
                    return None
                cached = acquired
            cached.used_at = now
            if now - cached.counted_at >= _ACCESS_COUNT_INTERVAL:
                cached.counted_at = now
                self.accesses.record_request(cached.object_id)
        request_id = fields.request_id or self._new_id()
        if now >= self._head_end_until:
            self._head_end_until = now + 1.0 - time() % 1.0
            self._head_end = end_of_head()
        return PreparedResponse(
            request,
            cached,
            request_id,
            status,
            head + cached.tail + request_id + self._head_end,
            first,
            length,
            started,
            data,
        )

    def record(
        self,
        prepared: PreparedResponse,
        sent: int,
        seconds: float,
        abort_reason: str | None = None,
        peer: str = "",
    ) -> None:
        """Count the response, and log it if it was aborted or hits are logged.

        `sent`: bytes of the body. `seconds`: from the request to the first byte. `peer`: the connection's, if needed.
        """
        self.hit_metrics.add(prepared.request.is_head, prepared.status, sent, seconds)
        if self.access_log is not None:
            self.access_log.add_head(prepared.received, peer, prepared.status, sent, time())
        if self._log_hits or (abort_reason is not None and self._log_aborts):
            record = RequestRecord(
                prepared.request_id.decode(),
                "HEAD" if prepared.request.is_head else "GET",
                ASSET_ROUTE,
                prepared.cached.object_id,
                prepared.started,
                size=prepared.cached.size,
                range_start=prepared.first if prepared.status == 206 else None,
                abort_reason=abort_reason,
            )
            if self._client_of is not None:
                record.client = self._client_of(peer, forwarded_for(prepared.received))
            source = "local" if prepared.length else None
            log_request(record, prepared.status, cache="hit", source=source, sent=sent)

    def _new_id(self) -> bytes:
        """Return a new request id. One system call makes _ID_BATCH of them."""
        start = self._next_id
        if start >= len(self._ids):
            self._ids, start = secrets.token_hex(_ID_BATCH * _ID_DIGITS // 2).encode(), 0
        self._next_id = start + _ID_DIGITS
        return self._ids[start : start + _ID_DIGITS]

    def track(self, task: asyncio.Task[None]) -> None:
        """Make `close` wait for a task that sends a body."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Flush the metrics and close all objects. Call it after the last connection has ended."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hit_metrics.flush()
        self.objects.close()


MAX_SPANS_PER_SECOND = 500
"""Spans of hits that one process records in a second. To make and send one costs 50 µs, more than the hit itself."""

_TRACEPARENT = b"\r\ntraceparent:"


class SpanLimit:
    """Counts spans against a limit for each second. What is refused is counted in the metrics."""

    def __init__(self, per_second: int = MAX_SPANS_PER_SECOND) -> None:
        self._per_second = per_second
        self._second_ends = 0.0
        self._recorded = self._refused = 0

    def admits(self, now: float) -> bool:
        """Whether another span may be recorded at this time, in seconds."""
        if now >= self._second_ends:
            if self._refused:
                TRACE_SPANS.labels(result="over_limit").inc(self._refused)
            self._second_ends, self._recorded, self._refused = now + 1.0, 0, 0
        elif self._recorded >= self._per_second:
            self._refused += 1
            return False
        return True

    def count(self) -> None:
        """Count one span that was recorded."""
        self._recorded += 1


class TracedFastPath(FastPath):
    """Records a span of each response as well. Chosen where tracing is on, so that others pay nothing.

    A request with two traceparents is not of the fast path, since no field is that is given twice.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limit = SpanLimit()

    def record(
        self,
        prepared: PreparedResponse,
        sent: int,
        seconds: float,
        abort_reason: str | None = None,
        peer: str = "",
    ) -> None:
        super().record(prepared, sent, seconds, abort_reason, peer)
        tracer = tracing.installed_tracer()
        if tracer is None or not self._limit.admits(prepared.started):
            return
        method = "HEAD" if prepared.request.is_head else "GET"

        def attributes() -> tracing.Attributes:
            return {
                **asset_attributes(method, prepared.cached.object_id, prepared.request_id.decode()),
                "http.response.status_code": prepared.status,
                "http.response.body.size": sent,
                "distributor.cache": "hit",
                "distributor.data_source": "local" if prepared.length else None,
                "distributor.cut": abort_reason,
            }

        parent, at = "", prepared.received.lower().find(_TRACEPARENT)
        if at >= 0:
            at += len(_TRACEPARENT)
            parent = prepared.received[at : prepared.received.index(b"\r\n", at)].decode().strip()
        span = tracer.record(*asset_span(method), parent, perf_counter() - prepared.started, attributes)
        if span is None:
            return
        self._limit.count()
        if sent and span.exemplar is not None:
            self.hit_metrics.set_exemplar(seconds, span.exemplar)


def _select_range(
    request: ParsedRequest, cached: CachedObject
) -> tuple[int, int] | Span | Unsatisfiable | PreconditionResult:
    """Return the result of `decision.select_range`, or the first and last byte of a range without conditions."""
    fields = request.fields
    if fields.unconditional and not request.is_head:
        bounds = request.bounds
        if bounds is not None and bounds[0] <= bounds[1] < cached.size:
            return bounds
        # The result of `select_range` without conditions.
        found = parse_range(request.range_header, cached.size)
        if isinstance(found, ByteRange):
            return found.first, found.last
        return Span(0, cached.size - 1, cached.size) if found is None else found
    asset_request = AssetRequest(request.is_head, fields.conditions, request.range_header, fields.if_range)
    return select_range(asset_request, cached.representation)


# Construction.

_FD_SHARE = 4


def build_fast_path(context: ApiContext, access_log: AccessLog | None = None) -> FastPath | None:
    """Build the fast path, or return None if it is turned off. Whether it traces is decided here.

    Run `objects.run` in a task, and call `close` after the last connection.
    """
    settings = context.settings
    if not settings.public_api.fast_lane:
        return None
    max_open_files = min(MAX_OPEN_FILES, descriptor_limit() // _FD_SHARE)
    objects = OpenObjectCache(
        context.volume,
        settings.public_api.memory_cache,
        max_open_files,
        http_caching=settings.caching_rules is not None,
        min_idle=settings.evictor.min_idle,
    )
    as_events = settings.log.access == "json"
    kind = FastPath if tracing.installed_tracer() is None else TracedFastPath
    return kind(
        objects,
        context.accesses,
        log_hits=as_events and settings.log.hits,
        log_aborts=as_events,
        access_log=access_log,
        client_of=context.client_addresses.address_of if settings.log.client_address else None,
        honour_no_cache=settings.caching_rules is not None and settings.origin.honour_client_no_cache,
    )
