"""The contract of every job queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.domain.errors import JobQueueUnavailable
from distributor_node.shared.domain.jobs import (
    Ack,
    DeadLetter,
    FetchJob,
    JobOutcome,
    Nack,
    Requeue,
    Retry,
    RetryPlan,
)
from distributor_node.shared.ports.job_queue import JobQueue
from tests.contract.queue_harness import consuming, make_job, wait_for_depth


@pytest.fixture
async def memory(retry_plan: RetryPlan) -> AsyncIterator[JobQueue]:
    queue = MemoryJobQueue(retry_plan)
    await queue.open()
    yield queue
    await queue.close()


@pytest.fixture
async def rabbitmq(amqp_url: str, queue_prefix: str, retry_plan: RetryPlan) -> AsyncIterator[JobQueue]:
    queue = RabbitJobQueue(amqp_url, queue_prefix, retry_plan, publish_timeout=5)
    await queue.open()
    yield queue
    await queue.close()


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.servers)])
def queue(request: pytest.FixtureRequest) -> JobQueue:
    made: JobQueue = request.getfixturevalue(request.param)
    return made


async def test_a_published_job_arrives_as_it_was(queue: JobQueue) -> None:
    job = make_job("42", request_id="request-of-a-client")
    await queue.publish(job)
    async with consuming(queue) as recorder:
        await recorder.wait_for(lambda: recorder.ended == ["42"])
    assert recorder.started == [job]
    await wait_for_depth(queue)


async def test_a_job_published_while_consuming_arrives(queue: JobQueue) -> None:
    async with consuming(queue) as recorder:
        for number in range(20):
            await queue.publish(make_job(str(number)))
        await recorder.wait_for(lambda: len(recorder.ended) == 20)
    assert [job.object_id for job in recorder.started] == [str(number) for number in range(20)]


async def test_concurrency_is_bounded(queue: JobQueue) -> None:
    running = most = 0

    async def count(_: FetchJob) -> JobOutcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return Ack()

    for number in range(12):
        await queue.publish(make_job(str(number)))
    async with consuming(queue, count, concurrency=3) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 12)
    assert most == 3


async def test_retry_redelivers_after_the_delay_of_its_attempt(queue: JobQueue) -> None:
    times: list[float] = []

    async def succeed_on_third_attempt(job: FetchJob) -> JobOutcome:
        times.append(time.monotonic())
        return Ack() if job.attempt == 3 else Retry("no_space")

    await queue.publish(make_job(request_id="r"))
    async with consuming(queue, succeed_on_third_attempt) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 3)
    assert [(job.attempt, job.request_id) for job in recorder.started] == [(1, "r"), (2, "r"), (3, "r")]
    assert times[1] - times[0] >= 0.095
    assert times[2] - times[1] >= 0.295
    assert recorder.dead_lettered == []
    await wait_for_depth(queue)


async def test_requeue_redelivers_after_the_first_delay_and_is_no_attempt(queue: JobQueue) -> None:
    times: list[float] = []

    async def succeed_on_fifth_call(_: FetchJob) -> JobOutcome:
        times.append(time.monotonic())
        return Ack() if len(times) == 5 else Requeue("fetched by another worker")

    await queue.publish(make_job(request_id="r"))
    async with consuming(queue, succeed_on_fifth_call) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 5)
    assert {(job.attempt, job.request_id) for job in recorder.started} == {(1, "r")}
    assert min(later - sooner for sooner, later in pairwise(times)) >= 0.095
    assert recorder.dead_lettered == []
    await wait_for_depth(queue)


async def test_a_delayed_job_is_counted_as_such(queue: JobQueue) -> None:
    async def later(job: FetchJob) -> JobOutcome:
        return Retry("no_space") if job.attempt < 3 else Ack()

    await queue.publish(make_job())
    async with consuming(queue, later) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 2)
        await wait_for_depth(queue, delayed=1)


async def test_exhausted_attempts_are_recorded_and_dead_lettered(queue: JobQueue) -> None:
    async def never(_: FetchJob) -> JobOutcome:
        return Retry("all_sources_failed")

    await queue.publish(make_job("9"))
    async with consuming(queue, never) as recorder:
        await recorder.wait_for(lambda: bool(recorder.dead_lettered))
        await wait_for_depth(queue, dead=1)
    assert [(job.object_id, job.attempt, reason) for job, reason in recorder.dead_lettered] == [
        ("9", 3, "all_sources_failed")
    ]
    assert len(recorder.started) == 3


async def test_a_permanent_failure_is_recorded_before_it_is_dead_lettered(queue: JobQueue) -> None:
    dead_when_called: list[int] = []

    async def dead_letter(_: FetchJob) -> JobOutcome:
        return DeadLetter("never_fits")

    async def on_dead_letter(_: FetchJob, reason: str) -> None:
        assert reason == "never_fits"
        dead_when_called.append((await queue.depth()).dead)

    await queue.publish(make_job())
    consumer = asyncio.create_task(queue.consume(dead_letter, 1, on_dead_letter))
    await wait_for_depth(queue, dead=1)
    consumer.cancel()
    await asyncio.wait([consumer])
    assert dead_when_called == [0]


async def test_a_failing_dead_letter_callback_still_ends_the_job(queue: JobQueue) -> None:
    async def dead_letter(_: FetchJob) -> JobOutcome:
        return DeadLetter("never_fits")

    async def failing_callback(_: FetchJob, __: str) -> None:
        raise ConnectionError("state store is down")

    await queue.publish(make_job())
    consumer = asyncio.create_task(queue.consume(dead_letter, 1, failing_callback))
    await wait_for_depth(queue, dead=1)
    consumer.cancel()
    await asyncio.wait([consumer])
    assert consumer.cancelled()


async def test_a_raising_handler_retries_and_does_not_stop_others(queue: JobQueue) -> None:
    async def raise_for_bad(job: FetchJob) -> JobOutcome:
        if job.object_id == "bad":
            raise KeyError("oops")
        return Ack()

    await queue.publish(make_job("bad"))
    await queue.publish(make_job("good"))
    async with consuming(queue, raise_for_bad) as recorder:
        await recorder.wait_for(lambda: bool(recorder.dead_lettered))
    assert recorder.dead_lettered[0][1] == "KeyError"
    assert "good" in recorder.ended


@pytest.mark.parametrize("answer", ["raises", "nacks", "fails"])
async def test_cancelling_returns_the_jobs_unchanged(queue: JobQueue, answer: str) -> None:
    async def interrupted(_: FetchJob) -> JobOutcome:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if answer == "raises":
                raise
            if answer == "fails":
                raise RuntimeError("while stopping") from None
        return Nack()

    for number in range(4):
        await queue.publish(make_job(str(number)))
    async with consuming(queue, interrupted) as first:
        await first.wait_for(lambda: len(first.started) == 2)
    assert sorted(first.ended) == ["0", "1"]
    await wait_for_depth(queue, ready=4)

    async with consuming(queue) as second:
        await second.wait_for(lambda: len(second.ended) == 4)
    assert {(job.object_id, job.attempt) for job in second.started} == {(str(n), 1) for n in range(4)}
    await wait_for_depth(queue)


async def test_a_job_finished_in_spite_of_cancellation_is_finished(queue: JobQueue) -> None:
    async def finish_when_cancelled(_: FetchJob) -> JobOutcome:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return Ack()
        return Nack()

    await queue.publish(make_job())
    async with consuming(queue, finish_when_cancelled) as recorder:
        await recorder.wait_for(lambda: len(recorder.started) == 1)
    await wait_for_depth(queue)


async def test_two_consumers_share_the_jobs(queue: JobQueue) -> None:
    both_have_one = asyncio.Barrier(2)

    async def meet(_: FetchJob) -> JobOutcome:
        async with asyncio.timeout(60):
            await both_have_one.wait()
        return Ack()

    async with consuming(queue, meet, 1) as one, consuming(queue, meet, 1) as other:
        await queue.publish(make_job("1"))
        await queue.publish(make_job("2"))
        await one.wait_for(lambda: len(one.ended) == 1)
        await other.wait_for(lambda: len(other.ended) == 1)


async def test_low_priority_waits_behind_the_others(queue: JobQueue) -> None:
    for number in range(3):
        await queue.publish(make_job(f"warm-{number}", low_priority=True))
    for number in range(3):
        await queue.publish(make_job(f"client-{number}"))
    await wait_for_depth(queue, ready=6)
    async with consuming(queue, concurrency=1) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 6)
    assert recorder.ended == ["client-0", "client-1", "client-2", "warm-0", "warm-1", "warm-2"]
    assert recorder.started[-1].low_priority


async def test_ping_and_closing(queue: JobQueue) -> None:
    await queue.ping()
    await queue.close()
    with pytest.raises(JobQueueUnavailable):
        await queue.publish(make_job())


async def test_the_error_that_breaks_a_consumer_is_raised_not_its_consequences(memory: JobQueue) -> None:
    begun, idle = asyncio.Event(), asyncio.Event()

    class Broken(BaseException):
        """Not an Exception: no handler error, which would be retried."""

    async def handler(job: FetchJob) -> JobOutcome:
        if job.object_id == "2":
            begun.set()
            await idle.wait()
            await asyncio.sleep(0)
            raise Broken
        await begun.wait()
        idle.set()
        return Ack()

    async def on_dead_letter(_: FetchJob, __: str) -> None: ...

    await memory.publish(make_job("1"))
    await memory.publish(make_job("2"))
    with pytest.raises(Broken):
        await memory.consume(handler, 2, on_dead_letter)
