"""Where orders are taken: checked against those in force, written to the state store, followed by every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from services.api.errors import HttpError
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.orders import OperatorState
from shared.domain.warming import Warming, WarmingScope
from shared.ports.state_store import StateStore
from shared.runtime.orders import OperatorStateWatcher

MAX_PINS = 10_000
_ATTEMPTS = 10
_PURGE_BATCH = 1000

logger = structlog.get_logger()


class OperatorCommands:
    """HttpError 409 for what is the case already or cannot be, and for everything once the node shuts down."""

    def __init__(self, state: StateStore, operator_state: OperatorStateWatcher) -> None:
        self._state, self._operator_state = state, operator_state

    async def stop(self) -> dict[str, Any]:
        """Close the public port."""
        return await self._change("stop", _stopped)

    async def start(self) -> dict[str, Any]:
        """Open the public port again."""
        return await self._change("start", _started)

    async def shut_down(self) -> dict[str, Any]:
        """End every API process."""
        return await self._change("shut down", lambda state: replace(state, shutdowns=state.shutdowns + 1))

    async def set_worker(self, worker_id: int) -> dict[str, Any]:
        return await self._change(
            "set worker", lambda state: replace(state, worker_ordered=True, worker_id=worker_id)
        )

    async def set_buckets(self, buckets: frozenset[str] | None) -> dict[str, Any]:
        """None: back to all of the worker, or to everything, if that is what the node is set up for."""

        def ordered(state: OperatorState) -> OperatorState:
            changed = replace(state, buckets_ordered=True, buckets=buckets)
            if buckets is None and changed.assignment(self._operator_state.configured).bucket_ids is not None:
                raise HttpError(
                    409, "No worker is known whose buckets to serve: set-worker first", "no_worker"
                )
            return changed

        return await self._change("set buckets", ordered)

    async def drain(self, on: bool) -> dict[str, Any]:
        return await self._change("drain", lambda state: replace(state, draining=on))

    async def pin(self, object_ids: Sequence[ObjectId]) -> dict[str, Any]:
        await self._reject_if_shutting_down()
        pinned = await self._state.pinned()
        if len(pinned.union(object_ids)) > MAX_PINS:
            raise HttpError(400, f"No more than {MAX_PINS} objects can be pinned", "too_many_pins")
        return await self._change_pins(pin=object_ids)

    async def unpin(self, object_ids: Sequence[ObjectId]) -> dict[str, Any]:
        await self._reject_if_shutting_down()
        return await self._change_pins(unpin=object_ids)

    async def purge(self, object_ids: Sequence[ObjectId] | None) -> dict[str, Any]:
        """None: everything that is cached or being fetched now."""
        await self._reject_if_shutting_down()
        if object_ids is not None:
            await self._state.request_purges(object_ids)
            count = len(object_ids)
        else:
            count = await self._purge_all()
        logger.info("operator_command_accepted", command="purge", objects=count)
        return {"purging": count}

    async def warm(self, scope: WarmingScope) -> Warming:
        await self._reject_if_shutting_down()
        ordered = await self._state.start_warming(scope)
        if ordered is None:
            raise HttpError(409, "Another warming is under way", "already_warming")
        logger.info("operator_command_accepted", command="warm", serial=ordered.serial)
        return ordered

    async def warming(self) -> Warming | None:
        """The latest one."""
        return await self._state.warming()

    async def _purge_all(self) -> int:
        if not (await self._state.usage()).reconciled:
            raise StateStoreUnavailable("the index does not stand for the volume yet")
        count, batch = 0, [fetch.object_id for fetch in await self._state.fetches() if fetch.size]
        async for entries in self._state.entries():
            batch += [entry.object_id for entry in entries]
            while len(batch) >= _PURGE_BATCH:
                await self._state.request_purges(batch[:_PURGE_BATCH])
                count, batch = count + _PURGE_BATCH, batch[_PURGE_BATCH:]
        if batch:
            await self._state.request_purges(batch)
        return count + len(batch)

    async def _change_pins(
        self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()
    ) -> dict[str, Any]:
        changed = await self._state.change_pins(pin, unpin)
        logger.info("operator_command_accepted", command="pin" if pin else "unpin", changed=changed)
        return {"changed": changed, "pinned": len(await self._state.pinned())}

    async def _reject_if_shutting_down(self) -> OperatorState:
        state = await self._operator_state.refresh()
        if self._operator_state.shutting_down:
            raise HttpError(409, "The node is shutting down", "shutting_down")
        return state

    async def _change(self, name: str, change: Callable[[OperatorState], OperatorState]) -> dict[str, Any]:
        """Read, decide, write if nobody else has written meanwhile; else again."""
        for _ in range(_ATTEMPTS):
            state = await self._reject_if_shutting_down()
            if await self._state.change_operator_state(state.version, change(state)) is not None:
                logger.info("operator_command_accepted", command=name)
                await self._operator_state.refresh()
                return self.as_json()
        raise StateStoreUnavailable("the orders are being changed by others all the time")

    def as_json(self) -> dict[str, Any]:
        """The orders in force."""
        state, assignment = self._operator_state.current, self._operator_state.assignment
        return {
            "stopped": state.stopped,
            "draining": state.draining,
            "shuttingDown": self._operator_state.shutting_down,
            "workerId": assignment.worker_id,
            "buckets": None if assignment.bucket_ids is None else sorted(assignment.bucket_ids),
        }


def _stopped(state: OperatorState) -> OperatorState:
    if state.stopped:
        raise HttpError(409, "The public API is stopped already", "already_stopped")
    return replace(state, stopped=True)


def _started(state: OperatorState) -> OperatorState:
    if not state.stopped:
        raise HttpError(409, "The public API runs already", "already_started")
    return replace(state, stopped=False)
