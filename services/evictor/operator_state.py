"""The leader's work for the operator: a backup of the operator state on the volume, and purges."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import structlog

from distributor_node.services.evictor.adoption import PartialReaper
from distributor_node.services.evictor.node_import import NodeImport
from distributor_node.services.evictor.removal import ObjectRemover, RemovalOutcome
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.operator_state_file import (
    operator_state_lock,
    read_operator_state,
    write_operator_state,
)
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot
from distributor_node.shared.ports.state_store import FetchPhase, PurgeRequest, StateStore, Term
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.threads import run_blocking

_PURGE_BATCH = 64
_PURGE_INTERVAL = 5.0  # seconds between polls for purge requests
_PURGE_RETRY_INTERVAL = 0.5  # the same, while some requests cannot be completed yet

logger = structlog.get_logger()


class OperatorStateBackup:
    """Copies the operator state to the volume, for a store that loses it or has no disk at all."""

    def __init__(self, state: StateStore, root: Path, watcher: OperatorStateWatcher) -> None:
        self._state, self._root, self.watcher = state, root, watcher
        self._saved: OperatorState | None = None
        self.pinned: frozenset[ObjectId] = frozenset()

    async def restore(self) -> None:
        """Give the store the operator state and pins again if it has lost them, and read them. Call it before anything
        may be evicted."""
        await self.watcher.refresh()
        self.pinned = await self._state.pinned()

    async def save(self, term: Term) -> None:
        """Write the copy if the operator state has changed and the term goes on."""
        state = await self.watcher.refresh()
        if state == self._saved or state.version == 0:
            return
        with ExitStack() as stack:
            locked = await run_blocking(stack.enter_context, operator_state_lock(self._root))
            # The state is read under the lock, too: what was read before may be older than what is written
            if locked and await self._state.is_leader(term):
                await self._write(await self.watcher.refresh())

    async def _write(self, state: OperatorState) -> None:
        self.pinned = pinned = await self._state.pinned()
        if self._saved is None:
            written = await run_blocking(read_operator_state, self._root)
            if written == OperatorStateSnapshot(state, pinned):
                self._saved = state
                return
        await run_blocking(write_operator_state, self._root, OperatorStateSnapshot(state, pinned))
        self._saved = state
        logger.info("operator_state_backed_up", state_version=state.version, pinned=len(pinned))


class Purger:
    """Removes the objects that the operator has purged, pinned ones too.

    An object that is being fetched is removed when its fetch has ended, so that no copy is left whose fetch began
    before the purge.
    """

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        remover: ObjectRemover,
        reaper: PartialReaper,
        node_import: NodeImport | None = None,
    ) -> None:
        """`node_import`: would bring a purged object back."""
        self._state, self._volume, self._remover, self._reaper = state, volume, remover, reaper
        self._node_import = node_import

    async def step(self, term: Term) -> float:
        """Complete some requests; returns the seconds until the next step."""
        if not (await self._state.usage()).reconciled:
            return _PURGE_RETRY_INTERVAL  # the index does not match the volume yet
        requests = await self._state.pending_purges(_PURGE_BATCH)
        if not requests:
            return _PURGE_INTERVAL
        completed = 0
        for request in requests:
            try:
                purged = await self._purge(term, request)
            except VolumeError as error:
                logger.error("object_unreadable", object_id=request.object_id, reason=str(error))
                continue
            if purged:
                await self._state.complete_purge(term, request)
                completed += 1
            await asyncio.sleep(0)
        logger.info("purges_completed", ended=completed, left_for_later=len(requests) - completed)
        return 0.0 if completed == len(requests) else _PURGE_RETRY_INTERVAL

    async def _purge(self, term: Term, request: PurgeRequest) -> bool:
        """Remove one object. True if nothing is left that was there when the purge was requested."""
        object_id = request.object_id
        if self._node_import is not None:
            await self._node_import.exclude(object_id)
        fetch = (await self._state.find(object_id)).fetch
        if fetch is not None and fetch.phase is FetchPhase.PARKED:
            await self._reaper.discard(term, object_id)
            fetch = (await self._state.find(object_id)).fetch
        if fetch is not None and fetch.size:
            return False  # a fetch is in progress
        outcome = await self._remover.purge(term, object_id, "purged")
        if outcome in (RemovalOutcome.REMOVED, RemovalOutcome.DEFERRED):
            await run_blocking(self._volume.sync_removal, object_id)
            return True
        # Refused: the store does not know the object. If there is a file all the same, it will be adopted soon
        return (
            outcome is RemovalOutcome.REFUSED
            and await run_blocking(self._volume.find_object, object_id) is None
        )
