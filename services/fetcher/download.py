"""One fetch under a lease: partial file, download, verification, publication, and the end of the lease."""

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
from distributor_node.shared.adapters.sources.client import SourceResponse
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.volume import PartialFile, Volume
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    DistributorError,
    SourceError,
    SourceWrong,
    StateStoreUnavailable,
    VolumeError,
    VolumeFull,
)
from distributor_node.shared.domain.jobs import Ack, JobOutcome, Retry
from distributor_node.shared.domain.media_types import SNIFF_BYTES, detect_media_type, media_type_or_none
from distributor_node.shared.domain.objects import Hasher, MediaObject, StoredRecord, source_name
from distributor_node.shared.observability.metrics import (
    DOWNLOADS_IN_PROGRESS,
    PHASE,
    SOURCE_FAILURES,
    source_label,
)
from distributor_node.shared.ports.state_store import Announcement, Lease, StateStore, Topic
from distributor_node.shared.runtime.threads import BlockingPool, hash_through

_SPACE_REQUEST_TTL = 60.0

RecordFailure = Callable[[str], Awaitable[None]]
"""Told why an attempt has failed; never fails itself."""

logger = structlog.get_logger()


class FetchRunner:
    """Fetches what a lease was granted for. However it ends, the reservation covers what is on the volume."""

    def __init__(self, deps: FetchDeps, volume: Volume, times: LeaseTimes) -> None:
        self._deps = deps
        self._volume = volume
        self._times = times

    async def run(
        self, media_object: MediaObject, lease: Lease, requested_at: float, record_failure: RecordFailure
    ) -> JobOutcome:
        """`requested_at`: monotonic time before the lease was asked for. Cancelled: what came is kept, the lease given
        back."""
        fetch = _PartialFetch(self._deps, self._volume, media_object, lease)
        renewer = LeaseRenewer(self._deps.state, lease, self._times, requested_at)
        with DOWNLOADS_IN_PROGRESS.track_inprogress(), PHASE.labels("download").time():
            try:
                async with renewer.running():
                    await fetch.run(renewer)
                return await self._commit(lease)
            except LeaseLost as lost:
                await record_failure(str(lost))
                return Retry(str(lost))
            except (SourceError, VolumeError, StateStoreUnavailable) as error:
                reason = _describe(error)
                # Before the lease is given back: who waits for that asks at once.
                await record_failure(reason)
                await self._abandon(fetch, lease, error)
                return Retry(reason)
            except asyncio.CancelledError:
                await fetch.suspend()
                raise
            finally:
                fetch.close()

    async def _abandon(self, fetch: _PartialFetch, lease: Lease, error: DistributorError) -> None:
        """What came is kept where another attempt can go on from it."""
        if not isinstance(error, AllSourcesCorrupt | VolumeFull):
            await fetch.suspend()
            return
        await fetch.discard()
        if isinstance(error, VolumeFull):
            await self._deps.state.request_space(lease.object_id, lease.size, _SPACE_REQUEST_TTL)

    async def _commit(self, lease: Lease) -> JobOutcome:
        """Without a word from the state store the file is there all the same: the next attempt, or reconciliation,
        makes it known."""
        try:
            committed = await self._deps.state.commit(lease, time.time())
        except StateStoreUnavailable as error:
            return Retry(f"stored, but not committed: {error}")
        return Ack("fetched" if committed else "fetched_to_be_adopted")


