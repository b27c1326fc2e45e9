"""What operators may look at: the cached objects, page by page, and the fetches under way."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence
from typing import Any

from shared.adapters.volume import Volume
from shared.domain.errors import VolumeError
from shared.domain.objects import ObjectId, source_name
from shared.domain.warming import Warming
from shared.ports.state_store import Fetch, IndexEntry, StateStore


class OperatorQueries:
    """Reads index and volume; one listing at a time, since each goes through the whole index."""

    def __init__(self, state: StateStore, volume: Volume) -> None:
        self._state, self._volume = state, volume
        self._listing = asyncio.Lock()

    async def cache(self, limit: int, after: str) -> dict[str, Any]:
        """Up to `limit` objects in the order of their ids, beginning behind `after`; `next` is the `after` of the next
        page, None on the last one."""
        async with self._listing:
            pinned = await self._state.pinned()
            page: list[IndexEntry] = []
            total = total_bytes = pinned_objects = pinned_bytes = 0
            async for batch in self._state.entries():
                for entry in batch:
                    total, total_bytes = total + 1, total_bytes + entry.size
                    if entry.object_id in pinned:
                        pinned_objects, pinned_bytes = pinned_objects + 1, pinned_bytes + entry.size
                behind = {entry.object_id: entry for entry in (*page, *batch) if entry.object_id > after}
                page = heapq.nsmallest(limit + 1, behind.values(), key=_id_of)
                await asyncio.sleep(0)
        more, page = len(page) > limit, page[:limit]
        return {
            "objects": [_entry_as_json(entry, entry.object_id in pinned) for entry in page],
            "next": page[-1].object_id if more else None,
            "total": total,
            "bytes": total_bytes,
            "pinned": pinned_objects,
            "pinnedBytes": pinned_bytes,
        }

    async def downloads(self) -> dict[str, Any]:
        """Everything that is claimed, queued, being fetched, or was left half way."""
        fetches = await self._state.fetches()
        downloaded = await asyncio.to_thread(self._downloaded_bytes, [fetch.object_id for fetch in fetches])
        return {"downloads": [_fetch_as_json(fetch, downloaded.get(fetch.object_id, 0)) for fetch in fetches]}

    def _downloaded_bytes(self, object_ids: Sequence[ObjectId]) -> dict[ObjectId, int]:
        """Bytes on disk. Blocks."""
        sizes: dict[ObjectId, int] = {}
        for object_id in object_ids:
            try:
                reader = self._volume.open_partial(object_id)
            except VolumeError:
                continue
            if reader is not None:
                sizes[object_id] = reader.state().size
                reader.close()
        return sizes


def warming_as_json(warming: Warming | None) -> dict[str, Any]:
    """A warming and its progress; zeros if there never was one."""
    if warming is None:
        return {"state": "none", "total": 0, "done": 0, "skipped": 0, "failed": 0, "reason": ""}
    return {
        "state": warming.state,
        "total": warming.total,
        "done": warming.done,
        "skipped": warming.skipped,
        "failed": warming.failed,
        "reason": warming.reason,
    }


def _entry_as_json(entry: IndexEntry, pinned: bool) -> dict[str, Any]:
    return {
        "id": entry.object_id,
        "size": entry.size,
        "lastAccess": round(entry.last_access, 3),
        "views": entry.frequency,
        "pinned": pinned,
        "state": "leaving" if entry.evicting else "stored",
    }


def _fetch_as_json(fetch: Fetch, downloaded: int) -> dict[str, Any]:
    return {
        "id": fetch.object_id,
        "phase": fetch.phase.value,
        "bytes": downloaded,
        "size": fetch.size,
        "source": None if fetch.source is None else source_name(fetch.source),
        "worker": fetch.worker,
        "age": round(fetch.age, 3),
    }


def _id_of(entry: IndexEntry) -> str:
    return entry.object_id
