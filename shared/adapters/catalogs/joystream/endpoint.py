"""The GraphQL endpoint: one question in, its data out, within time and size, whatever the server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import structlog

from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, InvalidInput
from distributor_node.shared.domain.urls import parse_source_url

_KEEP_ALIVE = 4.0  # seconds; below the 5 s after which Node closes an idle connection
_PARSE_IN_THREAD = 256 * 1024  # bytes of JSON that are read in a thread: the loop must not stand still
_MAX_MESSAGE = 200

logger = structlog.get_logger()


class ResponseTooLarge(CatalogUnavailable):
    """More bytes than the question may cost; asking for less may help."""


class QueryRejected(CatalogUnavailable):
    """The server does not know a field, argument or type of the query."""


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Seconds and bytes."""

    timeout: float
    max_bytes: int


class GraphqlEndpoint:
    """Asks in the dialect that the server understood last; another one when it refuses that."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: httpx.AsyncClient | None = None
        self._dialect: Dialect = DIALECTS[0]

    async def open(self) -> None:
        """ConfigurationError for what is no http(s) URL."""
        try:
            parse_source_url(self._url)
        except InvalidInput as error:
            raise ConfigurationError(f"catalog.squid: {error}") from error
        # No bound on connections: who asks is bounded, and a contended pool of httpx can lose a place to a cancelled
        # request. No redirects, no proxy or .netrc credentials from the environment.
        context = await asyncio.to_thread(httpx.create_ssl_context)
        self._client = httpx.AsyncClient(
            verify=context,
            headers={"Accept": "application/json", "User-Agent": "distributor-node"},
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=16, keepalive_expiry=_KEEP_ALIVE
            ),
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
        """The answer's `data`. `timeout` in seconds for all of it; CatalogUnavailable for everything else."""
        try:
            async with asyncio.timeout(timeout):
                return await self._ask_in_dialects(query, variables, _Bounds(timeout, max_bytes))
        except TimeoutError as error:
            raise CatalogUnavailable(f"the squid gave no answer in {timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise CatalogUnavailable(f"the squid cannot be asked: {_describe(error)}") from error

    async def _ask_in_dialects(
        self, query: Query, variables: Mapping[str, Any], bounds: _Bounds
    ) -> dict[str, Any]:
        spoken = self._dialect
        tried: set[str] = set()
        refusal = QueryRejected("no dialect is known")
        for dialect in (spoken, *DIALECTS):
            text = query.render(dialect)
            if text in tried:
                continue
            tried.add(text)
            try:
                data = await self._ask(query.operation, text, variables, bounds)
            except QueryRejected as error:
                refusal = error
                continue
            if dialect is not spoken and self._dialect is not dialect:
                logger.info("squid_dialect_changed", dialect=dialect.name, was=spoken.name)
                self._dialect = dialect
            return data
        raise refusal

    async def _ask(
        self, operation: str, text: str, variables: Mapping[str, Any], bounds: _Bounds
    ) -> dict[str, Any]:
        body = {"operationName": operation, "query": text, "variables": dict(variables)}
        try:
            status, raw = await self._post(body, bounds)
        except httpx.RemoteProtocolError:
            # The server may close an idle connection just as it is used: asked once more, questions change nothing.
            status, raw = await self._post(body, bounds)
        document = await _read(raw, status)
        return data_of(document, status)

    async def _post(self, body: Mapping[str, Any], bounds: _Bounds) -> tuple[int, bytes]:
        if self._client is None:
            raise CatalogUnavailable("the joystream catalog is not open")
        received = bytearray()
        # Ours ends a little before the caller's time limit: the library loses a socket whose handshake is cancelled.
        limits = httpx.Timeout(bounds.timeout, connect=0.9 * bounds.timeout)
        async with self._client.stream("POST", self._url, json=body, timeout=limits) as answer:
            async for chunk in answer.aiter_bytes(64 * 1024):  # decoded: what counts is what fills the memory
                received += chunk
                if len(received) > bounds.max_bytes:
                    raise ResponseTooLarge(f"the squid's answer is larger than {bounds.max_bytes} bytes")
            return answer.status_code, bytes(received)


async def _read(raw: bytes, status: int) -> Any:
    try:
        return await asyncio.to_thread(json.loads, raw) if len(raw) > _PARSE_IN_THREAD else json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CatalogUnavailable(f"the squid answered {status} with what is no JSON") from error


def data_of(document: Any, status: int) -> dict[str, Any]:
    """The `data` of an answer without errors: half an answer is none. Raises QueryRejected, CatalogUnavailable."""
    if not isinstance(document, dict):
        raise CatalogUnavailable(f"the squid answered {status} with what is no GraphQL answer")
    errors = document.get("errors")
    if errors:
        listed = errors if isinstance(errors, list) else [errors]
        messages = "; ".join(_message(error) for error in listed[:3])
        if document.get("data") is None and any(_is_refusal(error) for error in listed):
            raise QueryRejected(f"the squid does not know the question: {messages}")
        raise CatalogUnavailable(f"the squid answered with errors: {messages}")
    data = document.get("data")
    if status != 200 or not isinstance(data, dict):
        raise CatalogUnavailable(f"the squid answered {status} without data")
    return data


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:_MAX_MESSAGE]


