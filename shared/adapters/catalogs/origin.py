"""The origin catalog: any HTTP server. An object is what the response to a HEAD of its URL describes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from urllib.parse import quote, urljoin, urlsplit

import httpx

from distributor_node.shared.adapters.catalogs.errors import map_catalog_errors
from distributor_node.shared.adapters.sources.network import SourceNetwork
from distributor_node.shared.adapters.sources.transport import BoundedTransport
from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, InvalidInput
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.domain.ranges import ByteRange, parse_content_range
from distributor_node.shared.domain.urls import parse_source_url, url_origin
from distributor_node.shared.ports.catalog import CatalogStatus

_PLACEHOLDER = "{id}"
_MAX_REDIRECTS = 3
_MAX_VALIDATOR = 1024
_FIRST_BYTE = ByteRange(0, 0)
_ABSENT = frozenset({404, 410})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class OriginCatalog:
    """Cannot list objects, and knows neither buckets nor hashes. An object's only source is its URL."""

    def __init__(self, template: str, timeout: float) -> None:
        """`template`: http(s) URL with `{id}` in it. `timeout`: seconds for one look-up, redirects included."""
        self._template = template
        self._timeout = timeout
        self._client: httpx.AsyncClient | None = None

    @property
    def can_list(self) -> bool:
        return False

    @property
    def public_url(self) -> str:
        return url_origin(self._template)

    async def open(self) -> None:
        """Raise ConfigurationError if the template does not make valid URLs."""
        try:
            if _PLACEHOLDER not in self._template:
                raise InvalidInput("expected {id} in the URL")
            parse_source_url(self._url_of(ObjectId("0")))
        except InvalidInput as error:
            raise ConfigurationError(f"catalog.origin: {error}") from error
        # No limit on connections here: CachedCatalog limits the requests, and a contended pool of httpx can lose a slot
        # when a request is cancelled. Nothing is taken from the environment: no proxy, no .netrc credentials.
        context = await asyncio.to_thread(httpx.create_ssl_context)
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", "User-Agent": "distributor-node"},
            timeout=self._timeout,
            transport=BoundedTransport(context, 32, SourceNetwork()),
            trust_env=False,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        async with map_catalog_errors("the origin", self._timeout):
            return await self._describe(object_id)

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        raise CatalogUnavailable("an origin cannot list its objects")

    async def bucket_ids(self) -> Sequence[str]:
        return ()

    async def source_bases(self) -> Sequence[str]:
        return ()

    async def status(self) -> CatalogStatus:
        return CatalogStatus()

    async def chain_head(self) -> int | None:
        return None

    def _url_of(self, object_id: ObjectId) -> str:
        return self._template.replace(_PLACEHOLDER, quote(object_id, safe=""))

    async def _describe(self, object_id: ObjectId) -> MediaObject | None:
        url, response = await self._request("HEAD", self._url_of(object_id))
        if response.status_code in _ABSENT:
            return None
        if response.status_code >= 500 and response.status_code != 501:
            raise CatalogUnavailable(f"the origin responded {response.status_code}")
        size = _stated_size(response)
        if response.status_code != 200 or size is None:
            # Some servers do not support HEAD, or do not state the length in its response.
            url, response = await self._request("GET", self._url_of(object_id))
            if response.status_code in _ABSENT:
                return None
            size = _size_from_get(response)
        return MediaObject(
            object_id=object_id,
            size=size,
            media_type=media_type_or_none(response.headers.get("Content-Type")),
            sources=(url,),
            validator=_validator(response),
        )

    async def _request(self, method: str, url: str) -> tuple[str, httpx.Response]:
        """Return the URL that responded, after redirects within the same origin, and the head of its response."""
        if self._client is None:
            raise CatalogUnavailable("the origin catalog is not open")
        headers = {"Range": str(_FIRST_BYTE)} if method == "GET" else {}
        for _ in range(_MAX_REDIRECTS + 1):
            # Streamed, and closed without reading: a server that ignores Range must not send the whole object.
            async with self._client.stream(method, url, headers=headers) as response:
                if response.status_code not in _REDIRECTS:
                    return url, response
                url = _redirect_target(url, response.headers.get("Location", ""))
        raise CatalogUnavailable(f"the origin redirects more than {_MAX_REDIRECTS} times")


def _redirect_target(url: str, location: str) -> str:
    try:
        target = parse_source_url(urljoin(url, location))
    except (InvalidInput, ValueError) as error:
        raise CatalogUnavailable("the origin redirects to an invalid URL") from error
    # Otherwise the origin could make this node send requests to servers that its operator has not configured.
    if _origin_of(target) != _origin_of(url):
        raise CatalogUnavailable("the origin redirects to another origin")
    return target


def _origin_of(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _stated_size(response: httpx.Response) -> int | None:
    """Return Content-Length if it is the length of the object itself."""
    length = response.headers.get("Content-Length", "").strip()
    if _encoded(response) or not (length.isascii() and length.isdigit()) or len(length) > 18:
        return None
    return int(length)


def _encoded(response: httpx.Response) -> bool:
    """Whether the body is compressed, although we asked for identity: then lengths are not those of the object."""
    return bool(response.headers.get("Content-Encoding", "identity").strip().lower() != "identity")


def _size_from_get(response: httpx.Response) -> int | None:
    if response.status_code == 206:
        stated = parse_content_range(response.headers.get("Content-Range", ""))
        return stated[1] if stated is not None and not _encoded(response) else None
    if response.status_code == 200:
        return _stated_size(response)
    if response.status_code == 416 and response.headers.get("Content-Range", "").strip() == "bytes */0":
        return 0
    raise CatalogUnavailable(f"the origin responded {response.status_code}")


def _validator(response: httpx.Response) -> str | None:
    """Return what changes with the content: the ETag, strong or weak, or else the date."""
    etag, modified = (
        response.headers.get("ETag", "").strip(),
        response.headers.get("Last-Modified", "").strip(),
    )
    chosen = etag or modified
    return chosen[:_MAX_VALIDATOR] or None
