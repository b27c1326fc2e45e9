"""The Sanic application: routes by raw path, one log record per request, JSON error responses."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from importlib.resources import files
from itertools import count
from typing import Any, Protocol

import structlog
from sanic import HTTPResponse, Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.config import Config
from sanic.exceptions import (
    BadURL,
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
from sanic.http import Http, Stage
from sanic.http.constants import HTTP
from sanic.models.handler_types import RouteHandler
from sanic.router import Router
from sanic_routing.route import Route

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import NOT_CACHED, RETRY_LATER, AbortResponse, HttpError
from distributor_node.services.api.headers import ASSET, CACHE_ERROR, CROSS_ORIGIN, preflight_headers
from distributor_node.services.api.protocol import ApiHttp, came_to_peer_port
from distributor_node.services.api.request_log import (
    ASSET_ROUTE,
    asset_attributes,
    asset_span,
    precreate_counters,
    request_record,
)
from distributor_node.services.api.status import SquidStatusPoller, StatusReporter, UsageReader
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    InvalidInput,
    StateStoreUnavailable,
    TooManyOpenFiles,
)
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.peers import HOP_HEADER
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import ABORTED_RESPONSES, REQUESTS_IN_PROGRESS
from distributor_node.shared.settings.model import PublicApi
from distributor_node.shared.waiting import TurnBudget

MAX_BODY_BYTES = 64 * 1024
"""Limit for request bodies. The public API reads and ignores them."""
_CACHE = "/api/v1/cache/"

_numbers = count(1)
logger = structlog.get_logger()


class RawPathRouter(Router):
    """Finds routes by the raw path. One trailing slash makes no difference.

    Every path below /api/v1/assets/ goes to the asset handler, every path below the operator's /api/v1/cache/ to the
    handler of one cached object.
    """

    def get(  # type: ignore[override]
        self, path: str, method: str, host: str | None
    ) -> tuple[Route, RouteHandler, dict[str, Any]]:
        """Return the route, its handler and the handler's arguments. Raises NotFound or MethodNotAllowed."""
        prefix = ASSETS if path.startswith(ASSETS) else _CACHE if path.startswith(_CACHE) else ""
        rest = path[len(prefix) :].removesuffix("/")
        group = self._by_path().get(f"{prefix}<object_id>" if prefix else rest or "/")
        if group is None:
            raise NotFound("")
        route = group.get(method)
        if route is None:
            raise MethodNotAllowed("", method, tuple(group))
        return route, route.handler, {"object_id": rest} if prefix else {}

    def _by_path(self) -> dict[str, dict[str, Route]]:
        known: dict[str, dict[str, Route]] | None = getattr(self.ctx, "by_path", None)
        if known is None or not self.finalized:
            known = {}
            for route in self.routes:
                known.setdefault(public_path(route), {}).update(dict.fromkeys(route.methods, route))
            self.ctx.by_path = known
        return known


def public_path(route: Route) -> str:
    """Return the path as it was registered. Sanic adds the types of its arguments."""
    return f"/{route.path}".replace(":str>", ">")


def _was_sent(request: Request) -> bool:
    """Whether the whole body was sent. A client may close the connection before the handler has ended."""
    response = request.stream.response if isinstance(request.stream, ApiHttp) else None
    length = "" if response is None else response.headers.get("Content-Length", "")
    return length != "" and str(request_record(request).sent) == length


class ApiApplication(Sanic):  # type: ignore[type-arg]
    """Sanic with one place where each request is counted, logged and ended."""

    def _determine_error_format(self, handler: Any) -> str:
        """Sanic parses the source of each handler for it. JsonErrorHandler renders all errors."""
        return "json"

    async def handle_request(self, request: Request) -> None:
        record = request_record(request)
        structlog.contextvars.bind_contextvars(request_id=record.request_id)
        REQUESTS_IN_PROGRESS.inc()
        try:
            malformed = validate_head(request)
            if malformed is None and came_to_peer_port(request) and not _is_of_peer(request):
                await self.handle_exception(
                    request, HttpError(403, "This port is for the other nodes of the fleet", "peers_only")
                )
            elif malformed is not None:
                if isinstance(request.stream, ApiHttp):
                    request.stream.keep_alive = False  # the start of the next request is unknown
                await self.handle_exception(request, malformed)
            else:
                await super().handle_request(request)
        except asyncio.CancelledError:
            lost = request.conn_info is not None and request.conn_info.lost
            if record.abort_reason is None and lost and not _was_sent(request):
                record.abort_reason = "client_disconnected"
                ABORTED_RESPONSES.labels(reason="client_disconnected").inc()
            raise
        finally:
            REQUESTS_IN_PROGRESS.dec()
            # Without a response the request was cancelled, and the connection's error response is recorded instead.
            if isinstance(request.stream, ApiHttp) and request.stream.response is not None:
                request.stream.record()

    async def handle_exception(
        self, request: Request, exception: BaseException, run_middleware: bool = True
    ) -> None:
        """Send an error response, or abort the connection if a response has started."""
        http = request.stream
        if isinstance(http, ApiHttp) and http.stage is not Stage.HANDLER:
            reason = exception.reason if isinstance(exception, AbortResponse) else "unexpected_error"
            if not isinstance(exception, AbortResponse) and http.stage is not Stage.FAILED:
                logger.error("response_failed", exc_info=exception)
            http.abort_response(reason)
            return
        await super().handle_exception(request, exception, run_middleware=False)


