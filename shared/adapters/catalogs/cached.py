"""The cache in front of a slow catalog: answers kept, one question an object, the last good answer when it is down."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from distributor_node.shared.domain.errors import CatalogUnavailable, StateStoreUnavailable
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.observability.metrics import CATALOG_LOOKUPS
from distributor_node.shared.ports.catalog import (
    CachedAnswer,
    CacheLookup,
    Catalog,
    CatalogStatus,
    SharedCatalogCache,
)

_Answer = TypeVar("_Answer")

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Times in seconds. `wait`: for an answer in all, the wait for one's turn while `max_in_flight` questions are under
    way included. `negative_ttl`: also for objects that cannot be had yet, not being accepted or without a source.
    `outage_pause`: after a failed question, stale answers are given at once for so long, instead of after another
    time-out each. `stale_wait`: how long a slow catalog is waited for where an object is known from before."""

    positive_ttl: float
    negative_ttl: float
    max_in_flight: int
    wait: float
    max_entries: int = 100_000
    outage_pause: float = 5.0
    stale_wait: float = 0.5
    buckets_ttl: float = 30.0


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: MediaObject | None
    fresh_until: float


class CachedCatalog:
    """Wraps any catalog. Answers older than their time to live are asked anew, yet kept for outages until the bounded
    cache (least recently asked first) drops them. A `does not exist` is kept likewise. With a shared cache, processes
    that share it ask once for all, and one that has just started knows what the others have learnt."""

    def __init__(
        self,
        inner: Catalog,
        limits: CacheLimits,
        clock: Callable[[], float] = time.monotonic,
        shared_cache: SharedCatalogCache | None = None,
    ) -> None:
        """`clock` in seconds; `open` and `close` are passed on to the inner catalog and the shared cache."""
        self._inner = inner
        self._limits = limits
        self._clock = clock
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
        """Ends the questions under way (their askers get CatalogUnavailable), then closes the inner catalog."""
        queries: list[asyncio.Task[Any]] = list(self._queries.values())
        if self._buckets_query is not None:
            queries.append(self._buckets_query)
        for query in queries:
            query.cancel()
        await asyncio.gather(*queries, return_exceptions=True)
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
        known = entry is not None and _is_available(entry.answer)
        try:
            # The question goes on when an asker who knows the object leaves it; its answer is for the next one.
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

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        return self._inner.list_objects(assignment)

    async def bucket_ids(self) -> Sequence[str]:
        """Anybody may ask for this, by /readyz and /buckets: one question at a time, its answer or failure kept."""
        if self._buckets is not None and self._clock() < self._buckets[1]:
            if isinstance(self._buckets[0], CatalogUnavailable):
                raise CatalogUnavailable(str(self._buckets[0]))
            return self._buckets[0]
        if self._buckets_query is None:
            self._buckets_query = asyncio.create_task(
                self._query_buckets(), name="catalog question of buckets"
            )
        return await _result_of(self._buckets_query)

    async def _query_buckets(self) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._limits.wait):
                buckets = await self._inner.bucket_ids()
        except TimeoutError as error:
            raise self._cache_buckets_failure(f"no list of buckets in {self._limits.wait:g} s") from error
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
            query = asyncio.create_task(self._query(object_id), name=f"catalog question {object_id}")
            self._queries[object_id] = query
        return await _result_of(query)

    async def _query(self, object_id: ObjectId) -> MediaObject | None:
        single_flight = SingleFlight(self._shared, object_id)
        try:
            async with asyncio.timeout(self._limits.wait):
                return await self._resolve(object_id, single_flight)
        except TimeoutError as error:
            self._store_stale(object_id, single_flight)
            raise CatalogUnavailable(f"the catalog gave no answer in {self._limits.wait:g} s") from error
        except CatalogUnavailable:
            self._store_stale(object_id, single_flight)
            raise
        finally:
            del self._queries[object_id]
            if single_flight.owns_lock:
                await self._shared.unlock(object_id)

    async def _resolve(self, object_id: ObjectId, single_flight: SingleFlight) -> MediaObject | None:
        """From the shared cache, or else from the inner catalog."""
        if self._clock() < self._down_until:
            single_flight.cached = await self._shared.get(object_id)
            if single_flight.cached is not None:
                raise CatalogUnavailable("the catalog was down a moment ago")
        cached = await single_flight.resolve()
        if cached is not None:
            CATALOG_LOOKUPS.labels(result="cached").inc()
            self._store(object_id, cached.answer, cached.fresh_for)
            return cached.answer
        async with self._slots:
            try:
                answer = await self._inner.look_up(object_id)
            except (CatalogUnavailable, asyncio.CancelledError):
                # Cancelled: the time was up, or the catalog is being closed, when nobody asks any more.
                self._down_until = self._clock() + self._limits.outage_pause
                raise
        CATALOG_LOOKUPS.labels(result="unknown" if answer is None else "found").inc()
        self._down_until = float("-inf")
        lifetime = self._limits.positive_ttl if _is_available(answer) else self._limits.negative_ttl
        self._store(object_id, answer, lifetime)
        await self._shared.put(object_id, answer, lifetime)
        single_flight.owns_lock = False
        return answer

    def _store_stale(self, object_id: ObjectId, single_flight: SingleFlight) -> None:
        """What the other processes knew is better than nothing, for this outage."""
        if single_flight.cached is not None and object_id not in self._entries:
            self._store(object_id, single_flight.cached.answer, single_flight.cached.fresh_for)

    def _store(self, object_id: ObjectId, answer: MediaObject | None, lifetime: float) -> None:
        self._entries[object_id] = _Entry(answer, self._clock() + lifetime)
        self._entries.move_to_end(object_id)
        while len(self._entries) > self._limits.max_entries:
            self._entries.popitem(last=False)


