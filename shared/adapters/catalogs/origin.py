"""The catalog that is any HTTP server: an object is what a HEAD of its URL says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from urllib.parse import quote, urljoin, urlsplit

import httpx

from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, InvalidInput
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId
from distributor_node.shared.domain.ranges import ByteRange, parse_content_range
from distributor_node.shared.domain.urls import parse_source_url, url_origin
from distributor_node.shared.ports.catalog import CatalogStatus

_PLACEHOLDER = "{id}"
_MAX_REDIRECTS = 3
_MAX_VALIDATOR = 1024
_KEEP_ALIVE = 4.0  # seconds; below the 5 s after which many servers close an idle connection
_FIRST_BYTE = ByteRange(0, 0)
_ABSENT = frozenset({404, 410})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class OriginCatalog:
    """Cannot list, knows no buckets and no hashes; an object's one source is its URL."""

    def __init__(self, template: str, timeout: float) -> None:
        """`template`: http(s) URL with `{id}`; `timeout`: seconds for one look-up, redirects included."""
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
        """ConfigurationError if the template cannot give URLs."""
        try:
            if _PLACEHOLDER not in self._template:
                raise InvalidInput("want {id} in it")
            parse_source_url(self._url_of(ObjectId("0")))
        except InvalidInput as error:
            raise ConfigurationError(f"catalog.origin: {error}") from error
        # No bound on connections here: the questions are bounded by whoever asks, and a contended pool of httpx can
        # lose a slot to a cancelled request. Nothing is taken from the environment: no proxy, no .netrc credentials.
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", "User-Agent": "distributor-node"},
            timeout=self._timeout,
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=32, keepalive_expiry=_KEEP_ALIVE
            ),
            trust_env=False,
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._ask(object_id)
        except TimeoutError as error:
            raise CatalogUnavailable(f"the origin gave no answer in {self._timeout:g} s") from error
        except httpx.HTTPError as error:
            raise CatalogUnavailable(f"the origin cannot be asked: {type(error).__name__}") from error

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

    async def _ask(self, object_id: ObjectId) -> MediaObject | None:
        url, answer = await self._request("HEAD", self._url_of(object_id))
        if answer.status_code in _ABSENT:
            return None
        if answer.status_code >= 500 and answer.status_code != 501:
            raise CatalogUnavailable(f"the origin answered {answer.status_code}")
        size = _whole_size(answer)
        if answer.status_code != 200 or size is None:
            # Some servers know no HEAD, or leave the length out of it.
            url, answer = await self._request("GET", self._url_of(object_id))
            if answer.status_code in _ABSENT:
                return None
            size = _size_from_get(answer)
        return MediaObject(
            object_id=object_id,
            size=size,
            media_type=media_type_or_none(answer.headers.get("Content-Type")),
            sources=(url,),
            validator=_validator(answer),
        )

    async def _request(self, method: str, url: str) -> tuple[str, httpx.Response]:
        """The answer's head, and the URL that gave it after redirects within the same origin."""
        if self._client is None:
            raise CatalogUnavailable("the origin catalog is not open")
        headers = {"Range": str(_FIRST_BYTE)} if method == "GET" else {}
        for _ in range(_MAX_REDIRECTS + 1):
            # Streamed and closed unread: a server that ignores Range must not send us the whole object.
            async with self._client.stream(method, url, headers=headers) as answer:
                if answer.status_code not in _REDIRECTS:
                    return url, answer
                url = _redirect_target(url, answer.headers.get("Location", ""))
        raise CatalogUnavailable("the origin redirects without end")


def _redirect_target(url: str, location: str) -> str:
    try:
        target = parse_source_url(urljoin(url, location))
    except (InvalidInput, ValueError) as error:
        raise CatalogUnavailable("the origin redirects to what is no URL") from error
    # Anything else would let the origin make this node ask servers that its operator never named.
    if _origin_of(target) != _origin_of(url):
        raise CatalogUnavailable("the origin redirects to another origin")
    return target


def _origin_of(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _whole_size(answer: httpx.Response) -> int | None:
    """Content-Length, where it is the length of the object itself."""
    length = answer.headers.get("Content-Length", "").strip()
    if _encoded(answer) or not (length.isascii() and length.isdigit()) or len(length) > 18:
        return None
    return int(length)


def _encoded(answer: httpx.Response) -> bool:
    """Compressed although we asked for it not to be: lengths say nothing of the object then."""
    return bool(answer.headers.get("Content-Encoding", "identity").strip().lower() != "identity")


def _size_from_get(answer: httpx.Response) -> int | None:
    if answer.status_code == 206:
        stated = parse_content_range(answer.headers.get("Content-Range", ""))
        return stated[1] if stated is not None and not _encoded(answer) else None
    if answer.status_code == 200:
        return _whole_size(answer)
    if answer.status_code == 416 and answer.headers.get("Content-Range", "").strip() == "bytes */0":
        return 0
    raise CatalogUnavailable(f"the origin answered {answer.status_code}")


def _validator(answer: httpx.Response) -> str | None:
    """A strong ETag, else a weak one, else the date: whatever changes with the content."""
    etag, modified = answer.headers.get("ETag", "").strip(), answer.headers.get("Last-Modified", "").strip()
    chosen = etag or modified
    return chosen[:_MAX_VALIDATOR] or None
