"""Admission of one job: does the catalog agree, is the object stored, is there space, does another worker fetch it?

The result is a lease, or the outcome of the job. `LeaseRenewer` keeps the lease of a fetch, and cancels the fetch when
it is lost.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import structlog

from distributor_node.services.fetcher.scheduler import Slot
from distributor_node.shared.adapters.sources.failover import EarlyStream
from distributor_node.shared.adapters.volume import FileState, Removal, RemovalState, Volume
from distributor_node.shared.domain.errors import CatalogUnavailable, StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.jobs import Ack, DeadLetter, FetchJob, JobOutcome, Requeue, Retry
from distributor_node.shared.domain.media_types import SNIFF_BYTES
from distributor_node.shared.domain.objects import (
    Assignment,
    ContentHash,
    MediaObject,
    ObjectId,
    StoredRecord,
    record_for_file,
)
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.observability import tracing
from distributor_node.shared.ports.catalog import Catalog
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
    Superseded,
    Topic,
)
from distributor_node.shared.runtime.threads import BlockingPool, hash_file
from distributor_node.shared.waiting import boot_time, ended_by, wait_event

Denied = AlreadyStored | HeldElsewhere | Superseded | NoSpace | NeverFits | NotReconciled

OnRefused = Callable[[Denied | StateStoreUnavailable], Awaitable[None]]

_POLL_INTERVAL = 0.5
"""Seconds after which a waiting job asks again without an announcement, because announcements can be lost."""

FIRST_STEP = 4 * 1024 * 1024
"""Bytes reserved first for an object of unknown length."""

_MIN_RENEWAL = 0.5
"""Seconds that the expiry of a lease must move for its holder to count as alive."""

_RETRY_INTERVAL = 1.0
"""Seconds from a renewal that failed to the next."""

_SOURCE_UPDATE_DELAY = 0.05
"""Seconds until a new source is reported, so that the report does not compete with the first bytes."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admitted:
    """The job may fetch."""

    lease: Lease
    requested_at: float  # boot time before the lease was requested
    resumed: bool = True  # there was a reservation before, so there may be a partial file


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """Limits from the settings."""

    largest_size: int  # bytes of the largest object that is cached
    space_wait: float  # seconds that a job waits for space
    lease: float  # seconds of a lease
    warm_below: int | None = None
    """Bytes used and reserved up to which warming jobs are fetched. None: warming jobs are treated as any other."""


