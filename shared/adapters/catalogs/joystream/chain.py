"""The chain's head by JSON-RPC (`chain_getHeader`), over HTTP or a websocket."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from distributor_node.shared.domain.errors import CatalogUnavailable

_REQUEST = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "chain_getHeader", "params": []})
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}", re.ASCII)
_MAX_ANSWER = 256 * 1024
_MAX_MESSAGES = 10
_RETRY_AFTER = 2.0


class ChainHead:
    """The number of the newest block, asked at most once each `ttl` seconds. A connection is made for each question,
    and closed after it."""

    def __init__(
        self, url: str, timeout: float, ttl: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`url`: http(s) or ws(s); `timeout` in seconds for one question, connecting included."""
        self._url = url
        self._timeout = timeout
        self._ttl = ttl
        self._clock = clock
        self._lock = asyncio.Lock()
        self._head: int | None = None
        self._ask_again_at = float("-inf")

    async def head(self) -> int:
        """CatalogUnavailable if the chain's node gives no answer in time; asked again after 2 s at the earliest."""
        async with self._lock:
            if self._clock() < self._ask_again_at:
                if self._head is None:
                    raise CatalogUnavailable("the chain's node gave no answer a moment ago")
                return self._head
            self._head, self._ask_again_at = None, self._clock() + _RETRY_AFTER
            self._head = await self._ask()
            self._ask_again_at = self._clock() + self._ttl
            return self._head

    async def _ask(self) -> int:
        over_websocket = self._url.startswith(("ws://", "wss://"))
        try:
            async with asyncio.timeout(self._timeout):
                answer = await (self._over_websocket() if over_websocket else self._over_http())
            number = answer["result"]["number"]
            if not isinstance(number, str) or not _NUMBER.fullmatch(number):
                raise ValueError("no block number")
            return int(number, 16)
        except TimeoutError as error:
            raise CatalogUnavailable(f"the chain's node gave no answer in {self._timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, WebSocketException, OSError) as error:
            raise CatalogUnavailable(f"the chain's node cannot be asked: {type(error).__name__}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CatalogUnavailable("the chain's node answered with what is no header") from error

    async def _over_http(self) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "distributor-node"}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=self._timeout, follow_redirects=False) as client,
            client.stream("POST", self._url, content=_REQUEST, headers=headers) as answer,
        ):
            received = bytearray()
            async for chunk in answer.aiter_bytes():
                received += chunk
                if len(received) > _MAX_ANSWER:
                    raise ValueError("too large")
            return json.loads(received)

    async def _over_websocket(self) -> Any:
        async with connect(
            self._url,
            proxy=None,
            compression=None,
            max_size=_MAX_ANSWER,
            open_timeout=None,
            close_timeout=0.5,
            ping_interval=None,
        ) as socket:
            await socket.send(_REQUEST)
            for _ in range(_MAX_MESSAGES):
                answer = json.loads(await socket.recv())
                if isinstance(answer, dict) and answer.get("id") == 1:
                    return answer
        raise ValueError("no answer among the messages")
