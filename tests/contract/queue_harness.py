"""Shared by the tests of job queues: jobs, and a consumer that records them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId
from distributor_node.shared.ports.job_queue import JobQueue
from tests.waiting import DEFAULT_LIMIT, eventually

Handler = Callable[[FetchJob], Awaitable[JobOutcome]]


def make_job(object_id: str = "1", *, request_id: str = "request-1", low_priority: bool = False) -> FetchJob:
    wanted = MediaObject(
        object_id=ObjectId.parse(object_id),
        size=1234,
        content_hash=ContentHash("sha256", b"7" * 32),
        media_type="video/mp4",
        sources=(f"https://one.example/files/{object_id}",),
    )
    return FetchJob(wanted, request_id=request_id, published_at=1.5, low_priority=low_priority)


@dataclass
class ConsumerRecorder:
    """Jobs in the order in which handlers got them, ended jobs, and dead letters with the reason."""

    started: list[FetchJob] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    dead_lettered: list[tuple[FetchJob, str]] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def wait_for(self, condition: Callable[[], bool], seconds: float = DEFAULT_LIMIT) -> None:
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(condition)

    async def on_dead_letter(self, job: FetchJob, reason: str) -> None:
        self.dead_lettered.append((job, reason))
        await self.notify()


async def done(_: FetchJob) -> JobOutcome:
    return Ack()


@asynccontextmanager
async def consuming(
    queue: JobQueue, handler: Handler = done, concurrency: int = 2
) -> AsyncGenerator[ConsumerRecorder]:
    """Consume while the block runs. Errors of `consume` fail the test."""
    recorder = ConsumerRecorder()

    async def recording_handler(job: FetchJob) -> JobOutcome:
        recorder.started.append(job)
        await recorder.notify()
        try:
            return await handler(job)
        finally:
            recorder.ended.append(job.object_id)
            await recorder.notify()

    task = asyncio.create_task(queue.consume(recording_handler, concurrency, recorder.on_dead_letter))
    try:
        yield recorder
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def wait_for_depth(queue: JobQueue, *, ready: int = 0, delayed: int = 0, dead: int = 0) -> None:
    """Wait until the queue's counts are these. The broker updates them with a delay and announces nothing."""
    expected = (ready, delayed, dead)

    async def reached() -> bool:
        depth = await queue.depth()
        return (depth.ready, depth.delayed, depth.dead) == expected

    await eventually(reached, pause=0.02, what=f"(ready, delayed, dead) == {expected}")
