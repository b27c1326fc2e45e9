"""A chain node with one call, `chain_getHeader`, over a websocket. The test squid serves it over HTTP too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve


def handle_call(raw: bytes | str, head: int) -> dict[str, Any]:
    """Return the JSON-RPC response to one call. `head`: the number of the newest block."""
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
    """A websocket server. `head` may be changed while it runs. With `hang` set, it accepts calls and never responds."""

    __test__ = False

    def __init__(self, head: int = 1_000_002) -> None:
        self.head = head
        self.hang = False
        self.calls = 0
        self.url = ""

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen for the duration of the context. Port 0: any free port."""
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
