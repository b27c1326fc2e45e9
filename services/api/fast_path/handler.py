"""Prepares and records the responses of the fast path. One handler serves all connections of a process."""

from __future__ import annotations

import asyncio
import secrets
from time import perf_counter, time
from typing import NamedTuple

import structlog

from distributor_node.services.api.access_log import AccessLog, forwarded_for
from distributor_node.services.api.accesses import AccessCounter
from distributor_node.services.api.assets.decision import AssetRequest, PreconditionResult, Span, select_range
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.fast_path.object_cache import MAX_OPEN_FILES, CachedObject, OpenObjectCache
from distributor_node.services.api.fast_path.request_parser import ParsedRequest, RequestParser
from distributor_node.services.api.headers import end_of_head
from distributor_node.services.api.request_log import BufferedHitMetrics, ClientOf, RequestRecord, log_request
from distributor_node.shared.domain.conditionals import ByteRange, Unsatisfiable, parse_range
from distributor_node.shared.runtime.process import descriptor_limit

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
        if request.range_header is not None or not fields.unconditional:
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
                "/api/v1/assets/<object_id>",
                prepared.cached.object_id,
                prepared.started,
                size=prepared.cached.size,
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
    """Build the fast path, or return None if it is turned off.

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
    )
    as_events = settings.log.access == "json"
    return FastPath(
        objects,
        context.accesses,
        log_hits=as_events and settings.log.hits,
        log_aborts=as_events,
        access_log=access_log,
        client_of=context.client_addresses.address_of if settings.log.client_address else None,
        honour_no_cache=settings.caching_rules is not None and settings.origin.honour_client_no_cache,
    )
