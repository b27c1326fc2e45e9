"""Keeps the lease of one fetch alive, and ends the fetch when it is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.ports.state_store import Lease, StateStore

_RETRY_INTERVAL = 1.0  # seconds after a renewal that did not get through
_SOURCE_UPDATE_DELAY = (
    0.05  # seconds until a new source is reported: the first bytes are on their way just then
)

logger = structlog.get_logger()


class LeaseLost(Exception):
    """The right to fetch this object may be another's now: nothing may be written any more."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds. `lease`: as the state store counts it; `renewal`: between two renewals, at most half of that."""

    lease: float
    renewal: float


class LeaseRenewer:
    """`clock`: seconds, never backwards. The lease is counted from before it was last asked for, so that this side
    never believes in it for longer than the store does."""

    def __init__(
        self,
        state: StateStore,
        lease: Lease,
        times: LeaseTimes,
        requested_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`requested_at`: the clock's time before the lease was asked for."""
        self._state = state
        self.lease = lease
        self._times = times
        self._clock = clock
        self._expires_at = requested_at + times.lease
        self._lost = False
        self._source: str | None = None
        self._source_changed = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None

    @property
    def is_valid(self) -> bool:
        """Whether it is safe to write: also False after this process was stopped for longer than the lease."""
        return not self._lost and self._clock() < self._expires_at

    async def ensure_valid(self) -> None:
        """Before a write: LeaseLost unless the lease holds. After a long stop of the process the store is asked.

        A renewal that was asked for is waited for; StateStoreUnavailable if it failed for that.
        """
        if self._renewal is not None:
            renewal, self._renewal = self._renewal, None
            await renewal
        if self.is_valid:
            return
        if self._lost:
            raise LeaseLost(f"the lease of {self.lease.object_id} is lost")
        try:
            await self.renew()
        except StateStoreUnavailable as error:
            raise LeaseLost(f"the lease of {self.lease.object_id} has run out") from error

    def renew_soon(self) -> None:
        """Within `running`: renew the lease now; the next `ensure_valid` waits for it."""
        self._renewal = asyncio.create_task(self.renew(), name=f"lease-renewal-{self.lease.object_id}")

    def set_source(self, url: str) -> None:
        """Say which source is in use, soon: far ranges are proxied from it."""
        if url != self._source:
            self._source = url
            self._source_changed.set()

    async def renew(self) -> None:
        """One renewal. LeaseLost if the lease is another's; StateStoreUnavailable if nobody knows."""
        requested_at = self._clock()
        if not await self._state.renew(self.lease, self._source):
            self._lost = True
            raise LeaseLost(f"the lease of {self.lease.object_id} is lost")
        self._expires_at = requested_at + self._times.lease

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Renew while the context lasts; when the lease is lost its body is cancelled, and LeaseLost comes out."""
        renewing = asyncio.create_task(self._renew_periodically(), name=f"lease-{self.lease.object_id}")
        # A timeout without a time is a scope that can be ended from outside, and tells that from a cancellation.
        scope = asyncio.timeout(None)
        try:
            async with scope:
                running = True

                def end_body(_: asyncio.Task[None]) -> None:
                    if running:
                        scope.reschedule(asyncio.get_running_loop().time())

                renewing.add_done_callback(end_body)
                try:
                    yield
                finally:
                    running = False
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            await self._cancel_renewal()
            lost = None if renewing.cancelled() else renewing.exception()
        if lost is not None:
            raise lost

    async def _cancel_renewal(self) -> None:
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)

    async def _renew_periodically(self) -> None:
        """Ends only by cancellation or LeaseLost."""
        seconds = self._times.renewal
        while True:
            await self._wait(seconds)
            if self._source_changed.is_set():
                await asyncio.sleep(min(_SOURCE_UPDATE_DELAY, max(0.0, self._expires_at - self._clock())))
            self._source_changed.clear()
            seconds = self._times.renewal
            try:
                await self.renew()
            except StateStoreUnavailable as error:
                if not self.is_valid:
                    self._lost = True
                    raise LeaseLost(f"the lease of {self.lease.object_id} could not be renewed") from error
                logger.warning("lease_renewal_failed", object_id=self.lease.object_id, reason=str(error))
                seconds = min(_RETRY_INTERVAL, self._times.renewal)

    async def _wait(self, seconds: float) -> None:
        """No longer than the lease lasts, and not beyond a change of source."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, max(0.0, self._expires_at - self._clock()))):
                await self._source_changed.wait()
