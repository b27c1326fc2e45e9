"""The shared catalog cache on Redis: two keys an object, both run out by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from distributor_node.shared.adapters.state_common import read_description, write_description
from distributor_node.shared.adapters.state_redis.connection import RedisConnection
from distributor_node.shared.adapters.state_redis.store import milliseconds
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.source_order import MEAN_SAMPLES, SourceHealth, SourceStatsDelta
from distributor_node.shared.ports.catalog import CachedAnswer, CacheLookup
from distributor_node.shared.ports.source_stats import (
    MAX_CORRUPTED_COPIES,
    MAX_SOURCES,
    CorruptedCopy,
    SharedSources,
)

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


# The shared source stats on Redis: one hash and one sorted set, whatever the number of objects.

_RETENTION_MILLISECONDS = 24 * 3600 * 1000


class RedisSharedSourceStats:
    """See the port.

    sources    HASH  host:port → failures, times (POSIX milliseconds), first bytes; see the script
    corrupted  ZSET  "object host:port" by the POSIX milliseconds until which it is remembered
    """

    def __init__(self, url: str, prefix: str, timeout: float) -> None:
        """`prefix` is the state store's, `timeout` in seconds."""
        self._connection = RedisConnection(url, prefix, timeout)
        self._keys = (f"{prefix}sources", f"{prefix}corrupted")

    async def open(self) -> None:
        self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def sync(
        self, deltas: Mapping[str, SourceStatsDelta], corrupted: Sequence[CorruptedCopy], now: float
    ) -> SharedSources:
        given: list[str | int] = [
            _RETENTION_MILLISECONDS,
            MAX_SOURCES,
            MAX_CORRUPTED_COPIES,
            MEAN_SAMPLES,
            len(deltas),
        ]
        for name, latest in deltas.items():
            given += _report(name, latest, now)
        for copy in corrupted:
            given += (f"{copy.object_id} {copy.source}", milliseconds(copy.seconds_left))
        known, copies = await self._connection.run_on("sources_exchange", self._keys, "", *given)
        return SharedSources(
            {source[0].decode(): _read_health(source, now) for source in known},
            [_read_copy(text, left) for text, left in copies],
        )


def _report(name: str, delta: SourceStatsDelta, now: float) -> tuple[str | int, ...]:
    seen = delta.seen
    unreachable_at = seen.unreachable_at
    return (
        name,
        seen.failures,
        _age(seen.last_failure_at, now),
        int(delta.succeeded),
        int(delta.reached),
        -1 if unreachable_at is None else _age(unreachable_at, now),
        ",".join(f"{seconds:.6f}" for seconds in seen.first_bytes),
    )


def _age(moment: float, now: float) -> int:
    """Milliseconds."""
    return max(0, round((now - moment) * 1000))


def _read_health(source: Sequence[Any], now: float) -> SourceHealth:
    _, failures, since_failure, since_unreached, first_bytes = source
    return SourceHealth(
        failures=failures,
        last_failure_at=now - since_failure / 1000,
        first_bytes=tuple(float(text) for text in first_bytes.decode().split(",") if text),
        unreachable_at=None if since_unreached < 0 else now - since_unreached / 1000,
    )


def _read_copy(text: bytes, milliseconds_left: int) -> CorruptedCopy:
    object_id, _, source = text.decode().partition(" ")
    return CorruptedCopy(ObjectId(object_id), source, milliseconds_left / 1000)
