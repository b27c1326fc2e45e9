"""A node of the chain, as far as anybody asks it here: `chain_getHeader` over a websocket (and, at the squid, HTTP)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve


def handle_call(raw: bytes | str, head: int) -> dict[str, Any]:
    """The JSON-RPC answer to one call; `head`: the number of the newest block."""
    try:
        call = json.loads(raw)
        method, call_id = call["method"], call.get("id")
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Invalid request"}}
    if method != "chain_getHeader":
        return {"jsonrpc": "2.0", "id": call_id, "error": {"code": -32601, "message": "Method not found"}}
    zeros = "0x" + "0" * 64
    header = {"parentHash": zeros, "number": hex(head), "stateRoot": zeros, "extrinsicsRoot": zeros}
    return {"jsonrpc": "2.0", "id": call_id, "result": header | {"digest": {"logs": []}}}


class TestChain:
    """Over a websocket. `head` may be changed while it runs; with `hang` set it takes calls and never answers."""

    __test__ = False

    def __init__(self, head: int = 1_000_002) -> None:
        self.head = head
        self.hang = False
        self.calls = 0
        self.url = ""

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen while the context lasts; port 0 takes a free one."""
        async with serve(self._serve_connection, host, port, close_timeout=0.5) as server:
            chosen = next(iter(server.sockets)).getsockname()[1]
            self.url = f"ws://{host}:{chosen}"
            yield self

    async def _serve_connection(self, connection: ServerConnection) -> None:
        async for message in connection:
            self.calls += 1
            if self.hang:
                await connection.wait_closed()
                return
            await connection.send(json.dumps(handle_call(message, self.head)))
            await asyncio.sleep(0)
