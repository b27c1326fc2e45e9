"""A lean client for what wrk cannot do: HEAD, each object exactly once, the time of the first body byte."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import cast
from urllib.parse import urlsplit

_RECEIVE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer, names in lower case."""

    status: int
    headers: dict[str, str]


def parse_head(raw: bytes) -> Head:
    """`raw` is all up to the empty line."""
    status_line, *lines = raw.decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return Head(int(status_line.split()[1]), headers)


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: seconds from before connecting to the first byte of its body, and to its last; bytes of the body."""

    first_byte: float
    total: float
    size: int
    head: Head


def fetch_once(url: str, header: str = "") -> Timing:
    """GET on a new connection; the body is read and forgotten. RuntimeError unless it is a whole 200 or 206."""
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n{header}\r\n"
    buffer = bytearray(_RECEIVE_BYTES)
    began = time.perf_counter()
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=120) as connection:
        connection.sendall(request.encode())
        received = b""
        while (split := received.find(b"\r\n\r\n")) < 0 or len(received) == split + 4:
            piece = connection.recv(_RECEIVE_BYTES)
            if not piece:
                break
            received += piece
        first = time.perf_counter() - began
        head = parse_head(received[:split])
        size, expected = len(received) - split - 4, int(head.headers.get("content-length", "-1"))
        while size < expected and (count := connection.recv_into(buffer)):
            size += count
    if head.status not in (200, 206) or size != expected:
        raise RuntimeError(f"{url}: {head.status}, {size} of {expected} bytes")
    return Timing(first, time.perf_counter() - began, size, head)


def head_request(url: str) -> Head:
    """HEAD on a new connection."""
    parts = urlsplit(url)
    request = f"HEAD {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n"
    received = b""
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=30) as connection:
        connection.sendall(request.encode())
        while b"\r\n\r\n" not in received and (piece := connection.recv(65536)):
            received += piece
    return parse_head(received.partition(b"\r\n\r\n")[0])


@dataclass(slots=True)
class LoadStats:
    """What the connections of one run saw together. Latencies in seconds, `received` in bytes of bodies."""

    latencies: list[float] = field(default_factory=list)
    received: int = 0
    errors: int = 0
    seconds: float = 0.0


async def run_all(url: str, paths: Iterable[str], connections: int, method: str = "GET") -> LoadStats:
    """Ask for each path once, over so many kept-alive connections; ends when `paths` do."""
    parts = urlsplit(url)
    stats, remaining = LoadStats(), iter(paths)
    request = f"{method} %s HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n"
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    protocols = [_ClientProtocol(remaining, request, method == "HEAD", stats) for _ in range(connections)]
    async with asyncio.timeout(600):
        for protocol in protocols:
            await loop.create_connection(
                partial(_same_protocol, protocol), parts.hostname or "", parts.port or 80
            )
        await asyncio.gather(*(protocol.ended for protocol in protocols))
    stats.seconds = time.perf_counter() - began
    return stats


def _same_protocol(protocol: _ClientProtocol) -> _ClientProtocol:
    return protocol


class _ClientProtocol(asyncio.Protocol):
    """One connection: sends a request, counts its answer, sends the next."""

    def __init__(self, paths: Iterator[str], request: str, bodiless: bool, stats: LoadStats) -> None:
        self._paths, self._request, self._bodiless, self._stats = paths, request, bodiless, stats
        self._head = b""
        self._missing = 0
        self._sent_at = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._next()

    def _next(self) -> None:
        path = next(self._paths, None)
        if path is None:
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write((self._request % path).encode())

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._body(len(data))
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return
        head, rest = parse_head(self._head[:end]), len(self._head) - end - 4
        self._head = b""
        if head.status not in (200, 206):
            self._stats.errors += 1
        self._missing = 0 if self._bodiless else int(head.headers.get("content-length", "0"))
        self._body(rest)

    def _body(self, count: int) -> None:
        self._missing -= count
        self._stats.received += count
        if self._missing <= 0:
            self._missing = 0
            self._stats.latencies.append(time.perf_counter() - self._sent_at)
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._missing or exc is not None:
            self._stats.errors += 1
        if not self.ended.done():
            self.ended.set_result(None)