def make_application(
    public_api: PublicApi, name: str = "distributor", turns: TurnBudget | None = None
) -> ApiApplication:
    """Make an application without routes. Several can run in one process. End it with `unregister_application`.

    `turns`: of the process, if it has other work that is to share them.
    """
    precreate_counters()
    config = Config(env_prefix=None)  # ignore SANIC_… in the environment
    config.update(
        ACCESS_LOG=False,
        AUTO_EXTEND=False,
        GRACEFUL_TCP_CLOSE_TIMEOUT=public_api.send_stall_limit,
        KEEP_ALIVE_TIMEOUT=public_api.keep_alive_timeout,
        LOG_EXTRA=False,
        MOTD=False,
        REQUEST_MAX_HEADER_SIZE=MAX_HEAD_BYTES,
        REQUEST_MAX_SIZE=MAX_BODY_BYTES,
        REQUEST_TIMEOUT=public_api.request_timeout,
        RESPONSE_TIMEOUT=public_api.send_stall_limit,
    )
    application = ApiApplication(
        f"{name}-{next(_numbers)}",
        config=config,
        router=RawPathRouter(),
        error_handler=JsonErrorHandler(),
        request_class=ApiRequest,
        configure_logging=False,
    )
    application.ctx.turns = turns or TurnBudget()
    # Tells Sanic that only HTTP/1.1 is served. Otherwise every response carries an empty Alt-Svc.
    application.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    return application


def prepare_start(application: ApiApplication) -> None:
    """Prepare Sanic for one more application in this process. Call it right before the application is started."""
    # At the first start Sanic rewrites its own classes ("touchup"). It cannot rewrite them a second time.
    application.config.TOUCHUP = not getattr(Http, "__touched__", False)


def unregister_application(application: ApiApplication) -> None:
    """Remove the application from Sanic's registry, which would keep it for ever."""
    Sanic.unregister_app(application)


# Requests: the raw target, never normalised.

ASSETS = "/api/v1/assets/"
_PROBED = "/api/v1/status"
MAX_HEAD_BYTES = 16_384
"""Limit for the request head, Sanic's own maximum."""

_ABSOLUTE_FORM = re.compile(rb"[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]*")
# RFC 9112 sections 2.2 and 5: no control characters, no bare CR or LF, no white space in or around a field's name
# (which would hide a Content-Length from one of two servers in a row).
_FORBIDDEN_IN_HEAD = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n)|\n[^\r\n:]*[ \t][^\r\n:]*:|\n:"
)


class ApiRequest(Request):
    """A Sanic request that is routed by its raw path: no decoding, no merged slashes, no error for odd targets."""

    __slots__ = ("raw_path",)

    def __init__(self, url_bytes: bytes, *arguments: Any, **named: Any) -> None:
        try:
            super().__init__(url_bytes, *arguments, **named)
        except BadURL:
            # Routing rejects the raw path. Sanic itself would fail again while it renders its error response.
            super().__init__(b"/", *arguments, **named)
            self.raw_url = url_bytes
        self.raw_path = _path_of(url_bytes)

    @property
    def path(self) -> str:
        """The percent-encoded path without query. Absolute form is accepted (RFC 9112 section 3.2.2)."""
        return self.raw_path


def _path_of(target: bytes) -> str:
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE_FORM.match(target)
        target = (target[absolute.end() :] or b"/") if absolute else target
    return target.split(b"?", 1)[0].decode("latin-1")


def parse_object_id(raw: str, query: str = "") -> ObjectId:
    """Return the object id in a path, percent-decoded exactly once. Raises HttpError 400 if it is malformed.

    `query`: the part of it that belongs to the id.
    """
    try:
        return ObjectId.parse_path(raw, query)
    except InvalidInput as error:
        raise HttpError(400, "Malformed object id", "malformed_id") from error


def validate_head(request: Request) -> HttpError | None:
    """Return the error for a head that HTTP forbids and Sanic accepts, or None if the head is valid."""
    if _FORBIDDEN_IN_HEAD.search(request.head):
        return HttpError(400, "Malformed request head", "malformed_request")
    if request.version == "1.1" and len(request.headers.getall("host", ())) != 1:
        return HttpError(400, "Host header: expected exactly one", "malformed_request")
    return None


