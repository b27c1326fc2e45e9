"""The number of the chain's newest block, by JSON-RPC (`chain_getHeader`) over HTTP or a websocket."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from distributor_node.shared.adapters.catalogs.documents import map_catalog_errors
from distributor_node.shared.adapters.sources.connections import BoundedTransport
from distributor_node.shared.adapters.sources.network import SourceNetwork, make_tls_context
from distributor_node.shared.domain.errors import CatalogUnavailable

_REQUEST = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "chain_getHeader", "params": []})
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}", re.ASCII)
_MAX_RESPONSE = 256 * 1024
_MAX_WEBSOCKET = 32 * 1024  # bytes, of all frames and the handshake; a block header has about 1 KiB
_SLICE = 512  # bytes of frames that are parsed before other tasks run; a frame has 2 or more
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
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "distributor-node",
        }
        transport = BoundedTransport(await make_tls_context(), 0, SourceNetwork())
        async with (
            httpx.AsyncClient(
                transport=transport, trust_env=False, timeout=self._timeout, follow_redirects=False
            ) as client,
            client.stream("POST", self._url, content=_REQUEST, headers=headers) as response,
        ):
            received = bytearray()
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > _MAX_RESPONSE:
                    raise ValueError(f"more than {_MAX_RESPONSE} bytes")
            return json.loads(received)

    async def _over_websocket(self) -> Any:
        async with connect(
            self._url,
            create_connection=_BoundedConnection,
            proxy=None,
            compression=None,
            max_size=_MAX_WEBSOCKET,
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


class _BoundedConnection(ClientConnection):
    """A connection that ends after `_MAX_WEBSOCKET` bytes, and parses little at a time.

    The library parses all frames of one read, 256 KiB, without returning to the event loop: up to 131,072 pings.
    """

    _received = 0
    _unparsed = b""

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._received += len(data)
        if self._received > _MAX_WEBSOCKET:
            self._unparsed = b""
            self.transport.abort()
            return
        if not self._unparsed:
            self.loop.call_soon(self._parse)
        self._unparsed += data

    def eof_received(self) -> None:
        """Called by the event loop."""
        while self._unparsed:
            self._parse()
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._unparsed = b""
        super().connection_lost(exc)

    def _parse(self) -> None:
        data, self._unparsed = self._unparsed[:_SLICE], self._unparsed[_SLICE:]
        if data:
            super().data_received(data)
        if self._unparsed:
            self.loop.call_soon(self._parse)