def _is_refusal(error: Any) -> bool:
    """As Apollo marks it, or in the words that the GraphQL libraries share."""
    extensions = error.get("extensions") if isinstance(error, dict) else None
    if isinstance(extensions, dict) and extensions.get("code") == "GRAPHQL_VALIDATION_FAILED":
        return True
    return _message(error).startswith(
        ("Cannot query field", "Unknown argument", "Unknown type", "Variable ", "Field ", "Unknown field")
    )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:_MAX_MESSAGE]


# The questions to the squid, in the words of each generation of servers.
#
# Servers differ in two things: the name of the query for one object (`storageDataObjectById`, once
# `storageDataObjectByUniqueInput`), and the type of ids in their inputs (`String`, once `ID`). A server refuses a
# question in the wrong words when it validates it, before anything is looked up.

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
    """One generation of servers. `one_object`: the field for one object, its argument over `$id`; `id_type`: of ids."""

    name: str
    one_object: str
    argument: str
    id_type: str


DIALECTS = (
    Dialect("by_id", "storageDataObjectById", "id: $id", "String"),
    Dialect("by_unique_input", "storageDataObjectByUniqueInput", "where: {id: $id}", "String"),
    Dialect("by_unique_input_id", "storageDataObjectByUniqueInput", "where: {id: $id}", "ID"),
)


@dataclass(frozen=True, slots=True)
class Query:
    """`text` may hold `%(one_object)s`, `%(argument)s` and `%(id_type)s` of a dialect; `operation` is its name."""

    operation: str
    text: str

    def render(self, dialect: Dialect) -> str:
        return self.text % {
            "one_object": dialect.one_object,
            "argument": dialect.argument,
            "id_type": dialect.id_type,
        }


ONE_OBJECT = Query(
    "DataObject",
    # The alias makes the answers of all servers alike.
    "query DataObject($id: %(id_type)s!) { object: %(one_object)s(%(argument)s) " + _OBJECT + " }",
)
BAGS_OF_BUCKETS = Query(
    "BagsOfBuckets",
    "query BagsOfBuckets($ids: [%(id_type)s!]) {"
    " distributionBuckets(where: {id_in: $ids}) { id bags { bag { id } } } }",
)
BAGS_OF_WORKER = Query(
    "BagsOfWorker",
    "query BagsOfWorker($w: Int!) {"
    " distributionBuckets(where: {operators_some: {workerId_eq: $w, status_eq: ACTIVE}}) { id bags { bag { id } } } }",
)
ALL_BAGS = Query("AllBags", "query AllBags { distributionBuckets { id bags { bag { id } } } }")
ALL_BUCKETS = Query("AllBuckets", "query AllBuckets { distributionBuckets { id } }")
OBJECTS_OF_BAGS = Query(
    "ObjectsOfBags",
    "query ObjectsOfBags($ids: [%(id_type)s!], $n: Int!) {"
    " storageBags(where: {id_in: $ids}, limit: $n) { id objects { id size ipfsHash " + _TYPE + " } } }",
)
ACTIVE_STORAGE = Query(
    "ActiveStorage",
    "query ActiveStorage { storageBuckets("
    'where: {operatorStatus: {isTypeOf_eq: "StorageBucketOperatorStatusActive"}})'
    " { id operatorMetadata { nodeEndpoint } } }",
)
STATUS = Query("Status", "query Status { squidStatus { height } squidVersion { version } }")


# How much of a squid's time and talk is taken.

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SquidLimits:
    """`timeout`: seconds for one look-up; `list_timeout`: for one batch of a list; `list_batch`: bags in one question;
    `list_pause`: seconds between two; sizes in bytes."""

    timeout: float = 2.5
    list_timeout: float = 60.0
    list_batch: int = 100
    list_pause: float = 1.0
    max_answer: int = 1 * MIB
    max_list_answer: int = 16 * MIB
