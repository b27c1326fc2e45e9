"""The queues on the broker: their names, arguments and declaration.

Classic queues, not quorum ones. One broker is the usual deployment, where a durable classic queue with persistent,
confirmed messages survives a restart as well; a quorum queue of 4.x drops a message after 20 redeliveries, which a
worker that is restarted often makes in good faith; and quorum queues know no priority on 3.10. The type is named, so
that a virtual host whose default is another one changes nothing. A lost queue loses no object: the next request asks
again.

Low-priority jobs are in the same queue with `x-max-priority`, not in a second queue: one consumer with one prefetch
limit then takes them only when nothing else waits, while two consumers would share out their slots whatever waits.

Delays: a message's time to live is looked at only at the head of a queue, hence one queue per delay.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import ChannelPreconditionFailed
from pamqp.common import Arguments

from distributor_node.shared.domain.errors import ConfigurationError, InvalidJob
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan, decode_job, encode_job

HIGH, LOW = 1, 0

_MAX_DEAD_LETTERS = 10_000


@dataclass(frozen=True, slots=True)
class Topology:
    """Names begin with `prefix`. `consumer_timeout_ms`: how long a job may stay unacknowledged, for RabbitMQ 3.12 and
    later; older brokers ignore the argument and obey `consumer_timeout` in rabbitmq.conf (30 minutes by default)."""

    prefix: str
    plan: RetryPlan
    consumer_timeout_ms: int | None = None

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
        """The queue of one delay. Its name holds the delay: another retry plan makes other queues, no conflict."""
        return f"{self.prefix}.delay.{_milliseconds(seconds)}ms"

    def queues(self) -> dict[str, Arguments]:
        """Arguments by name."""
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
        """Declare all queues. ConfigurationError when one exists with other arguments (the channel is closed then)."""
        for name, arguments in self.queues().items():
            try:
                await channel.declare_queue(name, durable=True, arguments=arguments)
            except ChannelPreconditionFailed as error:
                raise ConfigurationError(
                    f"queue {name!r} exists on the broker with other arguments than these settings ask for "
                    f"({' '.join(map(str, error.args))}): delete it when it is empty (rabbitmqctl delete_queue {name}),"
                    " restore the former setting, or choose another queue prefix"
                ) from error


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


# Jobs as messages: the body is JSON; attempt, request id and reason travel in headers of our own.

ATTEMPT_HEADER = "x-distributor-attempt"
REQUEST_ID_HEADER = "x-distributor-request-id"
REASON_HEADER = "x-distributor-reason"

_MAX_TEXT = 200
_MAX_ATTEMPT = 1_000_000


def to_message(job: FetchJob) -> Message:
    return Message(
        encode_job(job),
        headers={ATTEMPT_HEADER: job.attempt, REQUEST_ID_HEADER: job.request_id},
        content_type="application/json",
        delivery_mode=DeliveryMode.PERSISTENT,
        priority=LOW if job.low_priority else HIGH,
        correlation_id=job.request_id[:_MAX_TEXT] or None,
        message_id=uuid.uuid4().hex,
    )


def to_job(message: AbstractIncomingMessage) -> FetchJob:
    """Raise InvalidJob, with the reason, for what is no job."""
    attempt = message.headers.get(ATTEMPT_HEADER, 1)
    if not isinstance(attempt, int) or isinstance(attempt, bool) or not 0 < attempt <= _MAX_ATTEMPT:
        raise InvalidJob(f"{ATTEMPT_HEADER}: not a number from 1 up")
    request_id = message.headers.get(REQUEST_ID_HEADER, "")
    if not isinstance(request_id, str):
        raise InvalidJob(f"{REQUEST_ID_HEADER}: not a text")
    return decode_job(message.body, attempt=attempt, request_id=request_id)


def to_dead_letter(message: AbstractIncomingMessage, reason: str) -> Message:
    """The message as it came, body and headers kept, with the reason."""
    return Message(
        message.body,
        headers={**message.headers, REASON_HEADER: reason[:_MAX_TEXT]},
        content_type=message.content_type,
        delivery_mode=DeliveryMode.PERSISTENT,
        correlation_id=message.correlation_id,
        message_id=uuid.uuid4().hex,
    )
