"""The job queue inside one process, for standalone mode: the port's promises without a broker.

What is queued here is lost with the process; the next request for the object asks for the fetch again.
"""

from __future__ import annotations

import asyncio
from collections import deque

from distributor_node.shared.adapters.queue_outcomes import (
    Finish,
    GiveUp,
    OnDeadLetter,
    PutBack,
    Retry,
    decide_ending,
    handle,
    remember_failure,
)
from distributor_node.shared.domain.errors import JobQueueUnavailable
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan
from distributor_node.shared.ports.job_queue import JobHandler, QueueDepth

_MAX_DEAD_LETTERS = 1000


class MemoryJobQueue:
    """Two levels of priority, delays by the loop's timers. At most `capacity` jobs wait; more are refused."""

    def __init__(self, retry_plan: RetryPlan, capacity: int = 10_000) -> None:
        self._plan = retry_plan
        self._capacity = capacity
        self._waiting: tuple[deque[FetchJob], deque[FetchJob]] = (deque(), deque())
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
            raise JobQueueUnavailable("the job queue is closed")

    async def publish(self, job: FetchJob) -> None:
        await self.ping()
        if sum(map(len, self._waiting)) + len(self._delayed) >= self._capacity:
            raise JobQueueUnavailable(f"the job queue is full: {self._capacity} jobs wait")
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
        # The others were cancelled for the one that failed
        raise next(error for error in ended if error and not isinstance(error, asyncio.CancelledError))

    async def depth(self) -> QueueDepth:
        return QueueDepth(
            ready=sum(map(len, self._waiting)), delayed=len(self._delayed), dead=len(self._dead)
        )

    async def _work(self, handler: JobHandler, on_dead_letter: OnDeadLetter, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            job = await self._take()
            outcome = await handle(handler, job, stopping.is_set)
            match decide_ending(job, outcome, self._plan):
                case Finish():
                    pass
                case PutBack():
                    self._waiting[job.low_priority].appendleft(job)
                    self._ready.release()
                case Retry(again, delay):
                    self._publish_later(again, delay)
                case GiveUp(reason):
                    await remember_failure(on_dead_letter, job, reason)
                    self._dead.append((job, reason))

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
