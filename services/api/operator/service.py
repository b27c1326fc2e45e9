"""The operator API at work in one API process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.api.application import unregister_application
from services.api.context import ApiContext
from services.api.listening import ListenAddress
from services.api.operator.app import TokenAuthenticator, build_operator_app
from services.api.operator.desk import OperatorCommands
from services.api.operator.views import OperatorQueries
from services.api.operator.warming import CacheWarmer
from services.api.server import PublicServer

_CLOSING_SECONDS = 1.0


@asynccontextmanager
async def operator_api(context: ApiContext, holder: str, *, shared_port: bool) -> AsyncIterator[int | None]:
    """Listens inside the block; its port, None if it is off. `holder` names this process; `shared_port`: other
    processes listen on the same port, and any of them can answer. ConfigurationError if the port cannot be had."""
    settings = context.settings.operator_api
    if settings.secret is None:
        yield None
        return
    commands = OperatorCommands(context.state, context.operator_state)
    warmer = CacheWarmer(context, holder)
    authenticator = TokenAuthenticator(context.state, settings.secret.get_secret_value())
    queries = OperatorQueries(context.state, context.volume)
    application = build_operator_app(context.settings.public_api, authenticator, commands, queries, warmer)
    server = PublicServer(
        application, ListenAddress(settings.host, settings.port, shared_port, "operator_api")
    )
    await server.open()
    warming = asyncio.create_task(warmer.run(), name="warmer")
    try:
        yield server.port
    finally:
        warming.cancel()
        await asyncio.wait({warming})
        await server.close(_CLOSING_SECONDS)
        unregister_application(application)
        if not warming.cancelled():
            warming.result()
