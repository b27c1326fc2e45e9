"""Keeps the lease of one fetch alive, and ends the fetch when it is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from shared.domain.errors import StateStoreUnavailable
from shared.ports.state_store import Lease, StateStore

_TRY_AGAIN = 1.0  # seconds after a sign of life that did not get through
_SOON = 0.05  # seconds until a source is told: nobody needs it before, and the first bytes are on their way just then

logger = structlog.get_logger()


class LeaseLost(Exception):
    """The right to fetch this object may be another's now: nothing may be written any more."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds. `lease`: as the state store counts it; `renewal`: between two signs of life, at most half of that."""

    lease: float
    renewal: float


class LeaseKeeper:
    """`clock`: seconds, never backwards. The lease is counted from before it was last asked for, so that this side
    never believes in it for longer than the store does."""

    def __init__(
        self,
        state: StateStore,
        lease: Lease,
        times: LeaseTimes,
        asked_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`asked_at`: the clock's time before the lease was asked for."""
        self._state = state
        self.lease = lease
        self._times = times
        self._clock = clock
        self._ends = asked_at + times.lease
        self._lost = False
        self._source: str | None = None
        self._due = asyncio.Event()
        self._proof: asyncio.Task[None] | None = None

    @property
    def holds(self) -> bool:
        """Whether it is safe to write: also False after this process was stopped for longer than the lease."""
        return not self._lost and self._clock() < self._ends

    async def confirm(self) -> None:
        """Before a write: LeaseLost unless the lease holds. After a long stop of the process the store is asked.

        A proof that was asked for is waited for; StateStoreUnavailable if it failed for that.
        """
        if self._proof is not None:
            proof, self._proof = self._proof, None
            await proof
        if self.holds:
            return
        if self._lost:
            raise LeaseLost(f"the lease of {self.lease.object_id} is lost")
        try:
            await self.renew()
        except StateStoreUnavailable as error:
            raise LeaseLost(f"the lease of {self.lease.object_id} has run out") from error

    def prove(self) -> None:
        """Within `kept`: give a sign of life now; the next `confirm` waits for it."""
        self._proof = asyncio.create_task(self.renew(), name=f"lease-proof-{self.lease.object_id}")

    def use_source(self, url: str) -> None:
        """Say which source is in use, soon: far ranges are proxied from it."""
        if url != self._source:
            self._source = url
            self._due.set()

    async def renew(self) -> None:
        """One sign of life. LeaseLost if the lease is another's; StateStoreUnavailable if nobody knows."""
        asked_at = self._clock()
        if not await self._state.renew(self.lease, self._source):
            self._lost = True
            raise LeaseLost(f"the lease of {self.lease.object_id} is lost")
        self._ends = asked_at + self._times.lease

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renew while the context lasts; when the lease is lost its body is cancelled, and LeaseLost comes out."""
        keeping = asyncio.create_task(self._keep(), name=f"lease-{self.lease.object_id}")
        # A timeout without a time is a scope that can be ended from outside, and tells that from a cancellation.
        scope = asyncio.timeout(None)
        try:
            async with scope:
                running = True

                def end_body(_: asyncio.Task[None]) -> None:
                    if running:
                        scope.reschedule(asyncio.get_running_loop().time())

                keeping.add_done_callback(end_body)
                try:
                    yield
                finally:
                    running = False
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            keeping.cancel()
            await asyncio.wait({keeping})
            await self._forget_proof()
            lost = None if keeping.cancelled() else keeping.exception()
        if lost is not None:
            raise lost

    async def _forget_proof(self) -> None:
        proof, self._proof = self._proof, None
        if proof is not None:
            proof.cancel()
            await asyncio.gather(proof, return_exceptions=True)

    async def _keep(self) -> None:
        """Ends only by cancellation or LeaseLost."""
        seconds = self._times.renewal
        while True:
            await self._pause(seconds)
            if self._due.is_set():
                await asyncio.sleep(min(_SOON, max(0.0, self._ends - self._clock())))
            self._due.clear()
            seconds = self._times.renewal
            try:
                await self.renew()
            except StateStoreUnavailable as error:
                if not self.holds:
                    self._lost = True
                    raise LeaseLost(f"no sign of life could be given for {self.lease.object_id}") from error
                logger.warning("lease_not_renewed", object_id=self.lease.object_id, reason=str(error))
                seconds = min(_TRY_AGAIN, self._times.renewal)

    async def _pause(self, seconds: float) -> None:
        """No longer than the lease lasts, and not beyond a change of source."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, max(0.0, self._ends - self._clock()))):
                await self._due.wait()
