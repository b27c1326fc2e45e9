"""The queues on the broker (names, arguments, declaration) and jobs as messages.

Classic queues are used, not quorum queues:
- One broker is the usual deployment. A durable classic queue with persistent, confirmed messages survives a restart.
- A quorum queue of RabbitMQ 4.x drops a message after 20 redeliveries, which a worker that is restarted often causes.
- Quorum queues have no priorities on RabbitMQ 3.10.
The queue type is declared explicitly, so that the default type of a virtual host has no effect. Losing a queue loses no
object: the next request publishes its job again.

Low-priority jobs are in the same queue, with `x-max-priority`. One consumer with one prefetch limit then takes them
only when nothing else waits. Consumers of two queues would split their slots in any case.

There is one queue per delay, because the broker checks the time to live only of the message at the head of a queue.
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


# Jobs as messages: the body is JSON. Attempt, request id and reason are in our own headers.

ATTEMPT_HEADER = "x-distributor-attempt"
REQUEST_ID_HEADER = "x-distributor-request-id"
REASON_HEADER = "x-distributor-reason"

_MAX_TEXT = 200
_MAX_ATTEMPT = 1_000_000


def to_message(job: FetchJob) -> Message:
    """Encode a job as a persistent message."""
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
    """Decode a message. Raises InvalidJob, with the reason."""
    attempt = message.headers.get(ATTEMPT_HEADER, 1)
    if not isinstance(attempt, int) or isinstance(attempt, bool) or not 0 < attempt <= _MAX_ATTEMPT:
        raise InvalidJob(
            f"{ATTEMPT_HEADER}: expected an integer from 1 to {_MAX_ATTEMPT}, got {str(attempt)[:40]!r}"
        )
    request_id = message.headers.get(REQUEST_ID_HEADER, "")
    if not isinstance(request_id, str):
        raise InvalidJob(f"{REQUEST_ID_HEADER}: expected a string, got {str(request_id)[:40]!r}")
    return decode_job(message.body, attempt=attempt, request_id=request_id)


def to_dead_letter(message: AbstractIncomingMessage, reason: str) -> Message:
    """Copy a message, body and headers included, and add the reason."""
    return Message(
        message.body,
        headers={**message.headers, REASON_HEADER: reason[:_MAX_TEXT]},
        content_type=message.content_type,
        delivery_mode=DeliveryMode.PERSISTENT,
        correlation_id=message.correlation_id,
        message_id=uuid.uuid4().hex,
    )
