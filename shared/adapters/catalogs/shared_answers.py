"""Catalog answers that the processes of a node share: one of them asks, the others wait for its answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from distributor_node.shared.domain.errors import LookupRefused, StateStoreUnavailable
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.ports.catalog import CachedAnswer, CacheLookup, SharedCatalogCache
from distributor_node.shared.waiting import Backoff

_FIRST_POLL, _MAX_POLL = 0.02, 0.25  # seconds between two looks at the shared cache

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
