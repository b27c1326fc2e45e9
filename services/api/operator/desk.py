"""Where orders are taken: checked against those in force, written to the state store, followed by every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from services.api.errors import ErrorAnswer
from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.orders import Orders
from shared.domain.warming import Warming, WarmingScope
from shared.ports.state_store import StateStore
from shared.runtime.orders import OrdersFollower

MOST_PINS = 10_000
_ATTEMPTS = 10
_PURGED_AT_ONCE = 1000

logger = structlog.get_logger()


class OperatorDesk:
    """ErrorAnswer 409 for what is the case already or cannot be, and for everything once the node shuts down."""

    def __init__(self, state: StateStore, orders: OrdersFollower) -> None:
        self._state, self._orders = state, orders

    async def stop(self) -> dict[str, Any]:
        """Close the public port."""
        return await self._change("stop", _stopped)

    async def start(self) -> dict[str, Any]:
        """Open the public port again."""
        return await self._change("start", _started)

    async def shut_down(self) -> dict[str, Any]:
        """End every API process."""
        return await self._change("shut down", lambda orders: replace(orders, shutdowns=orders.shutdowns + 1))

    async def set_worker(self, worker_id: int) -> dict[str, Any]:
        return await self._change(
            "set worker", lambda orders: replace(orders, worker_ordered=True, worker_id=worker_id)
        )

    async def set_buckets(self, buckets: frozenset[str] | None) -> dict[str, Any]:
        """None: back to all of the worker, or to everything, if that is what the node is set up for."""

        def ordered(orders: Orders) -> Orders:
            changed = replace(orders, buckets_ordered=True, buckets=buckets)
            if buckets is None and changed.duty(self._orders.configured).bucket_ids is not None:
                raise ErrorAnswer(
                    409, "No worker is known whose buckets to serve: set-worker first", "no_worker"
                )
            return changed

        return await self._change("set buckets", ordered)

    async def drain(self, on: bool) -> dict[str, Any]:
        return await self._change("drain", lambda orders: replace(orders, draining=on))

    async def pin(self, object_ids: Sequence[ObjectId]) -> dict[str, Any]:
        await self._refuse_if_ending()
        pinned = await self._state.pinned()
        if len(pinned.union(object_ids)) > MOST_PINS:
            raise ErrorAnswer(400, f"No more than {MOST_PINS} objects can be pinned", "too_many_pins")
        return await self._change_pins(pin=object_ids)

    async def unpin(self, object_ids: Sequence[ObjectId]) -> dict[str, Any]:
        await self._refuse_if_ending()
        return await self._change_pins(unpin=object_ids)

    async def purge(self, object_ids: Sequence[ObjectId] | None) -> dict[str, Any]:
        """None: everything that is cached or being fetched now."""
        await self._refuse_if_ending()
        if object_ids is not None:
            await self._state.want_purges(object_ids)
            count = len(object_ids)
        else:
            count = await self._purge_all()
        logger.info("operator_order", order="purge", objects=count)
        return {"purging": count}

    async def warm(self, scope: WarmingScope) -> Warming:
        await self._refuse_if_ending()
        ordered = await self._state.order_warming(scope)
        if ordered is None:
            raise ErrorAnswer(409, "Another warming is under way", "already_warming")
        logger.info("operator_order", order="warm", serial=ordered.serial)
        return ordered

    async def warming(self) -> Warming | None:
        """The latest one."""
        return await self._state.warming()

    async def _purge_all(self) -> int:
        if not (await self._state.usage()).accounted:
            raise StateStoreUnavailable("the index does not stand for the volume yet")
        count, batch = 0, [fetch.object_id for fetch in await self._state.fetches() if fetch.size]
        async for entries in self._state.entries():
            batch += [entry.object_id for entry in entries]
            while len(batch) >= _PURGED_AT_ONCE:
                await self._state.want_purges(batch[:_PURGED_AT_ONCE])
                count, batch = count + _PURGED_AT_ONCE, batch[_PURGED_AT_ONCE:]
        if batch:
            await self._state.want_purges(batch)
        return count + len(batch)

    async def _change_pins(
        self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()
    ) -> dict[str, Any]:
        changed = await self._state.change_pins(pin, unpin)
        logger.info("operator_order", order="pin" if pin else "unpin", changed=changed)
        return {"changed": changed, "pinned": len(await self._state.pinned())}

    async def _refuse_if_ending(self) -> Orders:
        orders = await self._orders.refresh()
        if self._orders.shutting_down:
            raise ErrorAnswer(409, "The node is shutting down", "shutting_down")
        return orders

    async def _change(self, name: str, change: Callable[[Orders], Orders]) -> dict[str, Any]:
        """Read, decide, write if nobody else has written meanwhile; else again."""
        for _ in range(_ATTEMPTS):
            orders = await self._refuse_if_ending()
            if await self._state.change_orders(orders.version, change(orders)) is not None:
                logger.info("operator_order", order=name)
                await self._orders.refresh()
                return self.shown()
        raise StateStoreUnavailable("the orders are being changed by others all the time")

    def shown(self) -> dict[str, Any]:
        """The orders in force."""
        orders, duty = self._orders.current, self._orders.duty
        return {
            "stopped": orders.stopped,
            "draining": orders.draining,
            "shuttingDown": self._orders.shutting_down,
            "workerId": duty.worker_id,
            "buckets": None if duty.bucket_ids is None else sorted(duty.bucket_ids),
        }


def _stopped(orders: Orders) -> Orders:
    if orders.stopped:
        raise ErrorAnswer(409, "The public API is stopped already", "already_stopped")
    return replace(orders, stopped=True)


def _started(orders: Orders) -> Orders:
    if not orders.stopped:
        raise ErrorAnswer(409, "The public API runs already", "already_started")
    return replace(orders, stopped=False)
