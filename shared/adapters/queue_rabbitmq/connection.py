"""Sessions with the broker: opened and closed within a time limit, and watched for their loss.

Then the queues that the node needs, jobs as messages, and the publisher.

aio-pika's robust connections are not used. They restore channels and consumers silently: a publisher cannot tell a
broker that is down from one that is slow, and a consumer cannot tell which deliveries can still be acknowledged. Each
user here has its own reconnect loop instead. Opening a new session is the one answer to a restarted broker, a deleted
queue, a cancelled consumer, a channel closed by the consumer timeout and a frozen connection.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pamqp.frame
import structlog
from aio_pika import DeliveryMode
from aio_pika.abc import AbstractChannel
from aio_pika.connection import Connection, make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPError, ChannelPreconditionFailed, PublishError
from aiormq.abc import AbstractChannel as AmqpChannel
from aiormq.abc import DeliveredMessage
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from pamqp import constants
from pamqp.commands import Basic
from pamqp.common import Arguments, FieldTable, FieldValue
from pamqp.encode import encode_table_value, field_table
from pamqp.header import ContentHeader
from yarl import URL

from distributor_node.shared.domain.errors import ConfigurationError, InvalidJob, JobQueueUnavailable
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan, decode_job, encode_job
from distributor_node.shared.observability.metrics import JOB_QUEUE_ERRORS
from distributor_node.shared.waiting import Backoff, cancel_and_wait

logger = structlog.get_logger()

# aiormq closes a connection after three missed heartbeats, the broker after two.
HEARTBEAT_SECONDS = 5
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 3.0

BROKER_ERRORS: tuple[type[Exception], ...] = (*CONNECTION_EXCEPTIONS, AMQPError, TimeoutError)


class Session:
    """One connection with one channel, from open to lost."""

    def __init__(self, connection: Connection, channel: AbstractChannel, amqp: AmqpChannel) -> None:
        """`amqp`: the channel of aiormq below `channel`. Messages are published, consumed and acknowledged on it:
        aio-pika copies each one into an object of its own, and runs one more task for each that it delivers.
        """
        self.connection = connection
        self.channel = channel
        self.amqp = amqp
        self.lost = asyncio.Event()  # connection or channel closed, or the consumer cancelled by the broker
        self.reason = ""  # why it was lost

    def mark_lost(self, reason: str) -> None:
        """Mark the session as unusable. The first reason is kept."""
        if not self.lost.is_set():
            self.reason = reason
            self.lost.set()

    def is_blocked(self) -> bool:
        """Return whether the broker has blocked publishing on this connection (memory or disk alarm)."""
        ready = self.amqp.connection.ready()
        try:
            ready.send(None)  # it ends here unless it waits for the broker
        except StopIteration:
            return False
        finally:
            ready.close()
        return True

    def watch(self) -> None:
        """Register callbacks that mark the session lost, whichever way it ends."""

        def connection_closed(_: object, error: BaseException | None = None) -> None:
            self.mark_lost(f"connection closed: {error!r}")

        def channel_closed(_: object, error: BaseException | None = None) -> None:
            self.mark_lost(f"channel closed: {error!r}")

        def consumer_cancelled(_: object) -> None:
            self.mark_lost("consumer cancelled by the broker")

        self.connection.close_callbacks.add(connection_closed)
        self.channel.close_callbacks.add(channel_closed)
        self.amqp.on_consumer_cancel_callbacks.add(consumer_cancelled)


@asynccontextmanager
async def open_session(url: str, name: str, *, confirms: bool) -> AsyncGenerator[Session]:
    """Connect and open a channel within CONNECT_SECONDS, and close within CLOSE_SECONDS. Raises BROKER_ERRORS.

    The broker's management tools show `name`.
    """
    connection = Connection(
        make_url(url, heartbeat=HEARTBEAT_SECONDS), client_properties={"connection_name": name}
    )
    connection.kwargs["transport_factory"] = ReadableFramesTransport()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await connection.connect()
            channel = connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
            await channel.initialize()
            session = Session(connection, channel, await channel.get_underlay_channel())
            session.watch()
        yield session
    finally:
        await _close(connection)


async def _close(connection: Connection) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()
    except BROKER_ERRORS as error:
        logger.info("broker_close_failed", error=repr(error))


# The properties of a message may be such as the broker passes on and pamqp does not read: a short string that is not
# UTF-8, a time after the year 9999, a thousand tables in one another. The error would end the connection, and the
# broker would deliver the message to the next one, for ever.

UNREADABLE_HEADER = "x-distributor-unreadable"
PROPERTIES_HEADER = "x-distributor-properties"

_FRAME_HEAD = struct.Struct(">BHI")  # type, channel, length of the payload, which one more byte follows
_CONTENT_HEAD = struct.Struct(">HHQ")  # class, weight, length of the body; the properties follow
_DELIVER = struct.pack(">HH", 60, 60)
_MAX_PROPERTIES_TEXT = 1000


class ReadableFramesTransport(TransportFactory):
    """Connects as aiormq does, and reads frames through ReadableFrames."""

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connects = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, writer = await connects.create(url, **kwargs)
        return ReadableFrames(reader), writer


class ReadableFrames(asyncio.StreamReader):
    """Frames of the broker. In place of properties that pamqp does not read stand some that say so."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        super().__init__()
        self._stream = stream
        self._frame = b""  # the one that is being read
        self._position = 0  # up to where

    def at_eof(self) -> bool:
        return self._position == len(self._frame) and self._stream.at_eof()

    async def readexactly(self, n: int) -> bytes:
        """Return the next `n` bytes of the same frame. Raises IncompleteReadError at the end of the stream."""
        if self._position == len(self._frame):
            self._frame = await self._next()
            self._position = 0
        begin, self._position = self._position, self._position + n
        return self._frame[begin : self._position]

    async def _next(self) -> bytes:
        head = await self._stream.readexactly(_FRAME_HEAD.size)
        if head.startswith(constants.AMQP):  # the broker speaks another version; aiormq says so
            return head
        kind, _, length = _FRAME_HEAD.unpack(head)
        frame = head + await self._stream.readexactly(length + 1)
        if kind == constants.FRAME_HEADER or frame.startswith(_DELIVER, _FRAME_HEAD.size):
            return to_readable(frame)
        return frame


