"""The job queue: carries fetch jobs from the API to the fetchers, with delayed retries and dead letters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from distributor_node.shared.domain.jobs import FetchJob, JobOutcome

JobHandler = Callable[[FetchJob], Awaitable[JobOutcome]]

OnDeadLetter = Callable[[FetchJob, str], Awaitable[None]]
"""Called with a job and the reason, before the job is dead-lettered."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Numbers of messages."""

    ready: int  # wait for a consumer
    delayed: int  # wait in a delay queue
    dead: int  # dead letters


class JobQueue(Protocol):
    """One instance per process. Call `open` before use and `close` at the end.

    The queue carries out the outcome that the handler returns, resolved by the retry plan:

    - Ack: acknowledge.
    - Retry: publish the next attempt to the delay queue of this attempt, wait for the confirm, acknowledge. After the
      last attempt: as DeadLetter.
    - Requeue: publish the same attempt to the first delay queue, wait for the confirm, acknowledge.
    - DeadLetter: await `on_dead_letter(job, reason)`, so that the failure is recorded first; publish the message with
      the reason to the dead-letter queue, wait for the confirm, acknowledge.
    - Nack: return the message to its queue.

    A handler that raises counts as Retry with the exception's name, and the traceback is logged. A message that is not
    a valid job is dead-lettered with the reason, and consumption goes on.
    """

    async def open(self) -> None:
        """Start to connect in the background. Does not fail while the broker is down."""

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Raise JobQueueUnavailable if the broker cannot be reached."""

    async def publish(self, job: FetchJob) -> None:
        """Publish one job and wait for the broker's confirm. Raises JobQueueUnavailable, within a bounded time."""

    async def consume(self, handler: JobHandler, concurrency: int, on_dead_letter: OnDeadLetter) -> None:
        """Handle up to `concurrency` jobs at once until cancelled. Survives broker restarts and cancelled consumers.

        On cancellation: 1. no further job is taken; 2. running handlers are cancelled, and either return Nack or raise
        the cancellation, which means the same; 3. `consume` waits for them. Their messages are in the queue again then.
        """

    async def depth(self) -> QueueDepth: ...
