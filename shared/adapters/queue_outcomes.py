"""What a handler's outcome does to its job: the same decision for every job queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from distributor_node.shared.domain.jobs import (
    Done,
    FetchJob,
    HandBack,
    JobOutcome,
    LookAgain,
    RetryPlan,
    TryLater,
)
from distributor_node.shared.ports.job_queue import JobHandler

logger = structlog.get_logger()

OnDeadLetter = Callable[[FetchJob, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Finish:
    """Acknowledge: nothing is left to do."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Publish `job` (as its next attempt, or the same one) to be ready after `delay` seconds, then acknowledge."""

    job: FetchJob
    delay: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Remember the failure, dead-letter with the reason, then acknowledge."""

    reason: str


@dataclass(frozen=True, slots=True)
class PutBack:
    """Back to the queue, unchanged."""


Ending = Finish | Retry | GiveUp | PutBack


def decide_ending(job: FetchJob, outcome: JobOutcome, plan: RetryPlan) -> Ending:
    """The table of the port, as a function."""
    if isinstance(outcome, Done):
        return Finish()
    if isinstance(outcome, HandBack):
        return PutBack()
    if isinstance(outcome, LookAgain):
        return Retry(job, plan.delays[0]) if plan.delays else Finish()
    if isinstance(outcome, TryLater):
        delay = plan.next_delay(job.attempt)
        if delay is not None:
            return Retry(replace(job, attempt=job.attempt + 1), delay)
    return GiveUp(outcome.reason)


async def handle(handler: JobHandler, job: FetchJob, is_stopping: Callable[[], bool]) -> JobOutcome:
    """Run the handler; what it raises becomes an outcome.

    While the consumer stops, an exception is most likely the cancellation's own doing and must not cost an attempt.
    """
    try:
        return await handler(job)
    except asyncio.CancelledError:
        return HandBack() if is_stopping() else TryLater("CancelledError")
    except (
        Exception
    ) as error:  # the handler's code is not ours: whatever it raises, the job must end as something
        logger.exception(
            "job_handler_raised", object_id=job.object_id, request_id=job.request_id, attempt=job.attempt
        )
        return HandBack() if is_stopping() else TryLater(type(error).__name__)


async def remember_failure(on_dead_letter: OnDeadLetter, job: FetchJob, reason: str) -> None:
    """Tell the owner that the job is given up. Where that fails, the dead letter is written all the same: a failure
    forgotten costs one more attempt later, a job held back for it would block the queue."""
    try:
        await on_dead_letter(job, reason)
    except Exception:  # the callback's code is not ours
        logger.exception(
            "dead_letter_callback_failed", object_id=job.object_id, request_id=job.request_id, reason=reason
        )
