"""From a simple request to its answer: what is shared by all connections of one process."""

from __future__ import annotations

import asyncio
import resource
import secrets
from time import perf_counter, time
from typing import NamedTuple

import structlog

from distributor_node.services.api.accesses import AccessCounter
from distributor_node.services.api.assets.decision import AssetRequest, PreconditionResult, Span, select_range
from distributor_node.services.api.assets.headers import end_of_head
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.fast_path.object_cache import MAX_OPEN_FILES, CachedObject, OpenObjectCache
from distributor_node.services.api.fast_path.request_parser import ParsedRequest, RequestParser
from distributor_node.services.api.request_log import BufferedHitMetrics, RequestRecord, log_request
from distributor_node.shared.domain.ranges import ByteRange, Unsatisfiable, parse_range

_ACCESS_COUNT_INTERVAL = 0.5
"""Seconds in which further accesses of one object are not counted again: the views are the same, the last access
hardly older."""
_ID_BATCH = 128
_ID_DIGITS = 32


class PreparedResponse(NamedTuple):
    """What to send: the head, and `length` bytes of the object from `first`; none (`length` 0) for a head alone."""

    request: ParsedRequest
    cached: CachedObject
    request_id: bytes
    status: int
    head: bytes
    first: int
    length: int
    started: float


class FastPath:
    """`log_hits`: whether each answer is an event in the log."""

    def __init__(self, objects: OpenObjectCache, accesses: AccessCounter, *, log_hits: bool) -> None:
        self.objects = objects
        self.accesses = accesses
        self.hit_metrics = BufferedHitMetrics()
        self._parser = RequestParser()
        self._log_hits = log_hits
        self._head_end = b""
        self._head_end_until = 0.0
        self._ids = b""
        self._next_id = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self, data: bytes, now: float) -> PreparedResponse | None:
        """The answer to what a connection has received; None: Sanic has to answer. `now` in monotonic seconds."""
        started = perf_counter()
        request = self._parser.parse(data)
        if request is None:
            return None
        cached = self.objects.get(request.object_id, now)
        if cached is None:
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
            # Bytes alone hold an object and renew its access; HEAD and 304 leave no trace
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
            request, cached, request_id, status, head + request_id + self._head_end, first, length, started
        )

    def record(
        self, prepared: PreparedResponse, sent: int, seconds: float, abort_reason: str | None = None
    ) -> None:
        """Count the answer, and log it if that is wanted. `sent` bytes of a body that began after `seconds`."""
        self.hit_metrics.add(prepared.request.is_head, prepared.status, sent, seconds)
        if self._log_hits or abort_reason is not None:
            record = RequestRecord(
                prepared.request_id.decode(),
                "HEAD" if prepared.request.is_head else "GET",
                "/api/v1/assets/<object_id>",
                prepared.cached.object_id,
                prepared.started,
                size=prepared.cached.size,
                abort_reason=abort_reason,
            )
            source = "local" if prepared.length else None
            log_request(record, prepared.status, cache="hit", source=source, sent=sent)

    def _new_id(self) -> bytes:
        """Like `choose_request_id`, with a call of the system for many at once."""
        start = self._next_id
        if start >= len(self._ids):
            self._ids, start = secrets.token_hex(_ID_BATCH * _ID_DIGITS // 2).encode(), 0
        self._next_id = start + _ID_DIGITS
        return self._ids[start : start + _ID_DIGITS]

    def track(self, task: asyncio.Task[None]) -> None:
        """Keep a task that sends a body, so that `close` waits for it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """After the last connection: hand over what was counted, close all objects."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hit_metrics.flush()
        self.objects.close()


def _select_range(
    request: ParsedRequest, cached: CachedObject
) -> tuple[int, int] | Span | Unsatisfiable | PreconditionResult:
    """What `decision.select_range` says; of a range without conditions its first and last byte."""
    fields = request.fields
    if fields.unconditional and not request.is_head:
        bounds = request.bounds
        if bounds is not None and bounds[0] <= bounds[1] < cached.size:
            return bounds
        # What `select_range` comes to without conditions
        found = parse_range(request.range_header, cached.size)
        if isinstance(found, ByteRange):
            return found.first, found.last
        return Span(0, cached.size - 1, cached.size) if found is None else found
    asset_request = AssetRequest(request.is_head, fields.conditions, request.range_header, fields.if_range)
    return select_range(asset_request, cached.representation)


# Putting the fast path together.

_FD_SHARE = 4


def build_fast_path(context: ApiContext) -> FastPath | None:
    """None where it is turned off. Run its objects' `run`, and `close` it after the last connection."""
    settings = context.settings
    if not settings.public_api.fast_lane:
        return None
    max_open_files = min(MAX_OPEN_FILES, raise_fd_limit() // _FD_SHARE)
    objects = OpenObjectCache(context.volume, settings.public_api.memory_cache, max_open_files)
    return FastPath(objects, context.accesses, log_hits=settings.log.hits)


# How many files and connections this process may have open.

_TARGET_FD_LIMIT = 65_536

logger = structlog.get_logger()


def raise_fd_limit() -> int:
    """Use what the system allows: the usual soft limit of 1024 is for programs that use select. The limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _TARGET_FD_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _TARGET_FD_LIMIT)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return _TARGET_FD_LIMIT
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (OSError, ValueError) as error:
        logger.warning("fd_limit_raise_failed", limit=soft, reason=str(error))
        return soft
    return target
