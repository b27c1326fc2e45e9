"""One job, from its arrival to its outcome."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import structlog
from structlog.contextvars import bound_contextvars

from services.fetcher.admission import Admission, Admitted
from services.fetcher.postponement import FailureRecorder
from services.fetcher.retrieval import FetchRunner
from shared.domain.errors import StateStoreUnavailable, VolumeError
from shared.domain.jobs import Done, FetchJob, HandBack, Hopeless, JobOutcome, LookAgain, TryLater
from shared.observability.metrics import FETCHES, PHASE

logger = structlog.get_logger()


class Worker:
    """Handles any number of jobs at once. Safe to run twice, and to lose half way."""

    def __init__(
        self, admission: Admission, fetch_runner: FetchRunner, failure_recorder: FailureRecorder
    ) -> None:
        self._admission = admission
        self._fetch_runner = fetch_runner
        self._failure_recorder = failure_recorder

    async def handle(self, job: FetchJob) -> JobOutcome:
        """The job queue's handler. A cancellation is answered with HandBack, with everything left in good order."""
        with bound_contextvars(object_id=job.object_id, request_id=job.request_id):
            if job.attempt == 1:
                PHASE.labels("queue_wait").observe(max(0.0, time.time() - job.published_at))
            began_at = time.monotonic()
            try:
                outcome = await self._fetch(job)
            except asyncio.CancelledError:
                outcome = HandBack()
            FETCHES.labels(outcome_label(outcome)).inc()
            logger.info(
                "job_ended",
                outcome=outcome_label(outcome),
                reason=getattr(outcome, "reason", None),
                attempt=job.attempt,
                size=job.media_object.size,
                seconds=round(time.monotonic() - began_at, 3),
            )
            return outcome

    async def _fetch(self, job: FetchJob) -> JobOutcome:
        outcome: JobOutcome
        try:
            admitted = await self._admission.admit(job.media_object, warming=job.low_priority)
            if isinstance(admitted, Admitted):
                record_failure = partial(self._failure_recorder.record, job)
                return await self._fetch_runner.run(
                    job.media_object, admitted.lease, admitted.requested_at, record_failure
                )
            outcome = admitted
        except (StateStoreUnavailable, VolumeError) as error:
            outcome = TryLater(str(error))
        if isinstance(outcome, TryLater):
            await self._failure_recorder.record(job, outcome.reason)
        return outcome


def outcome_label(outcome: JobOutcome) -> str:
    """One of a few words, for metrics."""
    match outcome:
        case Done(detail):
            return detail.replace(",", "").replace(" ", "_")
        case TryLater():
            return "retry"
        case LookAgain():
            return "requeue"
        case Hopeless():
            return "dead_letter"
        case HandBack():
            return "nack"