class Admission:
    """Admits jobs by state store and volume. Waits for a bounded time only."""

    def __init__(
        self, state: StateStore, volume: Volume, disk: BlockingPool, rules: AdmissionRules, worker: str
    ) -> None:
        self._state = state
        self._volume = volume
        self._disk = disk
        self._rules = rules
        self._worker = worker
        self._hashing: set[ObjectId] = set()

    async def admit(
        self,
        media_object: MediaObject,
        *,
        warming: bool = False,
        claim: int = 0,
        on_refused: OnRefused | None = None,
    ) -> Admitted | JobOutcome:
        """Return the lease, or the outcome of a job that is not to fetch.

        `warming`: no client waits for the object, so nothing is evicted for it. `claim`: serial of the job's claim.
        `on_refused`: called once, when the lease is refused at first, or the state store fails.
        Raises VolumeError and StateStoreUnavailable.
        """
        size = media_object.size
        if size is None:  # its length is not known: space is reserved in steps
            size = min(FIRST_STEP, self._rules.largest_size)
        if size > self._rules.largest_size:
            return DeadLetter(f"size: expected at most {self._rules.largest_size} bytes, got {size}")
        if warming and not await self._has_room_to_warm(size):
            return await self._skip_warming(media_object.object_id, claim)
        return await self._admit(media_object, size, claim, on_refused, warming=warming)

    async def _admit(
        self,
        media_object: MediaObject,
        size: int,
        claim: int,
        on_refused: OnRefused | None,
        *,
        warming: bool,
    ) -> Admitted | JobOutcome:
        """Ask for the lease until it is granted or the job has waited long enough."""
        object_id, trace = media_object.object_id, tracing.current_span().traceparent
        wait = AdmissionWait(self._rules.space_wait, self._rules.lease)
        space_requested = invalid_removed = False
        async with AsyncExitStack() as stack:
            events: AsyncIterator[Announcement] | None = None
            while True:
                requested_at = boot_time()
                try:
                    result = await self._state.begin(object_id, size, self._worker, claim, trace)
                except StateStoreUnavailable as error:
                    if on_refused is not None:
                        await on_refused(error)
                    if await self._disk.run(self._stored_record, object_id) is None:
                        raise
                    logger.info("reindex_deferred", reason=str(error))  # reconciliation adds it
                    return Ack("already_cached")
                if isinstance(result, Granted):
                    # Whether it is stored all the same, `FetchRunner` sees in the call that opens the partial file.
                    return Admitted(result.lease, requested_at, resumed=result.resumed)
                if on_refused is not None:
                    await on_refused(result)
                    on_refused = None
                record = await self._disk.run(self._stored_record, object_id)
                if record is not None:
                    return await self._reindex(record)
                if isinstance(result, AlreadyStored) and object_id in self._hashing:
                    return Requeue("its file is being verified")
                if isinstance(result, AlreadyStored) and not invalid_removed:
                    invalid_removed = True
                    if await self._restore_record(media_object):
                        logger.info("record_restored", object_id=object_id)
                        return Ack("already_cached")
                    if not await self._remove_invalid(object_id, result.generation):
                        return Retry("stored file is invalid and in use")
                    continue
                if warming and isinstance(result, NoSpace):
                    return await self._skip_warming(object_id, claim)
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

    async def _skip_warming(self, object_id: ObjectId, claim: int) -> JobOutcome:
        """Release the claim, too, so that a client's request publishes a job of normal priority."""
        await self._state.release_claim(object_id, None, claim)
        return Ack("no_room_to_warm")

    def _stored_record(self, object_id: ObjectId) -> StoredRecord | None:
        """Return the record of the complete object, None if it is not stored. Blocking. Raises VolumeError."""
        self._volume.check()
        return self._volume.complete_record(object_id)

    async def _reindex(self, record: StoredRecord) -> JobOutcome:
        """Add a stored object to the index if it is missing there, because a worker died before its commit.

        Without the state store, reconciliation adds it later.
        """
        try:
            result = await self._state.begin(record.object_id, record.size, self._worker)
            if isinstance(result, Granted):
                await self._state.commit(result.lease, record.stored_at)
        except StateStoreUnavailable as error:
            logger.info("reindex_deferred", reason=str(error))
        return Ack("already_cached")

    async def _restore_record(self, wanted: MediaObject) -> bool:
        """Write the record of a complete file that has none, or has changed since, if size and hash are the catalog's.

        The record was lost, or the file was copied from another node and its record is not written yet. Or the times
        or the inode of the file are not those of its record.
        """
        self._hashing.add(wanted.object_id)
        try:
            return await self._verify_file(wanted)
        finally:
            self._hashing.discard(wanted.object_id)

    async def _verify_file(self, wanted: MediaObject) -> bool:
        opened: list[UnrecordedFile] = []  # filled in the thread, so that a cancellation leaves no open file
        try:
            await self._disk.run(_open_unrecorded, self._volume, wanted, opened)
            for file in opened:
                if not await self._matches_hash(file.descriptor, wanted.content_hash):
                    return False
                changed_at = min(file.state.modified_ns / 1e9, time.time())
                record = file.record or record_for_file(wanted, file.state.size, file.head, changed_at)
                await self._disk.run(self._volume.write_record, record, file.state)
            return bool(opened)
        finally:
            for file in opened:
                os.close(file.descriptor)

    async def _matches_hash(self, descriptor: int, expected: ContentHash | None) -> bool:
        return expected is None or await hash_file(self._disk.run, descriptor, expected) == expected

    async def _remove_invalid(self, object_id: ObjectId, generation: int) -> bool:
        """Remove an object that is in the index, but missing or truncated on the volume. False: it is in use."""
        removal = self._volume.removal(object_id)
        try:
            if not await self._disk.run(self._remove, object_id, removal):
                return False
            # The removal still locks the object: no other worker can have published a correct file.
            await self._state.forget(object_id, generation)
        finally:
            removal.close()
        logger.warning("invalid_file_removed", object_id=object_id)
        return True

    def _remove(self, object_id: ObjectId, removal: Removal) -> bool:
        """Unlink the file, unless it is in use or complete. Blocking."""
        match removal.begin():
            case RemovalState.IN_USE:
                return False
            case RemovalState.READY if self._stored_record(object_id) is None:
                removal.unlink()
        return True


