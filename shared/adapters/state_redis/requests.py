"""The verbs of requests: look, claim, count accesses, announce."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from shared.adapters.state_redis.connection import RedisConnection
from shared.adapters.state_redis.records import pack_accesses, pack_announcement, read_object_status
from shared.adapters.state_times import MAX_ACCESS_BATCHES, StateTimeouts
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.space import Usage
from shared.ports.state_store import Access, Announcement, Claim, ObjectStatus

logger = structlog.get_logger()


def milliseconds(seconds: float) -> int:
    """At least one: Redis takes no expiry of nothing."""
    return max(1, round(seconds * 1000))


class RedisRequests:
    """See the port for each verb."""

    def __init__(self, connection: RedisConnection, limit: int, timeouts: StateTimeouts) -> None:
        self._connection = connection
        self._limit = limit
        self._timeouts = timeouts

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        return read_object_status(object_id, await self._connection.run("find", object_id))

    async def claim(self, object_id: ObjectId, claimant: str) -> Claim:
        duration = milliseconds(self._timeouts.claim_seconds)
        reply = await self._connection.run("claim", object_id, claimant, duration)
        if reply == 1:
            return Claim(won=True, status=ObjectStatus(fetch=None, failure=None))
        return Claim(won=False, status=read_object_status(object_id, reply))

    async def mark_queued(self, object_id: ObjectId, claimant: str) -> None:
        duration = milliseconds(self._timeouts.queued_seconds)
        await self._connection.run("mark_queued", object_id, claimant, duration)

    async def release_claim(self, object_id: ObjectId, claimant: str) -> None:
        await self._connection.run("withdraw", object_id, claimant)

    async def usage(self) -> Usage:
        reply = await self._connection.run("usage", "")
        used, reserved, objects, fetches, reconciled, churn = reply
        return Usage(self._limit, used, reserved, objects, fetches, bool(reconciled), churn)

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        if accesses:
            log = self._connection.keys.accesses
            bound = ("MAXLEN", "~", MAX_ACCESS_BATCHES)
            await self._connection.command("XADD", log, *bound, "*", "batch", pack_accesses(accesses))

    async def announce(self, announcement: Announcement) -> None:
        channel = self._connection.keys.channel
        try:
            await self._connection.command("PUBLISH", channel, pack_announcement(announcement))
        except StateStoreUnavailable as error:
            logger.debug("announcement_failed", topic=announcement.topic, reason=str(error))
