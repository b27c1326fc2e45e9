"""What every job queue promises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from shared.adapters.queue_memory import MemoryJobQueue
from shared.adapters.queue_rabbitmq import RabbitJobQueue
from shared.domain.errors import JobQueueUnavailable
from shared.domain.jobs import Done, FetchJob, HandBack, Hopeless, JobOutcome, LookAgain, RetryPlan, TryLater
from shared.ports.job_queue import JobQueue
from tests.contract.queue_world import consuming, make_job, until_depth


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
    async with consuming(queue) as witness:
        await witness.until(lambda: witness.ended == ["42"])
    assert witness.begun == [job]
    await until_depth(queue)


async def test_a_job_published_while_consuming_arrives(queue: JobQueue) -> None:
    async with consuming(queue) as witness:
        for number in range(20):
            await queue.publish(make_job(str(number)))
        await witness.until(lambda: len(witness.ended) == 20)
    assert [job.object_id for job in witness.begun] == [str(number) for number in range(20)]


async def test_no_more_jobs_at_once_than_asked_for(queue: JobQueue) -> None:
    running = most = 0

    async def count(_: FetchJob) -> JobOutcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return Done()

    for number in range(12):
        await queue.publish(make_job(str(number)))
    async with consuming(queue, count, concurrency=3) as witness:
        await witness.until(lambda: len(witness.ended) == 12)
    assert most == 3


async def test_try_later_comes_again_after_the_delay_of_its_attempt(queue: JobQueue) -> None:
    times: list[float] = []

    async def third_time_lucky(job: FetchJob) -> JobOutcome:
        times.append(time.monotonic())
        return Done() if job.attempt == 3 else TryLater("no_space")

    await queue.publish(make_job(request_id="r"))
    async with consuming(queue, third_time_lucky) as witness:
        await witness.until(lambda: len(witness.ended) == 3)
    assert [(job.attempt, job.request_id) for job in witness.begun] == [(1, "r"), (2, "r"), (3, "r")]
    assert times[1] - times[0] >= 0.095
    assert times[2] - times[1] >= 0.295
    assert witness.given_up == []
    await until_depth(queue)


async def test_look_again_comes_again_after_the_first_delay_and_is_no_attempt(queue: JobQueue) -> None:
    times: list[float] = []

    async def fifth_time(_: FetchJob) -> JobOutcome:
        times.append(time.monotonic())
        return Done() if len(times) == 5 else LookAgain("fetched elsewhere")

    await queue.publish(make_job(request_id="r"))
    async with consuming(queue, fifth_time) as witness:
        await witness.until(lambda: len(witness.ended) == 5)
    assert {(job.attempt, job.request_id) for job in witness.begun} == {(1, "r")}
    assert min(later - sooner for sooner, later in pairwise(times)) >= 0.095
    assert witness.given_up == []
    await until_depth(queue)


async def test_a_delayed_job_is_counted_as_such(queue: JobQueue) -> None:
    async def later(job: FetchJob) -> JobOutcome:
        return TryLater("no_space") if job.attempt < 3 else Done()

    await queue.publish(make_job())
    async with consuming(queue, later) as witness:
        await witness.until(lambda: len(witness.ended) == 2)
        await until_depth(queue, delayed=1)


async def test_used_up_attempts_are_remembered_and_dead_lettered(queue: JobQueue) -> None:
    async def never(_: FetchJob) -> JobOutcome:
        return TryLater("all_sources_failed")

    await queue.publish(make_job("9"))
    async with consuming(queue, never) as witness:
        await witness.until(lambda: bool(witness.given_up))
        await until_depth(queue, dead=1)
    assert [(job.object_id, job.attempt, reason) for job, reason in witness.given_up] == [
        ("9", 3, "all_sources_failed")
    ]
    assert len(witness.begun) == 3


async def test_hopeless_is_remembered_before_it_is_dead_lettered(queue: JobQueue) -> None:
    dead_when_told: list[int] = []

    async def hopeless(_: FetchJob) -> JobOutcome:
        return Hopeless("never_fits")

    async def told(_: FetchJob, reason: str) -> None:
        assert reason == "never_fits"
        dead_when_told.append((await queue.depth()).dead)

    await queue.publish(make_job())
    consumer = asyncio.create_task(queue.consume(hopeless, 1, told))
    await until_depth(queue, dead=1)
    consumer.cancel()
    await asyncio.wait([consumer])
    assert dead_when_told == [0]


async def test_a_failure_that_cannot_be_remembered_still_ends_the_job(queue: JobQueue) -> None:
    async def hopeless(_: FetchJob) -> JobOutcome:
        return Hopeless("never_fits")

    async def forgetful(_: FetchJob, __: str) -> None:
        raise ConnectionError("state store is down")

    await queue.publish(make_job())
    consumer = asyncio.create_task(queue.consume(hopeless, 1, forgetful))
    await until_depth(queue, dead=1)
    consumer.cancel()
    await asyncio.wait([consumer])
    assert consumer.cancelled()


async def test_a_handler_that_raises_tries_later_and_stops_nobody(queue: JobQueue) -> None:
    async def clumsy(job: FetchJob) -> JobOutcome:
        if job.object_id == "bad":
            raise KeyError("oops")
        return Done()

    await queue.publish(make_job("bad"))
    await queue.publish(make_job("good"))
    async with consuming(queue, clumsy) as witness:
        await witness.until(lambda: bool(witness.given_up))
    assert witness.given_up[0][1] == "KeyError"
    assert "good" in witness.ended


@pytest.mark.parametrize("answer", ["raises", "hands_back", "fails"])
async def test_cancelling_gives_the_jobs_back_unchanged(queue: JobQueue, answer: str) -> None:
    async def interrupted(_: FetchJob) -> JobOutcome:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if answer == "raises":
                raise
            if answer == "fails":
                raise RuntimeError("while stopping") from None
        return HandBack()

    for number in range(4):
        await queue.publish(make_job(str(number)))
    async with consuming(queue, interrupted) as first:
        await first.until(lambda: len(first.begun) == 2)
    assert sorted(first.ended) == ["0", "1"]
    await until_depth(queue, ready=4)

    async with consuming(queue) as second:
        await second.until(lambda: len(second.ended) == 4)
    assert {(job.object_id, job.attempt) for job in second.begun} == {(str(n), 1) for n in range(4)}
    await until_depth(queue)


async def test_a_job_finished_in_spite_of_cancellation_is_finished(queue: JobQueue) -> None:
    async def stubborn(_: FetchJob) -> JobOutcome:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return Done("just in time")
        return HandBack()

    await queue.publish(make_job())
    async with consuming(queue, stubborn) as witness:
        await witness.until(lambda: len(witness.begun) == 1)
    await until_depth(queue)


async def test_two_consumers_share_the_jobs(queue: JobQueue) -> None:
    both_have_one = asyncio.Barrier(2)

    async def meet(_: FetchJob) -> JobOutcome:
        async with asyncio.timeout(5):
            await both_have_one.wait()
        return Done()

    async with consuming(queue, meet, 1) as one, consuming(queue, meet, 1) as other:
        await queue.publish(make_job("1"))
        await queue.publish(make_job("2"))
        await one.until(lambda: len(one.ended) == 1)
        await other.until(lambda: len(other.ended) == 1)


async def test_low_priority_waits_behind_the_others(queue: JobQueue) -> None:
    for number in range(3):
        await queue.publish(make_job(f"warm-{number}", low_priority=True))
    for number in range(3):
        await queue.publish(make_job(f"client-{number}"))
    await until_depth(queue, ready=6)
    async with consuming(queue, concurrency=1) as witness:
        await witness.until(lambda: len(witness.ended) == 6)
    assert witness.ended == ["client-0", "client-1", "client-2", "warm-0", "warm-1", "warm-2"]
    assert witness.begun[-1].low_priority


async def test_ping_and_closing(queue: JobQueue) -> None:
    await queue.ping()
    await queue.close()
    with pytest.raises(JobQueueUnavailable):
        await queue.publish(make_job())


async def test_what_breaks_a_consumer_is_told_not_what_it_did_to_the_others(memory: JobQueue) -> None:
    begun, idle = asyncio.Event(), asyncio.Event()

    class Broken(BaseException):
        """No handler's error, which would end in another attempt."""

    async def handler(job: FetchJob) -> JobOutcome:
        if job.object_id == "2":
            begun.set()
            await idle.wait()
            await asyncio.sleep(0)
            raise Broken
        await begun.wait()
        idle.set()
        return Done()

    async def told(_: FetchJob, __: str) -> None: ...

    await memory.publish(make_job("1"))
    await memory.publish(make_job("2"))
    with pytest.raises(Broken):
        await memory.consume(handler, 2, told)
