"""Versions: what proves that bytes belong together, and what the volume and the queue keep of that."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from distributor_node.shared.adapters.volume.records import decode_record, encode_record
from distributor_node.shared.domain.conditionals import Comparison, Validators, Version
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId, StoredRecord
from distributor_node.shared.domain.space import RECORD_BYTES

HASH = ContentHash("sha256", bytes(32))
OTHER = ContentHash("sha256", bytes(31) + b"x")
STRONG, WEAK = Validators('"v1"', 1000), Validators('W/"v1"', 1000)
SAME, DIFFERENT, UNKNOWN = Comparison.SAME, Comparison.DIFFERENT, Comparison.UNKNOWN


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Version(HASH), Version(HASH, Validators('"v2"')), SAME),
        (Version(HASH), Version(OTHER), DIFFERENT),
        (Version(None, STRONG), Version(None, STRONG), SAME),
        (Version(None, STRONG, 5), Version(None, STRONG, 6), DIFFERENT),
        (Version(None, STRONG), Version(None, Validators('"v2"', 1000)), DIFFERENT),
        (Version(None, STRONG), Version(None, Validators('"v1"', 2000)), SAME),
        (Version(None, STRONG), Version(None, WEAK), UNKNOWN),
        (Version(None, WEAK), Version(None, WEAK), UNKNOWN),
        (Version(None, WEAK), Version(None, Validators('W/"v2"', 1000)), DIFFERENT),
        (Version(None, Validators(None, 1000)), Version(None, Validators(None, 1000)), UNKNOWN),
        (Version(None, Validators(None, 1000)), Version(None, Validators(None, 2000)), DIFFERENT),
        (Version(None, STRONG), Version(), UNKNOWN),
        (Version(), Version(), UNKNOWN),
        (Version(size=5), Version(size=6), DIFFERENT),
        (Version(size=5), Version(), UNKNOWN),
    ],
)
def test_comparing_versions(one: Version, other: Version, expected: Comparison) -> None:
    assert one.compare(other) is expected
    assert other.compare(one) is expected


def test_only_a_strong_tag_is_sent_as_if_range() -> None:
    assert Version(None, STRONG).if_range == '"v1"'
    assert Version(None, WEAK).if_range is None
    assert Version(HASH, STRONG).if_range is None, "each source of a hashed object has a tag of its own"


def test_clients_see_the_hash_or_else_the_sources_own_tag() -> None:
    assert MediaObject(ObjectId("1"), 5, HASH, validators=STRONG).etag == f'"{HASH}"'
    assert MediaObject(ObjectId("1"), 5, validators=WEAK).etag == 'W/"v1"'
    assert MediaObject(ObjectId("1"), 5, validators=Validators(None, 1000)).etag is None


@pytest.mark.parametrize("content_hash", [None, HASH])
@pytest.mark.parametrize("validators", [STRONG, WEAK, Validators(None, 1000), Validators()])
def test_a_record_keeps_the_version(content_hash: ContentHash | None, validators: Validators) -> None:
    bare = StoredRecord(ObjectId("1"), 5, None, content_hash, "image/png", 7)
    record = bare.with_validators(validators)
    assert decode_record(encode_record(record)) == record
    assert record.validators.last_modified == validators.last_modified
    assert record.etag == (validators.etag if content_hash is None else f'"{HASH}"')


def test_a_record_keeps_the_name_of_its_object_if_there_is_room() -> None:
    record = StoredRecord(ObjectId("1"), 5, None, None, "image/png", 7, name="Sunrise ☀ 日本")
    assert decode_record(encode_record(record)) == record
    for name in ("☀" * 2000, "\ud800" * 2000):
        body = encode_record(replace(record, name=name))
        assert len(body) <= RECORD_BYTES
        assert decode_record(body) == replace(record, name=None)
    assert decode_record(encode_record(replace(record, name="lone \ud800"))).name == "lone ?"
    assert b"name" not in encode_record(replace(record, name=None))


@pytest.mark.parametrize(("content_hash", "etag"), [(None, None), (HASH, f'"{HASH}"')])
def test_a_record_of_a_release_without_versions_is_read(
    content_hash: ContentHash | None, etag: str | None
) -> None:
    """Its tag without a hash was made up from id and size, so it says nothing of the bytes."""
    body = json.dumps(
        {
            "version": 1, "object_id": "1", "size": 5, "etag": etag or '"0123456789abcdef"',
            "hash": None if content_hash is None else str(content_hash), "media_type": "image/png", "stored_at": 7,
        }
    ).encode()  # fmt: skip
    assert decode_record(body) == StoredRecord(ObjectId("1"), 5, etag, content_hash, "image/png", 7)
