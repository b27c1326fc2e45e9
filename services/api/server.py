"""The public port: opens, serves, drains, and can be opened again while the process lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import structlog

from services.api.accepting import accepting_server
from services.api.application import ApiApplication, prepare_start
from services.api.farewell import sent_to_the_end
from services.api.listening import Address, bind
from services.api.protocol import PublicProtocol

BACKLOG = 1024
_ABORT_GRACE = 1.0

logger = structlog.get_logger()


class PublicServer:
    """Serves one application in the running loop."""

    def __init__(
        self, application: ApiApplication, address: Address, protocol: type[PublicProtocol] = PublicProtocol
    ) -> None:
        self._application = application
        self._address = address
        self._protocol = protocol
        self._connections = Connections()
        self._server: Any = None

    @property
    def port(self) -> int:
        """The port in use, once it has been open."""
        return self._address.port

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def disconnected(self, seconds: float) -> bool:
        """Wait until no client is connected; False after so many seconds."""
        return await self._connections.emptied(seconds)

    async def open(self) -> None:
        """Listen; ConfigurationError if the port is taken. A port chosen by the system stays the same."""
        if self._server is not None:
            return
        bound = bind(self._address)
        self._address = replace(self._address, port=bound.getsockname()[1])
        server = accepting_server(self._application, bound, self._protocol, self._connections, BACKLOG)
        if not self._application.state.is_started:
            prepare_start(self._application)
            await server.startup()
            await server.before_start()
            self._server = await server
            await server.after_start()
        else:
            self._server = await server
        logger.info("listening", host=self._address.host, port=self.port)

    async def close(self, drain_seconds: float) -> None:
        """Stop accepting, close idle connections, let answers end within `drain_seconds`, then cut the rest.

        Meanwhile the port can be opened again: connections made since are left alone.
        """
        if self._server is None:
            return
        deadline = time.monotonic() + drain_seconds
        server, self._server = self._server, None
        server.server.close()
        leaving = set(self._connections)
        tasks = {connection.task for connection in leaving if connection.task is not None}
        for connection in leaving:
            connection.end_soon()
        if not await self._connections.gone(leaving, drain_seconds):
            left = leaving & self._connections
            logger.warning("answers_cut_at_stop", connections=len(left))
            for connection in left:
                connection.end_now()
            await self._connections.gone(left, _ABORT_GRACE)
        if tasks:
            await asyncio.wait(tasks, timeout=_ABORT_GRACE)
        if not await sent_to_the_end(self.port, max(0.0, deadline - time.monotonic())):
            logger.warning("answers_unsent_at_stop", port=self.port)
        logger.info("stopped_listening", port=self.port)


class Connections(set[PublicProtocol]):
    """The open connections; they add and discard themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._one_left = asyncio.Event()

    def discard(self, connection: object, /) -> None:
        super().discard(connection)
        self._one_left.set()

    async def emptied(self, seconds: float) -> bool:
        """True as soon as no connection is left; False after so many seconds."""
        return await self.gone(self, seconds)

    async def gone(self, leaving: Collection[PublicProtocol], seconds: float) -> bool:
        """True as soon as none of these is left; False after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while not self.isdisjoint(leaving):
                    if self._one_left.is_set():
                        self._one_left = asyncio.Event()
                    await self._one_left.wait()
        except TimeoutError:
            return False
        return True
