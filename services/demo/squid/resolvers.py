"""Resolvers for the GraphQL library, with faults. Nested values are computed when a query selects them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from graphql import GraphQLError

from distributor_node.services.demo.manifest import known_hash
from distributor_node.services.demo.objects import DemoObject
from distributor_node.services.demo.squid.data import Bag, SquidData, StorageBucket
from distributor_node.services.demo.squid.sdl import BIGINT_WORKER, GENERATIONS

NULLABLE = frozenset({"type", "operatorMetadata", "nodeEndpoint", "squidStatus"})
_NUMBERS = {"latency": 0, "status": 100, "huge": 0, "spare": 0, "outage_seconds": 0, "page_limit": 1}
_LISTS = frozenset({"poison", "missing_bags", "missing_objects", "missing_buckets", "nulls", "operations"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SquidFaults:
    """The faults of responses. Times in seconds, sizes in bytes. Raises ValueError for an invalid value."""

    latency: float = 0.0  # before the response
    hang: bool = False  # accept the query, never respond
    errors: bool = False  # a 200 with GraphQL errors, without data
    errors_beside_data: bool = False  # a 200 with GraphQL errors and all data
    status: int | None = None  # respond with this status and a short text
    redirect_to: str | None = None  # respond 302 with this Location
    garbage: bool = False  # a 200 without valid JSON
    huge: int = 0  # so many bytes of padding in the response
    missing_objects: tuple[str, ...] = ()  # not in lists, and null in queries for them
    poison: tuple[str, ...] = ()  # objects that make each query for them fail
    missing_bags: tuple[str, ...] = ()  # not in the lists of objects
    missing_buckets: tuple[str, ...] = ()  # not in the lists of buckets
    empty_lists: bool = False
    page_limit: int | None = None  # no list of objects is longer, whatever a query asks for
    ignore_id_gt: bool = False
    nulls: tuple[str, ...] = ()  # fields that are null everywhere: see NULLABLE
    schema: str = "current"  # generation of the squid: see GENERATIONS
    outage_seconds: float = (
        0.0  # with PUT /faults: refuse connections for so long, then apply the other faults
    )
    operations: tuple[str, ...] = ()  # names of the queries with faults; empty: all
    spare: int = 0  # so many of those queries succeed before the faults begin

    def __post_init__(self) -> None:
        for name, least in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in ("status", "page_limit"):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")
        for name in _LISTS:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} must be a list of text, got {value!r}")
        if self.schema not in GENERATIONS:
            raise ValueError(f"schema must be one of {', '.join(GENERATIONS)}, got {self.schema!r}")
        if unknown := set(self.nulls) - NULLABLE:
            raise ValueError(
                f"nulls: expected {', '.join(sorted(NULLABLE))}, got {', '.join(sorted(unknown))}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> SquidFaults:
        """Parse a document. Fields that are not set are off. Raises ValueError."""
        if not isinstance(document, dict):
            raise ValueError("faults: expected an object")
        if unknown := set(document) - {item.name for item in fields(cls)}:
            raise ValueError(f"faults: there is no {', '.join(sorted(map(str, unknown)))}")
        values: dict[str, Any] = {}
        for name, value in document.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


_ACTIVE = "StorageBucketOperatorStatusActive"
_INVITED = "StorageBucketOperatorStatusInvited"
VERSION = "1.8.0-demo"


class Root:
    """The fields of Query. The library calls them with their arguments."""

    def __init__(self, data: SquidData, faults: SquidFaults, height: int) -> None:
        self._data = data
        self._faults = faults
        self._height = height
        self.squidVersion = {"version": VERSION}

    @property
    def squidStatus(self) -> dict[str, int] | None:  # noqa: N802
        return None if "squidStatus" in self._faults.nulls else {"height": self._height}

    def storageDataObjectById(self, _info: Any, id: str) -> dict[str, Any] | None:  # noqa: A002, N802
        self._fail_if_poisoned([id])
        bag = self._data.bag_of(id)
        if bag is None or id in self._faults.missing_objects:
            return None
        return self._object(self._data.objects[id], bag)

    def storageDataObjectByUniqueInput(self, _info: Any, where: dict[str, str]) -> dict[str, Any] | None:  # noqa: N802
        return self.storageDataObjectById(_info, where["id"])

    def storageDataObjects(  # noqa: N802
        self,
        info: Any,
        where: dict[str, Any] | None = None,
        orderBy: list[str] | None = None,  # noqa: N803
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        wanted = where or {}
        bags = (wanted.get("storageBag") or {}).get("id_in")
        ids: Iterable[str] = dict.fromkeys(wanted.get("id_in") or self._data.bag_by_object)
        if bags is not None:
            ids = self._data.ids_of_bags(bags)
        if orderBy:
            ids = sorted(ids, reverse=orderBy[0] == "id_DESC")
        if wanted.get("id_gt") is not None and not self._faults.ignore_id_gt:
            ids = [object_id for object_id in ids if object_id > wanted["id_gt"]]
        limit = min(filter(None, (limit, self._faults.page_limit)), default=None)
        if bags is not None and limit is not None:
            ids = list(ids)[: limit + len(self._faults.missing_objects)]
        self._fail_if_poisoned(ids)
        found = (self.storageDataObjectById(info, object_id) for object_id in ids)
        return self._listed([item for item in found if item is not None], limit)

    def _fail_if_poisoned(self, ids: Iterable[str]) -> None:
        if poisoned := set(self._faults.poison).intersection(ids):
            raise GraphQLError(f"cannot describe {min(poisoned)}")

    def distributionBuckets(  # noqa: N802
        self, _info: Any, where: dict[str, Any] | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        found = [self._distribution_bucket(bucket_id) for bucket_id in self._data.workers]
        ids = (where or {}).get("id_in")
        some = (where or {}).get("operators_some")
        if ids is not None:
            found = [bucket for bucket in found if bucket["id"] in ids]
        if some is not None:
            found = [
                bucket
                for bucket in found
                if any(_matches(operator, some) for operator in bucket["operators"])
            ]
        found = [bucket for bucket in found if bucket["id"] not in self._faults.missing_buckets]
        return self._listed(found, limit)

    def storageBags(  # noqa: N802
        self, _info: Any, where: dict[str, Any] | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        ids = (where or {}).get("id_in")
        missing = self._faults.missing_bags
        bags = self._data.bags.values()
        found = [
            self._bag(bag) for bag in bags if bag.bag_id not in missing and (ids is None or bag.bag_id in ids)
        ]
        return self._listed(found, limit)

    def storageBuckets(  # noqa: N802
        self, _info: Any, where: dict[str, Any] | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        kind = (where or {}).get("operatorStatus", {}).get("isTypeOf_eq")
        found = [self._storage_bucket(bucket) for bucket in self._data.storage]
        if kind is not None:
            found = [bucket for bucket in found if bucket["operatorStatus"]["__typename"] == kind]
        return self._listed(found, limit)

    def _listed(self, found: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
        return [] if self._faults.empty_lists else found[:limit]

    def _object(self, item: DemoObject, bag: Bag) -> dict[str, Any]:
        return {
            "id": item.object_id,
            "size": str(item.size),
            "ipfsHash": lambda _info: _hash_of(item),
            "isAccepted": item.held,
            "type": self._unless_null("type", _type_of(item)),
            "storageBag": lambda _info: self._bag(bag),
        }

    def _bag(self, bag: Bag) -> dict[str, Any]:
        missing = self._faults.missing_objects
        return {
            "id": bag.bag_id,
            "objects": lambda _info: [
                self._object(item, bag) for item in bag.objects if item.object_id not in missing
            ],
            "storageBuckets": lambda _info: [
                {"storageBucket": self._storage_bucket(bucket)} for bucket in self._data.storage
            ],
            "distributionBuckets": lambda _info: [
                {"distributionBucket": self._distribution_bucket(bag.bucket_id)}
            ],
        }

    def _distribution_bucket(self, bucket_id: str) -> dict[str, Any]:
        data = self._data
        operators = [
            *self._operators(bucket_id, data.workers[bucket_id], "ACTIVE"),
            *self._operators(bucket_id, data.invited[bucket_id], "INVITED"),
        ]
        return {
            "id": bucket_id,
            "operators": operators,
            "bags": lambda _info: [{"bag": self._bag(bag)} for bag in data.bags_of(bucket_id)],
        }

    def _storage_bucket(self, bucket: StorageBucket) -> dict[str, Any]:
        endpoint = self._unless_null("nodeEndpoint", bucket.endpoint)
        metadata = {"id": bucket.bucket_id, "nodeEndpoint": endpoint}
        return {
            "id": bucket.bucket_id,
            "operatorMetadata": self._unless_null("operatorMetadata", metadata),
            "operatorStatus": {
                "__typename": _ACTIVE if bucket.active else _INVITED,
                "workerId": self._worker_id(1),
            },
        }

    def _operators(self, bucket_id: str, workers: Iterable[int], status: str) -> list[dict[str, Any]]:
        return [
            {"id": f"{bucket_id}-{worker}", "workerId": self._worker_id(worker), "status": status}
            for worker in workers
        ]

    def _worker_id(self, number: int) -> int | str:
        return str(number) if self._faults.schema == BIGINT_WORKER else number

    def _unless_null(self, field: str, value: Any) -> Any:
        return None if field in self._faults.nulls else value


@lru_cache(maxsize=1024)
def _hash_of(item: DemoObject) -> str:
    return known_hash(item)


def _type_of(item: DemoObject) -> dict[str, Any]:
    if item.media_type.startswith("text/"):
        subtitle = {"id": item.object_id, "mimeType": item.media_type}
        return {"__typename": "DataObjectTypeVideoSubtitle", "subtitle": subtitle}
    return {"__typename": "DataObjectTypeVideoMedia"}


def _matches(operator: dict[str, Any], some: dict[str, Any]) -> bool:
    return some.get("workerId_eq") in (None, operator["workerId"]) and some.get("status_eq") in (
        None,
        operator["status"],
    )
