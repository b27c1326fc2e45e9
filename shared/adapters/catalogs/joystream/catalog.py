"""The catalog port on a Storage-Squid."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from distributor_node.shared.adapters.catalogs.joystream.answers import (
    StorageEndpoint,
    bucket_id_or_none,
    read_bucket_ids,
    read_endpoints,
    read_listed,
    read_object,
    read_status,
)
from distributor_node.shared.adapters.catalogs.joystream.chain import ChainHead
from distributor_node.shared.adapters.catalogs.joystream.endpoint import (
    ACTIVE_STORAGE,
    ALL_BAGS,
    ALL_BUCKETS,
    BAGS_OF_BUCKETS,
    BAGS_OF_WORKER,
    OBJECTS_OF_BAGS,
    ONE_OBJECT,
    STATUS,
    GraphqlEndpoint,
    ResponseTooLarge,
    SquidLimits,
)
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import Assignment, DistributionBucket, MediaObject, ObjectId
from distributor_node.shared.domain.urls import distinct_hosts, url_without_credentials
from distributor_node.shared.ports.catalog import CatalogStatus


class JoystreamCatalog:
    """See the port. Beside it: the network's storage nodes and the squid's own state, for source ranking and /status.

    Look-ups ask the squid each time: put a cache before it. An unknown object is None only where the squid says so
    (`null` without errors). Listed objects carry no sources, and count as accepted since the list does not say: look
    them up before fetching them.
    """

    def __init__(
        self, url: str, limits: SquidLimits, *, refuse_private: bool, chain: ChainHead | None = None
    ) -> None:
        """`url`: http(s), of the GraphQL endpoint; `refuse_private`: leave out sources at private addresses."""
        self._url = url
        self._endpoint = GraphqlEndpoint(url)
        self._limits = limits
        self._refuse_private = refuse_private
        self._chain = chain

    @property
    def can_list(self) -> bool:
        return True

    @property
    def public_url(self) -> str:
        return url_without_credentials(self._url)

    async def open(self) -> None:
        """ConfigurationError if the URL is none; a squid that is down is no reason to fail."""
        await self._endpoint.open()

    async def close(self) -> None:
        await self._endpoint.close()

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        limits = self._limits
        data = await self._endpoint.ask(ONE_OBJECT, {"id": object_id}, limits.timeout, limits.max_answer)
        if "object" not in data:
            raise CatalogUnavailable("the squid's answer has no object in it")
        found = data["object"]
        return None if found is None else read_object(object_id, found, refuse_private=self._refuse_private)

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        return list_objects(self._endpoint, self._limits, assignment)

    async def bucket_ids(self) -> Sequence[str]:
        limits = self._limits
        return read_bucket_ids(
            await self._endpoint.ask(ALL_BUCKETS, {}, limits.timeout, limits.max_list_answer)
        )

    async def active_storage_endpoints(self) -> tuple[StorageEndpoint, ...]:
        """Every active storage node of the network whose endpoint may be asked."""
        limits = self._limits
        data = await self._endpoint.ask(ACTIVE_STORAGE, {}, limits.list_timeout, limits.max_list_answer)
        return read_endpoints(data, refuse_private=self._refuse_private)

    async def source_bases(self) -> Sequence[str]:
        return distinct_hosts(endpoint.api_url for endpoint in await self.active_storage_endpoints())

    async def status(self) -> CatalogStatus:
        limits = self._limits
        return read_status(await self._endpoint.ask(STATUS, {}, limits.timeout, limits.max_answer))

    async def chain_head(self) -> int | None:
        return None if self._chain is None else await self._chain.head()


# The list of all that is ours: the bags of our buckets, then their objects in batches. Whole, or an error.


async def list_objects(
    endpoint: GraphqlEndpoint, limits: SquidLimits, assignment: Assignment
) -> AsyncIterator[Sequence[MediaObject]]:
    """CatalogUnavailable, in the middle if need be, when an answer fails or leaves out what was asked for."""
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
    """Each bag's id, and those of our buckets it is in."""
    variables: dict[str, Any] = {}
    query, workers = ALL_BAGS, frozenset[int]()
    if assignment.bucket_ids is not None:
        query, variables = BAGS_OF_BUCKETS, {"ids": sorted(assignment.bucket_ids)}
    elif assignment.worker_id is not None:
        query, variables = BAGS_OF_WORKER, {"w": assignment.worker_id}
        workers = frozenset({assignment.worker_id})
    data = await endpoint.ask(query, variables, limits.list_timeout, limits.max_list_answer)
    buckets = dict(_bag_ids(data))
    missing = (assignment.bucket_ids or frozenset()) - buckets.keys()
    if missing:
        raise CatalogUnavailable(f"the squid knows nothing of bucket {min(missing)}, which is ours")
    bags: dict[str, tuple[DistributionBucket, ...]] = {}
    for bucket_id, bag_ids in buckets.items():
        for bag_id in bag_ids:
            bags[bag_id] = (*bags.get(bag_id, ()), DistributionBucket(bucket_id, workers))
    return bags


def _bag_ids(data: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    listed = data.get("distributionBuckets")
    if not isinstance(listed, list):
        raise CatalogUnavailable("the squid's list of buckets is missing")
    for bucket in listed:
        bucket_id = bucket_id_or_none(bucket.get("id")) if isinstance(bucket, dict) else None
        try:
            bag_ids = [entry["bag"]["id"] for entry in bucket["bags"]]
        except (KeyError, TypeError) as error:
            raise CatalogUnavailable("the squid's list of bags is broken") from error
        if bucket_id is None or not all(isinstance(bag_id, str) for bag_id in bag_ids):
            raise CatalogUnavailable("the squid's list of buckets is broken")
        yield bucket_id, bag_ids


async def _objects(
    endpoint: GraphqlEndpoint,
    limits: SquidLimits,
    batch: Sequence[str],
    bags: dict[str, tuple[DistributionBucket, ...]],
) -> tuple[MediaObject, ...]:
    variables = {"ids": list(batch), "n": len(batch)}
    data = await endpoint.ask(OBJECTS_OF_BAGS, variables, limits.list_timeout, limits.max_list_answer)
    listed = data.get("storageBags")
    if not isinstance(listed, list):
        raise CatalogUnavailable("the squid's list of objects is missing")
    wanted, objects = set(batch), []
    for bag in listed:
        bag_id = bag.get("id") if isinstance(bag, dict) else None
        held = bag.get("objects") if isinstance(bag, dict) else None
        if bag_id not in wanted or not isinstance(held, list):
            raise CatalogUnavailable("the squid's list of objects is broken")
        wanted.discard(bag_id)
        objects += [read_listed(found, bags[bag_id]) for found in held]
    if wanted:
        raise CatalogUnavailable(f"the squid left {len(wanted)} of {len(batch)} bags out of its answer")
    return tuple(objects)
