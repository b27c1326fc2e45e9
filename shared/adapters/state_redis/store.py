"""The state store port on Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from shared.adapters.state_redis.connection import RedisConnection
from shared.adapters.state_redis.listener import listen
from shared.adapters.state_redis.orders import RedisOrders
from shared.adapters.state_redis.records import read_server_stats
from shared.adapters.state_times import StateTimeouts
from shared.ports.server_figures import ServerStats
from shared.ports.state_store import Announcement


class RedisStateStore(RedisOrders):
    """`url`: redis://, rediss:// or unix://; `prefix`: before all keys; `limit`: of the volume, in bytes."""

    def __init__(self, url: str, prefix: str, limit: int, timeouts: StateTimeouts) -> None:
        super().__init__(RedisConnection(url, prefix, timeouts.operation_timeout), limit, timeouts)

    async def open(self) -> None:
        self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def ping(self) -> None:
        await self._connection.command("PING")

    async def server_stats(self) -> ServerStats:
        return read_server_stats(await self._connection.command("INFO"))

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Announcement]]:
        return listen(self._connection.url, self._connection.keys.channel, self._timeouts.operation_timeout)
