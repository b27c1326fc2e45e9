"""The cache in front of a slow catalog.

Answers are cached. Concurrent look-ups of one object share one query, and a query asks for many objects (`batches.py`).
When the catalog is down, stale answers are returned. Where the processes of a node share a cache, one of them asks and
the others wait for its answer (`shared_answers.py`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog

from distributor_node.shared.adapters.catalogs.batches import BatchLimits, LookupBatcher
from distributor_node.shared.adapters.catalogs.shared_answers import (
    SharedCatalog,
    SharedCatalogTtls,
    SingleFlight,
)
from distributor_node.shared.adapters.volume.known_ids import KnownIds
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    LookupRefused,
    ObjectUnavailable,
    QueryRejected,
)
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.observability.metrics import CATALOG_LOOKUPS, CATALOG_REFUSED
from distributor_node.shared.ports.catalog import CatalogStatus, RemoteCatalog, SharedCatalogCache
from distributor_node.shared.waiting import cancel_and_wait

_Answer = TypeVar("_Answer")

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Limits of the cache. Times in seconds."""

    positive_ttl: float
    negative_ttl: (
        float  # for "does not exist", also for objects without a source; doubles while it is asked for
    )
    max_in_flight: int  # queries under way at once
    wait: float  # of one client for one answer
    query_timeout: float = 5.0  # of one query, which goes on when its clients have left
    max_rate: float = math.inf  # queries a second
    max_unseen_rate: float = math.inf  # objects a second that this node has not known before
    unaccepted_ttl: float = 3.0  # for "not accepted yet", which soon changes
    max_negative_ttl: float = 60.0  # up to which `negative_ttl` doubles
    max_entries: int = 100_000
    outage_pause: float = 5.0  # after a failed query, stale answers are returned at once for so long
    stale_wait: float = 0.5  # how long a look-up waits for a slow catalog if it has a stale answer
    buckets_ttl: float = 30.0


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: MediaObject | None
    stored_at: float
    lifetime: float  # seconds from `stored_at`
    outdated: bool = False  # known to be no longer true; kept for outages only

    @property
    def fresh_until(self) -> float:
        return self.stored_at + self.lifetime


class _Lookup:
    """One look-up under way, and those that wait for it."""

    def __init__(self, client: str, *, seen_before: bool, is_repeated: bool) -> None:
        self.clients = {client: None}  # an ordered set
        self.waiting = 0
        self.seen_before = seen_before
        self.is_repeated = is_repeated  # another look-up of this process is overdue
        self.overdue_at = math.inf  # monotonic seconds
        self.task: asyncio.Task[MediaObject | None] | None = None


_FAILURES_OF_OUTAGE = 3
"""Failed queries in a row that count as an outage until one is answered. Fewer may all be of one object."""

_THIS_NODE = ""  # the client of look-ups that the node makes for itself


