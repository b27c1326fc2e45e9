"""The verbs of requests: look, claim, count accesses, announce."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from shared.adapters.state_redis.connection import RedisConnection
from shared.adapters.state_redis.records import pack_accesses, pack_announcement, read_standing
from shared.adapters.state_times import ACCESS_BATCHES_KEPT, StateTimes
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.space import Usage
from shared.ports.state_store import Access, Announcement, Claim, Standing

_log = structlog.get_logger()


def milliseconds(seconds: float) -> int:
    """At least one: Redis takes no expiry of nothing."""
    return max(1, round(seconds * 1000))


class RedisRequests:
    """See the port for each verb."""

    def __init__(self, connection: RedisConnection, limit: int, times: StateTimes) -> None:
        self._connection = connection
        self._limit = limit
        self._times = times

    async def find(self, object_id: ObjectId) -> Standing:
        return read_standing(object_id, await self._connection.run("find", object_id))

    async def claim(self, object_id: ObjectId, claimant: str) -> Claim:
        duration = milliseconds(self._times.claim_seconds)
        reply = await self._connection.run("claim", object_id, claimant, duration)
        if reply == 1:
            return Claim(won=True, standing=Standing(fetch=None, failure=None))
        return Claim(won=False, standing=read_standing(object_id, reply))

    async def mark_queued(self, object_id: ObjectId, claimant: str) -> None:
        duration = milliseconds(self._times.queued_seconds)
        await self._connection.run("mark_queued", object_id, claimant, duration)

    async def withdraw(self, object_id: ObjectId, claimant: str) -> None:
        await self._connection.run("withdraw", object_id, claimant)

    async def usage(self) -> Usage:
        reply = await self._connection.run("usage", "")
        used, reserved, objects, fetches, accounted, turnover = reply
        return Usage(self._limit, used, reserved, objects, fetches, bool(accounted), turnover)

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        if accesses:
            log = self._connection.keys.accesses
            bound = ("MAXLEN", "~", ACCESS_BATCHES_KEPT)
            await self._connection.command("XADD", log, *bound, "*", "batch", pack_accesses(accesses))

    async def announce(self, announcement: Announcement) -> None:
        channel = self._connection.keys.channel
        try:
            await self._connection.command("PUBLISH", channel, pack_announcement(announcement))
        except StateStoreUnavailable as error:
            _log.debug("announcement_lost", topic=announcement.topic, reason=str(error))
