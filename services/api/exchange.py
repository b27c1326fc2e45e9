"""One request and its answer, as the log and the metrics tell of it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import structlog
from sanic import Request

from shared.observability.metrics import REQUESTS, method_label

_MAX_REQUEST_ID = 128
_CLIENT_ERROR = 400
_REQUEST_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/+=@-")

logger = structlog.get_logger()


@dataclass(slots=True)
class RequestRecord:
    """Filled in while a request is answered. `started`: monotonic seconds; `sent`: bytes of the body handed to the
    connection (None: the whole body of an answer that was not streamed); `size`: bytes of the whole object, where it is
    known; `abort_reason`: why the answer ended early; `log_hits`: whether a hit is worth a line in the log."""

    request_id: str
    method: str
    path: str = "unmatched"
    object_id: str | None = None
    started: float = field(default_factory=time.perf_counter)
    sent: int | None = None
    size: int | None = None
    abort_reason: str | None = None
    recorded: bool = False
    log_hits: bool = False


def request_record(request: Request) -> RequestRecord:
    """The record of a request; begun here if the request was refused before it got anywhere."""
    record: RequestRecord | None = getattr(request.ctx, "record", None)
    if record is None:
        offered = request.headers.get("x-request-id")
        log_hits = getattr(request.app.ctx, "log_hits", False)
        record = RequestRecord(choose_request_id(offered), request.method, log_hits=log_hits)
        request.ctx.record = record
    return record


def choose_request_id(offered: str | None) -> str:
    """The client's request id if it is short and plain (it ends up in headers and logs), else a new one."""
    return offered if offered and is_request_id(offered) else secrets.token_hex(16)


def is_request_id(offered: str) -> bool:
    """True for a request id that may end up in headers and logs."""
    return 0 < len(offered) <= _MAX_REQUEST_ID and _REQUEST_ID_CHARACTERS.issuperset(offered)


def precreate_counters() -> None:
    """Let the counts of objects handed out stand at 0 before the first: Prometheus sees growth between two looks only,
    and a count that begins at 1 has not grown."""
    for status in ("200", "206", "304"):
        for cache in ("hit", "pending", "miss"):
            REQUESTS.labels(method="GET", status=status, cache=cache)


def count_and_log(
    record: RequestRecord, status: int, *, cache: str | None, source: str | None, sent: int
) -> None:
    """Count and log one answered request. `cache`: hit, pending, miss; `source`: local, external; None: neither."""
    REQUESTS.labels(method=method_label(record.method), status=str(status), cache=cache or "none").inc()
    if cache != "hit" or record.log_hits or record.abort_reason is not None or status >= _CLIENT_ERROR:
        log_request(record, status, cache=cache, source=source, sent=sent)


def log_request(
    record: RequestRecord, status: int, *, cache: str | None, source: str | None, sent: int
) -> None:
    """The event in the log alone."""
    logger.info(
        "request_answered",
        request_id=record.request_id,
        method=record.method[:16],
        path=record.path,
        object_id=record.object_id,
        status=status,
        bytes=sent,
        size=record.size,
        duration_ms=round((time.perf_counter() - record.started) * 1000, 3),
        x_cache=cache,
        source=source,
        cut=record.abort_reason,
    )
