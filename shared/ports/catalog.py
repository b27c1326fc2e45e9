"""The catalog port: which objects exist, how large they are, which buckets they are in, and where they are stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId


@dataclass(frozen=True, slots=True)
class CatalogStatus:
    """What the catalog's server reports about itself. None: it does not report it, or there is no such server."""

    blocks_processed: int | None = None  # blocks of the chain that the catalog has read
    version: str | None = None  # of the server's software


LookupAnswers = Mapping[ObjectId, MediaObject | None]
"""What one query says of several objects. None: the object does not exist. Missing: it could not be described."""


class Catalog(Protocol):
    """One instance per process. Call `open` before use and `close` at the end.

    Every coroutine method may raise CatalogUnavailable, within a bounded time.
    """

    @property
    def can_list(self) -> bool:
        """Whether `list_objects` works. False for an HTTP origin, which knows its objects one by one."""

    @property
    def public_url(self) -> str:
        """Where the catalog is asked, without credentials; empty for a file. Shown in /status."""

    @property
    def lookups_fail(self) -> bool:
        """Whether the last look-ups have failed, as far as is known without asking. False where nothing is noted."""

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        """Return the URLs of an object that follow from its id alone, without asking. Empty if none do."""

    async def open(self) -> None:
        """Prepare for use. Raises ConfigurationError for settings that can never work, such as an invalid manifest."""

    async def close(self) -> None: ...

    def can_have(self, object_id: ObjectId) -> bool:
        """Whether a catalog of this kind can have an object of this id. It is asked for no other."""

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        """Return what the catalog knows of one object, in any bucket. None: the object does not exist.

        `client`: the address that asks, by which a busy catalog is shared fairly. None: the node itself. Raises
        LookupRefused, a CatalogUnavailable, if too many look-ups wait.
        """

    async def forget(self, outdated: MediaObject) -> None:
        """Note that this answer of `look_up` is no longer true: the next look-up asks again.

        A newer answer, which another request has caused, is kept.
        """

    async def forget_object(self, object_id: ObjectId) -> None:
        """Note that whatever `look_up` has answered for this object may no longer be true."""

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        """Yield all objects of an assignment in batches.

        A list that ends without an error is complete: an incomplete one raises CatalogUnavailable. Raises it at once
        where `can_list` is False.
        """

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        """Return all buckets the catalog knows, or those that this worker operates. Empty if it has no buckets.

        Raises QueryRejected if the catalog's server does not support the query: it is of another version.
        """

    async def source_bases(self) -> Sequence[str]:
        """Return the base URLs, ending in `/`, of the storage nodes that objects may be fetched from.

        Each host appears once. Empty if the catalog does not name storage nodes.
        """

    async def status(self) -> CatalogStatus:
        """Ask the catalog's server about itself, for /status."""

    async def chain_head(self) -> int | None:
        """Return the number of the chain's newest block. None: the catalog follows no chain, or none is configured."""


class RemoteCatalog(Catalog, Protocol):
    """A catalog that is asked over the network, and wrapped in a cache."""

    @property
    def batch_size(self) -> int:
        """How many objects one query may ask for. It may change while the catalog is open."""

    async def look_up_batch(self, object_ids: Sequence[ObjectId]) -> LookupAnswers:
        """Ask for up to `batch_size` objects that the catalog can have, within the catalog's own time limit."""


# The shared catalog cache: the node's processes share the answers of a slow catalog, and a lock for each object.


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """A cached answer of the catalog, with what remains of its time to live."""

    answer: MediaObject | None  # None: the object does not exist
    fresh_for: float  # seconds; 0 or less: stale, kept for outages only


@dataclass(frozen=True, slots=True)
class CacheLookup:
    """What the shared cache holds for one object, and whether the calling process must ask the catalog."""

    cached: CachedAnswer | None
    owns_lock: bool  # True: this process asks the catalog, then calls `put` or `unlock`


@dataclass(frozen=True, slots=True)
class NewAnswer:
    """An answer of the catalog to be cached. Times in seconds."""

    object_id: ObjectId
    answer: MediaObject | None  # None: the object does not exist
    fresh: float
    keep: float  # fresh or stale


class SharedCatalogCache(Protocol):
    """One instance per process. Call `open` before use and `close` at the end.

    Every coroutine method may raise StateStoreUnavailable, within a bounded time. Ages are measured on the cache's
    clock: callers pass durations.
    """

    async def open(self) -> None:
        """Connect in the background. Never fails because the store is down."""

    async def close(self) -> None: ...

    async def get(self, object_id: ObjectId) -> CachedAnswer | None:
        """Read the cached answer without taking the lock."""

    async def get_or_lock(
        self, object_ids: Sequence[ObjectId], owner: str, seconds: float
    ) -> Sequence[CacheLookup]:
        """Read the cached answers in one round trip. Take the lock for `seconds` where none is fresh and it is free.

        Atomic: an answer that another process puts just before is seen, so that the new owner does not ask again.
        """

    async def put(self, answers: Sequence[NewAnswer]) -> None:
        """Store answers in one round trip. Releases their locks, also another owner's."""

    async def expire(self, outdated: MediaObject) -> None:
        """Make this answer stale, if it is the cached one. It is kept for outages."""

    async def unlock(self, object_id: ObjectId, owner: str) -> None:
        """Release the lock without an answer, if `owner` still holds it."""
