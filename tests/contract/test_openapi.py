"""The public server and its OpenAPI document agree. Assets are tested in test_openapi_assets.py."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from distributor_node.services.api.sanic_app import build_app, public_path, unregister_application
from tests.servers.api_fixture import FakeAssets, running_api


async def served(tmp_path: Path) -> Any:
    async with running_api(tmp_path) as api:
        return json.loads((await api.get("/api/v1/openapi.json")).partition(b"\r\n\r\n")[2])


async def test_every_route_is_described_and_every_description_is_a_route(tmp_path: Path) -> None:
    document = await served(tmp_path)
    async with running_api(tmp_path, FakeAssets()) as api:
        application = build_app(api.context, FakeAssets())
        routes = {
            (public_path(route).replace("<object_id>", "{objectId}"), method.lower())
            for route in application.router.routes
            for method in route.methods
            if public_path(route) != "/"  # for people alone: programs get a 404 there
        }
        unregister_application(application)
    described = {
        (path, method)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert routes == described


async def test_server_keeps_to_the_document(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        document = await served(tmp_path)
        await asyncio.to_thread(explore, document, f"http://127.0.0.1:{api.server.port}")


def explore(document: dict[str, Any], url: str) -> None:
    schema: Any = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        explore_operation(result.ok(), url)


def explore_operation(operation: Any, url: str) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def keeps_to_it(case: Any) -> None:
        case.call_and_validate(base_url=url)

    keeps_to_it()
