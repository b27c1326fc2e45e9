"""The job queue on RabbitMQ only: headers, poison messages, durability, conflicting queues, names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from pamqp.common import FieldTable

from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.adapters.queue_rabbitmq.connection import Topology
from distributor_node.shared.domain.errors import ConfigurationError, JobQueueUnavailable
from distributor_node.shared.domain.jobs import DeadLetter, JobOutcome, RetryPlan, encode_job
from tests.contract.queue_harness import consuming, done, make_job, wait_for_depth

pytestmark = pytest.mark.servers


@pytest.fixture
def topology(queue_prefix: str, retry_plan: RetryPlan) -> Topology:
    return Topology(queue_prefix, retry_plan)


@pytest.fixture
async def queue(amqp_url: str, topology: Topology) -> AsyncIterator[RabbitJobQueue]:
    made = RabbitJobQueue(amqp_url, topology.prefix, topology.plan, publish_timeout=5)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def channel(amqp_url: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(amqp_url) as connection, connection.channel() as opened:
        yield opened


async def _take(channel: AbstractChannel, name: str) -> AbstractIncomingMessage:
    message = await (await channel.get_queue(name)).get()
    await message.ack()
    return message


async def test_a_message_is_persistent_and_carries_attempt_and_request_id(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel
) -> None:
    await queue.publish(make_job(request_id="abc"))
    message = await _take(channel, topology.work)
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert message.headers == {"x-distributor-attempt": 1, "x-distributor-request-id": "abc"}
    assert message.correlation_id == "abc"


_JOB = encode_job(make_job())


class NotUtf8(str):
    """A text as another client may send it."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        return b"\xff\xfe"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"\x00\xff not JSON", {}),
        (b"[]", {}),
        (_JOB.replace(b'"version": 1', b'"version": 99'), {}),
        (_JOB.replace(b'"object_id": "1"', b'"object_id": "../etc"'), {}),
        (_JOB, {"x-distributor-attempt": "many"}),
        (_JOB, {"x-distributor-attempt": 0}),
        (_JOB, {"x-distributor-request-id": 7}),
        (b"[]", {"x-not-utf-8": NotUtf8("ab"), "x-within": {"list": [NotUtf8("ab")]}}),
    ],
)
async def test_poison_is_dead_lettered_as_it_came_and_consumption_goes_on(
    queue: RabbitJobQueue,
    topology: Topology,
    channel: AbstractChannel,
    body: bytes,
    headers: FieldTable,
) -> None:
    await queue.ping()
    await queue.publish(make_job("before"))
    poison = aio_pika.Message(body, headers={**headers, "x-other": "kept"})
    await channel.default_exchange.publish(poison, topology.work)
    async with consuming(queue) as recorder:
        await wait_for_depth(queue, dead=1)
        await queue.publish(make_job("after"))
        await recorder.wait_for(lambda: "after" in recorder.ended)
    letter = await _take(channel, topology.dead)
    assert letter.body == body
    assert letter.headers["x-other"] == "kept"
    assert str(letter.headers["x-distributor-reason"]).startswith("invalid job: ")
    assert [job.object_id for job in recorder.started] == ["before", "after"]


async def test_a_dead_letter_keeps_body_and_request_id_and_says_why(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel
) -> None:
    async def dead_letter(_: object) -> JobOutcome:
        return DeadLetter("never_fits")

    job = make_job(request_id="abc")
    await queue.publish(job)
    async with consuming(queue, dead_letter):
        await wait_for_depth(queue, dead=1)
    letter = await _take(channel, topology.dead)
    assert letter.body == encode_job(job)
    assert letter.headers["x-distributor-reason"] == "never_fits"
    assert letter.headers["x-distributor-request-id"] == "abc"


async def test_a_queue_with_other_arguments_is_reported_and_nothing_hangs(
    amqp_url: str, topology: Topology, channel: AbstractChannel
) -> None:
    await channel.declare_queue(topology.work, durable=True)
    queue = RabbitJobQueue(amqp_url, topology.prefix, topology.plan, publish_timeout=5)
    await queue.open()
    try:
        with pytest.raises(JobQueueUnavailable, match=rf"{topology.work}.*delete"):
            await queue.publish(make_job())
        with pytest.raises(ConfigurationError, match=rf"{topology.work}.*delete"):
            await queue.consume(done, 1, unexpected_dead_letter)
    finally:
        await queue.close()


async def unexpected_dead_letter(_: object, __: str) -> None:
    raise AssertionError("no job is dead-lettered here")


async def test_the_consumer_timeout_argument_is_accepted_by_this_broker(
    amqp_url: str, topology: Topology
) -> None:
    queue = RabbitJobQueue(amqp_url, topology.prefix, topology.plan, 5, consumer_timeout_ms=12 * 3600 * 1000)
    await queue.open()
    async with consuming(queue) as recorder:
        await queue.publish(make_job())
        await recorder.wait_for(lambda: len(recorder.ended) == 1)
    await queue.close()


async def test_a_deleted_queue_is_declared_again_by_publishing(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel
) -> None:
    await queue.publish(make_job("1"))
    await channel.queue_delete(topology.work)
    await queue.publish(make_job("2"))
    await wait_for_depth(queue, ready=1)


async def test_a_deleted_queue_is_declared_again_by_consuming(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel
) -> None:
    async with consuming(queue) as recorder:
        await queue.publish(make_job("1"))
        await recorder.wait_for(lambda: recorder.ended == ["1"])
        await channel.queue_delete(topology.work)
        await queue.publish(make_job("2"))
        await recorder.wait_for(lambda: recorder.ended == ["1", "2"])


async def test_many_publish_at_once(queue: RabbitJobQueue) -> None:
    await asyncio.gather(*(queue.publish(make_job(str(number))) for number in range(200)))
    await wait_for_depth(queue, ready=200)


async def test_names_and_delays_are_whole_milliseconds() -> None:
    topology = Topology("node", RetryPlan((0.0001, 5.0, 5.0, 600.0)), 1000)
    assert topology.names == (
        "node.jobs",
        "node.delay.1ms",
        "node.delay.5000ms",
        "node.delay.600000ms",
        "node.dead",
    )
    assert tuple(topology.queues()) == topology.names
