"""Routes of the public API: paths and their handlers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

from sanic import HTTPResponse, Request

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.headers import CROSS_ORIGIN, PREFLIGHT
from distributor_node.services.api.request_log import request_record
from distributor_node.services.api.sanic_app import ApiApplication, make_application, parse_object_id
from distributor_node.services.api.status import SquidStatusPoller, StatusReporter, UsageReader
from distributor_node.shared.domain.objects import ObjectId

_READ = ("GET", "HEAD")
_NO_STORE = {"Cache-Control": "no-store"}


class AssetResponder(Protocol):
    """Responds to GET and HEAD of one object."""

    async def handle(self, request: Request, object_id: ObjectId) -> None: ...


def build_app(context: ApiContext, assets: AssetResponder) -> ApiApplication:
    """Build the public API. Opens nothing: serve it with a PublicServer."""
    application = make_application(context.settings.public_api)
    usage = UsageReader(context)
    _add_assets(application, assets)
    reporter = StatusReporter(context, usage, SquidStatusPoller(context.catalog))
    _add_status(application, reporter)
    _add_health(application)
    application.ctx.fast_path = None
    application.ctx.usage, application.ctx.status_reporter = usage, reporter
    return application


def _add_assets(application: ApiApplication, assets: AssetResponder) -> None:
    path = "/api/v1/assets/<object_id>"

    async def read(request: Request, object_id: str) -> None:
        record = request_record(request)
        record.path = path
        parsed_id = parse_object_id(object_id)
        record.object_id = parsed_id
        await assets.handle(request, parsed_id)

    async def preflight(request: Request, object_id: str) -> HTTPResponse:
        # The same for every id: a preflight is about the route, not about the object.
        request_record(request).path = path
        return HTTPResponse(status=204, headers=dict(PREFLIGHT))

    application.add_route(read, path, methods=_READ, name="asset", ignore_body=False)
    application.add_route(preflight, path, methods=("OPTIONS",), name="asset_preflight")


def _add_status(application: ApiApplication, reporter: StatusReporter) -> None:
    document = files("distributor_node.services.api").joinpath("openapi.json").read_bytes()

    async def status(_request: Request) -> HTTPResponse:
        return _json(await reporter.status())

    async def buckets(_request: Request) -> HTTPResponse:
        return _json(await reporter.buckets())

    async def openapi(_request: Request) -> HTTPResponse:
        headers = {**CROSS_ORIGIN, "Cache-Control": "max-age=3600"}
        return HTTPResponse(document, 200, headers, "application/json")

    _add(application, "/api/v1/status", status)
    _add(application, "/api/v1/buckets", buckets)
    _add(application, "/api/v1/openapi.json", openapi)


def _add_health(application: ApiApplication) -> None:
    """For load balancers: whether this port serves. What the node knows about itself is on the port of the metrics."""

    async def healthz(_request: Request) -> HTTPResponse:
        return _json({"status": "ok"})

    _add(application, "/healthz", healthz)


def _add(application: ApiApplication, path: str, handler: Any) -> None:
    name = path.rpartition("/")[2].partition(".")[0]

    async def read(request: Request) -> HTTPResponse:
        request_record(request).path = path
        response: HTTPResponse = await handler(request)
        return response

    async def options(request: Request) -> HTTPResponse:
        request_record(request).path = path
        return HTTPResponse(status=204, headers=dict(PREFLIGHT))

    application.add_route(read, path, methods=_READ, name=name)
    application.add_route(options, path, methods=("OPTIONS",), name=f"{name}_options")


def _json(body: Mapping[str, Any], status: int = 200) -> HTTPResponse:
    return HTTPResponse(json.dumps(body), status, {**CROSS_ORIGIN, **_NO_STORE}, "application/json")
