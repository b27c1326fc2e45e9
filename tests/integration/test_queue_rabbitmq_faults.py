"""The job queue while its broker is stopped, killed, frozen or blocked, or closes connections."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.domain.errors import JobQueueUnavailable
from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome, Retry, RetryPlan
from tests.contract.queue_harness import consuming, make_job, wait_for_depth
from tests.counters import counted
from tests.servers.rabbitmq_server import RabbitServer
from tests.waiting import eventually

pytestmark = pytest.mark.servers

_PUBLISH_SECONDS = 2.0
_IN_TIME = 10 * _PUBLISH_SECONDS
"""What a call with that limit may take on a busy machine. Without a limit it would not end."""


@pytest.fixture
async def queue(own_rabbitmq: RabbitServer, retry_plan: RetryPlan) -> AsyncIterator[RabbitJobQueue]:
    made = RabbitJobQueue(own_rabbitmq.url, f"test-{uuid.uuid4().hex[:12]}", retry_plan, _PUBLISH_SECONDS)
    await made.open()
    yield made
    await made.close()


async def _publish_until_taken(queue: RabbitJobQueue, job: FetchJob) -> None:
    async def taken() -> bool:
        try:
            await queue.publish(job)
        except JobQueueUnavailable:
            return False
        return True

    await eventually(taken, pause=0.1)


async def test_a_job_that_outlasts_the_consumer_timeout_runs_once_and_ends(queue: RabbitJobQueue) -> None:
    """The broker redelivers after 2 s, to the process that still runs the job."""

    async def slow(_: FetchJob) -> JobOutcome:
        await asyncio.sleep(4.5)
        return Ack()

    await queue.publish(make_job())
    async with consuming(queue, slow, concurrency=3) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 1)
        await queue.publish(make_job("next"))
        await wait_for_depth(queue)
        assert [job.object_id for job in recorder.started] == ["1", "next"]


async def test_killed_connections_come_back_and_a_running_job_runs_once(
    queue: RabbitJobQueue, own_rabbitmq: RabbitServer
) -> None:
    release = asyncio.Event()

    async def wait_for_release(_: FetchJob) -> JobOutcome:
        await release.wait()
        return Ack()

    await queue.publish(make_job("1"))
    async with consuming(queue, wait_for_release) as recorder:
        await recorder.wait_for(lambda: len(recorder.started) == 1)
        await asyncio.to_thread(own_rabbitmq.close_all_connections)
        await _publish_until_taken(queue, make_job("2"))
        await recorder.wait_for(lambda: len(recorder.started) == 2)
        release.set()
        await recorder.wait_for(lambda: len(recorder.ended) == 2)
        await wait_for_depth(queue)
    await wait_for_depth(queue)
    assert sorted(job.object_id for job in recorder.started) == ["1", "2"]


async def test_a_memory_alarm_stops_publishing_in_time_and_acknowledging_not_at_all(
    queue: RabbitJobQueue, own_rabbitmq: RabbitServer
) -> None:
    async def last_is_late(job: FetchJob) -> JobOutcome:
        return Retry("no_space") if job.object_id == "late" and job.attempt == 1 else Ack()

    for name in ("1", "2", "late"):
        await queue.publish(make_job(name))
    await asyncio.to_thread(own_rabbitmq.raise_memory_alarm)
    try:
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(JobQueueUnavailable):
                await queue.publish(make_job("refused"))
            assert time.monotonic() - started < _IN_TIME
        async with consuming(queue, last_is_late) as recorder:
            await recorder.wait_for(lambda: len(recorder.ended) == 3)
            await wait_for_depth(queue)
            await queue.ping()
            await asyncio.to_thread(own_rabbitmq.clear_memory_alarm)
            await recorder.wait_for(
                lambda: [job.attempt for job in recorder.started if job.object_id == "late"] == [1, 2]
            )
    finally:
        await asyncio.to_thread(own_rabbitmq.clear_memory_alarm)
    # Only the first refused job reached the broker's socket. It is published late, which is safe.
    assert sum(job.object_id == "refused" for job in recorder.started) <= 1


async def test_jobs_survive_a_killed_broker_and_consumption_resumes_when_it_is_back(
    queue: RabbitJobQueue, own_rabbitmq: RabbitServer
) -> None:
    """While the broker is down, publishing fails at once. A queue opened in that time works when the broker is up."""
    blocked = asyncio.Event()

    async def first_waits(job: FetchJob) -> JobOutcome:
        if job.object_id == "0":
            await blocked.wait()
        return Ack()

    for number in range(5):
        await queue.publish(make_job(str(number)))
    async with consuming(queue, first_waits, concurrency=1) as recorder:
        await recorder.wait_for(lambda: len(recorder.started) == 1)
        await asyncio.to_thread(own_rabbitmq.kill)
        opened_while_down = RabbitJobQueue(
            own_rabbitmq.url, "test-opened-while-down", RetryPlan(()), _PUBLISH_SECONDS
        )
        await opened_while_down.open()
        started = time.monotonic()
        with pytest.raises(JobQueueUnavailable):
            await opened_while_down.publish(make_job())
        assert time.monotonic() - started < _IN_TIME
        with pytest.raises(JobQueueUnavailable):
            await opened_while_down.ping()
        async with consuming(opened_while_down) as late_recorder:
            await asyncio.to_thread(own_rabbitmq.start)
            await _publish_until_taken(opened_while_down, make_job("late"))
            await late_recorder.wait_for(lambda: late_recorder.ended == ["late"])
            blocked.set()
            await recorder.wait_for(lambda: len(recorder.ended) == 5)
        await opened_while_down.close()
    await wait_for_depth(queue)
    assert [job.object_id for job in recorder.started] == ["0", "1", "2", "3", "4"]


def failed_calls(operation: str) -> float:
    return counted("distributor_job_queue_errors_total", operation=operation)


async def test_without_a_broker_publishers_and_consumers_count_what_fails() -> None:
    queue = RabbitJobQueue("amqp://guest:guest@127.0.0.1:1/", "test-nowhere", RetryPlan(()), _PUBLISH_SECONDS)
    await queue.open()
    published, consumed = failed_calls("publish"), failed_calls("consume")
    async with consuming(queue):
        with pytest.raises(JobQueueUnavailable):
            await queue.publish(make_job())
        assert failed_calls("publish") == published + 1
        await eventually(lambda: failed_calls("consume") > consumed)
    await queue.close()


async def test_stopping_while_the_broker_is_down_is_quick(own_rabbitmq: RabbitServer) -> None:
    queue = RabbitJobQueue("amqp://guest:guest@127.0.0.1:1/", "test-nowhere", RetryPlan(()), _PUBLISH_SECONDS)
    await queue.open()
    started = time.monotonic()
    async with consuming(queue):
        with pytest.raises(JobQueueUnavailable):
            await queue.publish(make_job())
    await queue.close()
    assert time.monotonic() - started < _IN_TIME


@pytest.mark.chaos
@pytest.mark.slow
async def test_a_frozen_broker_is_noticed_by_the_missing_heartbeat(
    queue: RabbitJobQueue, own_rabbitmq: RabbitServer
) -> None:
    async with consuming(queue) as recorder:
        await queue.publish(make_job("1"))
        await recorder.wait_for(lambda: recorder.ended == ["1"])
        own_rabbitmq.freeze()
        try:
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(JobQueueUnavailable):
                    await queue.publish(make_job("lost"))
                assert time.monotonic() - started < _IN_TIME
            await asyncio.sleep(25)
        finally:
            own_rabbitmq.thaw()
        await _publish_until_taken(queue, make_job("2"))
        await recorder.wait_for(lambda: "2" in recorder.ended)
