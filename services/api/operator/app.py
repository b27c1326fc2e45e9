"""Routes of the operator API, and its server in one API process."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import structlog
from sanic import HTTPResponse, Request

import distributor_node.services.api.operator.schemas as bodies
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.errors import HttpError
from distributor_node.services.api.listen import ListenAddress
from distributor_node.services.api.operator.auth import (
    REPLAY_WINDOW,
    AuthenticationError,
    SignedRequest,
    authenticate,
    weak_secret,
)
from distributor_node.services.api.operator.commands import OperatorCommands, OperatorQueries, warming_as_json
from distributor_node.services.api.operator.explain import (
    ObjectExplainer,
    last_removal,
    with_words,
)
from distributor_node.services.api.operator.warming import CacheWarmer
from distributor_node.services.api.request_log import request_record
from distributor_node.services.api.sanic_app import (
    ApiApplication,
    JsonErrorHandler,
    as_http_error,
    make_application,
    unregister_application,
)
from distributor_node.services.api.server import PublicServer
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import StateStore
from distributor_node.shared.settings.model import PublicApi
from distributor_node.shared.waiting import background

_NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_BASE = "/api/v1"
_CLOSING_SECONDS = 1.0

Command = Callable[[Any], Awaitable[dict[str, Any]]]
"""From the JSON body of the request to that of the response."""
Query = Callable[[Request], Awaitable[dict[str, Any]]]

logger = structlog.get_logger()


class OperatorErrorHandler(JsonErrorHandler):
    """Renders errors as on the public port, without CORS headers."""

    def response(self, request: Request, exception: BaseException) -> HTTPResponse:
        error = as_http_error(request, exception)
        if error.status == 500:
            logger.error("operator_request_failed", path=request.path[:200], exc_info=exception)
        return _json({"type": error.kind, "message": error.message}, error.status, error.headers)


class TokenAuthenticator:
    """Authenticates requests, and accepts each token once (replay protection)."""

    def __init__(self, state: StateStore, secret: str, clock: Callable[[], float] = time.time) -> None:
        """`clock`: POSIX time in seconds."""
        self._state, self._secret, self._clock = state, secret, clock

    async def authenticate(self, request: Request) -> Any:
        """Return the JSON body of an authenticated request.

        Raises HttpError 401, equal for all reasons, or StateStoreUnavailable (503) while replays cannot be detected.
        """
        signed = SignedRequest(
            request.headers.getall("authorization", []), request.raw_url.decode("latin-1"), request.body
        )
        try:
            authenticated = authenticate(signed, self._secret, self._clock())
            if not await self._state.consume_token_id(
                authenticated.token_id, authenticated.issued, REPLAY_WINDOW
            ):
                raise AuthenticationError(
                    "token was used before, or issued before the state store was created"
                )
        except AuthenticationError as error:
            logger.warning("operator_authentication_failed", reason=str(error), path=request.path[:200])
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HttpError(401, "Not authorised", "not_authorised", challenge) from error
        return authenticated.body


def build_operator_app(
    public_api: PublicApi,
    authenticator: TokenAuthenticator,
    commands: OperatorCommands,
    queries: OperatorQueries,
    explain: Callable[[ObjectId], Awaitable[dict[str, Any]]],
    warmer: CacheWarmer,
) -> ApiApplication:
    """Build the operator API. Opens nothing. `public_api`: the connection limits, which are the same."""
    application = make_application(public_api, name="operator")
    application.error_handler = OperatorErrorHandler()
    application.ctx.fast_path = None

    async def set_worker(body: Any) -> dict[str, Any]:
        worker_id, check = bodies.parse_worker(body)
        return await commands.set_worker(worker_id, check=check)

    async def set_buckets(body: Any) -> dict[str, Any]:
        buckets, check = bodies.parse_buckets(body)
        return await commands.set_buckets(buckets, check=check)

    async def drain(body: Any) -> dict[str, Any]:
        return await commands.drain(bodies.parse_toggle(body))

    async def pin(body: Any) -> dict[str, Any]:
        return await commands.pin(bodies.parse_ids(body))

    async def unpin(body: Any) -> dict[str, Any]:
        return await commands.unpin(bodies.parse_ids(body))

    async def purge(body: Any) -> dict[str, Any]:
        return await commands.purge(bodies.parse_purge(body))

    async def warm(body: Any) -> dict[str, Any]:
        warming = await commands.warm(bodies.parse_warming_scope(body))
        warmer.wake()
        return warming_as_json(warming)

    _add(application, authenticator, "stop-api", _without_arguments(commands.stop))
    _add(application, authenticator, "start-api", _without_arguments(commands.start))
    _add(application, authenticator, "shutdown", _without_arguments(commands.shut_down))
    _add(application, authenticator, "reset-assignment", _without_arguments(commands.reset_assignment))
    for command in (set_worker, set_buckets, drain, pin, unpin, purge, warm):
        _add(application, authenticator, command.__name__.replace("_", "-"), command)
    _add_queries(application, authenticator, commands, queries)
    _add_explain(application, authenticator, explain)
    return application


def _add_queries(
    application: ApiApplication,
    authenticator: TokenAuthenticator,
    commands: OperatorCommands,
    queries: OperatorQueries,
) -> None:
    async def cache(request: Request) -> dict[str, Any]:
        query = {name: values[-1] for name, values in request.get_args(keep_blank_values=True).items()}
        return await queries.cache(*bodies.parse_page(query))

    async def pins(request: Request) -> dict[str, Any]:
        query = {name: values[-1] for name, values in request.get_args(keep_blank_values=True).items()}
        return await commands.pins(*bodies.parse_page(query))

    async def downloads(_request: Request) -> dict[str, Any]:
        return await queries.downloads()

    async def warming(_request: Request) -> dict[str, Any]:
        return warming_as_json(await commands.warming())

    async def operator_state(_request: Request) -> dict[str, Any]:
        return commands.as_json()

    async def document(_request: Request) -> HTTPResponse:
        text = files("distributor_node.services.api.operator").joinpath("openapi.json").read_bytes()
        return HTTPResponse(text, 200, dict(_NO_STORE), "application/json")

    for path, query in (
        ("cache", cache),
        ("pins", pins),
        ("downloads", downloads),
        ("warm", warming),
        ("orders", operator_state),
    ):
        _add_query(application, authenticator, path, query)
    application.add_route(document, f"{_BASE}/openapi.json", methods=("GET",), name="openapi")


def _add(application: ApiApplication, authenticator: TokenAuthenticator, name: str, command: Command) -> None:
    path = f"{_BASE}/{name}"

    async def handle(request: Request) -> HTTPResponse:
        request_record(request).path = path
        return _json(await command(await authenticator.authenticate(request)))

    application.add_route(handle, path, methods=("POST",), name=f"post-{name}")


def _add_query(
    application: ApiApplication, authenticator: TokenAuthenticator, name: str, query: Query
) -> None:
    path = f"{_BASE}/{name}"

    async def handle(request: Request) -> HTTPResponse:
        request_record(request).path = path
        await authenticator.authenticate(request)
        return _json(await query(request))

    application.add_route(handle, path, methods=("GET",), name=f"get-{name}", ignore_body=False)


def _add_explain(
    application: ApiApplication,
    authenticator: TokenAuthenticator,
    explain: Callable[[ObjectId], Awaitable[dict[str, Any]]],
) -> None:
    path = f"{_BASE}/cache/<object_id>"

    async def handle(request: Request[Any, Any], object_id: str) -> HTTPResponse:
        request_record(request).path = f"{_BASE}/cache/{{id}}"
        await authenticator.authenticate(request)
        return _json(await explain(bodies.parse_object_id(object_id, query=request.query_string)))

    application.add_route(handle, path, methods=("GET",), name="get-cache-object", ignore_body=False)


def _without_arguments(command: Callable[[], Awaitable[dict[str, Any]]]) -> Command:
    async def handle(body: Any) -> dict[str, Any]:
        bodies.parse_empty(body)
        return await command()

    return handle


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> HTTPResponse:
    return HTTPResponse(json.dumps(body), status, {**_NO_STORE, **(headers or {})}, "application/json")


def explain_with(context: ApiContext) -> Callable[[ObjectId], Awaitable[dict[str, Any]]]:
    """Return what answers `GET /cache/{id}`: the explanation in fields, and in the sentences of the node's page."""
    explainer = ObjectExplainer(context.state, context.volume, context.settings.evictor)

    async def explain(object_id: ObjectId) -> dict[str, Any]:
        removed = await last_removal(context.state, object_id)
        explained = await explainer.explain(object_id)
        if removed is not None and explained["path"] is None:
            explained["path"] = removed.path
        return await with_words(context, explained, removed)

    return explain