def to_readable(frame: bytes) -> bytes:
    """Return the frame as it came, or what says instead why pamqp does not read it."""
    try:
        pamqp.frame.unmarshal(frame)
    except Exception as error:  # noqa: BLE001  of a nested table a RecursionError, of a time an OverflowError
        kind, channel, _ = _FRAME_HEAD.unpack_from(frame)
        payload = frame[_FRAME_HEAD.size : -1]
        if kind == constants.FRAME_HEADER and len(payload) > _CONTENT_HEAD.size:
            return pamqp.frame.marshal(_unreadable(payload, error), channel)
        if kind == constants.FRAME_METHOD and len(payload) > len(_DELIVER):
            return _without_names(frame)
    return frame


def _unreadable(payload: bytes, error: Exception) -> ContentHeader:
    _, _, body_size = _CONTENT_HEAD.unpack_from(payload)
    given = repr(payload[_CONTENT_HEAD.size :][:_MAX_PROPERTIES_TEXT])[2:-1]
    properties = Basic.Properties(
        headers={UNREADABLE_HEADER: str(error)[:_MAX_TEXT], PROPERTIES_HEADER: given[:_MAX_PROPERTIES_TEXT]}
    )
    return ContentHeader(body_size=body_size, properties=properties)


def _without_names(frame: bytes) -> bytes:
    """A delivery without the names of its exchange and its routing key, which tell the node nothing."""
    tag_at = _FRAME_HEAD.size + len(_DELIVER)
    names_at = tag_at + 1 + frame[tag_at] + 8 + 1  # after the consumer tag, the delivery tag and the flag
    payload = frame[_FRAME_HEAD.size : names_at] + b"\0\0"
    kind, channel, _ = _FRAME_HEAD.unpack_from(frame)
    return _FRAME_HEAD.pack(kind, channel, len(payload)) + payload + constants.FRAME_END_CHAR


HIGH, LOW = 1, 0

_MAX_DEAD_LETTERS = 10_000


