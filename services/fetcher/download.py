"""One fetch under a lease, from opening the partial file to the end of the lease.

1. Open the partial file, and keep its bytes if they can be proved to be the beginning of the same version.
   A file that is complete and verified is hashed again and published.
2. Read from the sources, write and hash.
3. Verify size and hash; after corrupt bytes, read again from other sources.
4. Publish: write the record, rename.
5. Commit in the state store, which ends the lease.
After a failure or a stop, the partial file is kept where the next attempt can resume it, and the lease is released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

import structlog

from distributor_node.services.fetcher.lease import LeaseLost, LeaseRenewer, LeaseTimes
from distributor_node.services.fetcher.partial_writer import PartialWriter
from distributor_node.services.fetcher.scheduler import Slot
from distributor_node.shared.adapters.sources.client import Expected, SourceResponse
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.volume import PartialFile, Volume
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Comparison
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    DistributorError,
    NotStorable,
    SourceError,
    SourceWrong,
    StateStoreUnavailable,
    VolumeError,
    VolumeFull,
)
from distributor_node.shared.domain.http_caching import (
    CachingRules,
    Freshness,
    freshness_of,
    is_useful,
    why_not_stored,
)
from distributor_node.shared.domain.jobs import Ack, JobOutcome, Retry
from distributor_node.shared.domain.media_types import SNIFF_BYTES, detect_media_type, media_type_or_none
from distributor_node.shared.domain.objects import Hasher, MediaObject, StoredRecord, source_name
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import (
    DOWNLOADS_IN_PROGRESS,
    PHASE,
    SOURCE_FAILURES,
    source_label,
)
from distributor_node.shared.ports.state_store import (
    Announcement,
    FailureCause,
    Lease,
    StateStore,
    Topic,
)
from distributor_node.shared.runtime.threads import BlockingPool, hash_through
from distributor_node.shared.waiting import Backoff

_SPACE_REQUEST_TTL = 60.0
"""Seconds that the evictor remembers a request for space made after ENOSPC."""

_REHASH_CHUNK = 4 * 1024 * 1024

_MAX_RESTARTS = 2
"""How often one job begins again at the first byte, because nothing proves that the rest is of the same version."""

RecordFailure = Callable[[str, FailureCause, bool], Awaitable[None]]
"""Called with the reason and the cause of a failed attempt, and whether it is the last one. Does not raise."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What may be stored."""

    largest_size: int = 2**63 - 1  # bytes of the largest object that is cached
    space_wait: float = 10.0  # seconds to wait for space for more bytes of an object of unknown length
    caching_rules: CachingRules | None = None  # if the objects are those of an HTTP origin


class AllSourcesCorrupt(SourceWrong):
    """Every source sent the whole object, and none sent the correct bytes."""


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

    async def run(
        self,
        media_object: MediaObject,
        lease: Lease,
        requested_at: float,
        record_failure: RecordFailure,
        slot: Slot | None = None,
    ) -> JobOutcome:
        """Fetch one object. When cancelled, keep the received bytes and release the lease.

        `requested_at`: the boot time before the lease was requested. `slot`: see Worker.
        """
        renewer = LeaseRenewer(self._state, lease, self._times, requested_at)
        fetch = _PartialFetch(
            self._state,
            self._volume,
            self._failover_reader,
            self._disk,
            _Task(media_object, renewer, slot),
            self._limits,
        )
        with DOWNLOADS_IN_PROGRESS.track_inprogress(), PHASE.labels("download").time():
            try:
                async with renewer.running():
                    await fetch.run()
                return await self._commit(lease)
            except LeaseLost as lost:
                await record_failure(str(lost), FailureCause.OTHER, False)
                return Retry(str(lost))
            except (SourceError, VolumeError, StateStoreUnavailable) as error:
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


@dataclass(frozen=True, slots=True)
class _Task:
    """What to fetch, under which lease, and the slot that counts the source in use."""

    media_object: MediaObject
    renewer: LeaseRenewer
    slot: Slot | None


