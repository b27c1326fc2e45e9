"""Fills the partial file of one object with bytes that are verified in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import structlog

from services.fetcher.disk import DiskThreads
from services.fetcher.lease_keeper import LeaseKeeper
from services.fetcher.partial_writer import PartialWriter
from services.fetcher.source_rounds import Rounds, rounds_after_wrong_bytes
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


class WrongBytesEverywhere(SourceWrong):
    """Every source gave all of the object, and none gave the right bytes."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What every download works with."""

    state: StateStore
    failover_reader: FailoverReader
    disk: DiskThreads


class Download:
    """One object into its partial file. The size of `media_object` is known."""

    def __init__(
        self, tools: Tools, media_object: MediaObject, partial: PartialFile, keeper: LeaseKeeper
    ) -> None:
        self._tools = tools
        self._object = media_object
        self._partial = partial
        self._keeper = keeper

    async def fill(self) -> None:
        """Returns when size and hash are right, with the file marked so. Goes on from what is there.

        Raises AllSourcesFailed (what came is kept), WrongBytesEverywhere (the file is empty again), VolumeError,
        LeaseLost (nothing was written since).
        """
        rounds: Rounds = (self._object.sources,)
        while rounds:
            givers: set[str] = set()
            resumed = self._partial.size > 0
            try:
                right = await self._attempt(rounds[0], givers)
            except AllSourcesFailed:
                if len(rounds) == 1:
                    raise
                rounds = rounds[1:]
            else:
                if right:
                    await self.announce()
                    return
                self._blame(givers, resumed=resumed)
                rounds = rounds_after_wrong_bytes(rounds, givers, resumed=resumed)
            await self._tools.disk.run(self._partial.restart)
            await self.announce()
        raise WrongBytesEverywhere("all sources gave wrong bytes")

    async def announce(self) -> None:
        """Wake the followers: the partial file has changed in a way that they wait for."""
        await self._tools.state.announce(Announcement(Topic.FETCH_CHANGED, self._object.object_id))

    async def _attempt(self, sources: Sequence[str], givers: set[str]) -> bool:
        """Read to the end, adding to `givers` who gave bytes; whether the whole is right, and marked so."""
        wanted = self._object.content_hash
        hasher = wanted.hasher() if wanted is not None else None
        offset = self._partial.size
        await self._rehash(hasher, offset)
        verify = partial(self._verify, hasher)
        writer = PartialWriter(self._partial, hasher, self._keeper, self._tools.disk, self.announce, verify)
        began_at = time.monotonic()
        stream = self._tools.failover_reader.stream(self._object, offset, None, sources, self._on_source)
        async with writer.writing(offset), aclosing(stream) as pieces:
            async for piece in pieces:
                if not givers:
                    PHASE.labels("source_first_byte").observe(time.monotonic() - began_at)
                givers.add(piece.source)
                await writer.put(piece.data)
        if self._partial.size != self._object.size:
            return False
        return await self._tools.disk.run(verify) if writer.verdict is None else writer.verdict

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
        if await hash_through(self._tools.disk.run, self._partial.read, hasher, chunk=_REHASH_BYTES) != size:
            raise VolumeError(f"the partial file of {self._object.object_id} gives fewer bytes than it has")

    def _on_source(self, url: str, response: SourceResponse) -> None:
        self._keeper.use_source(url)
        if response.media_type is None or media_type_or_none(self._object.media_type) is not None:
            return
        # Followers are told a type with their first byte: once there are bytes it stays what it is.
        if self._partial.record.media_type is None or not self._partial.size:
            self._partial.set_media_type(response.media_type)

    def _blame(self, givers: set[str], *, resumed: bool) -> None:
        logger.warning("wrong_bytes", sources=sorted(source_name(url) for url in givers), resumed=resumed)
        for url in givers:
            SOURCE_FAILURES.labels(source_label(url), SourceWrong.reason).inc()
        if len(givers) == 1 and not resumed:
            (giver,) = givers
            self._tools.failover_reader.report_corrupt(giver, self._object.object_id)
