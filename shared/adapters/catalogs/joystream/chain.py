"""The number of the chain's newest block, by JSON-RPC (`chain_getHeader`) over HTTP or a websocket."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
from websockets.asyncio.client import connect

from distributor_node.shared.adapters.catalogs.errors import map_catalog_errors
from distributor_node.shared.domain.errors import CatalogUnavailable

_REQUEST = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "chain_getHeader", "params": []})
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}", re.ASCII)
_MAX_RESPONSE = 256 * 1024
_MAX_MESSAGES = 10  # messages of a websocket that are read to find the response
_RETRY_AFTER = 2.0  # seconds between two queries after a failure


class ChainHead:
    """Asks for the newest block at most once in `ttl` seconds. Each query has a connection of its own."""

    def __init__(
        self, url: str, timeout: float, ttl: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`url`: http(s) or ws(s). `timeout`: seconds for one query, including the connection. `clock`: in seconds."""
        self._url = url
        self._timeout = timeout
        self._ttl = ttl
        self._clock = clock
        self._lock = asyncio.Lock()
        self._head: int | None = None
        self._ask_again_at = float("-inf")

    async def head(self) -> int:
        """Return the block number. Raises CatalogUnavailable if the query fails; the next one is 2 s later."""
        async with self._lock:
            if self._clock() < self._ask_again_at:
                if self._head is None:
                    raise CatalogUnavailable("the chain node failed a moment ago")
                return self._head
            self._head, self._ask_again_at = None, self._clock() + _RETRY_AFTER
            self._head = await self._ask()
            self._ask_again_at = self._clock() + self._ttl
            return self._head

    async def _ask(self) -> int:
        over_websocket = self._url.startswith(("ws://", "wss://"))
        try:
            async with map_catalog_errors("the chain node", self._timeout):
                response = await (self._over_websocket() if over_websocket else self._over_http())
            number = response["result"]["number"]
            if not isinstance(number, str) or not _NUMBER.fullmatch(number):
                raise ValueError("expected a block number in hexadecimal digits")
            return int(number, 16)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CatalogUnavailable("the chain node's response is not a block header") from error

    async def _over_http(self) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "distributor-node"}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=self._timeout, follow_redirects=False) as client,
            client.stream("POST", self._url, content=_REQUEST, headers=headers) as response,
        ):
            received = bytearray()
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > _MAX_RESPONSE:
                    raise ValueError(f"more than {_MAX_RESPONSE} bytes")
            return json.loads(received)

    async def _over_websocket(self) -> Any:
        async with connect(
            self._url,
            proxy=None,
            compression=None,
            max_size=_MAX_RESPONSE,
            open_timeout=None,
            close_timeout=0.5,
            ping_interval=None,
        ) as socket:
            await socket.send(_REQUEST)
            for _ in range(_MAX_MESSAGES):
                message = json.loads(await socket.recv())
                if isinstance(message, dict) and message.get("id") == 1:
                    return message
        raise ValueError(f"no response among {_MAX_MESSAGES} messages")
