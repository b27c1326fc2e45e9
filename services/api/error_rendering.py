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

from services.api.errors import RETRY_LATER, HttpError
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
        error = as_http_error(request, exception)
        if error.status == 500:
            logger.error("request_failed", path=request.path[:200], exc_info=exception)
        return render_error(request, error)

    def default(self, request: Request[Any, Any], exception: Exception) -> HTTPResponse:
        return self.response(request, exception)


def render_error(request: Request[Any, Any], error: HttpError) -> HTTPResponse:
    """`{"type": …, "message": …}`, never cached. The server leaves the body out in answer to HEAD."""
    body = {"type": error.kind, "message": error.message} if error.kind else {"message": error.message}
    usual = ASSET if request.path.startswith(ASSETS) else CROSS_ORIGIN
    headers = {**usual, "Cache-Control": CACHE_ERROR, **error.headers}
    return HTTPResponse(json.dumps(body), error.status, headers, "application/json")


def as_http_error(request: Request[Any, Any], exception: BaseException) -> HttpError:
    """What to tell the client. Nothing of an unexpected exception gets out."""
    if isinstance(exception, HttpError):
        return exception
    if isinstance(exception, InvalidInput):
        return HttpError(400, str(exception), "malformed_request")
    if isinstance(exception, CatalogUnavailable | StateStoreUnavailable):
        return _unavailable("Not available at the moment")
    if isinstance(exception, SanicException):
        return _from_sanic_exception(request, exception)
    return _internal()


def _from_sanic_exception(request: Request[Any, Any], exception: SanicException) -> HttpError:
    match exception:
        case MethodNotAllowed():
            allowed = ", ".join(sorted(exception.headers.get("Allow", "GET, HEAD, OPTIONS").split(", ")))
            return HttpError(405, "Method not allowed", "method_not_allowed", {"Allow": allowed})
        case NotFound():
            return HttpError(404, "No such path", "not_found")
        case PayloadTooLarge():
            return _too_large(request)
        case URITooLong():
            return HttpError(414, "Request target too long", "target_too_long")
        case RequestTimeout():
            return HttpError(408, "The request took too long to arrive", "request_timeout")
        case ServiceUnavailable():
            return _unavailable("The answer took too long")
        case ExpectationFailed():
            return HttpError(417, "Expectation not supported", "expectation_failed")
    if 400 <= exception.status_code < 500:
        return HttpError(400, "Malformed request", "malformed_request")
    return _internal()


def _too_large(request: Request[Any, Any]) -> HttpError:
    """The body, or the head, of which Sanic then has read nothing: too long a target, or too many fields."""
    if request.method != UNREADABLE:
        return HttpError(413, "Request body too large", "body_too_large")
    received = getattr(request.stream, "recv_buffer", b"")
    if b"\r\n" not in received[:MAX_HEAD_BYTES]:
        return HttpError(414, "Request target too long", "target_too_long")
    return HttpError(431, "Request header fields too large", "head_too_large")


def _unavailable(message: str) -> HttpError:
    return HttpError(503, message, "unavailable", RETRY_LATER)


def _internal() -> HttpError:
    return HttpError(500, "Unexpected server error", "internal_error")
