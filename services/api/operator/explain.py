"""`GET /cache/{id}`: what the node knows of one object, and how many bytes would be evicted before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.operator.commands import ObjectState, fetch_as_json, state_in_catalog
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, VolumeError
from distributor_node.shared.domain.eviction import Gdsf, PolicyEntry
from distributor_node.shared.domain.eviction.position import Position, position_of
from distributor_node.shared.domain.objects import ObjectId, StoredRecord, path_of
from distributor_node.shared.domain.space import RECORD_BYTES, EvictionReason
from distributor_node.shared.ports.state_store import (
    Fetch,
    FetchPhase,
    IndexEntry,
    ObjectStatus,
    ReportStore,
    StateStore,
    with_views,
)
from distributor_node.shared.runtime.process_reports import RemovedObject, read_reports
from distributor_node.shared.settings.model import EvictorSettings
from distributor_node.shared.settings.sizes import plural, size_in_words

CATALOG_TIMEOUT = 10.0
"""Seconds for the look-up of an object that is not here."""

StoredState = Literal["stored", "leaving", "missing", "unindexed", "failed", "absent"]


class ObjectExplainer:
    """Reads the index and the volume, and changes neither. `clock`: POSIX seconds."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        evictor: EvictorSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`evictor`: names the policy. The settings of the evictor and of the API are expected to be the same."""
        self._state, self._volume, self._evictor, self._clock = state, volume, evictor, clock
        self._scanning = asyncio.Lock()  # a scan reads the whole index: one at a time

    async def explain(self, object_id: ObjectId) -> dict[str, Any]:
        """The answer's JSON; fields that say nothing of the object's state are null. StateStoreUnavailable."""
        status = await self._state.find(object_id)
        entry = await self._state.entry(object_id)
        pinned = await self._state.pinned()
        on_volume = await asyncio.to_thread(self._look_at_volume, object_id)
        position, competing = None, _as_competing(entry, status)
        counted = entry or competing
        if competing is not None:
            policy, cost = self._evictor.policy, self._evictor.cost_per_miss
            basis = (await self._state.load_policy_state()).basis
            if policy == Gdsf.name and cost.fixed is None:
                basis = await with_views(self._state, basis)
            position = position_of(policy, cost, competing, basis, self._clock())
        if position is not None and object_id not in pinned:
            await self._find_place(position, pinned)
            before: dict[str, int | None] = {
                "bytesBefore": position.bytes_before,
                "objectsBefore": position.objects_before,
            }
        else:
            before = {"bytesBefore": None, "objectsBefore": None}
        path = path_of(object_id, on_volume.record or on_volume.partial_record)
        return {
            "id": object_id,
            "path": path,
            "state": _state_of(entry, status, on_volume),
            "size": _size_of(entry, status, on_volume),
            "hash": _hash_of(on_volume.record),
            "views": None if counted is None else counted.frequency,
            "lastAccess": None if counted is None else round(counted.last_access, 3) or None,
            "policy": self._evictor.policy,
            "priority": None if position is None else position.priority,
            "inflation": None if position is None else position.inflation,
            **before,
            "pinned": object_id in pinned,
            "sending": on_volume.sending,
            "fetch": None
            if status.fetch is None
            else fetch_as_json(status.fetch, on_volume.partial_bytes, path),
            "failure": None
            if status.failure is None
            else {"reason": status.failure.reason, "secondsLeft": round(status.failure.seconds_left, 3)},
        }

    async def _find_place(self, position: Position, pinned: frozenset[ObjectId]) -> None:
        """Count what would go before the object: neither pinned nor being removed already."""
        async with self._scanning:
            parked = [
                _as_partial_entry(fetch)
                for fetch in await self._state.fetches()
                if fetch.phase is FetchPhase.PARKED and fetch.object_id not in pinned
            ]
            for _ in range(position.passes):
                position.feed(parked)
                async for batch in self._state.entries():
                    evictable = (one for one in batch if not one.evicting and one.object_id not in pinned)
                    position.feed(map(_as_policy_entry, evictable))
                    await asyncio.sleep(0)
                position.end_pass()

    def _look_at_volume(self, object_id: ObjectId) -> OnVolume:
        """Blocking."""
        try:
            found = self._volume.find_object(object_id)
            partial = self._volume.open_partial(object_id)
            partial_bytes = 0
            if partial is not None:
                partial_bytes = partial.state().total
                partial.close()
            return OnVolume(
                size=None if found is None else found.size,
                record=None if found is None else self._volume.read_record(object_id),
                sending=self._volume.is_being_sent(object_id),
                partial_bytes=partial_bytes,
                partial_record=None if partial is None else self._volume.partial_record(object_id),
            )
        except VolumeError:
            return OnVolume(readable=False)


