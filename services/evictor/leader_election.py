"""Leader election by a lease in the state store: one evictor acts, and a standby takes over when the lease expires.

A leader measures its term from before the request for it, by a clock of its own, and stops a little before the
end. Operations that are still in progress then are fenced: the store refuses the verbs of an old term, and a file is
removed under a lock that is held from before the store is told until after the file is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from distributor_node.shared.domain.errors import DistributorError, StateStoreUnavailable
from distributor_node.shared.observability.metrics import LEADER
from distributor_node.shared.ports.state_store import StateStore, Term
from distributor_node.shared.waiting import Backoff, boot_time, cancel_and_wait, wait_event

_SAFETY_MARGIN = 0.1  # share of the term; covers clock drift and a late event loop
_RETRY_INTERVAL = 0.3  # seconds between attempts to renew after one has failed

LeaderMain = Callable[[Term], Coroutine[Any, Any, None]]

logger = structlog.get_logger()


class LeaderElection:
    """Campaigns for leadership and keeps it."""

    def __init__(self, state: StateStore, holder: str, seconds: float, renewal: float) -> None:
        """`holder`: a name unique to this process; `seconds`: length of a term; `renewal`: seconds between renewals."""
        self._state, self._holder = state, holder
        self._seconds, self._renewal = seconds, renewal
        self._renew_requested = asyncio.Event()
        self._valid_until = 0.0  # boot time in seconds

    def renew_now(self) -> None:
        """Renew now instead of at the next interval: the store may no longer know our term."""
        self._renew_requested.set()

    async def serve(self, main: LeaderMain) -> None:
        """Become leader, run `main` while the term lasts, and start again, until cancelled.

        `main` is cancelled when the term is over; its errors pass through. When `serve` is cancelled it resigns.
        """
        LEADER.set(0)
        while True:
            term = await self._acquire()
            logger.info("leadership_acquired", holder=self._holder, token=term.token)
            LEADER.set(1)
            try:
                await self._run_term(term, main)
            finally:
                LEADER.set(0)

    async def _acquire(self) -> Term:
        backoff = Backoff(min(MIN_BACKOFF, self._renewal), min(MAX_BACKOFF, self._renewal), jitter=False)
        while True:
            try:
                term = await self._lead()
            except StateStoreUnavailable:
                await backoff.wait()
                continue
            if term is not None:
                return term
            backoff.reset()
            await asyncio.sleep(self._renewal)

    async def _lead(self) -> Term | None:
        requested_at = boot_time()
        term = await self._state.lead(self._holder, self._seconds)
        if term is not None:
            self._valid_until = requested_at + self._seconds * (1 - _SAFETY_MARGIN)
        return term

    async def _run_term(self, term: Term, main: LeaderMain) -> None:
        task = asyncio.create_task(main(term), name="evictor-term")
        renewal_task = asyncio.create_task(self._renew_until_lost(term), name="leadership")
        term_ended = False
        try:
            await asyncio.wait({task, renewal_task}, return_when=asyncio.FIRST_COMPLETED)
            term_ended = renewal_task.done()
        finally:
            await cancel_and_wait(task, renewal_task)
            if not term_ended:
                await self._resign(term)
        for ended in (task, renewal_task):
            if not ended.cancelled():
                ended.result()

    async def _renew_until_lost(self, term: Term) -> None:
        """Renew the term at intervals; return when it is over."""
        pause = self._renewal
        while True:
            remaining = self._valid_until - boot_time()
            if remaining <= 0:
                logger.warning("leadership_expired", holder=self._holder, token=term.token)
                return
            if await wait_event(self._renew_requested, min(pause, remaining)):
                self._renew_requested.clear()
            try:
                async with asyncio.timeout(max(0.0, self._valid_until - boot_time())):
                    renewed = await self._lead()
            except (StateStoreUnavailable, TimeoutError) as error:
                logger.warning("leadership_renewal_failed", holder=self._holder, reason=str(error))
                pause = min(_RETRY_INTERVAL, self._renewal)
                continue
            pause = self._renewal
            if renewed != term:
                logger.warning("leadership_lost", holder=self._holder, token=term.token)
                return

    async def _resign(self, term: Term) -> None:
        try:
            await self._state.resign(term)
        except StateStoreUnavailable as error:
            logger.info("resign_failed", holder=self._holder, reason=str(error))


# Periodic work, with longer pauses while something that it needs is unavailable.

MIN_BACKOFF, MAX_BACKOFF = 0.25, 3.0  # seconds
_LOG_EVERY_NTH = 20


async def run_periodically(
    name: str,
    step: Callable[[], Awaitable[float | None]],
    wake: asyncio.Event | None = None,
    on_error: Callable[[DistributorError], None] | None = None,
) -> None:
    """Run `step` again and again, until it returns None. It returns the seconds until its next run; `wake` ends such a
    pause early.

    An error that is worth retrying (state store, catalog or volume unavailable) only makes the pause longer, up to
    MAX_BACKOFF, and is passed to `on_error`. Any other error is a bug and passes through.
    """
    failures, backoff = 0, Backoff(MIN_BACKOFF, MAX_BACKOFF, jitter=False)
    while True:
        try:
            pause = await step()
        except DistributorError as error:
            if not error.worth_retrying:
                raise
            failures += 1
            if on_error is not None:
                on_error(error)
            if failures % _LOG_EVERY_NTH == 1:
                logger.warning("evictor_task_backing_off", task=name, failures=failures, reason=str(error))
            await backoff.wait()
            continue
        if failures:
            logger.info("evictor_task_recovered", task=name, failures=failures)
            failures = 0
            backoff.reset()
        if pause is None:
            return
        if wake is None:
            await asyncio.sleep(pause)
        elif await wait_event(wake, pause):
            wake.clear()
