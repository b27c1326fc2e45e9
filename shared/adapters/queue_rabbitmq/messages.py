"""Jobs as messages: the body is JSON; attempt, request id and reason travel in headers of our own."""

from __future__ import annotations

import uuid

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractIncomingMessage

from shared.adapters.queue_rabbitmq.topology import HIGH, LOW
from shared.domain.errors import InvalidJob
from shared.domain.jobs import FetchJob, decode_job, encode_job

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
