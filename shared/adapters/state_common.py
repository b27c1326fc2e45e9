"""How long things last in the state store, for both of its adapters."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.jobs import CLAIM_SECONDS
from distributor_node.shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId
from distributor_node.shared.ports.state_store import Announcement

MAX_ACCESS_BATCHES = 10_000
"""Bound of the access log: when nobody reads it, the oldest batches are dropped (recency is lost, nothing else)."""

MAX_ANNOUNCEMENTS = 1_000
"""Bound of what one listener may lag behind before it loses the oldest announcements."""

QUEUED_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class StateTimeouts:
    """Seconds. `claim`: to publish a job; `queued`: for a worker to begin it; `lease`: between two renewals;
    `operation_timeout`: that any one verb may take before StateStoreUnavailable."""

    claim_seconds: float = CLAIM_SECONDS
    queued_seconds: float = QUEUED_SECONDS
    lease_seconds: float = 15.0
    operation_timeout: float = 1.0


# A listener's bounded queue of announcements: the oldest are dropped when the reader lags.


class AnnouncementQueue:
    """Written by one adapter, read with `async for` by one listener; it never ends by itself."""

    def __init__(self) -> None:
        self._waiting: deque[Announcement] = deque(maxlen=MAX_ANNOUNCEMENTS)
        self._arrived = asyncio.Event()

    def put(self, announcement: Announcement) -> None:
        self._waiting.append(announcement)
        self._arrived.set()

    def __aiter__(self) -> AnnouncementQueue:
        return self

    async def __anext__(self) -> Announcement:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()


# The catalog's word on one object as bytes, for the memory that processes share.

_VERSION = 1


def write_description(answer: MediaObject | None) -> bytes:
    """`answer`: None for an object that does not exist."""
    if answer is None:
        return json.dumps({"v": _VERSION, "exists": False}).encode()
    described = {
        "v": _VERSION,
        "exists": True,
        "id": answer.object_id,
        "size": answer.size,
        "hash": str(answer.content_hash) if answer.content_hash else None,
        "type": answer.media_type,
        "buckets": [[bucket.bucket_id, sorted(bucket.active_workers)] for bucket in answer.buckets],
        "accepted": answer.accepted,
        "sources": answer.sources,
        "validator": answer.validator,
    }
    return json.dumps(described, separators=(",", ":")).encode()


def read_description(packed: bytes) -> MediaObject | None:
    """Raise InvalidInput for what this version did not write (nodes are not all updated at once)."""
    try:
        described: dict[str, Any] = json.loads(packed)
        if described["v"] != _VERSION:
            raise InvalidInput(f"description of version {described['v']}")
        if not described["exists"]:
            return None
        return MediaObject(
            object_id=ObjectId.parse(described["id"]),
            size=described["size"],
            content_hash=ContentHash.parse(described["hash"]) if described["hash"] else None,
            media_type=described["type"],
            buckets=tuple(
                DistributionBucket(bucket_id, frozenset(workers))
                for bucket_id, workers in described["buckets"]
            ),
            accepted=described["accepted"],
            sources=tuple(described["sources"]),
            validator=described["validator"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"no description of an object: {error!r}") from error
