"""The job queue: fetch jobs from the API to the fetchers, with retries after a delay and dead letters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from distributor_node.shared.domain.jobs import FetchJob, JobOutcome

JobHandler = Callable[[FetchJob], Awaitable[JobOutcome]]


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Messages waiting to be taken, waiting out a delay, and given up."""

    ready: int
    delayed: int
    dead: int


class JobQueue(Protocol):
    """One instance per process; `open` before use, `close` at the end.

    What the handler's outcome does: Done → ack. TryLater → the delay queue of the job's attempt, confirmed, then ack;
    attempts used up → as Hopeless. LookAgain → the first delay queue, as the same attempt, confirmed, then ack.
    Hopeless → dead letter with the reason, confirmed, then ack. HandBack → back to the queue. A handler that raises: as
    TryLater with the exception's name (and the traceback in the log).
    When a job ends as a dead letter, `on_dead_letter(job, reason)` is awaited first, so that the failure is remembered.
    A message that is no job is dead-lettered with the reason, and consumption goes on.
    """

    async def open(self) -> None:
        """Connect in the background; never fails because the broker is down."""

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Return if the broker can be reached; else raise JobQueueUnavailable."""

    async def publish(self, job: FetchJob) -> None:
        """Hand over one job; returns once the broker has confirmed it. Else JobQueueUnavailable, in bounded time."""

    async def consume(
        self,
        handler: JobHandler,
        concurrency: int,
        on_dead_letter: Callable[[FetchJob, str], Awaitable[None]],
    ) -> None:
        """Handle up to `concurrency` jobs at once, until cancelled. Survives broker restarts and cancelled consumers.

        On cancellation no further job is taken; running handlers are cancelled, expected to return HandBack in answer
        to the cancellation or to raise it (same effect), and waited for; their messages are back in the queue then.
        """

    async def depth(self) -> QueueDepth: ...