class _PartialFetch:
    """The partial file of one fetch, from opening to its end."""

    def __init__(self, deps: FetchDeps, volume: Volume, media_object: MediaObject, lease: Lease) -> None:
        self._deps = deps
        self._volume = volume
        self._object = media_object
        self._lease = lease
        self._partial: PartialFile | None = None

    async def run(self, renewer: LeaseRenewer) -> None:
        """From the first byte to the rename."""
        partial = await self._deps.disk.run(self._open)
        # An index that was rebuilt from the volume a moment ago may not know this file; before it grows, it must. The
        # source can be asked meanwhile.
        renewer.renew_soon()
        download = Download(self._deps, self._object, partial, renewer)
        if partial.size:
            await download.announce()  # what lies there can be sent
        await download.run()
        head = await self._deps.disk.run(partial.read, 0, SNIFF_BYTES)
        media_type = detect_media_type(self._object.media_type, head)
        record = replace(partial.record, media_type=media_type, stored_at=int(time.time()))
        await self._deps.disk.run(partial.publish, record)

    def _open(self) -> PartialFile:
        """The partial file, empty unless it is the beginning of this very content. Blocks."""
        expected = self._expected()
        sidecar = self._volume.partial_record(self._object.object_id)
        if sidecar is None or not _same_content(sidecar, expected):
            # Emptied under the old sidecar first: with the new one beside the old bytes, a crash would join them.
            self._partial = self._volume.open_partial_for_writing(expected, write_sidecar=False)
            if self._partial.size:
                self._partial.restart()
            self.close()
        elif expected.media_type is None:
            expected = replace(expected, media_type=sidecar.media_type)
        self._partial = self._volume.open_partial_for_writing(expected)
        if self._partial.size > expected.size:
            self._partial.restart()
        self._partial.check_free_space()
        return self._partial

    def _expected(self) -> StoredRecord:
        wanted = self._object
        return StoredRecord(
            object_id=wanted.object_id,
            size=self._lease.size,
            etag=wanted.etag,
            content_hash=wanted.content_hash,
            media_type=media_type_or_none(wanted.media_type),
            stored_at=int(time.time()),
        )

    async def suspend(self) -> None:
        """Keep what came for whoever goes on, and give the lease back; nothing came: as `discard`."""
        if self._partial is not None and not self._partial.size:
            await self.discard()
            return
        self.close()
        await self._return_lease(keep=True)

    async def discard(self) -> None:
        """Remove the partial file, then give lease and reservation back; if it cannot be removed, it stays reserved."""
        if self._partial is None:
            await self._return_lease(keep=True)  # not opened: who knows what lies there
            return
        try:
            await self._deps.disk.run(self._partial.discard)
        except VolumeError as error:
            logger.warning("partial_removal_failed", reason=str(error))
            self._partial = None
            await self._return_lease(keep=True)
        else:
            self._partial = None
            await self._return_lease(keep=False)

    async def _return_lease(self, *, keep: bool) -> None:
        state = self._deps.state
        try:
            await (state.park(self._lease) if keep else state.release(self._lease))
        except StateStoreUnavailable as error:
            logger.warning("lease_release_failed", reason=str(error))  # it runs out by itself

    def close(self) -> None:
        """Close the file if it is open: the lock on it goes with that."""
        if self._partial is not None:
            self._partial.close()
            self._partial = None


def _same_content(sidecar: StoredRecord, expected: StoredRecord) -> bool:
    return (sidecar.size, sidecar.etag, sidecar.content_hash) == (
        expected.size, expected.etag, expected.content_hash,
    )  # fmt: skip


def _describe(error: DistributorError) -> str:
    match error:
        case AllSourcesFailed():
            return f"all sources failed: {str(error)[:500]}"
        case VolumeFull():
            return f"volume full: {error}"
    return str(error)


# Fills the partial file of one object with bytes that are verified in the end.

_REHASH_BYTES = 4 * 1024 * 1024


class AllSourcesCorrupt(SourceWrong):
    """Every source gave all of the object, and none gave the correct bytes."""


@dataclass(frozen=True, slots=True)
class FetchDeps:
    """What every download works with."""

    state: StateStore
    failover_reader: FailoverReader
    disk: BlockingPool


