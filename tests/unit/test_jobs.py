"""Jobs: outcomes against the retry plan, and the bytes of jobs and catalog answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distributor_node.shared.adapters.state_common import read_description, write_description
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Validators
from distributor_node.shared.domain.errors import InvalidInput, InvalidJob
from distributor_node.shared.domain.jobs import (
    Ack,
    DeadLetter,
    FetchJob,
    JobOutcome,
    Nack,
    Requeue,
    Retry,
    RetryPlan,
    decode_job,
    encode_job,
)
from distributor_node.shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId

PLAN = RetryPlan((5.0, 30.0))


@pytest.mark.parametrize(
    ("outcome", "attempt", "resolved"),
    [
        (Ack("already_cached"), 1, Ack("already_cached")),
        (Retry("no space"), 1, Retry("no space")),
        (Retry("no space"), 2, Retry("no space")),
        (Retry("no space"), 3, DeadLetter("no space")),
        (Retry("no space"), 1_000_000, DeadLetter("no space")),
        (Requeue("fetched by another worker"), 3, Requeue("fetched by another worker")),
        (DeadLetter("too large"), 1, DeadLetter("too large")),
        (Nack(), 3, Nack()),
    ],
)
def test_a_retry_of_the_last_attempt_becomes_a_dead_letter(
    outcome: JobOutcome, attempt: int, resolved: JobOutcome
) -> None:
    assert PLAN.resolve(outcome, attempt) == resolved
    assert PLAN.resolve(resolved, attempt) == resolved


def test_a_plan_without_delays_retries_and_requeues_nothing() -> None:
    plan = RetryPlan(())
    assert plan.resolve(Retry("no space"), 1) == DeadLetter("no space")
    assert isinstance(plan.resolve(Requeue("fetched by another worker"), 1), Ack)


# Bytes that are in queues and in Redis while nodes are updated: they must not change within version 1.

FULL = MediaObject(
    ObjectId("1"),
    2**53 + 1,
    ContentHash("blake3", bytes(range(32))),
    "text/vtt",
    sources=("https://one.example/api/v1/files/1", "http://two.example/1"),
    validators=Validators('W/"v1"', 784111777),
)
LISTED = replace(
    FULL, buckets=(DistributionBucket("0:1", frozenset({4, 3})), DistributionBucket("0:2")), accepted=False
)
FULL_JOB = (
    b'{"version": 1, "object_id": "1", "size": 9007199254740993, '
    b'"hash": "gVwfgAcvNjFe1YPYJrkQ6ocqJkt983ic4uoSL4pL9cQDZg", "media_type": "text/vtt", '
    b'"validator": "W/\\"v1\\"", '
    b'"sources": ["https://one.example/api/v1/files/1", "http://two.example/1"], "last_modified": 784111777, '
    b'"published_at": 1.5, "low_priority": true}'
)
FULL_ANSWER = (
    b'{"v":1,"exists":true,"id":"1","size":9007199254740993,'
    b'"hash":"gVwfgAcvNjFe1YPYJrkQ6ocqJkt983ic4uoSL4pL9cQDZg","type":"text/vtt",'
    b'"buckets":[["0:1",[3,4]],["0:2",[]]],"accepted":false,'
    b'"sources":["https://one.example/api/v1/files/1","http://two.example/1"],'
    b'"validator":"W/\\"v1\\"","last_modified":784111777}'
)


@pytest.mark.parametrize(
    ("job", "body"),
    [
        (FetchJob(FULL, "", 1.5, low_priority=True), FULL_JOB),
        (
            FetchJob(MediaObject(ObjectId("a"), 0), "", 1700000000.25),
            (
                b'{"version": 1, "object_id": "a", "size": 0, "hash": null, "media_type": null, "validator": null, '
                b'"sources": [], "published_at": 1700000000.25, "low_priority": false}'
            ),
        ),
    ],
    ids=["full", "bare"],
)
def test_the_bytes_of_a_job(job: FetchJob, body: bytes) -> None:
    assert encode_job(job) == body
    assert decode_job(body, attempt=1, request_id="") == job


def test_a_job_that_revalidates_says_which_object_it_has_seen() -> None:
    job = FetchJob(LISTED, "", 1.5, revalidates=1_700_000_000.125)
    decoded = decode_job(encode_job(job), attempt=1, request_id="")
    assert decoded.revalidates == 1_700_000_000.125
    body = encode_job(job).replace(b"1700000000.125", b'"now"')
    with pytest.raises(InvalidJob, match="revalidates: expected POSIX seconds"):
        decode_job(body, attempt=1, request_id="")


@pytest.mark.parametrize(
    ("written", "validators"),
    [
        (b'"\\"v1\\""', Validators('"v1"')),
        (b'"Sun, 06 Nov 1994 08:49:37 GMT"', Validators(None, 784111777)),
        (b'"what they call it"', NO_VALIDATORS),
        (b"null", NO_VALIDATORS),
    ],
)
def test_a_job_of_a_release_with_one_validator_is_read(written: bytes, validators: Validators) -> None:
    body = (
        b'{"version": 1, "object_id": "1", "size": 5, "hash": null, "media_type": null, "validator": %b, '
        b'"sources": ["http://two.example/1"], "published_at": 1.5, "low_priority": false}' % written
    )
    assert decode_job(body, attempt=1, request_id="").media_object.validators == validators


def test_a_job_for_a_second_copy_is_one_of_a_peer_to_a_release_without_copies() -> None:
    """Which then asks no third node to fetch the object."""
    job = FetchJob(LISTED, "", 1.5, low_priority=True, for_peer=True, copy=True)
    decoded = decode_job(encode_job(job), attempt=1, request_id="")
    assert (decoded.copy, decoded.for_peer) == (True, True)
    assert not decode_job(FULL_JOB, attempt=1, request_id="").copy


def test_a_job_carries_neither_buckets_nor_acceptance() -> None:
    body = encode_job(FetchJob(LISTED, "", 1.5, low_priority=True))
    assert body == FULL_JOB
    assert decode_job(body, attempt=2, request_id="r").media_object == FULL


@pytest.mark.parametrize(
    ("answer", "packed"),
    [
        (LISTED, FULL_ANSWER),
        (
            MediaObject(ObjectId("1"), None),
            (
                b'{"v":1,"exists":true,"id":"1","size":null,"hash":null,"type":null,"buckets":[],"accepted":true,'
                b'"sources":[],"validator":null}'
            ),
        ),
        (None, b'{"v": 1, "exists": false}'),
    ],
    ids=["full", "bare", "absent"],
)
def test_the_bytes_of_a_catalog_answer(answer: MediaObject | None, packed: bytes) -> None:
    assert write_description(answer) == packed
    assert read_description(packed) == answer


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"version": 1', b'"version": 2', "version: expected 1, got 2"),
        (b'"object_id": "1"', b'"object_id": 1', "object_id: expected a string, got 1"),
        (b'"size": 9007199254740993', b'"size": true', "size: expected an integer or null, got True"),
        (
            b'"size": 9007199254740993',
            b'"size": null',
            "size: expected an integer for an object with",
        ),
        (b'"size": 9007199254740993', b'"size": -1', "size: expected 0 or more, got -1"),
        (b'"text/vtt"', b"[]", r"media_type: expected a string or null, got \[\]"),
        (b"http://two", b"file://two", r"sources: expected a list of http\(s\) URLs, got \['https"),
        (b'"published_at": 1.5', b'"published_at": "now"', "published_at: expected POSIX seconds, got 'now'"),
        (b'{"version"', b'["version"', "body: expected JSON, got JSONDecodeError"),
    ],
)
def test_an_invalid_job_names_field_expected_and_got(old: bytes, new: bytes, message: str) -> None:
    assert old in FULL_JOB
    with pytest.raises(InvalidJob, match=message):
        decode_job(FULL_JOB.replace(old, new), attempt=1, request_id="")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"v":1', b'"v":2', "v: expected 1, got 2"),
        (b'"exists":true,', b"", "exists"),
        (b'"buckets":[["0:1",[3,4]],["0:2",[]]],', b"", "buckets: expected a list of .*, got None"),
        (b'"accepted":false', b'"accepted":0', "accepted: expected a boolean, got 0"),
        (b'{"v"', b'["v"', "catalog answer: expected a JSON object"),
    ],
)
def test_an_invalid_catalog_answer_is_rejected(old: bytes, new: bytes, message: str) -> None:
    assert old in FULL_ANSWER
    with pytest.raises(InvalidInput, match=message):
        read_description(FULL_ANSWER.replace(old, new))


def test_the_serial_of_the_claim_travels_with_the_job() -> None:
    job = FetchJob(LISTED, "", 1.5, claim=1_764_000_000_123)
    assert decode_job(encode_job(job), attempt=1, request_id="").claim == 1_764_000_000_123


def test_the_name_of_an_object_travels_with_job_and_answer() -> None:
    named = MediaObject(ObjectId("1"), 5, sources=("http://a.example/1",), name="Sunrise ☀")
    job = FetchJob(named, "r", 1.0)
    assert decode_job(encode_job(job), attempt=1, request_id="r").media_object == named
    assert read_description(write_description(named)) == named