def _is_of_peer(request: Request) -> bool:
    """Whether a node of the fleet may have sent the request: it asks for an object, or probes."""
    path = request.path
    return HOP_HEADER in request.headers and (path.startswith(ASSETS) or path == _PROBED)


# Error responses: status, headers and JSON body for every exception.

UNREADABLE = "NONE"
"""The method that Sanic gives to a request whose head could not be read."""


class JsonErrorHandler(ErrorHandler):
    """Renders errors as JSON. Logs a traceback for server errors only."""

    def response(self, request: Request, exception: BaseException) -> HTTPResponse:
        """Return the response for an exception."""
        error = as_http_error(request, exception)
        if error.status == 500:
            logger.error("request_failed", path=request.path[:200], exc_info=exception)
        return render_error(request, error)

    def default(self, request: Request, exception: Exception) -> HTTPResponse:
        return self.response(request, exception)


def render_error(request: Request, error: HttpError) -> HTTPResponse:
    """Return `{"type": …, "message": …}`, not cacheable. Sanic leaves the body out of a response to HEAD."""
    if error.kind == NOT_CACHED:
        request_record(request).absent = True
    body = {"type": error.kind, "message": error.message} if error.kind else {"message": error.message}
    usual = ASSET if request.path.startswith(ASSETS) else CROSS_ORIGIN
    headers = {**usual, "Cache-Control": CACHE_ERROR, **error.headers}
    return HTTPResponse(json.dumps(body), error.status, headers, "application/json")


def as_http_error(request: Request, exception: BaseException) -> HttpError:
    """Return the error to send. It discloses nothing of an unexpected exception."""
    if isinstance(exception, HttpError):
        return exception
    if isinstance(exception, InvalidInput):
        return HttpError(400, str(exception), "malformed_request")
    if isinstance(exception, CatalogUnavailable | StateStoreUnavailable):
        return _unavailable("Not available at the moment")
    if isinstance(exception, TooManyOpenFiles):
        logger.warning("descriptors_exhausted", path=request.path[:200], reason=str(exception))
        return _unavailable("Too many open files")
    if isinstance(exception, SanicException):
        return _from_sanic_exception(request, exception)
    return _internal()


def _from_sanic_exception(request: Request, exception: SanicException) -> HttpError:
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
            return _unavailable("The response took too long")
        case ExpectationFailed():
            return HttpError(417, "Expectation not supported", "expectation_failed")
    if 400 <= exception.status_code < 500:
        return HttpError(400, "Malformed request", "malformed_request")
    return _internal()


def _too_large(request: Request) -> HttpError:
    """Return 413 for the body, 414 or 431 for the head. Sanic has parsed nothing of a head that is too large."""
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


_READ = ("GET", "HEAD")
_NO_STORE = {"Cache-Control": "no-store"}


class AssetResponder(Protocol):
    """Responds to GET and HEAD of one object."""

    async def handle(self, request: Request, object_id: ObjectId) -> None: ...


class TracedAssets:
    """Responds as another AssetResponder does, in a span whose parent is the request's traceparent."""

    def __init__(self, assets: AssetResponder) -> None:
        self._assets = assets

    async def handle(self, request: Request, object_id: ObjectId) -> None:
        record = request_record(request)
        offered = request.headers.getall("traceparent", ())
        failure: Exception | None = None
        with tracing.span(
            *asset_span(request.method),
            parent=offered[0]
            if len(offered) == 1
            else "",  # of several none counts (section 3.2 of the standard)
            started=time.time() - (time.perf_counter() - record.started),
            attributes=asset_attributes(request.method, object_id, record.request_id),
        ) as span:
            record.trace_id = span.trace_id or None
            traced = {"trace_id": span.trace_id} if span.trace_id else {}
            try:
                # Not longer than the request: the connection's task serves others after it.
                with structlog.contextvars.bound_contextvars(**traced):
                    await self._assets.handle(request, object_id)
            except Exception as error:  # noqa: BLE001  raised after the span: a 404 is no failure of the server
                failure = error
            finally:
                # Also when it is cancelled: a client that has everything may leave before the response has ended here.
                response = getattr(request.stream, "response", None)
                if response is not None:
                    span.set("http.response.status_code", response.status)
                    span.set("http.response.body.size", record.sent or 0)
                    span.set("distributor.cache", response.headers.get("X-Cache"))
                    span.set("distributor.data_source", response.headers.get("X-Data-Source"))
            if isinstance(failure, AbortResponse):
                span.fail(failure.reason)
            elif failure is not None:
                error_response = as_http_error(request, failure)
                span.set("http.response.status_code", error_response.status)
                if error_response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    span.fail(error_response.message)
        if failure is not None:
            raise failure