async def _wait_for_event(events: AsyncIterator[Announcement], object_id: ObjectId) -> None:
    """Wait until space was freed or the fetch of this object changed, at most _POLL_INTERVAL."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_POLL_INTERVAL):
            async for announcement in events:
                freed = announcement.topic is Topic.SPACE_FREED
                if freed or announcement == Announcement(Topic.FETCH_CHANGED, object_id):
                    return


@dataclass(frozen=True, slots=True)
class UnrecordedFile:
    """A complete file without a record, or that is not as its record says."""

    descriptor: int  # open
    state: FileState  # before it is hashed
    head: bytes  # the first bytes
    record: StoredRecord | None


def _open_unrecorded(volume: Volume, wanted: MediaObject, opened: list[UnrecordedFile]) -> None:
    """Open the file if it has the expected size and can be verified, and append it to `opened`. Blocking."""
    record = volume.read_record(wanted.object_id)
    if record is not None and (wanted.content_hash is None or record.content_hash != wanted.content_hash):
        return
    descriptor = volume.open_raw(wanted.object_id)
    if descriptor is None:
        return
    try:
        state = FileState.of(os.fstat(descriptor))
        head = os.pread(descriptor, SNIFF_BYTES, 0)
    except OSError as error:
        os.close(descriptor)
        raise VolumeError(f"cannot read {wanted.object_id}: {error.strerror}") from error
    if state.size != wanted.size:
        os.close(descriptor)
        return
    opened.append(UnrecordedFile(descriptor, state, head, record))


class JobChecker:
    """Compares a job with the catalog before it is carried out. A message is a hint: what is fetched, from where, and
    whether at all, is what the catalog says now.

    The broker may have been restored from a backup, the buckets may have changed, and what a message says would be
    served as immutable.
    """

    def __init__(
        self,
        catalog: Catalog,
        state: StateStore,
        assignment: Callable[[], Assignment],
        max_age: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`assignment`: returns the current one. `max_age`: seconds that a job lives with all its delays.
        `clock`: POSIX seconds.
        """
        self._catalog, self._state, self._assignment = catalog, state, assignment
        self._max_age, self._clock = max_age, clock

    async def check(self, job: FetchJob) -> FetchJob | JobOutcome:
        """Return the job as the catalog describes its object, or what becomes of it instead."""
        # An id that was read from a message does not know its path; a name of which it is the digest tells it.
        object_id = job.object_id.with_path(job.media_object.name)
        try:
            known = await self._catalog.look_up(object_id)
            if known is not None and known.version != job.media_object.version and await self.is_live(job):
                # Race: 1. the catalog changes; 2. an API process learns it and publishes the job; 3. this process
                # still has the answer of before.
                await self._catalog.forget(known)
                known = await self._catalog.look_up(object_id)
        except CatalogUnavailable as error:
            # The claim shows that the job is of this node, which has asked the catalog just before.
            return job if await self.is_live(job) else Retry(f"catalog: {error}")
        refusal = self._refusal(known)
        if known is None or refusal is not None:
            logger.warning("job_dropped", reason=refusal, age=self._age(job))
            await self._release_claim(job)
            return Ack(refusal or "does_not_exist")
        if known == job.media_object:
            return job
        if known.version != job.media_object.version:
            logger.warning("job_corrected", size=known.size, age=self._age(job))
        return replace(job, media_object=replace(known, object_id=job.object_id))

    def _refusal(self, known: MediaObject | None) -> str | None:
        """Return why the object is not fetched, as a label of metrics. None: it is."""
        if known is None:
            return "does_not_exist"
        if not self._assignment().covers(known):
            return "not_served"
        if not known.accepted:
            return "not_uploaded"
        return "unknown_size" if known.size is None and known.content_hash is not None else None

    def _age(self, job: FetchJob) -> float:
        return round(self._clock() - job.published_at, 3)

    async def is_live(self, job: FetchJob) -> bool:
        """Whether the job is young, and the state store knows of a claim or a fetch that it belongs to."""
        if abs(self._age(job)) > self._max_age:
            return False
        try:
            return (await self._state.find(job.object_id)).fetch is not None
        except StateStoreUnavailable:
            return False

    async def _release_claim(self, job: FetchJob) -> None:
        """End the job's claim, so that requests do not wait for a fetch. A live lease is not affected."""
        try:
            await self._state.release_claim(job.object_id, None, job.claim)
        except StateStoreUnavailable as error:
            logger.info("claim_not_released", reason=str(error))


