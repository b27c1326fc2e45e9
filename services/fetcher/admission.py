"""How long a job waits when it cannot begin at once, and what becomes of it then. Pure."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import structlog

from distributor_node.shared.adapters.volume import Removal, RemovalState, Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.found_objects import record_for_file
from distributor_node.shared.domain.jobs import Ack, DeadLetter, JobOutcome, Requeue, Retry
from distributor_node.shared.domain.media_types import SNIFF_BYTES
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId, StoredRecord
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import (
    AlreadyStored,
    Announcement,
    Granted,
    HeldElsewhere,
    Lease,
    NeverFits,
    NoSpace,
    NotReconciled,
    StateStore,
    Topic,
)
from distributor_node.shared.runtime.threads import BlockingPool, hash_file

Denied = AlreadyStored | HeldElsewhere | NoSpace | NeverFits | NotReconciled

_MIN_RENEWAL = 0.5
"""Seconds by which a lease must end later than it was first seen to, for its holder to count as alive."""


@dataclass(slots=True)
class AdmissionWait:
    """Of one job. `space_wait` and `lease`: seconds, from the settings; times given to it are of any clock that never
    goes back."""

    space_wait: float
    lease: float
    _first_seen: dict[type, float] = field(default_factory=dict)
    _lease_expires_at: float | None = None

    def decide(self, denied: Denied, now: float) -> JobOutcome | None:
        """The job's outcome; None: wait a little and ask again."""
        waited = now - self._first_seen.setdefault(type(denied), now)
        match denied:
            case NeverFits():
                return DeadLetter("larger than the storage limit")
            case AlreadyStored():
                return Retry("the index and the volume contradict each other")
            case NoSpace(missing):
                return Retry(f"no space: {missing} bytes are missing") if waited >= self.space_wait else None
            case NotReconciled():
                return Retry("the volume is not reconciled yet") if waited >= self.space_wait else None
            case HeldElsewhere(seconds_left):
                return self._decide_held(now, seconds_left, waited)

    def _decide_held(self, now: float, seconds_left: float, waited: float) -> JobOutcome | None:
        """A holder that died leaves this very job, redelivered, as the only one: it must not end before the dead
        worker's lease does. So it may be with one that renews its lease, if its delivery was lost with its
        connection. Either shows within the time of one lease; a lease that neither ends nor is renewed is one whose
        end a clock that was put back has moved away."""
        if seconds_left <= 0:
            return Retry("being evicted") if waited >= self.space_wait else None
        expires_at = now + seconds_left
        if self._lease_expires_at is None:
            self._lease_expires_at = expires_at
        elif expires_at > self._lease_expires_at + _MIN_RENEWAL:
            return Requeue("fetched elsewhere")
        return Retry("held by a lease that does not end") if waited >= 2 * self.lease else None


# From a job to a lease: is the object there already, is there room, is somebody else at it?

_POLL_INTERVAL = 0.5  # seconds; announcements may be lost

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admitted:
    """The lease, and the monotonic time before it was asked for."""

    lease: Lease
    requested_at: float


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """`largest_size` in bytes; `space_wait` and `lease` in seconds; `warm_below`: bytes used and reserved up to which
    objects that nobody has asked for are fetched (None: as any other)."""

    largest_size: int
    space_wait: float
    lease: float
    warm_below: int | None = None


@dataclass(frozen=True, slots=True)
class UnrecordedFile:
    """A complete file that has no record, open; `head`: its first bytes."""

    descriptor: int
    size: int
    changed_at: float
    head: bytes


