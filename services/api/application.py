"""The Sanic application: raw-path routing, one record for each request, no noise."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import structlog
from sanic import Request, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.config import Config
from sanic.exceptions import MethodNotAllowed, NotFound
from sanic.http import Http, Stage
from sanic.http.constants import HTTP
from sanic.models.handler_types import RouteHandler
from sanic.router import Router
from sanic_routing.route import Route

from services.api.error_rendering import JsonErrorHandler
from services.api.errors import AbortResponse
from services.api.exchange import precreate_counters, request_record
from services.api.protocol import ApiHttp
from services.api.request import ASSETS, MAX_HEAD_BYTES, ApiRequest, validate_head
from shared.observability.metrics import ABORTED_RESPONSES, REQUESTS_IN_PROGRESS
from shared.settings.model import PublicApi

MAX_BODY_BYTES = 64 * 1024
"""Of a request. No request of this API means anything by its body; small ones are read and ignored."""
_ASSET_ROUTE = "/api/v1/assets/<object_id>"

_numbers = count(1)
logger = structlog.get_logger()


class RawPathRouter(Router):
    """Finds routes by the raw path, exactly. Everything below the assets goes to their handler."""

    def get(  # type: ignore[override]
        self, path: str, method: str, host: str | None
    ) -> tuple[Route, RouteHandler, dict[str, Any]]:
        """Route, handler and its arguments; NotFound or MethodNotAllowed."""
        asset = path.startswith(ASSETS)
        group = self._by_path().get(_ASSET_ROUTE if asset else path)
        if group is None:
            raise NotFound("")
        route = group.get(method)
        if route is None:
            raise MethodNotAllowed("", method, tuple(group))
        return route, route.handler, {"object_id": path[len(ASSETS) :]} if asset else {}

    def _by_path(self) -> dict[str, dict[str, Route]]:
        known: dict[str, dict[str, Route]] | None = getattr(self.ctx, "by_path", None)
        if known is None or not self.finalized:
            known = {}
            for route in self.routes:
                known.setdefault(public_path(route), {}).update(dict.fromkeys(route.methods, route))
            self.ctx.by_path = known
        return known


def public_path(route: Route) -> str:
    """The path as it was registered: Sanic adds the types of its arguments."""
    return f"/{route.path}".replace(":str>", ">")


class ApiApplication(Sanic):  # type: ignore[type-arg]
    """Sanic, with each request counted, logged and ended in one place."""

    async def handle_request(self, request: Request[Any, Any]) -> None:
        record = request_record(request)
        structlog.contextvars.bind_contextvars(request_id=record.request_id)
        REQUESTS_IN_PROGRESS.inc()
        try:
            malformed = validate_head(request)
            if malformed is not None:
                if isinstance(request.stream, ApiHttp):
                    request.stream.keep_alive = False  # nobody knows where the next request would begin
                await self.handle_exception(request, malformed)
            else:
                await super().handle_request(request)
        except asyncio.CancelledError:
            if record.abort_reason is None and request.conn_info is not None and request.conn_info.lost:
                record.abort_reason = "client_disconnected"
                ABORTED_RESPONSES.labels(reason="client_disconnected").inc()
            raise
        finally:
            REQUESTS_IN_PROGRESS.dec()
            # With no response yet it was cancelled: the connection's own error answer is recorded then.
            if isinstance(request.stream, ApiHttp) and request.stream.response is not None:
                request.stream.record()

    async def handle_exception(
        self, request: Request[Any, Any], exception: BaseException, run_middleware: bool = True
    ) -> None:
        """Answer an exception; cut the connection if the answer has begun already."""
        http = request.stream
        if isinstance(http, ApiHttp) and http.stage is not Stage.HANDLER:
            reason = exception.reason if isinstance(exception, AbortResponse) else "unexpected_error"
            if not isinstance(exception, AbortResponse) and http.stage is not Stage.FAILED:
                logger.error("response_failed", exc_info=exception)
            http.abort_response(reason)
            return
        await super().handle_exception(request, exception, run_middleware=False)


def make_application(public_api: PublicApi, name: str = "distributor") -> ApiApplication:
    """An application without routes. Close it with `unregister_application`; several can live in one process."""
    precreate_counters()
    config = Config(env_prefix=None)  # our settings are the only ones: no SANIC_… from the environment
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
    # Tells Sanic that HTTP/1.1 is all there is; otherwise every answer carries an empty Alt-Svc.
    application.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    return application


def prepare_start(application: ApiApplication) -> None:
    """To be called right before an application is started, of which there may be several in one process."""
    # Sanic rewrites its own classes then, and cannot read its own output a second time.
    application.config.TOUCHUP = not getattr(Http, "__touched__", False)


def unregister_application(application: ApiApplication) -> None:
    """Take the application out of Sanic's registry, which would keep it for ever."""
    Sanic.unregister_app(application)
