"""The operator's orders, as every process of the node follows them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from shared.adapters.volume.orders_file import read_orders
from shared.domain.errors import StateStoreUnavailable, VolumeError
from shared.domain.objects import Duty
from shared.domain.orders import Orders
from shared.ports.order_book import OrderBook

POLL_SECONDS = 0.5
"""Between two looks at the state store: an order is in force everywhere within a second, announced or not."""

logger = structlog.get_logger()


class OrdersFollower:
    """`load` once, then `run` as a task. Without the state store the last orders known stay in force; a store that has
    lost them gets them back from the volume's copy."""

    def __init__(self, book: OrderBook, root: Path, configured: Duty) -> None:
        """`root`: of the volume; `configured`: the duty of the settings."""
        self._book, self._root, self.configured = book, root, configured
        self._changed, self._wanted = asyncio.Event(), asyncio.Event()
        self._shutdowns_seen: int | None = None
        self._available = True
        self.current = Orders()

    @property
    def duty(self) -> Duty:
        return self.current.duty(self.configured)

    @property
    def shutting_down(self) -> bool:
        """An order to shut down has come since this process began to follow."""
        return self._shutdowns_seen is not None and self.current.shutdowns > self._shutdowns_seen

    async def load(self) -> None:
        """Know the orders before anything is done, if anybody can tell them: the store, else the volume's copy."""
        await self._look()
        if self.current.version == 0:
            kept = await self._kept()
            if kept is not None:
                self._take(kept)

    async def refresh(self) -> Orders:
        """The orders as the store has them now; StateStoreUnavailable."""
        orders = await self._book.orders()
        if orders is None:
            orders = await self._restored()
        if orders is not None:
            seen = self._shutdowns_seen
            self._shutdowns_seen = orders.shutdowns if seen is None else min(seen, orders.shutdowns)
            self._take(orders)
        elif self._shutdowns_seen is None:
            self._shutdowns_seen = 0
        return self.current

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self._look()
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()

    def wake(self) -> None:
        """Something may have changed: look now."""
        self._wanted.set()

    async def until(self, holds: Callable[[Orders], bool]) -> None:
        """Wait until the orders are such."""
        while not holds(self.current):
            await self._changed.wait()

    def _take(self, orders: Orders) -> None:
        if orders != self.current:
            self.current = orders
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            logger.info(
                "orders_changed", version=orders.version, stopped=orders.stopped, draining=orders.draining
            )

    async def _look(self) -> None:
        try:
            await self.refresh()
        except StateStoreUnavailable as error:
            if self._available:
                self._available = False
                logger.warning("orders_not_followed", reason=str(error))
            return
        if not self._available:
            self._available = True
            logger.info("orders_followed_again")

    async def _restored(self) -> Orders | None:
        """The store has no orders: give it those of the volume's copy, if there is one."""
        try:
            kept = await asyncio.to_thread(read_orders, self._root)
        except VolumeError as error:
            logger.warning("orders_not_read", reason=str(error))
            return None
        if kept is None:
            return None
        if await self._book.restore_orders(kept):
            logger.info("orders_restored", version=kept.orders.version, pinned=len(kept.pinned))
        return await self._book.orders()

    async def _kept(self) -> Orders | None:
        try:
            kept = await asyncio.to_thread(read_orders, self._root)
        except VolumeError as error:
            logger.warning("orders_not_read", reason=str(error))
            return None
        return None if kept is None else kept.orders
