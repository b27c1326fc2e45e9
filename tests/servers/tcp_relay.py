"""A relay before a server that can let its connections die silently, as a router or a failover does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TcpRelay:
    """Passes bytes to and fro. After `swallow`, connections that exist stay open, and all sent on them is lost."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._generation = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.port = 0

    def swallow(self) -> None:
        self._generation += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TcpRelay]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer))
                group.create_task(self._pass(far_reader, writer))
        finally:
            self._tasks.discard(task)
            far_writer.close()
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        generation = self._generation
        while data := await reader.read(65536):
            if generation == self._generation:
                writer.write(data)
                await writer.drain()
        writer.close()
