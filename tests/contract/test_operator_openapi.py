"""The operator server and its OpenAPI document agree."""

from __future__ import annotations

import asyncio
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from distributor_node.services.api.operator.app import (
    TokenAuthenticator,
    build_operator_app,
    explain_with,
    operator_api,
)
from distributor_node.services.api.operator.commands import OperatorCommands, OperatorQueries
from distributor_node.services.api.operator.warming import CacheWarmer
from distributor_node.services.api.sanic_app import public_path, unregister_application
from tests.servers.api_fixture import FakeAssets, running_api
from tests.servers.operator_token import SECRET, sign

DOCUMENT: dict[str, Any] = json.loads(
    files("distributor_node.services.api.operator").joinpath("openapi.json").read_text()
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


async def test_every_route_is_described_and_every_description_is_a_route(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        context = api.context
        application = build_operator_app(
            context.settings.public_api,
            TokenAuthenticator(context.state, SECRET),
            OperatorCommands(context.state, context.operator_state, context.catalog, context.volume),
            OperatorQueries(context.state, context.volume),
            explain_with(context),
            CacheWarmer(context, "here"),
        )
        routes = {
            (public_path(route).replace("<object_id>", "{id}"), method.lower())
            for route in application.router.routes
            for method in route.methods
        }
        unregister_application(application)
    described = {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}
    assert routes == described


async def test_server_keeps_to_the_document(tmp_path: Path) -> None:
    operator = {"port": 0, "secret": SECRET}
    async with (
        running_api(tmp_path, FakeAssets(), operator_api=operator) as api,
        operator_api(api.context, "here", shared_port=False) as port,
    ):
        term = await api.context.state.lead("evictor", 60)
        assert term is not None
        await api.context.state.set_reconciled(term)
        await asyncio.to_thread(explore, f"http://127.0.0.1:{port}")


def explore(url: str) -> None:
    schema: Any = schemathesis.openapi.from_dict(DOCUMENT)
    found = [result.ok() for result in schema.get_all_operations()]
    # An order to shut down makes everything else a conflict.
    for operation in sorted(found, key=lambda operation: "shutdown" in operation.path):
        explore_operation(operation, url)


def explore_operation(operation: Any, url: str) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def keeps_to_it(case: Any) -> None:
        prepared = requests.Request(**case.as_transport_kwargs(base_url=url)).prepare()
        body = json.loads(prepared.body) if isinstance(prepared.body, bytes) else {}
        for headers in ({"Authorization": f"bearer {sign(str(prepared.path_url), body)}"}, {}):
            answer = case.call(base_url=url, headers=headers)
            case.validate_response(answer, checks=CHECKS)
            if not headers and "openapi" not in operation.path:
                assert answer.status_code == 401

    keeps_to_it()
