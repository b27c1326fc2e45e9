"""One fetch under a lease, from opening the partial file to the end of the lease.

1. Look at the volume, in one call in a thread, since a client waits. An object that is stored all the same is
   committed: a worker died between rename and commit, or the index was emptied. Otherwise open the partial file, and
   keep its bytes if they can be proved to be the beginning of the same version. A file that is complete and verified is
   hashed again and published.
2. Read from the sources, write and hash.
3. Verify size and hash; after corrupt bytes, read again from other sources.
4. Publish: write the record, rename.
5. Commit in the state store, which ends the lease.
After a failure or a stop, the partial file is kept where the next attempt can resume it, and the lease is released. The
same happens when a large object has no viewers any more: the next request for it publishes another job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from math import inf

import structlog

from distributor_node.services.fetcher.admission import (
    Admitted,
    Denied,
    FetchTask,
    LeaseLost,
    LeaseRenewer,
    LeaseTimes,
)
from distributor_node.services.fetcher.download import (
    REHASH_CHUNK,
    AllSourcesCorrupt,
    Download,
    FetchLimits,
)
from distributor_node.services.fetcher.scheduler import Slot
from distributor_node.services.fetcher.side_streams import MIN_SIZE
from distributor_node.services.fetcher.window import FetchPaused
from distributor_node.shared.adapters.sources.failover import EarlyStream, FailoverReader, Preference
from distributor_node.shared.adapters.volume import PartialFile, Volume
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Comparison
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    DistributorError,
    NotStorable,
    SourceError,
    StateStoreUnavailable,
    VolumeError,
    VolumeFull,
)
from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome, Retry
from distributor_node.shared.domain.media_types import SNIFF_BYTES, detect_media_type, media_type_or_none
from distributor_node.shared.domain.objects import MediaObject, StoredRecord
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import DOWNLOADS_IN_PROGRESS, PHASE
from distributor_node.shared.ports.state_store import (
    REBUILD_DELAY,
    FailureCause,
    Lease,
    NoSpace,
    NotReconciled,
    StateStore,
)
from distributor_node.shared.runtime.threads import BlockingPool, hash_through

_SPACE_REQUEST_TTL = 60.0
"""Seconds that the evictor remembers a request for space made after ENOSPC."""

_REFUSAL_MEMORY = 10.0
"""Seconds after a lease was refused for lack of space, or not granted because the store failed, for which no source is
asked early: then others are not granted either."""

RecordFailure = Callable[[str, FailureCause, bool], Awaitable[None]]
"""Called with the reason and the cause of a failed attempt, and whether it is the last one. Does not raise."""

logger = structlog.get_logger()


class FetchRunner:
    """Runs fetches for which a lease was granted. However a fetch ends, all bytes on the volume stay reserved."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        failover_reader: FailoverReader,
        disk: BlockingPool,
        times: LeaseTimes,
        limits: FetchLimits | None = None,
    ) -> None:
        self._state = state
        self._volume = volume
        self._failover_reader = failover_reader
        self._disk = disk
        self._times = times
        self._limits = limits or FetchLimits()
        self._early_from = -inf  # monotonic seconds

    def ask_early(self, job: FetchJob, first_choice: str | None) -> EarlyStream | None:
        """Ask the source for a small object while its lease is being asked for. The caller closes what is returned.

        Only where the lease will be granted in all likelihood, and nothing is on the volume, or sources would be asked
        in vain: not for a job that was tried before, and not after refusals. And only where looking at the volume needs
        no thread. `first_choice`: the source to begin with.
        """
        wanted, window = job.media_object, self._limits.window
        if not (
            0 < (wanted.size or 0) < MIN_SIZE  # a larger one may have side streams
            and (window is None or (wanted.size or 0) <= window.above)
            and wanted.content_hash is not None
            and job.attempt == 1
            and not job.low_priority
            and not self._failover_reader.asks_peers(wanted.object_id, job.peer_use)
            and time.monotonic() >= self._early_from
            and self._disk.keeps_short_calls_in_loop
        ):
            return None
        try:
            if self._volume.has_file(wanted.object_id):
                return None
        except VolumeError:
            return None  # the fetch meets it too
        preference = Preference(lambda url: url != first_choice, job.peer_use)
        return EarlyStream(
            self._failover_reader, replace(wanted, validators=NO_VALIDATORS), wanted.sources, preference
        )

    async def give_up_early(self, early: EarlyStream, refusal: Denied | StateStoreUnavailable) -> None:
        """The lease was refused."""
        if isinstance(refusal, NoSpace | NotReconciled | StateStoreUnavailable):  # so will others be
            self._early_from = time.monotonic() + _REFUSAL_MEMORY
        await early.close()

    async def run(
        self,
        media_object: MediaObject,
        admitted: Admitted,
        record_failure: RecordFailure,
        slot: Slot | None = None,
        *,
        peer_use: PeerUse = PeerUse.FETCH,
        ordered: bool = False,
        early: EarlyStream | None = None,
    ) -> JobOutcome:
        """Fetch one object. When cancelled, keep the received bytes and release the lease.

        `slot`: see Worker. `peer_use`: what peers are asked. `ordered`, `early`: see FetchTask.

        A second copy that no peer can send is no failure: the next request for the object finds no fetch, and acts as
        if there had been none.
        """
        lease = admitted.lease
        renewer = LeaseRenewer(self._state, lease, self._times, admitted.requested_at)
        fetch = _PartialFetch(
            self._state,
            self._volume,
            self._failover_reader,
            self._disk,
            FetchTask(media_object, renewer, slot, peer_use, ordered, early),
            self._limits,
            resumed=admitted.resumed,
        )
        with DOWNLOADS_IN_PROGRESS.track_inprogress(), PHASE.labels("download").time():
            try:
                async with renewer.running():
                    stored = await fetch.run()
                if stored is not None:
                    return await self._commit_stored(lease, stored)
                return await self._commit(lease)
            except FetchPaused:
                await fetch.pause()
                return Ack("paused")
            except LeaseLost as lost:
                await record_failure(str(lost), FailureCause.OTHER, False)
                return Retry(str(lost))
            except (SourceError, VolumeError, StateStoreUnavailable) as error:
                if peer_use is PeerUse.COPY:
                    logger.info("copy_failed", reason=_describe(error))
                    await self._abandon(fetch, lease, error)
                    return Ack("not_copied")
                not_storable = _why_not_storable(media_object, error)
                if not_storable is not None:
                    # Before the lease is released. While this is remembered, requests are proxied.
                    await record_failure(not_storable, FailureCause.OTHER, True)
                    await fetch.discard()
                    return Ack("not_storable")
                if _is_outdated(media_object, error):
                    # The request that finds no fetch looks the object up again, and starts another one.
                    logger.info("fetch_outdated", reason=_describe(error))
                    await fetch.discard()
                    return Ack("outdated")
                reason = _describe(error)
                # Before the lease is released, because requests that wait for the release claim the object at once.
                await record_failure(reason, _cause(error), False)
                await self._abandon(fetch, lease, error)
                return Retry(reason)
            except asyncio.CancelledError:
                await fetch.suspend()
                raise
            finally:
                fetch.close()

    async def _commit(self, lease: Lease) -> JobOutcome:
        """Record the published object. If that fails, the next attempt or reconciliation records it."""
        try:
            with tracing.span("commit"):
                committed = await self._state.commit(lease, time.time())
        except StateStoreUnavailable as error:
            return Retry(f"stored, but not committed: {error}")
        return Ack("fetched" if committed else "fetched_to_be_adopted")

    async def _commit_stored(self, lease: Lease, stored: StoredRecord) -> JobOutcome:
        """Add an object to the index that was on the volume before. Without the state store, reconciliation adds it."""
        try:
            if stored.size == lease.size or await self._state.resize(lease, stored.size):
                await self._state.commit(lease, stored.stored_at)
            else:
                await self._state.park(lease)
        except StateStoreUnavailable as error:
            logger.info("reindex_deferred", reason=str(error))
        return Ack("already_cached")

    async def _abandon(self, fetch: _PartialFetch, lease: Lease, error: DistributorError) -> None:
        """Keep the received bytes if another attempt can resume from them."""
        full = isinstance(error, VolumeFull)
        if full and fetch.is_verified:
            await fetch.suspend()  # only its record is missing, and followers are sending it
        elif full or isinstance(error, AllSourcesCorrupt):
            await fetch.discard()
        else:
            await fetch.suspend()
        if full:
            await self._state.request_space(lease.object_id, lease.size, _SPACE_REQUEST_TTL)


