"""The origin catalog: any HTTP server. An object is what the response to a HEAD of its URL describes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal

import httpx

from distributor_node.shared.adapters.catalogs.documents import map_catalog_errors
from distributor_node.shared.adapters.sources.connections import Connections, SourceLimits
from distributor_node.shared.domain.conditionals import ByteRange, Validators, parse_content_range
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    ConfigurationError,
    InvalidInput,
    ObjectUnavailable,
    SourceError,
    SourceWrong,
    TooManyOpenFiles,
)
from distributor_node.shared.domain.http_caching import why_not_stored
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.domain.urls import parse_source_url, url_origin
from distributor_node.shared.ports.catalog import CatalogStatus, LookupAnswers

_PLACEHOLDER = "{id}"
_MAX_CONNECTIONS = 256  # CachedCatalog allows fewer look-ups at once
_FIRST_BYTE = ByteRange(0, 0)
_ABSENT = frozenset({404, 410})
_REFUSED = frozenset({401, 403, 451})  # of one object: no reason to believe that the others cannot be had
_OVERLOADED = frozenset({429, 502, 503, 504})


class OriginCatalog:
    """Cannot list objects, and knows neither buckets nor hashes. An object's only source is its URL."""

    def __init__(
        self,
        template: str,
        timeout: float,
        *,
        follow_to_other_hosts: bool = True,
        refuse_private: bool = False,
    ) -> None:
        """`template`: http(s) URL with `{id}` in it. `timeout`: seconds for one look-up, redirects included.

        `follow_to_other_hosts`: whether a redirect may lead to another host. `refuse_private`: an origin, or what it
        redirects to, at an address that is not public cannot be reached.
        """
        self._template = template
        self._timeout = timeout
        self._connections = Connections(
            SourceLimits(
                connect_timeout=timeout,
                first_byte_timeout=timeout,
                max_connections=_MAX_CONNECTIONS,
                follow_to_other_hosts=follow_to_other_hosts,
                refuse_private=refuse_private,
            )
        )

    @property
    def can_list(self) -> bool:
        return False

    @property
    def public_url(self) -> str:
        return url_origin(self._template)

    @property
    def lookups_fail(self) -> bool:
        return False

    def sources_of(self, object_id: ObjectId) -> Sequence[str]:
        return (self._url_of(object_id),) if object_id.path != object_id or not object_id.is_digest else ()

    async def open(self) -> None:
        """Raise ConfigurationError if the template does not make valid URLs."""
        try:
            if _PLACEHOLDER not in self._template:
                raise InvalidInput("expected {id} in the URL")
            parse_source_url(self._url_of(ObjectId("0")))
        except InvalidInput as error:
            raise ConfigurationError(f"catalog.origin: {error}") from error
        await self._connections.open()

    async def close(self) -> None:
        await self._connections.close()

    def can_have(self, object_id: ObjectId) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return 1

    async def look_up_batch(self, object_ids: Sequence[ObjectId]) -> LookupAnswers:
        return {object_id: await self.look_up(object_id) for object_id in object_ids}

    async def look_up(self, object_id: ObjectId, client: str | None = None) -> MediaObject | None:
        async with map_catalog_errors("the origin", self._timeout):
            return await self._describe(object_id)

    async def forget(self, outdated: MediaObject) -> None:
        """Nothing is remembered here."""

    async def forget_object(self, object_id: ObjectId) -> None:
        """Nothing is remembered here."""

    def list_objects(self, assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        raise CatalogUnavailable("an origin cannot list its objects")

    async def bucket_ids(self, worker_id: int | None = None) -> Sequence[str]:
        return ()

    async def source_bases(self) -> Sequence[str]:
        return ()

    async def status(self) -> CatalogStatus:
        return CatalogStatus()

    async def chain_head(self) -> int | None:
        return None

    def _url_of(self, object_id: ObjectId) -> str:
        return self._template.replace(_PLACEHOLDER, object_id.path)

    async def _describe(self, object_id: ObjectId) -> MediaObject | None:
        if not self.sources_of(object_id):
            raise ObjectUnavailable("the digest does not tell at which path the origin has the object")
        url = self._url_of(object_id)
        response = await self._request("HEAD", url)
        if response.status_code in _ABSENT:
            return None
        if response.status_code >= 500 and response.status_code != 501:
            raise _unusable(response.status_code)
        size = _stated_size(response)
        if response.status_code != 200 or not size:
            # Some servers do not support HEAD, or do not state the length in its response, or state that it is 0.
            # For the last, the whole object is requested: some respond 500 to a range of an empty object.
            response = await self._request("GET", url, ranged=response.status_code != 200 or size is None)
            if response.status_code in _ABSENT or response.status_code in _REFUSED:
                return None
            size = _size_from_get(response)
        return MediaObject(
            object_id=object_id,
            size=size,
            media_type=media_type_or_none(response.headers.get("Content-Type")),
            sources=(url,),  # not what it redirects to: such a URL may be valid for seconds
            validators=Validators.from_headers(response.headers),
            not_stored=_why_not_stored(response),
            name=object_id.path if object_id.is_digest else None,
        )

    async def _request(
        self, method: Literal["GET", "HEAD"], url: str, *, ranged: bool = False
    ) -> httpx.Response:
        """Return the head of the response, after redirects."""
        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "distributor-node"}
        if ranged:
            headers["Range"] = str(_FIRST_BYTE)
        try:
            # Closed without reading: a server that ignores Range must not send the whole object.
            async with self._connections.request(url, headers, method) as response:
                return response
        except SourceWrong as error:
            raise ObjectUnavailable(f"the origin's response is unusable: {error}") from error
        except TooManyOpenFiles as error:
            raise CatalogUnavailable(str(error)) from error
        except SourceError as error:
            raise CatalogUnavailable(f"the origin cannot be reached: {error}") from error


def _why_not_stored(response: httpx.Response) -> str | None:
    """Return why the object must not be stored; of a range, what its 200 would say."""
    if _encoded(response):
        return f"Content-Encoding: {response.headers['Content-Encoding'][:20]}"
    return why_not_stored(200, response.headers)


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
    raise _unusable(response.status_code)


def _unusable(status: int) -> CatalogUnavailable:
    """Return the error of a status that tells nothing of the object. Only some tell of the whole origin."""
    kind = CatalogUnavailable if status in _OVERLOADED else ObjectUnavailable
    return kind(f"the origin responded {status}")