class Download:
    """One object into its partial file. The size of `media_object` is known."""

    def __init__(
        self, deps: FetchDeps, media_object: MediaObject, partial: PartialFile, renewer: LeaseRenewer
    ) -> None:
        self._deps = deps
        self._object = media_object
        self._partial = partial
        self._renewer = renewer

    async def run(self) -> None:
        """Returns when size and hash are correct, with the file marked so. Goes on from what is there.

        Raises AllSourcesFailed (what came is kept), AllSourcesCorrupt (the file is empty again), VolumeError,
        LeaseLost (nothing was written since).
        """
        groups: SourceGroups = (self._object.sources,)
        while groups:
            contributors: set[str] = set()
            resumed = self._partial.size > 0
            try:
                correct = await self._attempt(groups[0], contributors)
            except AllSourcesFailed:
                if len(groups) == 1:
                    raise
                groups = groups[1:]
            else:
                if correct:
                    await self.announce()
                    return
                self._report_corruption(contributors, resumed=resumed)
                groups = groups_after_corruption(groups, contributors, resumed=resumed)
            await self._deps.disk.run(self._partial.restart)
            await self.announce()
        raise AllSourcesCorrupt("all sources gave wrong bytes")

    async def announce(self) -> None:
        """Wake the followers: the partial file has changed in a way that they wait for."""
        await self._deps.state.announce(Announcement(Topic.FETCH_CHANGED, self._object.object_id))

    async def _attempt(self, sources: Sequence[str], contributors: set[str]) -> bool:
        """Read to the end, adding to `contributors` who gave bytes; whether the whole is correct, and marked so."""
        wanted = self._object.content_hash
        hasher = wanted.hasher() if wanted is not None else None
        offset = self._partial.size
        await self._rehash(hasher, offset)
        verify = partial(self._verify, hasher)
        writer = PartialWriter(self._partial, hasher, self._renewer, self._deps.disk, self.announce, verify)
        began_at = time.monotonic()
        stream = self._deps.failover_reader.stream(self._object, offset, None, sources, self._on_source)
        async with writer.writing(offset), aclosing(stream) as pieces:
            async for piece in pieces:
                if not contributors:
                    PHASE.labels("source_first_byte").observe(time.monotonic() - began_at)
                contributors.add(piece.source)
                await writer.put(piece.data)
        if self._partial.size != self._object.size:
            return False
        return await self._deps.disk.run(verify) if writer.verified is None else writer.verified

    def _verify(self, hasher: Hasher | None) -> bool:
        """Whether all the bytes, which are there, are the object's; then followers may have the last ones. Blocks."""
        wanted = self._object.content_hash
        if hasher is not None and wanted is not None and hasher.digest() != wanted.digest:
            return False
        self._partial.mark_verified()
        return True

    async def _rehash(self, hasher: Hasher | None, size: int) -> None:
        """The bytes that lie there from before."""
        if hasher is None or not size:
            return
        if await hash_through(self._deps.disk.run, self._partial.read, hasher, chunk=_REHASH_BYTES) != size:
            raise VolumeError(f"the partial file of {self._object.object_id} gives fewer bytes than it has")

    def _on_source(self, url: str, response: SourceResponse) -> None:
        self._renewer.set_source(url)
        if response.media_type is None or media_type_or_none(self._object.media_type) is not None:
            return
        # Followers are told a type with their first byte: once there are bytes it stays what it is.
        if self._partial.record.media_type is None or not self._partial.size:
            self._partial.set_media_type(response.media_type)

    def _report_corruption(self, contributors: set[str], *, resumed: bool) -> None:
        logger.warning(
            "fetched_bytes_corrupt", sources=sorted(source_name(url) for url in contributors), resumed=resumed
        )
        for url in contributors:
            SOURCE_FAILURES.labels(source_label(url), SourceWrong.reason).inc()
        if len(contributors) == 1 and not resumed:
            (contributor,) = contributors
            self._deps.failover_reader.report_corrupt(contributor, self._object.object_id)


# Which sources to read from again after the bytes of some turned out to be wrong. Pure.

SourceGroups = tuple[tuple[str, ...], ...]
"""Groups of source URLs; each group is one attempt at the whole object, in which its sources may follow each other."""


def groups_after_corruption(
    groups: SourceGroups, contributors: AbstractSet[str], *, resumed: bool
) -> SourceGroups:
    """What is left to try after the first of `groups` ended in wrong bytes that came from `contributors`.

    Bytes that lay on the volume before (`resumed`) may have been the wrong ones: then all get another chance. A single
    contributor is out. Of several nobody knows who lied: first the others together, then each of them alone.
    """
    tried, *later = groups
    if resumed:
        return groups
    others = tuple(url for url in tried if url not in contributors)
    first = (others,) if others else ()
    suspects = tuple((url,) for url in tried if url in contributors) if len(contributors) > 1 else ()
    return (*first, *later, *suspects)
