"""A public API on a free port, on memory adapters, with a fake for the assets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanic import HTTPResponse, Request

from distributor_node.services.api.assets.handler import AssetHandler
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.listen import ListenAddress
from distributor_node.services.api.sanic_app import AssetResponder, build_app, unregister_application
from distributor_node.services.api.server import PublicServer
from distributor_node.services.api.service import make_context
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.runtime.factories import (
    build_catalog,
    build_failover_reader,
    build_job_queue,
    build_source_client,
    build_state_store,
    build_volume,
)
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import background


class FakeAssets:
    """Answers by the object's name."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def handle(self, request: Request, object_id: str) -> None:
        match object_id:
            case "broken":
                raise RuntimeError("secret details")
            case "broken-midway" | "endless":
                answer = await request.respond(
                    HTTPResponse(status=200, headers={"Content-Length": "1000000000"})
                )
                assert answer is not None
                while True:
                    await answer.send(b"x" * 100_000)
                    if object_id == "broken-midway":
                        raise RuntimeError("secret details")
            case "waiting":
                self.entered.set()
                await self.release.wait()
        headers = {"X-Cache": "hit", "X-Data-Source": "local"}
        await request.respond(HTTPResponse(b"hello", 200, headers, "text/plain"))


@dataclass(frozen=True, slots=True)
class RunningApi:
    context: ApiContext
    server: PublicServer

    async def ask(self, data: bytes, seconds: float = 60.0) -> bytes:
        """Send bytes on a new connection; all that comes until the server closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(data)
            async with asyncio.timeout(seconds):
                return await reader.read()
        finally:
            writer.close()

    async def get(self, path: str, method: str = "GET", more: str = "") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n{more}\r\n"
        return await self.ask(head.encode("latin-1"))


@asynccontextmanager
async def running_api(
    directory: Path, assets: AssetResponder | None = None, **changes: Any
) -> AsyncIterator[RunningApi]:
    """`changes`: settings of the top level; without `catalog`, that is a manifest. No `assets`: the real ones."""
    manifest = directory / "manifest.yaml"
    manifest.write_text('version: 1\nobjects:\n  - {id: "7", size: 3, bucket: "0:1", accepted: false}\n')
    settings = Settings(
        id="test-node",
        catalog=changes.pop("catalog", {"kind": "manifest", "manifest": manifest}),
        storage={"path": directory / "volume"},
        public_api={"host": "127.0.0.1", "port": 0, **changes.pop("public_api", {})},
        **changes,
    )
    volume = build_volume(settings)
    volume.prepare()
    ports = (build_state_store(settings), build_job_queue(settings), build_catalog(settings))
    for port in ports:
        await port.open()
    async with build_source_client(settings, 10) as client:
        context = make_context(
            settings, volume, *ports, build_failover_reader(client, SourceHealthRegistry())
        )
        application = build_app(context, assets or AssetHandler(context))
        server = PublicServer(application, ListenAddress("127.0.0.1", 0))
        await server.open()
        try:
            async with background(application.ctx.squid_status.run(), "squid-status"):
                yield RunningApi(context, server)
        finally:
            await server.close(0)
            await application.ctx.usage.close()
            unregister_application(application)
    for port in reversed(ports):
        await port.close()
    volume.close()
