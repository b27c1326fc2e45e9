"""The routes of the operator API."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import structlog
from sanic import HTTPResponse, Request

from services.api.application import ApiApplication, make_application
from services.api.error_rendering import JsonErrorHandler, as_error_answer
from services.api.errors import ErrorAnswer
from services.api.exchange import exchange_of
from services.api.operator import bodies
from services.api.operator.authorization import REMEMBERED, Asked, Refused, authorise
from services.api.operator.desk import OperatorDesk
from services.api.operator.views import OperatorViews, shown_warming
from services.api.operator.warming import Warmer
from shared.ports.state_store import StateStore
from shared.settings.model import PublicApi

_NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_BASE = "/api/v1"

Command = Callable[[Any], Awaitable[dict[str, Any]]]
"""From the body, as JSON, to the answer's."""
View = Callable[[Request[Any, Any]], Awaitable[dict[str, Any]]]

logger = structlog.get_logger()


class OperatorErrorHandler(JsonErrorHandler):
    """As on the public port, but nothing for the pages of others to read."""

    def response(self, request: Request[Any, Any], exception: BaseException) -> HTTPResponse:
        answer = as_error_answer(request, exception)
        if answer.status == 500:
            logger.error("operator_request_failed", path=request.path[:200], exc_info=exception)
        return _json({"type": answer.kind, "message": answer.message}, answer.status, answer.headers)


class Gatekeeper:
    """Lets each token in once. `clock`: POSIX seconds."""

    def __init__(self, state: StateStore, secret: str, clock: Callable[[], float] = time.time) -> None:
        self._state, self._secret, self._clock = state, secret, clock

    async def admit(self, request: Request[Any, Any]) -> Any:
        """The body, as JSON. ErrorAnswer 401, the same whatever is wrong; StateStoreUnavailable (503) while nobody can
        say whether the token was used before."""
        asked = Asked(
            request.headers.getall("authorization", []), request.raw_url.decode("latin-1"), request.body
        )
        try:
            authorised = authorise(asked, self._secret, self._clock())
            if not await self._state.use_ticket(authorised.ticket, authorised.issued, REMEMBERED):
                raise Refused("used before, or issued before the state store began")
        except Refused as error:
            logger.warning("operator_refused", reason=str(error), path=request.path[:200])
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ErrorAnswer(401, "Not authorised", "not_authorised", challenge) from error
        return authorised.body


def build_operator_app(
    public_api: PublicApi, gatekeeper: Gatekeeper, desk: OperatorDesk, views: OperatorViews, warmer: Warmer
) -> ApiApplication:
    """`public_api`: the limits of connections are the same. Nothing is opened here."""
    application = make_application(public_api, name="operator")
    application.error_handler = OperatorErrorHandler()
    application.ctx.fast_lane = None

    async def set_worker(body: Any) -> dict[str, Any]:
        return await desk.set_worker(bodies.read_worker(body))

    async def set_buckets(body: Any) -> dict[str, Any]:
        return await desk.set_buckets(bodies.read_buckets(body))

    async def drain(body: Any) -> dict[str, Any]:
        return await desk.drain(bodies.read_switch(body))

    async def pin(body: Any) -> dict[str, Any]:
        return await desk.pin(bodies.read_ids(body))

    async def unpin(body: Any) -> dict[str, Any]:
        return await desk.unpin(bodies.read_ids(body))

    async def purge(body: Any) -> dict[str, Any]:
        return await desk.purge(bodies.read_purge(body))

    async def warm(body: Any) -> dict[str, Any]:
        ordered = await desk.warm(bodies.read_scope(body))
        warmer.wake()
        return shown_warming(ordered)

    _add(application, gatekeeper, "stop-api", _without_arguments(desk.stop))
    _add(application, gatekeeper, "start-api", _without_arguments(desk.start))
    _add(application, gatekeeper, "shutdown", _without_arguments(desk.shut_down))
    for command in (set_worker, set_buckets, drain, pin, unpin, purge, warm):
        _add(application, gatekeeper, command.__name__.replace("_", "-"), command)
    _add_views(application, gatekeeper, desk, views)
    return application


def _add_views(
    application: ApiApplication, gatekeeper: Gatekeeper, desk: OperatorDesk, views: OperatorViews
) -> None:
    async def cache(request: Request[Any, Any]) -> dict[str, Any]:
        query = {name: values[-1] for name, values in request.get_args(keep_blank_values=True).items()}
        return await views.cache(*bodies.read_page(query))

    async def downloads(_request: Request[Any, Any]) -> dict[str, Any]:
        return await views.downloads()

    async def warming(_request: Request[Any, Any]) -> dict[str, Any]:
        return shown_warming(await desk.warming())

    async def orders(_request: Request[Any, Any]) -> dict[str, Any]:
        return desk.shown()

    async def document(_request: Request[Any, Any]) -> HTTPResponse:
        text = files("services.api.operator").joinpath("openapi.json").read_bytes()
        return HTTPResponse(text, 200, dict(_NO_STORE), "application/json")

    for path, view in (("cache", cache), ("downloads", downloads), ("warm", warming), ("orders", orders)):
        _add_view(application, gatekeeper, path, view)
    application.add_route(document, f"{_BASE}/openapi.json", methods=("GET",), name="openapi")


def _add(application: ApiApplication, gatekeeper: Gatekeeper, name: str, command: Command) -> None:
    path = f"{_BASE}/{name}"

    async def carry_out(request: Request[Any, Any]) -> HTTPResponse:
        exchange_of(request).path = path
        return _json(await command(await gatekeeper.admit(request)))

    application.add_route(carry_out, path, methods=("POST",), name=f"post-{name}")


def _add_view(application: ApiApplication, gatekeeper: Gatekeeper, name: str, view: View) -> None:
    path = f"{_BASE}/{name}"

    async def show(request: Request[Any, Any]) -> HTTPResponse:
        exchange_of(request).path = path
        await gatekeeper.admit(request)
        return _json(await view(request))

    application.add_route(show, path, methods=("GET",), name=f"get-{name}", ignore_body=False)


def _without_arguments(command: Callable[[], Awaitable[dict[str, Any]]]) -> Command:
    async def carry_out(body: Any) -> dict[str, Any]:
        bodies.read_nothing(body)
        return await command()

    return carry_out


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> HTTPResponse:
    return HTTPResponse(json.dumps(body), status, {**_NO_STORE, **(headers or {})}, "application/json")