class Admission:
    """Decides with the state store and the volume; waits for a bounded time only."""

    def __init__(
        self, state: StateStore, volume: Volume, disk: BlockingPool, rules: AdmissionRules, worker: str
    ) -> None:
        self._state = state
        self._volume = volume
        self._disk = disk
        self._rules = rules
        self._worker = worker

    async def admit(self, media_object: MediaObject, *, warming: bool = False) -> Admitted | JobOutcome:
        """The lease, or what becomes of the job without. VolumeError and StateStoreUnavailable pass through.

        `warming`: nobody waits for the object, so nothing is evicted for it.
        """
        size = media_object.size
        if size is None:
            return DeadLetter("the size is not known")
        if size > self._rules.largest_size:
            return DeadLetter(f"{size} bytes are more than is ever cached")
        if warming and not await self._has_room_to_warm(size):
            return await self._skip_warming(media_object.object_id)
        return await self._admit(media_object, size, warming=warming)

    async def _admit(self, media_object: MediaObject, size: int, *, warming: bool) -> Admitted | JobOutcome:
        object_id = media_object.object_id
        wait = AdmissionWait(self._rules.space_wait, self._rules.lease)
        space_requested = invalid_removed = False
        async with AsyncExitStack() as stack:
            events: AsyncIterator[Announcement] | None = None
            while True:
                record = await self._disk.run(self._stored_record, object_id)
                if record is not None:
                    return await self._reindex(record)
                requested_at = time.monotonic()
                result = await self._state.begin(object_id, size, self._worker)
                if isinstance(result, Granted):
                    return Admitted(result.lease, requested_at)
                if isinstance(result, AlreadyStored) and not invalid_removed:
                    invalid_removed = True
                    if await self._restore(media_object):
                        logger.info("record_restored", object_id=object_id)
                        return Ack("already_cached")
                    if not await self._remove_invalid(object_id, result.generation):
                        return Retry("what is stored is not right, and in use")
                    continue
                if warming and isinstance(result, NoSpace):
                    return await self._skip_warming(object_id)
                if (outcome := wait.decide(result, requested_at)) is not None:
                    return outcome
                if isinstance(result, NoSpace) and not space_requested:
                    space_requested = True
                    await self._state.request_space(object_id, size, self._rules.space_wait)
                if events is None:
                    events = await stack.enter_async_context(self._state.listen())
                await _wait_for_event(events, object_id)

    async def _has_room_to_warm(self, size: int) -> bool:
        limit = self._rules.warm_below
        if limit is None:
            return True
        usage = await self._state.usage()
        return usage.used + usage.reserved + footprint(size) <= limit

    async def _skip_warming(self, object_id: ObjectId) -> JobOutcome:
        """The claim ends too: the next client's request asks for the fetch anew, with all that belongs to it."""
        fetch = (await self._state.find(object_id)).fetch
        if fetch is not None:
            await self._state.release_claim(object_id, fetch.worker)
        return Ack("no_room_to_warm")

    def _stored_record(self, object_id: ObjectId) -> StoredRecord | None:
        """The record of the complete object, if the volume has it; VolumeError if there is no volume. Blocks."""
        self._volume.check()
        found = self._volume.open_object(object_id)
        if found is None:
            return None
        found.close()
        return found.record

    async def _restore(self, wanted: MediaObject) -> bool:
        """A file without its record (lost, or not written yet when the file came from another node) gets one, if it is
        what the catalog says."""
        opened: list[UnrecordedFile] = []
        try:
            await self._disk.run(_open_unrecorded, self._volume, wanted, opened)
            for file in opened:
                if not await self._matches_hash(file.descriptor, wanted.content_hash):
                    return False
                record = record_for_file(wanted, file.size, file.head, min(file.changed_at, time.time()))
                await self._disk.run(self._volume.write_record, record)
            return bool(opened)
        finally:
            for file in opened:
                os.close(file.descriptor)

    async def _matches_hash(self, descriptor: int, expected: ContentHash | None) -> bool:
        return expected is None or await hash_file(self._disk.run, descriptor, expected) == expected

    async def _reindex(self, record: StoredRecord) -> JobOutcome:
        """The object is there. If the index does not know it (a worker died before it could say so), say so now; where
        that cannot be done, reconciliation does it later."""
        try:
            result = await self._state.begin(record.object_id, record.size, self._worker)
            if isinstance(result, Granted):
                await self._state.commit(result.lease, record.stored_at)
        except StateStoreUnavailable as error:
            logger.info("reindex_deferred", reason=str(error))
        return Ack("already_cached")

    async def _remove_invalid(self, object_id: ObjectId, generation: int) -> bool:
        """The index believes in an object that the volume does not have, or has cut short. False: it is in use."""
        removal = self._volume.removal(object_id)
        try:
            if not await self._disk.run(self._remove, object_id, removal):
                return False
            # Under the lock still: nobody can have put a right file there since.
            await self._state.forget(object_id, generation)
        finally:
            removal.close()
        logger.warning("invalid_file_removed", object_id=object_id)
        return True

    def _remove(self, object_id: ObjectId, removal: Removal) -> bool:
        """Blocks."""
        match removal.begin():
            case RemovalState.IN_USE:
                return False
            case RemovalState.READY if self._stored_record(object_id) is None:
                removal.unlink()
        return True


def _open_unrecorded(volume: Volume, wanted: MediaObject, opened: list[UnrecordedFile]) -> None:
    """Blocks."""
    found = volume.find_object(wanted.object_id)
    if found is None or found.size != wanted.size or volume.read_record(wanted.object_id):
        return
    descriptor = volume.open_raw(wanted.object_id)
    if descriptor is None:
        return
    try:
        head = os.pread(descriptor, SNIFF_BYTES, 0)
    except OSError as error:
        os.close(descriptor)
        raise VolumeError(f"read {wanted.object_id}: {error.strerror}") from error
    opened.append(UnrecordedFile(descriptor, found.size, found.changed_at, head))


async def _wait_for_event(events: AsyncIterator[Announcement], object_id: ObjectId) -> None:
    """Until something may have changed for this object."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_POLL_INTERVAL):
            async for announcement in events:
                freed = announcement.topic is Topic.SPACE_FREED
                if freed or announcement == Announcement(Topic.FETCH_CHANGED, object_id):
                    return
