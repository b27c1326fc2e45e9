"""The catalog port, implemented with a Storage-Squid.

First look-ups and status, then the listing of an assignment: the bags of its buckets, and their objects in batches.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import structlog

from distributor_node.shared.adapters.catalogs.joystream.answers import (
    StorageEndpoint,
    bucket_id_or_none,
    read_bucket_ids,
    read_endpoints,
    read_listed,
    read_object,
    read_objects,
    read_status,
)
from distributor_node.shared.adapters.catalogs.joystream.chain import ChainHead
from distributor_node.shared.adapters.catalogs.joystream.endpoint import (
    ACTIVE_STORAGE,
    ALL_BAGS,
    ALL_BUCKETS,
    BAGS_OF_BUCKETS,
    BAGS_OF_WORKER,
    MANY_OBJECTS,
    OBJECTS_OF_BAGS,
    ONE_OBJECT,
    STATUS,
    GraphqlEndpoint,
    QueryFailed,
    QueryRejected,
    ResponseTooLarge,
    SquidLimits,
)
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import Assignment, DistributionBucket, MediaObject, ObjectId
from distributor_node.shared.domain.urls import distinct_hosts, url_without_credentials
from distributor_node.shared.ports.catalog import CatalogStatus, LookupAnswers

logger = structlog.get_logger()

_DECIMAL = re.compile(r"[0-9]+", re.ASCII)
_BATCH_SIZE = 50
_BATCH_QUERIES = 16  # at most, for one batch that has to be divided
_GIVE_UP_AFTER = 3  # failed queries of one batch without a successful one: all would fail
_BYTES_PER_OBJECT = 256 * 1024  # of a response for several objects, on average


class JoystreamCatalog:
    """See the ports. Each look-up asks the squid, so use it behind a CachedCatalog.

    An object does not exist only if the squid says so (`null` without errors). Listed objects have no sources and
    count as accepted, because the list does not say: look an object up before you fetch it.
    """

    def __init__(
        self, url: str, limits: SquidLimits, *, refuse_private: bool, chain: ChainHead | None = None
    ) -> None:
        """`url`: http(s), of the GraphQL endpoint. `refuse_private`: omit sources at private addresses."""
        self._url = url
        self._endpoint = GraphqlEndpoint(url)
        self._limits = limits
        self._refuse_private = refuse_private
        self._chain = chain
        self._batch_size = _BATCH_SIZE

    @property
    def can_list(self) -> bool:
        return True

    @property
    def public_url(self) -> str:
        return url_without_credentials(self._url)

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return ()

    async def open(self) -> None:
        """Raise ConfigurationError for an invalid URL. A squid that is down is not an error here."""
        await self._endpoint.open()

    async def close(self) -> None:
        await self._endpoint.close()

    def can_have(self, object_id: ObjectId) -> bool:
        return _DECIMAL.fullmatch(object_id) is not None

    @property
    def batch_size(self) -> int:
        return self._batch_size

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        return await self._look_up_one(object_id) if self.can_have(object_id) else None

    async def forget(self, outdated: MediaObject) -> None:
        """Nothing is remembered here."""

    async def look_up_batch(self, object_ids: Sequence[ObjectId]) -> LookupAnswers:
        if len(object_ids) == 1:
            return {object_ids[0]: await self._look_up_one(object_ids[0])}
        answers: dict[ObjectId, MediaObject | None] = {}
        try:
            async with asyncio.timeout(self._limits.timeout):
                try:
                    await self._look_up_dividing(object_ids, answers)
                except QueryRejected as error:
                    logger.warning("squid_batches_unsupported", reason=str(error))
                    self._batch_size = 1
                    for object_id in object_ids:
                        answers[object_id] = await self._look_up_one(object_id)
        except TimeoutError as error:
            if not answers:
                reason = f"the squid did not respond within {self._limits.timeout:g} s"
                raise CatalogUnavailable(reason) from error
        return answers

    async def _look_up_one(self, object_id: ObjectId) -> MediaObject | None:
        limits = self._limits
        data = await self._endpoint.ask(ONE_OBJECT, {"id": object_id}, limits.timeout, limits.max_response)
        if "object" not in data:
            raise CatalogUnavailable("the squid's response has no object")
        found = data["object"]
        return None if found is None else read_object(object_id, found, refuse_private=self._refuse_private)

    async def _look_up_dividing(
        self, object_ids: Sequence[ObjectId], answers: dict[ObjectId, MediaObject | None]
    ) -> None:
        """Ask for all objects at once. If the response is an error or too large, ask for each half, and so on.

        So one object that the squid fails to describe costs no other object its answer.
        """
        parts = deque([object_ids])
        for number in range(1, _BATCH_QUERIES + 1):
            part = parts.popleft()
            try:
                answers.update(await self._look_up_many(part))
            except (QueryFailed, ResponseTooLarge):
                if not answers and number == _GIVE_UP_AFTER:
                    raise
                if len(part) > 1:
                    half = len(part) // 2
                    parts.extend((part[:half], part[half:]))
            if not parts:
                break

    async def _look_up_many(self, object_ids: Sequence[ObjectId]) -> LookupAnswers:
        limits = self._limits
        max_bytes = min(len(object_ids) * _BYTES_PER_OBJECT, limits.max_list_response)
        variables = {"ids": list(object_ids), "n": len(object_ids)}
        data = await self._endpoint.ask(
            MANY_OBJECTS, variables, limits.timeout, max(max_bytes, limits.max_response)
        )
        return read_objects(object_ids, data.get("objects"), refuse_private=self._refuse_private)

    async def forget_object(self, object_id: ObjectId) -> None:
        """Nothing is remembered here."""

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        return list_objects(self._endpoint, self._limits, assignment)

    async def bucket_ids(self) -> Sequence[str]:
        limits = self._limits
        return read_bucket_ids(
            await self._endpoint.ask(ALL_BUCKETS, {}, limits.timeout, limits.max_list_response)
        )

    async def active_storage_endpoints(self) -> tuple[StorageEndpoint, ...]:
        """Return every active storage node of the network that has a usable endpoint."""
        limits = self._limits
        data = await self._endpoint.ask(ACTIVE_STORAGE, {}, limits.list_timeout, limits.max_list_response)
        return read_endpoints(data, refuse_private=self._refuse_private)

    async def source_bases(self) -> Sequence[str]:
        return distinct_hosts(endpoint.api_url for endpoint in await self.active_storage_endpoints())

    async def status(self) -> CatalogStatus:
        # Asked in the background only, so a slow squid gets the time of a list.
        limits = self._limits
        return read_status(await self._endpoint.ask(STATUS, {}, limits.list_timeout, limits.max_response))

    async def chain_head(self) -> int | None:
        return None if self._chain is None else await self._chain.head()


# The listing of an assignment. It is complete, or ends with an error.


async def list_objects(
    endpoint: GraphqlEndpoint, limits: SquidLimits, assignment: Assignment
) -> AsyncIterator[Sequence[MediaObject]]:
    """Raise CatalogUnavailable, in the middle too, if a query fails or its response omits what was asked for."""
    bags = await _bags(endpoint, limits, assignment)
    ids = list(bags)
    batches = deque(ids[start : start + limits.list_batch] for start in range(0, len(ids), limits.list_batch))
    first = True
    while batches:
        if not first:
            await asyncio.sleep(limits.list_pause)
        first = False
        batch = batches.popleft()
        try:
            objects = await _objects(endpoint, limits, batch, bags)
        except ResponseTooLarge:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            batches.extendleft((batch[half:], batch[:half]))
            continue
        yield objects


async def _bags(
    endpoint: GraphqlEndpoint, limits: SquidLimits, assignment: Assignment
) -> dict[str, tuple[DistributionBucket, ...]]:
    """Return the id of each bag, with those buckets of the assignment that it is in."""
    variables: dict[str, Any] = {}
    query, workers = ALL_BAGS, frozenset[int]()
    if assignment.bucket_ids is not None:
        query, variables = BAGS_OF_BUCKETS, {"ids": sorted(assignment.bucket_ids)}
    elif assignment.worker_id is not None:
        query, variables = BAGS_OF_WORKER, {"w": assignment.worker_id}
        workers = frozenset({assignment.worker_id})
    data = await endpoint.ask(query, variables, limits.list_timeout, limits.max_list_response)
    buckets = dict(_bag_ids(data))
    missing = (assignment.bucket_ids or frozenset()) - buckets.keys()
    if missing:
        raise CatalogUnavailable(f"the squid does not list bucket {min(missing)} of the assignment")
    bags: dict[str, tuple[DistributionBucket, ...]] = {}
    for bucket_id, bag_ids in buckets.items():
        for bag_id in bag_ids:
            bags[bag_id] = (*bags.get(bag_id, ()), DistributionBucket(bucket_id, workers))
    return bags


def _bag_ids(data: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    listed = data.get("distributionBuckets")
    if not isinstance(listed, list):
        raise CatalogUnavailable("the squid's response has no list of buckets")
    for bucket in listed:
        bucket_id = bucket_id_or_none(bucket.get("id")) if isinstance(bucket, dict) else None
        try:
            bag_ids = [entry["bag"]["id"] for entry in bucket["bags"]]
        except (KeyError, TypeError) as error:
            raise CatalogUnavailable("the squid's list of bags is malformed") from error
        if bucket_id is None or not all(isinstance(bag_id, str) for bag_id in bag_ids):
            raise CatalogUnavailable("the squid's list of buckets is malformed")
        yield bucket_id, bag_ids


async def _objects(
    endpoint: GraphqlEndpoint,
    limits: SquidLimits,
    batch: Sequence[str],
    bags: dict[str, tuple[DistributionBucket, ...]],
) -> tuple[MediaObject, ...]:
    variables = {"ids": list(batch), "n": len(batch)}
    data = await endpoint.ask(OBJECTS_OF_BAGS, variables, limits.list_timeout, limits.max_list_response)
    listed = data.get("storageBags")
    if not isinstance(listed, list):
        raise CatalogUnavailable("the squid's response has no list of objects")
    wanted, objects = set(batch), []
    for bag in listed:
        bag_id = bag.get("id") if isinstance(bag, dict) else None
        held = bag.get("objects") if isinstance(bag, dict) else None
        if bag_id not in wanted or not isinstance(held, list):
            raise CatalogUnavailable("the squid's list of objects is malformed")
        wanted.discard(bag_id)
        objects += [read_listed(found, bags[bag_id]) for found in held]
    if wanted:
        raise CatalogUnavailable(f"the squid's response omits {len(wanted)} of {len(batch)} bags")
    return tuple(objects)
