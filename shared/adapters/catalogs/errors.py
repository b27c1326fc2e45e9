"""Failed requests to catalog servers, raised as CatalogUnavailable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from websockets.exceptions import WebSocketException

from distributor_node.shared.domain.errors import CatalogUnavailable

_MAX_REASON = 200  # characters of a library's message that are kept


@asynccontextmanager
async def map_catalog_errors(server: str, timeout: float) -> AsyncIterator[None]:
    """Limit the block to `timeout` seconds, and raise CatalogUnavailable for every failure of the request.

    The libraries' exceptions are chained. `server` begins the message, such as `the squid`.
    """
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError as error:
        raise CatalogUnavailable(f"{server} did not respond within {timeout:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, WebSocketException, OSError) as error:
        reason = f"{type(error).__name__} {error}".strip()[:_MAX_REASON]
        raise CatalogUnavailable(f"{server} cannot be reached: {reason}") from error