async def with_words(
    context: ApiContext, explained: Mapping[str, Any], removed: RemovedObject | None
) -> dict[str, Any]:
    """Return the answer with its sentences. The catalog is asked about what is not here, for a bounded time.

    What the catalog says is the state of an object that is just not here, in the words of `pins` and the others.
    """
    state, catalog = explained["state"], None
    if state in ("absent", "failed"):
        found, catalog = await _catalog_says(context, explained["id"], explained["failure"])
        state = found.value if state == "absent" else state
    told = None if removed is None else removed.model_dump(exclude_none=True)
    words = in_words(explained, told, catalog, context.settings.evictor.min_idle)
    return {"words": words, **explained, "state": state}


async def last_removal(store: ReportStore, object_id: ObjectId) -> RemovedObject | None:
    """Return what the evictor has told of the object's last removal, if that is among the newest ones."""
    removals = (one for process in await read_reports(store) for one in process.content.removed)
    return max((one for one in removals if one.id == object_id), key=lambda one: one.at, default=None)


async def _catalog_says(
    context: ApiContext, object_id: ObjectId, failure: Mapping[str, Any] | None
) -> tuple[ObjectState, str]:
    if not context.catalog.can_have(object_id):
        return ObjectState.UNKNOWN, "The catalog cannot have an object with such an id."
    unchecked = "The catalog cannot be asked at the moment"
    try:
        async with asyncio.timeout(CATALOG_TIMEOUT):
            found = await context.catalog.look_up(object_id)
    except TimeoutError:
        return ObjectState.UNCHECKED, f"{unchecked}: no reply within {CATALOG_TIMEOUT:g} s."
    except CatalogUnavailable as error:
        return ObjectState.UNCHECKED, f"{unchecked}: {error}."
    state = state_in_catalog(found, context.assignment.current)
    if found is None or state is not ObjectState.ABSENT:
        return state, _NOT_SERVED[state]
    if found.size is not None and found.size > context.settings.storage.largest_cached_size:
        return state, "It is larger than the largest object that this node caches, so it is always proxied."
    if found.not_stored is not None:
        return state, f"Its origin forbids to store it ({found.not_stored}), so it is always proxied."
    sources = f"The catalog knows it, at {plural(len(found.sources), 'source')}"
    if failure is None:
        return state, f"{sources}: the first request fetches it."
    until = _time_of_day(time.time() + failure["secondsLeft"])
    return state, (
        f"{sources}. The failure is remembered until {until}, and until then requests are proxied. The first request"
        " after that fetches it, or the first one after the source has delivered it to a client."
    )


_NOT_SERVED = {
    ObjectState.UNKNOWN: "The catalog says that it does not exist.",
    ObjectState.UNASSIGNED: "The catalog says that it exists, in buckets that are not assigned to this node.",
    ObjectState.NOT_UPLOADED: "The catalog says that it has not been uploaded yet.",
}


def in_words(
    explained: Mapping[str, Any],
    removed: Mapping[str, Any] | None,
    catalog: str | None,
    min_idle: float = 0.0,
) -> list[str]:
    """Return the answer as sentences: whether the object is here and why, or why it is not.

    `removed`: what the evictor has told of its last removal, if it is known. `catalog`: what the catalog says of an
    object that is not here, in words; None: it was not asked. `min_idle`: seconds after its last access in which an
    object is not evicted.
    """
    sentences = [_state_in_words(explained)]
    before = explained["objectsBefore"]
    # A removal that has begun waits for the last readers, and is not held off by them.
    sending = explained["sending"] and explained["state"] != "leaving"
    recent = before is not None and time.time() - (explained["lastAccess"] or 0.0) < min_idle
    if sending:
        sentences.append("It is being sent, so it is not evicted now.")
    elif recent:
        last = _duration(min_idle)
        sentences.append(f"It was read less than {last} ago (evictor.min_idle), so it is not evicted now.")
    if explained["pinned"]:
        sentences.append("An operator has pinned it, so it is never evicted to make room.")
    if before:
        size = size_in_words(explained["bytesBefore"])
        sentences.append(f"{plural(before, 'object')} ({size}) would be evicted before it.")
    elif before is not None:
        otherwise = "Otherwise it" if sending or recent else "It"
        sentences.append(f"{otherwise} would be the next to be evicted.")
    if explained["failure"] is not None:
        left = _duration(explained["failure"]["secondsLeft"])
        sentences.append(
            f"The last fetch failed: {explained['failure']['reason']}. It may be fetched again in {left}."
        )
    if removed is not None:
        sentences.append(_removal_in_words(removed))
    if catalog is not None:
        sentences.append(catalog)
    return sentences


