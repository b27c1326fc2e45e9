"""The job queue on RabbitMQ only: headers, poison messages, durability, conflicting queues, names."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import cast

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiormq.abc import AbstractChannel as AmqpChannel
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.common import FieldTable
from pamqp.header import ContentHeader

from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.adapters.queue_rabbitmq.connection import Topology, to_dead_letter
from distributor_node.shared.domain.errors import ConfigurationError, JobQueueUnavailable
from distributor_node.shared.domain.jobs import (
    Ack,
    DeadLetter,
    FetchJob,
    JobOutcome,
    Retry,
    RetryPlan,
    encode_job,
)
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


class RawProperties(Basic.Properties):
    """The properties of a message as bytes, as another client may send them."""

    def __init__(self, flag: int, value: bytes) -> None:
        super().__init__()
        self._raw = struct.pack(">H", flag) + value

    def marshal(self) -> bytes:
        return self._raw


def _table(name: bytes, kind: bytes, value: bytes) -> bytes:
    entry = bytes([len(name)]) + name + kind + value
    return struct.pack(">I", len(entry)) + entry


def _nested(levels: int) -> bytes:
    table = _table(b"a", b"t", b"\x01")
    for _ in range(levels):
        table = _table(b"a", b"F", table)
    return table


def _many(count: int) -> bytes:
    entries = b"".join(b"\x04%04dS\0\0\0\2ab" % number for number in range(count))
    return struct.pack(">I", len(entries)) + entries


_NOT_UTF_8 = b"\x04ab\xff\xfe"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("content_type", _NOT_UTF_8),
        ("content_encoding", _NOT_UTF_8),
        ("correlation_id", _NOT_UTF_8),
        ("reply_to", _NOT_UTF_8),
        ("message_id", _NOT_UTF_8),
        ("message_type", _NOT_UTF_8),
        ("app_id", _NOT_UTF_8),
        ("headers", _table(b"ab\xff\xfe", b"t", b"\x01")),
        ("headers", _table(b"a", b"F", _table(b"\xff", b"t", b"\x01"))),
        ("headers", _table(b"a", b"T", b"\x7f" * 8)),
        ("headers", _nested(5000)),
        ("timestamp", b"\xff" * 8),
    ],
)
async def test_a_message_whose_properties_cannot_be_read_is_dead_lettered_and_consumption_goes_on(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel, name: str, value: bytes
) -> None:
    await queue.ping()
    await queue.publish(make_job("before"))
    unreadable = RawProperties(Basic.Properties.flags[name], value)
    amqp = await channel.get_underlay_channel()
    await amqp.basic_publish(_JOB, routing_key=topology.work, properties=unreadable)
    async with consuming(queue) as recorder:
        await queue.publish(make_job("after"))
        await recorder.wait_for(lambda: "after" in recorder.ended)
        await wait_for_depth(queue, dead=1)
    letter = await _take(channel, topology.dead)
    assert letter.body == _JOB
    assert str(letter.headers["x-distributor-reason"]).startswith("invalid job: properties cannot be read: ")
    assert repr(value)[2:-1][:18] in str(letter.headers["x-distributor-properties"])
    assert [job.object_id for job in recorder.started] == ["before", "after"]


@pytest.mark.parametrize(
    ("value", "omitted"),
    [
        (
            _table(b"a", b"S", struct.pack(">I", 131_000) + b"b" * 131_000),
            None,
        ),  # with a reason, too long for a frame
        (_many(1000), 1000 - 156),
        (_nested(400), None),
    ],
)
async def test_a_message_whose_headers_do_not_fit_in_a_dead_letter_is_one_with_those_that_do(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel, value: bytes, omitted: int | None
) -> None:
    await queue.ping()
    amqp = await channel.get_underlay_channel()
    poison = RawProperties(Basic.Properties.flags["headers"], value)
    await amqp.basic_publish(b"[]", routing_key=topology.work, properties=poison)
    async with consuming(queue) as recorder:
        await wait_for_depth(queue, dead=1)
        await queue.publish(make_job("after"))
        await recorder.wait_for(lambda: "after" in recorder.ended)
    letter = await _take(channel, topology.dead)
    assert letter.body == b"[]"
    assert str(letter.headers["x-distributor-reason"]).startswith("invalid job: ")
    assert letter.headers.get("x-distributor-omitted-headers") == omitted


@pytest.mark.parametrize("levels", [100, 800, 5000])
async def test_a_dead_letter_can_be_sent_with_tables_in_any_number_of_tables(levels: int) -> None:
    table: FieldTable = {}
    for _ in range(levels):
        table = {"a": table}
    header = ContentHeader(properties=Basic.Properties(headers={"x-nested": table}))
    message = DeliveredMessage(Basic.Deliver(), header, b"", cast("AmqpChannel", None))
    to_dead_letter(message, "reason").properties.marshal()


async def test_a_job_is_done_whatever_the_names_of_its_exchange_and_routing_key(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel
) -> None:
    await queue.ping()
    exchange = await channel.declare_exchange(topology.prefix, aio_pika.ExchangeType.FANOUT, auto_delete=True)
    async with consuming(queue) as recorder:
        await queue.publish(make_job("before"))
        await recorder.wait_for(lambda: recorder.ended == ["before"])
        await (await channel.get_queue(topology.work)).bind(exchange)
        message = aio_pika.Message(encode_job(make_job("between")))
        await exchange.publish(message, NotUtf8("ab"))
        await recorder.wait_for(lambda: "between" in recorder.ended)
        await queue.publish(make_job("after"))
        await recorder.wait_for(lambda: "after" in recorder.ended)
    assert [job.object_id for job in recorder.started] == ["before", "between", "after"]


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


@pytest.mark.parametrize(
    "request_id",
    ["a" * 130_950, "é" * 150],  # with other properties too long for a frame; too long for a short string
)
async def test_a_job_of_a_long_request_id_is_attempted_again(
    queue: RabbitJobQueue, topology: Topology, channel: AbstractChannel, request_id: str
) -> None:
    outcomes: list[JobOutcome] = [Retry("later"), Ack()]

    async def next_outcome(_: FetchJob) -> JobOutcome:
        return outcomes.pop(0)

    await queue.ping()
    message = aio_pika.Message(_JOB, headers={"x-distributor-request-id": request_id})
    await channel.default_exchange.publish(message, topology.work)
    async with consuming(queue, next_outcome) as recorder:
        await recorder.wait_for(lambda: len(recorder.ended) == 2)
    assert [job.attempt for job in recorder.started] == [1, 2]
    assert all(request_id.startswith(job.request_id) for job in recorder.started)
