"""The verbs of fetchers: begin, renew and end a fetch."""

from __future__ import annotations

from shared.adapters.state_redis.requests import RedisRequests, milliseconds
from shared.domain.objects import ObjectId
from shared.ports.state_store import (
    AlreadyStored,
    BeginResult,
    Granted,
    HeldElsewhere,
    Lease,
    NeverFits,
    NoSpace,
    NotReconciled,
)


class RedisFetching(RedisRequests):
    """See the port for each verb."""

    async def begin(self, object_id: ObjectId, size: int, worker: str) -> BeginResult:
        lease = milliseconds(self._timeouts.lease_seconds)
        answer, *values = await self._connection.run("begin", object_id, size, worker, lease, self._limit)
        match answer:
            case b"granted":
                return Granted(Lease(object_id, values[0], size, worker), resumed=bool(values[1]))
            case b"stored":
                return AlreadyStored(generation=values[0])
            case b"held":
                return HeldElsewhere(seconds_left=values[0] / 1000)
            case b"no_space":
                return NoSpace(missing=values[0])
            case b"never_fits":
                return NeverFits()
            case _:
                return NotReconciled()

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        duration = milliseconds(self._timeouts.lease_seconds)
        return bool(await self._run_leased("renew", lease, duration, source or ""))

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        return bool(await self._run_leased("commit", lease, stored_at))

    async def park(self, lease: Lease) -> None:
        await self._run_leased("park", lease)

    async def release(self, lease: Lease) -> None:
        await self._run_leased("release", lease)

    async def record_failure(self, object_id: ObjectId, reason: str, seconds: float) -> None:
        await self._connection.run("record_failure", object_id, reason, milliseconds(seconds))

    async def request_space(self, object_id: ObjectId, size: int, seconds: float) -> None:
        await self._connection.run("want_space", object_id, size, milliseconds(seconds))

    async def forget(self, object_id: ObjectId, generation: int) -> bool:
        return bool(await self._connection.run("forget", object_id, generation))

    async def _run_leased(self, script: str, lease: Lease, *arguments: str | int | float) -> object:
        reply: object = await self._connection.run(
            script, lease.object_id, lease.token, lease.worker, *arguments
        )
        return reply
