"""Fills the partial file of one object with bytes that are verified in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import structlog

from services.fetcher.disk import BlockingPool
from services.fetcher.lease_keeper import LeaseRenewer
from services.fetcher.partial_writer import PartialWriter
from services.fetcher.source_rounds import SourceGroups, groups_after_corruption
from shared.adapters.sources.answer import SourceResponse
from shared.adapters.sources.relay import FailoverReader
from shared.adapters.volume import PartialFile
from shared.domain.errors import AllSourcesFailed, SourceWrong, VolumeError
from shared.domain.media_types import media_type_or_none
from shared.domain.objects import Hasher, MediaObject, source_name
from shared.observability.metrics import PHASE, SOURCE_FAILURES, source_label
from shared.ports.state_store import Announcement, StateStore, Topic
from shared.runtime.hashing import hash_through

_REHASH_BYTES = 4 * 1024 * 1024

logger = structlog.get_logger()


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