class _PartialFetch:
    """The partial file of one fetch, from opening to publication or to the release of its lease."""

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        failover_reader: FailoverReader,
        disk: BlockingPool,
        task: _Task,
        limits: FetchLimits,
    ) -> None:
        self._state = state
        self._limits = limits
        self._task = task
        self._volume = volume
        self._failover_reader = failover_reader
        self._disk = disk
        self._object = task.media_object
        self._lease = task.renewer.lease
        self._partial: PartialFile | None = None

    async def run(self) -> None:
        """Open, download, verify and publish."""
        if await self._publish_verified():
            return
        partial = await self._disk.run(self._open)
        # After the index was rebuilt from the volume, it may not know this file. It must know it before the file
        # grows. The renewal tells it, while the source is asked.
        self._task.renewer.renew_soon()
        await self._return_surplus()
        download = _Download(
            self._state,
            self._failover_reader,
            self._disk,
            self._task,
            partial,
            self._limits,
        )
        if partial.size:
            await download.announce()  # the bytes of an earlier attempt can be sent
        await download.run()
        await self._publish(partial)

    async def _publish_verified(self) -> bool:
        """Publish the file of a worker that died after it had verified all bytes. Followers may still be sending it."""
        partial = await self._disk.run(self._open_verified)
        if partial is None:
            return False
        expected = self._object.content_hash
        if expected is not None:
            hasher = expected.hasher()
            await hash_through(self._disk.run, partial.read, hasher, chunk=_REHASH_CHUNK)
            if hasher.digest() != expected.digest:
                self.close()
                return False
        await self._return_surplus()
        await self._publish(partial)
        return True

    def _open_verified(self) -> PartialFile | None:
        """Blocking."""
        expected = self._expected_record()
        sidecar = self._volume.partial_record(self._object.object_id)
        if sidecar is None or not _is_same_content(sidecar, expected):
            return None
        media_type = expected.media_type or sidecar.media_type
        record = replace(expected, media_type=media_type, freshness=sidecar.freshness).with_validators(
            sidecar.validators
        )
        self._partial = self._volume.open_verified_partial(record)
        return self._partial

    async def _return_surplus(self) -> None:
        """Release what the larger file of an earlier attempt had reserved: `_open` has cut it."""
        if not self._lease.surplus:
            return
        try:
            await self._state.return_surplus(self._lease)
        except StateStoreUnavailable as error:
            logger.info("surplus_not_returned", reason=str(error))  # the end of the fetch releases it

    def _open(self) -> PartialFile:
        """Open the partial file, empty unless it is the beginning of the same content. Blocking."""
        expected = self._expected_record()
        sidecar = self._volume.partial_record(self._object.object_id)
        if sidecar is None or not _is_same_content(sidecar, expected):
            # Empty the file before the sidecar changes. After a crash, a new sidecar beside old bytes would be taken
            # for one content.
            self._partial = self._volume.open_partial_for_writing(expected, write_sidecar=False)
            if self._partial.size:
                self._partial.restart()
            self.close()
        else:
            # The bytes on disk are of the sidecar's version. Whether it is still the source's, its response will tell.
            expected = replace(expected, freshness=sidecar.freshness).with_validators(sidecar.validators)
            if expected.media_type is None:
                expected = replace(expected, media_type=sidecar.media_type)
        self._partial = self._volume.open_partial_for_writing(expected)
        if self._partial.size > expected.size:
            self._partial.restart()
        self._partial.check_free_space()
        return self._partial

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
            head = await self._disk.run(partial.read, 0, SNIFF_BYTES)
            media_type = detect_media_type(self._object.media_type, head)
            record = replace(partial.record, media_type=media_type, stored_at=int(time.time()))
            await self._disk.run(partial.publish, record)

    @property
    def is_verified(self) -> bool:
        """Whether all bytes are there and right."""
        return self._partial is not None and self._partial.is_verified

    async def suspend(self) -> None:
        """Keep the received bytes for another attempt and release the lease.

        Without bytes, or where no later response can be proved to continue them: as `discard`.
        """
        partial = self._partial
        if partial is not None and not (
            partial.size and partial.record.version.is_strong and not partial.record.growing
        ):
            await self.discard()
            return
        self.close()
        await self._release_lease(keep_reservation=True)

    async def discard(self) -> None:
        """Delete the partial file, then release lease and reservation.

        If the file cannot be deleted, or was not opened (it may hold bytes of an earlier attempt), it stays reserved.
        """
        keep_reservation = True
        if self._partial is not None:
            try:
                await self._disk.run(self._partial.discard)
                keep_reservation = False
            except VolumeError as error:
                logger.warning("partial_removal_failed", reason=str(error))
            self._partial = None
        await self._release_lease(keep_reservation=keep_reservation)

    async def _release_lease(self, *, keep_reservation: bool) -> None:
        try:
            await (self._state.park(self._lease) if keep_reservation else self._state.release(self._lease))
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


