"""The catalog port on a Storage-Squid."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from shared.adapters.catalogs.joystream.answers import read_object
from shared.adapters.catalogs.joystream.endpoint import GraphqlEndpoint
from shared.adapters.catalogs.joystream.limits import SquidLimits
from shared.adapters.catalogs.joystream.listing import list_objects
from shared.adapters.catalogs.joystream.network import (
    SquidStatus,
    StorageEndpoint,
    read_bucket_ids,
    read_endpoints,
    read_status,
)
from shared.adapters.catalogs.joystream.questions import ACTIVE_STORAGE, ALL_BUCKETS, ONE_OBJECT, STATUS
from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import Assignment, MediaObject, ObjectId
from shared.domain.source_urls import distinct_hosts


class JoystreamCatalog:
    """See the port. Beside it: the network's storage nodes and the squid's own state, for source ranking and /status.

    Look-ups ask the squid each time: put a cache before it. An unknown object is None only where the squid says so
    (`null` without errors). Listed objects carry no sources, and count as accepted since the list does not say: look
    them up before fetching them.
    """

    def __init__(self, url: str, limits: SquidLimits, *, refuse_private: bool) -> None:
        """`url`: http(s), of the GraphQL endpoint; `refuse_private`: leave out sources at private addresses."""
        self._endpoint = GraphqlEndpoint(url)
        self._limits = limits
        self._refuse_private = refuse_private

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

    async def squid_status(self) -> SquidStatus:
        limits = self._limits
        return read_status(await self._endpoint.ask(STATUS, {}, limits.timeout, limits.max_answer))