@dataclass(frozen=True, slots=True)
class Topology:
    """The names and arguments of all queues."""

    prefix: str  # of every queue name
    plan: RetryPlan
    consumer_timeout_ms: int | None = None
    """How long a job may stay unacknowledged. RabbitMQ before 3.12 ignores it and uses `consumer_timeout` of
    rabbitmq.conf, 30 minutes by default."""

    @property
    def work(self) -> str:
        return f"{self.prefix}.jobs"

    @property
    def dead(self) -> str:
        return f"{self.prefix}.dead"

    @property
    def delays(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.delay(seconds) for seconds in self.plan.delays))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.work, *self.delays, self.dead)

    def delay(self, seconds: float) -> str:
        """Return the name of the queue for one delay.

        The delay is part of the name, so that another retry plan declares other queues without a conflict.
        """
        return f"{self.prefix}.delay.{_milliseconds(seconds)}ms"

    def queues(self) -> dict[str, Arguments]:
        """Return the arguments of each queue by name."""
        work: dict[str, int | str] = {"x-queue-type": "classic", "x-max-priority": HIGH}
        if self.consumer_timeout_ms is not None:
            work["x-consumer-timeout"] = self.consumer_timeout_ms
        declared: dict[str, Arguments] = {self.work: {**work}}
        for seconds in self.plan.delays:
            declared[self.delay(seconds)] = {
                "x-queue-type": "classic",
                "x-message-ttl": _milliseconds(seconds),
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": self.work,
            }
        declared[self.dead] = {"x-queue-type": "classic", "x-max-length": _MAX_DEAD_LETTERS}
        return declared

    async def declare(self, channel: AbstractChannel) -> None:
        """Declare all queues. If one exists with other arguments: ConfigurationError, and the channel is closed."""
        for name, arguments in self.queues().items():
            try:
                await channel.declare_queue(name, durable=True, arguments=arguments)
            except ChannelPreconditionFailed as error:
                raise ConfigurationError(
                    f"queue {name!r} exists on the broker with arguments that differ from these settings "
                    f"({' '.join(map(str, error.args))}): delete it when it is empty (rabbitmqctl delete_queue {name}),"
                    " restore the previous setting, or choose another queue prefix"
                ) from error


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


# Jobs as messages: the body is JSON. Attempt, request id and reason are in our own headers, the trace is in W3C's.

ATTEMPT_HEADER = "x-distributor-attempt"
REQUEST_ID_HEADER = "x-distributor-request-id"
REASON_HEADER = "x-distributor-reason"
OMITTED_HEADER = "x-distributor-omitted-headers"
TRACE_HEADER = "traceparent"

_MAX_TEXT = 200
_MAX_HEADERS = 2500  # bytes: properties are one frame, and no broker refuses one of 4096 bytes
_MAX_ATTEMPT = 1_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """What is published: a body and its properties."""

    body: bytes
    properties: Basic.Properties


def to_message(job: FetchJob) -> Message:
    """Encode a job as a persistent message."""
    headers: FieldTable = {ATTEMPT_HEADER: job.attempt, REQUEST_ID_HEADER: job.request_id}
    if job.trace:
        headers[TRACE_HEADER] = job.trace
    properties = Basic.Properties(
        content_type="application/json",
        headers=headers,
        delivery_mode=DeliveryMode.PERSISTENT,
        priority=LOW if job.low_priority else HIGH,
        correlation_id=job.request_id[:_MAX_TEXT] or None,
        message_id=_new_message_id(),
    )
    return Message(encode_job(job), properties)


def to_job(message: DeliveredMessage) -> FetchJob:
    """Decode a message. Raises InvalidJob, with the reason."""
    headers = message.header.properties.headers or {}
    if UNREADABLE_HEADER in headers:
        raise InvalidJob(f"properties cannot be read: {headers[UNREADABLE_HEADER]!s}")
    attempt = headers.get(ATTEMPT_HEADER, 1)
    if not isinstance(attempt, int) or isinstance(attempt, bool) or not 0 < attempt <= _MAX_ATTEMPT:
        raise InvalidJob(
            f"{ATTEMPT_HEADER}: expected an integer from 1 to {_MAX_ATTEMPT}, got {str(attempt)[:40]!r}"
        )
    request_id = headers.get(REQUEST_ID_HEADER, "")
    if not isinstance(request_id, str):
        raise InvalidJob(f"{REQUEST_ID_HEADER}: expected a string, got {str(request_id)[:40]!r}")
    trace = headers.get(TRACE_HEADER)
    return decode_job(
        message.body,
        attempt=attempt,
        # A longer one would make the properties of the next attempt too long to be sent.
        request_id=request_id.encode()[:_MAX_TEXT].decode(errors="ignore"),
        trace=trace[:_MAX_TEXT] if isinstance(trace, str) else "",
    )


