"""The catalog: which objects exist, how large they are, who holds them, whose assignment they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from shared.domain.objects import Assignment, MediaObject, ObjectId


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