class CachedCatalog:
    """Wraps any catalog.

    An answer past its time to live is asked for again, but kept for outages until the bounded cache drops it (least
    recently used first). The answer "does not exist" is cached likewise. With a shared cache, a process that has just
    started has the answers of the others.
    """

    def __init__(
        self,
        inner: RemoteCatalog,
        limits: CacheLimits,
        clock: Callable[[], float] = time.monotonic,
        shared_cache: SharedCatalogCache | None = None,
        assignment: Assignment | None = None,
        known_ids: KnownIds | None = None,
    ) -> None:
        """`clock`: in seconds. `known_ids`: look-ups of these go first.

        `open` and `close` also open and close the inner catalog, the shared cache and the known ids.
        """
        self._inner = inner
        self._limits = limits
        self._clock = clock
        self._assignment = assignment or Assignment()
        self._shared = SharedCatalog(shared_cache, SharedCatalogTtls(lock_ttl=limits.wait + 0.5))
        self._known_ids = known_ids
        # By worker; None: all buckets. An operator's command may name a few workers in the life of a process.
        self._buckets: dict[int | None, tuple[Sequence[str] | CatalogUnavailable, float]] = {}
        self._bucket_queries: dict[int | None, asyncio.Task[Sequence[str]]] = {}
        self._entries: OrderedDict[ObjectId, _Entry] = OrderedDict()
        self._lookups: dict[ObjectId, _Lookup] = {}  # that new clients join
        self._tasks: set[asyncio.Task[MediaObject | None]] = set()  # of these and of overdue ones
        batch_limits = BatchLimits(
            limits.max_in_flight, limits.max_rate, limits.query_timeout, limits.wait, limits.max_unseen_rate
        )
        self._batcher = LookupBatcher(inner, batch_limits, self._note_outcome)
        self._down_until = float("-inf")
        self._failed_in_a_row = 0  # queries
        self._answered_at = float("-inf")  # monotonic seconds

    @property
    def can_list(self) -> bool:
        return self._inner.can_list

    @property
    def public_url(self) -> str:
        return self._inner.public_url

    @property
    def lookups_fail(self) -> bool:
        """After one failed query for `outage_pause`, after several in a row until the catalog answers again."""
        return self._failed_in_a_row >= _FAILURES_OF_OUTAGE or self._clock() < self._down_until

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return self._inner.sources_of(object_id)

    async def open(self) -> None:
        await self._shared.open()
        await self._inner.open()
        if self._known_ids is not None:
            await self._known_ids.open()

    async def close(self) -> None:
        """Cancel the queries under way (their callers get CatalogUnavailable), then close the inner catalog."""
        await self._batcher.close()
        queries: list[asyncio.Task[Any]] = [*self._tasks, *self._bucket_queries.values()]
        await cancel_and_wait(*queries)
        if self._known_ids is not None:
            await self._known_ids.close()
        await self._inner.close()
        await self._shared.close()

    def can_have(self, object_id: ObjectId) -> bool:
        return self._inner.can_have(object_id)

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        if not self._inner.can_have(object_id):
            return None
        entry = self._entries.get(object_id)
        if entry is not None:
            self._entries.move_to_end(object_id)
            now = self._clock()
            if now < entry.fresh_until or now < self._down_until:
                CATALOG_LOOKUPS.labels(result="cached" if now < entry.fresh_until else "stale").inc()
                return entry.answer
        known = entry is not None and _is_available(entry.answer) and not entry.outdated
        try:
            # When the time is up, this caller gets the stale answer. The query goes on, for the next caller.
            async with asyncio.timeout(self._limits.stale_wait if known else None):
                return await self._join_lookup(object_id, client)
        except (CatalogUnavailable, TimeoutError) as error:
            entry = self._entries.get(object_id)
            if entry is None:
                refused = isinstance(error, LookupRefused)
                CATALOG_LOOKUPS.labels(result="refused" if refused else "unavailable").inc()
                raise
            CATALOG_LOOKUPS.labels(result="stale").inc()
            logger.warning("catalog_entry_served_stale", object_id=object_id, reason=str(error) or "slow")
            return entry.answer

    async def forget(self, outdated: MediaObject) -> None:
        entry = self._entries.get(outdated.object_id)
        if entry is not None and entry.answer == outdated:
            self._entries[outdated.object_id] = replace(entry, lifetime=0.0, outdated=True)
        await self._shared.expire(outdated)

    async def forget_object(self, object_id: ObjectId) -> None:
        known = {self._entries[object_id].answer} if object_id in self._entries else set()
        shared = await self._shared.get(object_id)
        if shared is not None:
            known.add(shared.answer)
        for answer in known:
            if answer is not None:
                await self.forget(answer)
            else:
                self._entries.pop(object_id, None)

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        return self._inner.list_objects(assignment)

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        """See the port. Any client can cause this, by /readyz and /buckets: so one query at a time, its result cached.

        A failure is cached too, for `outage_pause`.
        """
        found, fresh_until = self._buckets.get(worker_id, ((), float("-inf")))
        if self._clock() < fresh_until:
            if isinstance(found, CatalogUnavailable):
                raise type(found)(str(found))
            return found
        query = self._bucket_queries.get(worker_id)
        if query is None:
            query = asyncio.create_task(self._query_buckets(worker_id), name="catalog-buckets")
            self._bucket_queries[worker_id] = query
        try:
            async with asyncio.timeout(self._limits.wait):
                return await _result_of(query)
        except TimeoutError as error:
            raise CatalogUnavailable(
                f"the catalog did not list its buckets within {self._limits.wait:g} s"
            ) from error

    async def _query_buckets(self, worker_id: int | None) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._limits.query_timeout):
                buckets = await self._inner.bucket_ids(worker_id)
        except TimeoutError as error:
            failure = CatalogUnavailable(
                f"the catalog did not list its buckets within {self._limits.query_timeout:g} s"
            )
            raise self._cache_buckets_failure(worker_id, failure) from error
        except QueryRejected as error:
            raise self._cache_buckets_failure(worker_id, QueryRejected(str(error))) from error
        except CatalogUnavailable as error:
            raise self._cache_buckets_failure(worker_id, CatalogUnavailable(str(error))) from error
        else:
            self._buckets[worker_id] = (buckets, self._clock() + self._limits.buckets_ttl)
            if buckets:
                # The server replies. Without this, a node that has no misses would call it down for ever. A catalog
                # without buckets, such as an origin, returns none without asking.
                self._failed_in_a_row = 0
            return buckets
        finally:
            del self._bucket_queries[worker_id]

    def _cache_buckets_failure(
        self, worker_id: int | None, failure: CatalogUnavailable
    ) -> CatalogUnavailable:
        self._buckets[worker_id] = (failure, self._clock() + self._limits.outage_pause)
        return failure

    async def source_bases(self) -> Sequence[str]:
        return await self._inner.source_bases()

    async def status(self) -> CatalogStatus:
        return await self._inner.status()

    async def chain_head(self) -> int | None:
        return await self._inner.chain_head()

    async def _join_lookup(self, object_id: ObjectId, client: str | None) -> MediaObject | None:
        """Wait for the look-up of the object that is under way, or begin one. The wait is this client's own.

        If the query was sent and is overdue, begin another one: it may never be answered, though the catalog is well by
        now. The first answer of either counts.
        """
        name = _THIS_NODE if client is None else client
        lookup = self._lookups.get(object_id)
        overdue = lookup is not None and time.monotonic() >= lookup.overdue_at
        if lookup is None or (overdue and not self._batcher.is_queued(object_id)):
            if object_id.is_digest and object_id.path == object_id:
                return await self._recall(object_id)
            lookup = self._begin_lookup(object_id, name, is_repeated=lookup is not None)
        else:
            lookup.clients[name] = None
            self._batcher.add_client(object_id, name)
        wait = self._limits.wait + (self._limits.query_timeout if client is None else 0.0)
        lookup.waiting += 1
        try:
            assert lookup.task is not None  # noqa: S101
            return await self._wait_for(lookup.task, object_id, wait)
        except TimeoutError as error:
            if self._batcher.is_queued(object_id):
                CATALOG_REFUSED.labels(reason="no_turn").inc()
                message = f"too many look-ups wait for the catalog: no turn within {wait:g} s"
                raise LookupRefused(message, "no_turn") from error
            raise CatalogUnavailable(f"the catalog did not answer within {wait:g} s") from error
        finally:
            lookup.waiting -= 1
            if not lookup.waiting and self._lookups.get(object_id) is lookup:
                self._batcher.withdraw(object_id)

    async def _recall(self, object_id: ObjectId) -> MediaObject | None:
        """Return what the processes of this node know of a digest without its path, which the catalog cannot be asked
        for. A look-up of it would fail for the clients that join it and know the path, too."""
        cached = await self._shared.get(object_id)
        if cached is not None and (cached.fresh_for > 0 or object_id not in self._entries):
            self._store(object_id, cached.answer, cached.fresh_for)
        if cached is not None and cached.fresh_for > 0:
            CATALOG_LOOKUPS.labels(result="cached").inc()
            return cached.answer
        raise ObjectUnavailable("the digest does not tell at which path the catalog has the object")

    async def _wait_for(
        self, task: asyncio.Task[MediaObject | None], object_id: ObjectId, wait: float
    ) -> MediaObject | None:
        """Wait at most `wait`; half of it more if the query was sent and the catalog has answered others since."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(wait):
                return await _result_of(task)
        except TimeoutError:
            if self._answered_at < began or self._batcher.is_queued(object_id):
                raise
        async with asyncio.timeout(wait / 2):
            return await _result_of(task)

    def _begin_lookup(self, object_id: ObjectId, client: str, *, is_repeated: bool) -> _Lookup:
        entry = self._entries.get(object_id)
        listed = self._known_ids is not None and object_id in self._known_ids
        seen_before = listed or (entry is not None and entry.answer is not None)
        lookup = self._lookups[object_id] = _Lookup(client, seen_before=seen_before, is_repeated=is_repeated)
        lookup.overdue_at = time.monotonic() + self._limits.wait
        lookup.task = asyncio.create_task(
            self._look_up(object_id, lookup), name=f"catalog-lookup-{object_id}"
        )
        self._tasks.add(lookup.task)
        lookup.task.add_done_callback(self._lookup_done)
        return lookup

    def _lookup_done(self, task: asyncio.Task[MediaObject | None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, so that a failure that no one waits for is not logged as one of ours

    async def _look_up(self, object_id: ObjectId, lookup: _Lookup) -> MediaObject | None:
        single_flight = SingleFlight(self._shared, object_id)
        try:
            return await self._resolve(object_id, lookup, single_flight)
        except CatalogUnavailable:
            self._store_stale(object_id, single_flight)
            raise
        finally:
            if self._lookups.get(object_id) is lookup:
                del self._lookups[object_id]
            if single_flight.owns_lock:
                await self._shared.unlock(object_id)

    async def _resolve(
        self, object_id: ObjectId, lookup: _Lookup, single_flight: SingleFlight
    ) -> MediaObject | None:
        """Return the answer of the shared cache, or else of the inner catalog."""
        if self._clock() < self._down_until:
            single_flight.cached = await self._shared.get(object_id)
            if single_flight.cached is not None:
                raise CatalogUnavailable("the catalog failed a moment ago")
        if lookup.is_repeated:
            # This process holds the lock already, or has held it until it expired.
            single_flight.owns_lock = True
            cached = None
        else:
            cached = await single_flight.resolve(lambda: lookup.waiting > 0)
        if cached is not None:
            CATALOG_LOOKUPS.labels(result="cached").inc()
            self._store(object_id, cached.answer, cached.fresh_for)
            return cached.answer
        answer = await self._query(object_id, lookup, single_flight)
        CATALOG_LOOKUPS.labels(result="unknown" if answer is None else "found").inc()
        lifetime = self._lifetime_of(object_id, answer)
        self._store(object_id, answer, lifetime)
        needed = answer is not None and _is_available(answer) and self._assignment.covers(answer)
        self._shared.put(object_id, answer, lifetime, needed=needed, used=single_flight.cached is not None)
        single_flight.owns_lock = False
        return answer

    async def _query(
        self, object_id: ObjectId, lookup: _Lookup, single_flight: SingleFlight
    ) -> MediaObject | None:
        cached = single_flight.cached
        seen_before = lookup.seen_before or (cached is not None and cached.answer is not None)
        try:
            return await self._batcher.look_up(object_id, lookup.clients, seen_before=seen_before)
        except LookupRefused as error:
            if error.reason == "queue_full":
                CATALOG_REFUSED.labels(reason=error.reason).inc(max(1, lookup.waiting))
            raise

    def _note_outcome(self, answered: bool) -> None:
        if answered:
            self._answered_at = time.monotonic()
        self._failed_in_a_row = 0 if answered else self._failed_in_a_row + 1
        self._down_until = float("-inf") if answered else self._clock() + self._limits.outage_pause

    def _lifetime_of(self, object_id: ObjectId, answer: MediaObject | None) -> float:
        """Of a new answer, in seconds."""
        limits = self._limits
        if _is_available(answer):
            return limits.positive_ttl
        if answer is not None and not answer.accepted:
            return limits.unaccepted_ttl
        last = self._entries.get(object_id)
        if last is None or last.answer != answer or self._clock() - last.fresh_until > last.lifetime:
            return limits.negative_ttl
        longest = max(limits.max_negative_ttl, limits.negative_ttl)
        return min(longest, max(limits.negative_ttl, 2 * last.lifetime))

    def _store_stale(self, object_id: ObjectId, single_flight: SingleFlight) -> None:
        """Keep the stale answer of the shared cache, for the time of this outage."""
        if single_flight.cached is not None and object_id not in self._entries:
            self._store(object_id, single_flight.cached.answer, single_flight.cached.fresh_for)

    def _store(self, object_id: ObjectId, answer: MediaObject | None, lifetime: float) -> None:
        self._entries[object_id] = _Entry(answer, self._clock(), lifetime)
        self._entries.move_to_end(object_id)
        while len(self._entries) > self._limits.max_entries:
            self._entries.popitem(last=False)


async def _result_of(query: asyncio.Task[_Answer]) -> _Answer:
    """Wait for a query that goes on if this caller is cancelled.

    Its answer is cached for the next caller. It is bounded in time, and `close` cancels it.
    """
    try:
        return await asyncio.shield(query)
    except asyncio.CancelledError:
        waiter = asyncio.current_task()
        if query.cancelled() and not (waiter is not None and waiter.cancelling()):
            raise CatalogUnavailable("the catalog is being closed") from None
        raise


def _is_available(answer: MediaObject | None) -> bool:
    return answer is not None and answer.accepted and bool(answer.sources) and answer.not_stored is None


# Answers shared by the node's processes: one of them asks, the others wait for its answer.
