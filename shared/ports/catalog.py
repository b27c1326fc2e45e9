"""The catalog: which objects exist, how large they are, who holds them, whose assignment they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId


class Catalog(Protocol):
    """One instance per process; `open` before use, `close` at the end. Every verb may raise CatalogUnavailable,
    within a bounded time."""

    async def open(self) -> None:
        """Get ready; ConfigurationError if the catalog's settings can never work (a manifest that is no manifest)."""

    async def close(self) -> None: ...

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        """What is known of one object, whoever's assignment it is; None: it does not exist."""

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        """All objects of an assignment, in batches. Raises CatalogUnavailable in the middle rather than end early:
        a list that ends without error is whole. A catalog that cannot list (an origin) raises it at once."""

    async def bucket_ids(self) -> Sequence[str]:
        """All buckets the catalog knows, for a node whose assignment is everything; empty if it has no buckets."""

    async def source_bases(self) -> Sequence[str]:
        """Base URLs, `/` at their end, of the storage nodes that may be asked for objects, each host once; empty where
        there are none to choose from."""


# The shared catalog cache: answers of a slow catalog, for all processes of the node, and who is asking for what.


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer of the catalog (None: the object does not exist). `fresh_for`: seconds it is still believed; 0 or
    less: it is kept for outages only."""

    answer: MediaObject | None
    fresh_for: float


@dataclass(frozen=True, slots=True)
class CacheLookup:
    """What is cached, and whether the calling process holds the lock and must ask the catalog now."""

    cached: CachedAnswer | None
    owns_lock: bool


class SharedCatalogCache(Protocol):
    """One instance per process; `open` before use, `close` at the end. Every verb may raise StateStoreUnavailable,
    within a bounded time. Ages are measured on the cache's own clock; callers hand over durations."""

    async def open(self) -> None:
        """Connect in the background; never fails because the store is down."""

    async def close(self) -> None: ...

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        """Look only."""

    async def get_or_lock(self, object_id: ObjectId, owner: str, seconds: float) -> CacheLookup:
        """What is remembered; unless that is fresh, also take the right to ask, for `seconds`, if nobody has it. One
        step: whoever gets the right finds no fresh answer that came just before."""

    async def put(self, object_id: ObjectId, answer: MediaObject | None, fresh: float, keep: float) -> None:
        """Keep an answer: believed for `fresh` seconds, there for `keep`. Ends whoever's right to ask."""

    async def unlock(self, object_id: ObjectId, owner: str) -> None:
        """The catalog gave no answer: let another one ask, if the right is still this owner's."""