@dataclass(slots=True)
class AdmissionWait:
    """Decides how long one job waits for admission. Pure."""

    space_wait: float  # seconds
    lease: float  # seconds
    _first_denied_at: dict[type, float] = field(default_factory=dict)
    _lease_expires_at: float | None = None

    def decide(self, denied: Denied, now: float) -> JobOutcome | None:
        """Return the outcome of the job; None: wait and ask again. `now`: monotonic seconds."""
        waited = now - self._first_denied_at.setdefault(type(denied), now)
        space_wait_is_over = waited >= self.space_wait
        match denied:
            case NeverFits():
                return DeadLetter("size: larger than the storage limit")
            case Superseded():
                return Ack("superseded")
            case AlreadyStored():
                return Retry("index and volume disagree about the object")
            case NoSpace(missing):
                return Retry(f"no space: {missing} bytes missing") if space_wait_is_over else None
            case NotReconciled():
                return Retry("index not reconciled yet") if space_wait_is_over else None
            case HeldElsewhere(seconds_left) if seconds_left <= 0:
                return Retry("object is being evicted") if space_wait_is_over else None
            case HeldElsewhere(seconds_left):
                return self._decide_held(now + seconds_left, waited)

    def _decide_held(self, expires_at: float, waited: float) -> JobOutcome | None:
        """Another worker holds the lease.

        The job must not end before that lease does: if the holder died, this job is the only one left. So is it if the
        holder lost its connection to the broker and fails later.
        1. If the holder renews the lease, it is alive: requeue.
        2. If the lease expires, we get it when we ask again.
        3. If neither happens for two lease lengths, the clock of the state store moved backwards: retry.
        """
        if self._lease_expires_at is None:
            self._lease_expires_at = expires_at
        elif expires_at > self._lease_expires_at + _MIN_RENEWAL:
            return Requeue("fetched by another worker")
        return Retry("lease is neither renewed nor expires") if waited >= 2 * self.lease else None


class LeaseLost(Exception):
    """Another worker may hold the lease of this object now: nothing may be written any more."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds."""

    lease: float  # from one renewal until the lease expires in the state store
    renewal: float  # between two renewals, at most half of `lease`


