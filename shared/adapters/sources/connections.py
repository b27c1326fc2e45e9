"""HTTP connections to sources, their limits, and the HTTP library's errors as SourceErrors.

With transport.py, this is where httpx reaches sources.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpcore
import httpx

from distributor_node.shared.adapters.sources.network import ExcessiveEvents, SourceNetwork
from distributor_node.shared.adapters.sources.transport import BoundedTransport
from distributor_node.shared.domain.errors import (
    ConfigurationError,
    InvalidInput,
    SourceError,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
)
from distributor_node.shared.domain.urls import is_public, redirect_target


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """Limits of one client. Times are seconds of waiting for the source."""

    connect_timeout: float = 3.0  # for TCP, and again for TLS
    first_byte_timeout: float = 5.0  # from the request to the end of the response's headers
    stall_timeout: float = 10.0  # the window in which `minimum_rate` is measured
    minimum_rate: int = 8 * 1024  # bytes a second; a source below it is too slow
    max_connections: int = 200
    follow_to_other_hosts: bool = True  # whether a redirect may lead to another host than the one asked
    refuse_private: bool = False  # a source at an address that is not public counts as unreachable

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must arrive within any `stall_timeout`."""
        return int(self.minimum_rate * self.stall_timeout)

    def __post_init__(self) -> None:
        if min(self.connect_timeout, self.first_byte_timeout, self.stall_timeout) <= 0:
            raise ConfigurationError(f"time limits of sources must be above 0, got {self}")
        if self.minimum_rate < 0 or self.max_connections < 1:
            raise ConfigurationError(
                f"minimum_rate must be at least 0 and max_connections at least 1, got {self}"
            )


MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# httpcore's 64 KiB cost a third of the throughput on a fast link. The event loop reads 256 KiB at once anyway.
_READ_BYTES = 256 * 1024


@contextmanager
def map_http_errors() -> Iterator[None]:
    """Raise SourceUnreachable for the library's exceptions, which are chained; SourceWrong for too many events."""
    try:
        yield
    except ExcessiveEvents as error:
        raise SourceWrong(str(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpcore.ReadError, ssl.SSLError) as error:
        timed_out = isinstance(error, httpx.ConnectTimeout)
        raise SourceUnreachable(_describe(error), timed_out=timed_out) from error


class Connections:
    """Connections to all sources. Call `open` before use.

    A semaphore limits their number, not httpcore's pool: when a request is cancelled while that pool is contended, its
    slot can be lost for ever.
    """

    def __init__(self, limits: SourceLimits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_connections)
        self._reusing: BoundedTransport | None = None
        self._fresh: BoundedTransport | None = None

    async def open(self) -> None:
        # httpcore has this setting only for the whole process.
        httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = _READ_BYTES
        context = await asyncio.to_thread(httpx.create_ssl_context)  # reads the certificates
        network = SourceNetwork(is_public if self._limits.refuse_private else None)
        self._reusing = BoundedTransport(context, self._limits.max_connections, network)
        self._fresh = BoundedTransport(context, 0, network)

    async def close(self) -> None:
        """Close every connection. Responses that are being read fail."""
        for transport in (self._reusing, self._fresh):
            if transport is not None:
                await transport.aclose()
        self._reusing = self._fresh = None

    @asynccontextmanager
    async def request(
        self, url: str, headers: dict[str, str], method: Literal["GET", "HEAD"] = "GET"
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and yield the response when its headers have arrived.

        Redirects are followed, at most MAX_REDIRECTS of them. Each goes through the checks of a source's URL, and its
        connection through those of a source's address. Raises SourceWrong for one that must not be followed.
        """
        async with self._slot():
            response = await self._send(method, url, headers)
            try:
                for _ in range(MAX_REDIRECTS):
                    if response.status_code not in _REDIRECTS:
                        break
                    url = self._redirect_target(url, response)
                    await response.aclose()
                    response = await self._send(method, url, headers)
                if response.status_code in _REDIRECTS:
                    raise SourceWrong(f"redirected more than {MAX_REDIRECTS} times")
                yield response
            finally:
                await response.aclose()

    def _redirect_target(self, url: str, response: httpx.Response) -> str:
        try:
            return redirect_target(
                url,
                response.headers.get("Location", ""),
                to_other_hosts=self._limits.follow_to_other_hosts,
            )
        except InvalidInput as error:
            raise SourceWrong(f"redirect not followed: {error}") from error

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

    async def _send(self, method: str, url: str, headers: dict[str, str]) -> httpx.Response:
        if self._reusing is None or self._fresh is None:
            raise SourceUnreachable("the source client is not open")
        try:
            return await self._send_on(self._reusing, method, url, headers)
        except _ReusedConnectionFailed:
            # A source may close an idle connection while we send. That is not a failure of the source.
            return await self._send_on(self._fresh, method, url, headers)

    async def _send_on(
        self, transport: BoundedTransport, method: str, url: str, headers: dict[str, str]
    ) -> httpx.Response:
        # httpx's read timeout applies to each read: headers could trickle in for ever, and it would apply to the body
        # too. `progress.deadline` limits all headers together. httpx limits the time to connect, for TCP and TLS each.
        # It leaks the socket of a handshake that is cancelled from outside, so our limit on that is a last resort.
        progress = _Progress(self._limits.first_byte_timeout)
        connect = self._limits.connect_timeout
        extensions: dict[str, Any] = {"timeout": {"connect": connect}, "trace": progress.trace}
        try:
            with map_http_errors():
                request = httpx.Request(method, url, headers=headers, extensions=extensions)
                async with asyncio.timeout(2 * connect + 1.0) as progress.deadline:
                    return await transport.handle_async_request(request)
        except TimeoutError as error:
            if progress.sending:
                raise SourceTooSlow(
                    f"no response headers within {self._limits.first_byte_timeout:g} s"
                ) from error
            raise SourceUnreachable(
                f"no connection within {2 * connect + 1.0:g} s", timed_out=True
            ) from error
        except SourceUnreachable as error:
            if progress.sending and not progress.connecting:
                raise _ReusedConnectionFailed(str(error)) from error
            raise


class _ReusedConnectionFailed(SourceUnreachable):
    """A request failed before its response, on a connection that had served other requests."""


class _Progress:
    """Follows the steps of one request, and sets its deadline."""

    def __init__(self, first_byte_timeout: float) -> None:
        """`first_byte_timeout`: seconds from sending the request to the end of the response's headers."""
        self.connecting = False
        self.sending = False
        self.deadline: asyncio.Timeout | None = None
        self._first_byte_timeout = first_byte_timeout

    async def trace(self, event: str, _: dict[str, Any]) -> None:
        """Called by httpcore at each step."""
        if event == "connection.connect_tcp.started":
            self.connecting = True
        elif event == "http11.send_request_headers.started" and self.deadline is not None:
            self.sending = True
            self.deadline.reschedule(asyncio.get_running_loop().time() + self._first_byte_timeout)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
