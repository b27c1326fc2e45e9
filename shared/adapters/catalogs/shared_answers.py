"""Catalog answers that the processes of a node share: one of them asks, the others wait for its answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from distributor_node.shared.domain.errors import LookupRefused, StateStoreUnavailable
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.ports.catalog import CachedAnswer, CacheLookup, NewAnswer, SharedCatalogCache
from distributor_node.shared.waiting import Backoff

_FIRST_POLL, _MAX_POLL = 0.02, 0.25  # seconds between two looks at the shared cache
_MAX_ROUND_TRIP = 100  # objects in one call of the shared cache
_GATHER_ANSWERS = 0.01  # seconds that an answer waits for others to be shared with
_READ_SPACING = 0.005
"""Seconds between the begins of two reads. Requests begin in turns of the event loop of their own, so a round trip is
over before the next one comes: without this, each of a crowd would have a round trip for itself."""

logger = structlog.get_logger()


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
        self._asked: list[tuple[ObjectId, asyncio.Future[CacheLookup]]] = []
        self._asking: asyncio.Task[None] | None = None
        self._ask_at = 0.0  # when the next read may begin, on the loop's clock
        self._new: list[NewAnswer] = []
        self._putting: asyncio.Task[None] | None = None

    async def open(self) -> None:
        if self._cache is not None:
            await self._cache.open()

    async def close(self) -> None:
        """No look-up may wait any more."""
        if self._cache is not None:
            if self._asking is not None:
                await asyncio.wait({self._asking})
            await self._all_put()
            await self._cache.close()

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        """Read the cached answer without taking the lock."""
        if self._cache is None:
            return None
        await self._all_put()
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
        result: asyncio.Future[CacheLookup] = asyncio.get_running_loop().create_future()
        self._asked.append((object_id, result))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(self._cache), name="catalog-cache-get")
        return await result

    async def _ask(self, cache: SharedCatalogCache) -> None:
        """Ask for all objects that wait: one round trip at a time, so that what comes in between shares the next."""
        loop = asyncio.get_running_loop()
        while self._asked:
            if (early := self._ask_at - loop.time()) > 0:
                await asyncio.sleep(early)
            asked, self._asked = self._asked[:_MAX_ROUND_TRIP], self._asked[_MAX_ROUND_TRIP:]
            # Of a look-up that was cancelled, the lock would be held and no answer come.
            asked = [(object_id, result) for object_id, result in asked if not result.done()]
            if not asked:
                continue
            self._ask_at = loop.time() + _READ_SPACING
            found: Sequence[CacheLookup] = ()
            try:
                object_ids = [object_id for object_id, _ in asked]
                found = await cache.get_or_lock(object_ids, self._owner, self._ttls.lock_ttl)
                self._outage.succeeded()
            except StateStoreUnavailable as error:
                self._outage.failed(error)
            except Exception:  # those that have come during this read need the next one
                logger.exception("catalog_cache_read_failed")
            finally:
                found = found or [CacheLookup(None, owns_lock=True)] * len(asked)
                for (_, result), lookup in zip(asked, found, strict=True):
                    if not result.done():
                        result.set_result(lookup)

    def put(
        self, object_id: ObjectId, answer: MediaObject | None, fresh: float, *, needed: bool, used: bool
    ) -> None:
        """Share an answer in a moment, together with others; best effort. No request waits for it.

        `fresh`: seconds of its time to live. `needed`: the object is served by this node. `used`: it was asked for
        before, so it is kept long. Only so are half a million objects that one client asks for once no burden.
        """
        if self._cache is None:
            return
        keep = self._ttls.positive_retention if used else self._ttls.unused_retention
        if not needed:
            keep = self._ttls.negative_retention
        self._new.append(NewAnswer(object_id, answer, fresh, max(fresh, keep)))
        if self._putting is None:
            self._put_soon(self._cache)

    def _put_soon(self, cache: SharedCatalogCache) -> None:
        self._putting = asyncio.create_task(self._put_all(cache), name="catalog-cache-put")

    async def _put_all(self, cache: SharedCatalogCache) -> None:
        try:
            await asyncio.sleep(_GATHER_ANSWERS)
            new, self._new = self._new, []
            for at in range(0, len(new), _MAX_ROUND_TRIP):
                await cache.put(new[at : at + _MAX_ROUND_TRIP])
        except StateStoreUnavailable as error:
            self._outage.failed(error)
        finally:
            self._putting = None
            if self._new:
                self._put_soon(cache)

    async def _all_put(self) -> None:
        """Wait until the answers so far are in the shared cache: what is done to them next must find them there.

        Those that came while others were on their way are in the next round, and later ones are not waited for.
        """
        for _ in range(2):
            if self._putting is not None:
                await asyncio.wait({self._putting})

    async def expire(self, outdated: MediaObject) -> None:
        """Make an answer stale; best effort."""
        if self._cache is None:
            return
        await self._all_put()
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

    async def resolve(self, is_wanted: Callable[[], bool]) -> CachedAnswer | None:
        """Wait for a fresh answer of the process that holds the lock. None: this process holds it, and must ask.

        Raises LookupRefused once `is_wanted` returns False.
        """
        poll = Backoff(_FIRST_POLL, _MAX_POLL, jitter=False)
        while True:
            lookup = await self._shared.get_or_lock(self._object_id)
            self.cached = lookup.cached or self.cached
            self.owns_lock = lookup.owns_lock
            if lookup.cached is not None and lookup.cached.fresh_for > 0:
                return lookup.cached
            if not is_wanted():
                raise LookupRefused("no one waits for it", "withdrawn")
            if lookup.owns_lock:
                return None
            await poll.wait()
