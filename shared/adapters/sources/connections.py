"""How long a source may take, and how many answers are read at once."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

from distributor_node.shared.adapters.sources.network import SourceNetwork
from distributor_node.shared.domain.errors import (
    ConfigurationError,
    SourceError,
    SourceTooSlow,
    SourceUnreachable,
)
from distributor_node.shared.domain.urls import is_public


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """Times in seconds of waiting for the source, `minimum_rate` in bytes a second.

    `connect_timeout` is for TCP and again for TLS, `first_byte_timeout` from the request to the end of the headers.
    A source that gives fewer than `minimum_rate * stall_timeout` bytes within any `stall_timeout` is too slow.
    `refuse_private`: one at an address that is not public counts as unreachable.
    """

    connect_timeout: float = 3.0
    first_byte_timeout: float = 5.0
    stall_timeout: float = 10.0
    minimum_rate: int = 8 * 1024
    max_connections: int = 200
    refuse_private: bool = False

    @property
    def minimum_bytes(self) -> int:
        """What must arrive within `stall_timeout`."""
        return int(self.minimum_rate * self.stall_timeout)

    def __post_init__(self) -> None:
        if min(self.connect_timeout, self.first_byte_timeout, self.stall_timeout) <= 0:
            raise ConfigurationError("a source's time limits must be above 0")
        if self.minimum_rate < 0 or self.max_connections < 1:
            raise ConfigurationError(
                "a source's minimum rate must not be negative, nor its connections below 1"
            )


# The one place that knows the HTTP library: connections to sources, their reuse, and its errors put into ours.

# Colossus closes idle connections after 5 s (Node's default).
_KEEP_ALIVE = 4.0
# The library's 64 KiB cost a third of the throughput on a fast link; the event loop reads 256 KiB at once anyway.
_READ_BYTES = 256 * 1024


@contextmanager
def map_http_errors() -> Iterator[None]:
    """Turn the library's exceptions into SourceErrors, the cause chained."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, httpcore.ReadError, ssl.SSLError) as error:
        timed_out = isinstance(error, httpx.ConnectTimeout)
        raise SourceUnreachable(_describe(error), timed_out=timed_out) from error


class Connections:
    """Connections to all sources; `open` before use.

    The library's own pool has no bound here: a request that is cancelled while that pool is contended can take its
    place with it for good. The bound is a semaphore of ours, so there is nothing to lose, and no pool to replace.
    """

    def __init__(self, limits: SourceLimits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_connections)
        self._reusing: _Transport | None = None
        self._fresh: _Transport | None = None

    async def open(self) -> None:
        # The setting is the library's, for the whole process; nothing smaller offers it.
        httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = _READ_BYTES
        context = await asyncio.to_thread(httpx.create_ssl_context)  # reads the certificates
        network = SourceNetwork(is_public if self._limits.refuse_private else None)
        self._reusing = _Transport(context, self._limits.max_connections, network)
        self._fresh = _Transport(context, 0, network)

    async def close(self) -> None:
        """Ends every connection; answers still being read fail."""
        for transport in (self._reusing, self._fresh):
            if transport is not None:
                await transport.aclose()
        self._reusing = self._fresh = None

    @asynccontextmanager
    async def request(self, url: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """GET; gives the answer once its headers are there, redirects and all, and closes it at the end."""
        async with self._slot():
            answer = await self._send(url, headers)
            try:
                yield answer
            finally:
                await answer.aclose()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limits.first_byte_timeout):
                await self._slots.acquire()
        except TimeoutError as error:
            raise SourceError(f"all {self._limits.max_connections} connections are in use") from error
        try:
            yield
        finally:
            self._slots.release()

    async def _send(self, url: str, headers: dict[str, str]) -> httpx.Response:
        if self._reusing is None or self._fresh is None:
            raise SourceUnreachable("the source client is not open")
        try:
            return await self._send_on(self._reusing, url, headers)
        except _ReusedConnectionFailed:
            # A source may close an idle connection just as we use it: that says nothing of the source.
            return await self._send_on(self._fresh, url, headers)

    async def _send_on(self, transport: _Transport, url: str, headers: dict[str, str]) -> httpx.Response:
        # The library's limit for reading is one for each read: headers could drip in for ever, and it would hold for
        # the body too. Ours is for all of the headers. Connecting is left to the library, for TCP and TLS each: it
        # loses the socket of a handshake that is cancelled from outside, so our bound for that is only a last resort.
        progress = _Progress(self._limits.first_byte_timeout)
        connect = self._limits.connect_timeout
        extensions: dict[str, Any] = {"timeout": {"connect": connect}, "trace": progress.trace}
        try:
            with map_http_errors():
                request = httpx.Request("GET", url, headers=headers, extensions=extensions)
                async with asyncio.timeout(2 * connect + 1.0) as progress.deadline:
                    return await transport.handle_async_request(request)
        except TimeoutError as error:
            if progress.sending:
                raise SourceTooSlow("no answer in time") from error
            raise SourceUnreachable("no connection in time", timed_out=True) from error
        except SourceUnreachable as error:
            if progress.sending and not progress.connecting:
                raise _ReusedConnectionFailed(str(error)) from error
            raise


class _ReusedConnectionFailed(SourceUnreachable):
    """A request failed before its answer, on a connection that had served others."""


class _Progress:
    """How far a request has come, and with it the time until which it may go on."""

    def __init__(self, first_byte_timeout: float) -> None:
        """`first_byte_timeout`: seconds from the sending of the request to the end of the answer's headers."""
        self.connecting = False
        self.sending = False
        self.deadline: asyncio.Timeout | None = None
        self._first_byte_timeout = first_byte_timeout

    async def trace(self, event: str, _: dict[str, Any]) -> None:
        """Called by the library at each step."""
        if event == "connection.connect_tcp.started":
            self.connecting = True
        elif event == "http11.send_request_headers.started" and self.deadline is not None:
            self.sending = True
            self.deadline.reschedule(asyncio.get_running_loop().time() + self._first_byte_timeout)


class _Transport(httpx.AsyncHTTPTransport):
    """A transport, not a client: no cookies, no redirects, no proxy or .netrc credentials from the environment."""

    def __init__(self, context: ssl.SSLContext, max_idle: int, network: SourceNetwork) -> None:
        super().__init__(verify=context, trust_env=False)
        # The library has no door for the network of its pool, so the pool, which is empty yet, is put in its place.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=None,
            max_keepalive_connections=max_idle,
            keepalive_expiry=_KEEP_ALIVE,
            network_backend=network,
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
