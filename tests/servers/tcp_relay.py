"""A TCP relay that delays, drops, cuts or swallows, as routers and failovers do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_PIECE = 65536


class TcpRelay:
    """Passes bytes to and fro. What is set holds for all connections, from now on:

    `refusing`: new connections are closed at once. `unresponsive`: what is sent either way is lost, and connections
    stay open (a black hole; what was lost stays lost). `dropping_replies`: the same for what the server says alone
    (half-open). `delay`: seconds each piece travels, either way; `bytes_per_second`: of each direction of each
    connection.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._generation = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.port = 0
        self.refusing = self.unresponsive = self.dropping_replies = False
        self.delay = 0.0
        self.bytes_per_second: int | None = None

    def swallow(self) -> None:
        """Connections that exist stay open, and all sent on them is lost, for ever; new ones are sound."""
        self._generation += 1

    def cut(self) -> None:
        """Reset every connection that exists."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def heal(self) -> None:
        """Good weather again; connections that lost bytes are reset, since they can never be right again."""
        lost = self.unresponsive or self.dropping_replies
        self.refusing = self.unresponsive = self.dropping_replies = False
        self.delay, self.bytes_per_second = 0.0, None
        if lost:
            self.cut()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TcpRelay]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in tuple(self._writers):
                writer.transport.abort()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        ends = {writer}
        try:
            if self.refusing:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            ends.add(far_writer)
            self._writers.add(far_writer)
            await asyncio.gather(
                self._pass(reader, far_writer, is_reply=False), self._pass(far_reader, writer, is_reply=True)
            )
        except OSError:
            writer.transport.abort()
        finally:
            for end in ends:
                end.close()
            self._writers -= ends

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        """One direction; pieces on their way are kept with the time they are due, so that delay costs no throughput."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        delivering = asyncio.create_task(self._deliver(under_way, writer))
        generation = self._generation
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                lost = self.unresponsive or (is_reply and self.dropping_replies)
                if generation == self._generation and not lost:
                    await under_way.put((time.monotonic() + self.delay, data))
        await under_way.put((time.monotonic() + self.delay, b""))
        await delivering

    async def _deliver(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        broken = False
        while True:
            due, data = await under_way.get()
            if not data:
                break
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            if broken:
                continue
            try:
                await self._write(writer, data)
            except OSError:
                broken = True
        writer.close()

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        rate = self.bytes_per_second
        if rate is None:
            writer.write(data)
            await writer.drain()
            return
        step = max(1, rate // 50)
        for start in range(0, len(data), step):
            writer.write(data[start : start + step])
            await writer.drain()
            await asyncio.sleep(step / rate)