@asynccontextmanager
async def operator_api(context: ApiContext, holder: str, *, shared_port: bool) -> AsyncIterator[int | None]:
    """Serve the operator API inside the block. Yields its port, or None if the API is off.

    `holder`: names this process in leases. `shared_port`: other processes listen on the same port, and any of them may
    get a request. Raises ConfigurationError if the port is unavailable.
    """
    settings = context.settings.operator_api
    if settings.secret is None:
        yield None
        return
    commands = OperatorCommands(context.state, context.operator_state, context.catalog, context.volume)
    warmer = CacheWarmer(context, holder)
    secret = settings.secret.get_secret_value()
    weakness = weak_secret(secret)
    if weakness is not None:
        logger.warning("operator_secret_weak", reason=weakness)
    authenticator = TokenAuthenticator(context.state, secret)
    queries = OperatorQueries(context.state, context.volume)
    application = build_operator_app(
        context.settings.public_api, authenticator, commands, queries, explain_with(context), warmer
    )
    server = PublicServer(
        application, ListenAddress(settings.host, settings.port, shared_port, "operator_api")
    )
    await server.open()
    try:
        async with background(warmer.run(), name="warmer") as warming:
            yield server.port
    finally:
        await server.close(_CLOSING_SECONDS)
        unregister_application(application)
    if not warming.cancelled():
        warming.result()