def _state_in_words(explained: Mapping[str, Any]) -> str:
    match explained["state"]:
        case "stored":
            last = _duration(max(0.0, time.time() - explained["lastAccess"]))
            times = "once" if explained["views"] == 1 else f"{explained['views']} times"
            return f"It is on disk: {size_in_words(explained['size'])}, viewed {times}, last read {last} ago."
        case "leaving":
            return (
                "It is being removed: requests miss it, and its bytes count until its readers have finished."
            )
        case "missing":
            return "The index has it, but its file is missing. The next reconciliation drops the entry."
        case "unindexed":
            return (
                "Its file is on the volume, and is not in the index yet. The next reconciliation adopts it."
            )
        case "fetching":
            fetch = explained["fetch"]
            total = size_in_words(fetch["size"]) if fetch["size"] else "an unknown size"
            source = f" from {fetch['source']}" if fetch["source"] else ""
            return f"It is being fetched{source}: {size_in_words(fetch['bytes'])} of {total} are on disk."
        case "claimed" | "queued":
            return "Its fetch has been asked for and has not begun yet."
        case "parked":
            fetch = explained["fetch"]
            total, views = size_in_words(fetch["size"]), explained["views"]
            times = "once" if views == 1 else f"{views} times"
            return (
                f"It is not being fetched: {size_in_words(fetch['bytes'])} of {total} are on disk, viewed {times}. "
                "The next request resumes there."
            )
        case "failed":
            return "It is not here, and is not fetched at the moment."
        case _:
            return "It is not here, and is not being fetched."


_EVICTIONS: dict[str, str] = {
    EvictionReason.HIGH_WATERMARK: "the volume was above its high watermark",
    EvictionReason.SPACE_REQUESTED: "a fetch was waiting for space",
    EvictionReason.DEVICE_FULL: "the device behind the volume was full",
    EvictionReason.DEVICE_INODES: "the device behind the volume had too few inodes left",
}
_OTHER_REMOVALS = {
    "purged": "an operator purged it",
    "unassigned": "it is not assigned to this node any more",
    "replaced": "another version has replaced it",
    "corrupt": "its bytes were corrupt",
    "damaged": "its file had another size than its record",
    "mismatch": "its file was not what the catalog describes",
    "unfinished": "a removal that an earlier evictor had begun was finished",
}
"""The labels of the metric `distributor_evictions_total`. Those that are missing are shown as they are."""


def removal_reason(reason: str) -> str:
    """Return the reason of an eviction or another removal in words."""
    return _EVICTIONS.get(reason) or _OTHER_REMOVALS.get(reason) or reason.replace("_", " ")


def _removal_in_words(removed: Mapping[str, Any]) -> str:
    ago, reason = _duration(max(0.0, time.time() - removed["at"])), str(removed["reason"])
    if reason not in _EVICTIONS:
        return f"It was removed {ago} ago: {removal_reason(reason)}."
    idle, views = _duration(removed.get("idle_seconds", 0.0)), removed.get("views", 0)
    read = "once" if views == 1 else f"{views} times"
    what, why = "What was on disk of it" if removed.get("partial") else "It", removal_reason(reason)
    return f"{what} was evicted {ago} ago: {why}. It had been viewed {read}, and not read for {idle}."


def _time_of_day(at: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(at))


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class OnVolume:
    """What the volume says of one object."""

    size: int | None = None  # bytes of the complete file; None: there is none
    record: StoredRecord | None = None
    sending: bool | None = None  # None: it cannot be told
    partial_bytes: int = 0
    partial_record: StoredRecord | None = None  # the one that the partial file is going to have
    readable: bool = True


def _state_of(entry: IndexEntry | None, status: ObjectStatus, on_volume: OnVolume) -> StoredState | str:
    """The state of the complete object, else the phase of its fetch."""
    if entry is not None:
        if entry.evicting:
            return "leaving"
        return "stored" if on_volume.size is not None or not on_volume.readable else "missing"
    if status.fetch is not None:
        return status.fetch.phase.value
    if on_volume.size is not None:
        return "unindexed"
    if on_volume.sending:  # a purge has dropped its entry, so that it can be fetched again
        return "leaving"
    return "failed" if status.failure is not None else "absent"


def _size_of(entry: IndexEntry | None, status: ObjectStatus, on_volume: OnVolume) -> int | None:
    if entry is not None:
        return entry.size
    if on_volume.size is not None:
        return on_volume.size
    return (status.fetch.size or None) if status.fetch is not None else None


def _hash_of(record: StoredRecord | None) -> str | None:
    return None if record is None or record.content_hash is None else str(record.content_hash)


def _as_competing(entry: IndexEntry | None, status: ObjectStatus) -> PolicyEntry | None:
    """Return what the policy orders: the complete object, or a partial one that no worker fetches."""
    if entry is not None:
        return None if entry.evicting else _as_policy_entry(entry)
    fetch = status.fetch
    return _as_partial_entry(fetch) if fetch is not None and fetch.phase is FetchPhase.PARKED else None


def _as_partial_entry(fetch: Fetch) -> PolicyEntry:
    size = max(0, fetch.reserved - RECORD_BYTES)
    return PolicyEntry(fetch.object_id, size, max(1, fetch.views), fetch.last_access, fetch.priority)


def _as_policy_entry(entry: IndexEntry) -> PolicyEntry:
    return PolicyEntry(
        entry.object_id, entry.size, max(1, entry.frequency), entry.last_access, entry.priority
    )
