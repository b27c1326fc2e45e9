"""From a simple request to its answer: what is shared by all connections of one process."""

from __future__ import annotations

import asyncio
import secrets
from time import perf_counter, time
from typing import NamedTuple

from services.api.accesses import AccessCounter
from services.api.assets.decision import Asked, Refusal, Span, select
from services.api.assets.hot import HotObject, HotObjects
from services.api.assets.ready_heads import end_of_head
from services.api.exchange import RequestRecord, log_request
from services.api.fast_lane.request_heads import HeadReader, SimpleRequest
from services.api.fast_lane.tally import BufferedHitMetrics
from shared.domain.ranges import ByteRange, Unsatisfiable, parse_range

_COUNTED_EVERY = 0.5
"""Seconds in which further accesses of one object are not counted again: the views are the same, the last access
hardly older."""
_IDS_AT_ONCE = 128
_ID_DIGITS = 32


class ReadyAnswer(NamedTuple):
    """What to send: the head, and `length` bytes of the object from `first`; none (`length` 0) for a head alone."""

    request: SimpleRequest
    hot: HotObject
    request_id: bytes
    status: int
    head: bytes
    first: int
    length: int
    started: float


class FastLane:
    """`logs_hits`: whether each answer is an event in the log."""

    def __init__(self, objects: HotObjects, accesses: AccessCounter, *, logs_hits: bool) -> None:
        self.objects = objects
        self.accesses = accesses
        self.hit_metrics = BufferedHitMetrics()
        self._reader = HeadReader()
        self._logs_hits = logs_hits
        self._end = b""
        self._end_until = 0.0
        self._ids = b""
        self._next_id = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def prepare(self, data: bytes, now: float) -> ReadyAnswer | None:
        """The answer to what a connection has received; None: Sanic has to answer. `now` in monotonic seconds."""
        started = perf_counter()
        request = self._reader.read(data)
        if request is None:
            return None
        hot = self.objects.get(request.object_id, now)
        if hot is None:
            return None
        fields, heads, size = request.fields, hot.heads, hot.size
        status, first, length = 200, 0, 0 if request.head else size
        head = heads.head if request.head else heads.whole
        if request.range_header is not None or not fields.plain:
            span = _select(request, hot)
            if isinstance(span, tuple):
                first, last = span
                length = last - first + 1
                status, head = 206, heads.of_range(first, last, size)
            elif isinstance(span, Span):
                first, length = span.first, 0 if request.head else span.length or 0
                if span.partial:
                    status, head = 206, heads.of_range(first, first + length - 1, size)
            elif span is Refusal.NOT_MODIFIED:
                status, head, length = 304, heads.not_modified, 0
            else:
                return None
        if length:
            # Bytes alone hold an object and renew its access; HEAD and 304 leave no trace
            if now >= hot.taken_until:
                taken = self.objects.take(request.object_id, hot)
                if taken is None:
                    return None
                hot = taken
            hot.used_at = now
            if now - hot.counted_at >= _COUNTED_EVERY:
                hot.counted_at = now
                self.accesses.record_request(hot.object_id)
        request_id = fields.request_id or self._new_id()
        if now >= self._end_until:
            self._end_until = now + 1.0 - time() % 1.0
            self._end = end_of_head()
        return ReadyAnswer(
            request, hot, request_id, status, head + request_id + self._end, first, length, started
        )

    def record(self, ready: ReadyAnswer, sent: int, seconds: float, abort_reason: str | None = None) -> None:
        """Count the answer, and log it if that is wanted. `sent` bytes of a body that began after `seconds`."""
        self.hit_metrics.add(ready.request.head, ready.status, sent, seconds)
        if self._logs_hits or abort_reason is not None:
            record = RequestRecord(
                ready.request_id.decode(),
                "HEAD" if ready.request.head else "GET",
                "/api/v1/assets/<object_id>",
                ready.hot.object_id,
                ready.started,
                size=ready.hot.size,
                abort_reason=abort_reason,
            )
            source = "local" if ready.length else None
            log_request(record, ready.status, cache="hit", source=source, sent=sent)

    def _new_id(self) -> bytes:
        """Like `choose_request_id`, with a call of the system for many at once."""
        start = self._next_id
        if start >= len(self._ids):
            self._ids, start = secrets.token_hex(_IDS_AT_ONCE * _ID_DIGITS // 2).encode(), 0
        self._next_id = start + _ID_DIGITS
        return self._ids[start : start + _ID_DIGITS]

    def own(self, task: asyncio.Task[None]) -> None:
        """Keep a task that sends a body, so that `close` waits for it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """After the last connection: hand over what was counted, close all objects."""
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hit_metrics.flush()
        self.objects.close()


def _select(request: SimpleRequest, hot: HotObject) -> tuple[int, int] | Span | Unsatisfiable | Refusal:
    """What `decision.select` says; of a range without conditions its first and last byte."""
    fields = request.fields
    if fields.plain and not request.head:
        bounds = request.bounds
        if bounds is not None and bounds[0] <= bounds[1] < hot.size:
            return bounds
        found = parse_range(request.range_header, hot.size)  # what `select` comes to without conditions
        if isinstance(found, ByteRange):
            return found.first, found.last
        return Span(0, hot.size - 1, hot.size) if found is None else found
    asked = Asked(request.head, fields.conditions, request.range_header, fields.if_range)
    return select(asked, hot.described)