def _why_not_storable(media_object: MediaObject, error: DistributorError) -> str | None:
    """Return why the object is not to be fetched again for a while, although its origin sends it."""
    if isinstance(error, AllSourcesFailed) and media_object.content_hash is None:
        refusal = error.not_storable
        if error.encoding is not None:
            return f"must not be stored: Content-Encoding: {error.encoding}"
        return None if refusal is None else str(refusal)
    return str(error) if isinstance(error, NotStorable) else None


def _is_outdated(media_object: MediaObject, error: DistributorError) -> bool:
    """Whether trying again is useless, because the job's description of the object is no longer true."""
    hashed = media_object.content_hash is not None
    return not hashed and isinstance(error, AllSourcesFailed) and error.contradicts_catalog


def _describe(error: DistributorError) -> str:
    match error:
        case AllSourcesFailed():
            return f"all sources failed: {str(error)[:500]}"
        case VolumeFull():
            return f"volume full: {error}"
    return str(error)


def _cause(error: DistributorError) -> FailureCause:
    if isinstance(error, AllSourcesCorrupt):
        return FailureCause.CORRUPT
    return FailureCause.SOURCES if isinstance(error, SourceError) else FailureCause.OTHER


class _PartialFetch:
    """The partial file of one fetch, from opening to publication or to the release of its lease."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        failover_reader: FailoverReader,
        disk: BlockingPool,
        task: FetchTask,
        limits: FetchLimits,
        *,
        resumed: bool,
    ) -> None:
        self._state = state
        self._limits = limits
        self._task = task
        # Whether the volume may hold bytes of the object that are reserved: of an earlier attempt, or of this one
        self._may_have_bytes = resumed
        self._volume = volume
        self._failover_reader = failover_reader
        self._disk = disk
        self._object = task.media_object
        self._lease = task.renewer.lease
        self._partial: PartialFile | None = None

    async def run(self) -> StoredRecord | None:
        """Open, download, verify and publish. Returns the record of an object that was stored before."""
        stored = await self._open_where_it_is_quick()
        if stored is not None:
            return stored
        if self.is_verified:
            if await self._publish_verified():
                return None
            await self._disk.run(self._reopen_for_writing)
        partial = self._opened
        # After the index was rebuilt from the volume, it may not know this file. It must know it before the file
        # grows. The renewal tells it, while the source is asked. A rebuild has seen a file that was there so soon.
        if self._task.renewer.age >= REBUILD_DELAY:
            self._task.renewer.renew_soon()
        await self._return_surplus()
        download = Download(
            self._state,
            self._failover_reader,
            self._disk,
            self._task,
            partial,
            self._limits,
        )
        if partial.total:
            await download.announce()  # the bytes of an earlier attempt can be sent
        await download.run()
        await self._publish(partial)
        return None

    async def _open_where_it_is_quick(self) -> StoredRecord | None:
        """See `_open`. What is there of an earlier fetch may have to be emptied or synced, which takes long."""
        if not self._may_have_bytes:
            is_new, stored = await self._disk.run_short(self._open_if_new)
            if is_new:
                return stored
        return await self._disk.run(self._open)

    @property
    def _opened(self) -> PartialFile:
        if self._partial is None:
            raise RuntimeError("the partial file is not open")
        return self._partial

    def _open(self) -> StoredRecord | None:
        """Open the verified file of an earlier worker, or else the partial file. Blocking.

        Returns the record instead, if the object is stored.
        """
        self._volume.check()
        return self._look_and_open()

    def _open_if_new(self) -> tuple[bool, StoredRecord | None]:
        """Likewise, if there is no partial file. Returns whether there was none, and what `_open` returns."""
        self._volume.check()
        if self._volume.has_partial(self._object.object_id):
            return False, None
        return True, self._look_and_open()

    def _look_and_open(self) -> StoredRecord | None:
        stored = self._volume.complete_record(self._object.object_id)
        if stored is None:
            sidecar = self._volume.partial_record(self._object.object_id)
            if self._open_verified(sidecar) is None:
                self._open_for_writing(sidecar)
        return stored

    async def _publish_verified(self) -> bool:
        """Publish the file of a worker that died after it had verified all bytes. Followers may still be sending it."""
        partial, expected = self._opened, self._object.content_hash
        if expected is not None:
            hasher = expected.hasher()
            await hash_through(self._disk.run, partial.read, hasher, chunk=REHASH_CHUNK)
            if hasher.digest() != expected.digest:
                self.close()
                return False
        await self._return_surplus()
        await self._publish(partial)
        return True

    def _open_verified(self, sidecar: StoredRecord | None) -> PartialFile | None:
        """Blocking."""
        if sidecar is None:
            return None
        expected = self._expected_record()
        if not _is_same_content(sidecar, expected):
            return None
        media_type = expected.media_type or sidecar.media_type
        record = replace(expected, media_type=media_type, freshness=sidecar.freshness).with_validators(
            sidecar.validators
        )
        self._partial = self._volume.open_verified_partial(record)
        return self._partial

    async def _return_surplus(self) -> None:
        """Release what the larger file of an earlier attempt had reserved: `_open_for_writing` has cut it."""
        if not self._lease.surplus:
            return
        try:
            await self._state.return_surplus(self._lease)
        except StateStoreUnavailable as error:
            logger.info("surplus_not_returned", reason=str(error))  # the end of the fetch releases it

    def _open_for_writing(self, sidecar: StoredRecord | None) -> None:
        """Open the partial file, empty unless it is the beginning of the same content. Blocking."""
        self._may_have_bytes = True
        expected = self._expected_record()
        same = sidecar is not None and _is_same_content(sidecar, expected)
        if sidecar is not None and same:
            # The bytes on disk are of the sidecar's version. Whether it is still the source's, its response will tell.
            expected = replace(expected, freshness=sidecar.freshness).with_validators(sidecar.validators)
            if expected.media_type is None:
                expected = replace(expected, media_type=sidecar.media_type)
        self._partial = self._volume.open_partial_for_writing(expected, empty=not same)
        if self._partial.size > expected.size:
            self._partial.restart()
        self._partial.check_free_space()

    def _reopen_for_writing(self) -> None:
        """Blocking."""
        self._open_for_writing(self._volume.partial_record(self._object.object_id))

    def _expected_record(self) -> StoredRecord:
        wanted = self._object
        return StoredRecord(
            object_id=wanted.object_id,
            size=self._lease.size,
            etag=wanted.etag,
            content_hash=wanted.content_hash,
            media_type=media_type_or_none(wanted.media_type),
            stored_at=int(time.time()),
            name=wanted.name,
            growing=wanted.size is None,
        ).with_validators(wanted.validators)

    async def _publish(self, partial: PartialFile) -> None:
        """Write the record and rename the file into place."""
        with tracing.span("publication"):
            await self._disk.run(self._publish_detected, partial)

    def _publish_detected(self, partial: PartialFile) -> None:
        """Blocking."""
        media_type = detect_media_type(self._object.media_type, partial.read(0, SNIFF_BYTES))
        partial.publish(replace(partial.record, media_type=media_type, stored_at=int(time.time())))

    @property
    def is_verified(self) -> bool:
        """Whether all bytes are there and right."""
        return self._partial is not None and self._partial.is_verified

    async def suspend(self, *, for_long: bool = False) -> None:
        """Keep the received bytes for another attempt and release the lease.

        Without bytes, or where no later response can be proved to continue them: as `discard`. `for_long`: keep no more
        room than the bytes take. Otherwise the whole object stays reserved, since the next attempt is on its way.
        """
        partial = self._partial
        if partial is not None and not (
            partial.total and partial.record.version.is_strong and not partial.record.growing
        ):
            await self.discard()
            return
        held = partial.held if partial is not None and for_long else None  # under the file's lock
        self.close()
        await self._release_lease(keep_reservation=self._may_have_bytes, held=held)

    async def pause(self) -> None:
        """As `suspend` for long: what was received survives a power cut."""
        if self._partial is not None and self._partial.total:
            try:
                await self._disk.run(self._partial.sync)
            except VolumeError as error:
                logger.warning("partial_not_synced", reason=str(error))  # what is lost is found by the hash
        await self.suspend(for_long=True)

    async def discard(self) -> None:
        """Delete the partial file, then release lease and reservation.

        If the file cannot be deleted, or was not opened (it may hold bytes of an earlier attempt), it stays reserved.
        """
        keep_reservation = self._may_have_bytes
        if self._partial is not None:
            try:
                await self._disk.run(self._partial.discard)
                keep_reservation = False
            except VolumeError as error:
                logger.warning("partial_removal_failed", reason=str(error))
            self._partial = None
        await self._release_lease(keep_reservation=keep_reservation)

    async def _release_lease(self, *, keep_reservation: bool, held: int | None = None) -> None:
        """`held`: bytes of the object that stay reserved; None: all of it."""
        try:
            if keep_reservation:
                await self._state.park(self._lease, held)
            else:
                await self._state.release(self._lease)
        except StateStoreUnavailable as error:
            logger.warning("lease_release_failed", reason=str(error))  # it expires

    def close(self) -> None:
        """Close the file if it is open, which also unlocks it."""
        if self._partial is not None:
            self._partial.close()
            self._partial = None


def _is_same_content(sidecar: StoredRecord, expected: StoredRecord) -> bool:
    """Whether the bytes beside the sidecar may be continued: they are of a version that a response can prove."""
    if expected.growing or sidecar.growing:
        return False
    if expected.content_hash is not None or sidecar.content_hash is not None:
        return (sidecar.size, sidecar.content_hash) == (expected.size, expected.content_hash)
    differs = sidecar.version.compare(expected.version) is Comparison.DIFFERENT
    return sidecar.version.is_strong and not differs
