"""What both job queues do around a job: run its handler, and report a dead letter before it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from distributor_node.shared.domain.jobs import FetchJob, JobOutcome, Nack, Retry
from distributor_node.shared.ports.job_queue import JobHandler, OnDeadLetter

logger = structlog.get_logger()


async def run_handler(handler: JobHandler, job: FetchJob, is_stopping: Callable[[], bool]) -> JobOutcome:
    """Run the handler and turn an exception into an outcome.

    While the consumer stops, most exceptions are caused by the cancellation. They must not cost an attempt, so the
    outcome is Nack; otherwise it is Retry.
    """
    try:
        return await handler(job)
    except asyncio.CancelledError:
        return Nack() if is_stopping() else Retry("CancelledError")
    except Exception as error:  # every job needs an outcome, whatever the handler raises
        logger.exception(
            "job_handler_raised", object_id=job.object_id, request_id=job.request_id, attempt=job.attempt
        )
        return Nack() if is_stopping() else Retry(type(error).__name__)


async def report_dead_letter(on_dead_letter: OnDeadLetter, job: FetchJob, reason: str) -> None:
    """Call `on_dead_letter`. If it fails, log that and go on, so that the dead letter is still written.

    An unrecorded failure costs one more job later. A job that waited for the callback would block the queue.
    """
    try:
        await on_dead_letter(job, reason)
    except Exception:  # the callback may raise anything
        logger.exception(
            "dead_letter_callback_failed", object_id=job.object_id, request_id=job.request_id, reason=reason
        )
