"""Commands and queries of the operator API.

A command is checked against the current operator state and written to the state store. Every process then applies it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import Any

import structlog

from distributor_node.services.api.errors import HttpError
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import (
    Assignment,
    MediaObject,
    ObjectId,
    source_name,
)
from distributor_node.shared.domain.operator_state import OperatorState, Warming, WarmingScope
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.state_store import Fetch, FetchPhase, IndexEntry, StateStore
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher

MAX_PINS = 10_000
_ATTEMPTS = 10
_PURGE_BATCH = 1000
_LOOKUP_TIMEOUT = 10.0
"""Seconds for the look-ups of all ids of one command."""
_LOOKUPS_AT_ONCE = 50
_BUCKETS_TIMEOUT = 5.0
"""Seconds for the catalog to say which buckets it has."""
_MAX_BUCKETS_SHOWN = 20

logger = structlog.get_logger()


class ObjectState(StrEnum):
    """What a command found of an object that its operator has named."""

    STORED = "stored"
    FETCHING = "fetching"  # or queued
    PARTIAL = "partial"  # some of its bytes are here, and no fetch continues them now
    ABSENT = "absent"  # not here; the node would fetch it
    UNKNOWN = "unknown"  # the catalog does not know it
    NOT_UPLOADED = "not_uploaded"
    UNASSIGNED = "unassigned"  # in none of our buckets
    UNCHECKED = "unchecked"  # not here, and the catalog or the volume could not be asked


def state_in_catalog(found: MediaObject | None, assignment: Assignment) -> ObjectState:
    """Return the state of an object that is not here. `found`: what the catalog says."""
    if found is None:
        return ObjectState.UNKNOWN
    if not assignment.covers(found):
        return ObjectState.UNASSIGNED
    return ObjectState.ABSENT if found.accepted else ObjectState.NOT_UPLOADED


class OperatorCommands:
    """Changes the operator state.

    Raises HttpError 409 if a command has no effect or is impossible, and for all commands once the node shuts down.
    """

    def __init__(
        self, state: StateStore, operator_state: OperatorStateWatcher, catalog: Catalog, volume: Volume
    ) -> None:
        self._state, self._operator_state = state, operator_state
        self._catalog, self._volume = catalog, volume

    async def stop(self) -> dict[str, Any]:
        """Close the public port."""
        return await self._change("stop", _stopped)

    async def start(self) -> dict[str, Any]:
        """Open the public port again."""
        return await self._change("start", _started)

    async def shut_down(self) -> dict[str, Any]:
        """Stop every API process."""
        return await self._change("shut down", lambda state: replace(state, shutdowns=state.shutdowns + 1))

    async def set_worker(self, worker_id: int, *, check: bool = False) -> dict[str, Any]:
        """Serve as this worker. `check`: refuse one that operates no bucket, if the catalog can be asked."""
        checked = check and await self._check(self._check_worker(worker_id))
        state = await self._change(
            "set worker", lambda state: replace(state, worker_ordered=True, worker_id=worker_id)
        )
        return {**state, "checked": checked}

    async def set_buckets(self, buckets: frozenset[str] | None, *, check: bool = False) -> dict[str, Any]:
        """Serve these buckets. None: all buckets of the worker, or everything, as configured.

        `check`: refuse those that do not exist, if the catalog can be asked.
        """

        def change(state: OperatorState) -> OperatorState:
            changed = replace(state, buckets_ordered=True, buckets=buckets)
            if buckets is None and changed.assignment(self._operator_state.configured).bucket_ids is not None:
                raise HttpError(
                    409,
                    "No worker is set: use set-worker first, or reset-assignment to serve what the settings say",
                    "no_worker",
                )
            return changed

        checked = check and await self._check(self._check_buckets(buckets, change))
        return {**await self._change("set buckets", change), "checked": checked}

    async def reset_assignment(self) -> dict[str, Any]:
        """Serve the buckets or the worker of the settings."""
        default = OperatorState()

        def change(state: OperatorState) -> OperatorState:
            return replace(
                state,
                worker_ordered=default.worker_ordered,
                worker_id=default.worker_id,
                buckets_ordered=default.buckets_ordered,
                buckets=default.buckets,
            )

        return await self._change("reset assignment", change)

    async def _check(self, check: Awaitable[None]) -> bool:
        """Return whether the catalog has replied in time. A node whose catalog is down still takes commands."""
        try:
            async with asyncio.timeout(_BUCKETS_TIMEOUT):
                await check
        except (CatalogUnavailable, TimeoutError) as error:
            logger.warning("assignment_not_checked", reason=str(error) or "no reply in time")
            return False
        return True

    async def _check_worker(self, worker_id: int) -> None:
        if not await self._catalog.bucket_ids(worker_id):
            message = (
                f"workerId: expected a worker with buckets in the catalog, got {worker_id}, which has none"
            )
            raise HttpError(409, message, "unknown_worker")

    async def _check_buckets(
        self, buckets: frozenset[str] | None, change: Callable[[OperatorState], OperatorState]
    ) -> None:
        if buckets is None:
            state = change(await self._reject_if_shutting_down())
            worker_id = state.assignment(self._operator_state.configured).worker_id
            if worker_id is not None:
                await self._check_worker(worker_id)
            return
        known = await self._catalog.bucket_ids()
        unknown = buckets.difference(known)
        if unknown:
            message = f"buckets: expected buckets of the catalog ({_listed(known)}), got {_listed(unknown)}"
            raise HttpError(409, message, "unknown_bucket")

    async def _check_bucket(self, bucket_id: str) -> None:
        known = await self._catalog.bucket_ids()
        if bucket_id not in known:
            message = f"bucket: expected a bucket of the catalog ({_listed(known)}), got {bucket_id}"
            raise HttpError(409, message, "unknown_bucket")

    async def drain(self, on: bool) -> dict[str, Any]:
        return await self._change("drain", lambda state: replace(state, draining=on))

    async def pin(self, object_ids: Sequence[ObjectId]) -> dict[str, Any]:
        await self._reject_if_shutting_down()
        pinned = await self._state.pinned()
        if len(pinned.union(object_ids)) > MAX_PINS:
            raise HttpError(400, f"Pinned objects: at most {MAX_PINS}", "too_many_pins")
        return await self._change_pins(object_ids, pin=object_ids)

    async def unpin(self, object_ids: Sequence[ObjectId]) -> dict[str, Any]:
        await self._reject_if_shutting_down()
        return await self._change_pins(object_ids, unpin=object_ids)

    async def pins(self, limit: int, after: str) -> dict[str, Any]:
        """Return up to `limit` pinned objects with ids greater than `after`, in order of id, here or not.

        `next` is the `after` of the next page, None on the last page.
        """
        pinned = await self._state.pinned()
        found = heapq.nsmallest(limit + 1, (object_id for object_id in pinned if object_id > after))
        more, page = len(found) > limit, found[:limit]
        states = await self._with_catalog(await self._find_here(page))
        paths = await known_paths(self._volume, page)
        return {
            "pins": [
                {"id": object_id, "path": paths.get(object_id), "state": states[object_id]}
                for object_id in page
            ],
            "next": page[-1] if more else None,
            "total": len(pinned),
        }

    async def purge(self, object_ids: Sequence[ObjectId] | None) -> dict[str, Any]:
        """Purge these objects. None: all objects that are cached or being fetched now."""
        await self._reject_if_shutting_down()
        if object_ids is None:
            count = await self._purge_all()
            logger.info("operator_command_accepted", command="purge", objects=count)
            return {"purging": count, "objects": []}
        here, paths = await self._find_here(object_ids), await known_paths(self._volume, object_ids)
        for object_id in object_ids:  # what is fetched after the purge must be looked up after it
            await self._catalog.forget_object(object_id)
        await self._state.request_purges(object_ids)
        logger.info("operator_command_accepted", command="purge", objects=len(object_ids))
        states = await self._with_catalog(here)
        return {
            "purging": len(object_ids),
            "objects": [
                {"id": object_id, "path": paths.get(object_id), "state": states[object_id]}
                for object_id in object_ids
            ],
        }

    async def warm(self, scope: WarmingScope) -> Warming:
        await self._reject_if_shutting_down()
        if scope.object_ids is None and not self._catalog.can_list:
            field = "all" if scope.bucket_id is None else "bucket"
            message = (
                f"{field}: expected ids, since the catalog of this node cannot list its objects, got {field}"
            )
            raise HttpError(409, message, "cannot_list")
        if scope.bucket_id is not None:
            await self._check(self._check_bucket(scope.bucket_id))
        warming = await self._state.start_warming(scope)
        if warming is None:
            raise HttpError(409, "Another warming is in progress", "already_warming")
        logger.info("operator_command_accepted", command="warm", serial=warming.serial)
        return warming

    async def warming(self) -> Warming | None:
        """Return the latest warming."""
        return await self._state.warming()

    async def _purge_all(self) -> int:
        if not (await self._state.usage()).reconciled:
            raise StateStoreUnavailable("the index has not been reconciled with the volume yet")
        count, batch = 0, [fetch.object_id for fetch in await self._state.fetches() if fetch.size]
        async for entries in self._state.entries():
            batch += [entry.object_id for entry in entries]
            while len(batch) >= _PURGE_BATCH:
                await self._state.request_purges(batch[:_PURGE_BATCH])
                count, batch = count + _PURGE_BATCH, batch[_PURGE_BATCH:]
        if batch:
            await self._state.request_purges(batch)
        return count + len(batch)

    async def _change_pins(
        self,
        object_ids: Sequence[ObjectId],
        *,
        pin: Sequence[ObjectId] = (),
        unpin: Sequence[ObjectId] = (),
    ) -> dict[str, Any]:
        here = await self._find_here(object_ids)
        changed = await self._state.change_pins(pin, unpin)
        logger.info("operator_command_accepted", command="pin" if pin else "unpin", changed=len(changed))
        pinned, states = await self._state.pinned(), await self._with_catalog(here)
        paths = await known_paths(self._volume, object_ids)
        return {
            "changed": len(changed),
            "pinned": len(pinned),
            "objects": [
                {
                    "id": object_id,
                    "path": paths.get(object_id),
                    "state": states[object_id],
                    "changed": object_id in changed,
                }
                for object_id in object_ids
            ],
        }

    async def _find_here(self, object_ids: Sequence[ObjectId]) -> dict[ObjectId, ObjectState | None]:
        """Return what volume and state store know. None: the object is not here. Raises StateStoreUnavailable."""
        phases = {fetch.object_id: fetch.phase for fetch in await self._state.fetches()}

        def find(object_id: ObjectId) -> ObjectState | None:
            try:
                if self._volume.find_object(object_id) is not None:
                    return ObjectState.STORED
            except VolumeError:
                return ObjectState.UNCHECKED
            phase = phases.get(object_id)
            if phase is None:
                return None
            return ObjectState.PARTIAL if phase is FetchPhase.PARKED else ObjectState.FETCHING

        return await asyncio.to_thread(lambda: {object_id: find(object_id) for object_id in object_ids})

    async def _with_catalog(
        self, here: Mapping[ObjectId, ObjectState | None]
    ) -> Mapping[ObjectId, ObjectState]:
        """Look those up that are not here. The command has been carried out: without the catalog it succeeds too."""
        places, assignment = asyncio.Semaphore(_LOOKUPS_AT_ONCE), self._operator_state.assignment
        states = {object_id: state or ObjectState.UNCHECKED for object_id, state in here.items()}

        async def look_up(object_id: ObjectId) -> None:
            async with places:
                try:
                    found = await self._catalog.look_up(object_id)
                    states[object_id] = state_in_catalog(found, assignment)
                except CatalogUnavailable:
                    pass
                except Exception:  # a mistake in a look-up must not hide that the command was carried out
                    logger.exception("operator_lookup_failed", object_id=object_id)

        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOKUP_TIMEOUT), asyncio.TaskGroup() as group:
                for object_id, state in here.items():
                    if state is None and not self._catalog.can_have(object_id):
                        states[object_id] = ObjectState.UNKNOWN
                    elif state is None:
                        group.create_task(look_up(object_id), name=f"look-up-{object_id}")
        return states

    async def _reject_if_shutting_down(self) -> OperatorState:
        state = await self._operator_state.refresh()
        if self._operator_state.shutting_down:
            raise HttpError(409, "The node is shutting down", "shutting_down")
        return state

    async def _change(self, name: str, change: Callable[[OperatorState], OperatorState]) -> dict[str, Any]:
        """Read the state, decide, and write it if it has not changed since (optimistic locking). Retry otherwise."""
        for _ in range(_ATTEMPTS):
            state = await self._reject_if_shutting_down()
            if await self._state.change_operator_state(state.version, change(state)) is not None:
                logger.info("operator_command_accepted", command=name)
                await self._operator_state.refresh()
                return self.as_json()
        raise StateStoreUnavailable(f"the operator state changed concurrently in {_ATTEMPTS} attempts")

    def as_json(self) -> dict[str, Any]:
        """Return the current operator state."""
        state, assignment = self._operator_state.current, self._operator_state.assignment
        return {
            "stopped": state.stopped,
            "draining": state.draining,
            "shuttingDown": self._operator_state.shutting_down,
            "workerId": assignment.worker_id,
            "buckets": None if assignment.bucket_ids is None else sorted(assignment.bucket_ids),
        }


def _listed(bucket_ids: Collection[str]) -> str:
    shown = sorted(bucket_ids, key=lambda bucket_id: [int(part) for part in bucket_id.split(":")])
    more = len(shown) - _MAX_BUCKETS_SHOWN
    named = ", ".join(shown[:_MAX_BUCKETS_SHOWN]) or "none"
    return f"{named} and {more} more" if more > 0 else named


def _stopped(state: OperatorState) -> OperatorState:
    if state.stopped:
        raise HttpError(409, "The public API is already stopped", "already_stopped")
    return replace(state, stopped=True)


def _started(state: OperatorState) -> OperatorState:
    if not state.stopped:
        raise HttpError(409, "The public API is already running", "already_started")
    return replace(state, stopped=False)


# Queries: the cached objects, page by page, and the fetches in progress.


class OperatorQueries:
    """Reads index and volume. One listing at a time, since each reads the whole index."""

    def __init__(self, state: StateStore, volume: Volume) -> None:
        self._state, self._volume = state, volume
        self._listing = asyncio.Lock()

    async def cache(self, limit: int, after: str) -> dict[str, Any]:
        """Return up to `limit` objects with ids greater than `after`, in order of id.

        `next` is the `after` of the next page, None on the last page.
        """
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
        usage = await self._state.usage()
        more, page = len(page) > limit, page[:limit]
        paths = await known_paths(self._volume, [entry.object_id for entry in page])
        return {
            "objects": [
                _entry_as_json(entry, paths.get(entry.object_id), pinned=entry.object_id in pinned)
                for entry in page
            ],
            "next": page[-1].object_id if more else None,
            "total": total,
            "bytes": total_bytes,
            "pinned": pinned_objects,
            "pinnedBytes": pinned_bytes,
            "partialObjects": usage.parked,
            "partialBytes": usage.parked_size,
        }

    async def downloads(self) -> dict[str, Any]:
        """Return all fetches: claimed, queued, in progress or interrupted."""
        fetches = await self._state.fetches()
        downloaded = await asyncio.to_thread(self._downloaded_bytes, [fetch.object_id for fetch in fetches])
        paths = await known_paths(self._volume, [fetch.object_id for fetch in fetches])
        return {
            "downloads": [
                fetch_as_json(fetch, downloaded.get(fetch.object_id, 0), paths.get(fetch.object_id))
                for fetch in fetches
            ]
        }

    def _downloaded_bytes(self, object_ids: Sequence[ObjectId]) -> dict[ObjectId, int]:
        """Return the sizes of partial files. Blocking: call from a worker thread."""
        sizes: dict[ObjectId, int] = {}
        for object_id in object_ids:
            try:
                reader = self._volume.open_partial(object_id)
            except VolumeError:
                continue
            if reader is not None:
                sizes[object_id] = reader.state().total
                reader.close()
        return sizes


async def known_paths(volume: Volume, object_ids: Sequence[ObjectId]) -> Mapping[ObjectId, str]:
    """Return the paths of those ids that are digests, as far as they are known from the command or the volume."""
    digests = [object_id for object_id in object_ids if object_id.is_digest]
    return await asyncio.to_thread(volume.paths_of, digests) if digests else {}


def warming_as_json(warming: Warming | None) -> dict[str, Any]:
    """Return a warming and its progress as JSON. Zeros if there has been none."""
    if warming is None:
        warming = Warming(0, WarmingScope())
        return {**warming_as_json(warming), "state": "none"}
    return {
        "state": warming.state,
        "total": warming.total,
        "done": warming.done,
        "skipped": warming.skipped,
        "skippedFor": dict(warming.skipped_for),
        "failed": warming.failed,
        "notWarmed": [{"id": object_id, "reason": reason} for object_id, reason in warming.not_warmed],
        "reason": warming.reason,
    }


def _entry_as_json(entry: IndexEntry, path: str | None, *, pinned: bool) -> dict[str, Any]:
    return {
        "id": entry.object_id,
        "path": path,
        "size": entry.size,
        "lastAccess": round(entry.last_access, 3),
        "views": entry.frequency,
        "pinned": pinned,
        "state": "leaving" if entry.evicting else "stored",
    }


def fetch_as_json(fetch: Fetch, downloaded: int, path: str | None) -> dict[str, Any]:
    return {
        "id": fetch.object_id,
        "path": path,
        "phase": fetch.phase.value,
        "bytes": downloaded,
        "size": fetch.size,
        "source": None if fetch.source is None else source_name(fetch.source),
        "worker": fetch.worker,
        "age": round(fetch.age, 3),
        "reserved": fetch.reserved,
        "views": fetch.views or None,
        "lastAccess": round(fetch.last_access, 3) or None,
    }


def _id_of(entry: IndexEntry) -> str:
    return entry.object_id