def build_app(context: ApiContext, assets: AssetResponder) -> ApiApplication:
    """Build the public API. Opens nothing: serve it with a PublicServer, and run `ctx.squid_status` beside it."""
    application = make_application(context.settings.public_api, turns=context.turns)
    usage = UsageReader(context)
    catalog = context.settings.catalog
    _add_assets(application, assets, catalog.kind == "origin" and context.settings.origin.query == "include")
    squid_status = SquidStatusPoller(context.catalog)
    reporter = StatusReporter(context, usage, squid_status)
    _add_status(application, reporter)
    _add_health(application)
    _add_front_page(application)
    application.ctx.fast_path = None
    application.ctx.usage, application.ctx.squid_status = usage, squid_status
    return application


def _add_assets(application: ApiApplication, assets: AssetResponder, has_queries: bool) -> None:
    """`has_queries`: whether the query of a request is a part of the id."""
    path = ASSET_ROUTE

    async def read(request: Request, object_id: str) -> None:
        record = request_record(request)
        record.path = path
        parsed_id = parse_object_id(object_id, _query_of(request) if has_queries else "")
        record.object_id = parsed_id
        await assets.handle(request, parsed_id)

    async def preflight(request: Request, object_id: str) -> HTTPResponse:
        # The same for every id: a preflight is about the route, not about the object.
        request_record(request).path = path
        return HTTPResponse(status=204, headers=preflight_headers(request.headers))

    application.add_route(read, path, methods=_READ, name="asset", ignore_body=False)
    application.add_route(preflight, path, methods=("OPTIONS",), name="asset_preflight")


def _query_of(request: Request) -> str:
    """Return the query without `download`, which is ours. The order of the others is part of the id."""
    query = request.query_string
    return (
        "&".join(part for part in query.split("&") if part.partition("=")[0] != "download") if query else ""
    )


def _add_status(application: ApiApplication, reporter: StatusReporter) -> None:
    document = files("distributor_node.services.api").joinpath("openapi.json").read_bytes()

    async def status(request: Request) -> HTTPResponse:
        if HOP_HEADER in request.headers:
            request_record(request).logged = False  # a peer's probe, one each second
        return _json(await reporter.status())

    async def buckets(_request: Request) -> HTTPResponse:
        return _json(await reporter.buckets())

    async def openapi(_request: Request) -> HTTPResponse:
        headers = {**CROSS_ORIGIN, "Cache-Control": "max-age=3600"}
        return HTTPResponse(document, 200, headers, "application/json")

    _add(application, _PROBED, status)
    _add(application, "/api/v1/buckets", buckets)
    _add(application, "/api/v1/openapi.json", openapi)


def _add_health(application: ApiApplication) -> None:
    """For load balancers: whether this port serves. What the node knows about itself is on the port of the metrics."""

    async def healthz(_request: Request) -> HTTPResponse:
        return _json({"status": "ok"})

    _add(application, "/healthz", healthz)


_FRONT_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Distributor node</title>
</head>
<body>
<p>This is the address of a distributor node: a server that keeps copies of media objects and sends them to players and
browsers, each at <code>api/v1/assets/</code> and its id. How programs talk to it is described by its
<a href="api/v1/openapi.json">API document</a> (OpenAPI).</p>
</body>
</html>
"""


def _add_front_page(application: ApiApplication) -> None:
    """Tell a person what this address is. For programs there is nothing at `/`, whatever they ask it for."""
    headers = {
        "Cache-Control": "public, max-age=3600",
        "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Vary": "Accept",
        "X-Content-Type-Options": "nosniff",
    }

    async def front_page(request: Request) -> HTTPResponse:
        request_record(request).path = "/"
        if request.method not in _READ or "text/html" not in request.headers.get("accept", ""):
            raise NotFound("")
        return HTTPResponse(_FRONT_PAGE, 200, headers, "text/html; charset=utf-8")

    methods = (*_READ, "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
    application.add_route(front_page, "/", methods=methods, name="front_page")


def _add(application: ApiApplication, path: str, handler: Any) -> None:
    name = path.rpartition("/")[2].partition(".")[0]

    async def read(request: Request) -> HTTPResponse:
        request_record(request).path = path
        response: HTTPResponse = await handler(request)
        return response

    async def options(request: Request) -> HTTPResponse:
        request_record(request).path = path
        return HTTPResponse(status=204, headers=preflight_headers(request.headers))

    application.add_route(read, path, methods=_READ, name=name)
    application.add_route(options, path, methods=("OPTIONS",), name=f"{name}_options")


def _json(body: Mapping[str, Any], status: int = 200) -> HTTPResponse:
    return HTTPResponse(json.dumps(body), status, {**CROSS_ORIGIN, **_NO_STORE}, "application/json")
