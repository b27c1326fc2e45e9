"""How one API process follows the operator's orders: its assignment, its public port, its end."""

from __future__ import annotations

import asyncio

import structlog

from services.api.context import ApiContext
from services.api.server import PublicServer
from shared.domain.errors import ConfigurationError

_RETRY_SECONDS = 0.5

logger = structlog.get_logger()


class OperatorStateController:
    """`drain`: seconds that answers under way get when the public port is closed."""

    def __init__(self, context: ApiContext, server: PublicServer, drain: float) -> None:
        self._context, self._server, self._drain = context, server, drain
        self._close_tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Know the orders, and open the port unless they say otherwise; ConfigurationError if it cannot be had."""
        await self._context.operator_state.load()
        self._update_assignment()
        if not self._context.operator_state.current.stopped:
            await self._server.open()

    async def run(self, stop_requested: asyncio.Event) -> None:
        """Until cancelled. An order to shut down sets `stop_requested`."""
        operator_state = self._context.operator_state
        while True:
            seen = (
                operator_state.current
            )  # before anything is waited for: what is ordered meanwhile is looked at next
            self._update_assignment()
            if operator_state.shutting_down and not stop_requested.is_set():
                logger.info("shutdown_requested_by_operator")
                stop_requested.set()
            stopped = operator_state.current.stopped
            if stopped and self._server.is_open:
                # Answers under way go on; the port may be opened again meanwhile.
                closing = asyncio.create_task(self._server.close(self._drain), name="close-public-port")
                self._close_tasks.add(closing)
                closing.add_done_callback(self._close_tasks.discard)
            elif not stopped and not self._server.is_open and not await self._open():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            await operator_state.wait_until(lambda now, seen=seen: now != seen)  # type: ignore[misc]

    async def stop(self) -> None:
        """After `run`: close the port, and wait for what closes already."""
        await self._server.close(self._drain)
        if self._close_tasks:
            await asyncio.wait(self._close_tasks)

    async def _open(self) -> bool:
        try:
            await self._server.open()
        except ConfigurationError as error:
            logger.error("port_open_failed", reason=str(error))
            return False
        return True

    def _update_assignment(self) -> None:
        self._context.assignment.current = self._context.operator_state.assignment
