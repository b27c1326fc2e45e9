"""The operator state as each process of the node follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.operator_state_file import read_operator_state
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import Assignment
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.ports.state_store import OperatorStore
from distributor_node.shared.waiting import wait_event

POLL_INTERVAL = 0.5
"""Seconds between two reads of the state store. A change applies everywhere within a second, announced or not."""

logger = structlog.get_logger()


class OperatorStateWatcher:
    """Follows the operator state: `load` once, then `run` as a task.

    Without the state store the last known state applies. A store that has lost the state gets it back from the copy on
    the volume.
    """

    def __init__(self, store: OperatorStore, root: Path, configured: Assignment) -> None:
        """`root`: of the volume. `configured`: the assignment of the settings."""
        self._store, self._root, self.configured = store, root, configured
        self._changed, self._woken = asyncio.Event(), asyncio.Event()
        self._shutdowns_seen: int | None = None
        self._outage = OutageLog(logger, down="operator_state_unavailable", up="operator_state_recovered")
        self.current = OperatorState()

    @property
    def assignment(self) -> Assignment:
        return self.current.assignment(self.configured)

    @property
    def shutting_down(self) -> bool:
        """Whether the operator requested a shutdown after this process had read the state for the first time."""
        return self._shutdowns_seen is not None and self.current.shutdowns > self._shutdowns_seen

    async def load(self) -> None:
        """Read the state before any work begins: from the store, or else from the copy on the volume."""
        await self._poll()
        if self.current.version == 0:
            snapshot = await self._read_snapshot()
            if snapshot is not None:
                self._set_current(snapshot.state)

    async def run(self) -> None:
        """Follow the state until cancelled."""
        while True:
            await self._poll()
            await wait_event(self._woken, POLL_INTERVAL)
            self._woken.clear()

    def wake(self) -> None:
        """Read the store now, because the state may have changed."""
        self._woken.set()

    async def wait_until(self, holds: Callable[[OperatorState], bool]) -> None:
        """Wait until `holds` returns True for the current state."""
        while not holds(self.current):
            await self._changed.wait()

    async def refresh(self) -> OperatorState:
        """Read the state from the store. Raises StateStoreUnavailable."""
        state = await self._store.operator_state()
        if state is None:
            state = await self._restore_from_volume()
        if state is not None:
            seen = self._shutdowns_seen
            self._shutdowns_seen = state.shutdowns if seen is None else min(seen, state.shutdowns)
            self._set_current(state)
        elif self._shutdowns_seen is None:
            self._shutdowns_seen = 0
        return self.current

    async def _poll(self) -> None:
        try:
            await self.refresh()
        except StateStoreUnavailable as error:
            self._outage.failed(error)
        else:
            self._outage.succeeded()

    async def _restore_from_volume(self) -> OperatorState | None:
        """Give the copy on the volume, if there is one, to a store without operator state."""
        snapshot = await self._read_snapshot()
        if snapshot is None:
            return None
        if await self._store.restore_operator_state(snapshot):
            logger.info(
                "operator_state_restored", version=snapshot.state.version, pinned=len(snapshot.pinned)
            )
        return await self._store.operator_state()

    async def _read_snapshot(self) -> OperatorStateSnapshot | None:
        try:
            return await asyncio.to_thread(read_operator_state, self._root)
        except VolumeError as error:
            logger.warning("operator_state_backup_unreadable", reason=str(error))
            return None

    def _set_current(self, state: OperatorState) -> None:
        if state != self.current:
            self.current = state
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            logger.info(
                "operator_state_changed",
                state_version=state.version,
                stopped=state.stopped,
                draining=state.draining,
            )
