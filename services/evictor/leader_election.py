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

from distributor_node.shared.domain.errors import DistributorError, StateStoreUnavailable
from distributor_node.shared.observability.metrics import LEADER
from distributor_node.shared.ports.state_store import StateStore, Term

_SAFETY_MARGIN = 0.1  # of the term; covers clocks that tick differently and a loop that is late
_RETRY_INTERVAL = 0.3  # between attempts to renew once one has failed

LeaderMain = Callable[[Term], Awaitable[None]]

logger = structlog.get_logger()


class LeaderElection:
    """`seconds`: length of a term; `renewal`: seconds between renewals; `holder`: unique to this process."""

    def __init__(self, state: StateStore, holder: str, seconds: float, renewal: float) -> None:
        self._state, self._holder = state, holder
        self._seconds, self._renewal = seconds, renewal
        self._renew_requested = asyncio.Event()
        self._valid_until = 0.0

    def renew_now(self) -> None:
        """Renew now rather than in a while: something suggests that the store no longer knows our term."""
        self._renew_requested.set()

    async def serve(self, main: LeaderMain) -> None:
        """For ever: become leader, run `main` for as long as the term lasts, start again. `main` is cancelled when the
        term is over, and its errors pass through. Cancelled itself, it resigns."""
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
        requested_at = time.monotonic()
        term = await self._state.lead(self._holder, self._seconds)
        if term is not None:
            self._valid_until = requested_at + self._seconds * (1 - _SAFETY_MARGIN)
        return term

    async def _run_term(self, term: Term, main: LeaderMain) -> None:
        task = asyncio.ensure_future(main(term))
        renewal_task = asyncio.create_task(self._renew_until_lost(term), name="leadership")
        term_ended = False
        try:
            await asyncio.wait({task, renewal_task}, return_when=asyncio.FIRST_COMPLETED)
            term_ended = renewal_task.done()
        finally:
            for ended in (task, renewal_task):
                ended.cancel()
            results = await asyncio.gather(task, renewal_task, return_exceptions=True)
            if not term_ended:
                await self._resign(term)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _renew_until_lost(self, term: Term) -> None:
        """Returns when the term is over."""
        pause = self._renewal
        while True:
            remaining = self._valid_until - time.monotonic()
            if remaining <= 0:
                logger.warning("leadership_expired", holder=self._holder, token=term.token)
                return
            await wait_event(self._renew_requested, min(pause, remaining))
            try:
                async with asyncio.timeout(max(0.0, self._valid_until - time.monotonic())):
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


# Work that is done again and again, with patience while something it needs is away.

MIN_BACKOFF, MAX_BACKOFF = 0.25, 3.0
_LOG_EVERY_NTH = 20


async def wait_event(wake: asyncio.Event | None, seconds: float) -> None:
    """Until woken, at most `seconds`; the wake-up is used up."""
    if wake is None:
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return
    wake.clear()


async def run_periodically(
    name: str,
    step: Callable[[], Awaitable[float | None]],
    wake: asyncio.Event | None = None,
    on_error: Callable[[DistributorError], None] | None = None,
) -> None:
    """Do `step` until it returns None, else again after as many seconds as it returns (`wake` shortens them).

    An error worth retrying (state store, catalog or volume away) only makes the pauses longer, wake-ups or not, up to
    MAX_BACKOFF, and is told to `on_error`; any other is a fault of ours and passes through.
    """
    failures = 0
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
            await asyncio.sleep(backoff(failures))
            continue
        if failures:
            logger.info("evictor_task_recovered", task=name, failures=failures)
            failures = 0
        if pause is None:
            return
        await wait_event(wake, pause)


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(MAX_BACKOFF, MIN_BACKOFF * 2.0 ** min(failures - 1, 16))
