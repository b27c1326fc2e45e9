"""The cache in front of a slow catalog.

Answers are cached. Concurrent look-ups of one object share one query. When the catalog is down, stale answers are
returned. Where the processes of a node share a cache, one of them asks and the others wait for its answer.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    ObjectUnavailable,
    StateStoreUnavailable,
)
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import CATALOG_LOOKUPS
from distributor_node.shared.ports.catalog import (
    CachedAnswer,
    CacheLookup,
    Catalog,
    CatalogStatus,
    SharedCatalogCache,
)
from distributor_node.shared.waiting import Backoff, cancel_and_wait

_Answer = TypeVar("_Answer")

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Limits of the cache. Times in seconds."""

    positive_ttl: float
    negative_ttl: float  # also for objects that are not accepted yet, or have no source
    max_in_flight: int  # queries under way at once
    wait: float  # for one answer, including the wait for a slot among `max_in_flight`
    max_entries: int = 100_000
    outage_pause: float = 5.0  # after a failed query, stale answers are returned at once for so long
    stale_wait: float = 0.5  # how long a look-up waits for a slow catalog if it has a stale answer
    buckets_ttl: float = 30.0


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: MediaObject | None
    fresh_until: float
    outdated: bool = False  # known to be no longer true; kept for outages only


class CachedCatalog:
    """Wraps any catalog.

    An answer past its time to live is asked for again, but kept for outages until the bounded cache drops it (least
    recently used first). The answer "does not exist" is cached likewise. With a shared cache, a process that has just
    started has the answers of the others.
    """

    def __init__(
        self,
        inner: Catalog,
        limits: CacheLimits,
        clock: Callable[[], float] = time.monotonic,
        shared_cache: SharedCatalogCache | None = None,
        assignment: Assignment | None = None,
    ) -> None:
        """`clock`: in seconds. `open` and `close` also open and close the inner catalog and the shared cache."""
        self._inner = inner
        self._limits = limits
        self._clock = clock
        self._assignment = assignment or Assignment()
        self._shared = SharedCatalog(shared_cache, SharedCatalogTtls(lock_ttl=limits.wait + 0.5))
        self._buckets: tuple[Sequence[str] | CatalogUnavailable, float] | None = None
        self._buckets_query: asyncio.Task[Sequence[str]] | None = None
        self._entries: OrderedDict[ObjectId, _Entry] = OrderedDict()
        self._queries: dict[ObjectId, asyncio.Task[MediaObject | None]] = {}
        self._slots = asyncio.Semaphore(limits.max_in_flight)
        self._down_until = float("-inf")

    @property
    def can_list(self) -> bool:
        return self._inner.can_list

    @property
    def public_url(self) -> str:
        return self._inner.public_url

    async def open(self) -> None:
        await self._shared.open()
        await self._inner.open()

    async def close(self) -> None:
        """Cancel the queries under way (their callers get CatalogUnavailable), then close the inner catalog."""
        queries: list[asyncio.Task[Any]] = list(self._queries.values())
        if self._buckets_query is not None:
            queries.append(self._buckets_query)
        await cancel_and_wait(*queries)
        await self._inner.close()
        await self._shared.close()

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
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
                return await self._join_query(object_id)
        except (CatalogUnavailable, TimeoutError) as error:
            entry = self._entries.get(object_id)
            if entry is None:
                CATALOG_LOOKUPS.labels(result="unavailable").inc()
                raise
            CATALOG_LOOKUPS.labels(result="stale").inc()
            logger.warning("catalog_entry_served_stale", object_id=object_id, reason=str(error) or "slow")
            return entry.answer

    async def forget(self, outdated: MediaObject) -> None:
        entry = self._entries.get(outdated.object_id)
        if entry is not None and entry.answer == outdated:
            self._entries[outdated.object_id] = _Entry(outdated, float("-inf"), outdated=True)
        await self._shared.expire(outdated)

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        return self._inner.list_objects(assignment)

    async def bucket_ids(self) -> Sequence[str]:
        """See the port. Any client can cause this, by /readyz and /buckets: so one query at a time, its result cached.

        A failure is cached too, for `outage_pause`.
        """
        if self._buckets is not None and self._clock() < self._buckets[1]:
            if isinstance(self._buckets[0], CatalogUnavailable):
                raise CatalogUnavailable(str(self._buckets[0]))
            return self._buckets[0]
        if self._buckets_query is None:
            self._buckets_query = asyncio.create_task(self._query_buckets(), name="catalog-buckets")
        return await _result_of(self._buckets_query)

    async def _query_buckets(self) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._limits.wait):
                buckets = await self._inner.bucket_ids()
        except TimeoutError as error:
            raise self._cache_buckets_failure(
                f"the catalog did not list its buckets within {self._limits.wait:g} s"
            ) from error
        except CatalogUnavailable as error:
            raise self._cache_buckets_failure(str(error)) from error
        else:
            self._buckets = (buckets, self._clock() + self._limits.buckets_ttl)
            return buckets
        finally:
            self._buckets_query = None

    def _cache_buckets_failure(self, reason: str) -> CatalogUnavailable:
        failure = CatalogUnavailable(reason)
        self._buckets = (failure, self._clock() + self._limits.outage_pause)
        return failure

    async def source_bases(self) -> Sequence[str]:
        return await self._inner.source_bases()

    async def status(self) -> CatalogStatus:
        return await self._inner.status()

    async def chain_head(self) -> int | None:
        return await self._inner.chain_head()

    async def _join_query(self, object_id: ObjectId) -> MediaObject | None:
        query = self._queries.get(object_id)
        if query is None:
            query = asyncio.create_task(self._query(object_id), name=f"catalog-lookup-{object_id}")
            self._queries[object_id] = query
        return await _result_of(query)

    async def _query(self, object_id: ObjectId) -> MediaObject | None:
        single_flight = SingleFlight(self._shared, object_id)
        try:
            async with asyncio.timeout(self._limits.wait):
                return await self._resolve(object_id, single_flight)
        except TimeoutError as error:
            self._store_stale(object_id, single_flight)
            raise CatalogUnavailable(f"the catalog did not answer within {self._limits.wait:g} s") from error
        except CatalogUnavailable:
            self._store_stale(object_id, single_flight)
            raise
        finally:
            del self._queries[object_id]
            if single_flight.owns_lock:
                await self._shared.unlock(object_id)

    async def _resolve(self, object_id: ObjectId, single_flight: SingleFlight) -> MediaObject | None:
        """Return the answer of the shared cache, or else of the inner catalog."""
        if self._clock() < self._down_until:
            single_flight.cached = await self._shared.get(object_id)
            if single_flight.cached is not None:
                raise CatalogUnavailable("the catalog failed a moment ago")
        cached = await single_flight.resolve()
        if cached is not None:
            CATALOG_LOOKUPS.labels(result="cached").inc()
            self._store(object_id, cached.answer, cached.fresh_for)
            return cached.answer
        async with self._slots:
            try:
                answer = await self._inner.look_up(object_id)
            except ObjectUnavailable:
                raise
            except (CatalogUnavailable, asyncio.CancelledError):
                # Cancelled: the time is up (or the catalog is being closed, and the pause has no effect).
                self._down_until = self._clock() + self._limits.outage_pause
                raise
        CATALOG_LOOKUPS.labels(result="unknown" if answer is None else "found").inc()
        self._down_until = float("-inf")
        lifetime = self._limits.positive_ttl if _is_available(answer) else self._limits.negative_ttl
        self._store(object_id, answer, lifetime)
        needed = answer is not None and _is_available(answer) and self._assignment.covers(answer)
        await self._shared.put(
            object_id, answer, lifetime, needed=needed, used=single_flight.cached is not None
        )
        single_flight.owns_lock = False
        return answer

    def _store_stale(self, object_id: ObjectId, single_flight: SingleFlight) -> None:
        """Keep the stale answer of the shared cache, for the time of this outage."""
        if single_flight.cached is not None and object_id not in self._entries:
            self._store(object_id, single_flight.cached.answer, single_flight.cached.fresh_for)

    def _store(self, object_id: ObjectId, answer: MediaObject | None, lifetime: float) -> None:
        self._entries[object_id] = _Entry(answer, self._clock() + lifetime)
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
    return answer is not None and answer.accepted and bool(answer.sources)


