"""The operator's orders, as every process of the node follows them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from distributor_node.shared.adapters.volume.operator_state_file import read_operator_state
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.objects import Assignment
from distributor_node.shared.domain.operator_state import OperatorState
from distributor_node.shared.ports.state_store import OperatorStore

POLL_INTERVAL = 0.5
"""Between two looks at the state store: an order is in force everywhere within a second, announced or not."""

logger = structlog.get_logger()


class OperatorStateWatcher:
    """`load` once, then `run` as a task. Without the state store the last orders known stay in force; a store that has
    lost them gets them back from the volume's copy."""

    def __init__(self, store: OperatorStore, root: Path, configured: Assignment) -> None:
        """`root`: of the volume; `configured`: the assignment of the settings."""
        self._store, self._root, self.configured = store, root, configured
        self._changed, self._woken = asyncio.Event(), asyncio.Event()
        self._shutdowns_seen: int | None = None
        self._available = True
        self.current = OperatorState()

    @property
    def assignment(self) -> Assignment:
        return self.current.assignment(self.configured)

    @property
    def shutting_down(self) -> bool:
        """An order to shut down has come since this process began to follow."""
        return self._shutdowns_seen is not None and self.current.shutdowns > self._shutdowns_seen

    async def load(self) -> None:
        """Know the orders before anything is done, if anybody can tell them: the store, else the volume's copy."""
        await self._poll()
        if self.current.version == 0:
            snapshot = await self._read_snapshot()
            if snapshot is not None:
                self._set_current(snapshot)

    async def refresh(self) -> OperatorState:
        """The orders as the store has them now; StateStoreUnavailable."""
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

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self._poll()
            try:
                async with asyncio.timeout(POLL_INTERVAL):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()

    def wake(self) -> None:
        """Something may have changed: look now."""
        self._woken.set()

    async def wait_until(self, holds: Callable[[OperatorState], bool]) -> None:
        """Wait until the orders are such."""
        while not holds(self.current):
            await self._changed.wait()

    def _set_current(self, state: OperatorState) -> None:
        if state != self.current:
            self.current = state
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            logger.info(
                "operator_state_changed",
                version=state.version,
                stopped=state.stopped,
                draining=state.draining,
            )

    async def _poll(self) -> None:
        try:
            await self.refresh()
        except StateStoreUnavailable as error:
            if self._available:
                self._available = False
                logger.warning("operator_state_unavailable", reason=str(error))
            return
        if not self._available:
            self._available = True
            logger.info("operator_state_recovered")

    async def _restore_from_volume(self) -> OperatorState | None:
        """The store has no orders: give it those of the volume's copy, if there is one."""
        try:
            snapshot = await asyncio.to_thread(read_operator_state, self._root)
        except VolumeError as error:
            logger.warning("operator_state_backup_unreadable", reason=str(error))
            return None
        if snapshot is None:
            return None
        if await self._store.restore_operator_state(snapshot):
            logger.info(
                "operator_state_restored", version=snapshot.state.version, pinned=len(snapshot.pinned)
            )
        return await self._store.operator_state()

    async def _read_snapshot(self) -> OperatorState | None:
        try:
            snapshot = await asyncio.to_thread(read_operator_state, self._root)
        except VolumeError as error:
            logger.warning("operator_state_backup_unreadable", reason=str(error))
            return None
        return None if snapshot is None else snapshot.state