async def _result_of(query: asyncio.Task[_Answer]) -> _Answer:
    """Shielded: a question goes on without the asker who leaves, even the last one. It is bounded in time, its answer
    is kept for whoever asks next, and `close` ends it."""
    try:
        return await asyncio.shield(query)
    except asyncio.CancelledError:
        waiter = asyncio.current_task()
        if query.cancelled() and not (waiter is not None and waiter.cancelling()):
            raise CatalogUnavailable("the catalog is being closed") from None
        raise


def _is_available(answer: MediaObject | None) -> bool:
    return answer is not None and answer.accepted and bool(answer.sources)


# Answers shared by the node's processes: one of them asks, the others wait for what it learns.

_INITIAL_DELAY = 0.02
_MAX_DELAY = 0.25


@dataclass(frozen=True, slots=True)
class SharedCatalogTtls:
    """Seconds. `lock_ttl`: after which a process that asks counts as dead; `positive_retention`, `negative_retention`:
    how long answers are there for outages, whatever they are believed."""

    lock_ttl: float
    positive_retention: float = 7 * 24 * 3600.0
    negative_retention: float = 600.0


class SharedCatalog:
    """A shared catalog cache that may be missing or down: then every process asks for itself."""

    def __init__(self, shared_cache: SharedCatalogCache | None, ttls: SharedCatalogTtls) -> None:
        self._cache = shared_cache
        self._ttls = ttls
        self._owner = uuid.uuid4().hex
        self._reachable = True

    async def open(self) -> None:
        if self._cache is not None:
            await self._cache.open()

    async def close(self) -> None:
        if self._cache is not None:
            await self._cache.close()

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        """What is cached, without asking anybody."""
        if self._cache is None:
            return None
        try:
            cached = await self._cache.get(object_id)
        except StateStoreUnavailable as error:
            self._log_availability(error)
            return None
        self._log_availability(None)
        return cached

    async def get_or_lock(self, object_id: ObjectId) -> CacheLookup:
        if self._cache is None:
            return CacheLookup(None, owns_lock=True)
        try:
            lookup = await self._cache.get_or_lock(object_id, self._owner, self._ttls.lock_ttl)
        except StateStoreUnavailable as error:
            self._log_availability(error)
            return CacheLookup(None, owns_lock=True)
        self._log_availability(None)
        return lookup

    async def put(self, object_id: ObjectId, answer: MediaObject | None, fresh: float) -> None:
        """Tell the others; best effort. `fresh`: seconds the answer is believed."""
        if self._cache is None:
            return
        keep = self._ttls.negative_retention if answer is None else self._ttls.positive_retention
        try:
            await self._cache.put(object_id, answer, fresh, max(fresh, keep))
        except StateStoreUnavailable as error:
            self._log_availability(error)

    async def unlock(self, object_id: ObjectId) -> None:
        """Let another process ask; best effort, since the right runs out by itself."""
        if self._cache is None:
            return
        try:
            await self._cache.unlock(object_id, self._owner)
        except StateStoreUnavailable as error:
            self._log_availability(error)

    def _log_availability(self, error: StateStoreUnavailable | None) -> None:
        """Say once that the cache is lost, and once that it is back."""
        if error is not None and self._reachable:
            logger.warning("catalog_cache_unavailable", reason=str(error))
        elif error is None and not self._reachable:
            logger.info("catalog_cache_recovered")
        self._reachable = error is None


class SingleFlight:
    """One process's question about one object: whether it must be asked, and what is known if it fails."""

    def __init__(self, shared: SharedCatalog, object_id: ObjectId) -> None:
        self._shared = shared
        self._object_id = object_id
        self.cached: CachedAnswer | None = None
        self.owns_lock = False

    async def resolve(self) -> CachedAnswer | None:
        """A fresh answer, waiting for the process that asks; None: it is for us to ask. Unbounded: the caller has a
        time limit around all of it."""
        delay = _INITIAL_DELAY
        while True:
            lookup = await self._shared.get_or_lock(self._object_id)
            self.cached = lookup.cached or self.cached
            if lookup.owns_lock:
                self.owns_lock = True
                return None
            if lookup.cached is not None and lookup.cached.fresh_for > 0:
                return lookup.cached
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY)
