"""Announcements from the server's pub/sub, over a connection of their own that comes back by itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from distributor_node.shared.adapters.state_common import AnnouncementQueue
from distributor_node.shared.adapters.state_redis.connection import make_client
from distributor_node.shared.adapters.state_redis.records import read_announcement
from distributor_node.shared.ports.state_store import Announcement, Topic

_PING_INTERVAL = 2.0
"""Silence after which the server is asked for a heartbeat; as long again without one ends the connection."""

_INITIAL_DELAY, _MAX_DELAY = 0.1, 2.0

logger = structlog.get_logger()


@asynccontextmanager
async def listen(url: str, channel: str, timeout: float) -> AsyncIterator[AsyncIterator[Announcement]]:
    """Waits up to `timeout` seconds for the subscription, so that what is announced from now on is not missed."""
    listener = _Listener(url, channel, timeout)
    task = asyncio.create_task(listener.run(), name="state-store-listener")
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await listener.subscribed.wait()
        yield listener.queue
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


class _Listener:
    def __init__(self, url: str, channel: str, timeout: float) -> None:
        self.queue = AnnouncementQueue()
        self.subscribed = asyncio.Event()
        self._url = url
        self._channel = channel
        self._timeout = timeout

    async def run(self) -> None:
        """Subscribe, read, begin again, until cancelled."""
        delay = _INITIAL_DELAY
        while True:
            try:
                await self._listen_once()
            except (RedisError, OSError) as error:
                if self.subscribed.is_set():
                    delay = _INITIAL_DELAY
                    self.subscribed.clear()
                    logger.warning("state_store_subscription_lost", reason=f"{type(error).__name__} {error}")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
            delay = min(2 * delay, _MAX_DELAY)

    async def _listen_once(self) -> None:
        client = make_client(self._url, self._timeout, connections=1)
        pubsub = client.pubsub()
        try:
            async with asyncio.timeout(self._timeout):
                await pubsub.subscribe(self._channel)
            await self._read(pubsub)
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]
            await client.aclose()

    async def _read(self, pubsub: PubSub) -> None:
        pinged = False
        while True:
            async with asyncio.timeout(_PING_INTERVAL + self._timeout):
                message = await pubsub.get_message(timeout=_PING_INTERVAL)
            if message is None:
                if pinged:
                    raise RedisConnectionError("no answer to a ping")
                pinged = True
                async with asyncio.timeout(self._timeout):
                    await pubsub.ping()
                continue
            pinged = False
            self._take(message)

    def _take(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":
            self.queue.put(Announcement(Topic.SETTINGS_CHANGED))
            self.subscribed.set()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            announcement = read_announcement(message["data"])
            if announcement is not None:
                self.queue.put(announcement)
