"""The shared catalog cache on Redis: two keys an object, both run out by themselves."""

from __future__ import annotations

from typing import Any

import structlog

from shared.adapters.catalog_descriptions import read_description, write_description
from shared.adapters.state_redis.connection import RedisConnection
from shared.adapters.state_redis.requests import milliseconds
from shared.domain.errors import InvalidInput
from shared.domain.objects import MediaObject, ObjectId
from shared.ports.catalog_memory import CachedAnswer, CacheLookup

logger = structlog.get_logger()


class RedisSharedCatalogCache:
    """See the port.

    catalog:NAME:answer:… STRING  "POSIX milliseconds until which it is believed" and a description, runs out
    catalog:NAME:asking:… STRING  who asks the catalog just now, runs out
    """

    def __init__(self, url: str, prefix: str, timeout: float, name: str) -> None:
        """`prefix` is the state store's, `timeout` in seconds; `name` tells the answers of different catalogs apart."""
        self._connection = RedisConnection(url, prefix, timeout)
        self._prefix = f"{prefix}catalog:{name}:"

    async def open(self) -> None:
        self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        packed, left = await self._run("catalog_recall", object_id)
        return _read(object_id, packed, left)

    async def get_or_lock(self, object_id: ObjectId, owner: str, seconds: float) -> CacheLookup:
        packed, left, won = await self._run("catalog_consult", object_id, owner, milliseconds(seconds))
        return CacheLookup(_read(object_id, packed, left), bool(won))

    async def put(self, object_id: ObjectId, answer: MediaObject | None, fresh: float, keep: float) -> None:
        described = write_description(answer)
        await self._run("catalog_remember", object_id, described, milliseconds(fresh), milliseconds(keep))

    async def unlock(self, object_id: ObjectId, owner: str) -> None:
        await self._run("catalog_give_up", object_id, owner)

    async def _run(self, script: str, object_id: ObjectId, *arguments: str | bytes | int) -> Any:
        keys = (f"{self._prefix}answer:{object_id}", f"{self._prefix}asking:{object_id}")
        return await self._connection.run_on(script, keys, object_id, *arguments)


def _read(object_id: ObjectId, packed: bytes | None, milliseconds_left: int) -> CachedAnswer | None:
    if packed is None:
        return None
    try:
        return CachedAnswer(read_description(packed), milliseconds_left / 1000)
    except InvalidInput as error:
        logger.warning("catalog_cache_entry_invalid", object_id=object_id, reason=str(error))
        return None