def to_dead_letter(message: DeliveredMessage, reason: str) -> Message:
    """Copy a message, body and headers included, and add the reason."""
    given = message.header.properties
    properties = Basic.Properties(
        content_type=given.content_type,
        headers={**_encodable_headers(given.headers or {}), REASON_HEADER: reason[:_MAX_TEXT]},
        delivery_mode=DeliveryMode.PERSISTENT,
        correlation_id=given.correlation_id,
        message_id=_new_message_id(),
    )
    return Message(message.body, properties)


def _encodable_headers(given: FieldTable) -> FieldTable:
    """Headers as they can be sent, and how many there is no room for."""
    headers: FieldTable = {}
    size = 0
    for name, value in given.items():
        encodable = _encodable(value)
        size += len(field_table({name: encodable}))
        if size > _MAX_HEADERS:
            return {**headers, OMITTED_HEADER: len(given) - len(headers)}
        headers[name] = encodable
    return headers


def _encodable(value: FieldValue) -> FieldValue:
    """A header as it can be sent; as text if pamqp reads it but does not write it, as a string that is not UTF-8.

    As text, too, if it is long.
    """
    try:
        if len(encode_table_value(value)) <= _MAX_HEADERS:
            return value
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error):
        pass
    try:
        return repr(value)[:_MAX_TEXT]
    except RecursionError:
        return "tables in too many tables"


def _new_message_id() -> str:
    return os.urandom(16).hex()


logger = structlog.get_logger()


class Publisher:
    """Keeps one session open in the background, from `open` to `close`.

    While the broker is known to be down or to refuse messages, `publish` fails at once, because a client waits for
    most jobs. Otherwise every call ends within `timeout` seconds.
    """

    def __init__(self, url: str, topology: Topology, timeout: float) -> None:
        self._url = url
        self._topology = topology
        self._timeout = timeout
        self._session: Session | None = None
        self._failure: str | None = None
        self._state_known = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._stay_connected(), name="job-publisher")

    async def close(self) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)
            self._task = None
        self._set_state(None, "job queue is closed")

    async def publish(self, queue: str, message: Message) -> None:
        """Publish and wait for the confirm. Raises JobQueueUnavailable."""
        try:
            await self._publish_within_timeout(queue, message)
        except JobQueueUnavailable:
            JOB_QUEUE_ERRORS.labels(operation="publish").inc()
            raise

    async def _publish_within_timeout(self, queue: str, message: Message) -> None:
        session: Session | None = None
        try:
            async with asyncio.timeout(self._timeout):
                session = await self._connected()
                await self._publish(session, queue, message)
        except TimeoutError as error:
            if session is not None and not session.is_blocked():
                session.mark_lost(f"no confirm within {self._timeout} s")
            raise JobQueueUnavailable(f"no confirm from the broker within {self._timeout} s") from error
        except BROKER_ERRORS as error:
            raise JobQueueUnavailable(f"publishing failed: {error!r}") from error
        except ConfigurationError as error:
            raise JobQueueUnavailable(str(error)) from error

    async def _connected(self) -> Session:
        await self._state_known.wait()
        if self._session is None:
            raise JobQueueUnavailable(self._failure or "not connected to the broker")
        if self._session.is_blocked():
            raise JobQueueUnavailable("broker has blocked publishing (memory or disk alarm)")
        return self._session

    async def _publish(self, session: Session, queue: str, message: Message) -> None:
        publish = partial(
            session.amqp.basic_publish,
            message.body,
            routing_key=queue,
            properties=message.properties,
            mandatory=True,
        )
        try:
            await publish()
        except PublishError:  # the broker has returned it: there is no such queue
            logger.warning("queue_redeclared", queue=queue)
            await self._topology.declare(session.channel)
            await publish()

    async def _stay_connected(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with open_session(self._url, "distributor publisher", confirms=True) as session:
                    await self._topology.declare(session.channel)
                    self._set_state(session, None)
                    backoff.reset()
                    await session.lost.wait()
                    self._clear_state()
                    logger.warning("publisher_connection_lost", why=session.reason)
            except Exception as error:  # noqa: BLE001  publishers report any error, and the loop goes on
                reason = (
                    str(error)
                    if isinstance(error, ConfigurationError)
                    else f"cannot connect to the broker: {error!r}"
                )
                if reason != self._failure:
                    logger.error("publisher_connect_failed", reason=reason)
                self._set_state(None, reason)
            await backoff.wait()

    def _set_state(self, session: Session | None, failure: str | None) -> None:
        self._session, self._failure = session, failure
        self._state_known.set()

    def _clear_state(self) -> None:
        self._session = None
        self._state_known.clear()
