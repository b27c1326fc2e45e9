"""The catalog port, implemented with a Storage-Squid.

First look-ups and status, then the listing of an assignment: the bags of its buckets, and their objects in batches.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
    BUCKETS_OF_WORKER,
    FIRST_PAGE_OF_BAGS,
    MANY_OBJECTS,
    OBJECTS_OF_BAGS,
    ONE_OBJECT,
    PAGE_OF_BAGS,
    STATUS,
    GraphqlEndpoint,
    Query,
    QueryFailed,
    ResponseTooLarge,
    SquidLimits,
)
from distributor_node.shared.domain.errors import CatalogUnavailable, QueryRejected
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

    @property
    def lookups_fail(self) -> bool:
        return False

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

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        limits = self._limits
        query, variables = (ALL_BUCKETS, {}) if worker_id is None else (BUCKETS_OF_WORKER, {"w": worker_id})
        return read_bucket_ids(
            await self._endpoint.ask(query, variables, limits.timeout, limits.max_list_response)
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


# The listing of an assignment, in pages. It is complete, or ends with an error.


async def list_objects(
    endpoint: GraphqlEndpoint, limits: SquidLimits, assignment: Assignment
) -> AsyncIterator[Sequence[MediaObject]]:
    """Raise CatalogUnavailable, in the middle too, if a query fails or its response omits what was asked for."""
    bags = await _bags(endpoint, limits, assignment)
    ids = list(bags)
    pages = _Pages(endpoint, limits, bags)
    for start in range(0, len(ids), limits.list_batch):
        batch = ids[start : start + limits.list_batch]
        after: str | None = ""
        while after is not None:
            objects, after = await pages.read(batch, after)
            if objects:
                yield objects


class _Pages:
    """Reads the objects of some bags, ordered by id: no bag is too large, for the squid or for our memory."""

    def __init__(
        self,
        endpoint: GraphqlEndpoint,
        limits: SquidLimits,
        bags: Mapping[str, tuple[DistributionBucket, ...]],
    ) -> None:
        """`bags`: the ids of all bags, with the buckets of the assignment that each is in."""
        self._endpoint, self._limits, self._bags = endpoint, limits, bags
        self._page_size = limits.list_page
        self._largest = (
            0  # the most objects that the squid has sent in a page: it may have a limit of its own
        )
        self._are_supported = True
        self._has_asked = False

    async def read(self, batch: Sequence[str], after: str) -> tuple[tuple[MediaObject, ...], str | None]:
        """Return the next objects of these bags, and what `after` is for those behind them. None: there are none.

        `after`: an empty text for the first page.
        """
        while self._are_supported:
            try:
                return await self._read_page(batch, after)
            except ResponseTooLarge:
                if self._page_size == 1:
                    raise
                self._page_size, self._largest = self._page_size // 2, 0
            except QueryRejected as error:
                logger.warning("squid_pages_unsupported", reason=str(error))
                self._are_supported = False
        return await self._read_whole_bags(batch), None

    async def _read_page(
        self, batch: Sequence[str], after: str
    ) -> tuple[tuple[MediaObject, ...], str | None]:
        size = self._page_size
        variables = {"ids": list(batch), "bags": len(batch), "after": after, "n": size}
        data = await self._ask(PAGE_OF_BAGS if after else FIRST_PAGE_OF_BAGS, variables)
        wanted = set(batch)
        if not after:
            _check_bags(data.get("bags"), wanted)
        listed = data.get("objects")
        if not isinstance(listed, list):
            raise CatalogUnavailable("the squid's response has no list of objects")
        objects = tuple(read_listed(found, self._buckets_of(found, wanted)) for found in listed)
        ids = {item.object_id for item in objects}
        if len(ids) < len(objects) or after in ids:
            raise CatalogUnavailable("the squid lists an object twice")
        # A page that is shorter than another one was is the last one. One that is shorter than asked for need not be.
        is_last = not objects or len(objects) < min(size, self._largest)
        self._largest = max(self._largest, len(objects))
        return objects, None if is_last else objects[-1].object_id

    def _buckets_of(self, found: Any, wanted: set[str]) -> tuple[DistributionBucket, ...]:
        bag = found.get("storageBag") if isinstance(found, dict) else None
        bag_id = bag.get("id") if isinstance(bag, dict) else None
        if bag_id not in wanted:
            raise CatalogUnavailable("the squid lists an object of another bag")
        return self._bags[bag_id]

    async def _read_whole_bags(self, batch: Sequence[str]) -> tuple[MediaObject, ...]:
        """For squids without the query for pages."""
        data = await self._ask(OBJECTS_OF_BAGS, {"ids": list(batch), "n": len(batch)})
        objects: list[MediaObject] = []
        for bag in _check_bags(data.get("storageBags"), set(batch)):
            held = bag.get("objects")
            if not isinstance(held, list):
                raise CatalogUnavailable("the squid's list of objects is malformed")
            objects += [read_listed(found, self._bags[bag["id"]]) for found in held]
        return tuple(objects)

    async def _ask(self, query: Query, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Ask after a pause, so that the squid answers other questions too."""
        if self._has_asked:
            await asyncio.sleep(self._limits.list_pause)
        self._has_asked = True
        used = {name: value for name, value in variables.items() if f"${name}:" in query.text}
        return await self._endpoint.ask(
            query, used, self._limits.list_timeout, self._limits.max_list_response
        )


def _check_bags(listed: Any, wanted: set[str]) -> list[dict[str, Any]]:
    """Return the bags. Raises CatalogUnavailable unless they are exactly the wanted ones: a missing one would look like
    an empty one.
    """
    if not isinstance(listed, list):
        raise CatalogUnavailable("the squid's response has no list of bags")
    found = {bag.get("id") if isinstance(bag, dict) else None for bag in listed}
    if not found <= wanted:
        raise CatalogUnavailable("the squid's list of bags is malformed")
    if found != wanted:
        raise CatalogUnavailable(f"the squid's response omits {len(wanted - found)} of {len(wanted)} bags")
    return listed


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
