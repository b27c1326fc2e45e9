"""Connections to the broker: bounded to open, bounded to close, and watched.

Plain connections with a reconnect loop of our own in each user, not aio-pika's robust ones: those restore channels and
consumers behind one's back, so that neither a publisher can tell "down" from "slow" and fail at once, nor a consumer
which deliveries still can be acknowledged. A loop that opens everything anew has one path for a restarted broker, a
deleted queue, a cancelled consumer, a channel closed for its consumer timeout and a frozen connection.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog
from aio_pika.abc import AbstractChannel
from aio_pika.connection import Connection, make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPError

logger = structlog.get_logger()

# aiormq calls a connection dead after three heartbeats and a bit; the broker does so after two.
HEARTBEAT_SECONDS = 5
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 3.0

BROKER_ERRORS: tuple[type[Exception], ...] = (*CONNECTION_EXCEPTIONS, AMQPError, TimeoutError)


class Session:
    """One connection with one channel, from open to lost. `lost` is set once either can no longer be used, or the
    broker has cancelled the channel's consumer; `reason` says what happened."""

    def __init__(self, connection: Connection, channel: AbstractChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.lost = asyncio.Event()
        self.reason = ""

    def mark_lost(self, reason: str) -> None:
        """Use this session no more."""
        if not self.lost.is_set():
            self.reason = reason
            self.lost.set()

    async def is_blocked(self) -> bool:
        """True if the broker has said that it takes no messages on this connection (memory or disk alarm)."""
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
        """Notice every way in which the session can end."""

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
    """Connect and open a channel, within CONNECT_SECONDS; one of BROKER_ERRORS otherwise.

    `name` is shown by the broker's tools. Closing waits CLOSE_SECONDS at most.
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


class Backoff:
    """Seconds to wait before trying again: doubling up to a cap, with jitter so that many processes spread out."""

    def __init__(self, first: float = 0.1, cap: float = 2.0) -> None:
        self._first = first
        self._cap = cap
        self._next = first

    def reset(self) -> None:
        self._next = self._first

    def next_delay(self) -> float:
        delay = self._next * random.uniform(0.5, 1.0)  # noqa: S311  nothing secret about it
        self._next = min(self._cap, self._next * 2)
        return delay

    async def wait(self) -> None:
        await asyncio.sleep(self.next_delay())
