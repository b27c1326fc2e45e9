"""Whatever was raised, as an answer: JSON body and headers, and the status where the error does not bring its own."""

from __future__ import annotations

import json
from typing import Any

import structlog
from sanic import HTTPResponse, Request
from sanic.exceptions import (
    ExpectationFailed,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    SanicException,
    ServiceUnavailable,
    URITooLong,
)
from sanic.handlers import ErrorHandler

from services.api.errors import RETRY_LATER, ErrorAnswer
from services.api.headers import ASSET, CACHE_ERROR, CROSS_ORIGIN
from services.api.request import ASSETS, MAX_HEAD_BYTES
from shared.domain.errors import CatalogUnavailable, InvalidInput, StateStoreUnavailable

UNREADABLE = "NONE"
"""Sanic's method of a request whose head could not be read."""

logger = structlog.get_logger()


class JsonErrorHandler(ErrorHandler):
    """Replaces Sanic's pages, and its habit of printing tracebacks for what clients do."""

    def response(self, request: Request[Any, Any], exception: BaseException) -> HTTPResponse:
        """The answer for anything that was raised."""
        answer = as_error_answer(request, exception)
        if answer.status == 500:
            logger.error("request_failed", path=request.path[:200], exc_info=exception)
        return render_error(request, answer)

    def default(self, request: Request[Any, Any], exception: Exception) -> HTTPResponse:
        return self.response(request, exception)


def render_error(request: Request[Any, Any], answer: ErrorAnswer) -> HTTPResponse:
    """`{"type": …, "message": …}`, never cached. The server leaves the body out in answer to HEAD."""
    body = {"type": answer.kind, "message": answer.message} if answer.kind else {"message": answer.message}
    usual = ASSET if request.path.startswith(ASSETS) else CROSS_ORIGIN
    headers = {**usual, "Cache-Control": CACHE_ERROR, **answer.headers}
    return HTTPResponse(json.dumps(body), answer.status, headers, "application/json")


def as_error_answer(request: Request[Any, Any], exception: BaseException) -> ErrorAnswer:
    """What to tell the client. Nothing of an unexpected exception gets out."""
    if isinstance(exception, ErrorAnswer):
        return exception
    if isinstance(exception, InvalidInput):
        return ErrorAnswer(400, str(exception), "malformed_request")
    if isinstance(exception, CatalogUnavailable | StateStoreUnavailable):
        return _unavailable("Not available at the moment")
    if isinstance(exception, SanicException):
        return _of_sanic(request, exception)
    return _internal()


def _of_sanic(request: Request[Any, Any], exception: SanicException) -> ErrorAnswer:
    match exception:
        case MethodNotAllowed():
            allowed = ", ".join(sorted(exception.headers.get("Allow", "GET, HEAD, OPTIONS").split(", ")))
            return ErrorAnswer(405, "Method not allowed", "method_not_allowed", {"Allow": allowed})
        case NotFound():
            return ErrorAnswer(404, "No such path", "not_found")
        case PayloadTooLarge():
            return _too_large(request)
        case URITooLong():
            return ErrorAnswer(414, "Request target too long", "target_too_long")
        case RequestTimeout():
            return ErrorAnswer(408, "The request took too long to arrive", "request_timeout")
        case ServiceUnavailable():
            return _unavailable("The answer took too long")
        case ExpectationFailed():
            return ErrorAnswer(417, "Expectation not supported", "expectation_failed")
    if 400 <= exception.status_code < 500:
        return ErrorAnswer(400, "Malformed request", "malformed_request")
    return _internal()


def _too_large(request: Request[Any, Any]) -> ErrorAnswer:
    """The body, or the head, of which Sanic then has read nothing: too long a target, or too many fields."""
    if request.method != UNREADABLE:
        return ErrorAnswer(413, "Request body too large", "body_too_large")
    received = getattr(request.stream, "recv_buffer", b"")
    if b"\r\n" not in received[:MAX_HEAD_BYTES]:
        return ErrorAnswer(414, "Request target too long", "target_too_long")
    return ErrorAnswer(431, "Request header fields too large", "head_too_large")


def _unavailable(message: str) -> ErrorAnswer:
    return ErrorAnswer(503, message, "unavailable", RETRY_LATER)


def _internal() -> ErrorAnswer:
    return ErrorAnswer(500, "Unexpected server error", "internal_error")
