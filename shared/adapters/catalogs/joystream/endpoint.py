"""A client of the squid's GraphQL endpoint, bounded in time and size, with the queries it sends.

Generations of squids name some fields and types differently. If a squid rejects a query, it is sent again in the other
dialects, and the one that works is remembered.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import structlog

from distributor_node.shared.adapters.catalogs.documents import map_catalog_errors
from distributor_node.shared.adapters.sources.connections import BoundedTransport
from distributor_node.shared.adapters.sources.network import SourceNetwork, make_tls_context
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    ConfigurationError,
    InvalidInput,
    QueryRejected,
)
from distributor_node.shared.domain.urls import parse_source_url

_PARSE_IN_THREAD = (
    256 * 1024
)  # bytes of JSON from which parsing moves to a thread, so that it does not block the loop
_MAX_MESSAGE = 200  # characters of a server's error message that are kept

logger = structlog.get_logger()


class ResponseTooLarge(CatalogUnavailable):
    """The response exceeds its limit in bytes. A smaller query may succeed."""


class QueryFailed(CatalogUnavailable):
    """The server responded with errors. A smaller query may succeed."""


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The limits of one query."""

    timeout: float  # seconds
    max_bytes: int


class GraphqlEndpoint:
    """Sends queries in the dialect that the server accepted last, and in others if it rejects that."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: httpx.AsyncClient | None = None
        self._dialect: Dialect = DIALECTS[0]
        self._rejected: set[str] = set()  # operations for which that was logged

    async def open(self) -> None:
        """Raise ConfigurationError for an invalid http(s) URL."""
        try:
            parse_source_url(self._url)
        except InvalidInput as error:
            raise ConfigurationError(f"catalog.squid: {error}") from error
        # No limit on connections here: CachedCatalog limits the queries, and a contended pool of httpx can lose a slot
        # when a request is cancelled. No redirects, and no proxy or .netrc credentials from the environment.
        context = await make_tls_context()
        self._client = httpx.AsyncClient(
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
                "User-Agent": "distributor-node",
            },
            transport=BoundedTransport(context, 16, SourceNetwork()),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def ask(
        self, query: Query, variables: Mapping[str, Any], timeout: float, max_bytes: int
    ) -> dict[str, Any]:
        """Return the `data` of the response. Raises CatalogUnavailable for everything else.

        `timeout`: seconds for all attempts together. `max_bytes`: of the response, decompressed.
        """
        async with map_catalog_errors("the squid", timeout):
            return await self._ask_in_dialects(query, variables, _Bounds(timeout, max_bytes))

    async def _ask_in_dialects(
        self, query: Query, variables: Mapping[str, Any], bounds: _Bounds
    ) -> dict[str, Any]:
        current = self._dialect
        tried: set[str] = set()
        rejection = QueryRejected("no dialect is known")
        for dialect in (current, *DIALECTS):
            text = query.render(dialect)
            if text in tried:
                continue
            tried.add(text)
            try:
                data = await self._ask(query.operation, text, dialect.adapt(variables), bounds)
            except QueryRejected as error:
                rejection = error
                continue
            self._rejected.discard(query.operation)
            if dialect is not current and self._dialect is not dialect:
                logger.info("squid_dialect_changed", dialect=dialect.name, was=current.name)
                self._dialect = dialect
            return data
        if query.operation not in self._rejected and not query.is_optional:
            self._rejected.add(query.operation)
            logger.error("squid_query_rejected", operation=query.operation, reason=str(rejection))
        raise rejection

    async def _ask(
        self, operation: str, text: str, variables: Mapping[str, Any], bounds: _Bounds
    ) -> dict[str, Any]:
        body = {"operationName": operation, "query": text, "variables": dict(variables)}
        try:
            status, raw = await self._post(body, bounds)
        except httpx.RemoteProtocolError:
            # The server may close an idle connection while we send. Queries change nothing: send it once more.
            status, raw = await self._post(body, bounds)
        document = await _read(raw, status)
        return data_of(document, status)

    async def _post(self, body: Mapping[str, Any], bounds: _Bounds) -> tuple[int, bytes]:
        if self._client is None:
            raise CatalogUnavailable("the joystream catalog is not open")
        received = bytearray()
        # Connecting ends a little before the caller's time limit: httpx leaks a socket whose handshake is cancelled.
        limits = httpx.Timeout(bounds.timeout, connect=0.9 * bounds.timeout)
        async with self._client.stream("POST", self._url, json=body, timeout=limits) as response:
            expand = _expander(response)
            async for chunk in response.aiter_raw():
                received += expand(chunk, bounds.max_bytes + 1 - len(received))
                if len(received) > bounds.max_bytes:
                    raise ResponseTooLarge(f"the squid's response is larger than {bounds.max_bytes} bytes")
            return response.status_code, bytes(received)


def _expander(response: httpx.Response) -> Callable[[bytes, int], bytes]:
    """Return a function that decompresses a piece, to so many bytes at most: httpx would expand a bomb in one go."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding == "identity":
        return lambda piece, limit: piece
    if encoding != "gzip":
        raise CatalogUnavailable(
            f"the squid responded with Content-Encoding {encoding[:20]!r}, expected gzip"
        )
    decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def expand(piece: bytes, limit: int) -> bytes:
        try:
            return decompressor.decompress(piece, limit)
        except zlib.error as error:
            raise CatalogUnavailable(f"the squid responded with invalid gzip: {error}") from error

    return expand


