"""One record per request for the log and the metrics, timing of phases, and buffered metrics of hits."""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter

import structlog
from sanic import Request

from distributor_node.services.api.headers import CacheResult
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import (
    PHASE,
    REQUESTS,
    SENT_BYTES,
    TIME_TO_FIRST_BYTE,
    add_observations,
    bounds_of,
    method_label,
    set_exemplar,
)

_MAX_REQUEST_ID = 128
_CLIENT_ERROR = 400
_REQUEST_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/+=@-")

logger = structlog.get_logger()

ClientOf = Callable[[str, Sequence[str]], str]
"""A client's address by the connection's peer and the lines of X-Forwarded-For."""


@dataclass(slots=True)
class RequestRecord:
    """Filled in while a request is served."""

    request_id: str
    method: str
    path: str = "unmatched"
    object_id: str | None = None
    started: float = field(default_factory=time.perf_counter)
    sent: int | None = None  # bytes of the body given to the connection; None: all of a body in one piece
    size: int | None = None  # bytes of the whole object, if known
    range_start: int | None = None  # first byte of a 206 within the object
    abort_reason: str | None = None  # why the response ended early
    absent: bool = (
        False  # only what is cached was wanted (only-if-cached), and it is not: no error of the node
    )
    recorded: bool = False
    logged: bool = True  # as an event; otherwise an access log or nothing has it
    log_hits: bool = False  # hits are logged, too
    client: str | None = None  # its address, if addresses are logged
    trace_id: str | None = None  # of its trace, if one is recorded


def request_record(request: Request) -> RequestRecord:
    """Return the record of a request. Creates it if there is none yet."""
    record: RequestRecord | None = getattr(request.ctx, "record", None)
    if record is None:
        offered = request.headers.get("x-request-id")
        context = request.app.ctx
        record = RequestRecord(
            choose_request_id(offered),
            request.method,
            logged=getattr(context, "log_requests", True),
            log_hits=getattr(context, "log_hits", False),
        )
        client_of: ClientOf | None = getattr(context, "client_of", None)
        if client_of is not None:
            peer = request.conn_info.client_ip if request.conn_info else ""
            record.client = client_of(peer, request.headers.getall("x-forwarded-for", ()))
        request.ctx.record = record
    return record


def choose_request_id(offered: str | None) -> str:
    """Return the client's request id if it is valid for headers and logs, else a new one."""
    return offered if offered and is_request_id(offered) else secrets.token_hex(16)


def is_request_id(offered: str) -> bool:
    """Whether a request id is valid for headers and logs: short, and of plain characters."""
    return 0 < len(offered) <= _MAX_REQUEST_ID and _REQUEST_ID_CHARACTERS.issuperset(offered)


# Spans of requests. Names and attributes are those of OpenTelemetry's conventions for HTTP; our own begin with
# `distributor.`.

ASSET_ROUTE = "/api/v1/assets/<object_id>"


def asset_span(method: str) -> tuple[str, tracing.Kind]:
    """Return the name and the kind of the span of a request for an object."""
    return f"{method} {ASSET_ROUTE}", "server"


def asset_attributes(method: str, object_id: str, request_id: str) -> tracing.Attributes:
    """Return what is known of a request for an object before its response."""
    return {
        "http.request.method": method,
        "http.route": ASSET_ROUTE,
        "distributor.object_id": object_id,
        "distributor.request_id": request_id,
    }


def precreate_counters() -> None:
    """Create the counters at 0: `increase()` misses the first sample of a new series."""
    for status in ("200", "206", "304"):
        for cache in ("hit", "pending", "miss"):
            REQUESTS.labels(method="GET", status=status, cache=cache)


def count_and_log(
    record: RequestRecord, status: int, *, cache: str | None, source: str | None, sent: int
) -> None:
    """Count and log one request. `cache`: hit, pending, miss or None. `source`: local, external or None."""
    result = "absent" if record.absent else cache or "none"
    REQUESTS.labels(method=method_label(record.method), status=str(status), cache=result).inc()
    if record.logged and (
        cache != "hit" or record.log_hits or record.abort_reason is not None or status >= _CLIENT_ERROR
    ):
        log_request(record, status, cache=cache, source=source, sent=sent)


def log_request(
    record: RequestRecord, status: int, *, cache: str | None, source: str | None, sent: int
) -> None:
    """Log one request."""
    client = {} if record.client is None else {"client": record.client}
    trace = {} if record.trace_id is None else {"trace_id": record.trace_id}
    logger.info(
        "request_answered",
        request_id=record.request_id,
        method=record.method[:16],
        path=record.path,
        object_id=record.object_id,
        status=status,
        bytes=sent,
        size=record.size,
        range_start=record.range_start,
        duration_ms=round((time.perf_counter() - record.started) * 1000, 3),
        x_cache=cache,
        source=source,
        cut=record.abort_reason,
        **client,
        **trace,
    )


# Timing: first byte and phases.

_histogram_of = lru_cache(PHASE.labels)


def observe_first_byte(request: Request, result: CacheResult) -> None:
    """Observe the time to first byte. Call it right before the first byte is sent."""
    span = tracing.current_span()
    span.event("first_byte")
    seconds = perf_counter() - request_record(request).started
    TIME_TO_FIRST_BYTE.labels(cache=result).observe(seconds, span.exemplar)


@contextmanager
def phase(name: str, kind: tracing.Kind = "internal") -> Iterator[tracing.Span]:
    """Measure the block as one phase and span: catalog, claim or publish. Failures are measured too."""
    started = perf_counter()
    try:
        with tracing.span(name, kind) as span:
            yield span
    finally:
        _histogram_of(name).observe(perf_counter() - started)


# Metrics of the fast path: plain numbers, flushed to Prometheus ten times a second.

_FLUSH_SECONDS = 0.1


class BufferedHitMetrics:
    """Buffers the hit metrics of one process.

    Each update of a Prometheus counter takes a lock, and in multiprocess mode writes to a mapped file.
    """

    def __init__(self) -> None:
        self._requests: dict[tuple[bool, int], int] = {}
        self._sent = 0
        self._first_bytes = TIME_TO_FIRST_BYTE.labels(cache="hit")
        self._bounds = bounds_of(self._first_bytes)
        self._counts = [0] * len(self._bounds)
        self._seconds = 0.0
        self._due = False

    def add(self, head: bool, status: int, sent: int, seconds: float) -> None:
        """Count one response. `sent`: bytes of the body. `seconds`: from the request to the first byte."""
        key = (head, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        if sent:
            self._sent += sent
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self._seconds += seconds
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def set_exemplar(self, seconds: float, exemplar: Mapping[str, str]) -> None:
        """Name the trace of a response whose time to first byte was `seconds`."""
        set_exemplar(self._first_bytes, seconds, exemplar)

    def flush(self) -> None:
        """Update the Prometheus metrics."""
        self._due = False
        requests, self._requests = self._requests, {}
        for (head, status), count in requests.items():
            method = "HEAD" if head else "GET"
            REQUESTS.labels(method=method, status=str(status), cache="hit").inc(count)
        if self._sent:
            SENT_BYTES.labels(source="local").inc(self._sent)
            self._sent = 0
        if any(self._counts):
            add_observations(self._first_bytes, self._counts, self._seconds)
            self._counts, self._seconds = [0] * len(self._bounds), 0.0
