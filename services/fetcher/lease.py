"""Renews the lease of one fetch, and cancels the fetch when the lease is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from distributor_node.services.fetcher.scheduler import Slot
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import MediaObject
from distributor_node.shared.domain.peers import PeerUse
from distributor_node.shared.ports.state_store import Lease, StateStore
from distributor_node.shared.waiting import boot_time, cancel_and_wait, wait_event

_RETRY_INTERVAL = 1.0
"""Seconds from a renewal that failed to the next."""

_SOURCE_UPDATE_DELAY = 0.05
"""Seconds until a new source is reported, so that the report does not compete with the first bytes."""

logger = structlog.get_logger()


class LeaseLost(Exception):
    """Another worker may hold the lease of this object now: nothing may be written any more."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds."""

    lease: float  # from one renewal until the lease expires in the state store
    renewal: float  # between two renewals, at most half of `lease`


class LeaseRenewer:
    """Renews one lease, in the background while `running` and on request.

    The expiry is counted from before the request that granted or renewed the lease. So this side never considers the
    lease valid for longer than the state store does.
    """

    def __init__(
        self,
        state: StateStore,
        lease: Lease,
        times: LeaseTimes,
        requested_at: float,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        """`clock`: in seconds; it goes on while the machine is suspended.

        `requested_at`: its time before the lease was requested.
        """
        self._state = state
        self.lease = lease
        self._times = times
        self._clock = clock
        self._expires_at = requested_at + times.lease
        self._lost = False
        self._source: str | None = None
        self._source_changed = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Renew while the block runs. When the lease is lost, cancel the block and raise LeaseLost."""
        renewing = asyncio.create_task(self._renew_periodically(), name=f"lease-{self.lease.object_id}")
        # A timeout without a deadline: `reschedule` ends the block, and `expired` tells that from a cancellation.
        scope = asyncio.timeout(None)
        try:
            async with scope:
                running = True

                def end_block(_: asyncio.Task[None]) -> None:
                    if running:
                        scope.reschedule(asyncio.get_running_loop().time())

                renewing.add_done_callback(end_block)
                try:
                    yield
                finally:
                    running = False
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            await cancel_and_wait(renewing)
            await self._cancel_renewal()
            lost = None if renewing.cancelled() else renewing.exception()
        if lost is not None:
            raise lost

    async def _renew_periodically(self) -> None:
        """Ends only by cancellation or LeaseLost."""
        seconds = self._times.renewal
        while True:
            await wait_event(self._source_changed, min(seconds, self._seconds_left()))
            if self._source_changed.is_set():
                await asyncio.sleep(min(_SOURCE_UPDATE_DELAY, self._seconds_left()))
            self._source_changed.clear()
            seconds = self._times.renewal
            try:
                await self.renew()
            except StateStoreUnavailable as error:
                if not self.is_valid:
                    self._lost = True
                    raise LeaseLost(f"lease of {self.lease.object_id} expired: renewal failed") from error
                logger.warning("lease_renewal_failed", object_id=self.lease.object_id, reason=str(error))
                seconds = min(_RETRY_INTERVAL, self._times.renewal)

    async def renew(self) -> None:
        """Renew once. Raises LeaseLost if another worker holds the lease, or StateStoreUnavailable."""
        requested_at = self._clock()
        if not await self._state.renew(self.lease, self._source):
            self._lost = True
            raise LeaseLost(f"lease of {self.lease.object_id} is lost")
        self._expires_at = requested_at + self._times.lease

    def renew_soon(self) -> None:
        """Start a renewal now, within `running`. The next `ensure_valid` waits for it."""
        self._renewal = asyncio.create_task(self.renew(), name=f"lease-renewal-{self.lease.object_id}")

    async def ensure_valid(self) -> None:
        """Call before each write. Raises LeaseLost unless the lease is valid.

        1. If `renew_soon` started a renewal, wait for it. Raises StateStoreUnavailable if it failed for that reason.
        2. If the lease has expired by our clock (the process was stopped for long), renew it before the write.
        """
        if self._renewal is not None:
            renewal, self._renewal = self._renewal, None
            await renewal
        if self.is_valid:
            return
        if self._lost:
            raise LeaseLost(f"lease of {self.lease.object_id} is lost")
        try:
            await self.renew()
        except StateStoreUnavailable as error:
            raise LeaseLost(f"lease of {self.lease.object_id} expired") from error

    @property
    def is_valid(self) -> bool:
        """Whether writing is safe. False, too, after the process was stopped for longer than the lease."""
        return not self._lost and self._clock() < self._expires_at

    def set_source(self, url: str) -> None:
        """Report the source in use soon: the API proxies far ranges from it."""
        if url != self._source:
            self._source = url
            self._source_changed.set()

    def _seconds_left(self) -> float:
        return max(0.0, self._expires_at - self._clock())

    async def _cancel_renewal(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class FetchTask:
    """What to fetch, under which lease, and the slot that counts the source in use."""

    media_object: MediaObject
    renewer: LeaseRenewer
    slot: Slot | None
    peer_use: PeerUse = PeerUse.FETCH
    ordered: bool = False  # the operator wants all of it
