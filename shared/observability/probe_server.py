"""The HTTP server of each service for GET /metrics, /healthz and /readyz.

It runs in the service's event loop, so a response of /healthz shows that the loop is alive. It imports no metrics,
because the supervisor of several workers needs it too (see multiprocess.py).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import structlog

from distributor_node.shared.domain.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a service can work, in words."""

    problems: tuple[str, ...] = ()
    """What keeps it from working; nothing: it is ready."""
    degraded: tuple[str, ...] = ()
    """What it works without."""


@dataclass(frozen=True, slots=True)
class Probes:
    """How a service answers."""

    readiness: Callable[[], Awaitable[Readiness]]
    metrics: Callable[[], Awaitable[tuple[bytes, str]]]
    """The metrics and their media type."""
    liveness: Callable[[], Awaitable[Sequence[str]]] | None = None
    """What is wrong with other processes that this one answers for. Default: nothing, since it answers."""
    openmetrics: Callable[[], Awaitable[tuple[bytes, str]]] | None = None
    """The metrics with exemplars, for a scraper that accepts OpenMetrics. Default: it gets the usual ones."""


def ready_without(problems: Callable[[], Awaitable[Sequence[str]]]) -> Callable[[], Awaitable[Readiness]]:
    """The readiness of a service that only knows its problems."""

    async def readiness() -> Readiness:
        return Readiness(tuple(await problems()))

    return readiness


_MAX_HEAD = 8 * 1024  # bytes
_TIMEOUT = 5.0  # seconds to read a request's head, and again to answer a probe
_OPENMETRICS = b"application/openmetrics-text"
_MAX_CONNECTIONS = 64

logger = structlog.get_logger()


class HttpConnections:
    """The connections of a small HTTP server. Each brings one request; its head is limited in size and time."""

    def __init__(
        self,
        respond: Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
        most: int,
    ) -> None:
        """`respond`: gets the head, and writes the response. `most`: connections; further ones are closed."""
        self._respond, self._most = respond, most
        self._open: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Raises OSError, or UnicodeError for what is not a host's name at all."""
        return await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD)

    async def listen_on_path(self, path: Path) -> asyncio.Server:
        """As `listen`, on a Unix socket."""
        return await asyncio.start_unix_server(self._serve, path, limit=_MAX_HEAD)

    async def close(self) -> None:
        """Close all that are open. Close the server first."""
        for connection in self._open:
            connection.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._open) >= self._most:
            writer.close()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
            await self._respond(head, reader, writer)
        except asyncio.LimitOverrunError:
            writer.write(http_response(431, "text/plain", b"request head too large\n"))
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            logger.debug("http_connection_failed", reason=type(error).__name__)
        except asyncio.CancelledError:
            # Cancelled by `close`. If it propagated, asyncio's callback would report it as an error.
            writer.transport.abort()
        finally:
            self._open.discard(task)
            writer.close()


class ProbeServer:
    """Use it as `async with ProbeServer(host, port, probes) as server`. Port 0: any free port.

    With `path` it listens on a Unix socket instead.
    """

    def __init__(self, host: str, port: int, probes: Probes, *, path: Path | None = None) -> None:
        self._host, self._port, self._path, self._probes = host, port, path, probes
        self._server: asyncio.Server | None = None
        self._connections = HttpConnections(self._respond, _MAX_CONNECTIONS)

    @property
    def port(self) -> int:
        """The port it listens on, once it is open."""
        if self._server is None:
            raise RuntimeError("the probe server is not open")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> ProbeServer:
        """Listen; ConfigurationError if the port is taken."""
        if self._path is not None:
            self._server = await self._connections.listen_on_path(self._path)
            return self
        try:
            self._server = await self._connections.listen(self._host, self._port)
        except (OSError, UnicodeError) as error:
            number = error.errno if isinstance(error, OSError) else None
            reason = os.strerror(number) if number and number > 0 else str(error)
            raise ConfigurationError(
                f"metrics.host, metrics.port: cannot listen on {self._host}:{self._port}: {reason}"
            ) from error
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._server is not None:
            self._server.close()
        await self._connections.close()

    async def _respond(
        self, head: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        async with asyncio.timeout(_TIMEOUT):
            writer.write(await self._response_to(head))
            await writer.drain()

    async def _response_to(self, head: bytes) -> bytes:
        method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in {b"GET", b"HEAD"}:
            return http_response(405, "text/plain", b"GET only\n", extra="Allow: GET, HEAD\r\n")
        status, media_type, body = await self._resource(path, openmetrics=_OPENMETRICS in head.lower())
        return http_response(status, media_type, body, with_body=method == b"GET")

    async def _resource(self, path: bytes, *, openmetrics: bool) -> tuple[int, str, bytes]:
        try:
            if path == b"/metrics":
                metrics = (openmetrics and self._probes.openmetrics) or self._probes.metrics
                body, media_type = await metrics()
                return 200, media_type, body
            if path == b"/healthz":
                return await self._liveness()
            if path == b"/readyz":
                return await self._readiness()
        except OSError as error:
            logger.warning("probe_failed", path=path.decode(), reason=str(error))
            return _report(f"{path.decode()[1:]} failed: {str(error) or type(error).__name__}")
        except Exception as error:
            logger.exception("probe_failed", path=path.decode())
            return _report(f"{path.decode()[1:]} failed: {type(error).__name__}")
        return 404, "text/plain", b"not found\n"

    async def _liveness(self) -> tuple[int, str, bytes]:
        problems = () if self._probes.liveness is None else await self._probes.liveness()
        if problems:
            return _report(*problems)
        return 200, "application/json", b'{"status": "ok"}\n'

    async def _readiness(self) -> tuple[int, str, bytes]:
        readiness = await self._probes.readiness()
        if readiness.problems:
            return _report(*readiness.problems, degraded=readiness.degraded)
        body = {"status": "ready", "problems": [], "degraded": readiness.degraded}
        return 200, "application/json", json.dumps(body).encode() + b"\n"


def _report(*problems: str, degraded: Sequence[str] = ()) -> tuple[int, str, bytes]:
    body = {"status": "not ready", "problems": problems, "degraded": degraded}
    return 503, "application/json", json.dumps(body).encode() + b"\n"


def http_response(
    status: int, media_type: str, body: bytes, *, with_body: bool = True, extra: str = ""
) -> bytes:
    """Return a whole response, after which the connection is closed. `extra`: more header lines."""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
