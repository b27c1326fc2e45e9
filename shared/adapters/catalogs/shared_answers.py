"""Answers shared by the node's processes: one of them asks, the others wait for what it learns."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

import structlog

from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import MediaObject, ObjectId
from shared.ports.catalog import CachedAnswer, CacheLookup, SharedCatalogCache

logger = structlog.get_logger()
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
