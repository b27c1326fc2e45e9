"""Announcements from Redis pub/sub, over a separate connection that reconnects by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from distributor_node.shared.adapters.state_common import AnnouncementQueue
from distributor_node.shared.adapters.state_redis.connection import make_client
from distributor_node.shared.adapters.state_redis.records import read_announcement
from distributor_node.shared.ports.state_store import Announcement, Topic
from distributor_node.shared.waiting import Backoff, cancel_and_wait, wait_event

_PING_INTERVAL = 2.0
"""Seconds of silence before a ping. As long again without a reply ends the connection."""

logger = structlog.get_logger()


@asynccontextmanager
async def listen(url: str, channel: str, timeout: float) -> AsyncIterator[AsyncIterator[Announcement]]:
    """The announcements on a channel.

    Waits up to `timeout` seconds for the subscription, so that no later announcement is missed. If the server is down,
    it goes on without the subscription, which follows when the server is back.
    """
    listener = _Listener(url, channel, timeout)
    task = asyncio.create_task(listener.run(), name="state-store-listener")
    try:
        await wait_event(listener.subscribed, timeout)
        yield listener.queue
    finally:
        await cancel_and_wait(task)
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
        """Subscribe and read, again after every failure, until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._listen_once()
            except (RedisError, OSError) as error:
                if self.subscribed.is_set():
                    backoff.reset()
                    self.subscribed.clear()
                    logger.warning("state_store_subscription_lost", reason=f"{type(error).__name__} {error}")
            await backoff.wait()

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
                    raise RedisConnectionError("no reply to a ping")
                pinged = True
                async with asyncio.timeout(self._timeout):
                    await pubsub.ping()
                continue
            pinged = False
            self._handle(message)

    def _handle(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":
            self.queue.put(Announcement(Topic.SETTINGS_CHANGED))
            self.subscribed.set()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            announcement = read_announcement(message["data"])
            if announcement is not None:
                self.queue.put(announcement)
