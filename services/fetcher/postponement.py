"""Between two attempts of a job nobody starts the fetch anew: the job waits, its object counts as failed."""

from __future__ import annotations

import structlog

from shared.adapters.state_common import QUEUED_SECONDS
from shared.domain.errors import StateStoreUnavailable
from shared.domain.jobs import FetchJob, RetryPlan
from shared.ports.state_store import StateStore

logger = structlog.get_logger()


class FailureRecorder:
    """Without it every request for a failing object would publish a job of its own, each with all its attempts.

    `failure_memory`: seconds that the failure of a last attempt is remembered."""

    def __init__(self, state: StateStore, plan: RetryPlan, failure_memory: float) -> None:
        self._state, self._plan, self._failure_memory = state, plan, failure_memory

    async def record(self, job: FetchJob, reason: str) -> None:
        """One attempt has failed. To be told before the lease is given back: who waits for that asks at once.

        A job that comes back does so after its delay, and begins within the time that a new one is given; one that was
        lost keeps nobody from claiming the object after that.
        """
        delay = self._plan.next_delay(job.attempt)
        seconds = self._failure_memory if delay is None else delay + QUEUED_SECONDS
        try:
            await self._state.record_failure(job.object_id, reason, seconds)
        except StateStoreUnavailable as error:
            logger.info("failure_not_recorded", reason=str(error))
