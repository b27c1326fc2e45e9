"""Records, jobs and catalog answers from outside: whatever is decoded can be sent as headers, or is a named error."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

from distributor_node.services.api.assets.decision import Representation, Span
from distributor_node.services.api.headers import (
    HIT,
    MISS,
    PENDING,
    CacheOutcome,
    PrebuiltHeaders,
    as_block,
    content_head,
    not_modified_headers,
)
from distributor_node.shared.adapters.catalogs.joystream.answers import read_object
from distributor_node.shared.adapters.state_common import read_description, write_description
from distributor_node.shared.adapters.volume.records import decode_record, encode_record
from distributor_node.shared.domain.conditionals import Validators
from distributor_node.shared.domain.errors import CatalogUnavailable, InvalidInput, InvalidJob
from distributor_node.shared.domain.jobs import FetchJob, decode_job, encode_job
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId, StoredRecord
from distributor_node.shared.observability.logging import configure_logging

HASH = ContentHash("blake3", bytes(32))
RECORD = StoredRecord(ObjectId("7"), 5, None, None, "image/png", 1_700_000_000).with_validators(
    Validators('"v1"', 784111777)
)
OBJECT = MediaObject(
    ObjectId("7"),
    5,
    media_type="image/png",
    sources=("http://one/7",),
    validators=Validators('"v1"', 784111777),
)
SURROGATE = "\ud800"

# JSON as another program may have written it: any number, and text with lone surrogates
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**11, 10**18)
    | st.integers(-(10**18), -(10**10))
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(categories=["Cs", "Cc", "Ll"]), max_size=9)
    | st.sampled_from(
        [str(HASH), "sha256:" + "0" * 64, '"v1"', 'W/"é"', "image/png", "text/plain; a=é", "a/b\r\nX: y"]
    )
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


def mutations(valid: bytes) -> st.SearchStrategy[bytes]:
    """The valid body with some fields replaced, left out or added, or no such body at all."""
    fields: dict[str, Any] = json.loads(valid)
    changes = st.dictionaries(st.sampled_from(sorted(fields)), VALUES, max_size=3)
    missing = st.sets(st.sampled_from(sorted(fields)), max_size=1)
    changed = st.builds(
        lambda new, out: {key: value for key, value in {**fields, **new}.items() if key not in out},
        changes,
        missing,
    )
    return changed.map(lambda document: json.dumps(document).encode()) | st.binary(max_size=40)


def changed(valid: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(valid), **fields}).encode()


def send(representation: Representation, outcome: CacheOutcome) -> None:
    """Write every header that a response with the object has."""
    size = representation.size
    heads: list[Mapping[str, str]] = [not_modified_headers(representation, outcome)]
    for partial in (False, True):
        last = None if size is None else size - 1
        span = Span(0, last, size, partial=partial and bool(size))
        heads.append(content_head(representation, outcome, span, "local").headers)
    for head in heads:
        for name, value in head.items():
            assert value.isascii(), (name, value)
            assert value.isprintable(), (name, value)
        as_block(head)
    if size:
        PrebuiltHeaders.build(representation)


@given(mutations(encode_record(RECORD)))
@example(changed(encode_record(RECORD), stored_at=10**15))
@example(changed(encode_record(RECORD), last_modified=10**15))
@example(changed(encode_record(RECORD), stored_at=-(10**12)))
@example(changed(encode_record(RECORD), media_type="text/pläin"))
@example(changed(encode_record(RECORD), hash=SURROGATE))
@example(changed(encode_record(RECORD), hash=False))
@example(changed(encode_record(RECORD), size=10**30))
def test_a_record_can_be_sent_or_is_invalid(body: bytes) -> None:
    try:
        record = decode_record(body)
    except InvalidInput:
        return
    send(Representation.from_record(record, complete=True), HIT)
    send(Representation.from_record(record, complete=False), PENDING)


@given(mutations(encode_job(FetchJob(OBJECT, "r", 1.5, claim=3))))
@example(changed(encode_job(FetchJob(OBJECT, "r", 1.5)), media_type="a/b\r\nX: y"))
@example(changed(encode_job(FetchJob(OBJECT, "r", 1.5)), last_modified=10**15))
@example(changed(encode_job(FetchJob(OBJECT, "r", 1.5)), size=10**4200))
def test_a_job_can_be_sent_or_is_invalid(body: bytes) -> None:
    try:
        job = decode_job(body, attempt=1, request_id="r")
    except InvalidJob:
        return
    send(Representation.from_object(job.media_object), MISS)
    assert decode_job(encode_job(job), attempt=1, request_id="r") == job


@given(mutations(write_description(OBJECT)))
@example(changed(write_description(OBJECT), type="text/pläin"))
@example(changed(write_description(OBJECT), hash=SURROGATE))
@example(changed(write_description(OBJECT), last_modified=10**15))
@example(b"[" * 100_000)
def test_a_catalog_answer_can_be_sent_or_is_invalid(body: bytes) -> None:
    try:
        answer = read_description(body)
    except InvalidInput:
        return
    if answer is not None:
        send(Representation.from_object(answer), MISS)
        assert read_description(write_description(answer)) == answer


@pytest.fixture(scope="module", params=["json", "console"])
def log(request: pytest.FixtureRequest) -> Iterator[io.BytesIO]:
    """A log file in UTF-8, which cannot hold a lone surrogate."""
    form: Literal["json", "console"] = request.param
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    file = io.BytesIO()
    configure_logging("debug", form, io.TextIOWrapper(file, encoding="utf-8", write_through=True))
    yield file
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@given(
    answer=st.dictionaries(st.sampled_from(["size", "ipfsHash", "type", "storageBag", "isAccepted"]), VALUES)
)
@example(answer={"ipfsHash": SURROGATE, "size": SURROGATE})
def test_a_squids_object_can_be_sent_and_logged(log: io.BytesIO, answer: dict[str, Any]) -> None:
    before = log.tell()
    try:
        described = read_object(OBJECT.object_id, {"id": "7", **answer}, refuse_private=True)
    except CatalogUnavailable:
        return
    send(Representation.from_object(described), MISS)
    if described.content_hash is None:
        assert log.tell() > before, "the log line was lost"


@pytest.mark.parametrize("size", [-1, 2**63])
def test_a_size_beyond_file_offsets_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match="size: expected"):
        replace(OBJECT, size=size)