class _Download:
    """Fills the partial file of one object with verified bytes.

    Space for an object of unknown length is reserved in steps, each before its bytes are written. Its length is known
    from the source's response, or at the end of that.
    """

    def __init__(
        self,
        state: StateStore,
        failover_reader: FailoverReader,
        disk: BlockingPool,
        task: _Task,
        partial: PartialFile,
        limits: FetchLimits,
    ) -> None:
        self._state = state
        self._limits = limits
        self._failover_reader = failover_reader
        self._disk = disk
        self._object = task.media_object
        self._partial = partial
        self._renewer = task.renewer
        self._slot = task.slot
        self._total: int | None = None  # the length, as the source states it
        self._span = tracing.current_span()  # threads do not know it

    async def run(self) -> None:
        """Read the missing bytes. On return, size and hash are correct and the file is marked as verified.

        Raises:
            AllSourcesFailed: the received bytes are kept.
            AllSourcesCorrupt: the file is empty again.
            LeaseLost: nothing was written after the loss.
            VolumeError
        """
        groups: SourceGroups = (self._object.sources,)
        restarts = 0
        while groups:
            contributors: set[str] = set()
            resumed = self._partial.size > 0
            try:
                verified = await self._read_from(groups[0], contributors)
            except AllSourcesFailed as error:
                if self._must_start_over(error) and restarts < _MAX_RESTARTS:
                    restarts += 1
                elif len(groups) == 1:
                    raise
                else:
                    groups = groups[1:]
            else:
                if verified:
                    await self.announce()
                    return
                self._report_corruption(contributors, resumed=resumed)
                groups = groups_after_corruption(groups, contributors, resumed=resumed)
            await self._disk.run(self._partial.restart)
            await self.announce()
        raise AllSourcesCorrupt("all sources sent corrupt bytes")

    def _must_start_over(self, error: AllSourcesFailed) -> bool:
        """Whether no source can continue the bytes on disk, although one may send the object from its beginning."""
        if not self._partial.size or self._object.content_hash is not None or error.contradicts_size:
            return False
        if self._partial.record.growing:
            return True
        return error.contradicts_catalog or not self._partial.record.version.is_strong

    async def announce(self) -> None:
        """Wake the responses that wait for a change of the partial file."""
        await self._state.announce(Announcement(Topic.FETCH_CHANGED, self._object.object_id))

    async def _read_from(self, sources: Sequence[str], contributors: set[str]) -> bool:
        """Read the missing bytes and verify the whole. Returns whether it is correct.

        The sources that sent bytes are added to `contributors`.
        """
        expected = self._object.content_hash
        hasher = expected.hasher() if expected is not None else None
        offset = self._partial.size
        await self._hash_existing_bytes(hasher, offset)
        verify = partial(self._verify, hasher)
        reserve = self._reserve if self._object.size is None else None
        writer = PartialWriter(
            self._partial, hasher, self._renewer, self._disk, self.announce, verify, reserve
        )
        began_at = time.monotonic()
        first_choice = None if self._slot is None else self._slot.url
        # From the beginning, any version that a source has now is as good as the one that the catalog has seen. All
        # that follows must be of the same one.
        wanted = replace(
            self._object, validators=self._partial.record.validators if offset else NO_VALIDATORS
        )
        stream = self._failover_reader.stream(
            wanted,
            offset,
            None,
            sources,
            self._on_source,
            expected=Expected(must_match=offset > 0),
            preference=lambda url: url != first_choice,
        )
        async with writer.writing(offset), aclosing(stream) as chunks:
            async for chunk in chunks:
                if not contributors:
                    PHASE.labels("source_first_byte").observe(time.monotonic() - began_at)
                contributors.add(chunk.source)
                await writer.put(chunk.data)
        if self._partial.record.growing:
            await self._end_growth()
        if self._partial.size != self._partial.record.size:
            return False
        return await self._disk.run(verify) if writer.verified is None else writer.verified

    async def _reserve(self, end: int) -> None:
        """Make sure that `end` bytes of an object of unknown length are reserved. Called before they are written.

        Raises NotStorable if it is too large, VolumeError if there is no space in time.
        """
        reserved, total = self._partial.record.size, self._total
        if total is not None and self._partial.record.growing:
            # Known from the response: before the first byte, so that clients are told.
            await self._resize(total)
            self._partial.set_size(total, growing=False)
        elif end > reserved:
            step = max(end, min(2 * reserved, self._limits.largest_size))
            await self._resize(step)
            self._partial.set_size(step, growing=True)

    async def _resize(self, size: int) -> None:
        if size > self._limits.largest_size:
            raise NotStorable(f"larger than {self._limits.largest_size} bytes")
        lease, deadline = self._renewer.lease, time.monotonic() + self._limits.space_wait
        poll = Backoff(0.05, 0.5, jitter=False)
        while not await self._state.resize(lease, size):
            await self._renewer.ensure_valid()
            if time.monotonic() >= deadline:
                raise VolumeError(f"no space for {size} bytes of {self._object.object_id}")
            missing = size - self._partial.record.size
            await self._state.request_space(self._object.object_id, missing, self._limits.space_wait)
            await poll.wait()

    async def _end_growth(self) -> None:
        """The response has ended: release what is reserved beyond its length."""
        size = self._partial.size
        await self._resize(size)
        self._partial.set_size(size, growing=False)
        await self._disk.run(self._partial.write_sidecar)

    async def _hash_existing_bytes(self, hasher: Hasher | None, size: int) -> None:
        """Feed the hasher with the bytes of an earlier attempt."""
        if hasher is None or not size:
            return
        hashed = await hash_through(self._disk.run, self._partial.read, hasher, chunk=_REHASH_CHUNK)
        if hashed != size:
            raise VolumeError(
                f"partial file of {self._object.object_id}: expected {size} bytes, read {hashed}"
            )

    def _on_source(self, url: str, response: SourceResponse) -> None:
        """Called when a source starts to send."""
        self._renewer.set_source(url)
        if self._slot is not None:
            self._slot.move_to(url)
        if not self._partial.size:
            self._partial.set_version(response.validators, self._freshness_of(response))
            self._total = response.total
        if response.media_type is None or media_type_or_none(self._object.media_type) is not None:
            return
        # A response states its type with its first byte. Once the file has bytes, its type must not change.
        if self._partial.record.media_type is None or not self._partial.size:
            self._partial.set_media_type(response.media_type)

    def _freshness_of(self, response: SourceResponse) -> Freshness | None:
        """Return the freshness of an object of an HTTP origin. Raises NotStorable if it must not be stored."""
        if self._limits.caching_rules is None or self._object.content_hash is not None:
            return None
        why = why_not_stored(response.status, response.headers)
        freshness = freshness_of(response.headers, time.time(), response.delay, self._limits.caching_rules)
        if why is None and not is_useful(freshness, response.validators):
            why = "stale on arrival, without a validator"
        if why is not None:
            raise NotStorable(why)
        return freshness

    def _verify(self, hasher: Hasher | None) -> bool:
        """Compare the hash of the complete file. If correct, responses may send the last bytes. Blocking."""
        expected = self._object.content_hash
        with tracing.span("verification", parent=self._span) as span:
            if hasher is not None and expected is not None and hasher.digest() != expected.digest:
                span.fail("the bytes are not those of the content hash")
                return False
            self._partial.mark_verified()
        return True

    def _report_corruption(self, contributors: set[str], *, resumed: bool) -> None:
        logger.warning(
            "fetched_bytes_corrupt", sources=sorted(source_name(url) for url in contributors), resumed=resumed
        )
        for url in contributors:
            SOURCE_FAILURES.labels(source_label(url), SourceWrong.reason).inc()
        if len(contributors) == 1 and not resumed:
            (contributor,) = contributors
            self._failover_reader.report_corrupt(contributor, self._object.object_id)


SourceGroups = tuple[tuple[str, ...], ...]
"""Groups of source URLs. Each group is one attempt at the whole object, with failover between its sources."""


def groups_after_corruption(
    groups: SourceGroups, contributors: AbstractSet[str], *, resumed: bool
) -> SourceGroups:
    """Return the groups to try after the first of `groups` sent corrupt bytes, which came from `contributors`.

    - If bytes of an earlier attempt were `resumed`, those may be the corrupt ones: all groups are tried again.
    - A single contributor is excluded.
    - With several contributors the corrupt one is unknown: first the other sources are tried together, then each
      contributor alone.
    """
    tried, *later = groups
    if resumed:
        return groups
    others = tuple(url for url in tried if url not in contributors)
    first = (others,) if others else ()
    suspects = tuple((url,) for url in tried if url in contributors) if len(contributors) > 1 else ()
    return (*first, *later, *suspects)
