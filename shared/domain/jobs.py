"""Jobs (the messages that ask for one fetch) and what the end of a job means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distributor_node.shared.domain.errors import InvalidInput, InvalidJob
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId

JOB_VERSION = 1

CLAIM_SECONDS = 10.0
"""How long whoever wants a fetch has to publish its job, before another may."""


@dataclass(frozen=True, slots=True)
class FetchJob:
    """Ask for one object to be fetched. It carries all a worker needs, so that no worker depends on the catalog.

    `attempt` counts from 1; `request_id` is that of the HTTP request behind it; `published_at` is POSIX seconds.
    `low_priority` jobs (warming) wait behind those that a client waits for.
    """

    media_object: MediaObject
    request_id: str
    published_at: float
    attempt: int = 1
    low_priority: bool = False

    @property
    def object_id(self) -> ObjectId:
        return self.media_object.object_id

    def next_attempt(self) -> FetchJob:
        return replace(self, attempt=self.attempt + 1)


def encode_job(job: FetchJob) -> bytes:
    """The message body, UTF-8 JSON. Attempt and request id travel in headers, not here."""
    wanted = job.media_object
    return json.dumps(
        {
            "version": JOB_VERSION,
            "object_id": wanted.object_id,
            "size": wanted.size,
            "hash": str(wanted.content_hash) if wanted.content_hash else None,
            "media_type": wanted.media_type,
            "validator": wanted.validator,
            "sources": list(wanted.sources),
            "published_at": job.published_at,
            "low_priority": job.low_priority,
        }
    ).encode()


def decode_job(body: bytes, *, attempt: int, request_id: str) -> FetchJob:
    """Read a message body; raise InvalidJob, with the reason, for anything that `encode_job` could not have made."""
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise InvalidJob("not a JSON object")
        if fields.get("version") != JOB_VERSION:
            raise InvalidJob(f"unknown job version {str(fields.get('version'))[:20]}")
        return FetchJob(
            media_object=_decode_object(fields),
            request_id=request_id,
            published_at=float(_typed(fields, "published_at", (int, float))),
            attempt=attempt,
            low_priority=bool(fields.get("low_priority", False)),
        )
    except InvalidJob:
        raise
    except InvalidInput as error:
        raise InvalidJob(str(error)) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise InvalidJob(f"not readable as JSON: {type(error).__name__}") from error


def _decode_object(fields: Mapping[str, Any]) -> MediaObject:
    size = _typed(fields, "size", (int,))
    content_hash = _typed(fields, "hash", (str, type(None)))
    sources: Sequence[object] = _typed(fields, "sources", (list,))
    if not all(isinstance(url, str) and url.startswith(("http://", "https://")) for url in sources):
        raise InvalidJob("sources: want http(s) URLs")
    return MediaObject(
        object_id=ObjectId.parse(_typed(fields, "object_id", (str,))),
        size=size,
        content_hash=ContentHash.parse(content_hash) if content_hash is not None else None,
        media_type=_typed(fields, "media_type", (str, type(None))),
        sources=tuple(str(url) for url in sources),
        validator=_typed(fields, "validator", (str, type(None))),
    )


def _typed(fields: Mapping[str, Any], name: str, types: tuple[type, ...]) -> Any:
    value = fields.get(name)
    if not isinstance(value, types) or isinstance(value, bool):
        raise InvalidJob(f"{name}: missing or of the wrong type")
    return value


# Outcomes: what the handler of a job tells the queue to do with the message.


@dataclass(frozen=True, slots=True)
class Ack:
    """The object is cached, or there is nothing to do: acknowledge the message."""

    detail: str = "fetched"
    """What was done, as a label of metrics: one of a few words."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt failed, and a later one may succeed: publish the next attempt to the delay queue of this one."""

    reason: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """Another worker fetches the object: publish the same attempt to the first delay queue.

    The job is kept because the other worker may fail without a message of its own.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """No attempt can succeed: move the message to the dead-letter queue, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Nack:
    """The worker is shutting down: return the message to its queue unchanged."""


JobOutcome = Ack | Retry | Requeue | DeadLetter | Nack


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """How often a job is tried, and how long it waits between two attempts."""

    delays: tuple[float, ...] = (5.0, 30.0, 120.0, 600.0)
    """Seconds before the second, third, … attempt. There is one attempt more than there are delays."""

    def next_delay(self, attempt: int) -> float | None:
        """Return the seconds to wait after the given attempt (from 1) failed; None after the last attempt."""
        return self.delays[attempt - 1] if 0 < attempt <= len(self.delays) else None

    def resolve(self, outcome: JobOutcome, attempt: int) -> JobOutcome:
        """Return the outcome that the queue carries out: a delay exists for every Retry and Requeue returned.

        Retry becomes DeadLetter after the last attempt. Requeue becomes Ack where the plan has no delays at all.
        """
        match outcome:
            case Retry(reason) if self.next_delay(attempt) is None:
                return DeadLetter(reason)
            case Requeue() if not self.delays:
                return Ack("dropped")
        return outcome
