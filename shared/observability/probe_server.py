"""The HTTP server of fetcher and evictor for GET /metrics, /healthz and /readyz.

It runs in the service's event loop, so a response of /healthz shows that the loop is alive.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence

import structlog

from distributor_node.shared.observability.metrics import render_metrics

Readiness = Callable[[], Awaitable[Sequence[str]]]
"""Returns the problems that keep the service from working. Empty: it is ready."""

_MAX_HEAD = 8 * 1024  # bytes
_TIMEOUT = 5.0  # seconds for one request
_MAX_CONNECTIONS = 64

logger = structlog.get_logger()


class ProbeServer:
    """Use it as `async with ProbeServer(host, port, readiness) as server`. Port 0: any free port."""

    def __init__(self, host: str, port: int, readiness: Readiness) -> None:
        self._host, self._port, self._readiness = host, port, readiness
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port it listens on, once it is open."""
        if self._server is None:
            raise RuntimeError("the probe server is not open")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> ProbeServer:
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=_MAX_HEAD)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= _MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            async with asyncio.timeout(_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._response_to(head))
                await writer.drain()
        except asyncio.LimitOverrunError:
            writer.write(_response(431, "text/plain", b"request head too large\n"))
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            logger.debug("probe_connection_failed", reason=type(error).__name__)
        except asyncio.CancelledError:
            # Cancelled by `__aexit__`. If it propagated, asyncio's callback would report it as an error.
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _response_to(self, head: bytes) -> bytes:
        method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in {b"GET", b"HEAD"}:
            return _response(405, "text/plain", b"GET only\n", extra="Allow: GET, HEAD\r\n")
        status, media_type, body = await self._resource(path)
        return _response(status, media_type, body, with_body=method == b"GET")

    async def _resource(self, path: bytes) -> tuple[int, str, bytes]:
        if path == b"/metrics":
            body, media_type = await asyncio.to_thread(render_metrics)
            return 200, media_type, body
        if path == b"/healthz":
            return 200, "application/json", b'{"status": "ok"}\n'
        if path == b"/readyz":
            problems = await self._problems()
            status = "not ready" if problems else "ready"
            body = json.dumps({"status": status, "problems": problems}).encode() + b"\n"
            return (503 if problems else 200), "application/json", body
        return 404, "text/plain", b"not found\n"

    async def _problems(self) -> list[str]:
        try:
            return list(await self._readiness())
        except Exception as error:
            logger.exception("readiness_check_failed")
            return [f"the readiness check failed: {type(error).__name__}"]


def _response(status: int, media_type: str, body: bytes, *, with_body: bool = True, extra: str = "") -> bytes:
    reason = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 431: "Request Header Fields Too Large"}
    head = (
        f"HTTP/1.1 {status} {reason.get(status, 'Service Unavailable')}\r\nContent-Type: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
