"""Parsing of squid answers: every field may be null, nothing is trusted unchecked."""

from __future__ import annotations

from typing import Any

import pytest

from distributor_node.shared.adapters.catalogs.joystream.answers import (
    read_bucket_ids,
    read_endpoints,
    read_listed,
    read_object,
    read_status,
)
from distributor_node.shared.adapters.catalogs.joystream.endpoint import (
    DIALECTS,
    MANY_OBJECTS,
    ONE_OBJECT,
    data_of,
)
from distributor_node.shared.domain.errors import CatalogUnavailable, QueryRejected
from distributor_node.shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId

ID = ObjectId("7")
HASH = ContentHash("blake3", bytes(range(32)))
ACTIVE = {"__typename": "StorageBucketOperatorStatusActive"}


def storage(endpoint: str | None, status: Any = ACTIVE) -> dict[str, Any]:
    return {
        "storageBucket": {
            "id": "3",
            "operatorMetadata": None if endpoint is None else {"nodeEndpoint": endpoint},
            "operatorStatus": status,
        }
    }


def distribution(bucket_id: str, *operators: tuple[Any, str]) -> dict[str, Any]:
    told = [{"workerId": worker, "status": status} for worker, status in operators]
    return {"distributionBucket": {"id": bucket_id, "operators": told}}


def answer(**changed: Any) -> dict[str, Any]:
    return {
        "id": "7",
        "size": "1000",
        "ipfsHash": str(HASH),
        "isAccepted": True,
        "type": None,
        "storageBag": {"storageBuckets": [storage("https://one.example/")], "distributionBuckets": []},
    } | changed


def read(**changed: Any) -> MediaObject:
    return read_object(ID, answer(**changed), refuse_private=False)


@pytest.mark.parametrize(
    ("stated", "workers"),
    [
        (7, {7}), ("7", {7}), ("0", {0}), (str(2**53 + 1), {2**53 + 1}), (True, set()), ("", set()), ("-7", set()),
        ("7.0", set()), ("0x7", set()), ("٧", set()), (None, set()), ("1" * 20, set()),
    ],
)  # fmt: skip
def test_the_id_of_a_worker_is_a_number_or_a_decimal_string(stated: Any, workers: set[int]) -> None:
    bag = {"storageBuckets": [], "distributionBuckets": [distribution("0:1", (stated, "ACTIVE"))]}
    assert read(storageBag=bag).buckets == (DistributionBucket("0:1", frozenset(workers)),)


def test_a_whole_answer() -> None:
    bag = {
        "storageBuckets": [storage("https://one.example/"), storage("https://two.example/storage")],
        "distributionBuckets": [distribution("0:1", (7, "ACTIVE"), (8, "INVITED")), distribution("1:12")],
    }
    subtitle = {"subtitle": {"mimeType": "text/vtt"}}
    assert read(storageBag=bag, type=subtitle, size=str(2**53 + 1), isAccepted=False) == MediaObject(
        ID,
        2**53 + 1,
        content_hash=HASH,
        media_type="text/vtt",
        buckets=(DistributionBucket("0:1", frozenset({7})), DistributionBucket("1:12")),
        accepted=False,
        sources=(
            "https://one.example/api/v1/files/7",
            "https://two.example/storage/api/v1/files/7",
        ),
    )


@pytest.mark.parametrize(
    "bag",
    [
        None,
        {},
        {"storageBuckets": None, "distributionBuckets": None},
        {"storageBuckets": [None, {}, {"storageBucket": None}], "distributionBuckets": [None, {}]},
        {"storageBuckets": [storage(None)], "distributionBuckets": [{"distributionBucket": {"id": None}}]},
        {"storageBuckets": [storage("https://one.example/", None)], "distributionBuckets": []},
        {
            "storageBuckets": [
                storage("https://one.example/", {"__typename": "StorageBucketOperatorStatusInvited"})
            ]
        },
        {"storageBuckets": [storage("")], "distributionBuckets": [distribution("no bucket")]},
        "nonsense",
    ],
)
def test_an_object_missing_from_a_bag_has_no_source_and_no_bucket(bag: Any) -> None:
    found = read(storageBag=bag)
    assert (found.sources, found.buckets) == ((), ())
    assert (found.size, found.content_hash) == (1000, HASH)


def test_operators_may_be_null() -> None:
    bag = {"distributionBuckets": [{"distributionBucket": {"id": "0:1", "operators": None}}]}
    assert read(storageBag=bag).buckets == (DistributionBucket("0:1"),)


@pytest.mark.parametrize("accepted", [None, False, "true", 1])
def test_only_true_is_accepted(accepted: Any) -> None:
    assert not read(isAccepted=accepted).accepted


@pytest.mark.parametrize(
    ("stated", "size"),
    [
        ("0", 0),
        (str(2**63 - 1), 2**63 - 1),
        (5, 5),
        (str(2**63), None),
        ("-1", None),
        ("1e9", None),
        ("", None),
        (" 1", None),
        ("١", None),
        ("9" * 5000, None),
        (1.5, None),
        (True, None),
        (None, None),
    ],
)
def test_sizes_are_decimal_or_unknown(stated: Any, size: int | None) -> None:
    assert read(size=stated).size == size


