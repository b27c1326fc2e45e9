"""The JobQueue port inside one process, for standalone mode.

Queued jobs are lost with the process. The next request for an object publishes its job again.
"""

from __future__ import annotations

import asyncio
from collections import deque

from distributor_node.shared.adapters.queue_outcomes import report_dead_letter, run_handler
from distributor_node.shared.domain.errors import JobQueueUnavailable
from distributor_node.shared.domain.jobs import Ack, DeadLetter, FetchJob, Nack, Requeue, Retry, RetryPlan
from distributor_node.shared.ports.job_queue import JobHandler, OnDeadLetter, QueueDepth

_MAX_DEAD_LETTERS = 1000


class MemoryJobQueue:
    """Two priorities, and delays by timers of the event loop. Refuses jobs while `capacity` jobs wait."""

    def __init__(self, retry_plan: RetryPlan, capacity: int = 10_000) -> None:
        self._plan = retry_plan
        self._capacity = capacity
        self._waiting: tuple[deque[FetchJob], deque[FetchJob]] = (deque(), deque())  # [high, low] priority
        self._delayed: set[asyncio.TimerHandle] = set()
        self._dead: deque[tuple[FetchJob, str]] = deque(maxlen=_MAX_DEAD_LETTERS)
        self._ready = asyncio.Semaphore(0)
        self._open = False

    async def open(self) -> None:
        self._open = True

    async def close(self) -> None:
        self._open = False
        for timer in self._delayed:
            timer.cancel()
        self._delayed.clear()

    async def ping(self) -> None:
        if not self._open:
            raise JobQueueUnavailable("job queue is closed")

    async def publish(self, job: FetchJob) -> None:
        await self.ping()
        if sum(map(len, self._waiting)) + len(self._delayed) >= self._capacity:
            raise JobQueueUnavailable(f"job queue is full: {self._capacity} jobs wait")
        self._put(job)

    async def consume(self, handler: JobHandler, concurrency: int, on_dead_letter: OnDeadLetter) -> None:
        stopping = asyncio.Event()
        workers = [
            asyncio.create_task(self._work(handler, on_dead_letter, stopping), name=f"job-worker-{number}")
            for number in range(concurrency)
        ]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            stopping.set()
            for worker in workers:
                worker.cancel()
            ended = await asyncio.gather(*workers, return_exceptions=True)
        # One worker failed, the others were cancelled: raise the failure
        raise next(error for error in ended if error and not isinstance(error, asyncio.CancelledError))

    async def depth(self) -> QueueDepth:
        return QueueDepth(
            ready=sum(map(len, self._waiting)), delayed=len(self._delayed), dead=len(self._dead)
        )

    async def _work(self, handler: JobHandler, on_dead_letter: OnDeadLetter, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            job = await self._take()
            outcome = await run_handler(handler, job, stopping.is_set)
            match self._plan.resolve(outcome, job.attempt):
                case Ack():
                    pass
                case Retry():
                    self._publish_later(job.next_attempt(), self._plan.delays[job.attempt - 1])
                case Requeue():
                    self._publish_later(job, self._plan.delays[0])
                case DeadLetter(reason):
                    await report_dead_letter(on_dead_letter, job, reason)
                    self._dead.append((job, reason))
                case Nack():
                    self._waiting[job.low_priority].appendleft(job)
                    self._ready.release()

    async def _take(self) -> FetchJob:
        await self._ready.acquire()
        high, low = self._waiting
        return (high or low).popleft()

    def _put(self, job: FetchJob) -> None:
        self._waiting[job.low_priority].append(job)
        self._ready.release()

    def _publish_later(self, job: FetchJob, delay: float) -> None:
        def ready() -> None:
            self._delayed.discard(timer)
            self._put(job)

        if self._open:
            timer = asyncio.get_running_loop().call_later(delay, ready)
            self._delayed.add(timer)