# Answers shared by the node's processes: one of them asks, the others wait for its answer.

_FIRST_POLL, _MAX_POLL = 0.02, 0.25  # seconds between two looks at the shared cache


@dataclass(frozen=True, slots=True)
class SharedCatalogTtls:
    """Times to live in the shared cache, in seconds."""

    lock_ttl: float  # after so long, the process that holds the lock counts as dead
    positive_retention: float = 7 * 24 * 3600.0  # how long answers are kept for outages, fresh or stale
    unused_retention: float = 24 * 3600.0  # likewise, until the object is asked for again
    negative_retention: float = (
        600.0  # likewise, for objects that do not exist, or that this node does not serve
    )


class SharedCatalog:
    """The shared catalog cache, which may be absent or down: then every process asks for itself."""

    def __init__(self, shared_cache: SharedCatalogCache | None, ttls: SharedCatalogTtls) -> None:
        self._cache = shared_cache
        self._ttls = ttls
        self._owner = uuid.uuid4().hex
        self._outage = OutageLog(logger, down="catalog_cache_unavailable", up="catalog_cache_recovered")

    async def open(self) -> None:
        if self._cache is not None:
            await self._cache.open()

    async def close(self) -> None:
        if self._cache is not None:
            await self._cache.close()

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        """Read the cached answer without taking the lock."""
        if self._cache is None:
            return None
        try:
            cached = await self._cache.get(object_id)
        except StateStoreUnavailable as error:
            self._outage.failed(error)
            return None
        self._outage.succeeded()
        return cached

    async def get_or_lock(self, object_id: ObjectId) -> CacheLookup:
        if self._cache is None:
            return CacheLookup(None, owns_lock=True)
        try:
            lookup = await self._cache.get_or_lock(object_id, self._owner, self._ttls.lock_ttl)
        except StateStoreUnavailable as error:
            self._outage.failed(error)
            return CacheLookup(None, owns_lock=True)
        self._outage.succeeded()
        return lookup

    async def put(
        self, object_id: ObjectId, answer: MediaObject | None, fresh: float, *, needed: bool, used: bool
    ) -> None:
        """Share an answer; best effort.

        `fresh`: seconds of its time to live. `needed`: the object is served by this node. `used`: it was asked for
        before, so it is kept long. Only so are half a million objects that one client asks for once no burden.
        """
        if self._cache is None:
            return
        keep = self._ttls.positive_retention if used else self._ttls.unused_retention
        if not needed:
            keep = self._ttls.negative_retention
        try:
            await self._cache.put(object_id, answer, fresh, max(fresh, keep))
        except StateStoreUnavailable as error:
            self._outage.failed(error)

    async def expire(self, outdated: MediaObject) -> None:
        """Make an answer stale; best effort."""
        if self._cache is None:
            return
        try:
            await self._cache.expire(outdated)
        except StateStoreUnavailable as error:
            self._outage.failed(error)

    async def unlock(self, object_id: ObjectId) -> None:
        """Release the lock; best effort, since it expires by itself."""
        if self._cache is None:
            return
        try:
            await self._cache.unlock(object_id, self._owner)
        except StateStoreUnavailable as error:
            self._outage.failed(error)


class SingleFlight:
    """One query for one object, made by at most one of the processes that share the cache."""

    def __init__(self, shared: SharedCatalog, object_id: ObjectId) -> None:
        self._shared = shared
        self._object_id = object_id
        self.cached: CachedAnswer | None = None  # the last answer seen in the shared cache, perhaps stale
        self.owns_lock = False

    async def resolve(self) -> CachedAnswer | None:
        """Wait for a fresh answer of the process that holds the lock. None: this process holds it, and must ask.

        There is no time limit: the caller sets one.
        """
        poll = Backoff(_FIRST_POLL, _MAX_POLL, jitter=False)
        while True:
            lookup = await self._shared.get_or_lock(self._object_id)
            self.cached = lookup.cached or self.cached
            if lookup.owns_lock:
                self.owns_lock = True
                return None
            if lookup.cached is not None and lookup.cached.fresh_for > 0:
                return lookup.cached
            await poll.wait()