async def _read(raw: bytes, status: int) -> Any:
    try:
        return await asyncio.to_thread(json.loads, raw) if len(raw) > _PARSE_IN_THREAD else json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CatalogUnavailable(f"the squid responded {status} with invalid JSON") from error


def data_of(document: Any, status: int) -> dict[str, Any]:
    """Return the `data` of a response without errors. Data beside errors is not used.

    Raises QueryRejected, QueryFailed, CatalogUnavailable.
    """
    if not isinstance(document, dict):
        raise CatalogUnavailable(f"the squid responded {status} without a GraphQL response")
    errors = document.get("errors")
    if errors:
        listed = errors if isinstance(errors, list) else [errors]
        messages = "; ".join(_message(error) for error in listed[:3])
        if document.get("data") is None and any(_is_rejection(error) for error in listed):
            raise QueryRejected(f"the squid rejected the query: {messages}")
        raise QueryFailed(f"the squid responded with errors: {messages}")
    data = document.get("data")
    if status != 200 or not isinstance(data, dict):
        raise CatalogUnavailable(f"the squid responded {status} without data")
    return data


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:_MAX_MESSAGE]


def _is_rejection(error: Any) -> bool:
    """Whether validation failed: by Apollo's code, or by the messages that GraphQL libraries share."""
    extensions = error.get("extensions") if isinstance(error, dict) else None
    if isinstance(extensions, dict) and extensions.get("code") == "GRAPHQL_VALIDATION_FAILED":
        return True
    return _message(error).startswith(
        ("Cannot query field", "Unknown argument", "Unknown type", "Variable ", "Field ", "Unknown field")
    )


# The queries, in the dialect of each generation of squids.
#
# Squids differ in the name of the query for one object: `storageDataObjectById`, formerly
# `storageDataObjectByUniqueInput`; and in the type of a worker's id: `BigInt`, formerly `Int`. A squid rejects a query
# in the wrong dialect when it validates it, before it reads any data.

_TYPE = "type { ... on DataObjectTypeVideoSubtitle { subtitle { mimeType } } }"
_OBJECT = f"""{{
  id size ipfsHash isAccepted {_TYPE}
  storageBag {{
    storageBuckets {{ storageBucket {{
      id operatorMetadata {{ nodeEndpoint }} operatorStatus {{ __typename }}
    }} }}
    distributionBuckets {{ distributionBucket {{ id operators {{ workerId status }} }} }}
  }}
}}"""