@pytest.mark.parametrize("stated", ["QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKU8C4", "0OIl", "z" * 5000])
def test_a_hash_that_cannot_be_computed_counts_as_none(stated: str) -> None:
    found = read(ipfsHash=stated)
    assert (found.content_hash, found.etag) == (None, None)


@pytest.mark.parametrize("stated", [None, "", 5])
def test_no_hash_at_all(stated: Any) -> None:
    found = read(ipfsHash=stated)
    assert (found.content_hash, found.etag) == (None, None)


@pytest.mark.parametrize(
    ("stated", "media_type"),
    [
        ("text/vtt", "text/vtt"),
        ("Text/VTT; charset=utf-8", "text/vtt"),
        ("text/plain", "text/plain"),
        ("text/html", None),
        ("text/javascript", None),
        ("text/vtt\r\nSet-Cookie: a=b", None),
        ("video/mp4", None),
        ("", None),
        (None, None),
        (5, None),
    ],
)
def test_subtitle_types_are_known_ones(stated: Any, media_type: str | None) -> None:
    assert read(type={"subtitle": {"mimeType": stated}}).media_type == media_type


@pytest.mark.parametrize("kind", [None, {}, {"subtitle": None}, []])
def test_no_subtitle_no_type(kind: Any) -> None:
    assert read(type=kind).media_type is None


@pytest.mark.parametrize("found", [{"id": "8"}, {}, [], "7", 5])
def test_another_objects_answer_is_refused(found: Any) -> None:
    with pytest.raises(CatalogUnavailable):
        read_object(ID, found, refuse_private=False)


def test_sources_are_named_once_and_bounded() -> None:
    many = [storage(f"https://n{number}.example") for number in range(500)]
    twice = [storage("https://one.example"), storage("https://one.example/")]
    assert len(read(storageBag={"storageBuckets": many}).sources) == 100
    assert read(storageBag={"storageBuckets": twice}).sources == ("https://one.example/api/v1/files/7",)


def test_listed_objects() -> None:
    bucket = (DistributionBucket("0:1"),)
    found = read_listed({"id": "7", "size": "5", "ipfsHash": str(HASH), "type": None}, bucket)
    assert found == MediaObject(ID, 5, content_hash=HASH, buckets=bucket)
    for broken in ({}, {"id": "../../etc"}, None, {"id": None, "size": "5"}):
        with pytest.raises(CatalogUnavailable):
            read_listed(broken, bucket)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"data": None},
        {"data": []},
        {"errors": [{"message": "timeout"}], "data": {"object": None}},
        {"errors": "boom"},
        {"errors": [None]},
    ],
)
def test_answers_with_incomplete_data_are_rejected(document: Any) -> None:
    with pytest.raises(CatalogUnavailable) as raised:
        data_of(document, 200)
    assert not isinstance(raised.value, QueryRejected)


@pytest.mark.parametrize(
    "error",
    [
        {"message": 'Cannot query field "storageDataObjectById" on type "Query".'},
        {"message": 'Variable "$id" of type "String!" used in position expecting type "ID!".'},
        {"message": "whatever", "extensions": {"code": "GRAPHQL_VALIDATION_FAILED"}},
    ],
)
@pytest.mark.parametrize("status", [200, 400])
def test_rejections_are_recognised(error: dict[str, Any], status: int) -> None:
    with pytest.raises(QueryRejected):
        data_of({"errors": [error]}, status)


def test_data_under_an_error_status_is_ignored() -> None:
    with pytest.raises(CatalogUnavailable):
        data_of({"data": {"object": None}}, 502)
    assert data_of({"data": {"object": None}}, 200) == {"object": None}


def test_queries_are_those_specified() -> None:
    texts = [ONE_OBJECT.render(dialect) for dialect in DIALECTS]
    assert "storageDataObjectById(id: $id)" in texts[0]
    assert "storageDataObjectByUniqueInput(where: {id: $id})" in texts[1]
    assert all("%" not in text for text in texts)
    many = {MANY_OBJECTS.render(dialect) for dialect in DIALECTS}
    assert len(many) == 1
    assert "storageDataObjects(where: {id_in: $ids}, limit: $n)" in many.pop()


def test_the_network() -> None:
    listed = [
        {"id": "1", "operatorMetadata": {"nodeEndpoint": "https://one.example"}},
        {"id": "2", "operatorMetadata": None},
        {"id": "3", "operatorMetadata": {"nodeEndpoint": "ftp://three.example"}},
        None,
    ]
    endpoints = read_endpoints({"storageBuckets": listed}, refuse_private=True)
    assert [(endpoint.bucket_id, endpoint.api_url) for endpoint in endpoints] == [
        ("1", "https://one.example/api/v1/")
    ]
    with pytest.raises(CatalogUnavailable):
        read_endpoints({}, refuse_private=True)
    assert read_bucket_ids({"distributionBuckets": [{"id": "1:0"}, {"id": "0:1"}, {}]}) == ("0:1", "1:0")


@pytest.mark.parametrize(
    "data", [{}, {"squidStatus": None, "squidVersion": None}, {"squidStatus": {"height": None}}]
)
def test_a_squid_may_not_know_its_own_state(data: dict[str, Any]) -> None:
    status = read_status(data)
    assert (status.blocks_processed, status.version) == (None, None)
