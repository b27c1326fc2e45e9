"""The API process applies operator state that changes while it applies the previous one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from distributor_node.services.api.listen import ListenAddress
from distributor_node.services.api.sanic_app import build_app, unregister_application
from distributor_node.services.api.server import PublicServer
from distributor_node.services.api.service import OperatorStateController
from distributor_node.shared.domain.operator_state import OperatorState
from tests.servers.api_fixture import FakeAssets, running_api


class SlowServer(PublicServer):
    """Opens when it is let."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.opening, self.may_open, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def open(self) -> None:
        self.opening.set()
        await self.may_open.wait()
        await super().open()

    async def close(self, drain_seconds: float, *, ending: bool = False) -> None:
        await super().close(drain_seconds, ending=ending)
        self.closed.set()


async def test_a_stop_while_the_port_is_being_opened_takes_effect(tmp_path: Path) -> None:
    async with running_api(tmp_path, FakeAssets()) as api:
        operator_state, application = api.context.operator_state, build_app(api.context, FakeAssets())
        server = SlowServer(application, ListenAddress("127.0.0.1", 0))
        controller_task = asyncio.create_task(
            OperatorStateController(api.context, [server], 0).run(asyncio.Event())
        )
        async with asyncio.timeout(60):
            await server.opening.wait()
            assert await api.context.state.change_operator_state(0, OperatorState(version=1, stopped=True))
            await operator_state.refresh()
            server.may_open.set()
            await server.closed.wait()
        assert not server.is_open
        controller_task.cancel()
        await asyncio.wait({controller_task})
        await application.ctx.usage.close()
        unregister_application(application)
