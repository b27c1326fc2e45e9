"""Sessions with the broker: opened and closed within a time limit, and watched for their loss.

aio-pika's robust connections are not used. They restore channels and consumers silently: a publisher cannot tell a
broker that is down from one that is slow, and a consumer cannot tell which deliveries can still be acknowledged. Each
user here has its own reconnect loop instead. Opening a new session is the one answer to a restarted broker, a deleted
queue, a cancelled consumer, a channel closed by the consumer timeout and a frozen connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog
from aio_pika.abc import AbstractChannel
from aio_pika.connection import Connection, make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPError

logger = structlog.get_logger()

# aiormq closes a connection after three missed heartbeats, the broker after two.
HEARTBEAT_SECONDS = 5
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 3.0

BROKER_ERRORS: tuple[type[Exception], ...] = (*CONNECTION_EXCEPTIONS, AMQPError, TimeoutError)


class Session:
    """One connection with one channel, from open to lost."""

    def __init__(self, connection: Connection, channel: AbstractChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.lost = asyncio.Event()  # connection or channel closed, or the consumer cancelled by the broker
        self.reason = ""  # why it was lost

    def mark_lost(self, reason: str) -> None:
        """Mark the session as unusable. The first reason is kept."""
        if not self.lost.is_set():
            self.reason = reason
            self.lost.set()

    async def is_blocked(self) -> bool:
        """Return whether the broker has blocked publishing on this connection (memory or disk alarm)."""
        transport = self.connection.transport
        if transport is None:
            return False
        try:
            async with asyncio.timeout(0.01):
                await transport.connection.ready()
        except TimeoutError:
            return True
        return False

    async def watch(self) -> None:
        """Register callbacks that mark the session lost, whichever way it ends."""

        def connection_closed(_: object, error: BaseException | None = None) -> None:
            self.mark_lost(f"connection closed: {error!r}")

        def channel_closed(_: object, error: BaseException | None = None) -> None:
            self.mark_lost(f"channel closed: {error!r}")

        def consumer_cancelled(_: object) -> None:
            self.mark_lost("consumer cancelled by the broker")

        self.connection.close_callbacks.add(connection_closed)
        self.channel.close_callbacks.add(channel_closed)
        (await self.channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(consumer_cancelled)


@asynccontextmanager
async def open_session(url: str, name: str, *, confirms: bool) -> AsyncGenerator[Session]:
    """Connect and open a channel within CONNECT_SECONDS, and close within CLOSE_SECONDS. Raises BROKER_ERRORS.

    The broker's management tools show `name`.
    """
    connection = Connection(
        make_url(url, heartbeat=HEARTBEAT_SECONDS), client_properties={"connection_name": name}
    )
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await connection.connect()
            channel = connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
            await channel.initialize()
            session = Session(connection, channel)
            await session.watch()
        yield session
    finally:
        await _close(connection)


async def _close(connection: Connection) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()
    except BROKER_ERRORS as error:
        logger.info("broker_close_failed", error=repr(error))
