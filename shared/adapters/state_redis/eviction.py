"""The leader's verbs: eviction, reconciliation, policy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from shared.adapters.state_redis.fetching import RedisFetching
from shared.adapters.state_redis.records import read_accesses, read_entry, read_fetch
from shared.adapters.state_redis.requests import milliseconds
from shared.domain.objects import ObjectId
from shared.ports.state_store import Access, Fetch, IndexEntry, Lease, PolicyState, Term

_ENTRIES_BATCH = 1000


class RedisEviction(RedisFetching):
    """See the port for each verb."""

    async def lead(self, holder: str, seconds: float) -> Term | None:
        token = await self._connection.run("lead", "", holder, milliseconds(seconds))
        return Term(holder, token) if token else None

    async def resign(self, term: Term) -> None:
        await self._run_as_leader("resign", term)

    async def space_requested(self) -> int:
        return int(await self._connection.run("space_wanted", ""))

    async def begin_eviction(
        self, term: Term, object_id: ObjectId, min_idle: float, *, even_pinned: bool = False
    ) -> bool:
        arguments = (min_idle, int(even_pinned), object_id)
        return (await self._query_as_leader("begin_eviction", term, *arguments)) == [1]

    async def finish_eviction(self, term: Term, object_id: ObjectId) -> int:
        [freed] = await self._query_as_leader("finish_eviction", term, object_id)
        return freed

    async def begin_evictions(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[bool]:
        begun = await self._query_as_leader("begin_eviction", term, min_idle, 0, *object_ids)
        return [answer == 1 for answer in begun]

    async def finish_evictions(self, term: Term, object_ids: Sequence[ObjectId]) -> Sequence[int]:
        return await self._query_as_leader("finish_eviction", term, *object_ids)

    async def cancel_eviction(self, term: Term, object_id: ObjectId) -> None:
        await self._run_as_leader("cancel_eviction", term, object_id)

    async def adopt(self, term: Term, entry: IndexEntry) -> bool:
        [adopted] = await self.adopt_many(term, [entry])
        return adopted

    async def adopt_many(self, term: Term, entries: Sequence[IndexEntry]) -> Sequence[bool]:
        values: list[str | int | float] = []
        for entry in entries:
            values += (entry.object_id, entry.size, entry.frequency, entry.last_access, entry.priority)
        return [answer == 1 for answer in await self._query_as_leader("adopt", term, *values)]

    async def adopt_partial(self, term: Term, object_id: ObjectId, size: int) -> bool:
        return bool(await self._run_as_leader("adopt_partial", term, object_id, size))

    async def steal_lease(self, term: Term, object_id: ObjectId) -> Lease | None:
        duration = milliseconds(self._timeouts.lease_seconds)
        reply = await self._run_as_leader("seize", term, object_id, term.holder, duration)
        if not isinstance(reply, list):
            return None
        token, size = reply
        return Lease(object_id, token, size, term.holder)

    async def recount(self, term: Term, *, entries: bool = True) -> int:
        return int(str(await self._run_as_leader("recount", term, "", int(entries))))

    async def set_reconciled(self, term: Term) -> None:
        await self._run_as_leader("set_accounted", term)

    async def entries(self) -> AsyncIterator[Sequence[IndexEntry]]:
        cursor = 0
        while True:
            scan = ("HSCAN", self._connection.keys.objects, cursor, "COUNT", _ENTRIES_BATCH)
            cursor, found = await self._connection.command(*scan)
            if found:
                yield [read_entry(object_id, packed) for object_id, packed in found.items()]
            if cursor == 0:
                return

    async def fetches(self) -> Sequence[Fetch]:
        found = await self._connection.run("fetches", "")
        return [read_fetch(ObjectId(object_id.decode()), shown) for object_id, shown in found]

    async def read_accesses(self, position: str, at_most: int) -> tuple[str, Sequence[Access]]:
        after = f"({position}" if position else "-"
        log = self._connection.keys.accesses
        batches = await self._connection.command("XRANGE", log, after, "+", "COUNT", at_most)
        accesses: list[Access] = []
        for batch_id, fields in batches:
            accesses.extend(read_accesses(fields[b"batch"]))
            position = batch_id.decode()
        return position, accesses

    async def load_policy_state(self) -> PolicyState:
        found = await self._connection.command("HMGET", self._connection.keys.policy, "inflation", "position")
        inflation, position = found
        return PolicyState(float(inflation or 0), (position or b"").decode())

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        values: list[str | int | float] = []
        for entry in entries:
            values += (entry.object_id, entry.frequency, entry.last_access, entry.priority)
        await self._run_as_leader("save_policy", term, "", state.inflation, state.position, *values)

    async def _run_as_leader(
        self, script: str, term: Term, object_id: ObjectId | str = "", *arguments: str | int | float
    ) -> object:
        term_value = f"{term.token} {term.holder}"
        reply: object = await self._connection.run(script, object_id, term_value, *arguments)
        return reply

    async def _query_as_leader(self, script: str, term: Term, *arguments: str | int | float) -> list[int]:
        """A script about many objects: one number for each."""
        reply = await self._run_as_leader(script, term, "", *arguments)
        return reply if isinstance(reply, list) else []
