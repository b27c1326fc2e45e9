"""What both state store adapters share: timeouts, a listener's queue, and the catalog's answers as bytes."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.jobs import CLAIM_SECONDS
from distributor_node.shared.domain.objects import MediaObject, MediaObjectCodec
from distributor_node.shared.ports.state_store import Announcement

MAX_ACCESS_BATCHES = 10_000
"""Bound of the access log. While no evictor reads it, the oldest batches are dropped: only recency is lost."""

MAX_ACCESS_LOG_BYTES = 16 * 1024 * 1024
"""Bound of the access log on a server: half of it is dropped when it takes more."""

MAX_LOGGED_ACCESSES = 200_000
"""Bound of the access log in memory: accesses, some 100 bytes each."""

MAX_ANNOUNCEMENTS = 1_000
"""Announcements that wait for one slow listener. Beyond that, the oldest are dropped."""

QUEUED_SECONDS = 60.0

LOST_JOB_SECONDS = 600.0
"""After so long, a job that was published and not begun counts as lost, and another one may be published."""


@dataclass(frozen=True, slots=True)
class StateTimeouts:
    """Time limits in seconds."""

    claim_seconds: float = CLAIM_SECONDS  # from a claim to its published job
    queued_seconds: float = QUEUED_SECONDS  # from a published job to its worker
    lost_job_seconds: float = LOST_JOB_SECONDS  # from a published job until it counts as lost
    lease_seconds: float = 15.0  # from one renewal of a lease to the next
    operation_timeout: float = 1.0  # of any operation, before StateStoreUnavailable


class AnnouncementQueue:
    """A bounded queue, filled by an adapter and read with `async for` by one listener.

    The iteration does not end by itself.
    """

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


# The catalog's answer for one object as bytes, for the shared catalog cache.

_VERSION = 1

_OBJECT_FIELDS = MediaObjectCodec(
    {
        "object_id": "id",
        "size": "size",
        "content_hash": "hash",
        "media_type": "type",
        "buckets": "buckets",
        "accepted": "accepted",
        "sources": "sources",
        "etag": "validator",
        "last_modified": "last_modified",
        "name": "name",
    }
)


def write_description(answer: MediaObject | None) -> bytes:
    """Encode an answer. None: the object does not exist."""
    if answer is None:
        return json.dumps({"v": _VERSION, "exists": False}).encode()
    described = {"v": _VERSION, "exists": True, **_OBJECT_FIELDS.encode(answer)}
    return json.dumps(described, separators=(",", ":")).encode()


def read_description(packed: bytes) -> MediaObject | None:
    """Decode an answer. Raises InvalidInput for other versions, because nodes are not all updated at once."""
    try:
        described: dict[str, Any] = json.loads(packed)
        if described["v"] != _VERSION:
            raise InvalidInput(f"v: expected {_VERSION}, got {repr(described['v'])[:20]}")
        return _OBJECT_FIELDS.decode(described) if described["exists"] else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"catalog answer: expected a JSON object, got {error!r}") from error