class LeaseRenewer:
    """Renews one lease, in the background while `running` and on request.

    The expiry is counted from before the request that granted or renewed the lease. So this side never considers the
    lease valid for longer than the state store does.
    """

    def __init__(
        self,
        state: StateStore,
        lease: Lease,
        times: LeaseTimes,
        requested_at: float,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        """`clock`: in seconds; it goes on while the machine is suspended.

        `requested_at`: its time before the lease was requested.
        """
        self._state = state
        self.lease = lease
        self._times = times
        self._clock = clock
        self._expires_at = requested_at + times.lease
        self._lost = False
        self._source: str | None = None
        self._source_changed = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Renew while the block runs. When the lease is lost, cancel the block and raise LeaseLost."""
        renewing = asyncio.create_task(self._renew_periodically(), name=f"lease-{self.lease.object_id}")
        try:
            async with ended_by(renewing):
                yield
        finally:
            await self._cancel_renewal()
            lost = None if renewing.cancelled() else renewing.exception()
        if lost is not None:
            raise lost

    async def _renew_periodically(self) -> None:
        """Ends only by cancellation or LeaseLost."""
        seconds = self._times.renewal
        while True:
            await wait_event(self._source_changed, min(seconds, self._seconds_left()))
            if self._source_changed.is_set():
                await asyncio.sleep(min(_SOURCE_UPDATE_DELAY, self._seconds_left()))
            self._source_changed.clear()
            seconds = self._times.renewal
            try:
                await self.renew()
            except StateStoreUnavailable as error:
                if not self.is_valid:
                    self._lost = True
                    raise LeaseLost(f"lease of {self.lease.object_id} expired: renewal failed") from error
                logger.warning("lease_renewal_failed", object_id=self.lease.object_id, reason=str(error))
                seconds = min(_RETRY_INTERVAL, self._times.renewal)

    async def renew(self) -> None:
        """Renew once. Raises LeaseLost if another worker holds the lease, or StateStoreUnavailable."""
        requested_at = self._clock()
        if not await self._state.renew(self.lease, self._source):
            self._lost = True
            raise LeaseLost(f"lease of {self.lease.object_id} is lost")
        self._expires_at = requested_at + self._times.lease

    def renew_soon(self) -> None:
        """Start a renewal now, within `running`. The next `ensure_valid` waits for it."""
        self._renewal = asyncio.create_task(self.renew(), name=f"lease-renewal-{self.lease.object_id}")

    async def ensure_valid(self) -> None:
        """Call before each write. Raises LeaseLost unless the lease is valid.

        1. If `renew_soon` started a renewal, wait for it. Raises StateStoreUnavailable if it failed for that reason.
        2. If the lease has expired by our clock (the process was stopped for long), renew it before the write.
        """
        if self._renewal is not None:
            renewal, self._renewal = self._renewal, None
            await renewal
        if self.is_valid:
            return
        if self._lost:
            raise LeaseLost(f"lease of {self.lease.object_id} is lost")
        try:
            await self.renew()
        except StateStoreUnavailable as error:
            raise LeaseLost(f"lease of {self.lease.object_id} expired") from error

    @property
    def is_valid(self) -> bool:
        """Whether writing is safe. False, too, after the process was stopped for longer than the lease."""
        return not self._lost and self._clock() < self._expires_at

    @property
    def age(self) -> float:
        """Seconds since the lease was requested or last renewed."""
        return self._clock() - (self._expires_at - self._times.lease)

    def set_source(self, url: str) -> None:
        """Report the source in use soon: the API proxies far ranges from it."""
        if url != self._source:
            self._source = url
            self._source_changed.set()

    def _seconds_left(self) -> float:
        return max(0.0, self._expires_at - self._clock())

    async def _cancel_renewal(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class FetchTask:
    """What to fetch, under which lease, and the slot that counts the source in use."""

    media_object: MediaObject
    renewer: LeaseRenewer
    slot: Slot | None
    peer_use: PeerUse = PeerUse.FETCH
    ordered: bool = False  # the operator wants all of it
    early: EarlyStream | None = None  # all of it, asked for before the lease was granted
