"""Fetch jobs (messages that ask for one fetch), their encoding, their outcomes and the retry plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from distributor_node.shared.domain.errors import InvalidInput, InvalidJob
from distributor_node.shared.domain.objects import MediaObject, MediaObjectCodec, ObjectId
from distributor_node.shared.domain.peers import PeerUse

JOB_VERSION = 1

CLAIM_SECONDS = 10.0
"""Seconds that a claim has for publishing its job. After that, another claim can win."""


@dataclass(frozen=True, slots=True)
class FetchJob:
    """Asks for one object to be fetched. It is a hint: workers compare it with the catalog.

    They believe it where the catalog is out of reach and the claim of the job is live."""

    media_object: MediaObject
    request_id: str  # of the HTTP request that caused the job
    published_at: float  # POSIX seconds
    attempt: int = 1
    claim: int = 0  # serial of the claim that the job was published for; 0 in messages of older versions
    low_priority: bool = False  # a warming job: waits behind the jobs that clients wait for
    revalidates: float | None = None
    """Do not fetch, but ask the origin whether the stored object is still current: the one that was last checked at
    this POSIX time (0: unknown)."""
    trace: str = ""
    """Traceparent of the span that published the job (W3C Trace Context, section 3.2); empty: there is none."""
    for_peer: bool = False  # another node of the fleet asked: no third node is asked to fetch the object
    copy: bool = False  # a second copy of what a peer has: no source is asked

    @property
    def object_id(self) -> ObjectId:
        return self.media_object.object_id

    @property
    def peer_use(self) -> PeerUse:
        """What the fetch asks of peers."""
        if self.copy:
            return PeerUse.COPY
        return PeerUse.CACHED if self.for_peer else PeerUse.FETCH

    def next_attempt(self) -> FetchJob:
        return replace(self, attempt=self.attempt + 1)


_OBJECT_FIELDS = MediaObjectCodec(
    {
        "object_id": "object_id",
        "size": "size",
        "content_hash": "hash",
        "media_type": "media_type",
        "etag": "validator",
        "sources": "sources",
        "last_modified": "last_modified",
        "name": "name",
    }
)


def encode_job(job: FetchJob) -> bytes:
    """Return the message body, UTF-8 JSON. Attempt, request id and trace are in message headers instead."""
    return json.dumps(
        {
            "version": JOB_VERSION,
            **_OBJECT_FIELDS.encode(job.media_object),
            "published_at": job.published_at,
            "low_priority": job.low_priority,
            **({"claim": job.claim} if job.claim else {}),
            **({"for_peer": True} if job.for_peer else {}),
            **({"copy": True} if job.copy else {}),
            **({} if job.revalidates is None else {"revalidates": job.revalidates}),
        }
    ).encode()


def decode_job(body: bytes, *, attempt: int, request_id: str, trace: str = "") -> FetchJob:
    """Read a message body. Raises InvalidJob, with the reason, for any body that `encode_job` cannot write."""
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise InvalidJob(f"body: expected a JSON object, got {repr(fields)[:40]}")
        if fields.get("version") != JOB_VERSION:
            raise InvalidJob(f"version: expected {JOB_VERSION}, got {repr(fields.get('version'))[:20]}")
        media_object = _OBJECT_FIELDS.decode(fields)
        if media_object.size is None and media_object.content_hash is not None:
            raise InvalidJob("size: expected an integer for an object with a content hash, got None")
        published_at = fields.get("published_at")
        if not isinstance(published_at, int | float) or isinstance(published_at, bool):
            raise InvalidJob(f"published_at: expected POSIX seconds, got {repr(published_at)[:40]}")
        claim = fields.get("claim", 0)
        if not isinstance(claim, int) or isinstance(claim, bool):
            raise InvalidJob(f"claim: expected an integer, got {repr(claim)[:40]}")
        revalidates = fields.get("revalidates")
        if not isinstance(revalidates, int | float | None) or isinstance(revalidates, bool):
            raise InvalidJob(f"revalidates: expected POSIX seconds, got {repr(revalidates)[:40]}")
        return FetchJob(
            media_object,
            request_id=request_id,
            published_at=float(published_at),
            attempt=attempt,
            claim=claim,
            low_priority=bool(fields.get("low_priority", False)),
            for_peer=bool(fields.get("for_peer", False)),
            copy=bool(fields.get("copy", False)),
            revalidates=None if revalidates is None else float(revalidates),
            trace=trace,
        )
    except InvalidJob:
        raise
    except InvalidInput as error:
        raise InvalidJob(str(error)) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise InvalidJob(f"body: expected JSON, got {type(error).__name__}") from error


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