@dataclass(frozen=True, slots=True)
class Dialect:
    """The names that one generation of squids uses."""

    name: str
    one_object: str  # the query for one object
    argument: str  # of that query, with `$id` in it
    worker_id: str = "Int"  # the type of a worker's id

    def adapt(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the variables in the form that this generation accepts: a BigInt is a decimal string."""
        adapted = dict(variables)
        if self.worker_id == "BigInt" and "w" in adapted:
            adapted["w"] = str(adapted["w"])
        return adapted


DIALECTS = (
    Dialect("by_id", "storageDataObjectById", "id: $id"),
    Dialect("by_unique_input", "storageDataObjectByUniqueInput", "where: {id: $id}"),
    Dialect("by_id_bigint_worker", "storageDataObjectById", "id: $id", "BigInt"),
)


@dataclass(frozen=True, slots=True)
class Query:
    """A GraphQL query that can be rendered in each dialect."""

    operation: str  # its name
    text: str  # with `%(one_object)s`, `%(argument)s` and `%(worker_id)s` where dialects differ
    is_optional: bool = False  # without it, others serve

    def render(self, dialect: Dialect) -> str:
        return self.text % {
            "one_object": dialect.one_object,
            "argument": dialect.argument,
            "worker_id": dialect.worker_id,
        }


ONE_OBJECT = Query(
    "DataObject",
    # With the alias, the responses in all dialects have the same form.
    "query DataObject($id: String!) { object: %(one_object)s(%(argument)s) " + _OBJECT + " }",
)
MANY_OBJECTS = Query(
    "DataObjects",
    "query DataObjects($ids: [String!], $n: Int!) {"
    " objects: storageDataObjects(where: {id_in: $ids}, limit: $n) " + _OBJECT + " }",
    is_optional=True,
)
BAGS_OF_BUCKETS = Query(
    "BagsOfBuckets",
    "query BagsOfBuckets($ids: [String!]) {"
    " distributionBuckets(where: {id_in: $ids}) { id bags { bag { id } } } }",
)
BAGS_OF_WORKER = Query(
    "BagsOfWorker",
    "query BagsOfWorker($w: %(worker_id)s!) {"
    " distributionBuckets(where: {operators_some: {workerId_eq: $w, status_eq: ACTIVE}}) { id bags { bag { id } } } }",
)
BUCKETS_OF_WORKER = Query(
    "BucketsOfWorker",
    "query BucketsOfWorker($w: %(worker_id)s!) {"
    " distributionBuckets(where: {operators_some: {workerId_eq: $w, status_eq: ACTIVE}}) { id } }",
)
ALL_BAGS = Query("AllBags", "query AllBags { distributionBuckets { id bags { bag { id } } } }")
ALL_BUCKETS = Query("AllBuckets", "query AllBuckets { distributionBuckets { id } }")
OBJECTS_OF_BAGS = Query(
    "ObjectsOfBags",
    "query ObjectsOfBags($ids: [String!], $n: Int!) {"
    " storageBags(where: {id_in: $ids}, limit: $n) { id objects { id size ipfsHash " + _TYPE + " } } }",
)
_LISTED = "{ id size ipfsHash storageBag { id } " + _TYPE + " }"
_PAGE = (
    "objects: storageDataObjects("
    "where: {storageBag: {id_in: $ids}, id_gt: $after}, orderBy: id_ASC, limit: $n) " + _LISTED
)
FIRST_PAGE_OF_BAGS = Query(
    "FirstPageOfBags",
    # The bags too, since one that the squid leaves out would look like an empty one.
    "query FirstPageOfBags($ids: [String!], $bags: Int!, $after: String!, $n: Int!) {"
    " bags: storageBags(where: {id_in: $ids}, limit: $bags) { id } " + _PAGE + " }",
    is_optional=True,
)
PAGE_OF_BAGS = Query(
    "PageOfBags", "query PageOfBags($ids: [String!], $after: String!, $n: Int!) { " + _PAGE + " }"
)
ACTIVE_STORAGE = Query(
    "ActiveStorage",
    "query ActiveStorage { storageBuckets("
    'where: {operatorStatus: {isTypeOf_eq: "StorageBucketOperatorStatusActive"}})'
    " { id operatorMetadata { nodeEndpoint } } }",
)
STATUS = Query("Status", "query Status { squidStatus { height } squidVersion { version } }")


MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SquidLimits:
    """How much time and memory queries may take. Times in seconds, sizes in bytes."""

    timeout: float = 2.5  # for one query of look-ups
    list_timeout: float = 60.0  # for one query of a list
    list_batch: int = 100  # bags in one query
    list_pause: float = 1.0  # between two queries of a list
    list_page: int = 5000  # objects in one response
    max_response: int = 1 * MIB
    max_list_response: int = 16 * MIB
