"""One evictor acts at a time, by a lease in the state store; a standby takes over when the leader falls silent.

A leader counts its term from before it asked for it, by its own monotonic clock, and stops a little before the end.
What it may still have under way then is fenced: the store refuses verbs of an old term, and files are removed under a
lock that is held from before the store was told until after they are gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from services.evictor.pacing import backoff, wait_for
from shared.domain.errors import StateStoreUnavailable
from shared.observability.metrics import LEADER
from shared.ports.state_store import StateStore, Term

_SAFETY_SHARE = 0.1  # of the term; covers clocks that tick differently and a loop that is late
_RETRY_SECONDS = 0.3  # between attempts to renew once one has failed

TermWork = Callable[[Term], Awaitable[None]]

logger = structlog.get_logger()


class Leadership:
    """`seconds`: length of a term; `renewal`: seconds between renewals; `holder`: unique to this process."""

    def __init__(self, state: StateStore, holder: str, seconds: float, renewal: float) -> None:
        self._state, self._holder = state, holder
        self._seconds, self._renewal = seconds, renewal
        self._asked = asyncio.Event()
        self._safe_until = 0.0

    def confirm(self) -> None:
        """Renew now rather than in a while: something suggests that the store no longer knows our term."""
        self._asked.set()

    async def serve(self, work: TermWork) -> None:
        """For ever: become leader, run `work` for as long as the term lasts, start again. `work` is cancelled when the
        term is over, and its errors pass through. Cancelled itself, it resigns."""
        LEADER.set(0)
        while True:
            term = await self._acquire()
            logger.info("leadership_taken", holder=self._holder, token=term.token)
            LEADER.set(1)
            try:
                await self._rule(term, work)
            finally:
                LEADER.set(0)

    async def _acquire(self) -> Term:
        failures = 0
        while True:
            try:
                term = await self._lead()
            except StateStoreUnavailable:
                failures += 1
                await asyncio.sleep(min(backoff(failures), self._renewal))
                continue
            if term is not None:
                return term
            failures = 0
            await asyncio.sleep(self._renewal)

    async def _lead(self) -> Term | None:
        asked_at = time.monotonic()
        term = await self._state.lead(self._holder, self._seconds)
        if term is not None:
            self._safe_until = asked_at + self._seconds * (1 - _SAFETY_SHARE)
        return term

    async def _rule(self, term: Term, work: TermWork) -> None:
        task = asyncio.ensure_future(work(term))
        watch = asyncio.create_task(self._keep(term), name="leadership")
        over = False
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            over = watch.done()
        finally:
            for ended in (task, watch):
                ended.cancel()
            results = await asyncio.gather(task, watch, return_exceptions=True)
            if not over:
                await self._resign(term)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _keep(self, term: Term) -> None:
        """Returns when the term is over."""
        pause = self._renewal
        while True:
            left = self._safe_until - time.monotonic()
            if left <= 0:
                logger.warning("leadership_run_out", holder=self._holder, token=term.token)
                return
            await wait_for(self._asked, min(pause, left))
            try:
                async with asyncio.timeout(max(0.0, self._safe_until - time.monotonic())):
                    renewed = await self._lead()
            except (StateStoreUnavailable, TimeoutError) as error:
                logger.warning("leadership_not_renewed", holder=self._holder, reason=str(error))
                pause = min(_RETRY_SECONDS, self._renewal)
                continue
            pause = self._renewal
            if renewed != term:
                logger.warning("leadership_lost", holder=self._holder, token=term.token)
                return

    async def _resign(self, term: Term) -> None:
        try:
            await self._state.resign(term)
        except StateStoreUnavailable as error:
            logger.info("leadership_left_to_run_out", holder=self._holder, reason=str(error))
