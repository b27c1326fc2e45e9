"""The shared catalog cache and the shared source stats on Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from distributor_node.shared.adapters.state_common import read_description, write_description
from distributor_node.shared.adapters.state_redis.connection import RedisConnection
from distributor_node.shared.adapters.state_redis.store import milliseconds
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.domain.source_order import (
    MEAN_SAMPLES,
    RATE_MEMORY,
    SourceHealth,
    SourceStatsDelta,
)
from distributor_node.shared.ports.catalog import CachedAnswer, CacheLookup, NewAnswer
from distributor_node.shared.ports.source_stats import (
    MAX_CORRUPTED_COPIES,
    MAX_SOURCES,
    CorruptedCopy,
    SharedSources,
    SourceRate,
)

_RETENTION_MILLISECONDS = 24 * 3600 * 1000

MAX_ANSWERS = 100_000
"""Answers of catalogs that are kept, some 900 bytes each. A server that is nearly full keeps fewer."""

logger = structlog.get_logger()


class RedisSharedCatalogCache:
    """See the port. Two keys for each object, which expire by themselves, and one of all catalogs.

    Answers that would expire first are dropped when there are MAX_ANSWERS, or when the server is nearly full.

    catalog:NAME:answer:… STRING  POSIX milliseconds until which the answer is fresh, and a description
    catalog:NAME:asking:… STRING  the process that asks the catalog now
    catalog:answers       ZSET    keys of answers by their expiry
    """

    def __init__(
        self, url: str, prefix: str, timeout: float, name: str, max_answers: int = MAX_ANSWERS
    ) -> None:
        """`prefix`: of the state store. `timeout`: seconds. `name`: separates the answers of different catalogs."""
        self._max_answers = max_answers
        self._connection = RedisConnection(url, prefix, timeout)
        self._prefix = f"{prefix}catalog:{name}:"

    async def open(self) -> None:
        self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        packed, left = await self._run("catalog_recall", [object_id])
        return _read(object_id, packed, left)

    async def get_or_lock(
        self, object_ids: Sequence[ObjectId], owner: str, seconds: float
    ) -> Sequence[CacheLookup]:
        found = await self._run("catalog_consult", object_ids, owner, milliseconds(seconds))
        return [
            CacheLookup(_read(object_id, packed, left), bool(won))
            for object_id, (packed, left, won) in zip(object_ids, found, strict=True)
        ]

    async def put(self, answers: Sequence[NewAnswer]) -> None:
        given: list[bytes | int] = []
        for new in answers:
            given += (write_description(new.answer), milliseconds(new.fresh), milliseconds(new.keep))
        object_ids = [new.object_id for new in answers]
        await self._run("catalog_remember", object_ids, self._max_answers, *given)

    async def expire(self, outdated: MediaObject) -> None:
        await self._run("catalog_expire", [outdated.object_id], write_description(outdated))

    async def unlock(self, object_id: ObjectId, owner: str) -> None:
        await self._run("catalog_give_up", [object_id], owner)

    async def _run(self, script: str, object_ids: Sequence[ObjectId], *arguments: str | bytes | int) -> Any:
        keys = list(self._connection.keys.all_for(""))
        for object_id in object_ids:
            keys += (f"{self._prefix}answer:{object_id}", f"{self._prefix}asking:{object_id}")
        return await self._connection.run_on(script, tuple(keys), "", *arguments)


def _read(object_id: ObjectId, packed: bytes | None, milliseconds_left: int) -> CachedAnswer | None:
    if packed is None:
        return None
    try:
        return CachedAnswer(read_description(packed), milliseconds_left / 1000)
    except InvalidInput as error:
        logger.warning("catalog_cache_entry_invalid", object_id=object_id, reason=str(error))
        return None


# Source stats


class RedisSharedSourceStats:
    """See the port. Three keys, however many objects there are.

    sources    HASH  host:port → failures, times (POSIX milliseconds), first bytes; see sources_exchange.lua
    corrupted  ZSET  "object host:port" by its expiry in POSIX milliseconds
    rates      HASH  host:port → bytes a second, expiry in POSIX milliseconds
    """

    def __init__(self, url: str, prefix: str, timeout: float) -> None:
        """`prefix`: of the state store. `timeout`: seconds."""
        self._connection = RedisConnection(url, prefix, timeout)
        self._keys = (f"{prefix}sources", f"{prefix}corrupted", f"{prefix}rates")

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
            milliseconds(RATE_MEMORY),
            len(deltas),
        ]
        for name, latest in deltas.items():
            given += _report(name, latest, now)
        for copy in corrupted:
            given += (f"{copy.object_id} {copy.source}", milliseconds(copy.seconds_left))
        known, copies, rates = await self._connection.run_on("sources_exchange", self._keys, "", *given)
        return SharedSources(
            {source[0].decode(): _read_health(source, now) for source in known},
            [_read_copy(text, left) for text, left in copies],
            {name.decode(): SourceRate(rate, left / 1000) for name, rate, left in rates},
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
        -1 if delta.rate is None else round(delta.rate),
    )


def _age(moment: float, now: float) -> int:
    """Milliseconds since `moment`."""
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
