"""A small HTTP/1.1 client for tests: full control of what is sent, full view of what is received, fast enough for
fifty clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Answer:
    """One answer. `complete`: the body had all the bytes its head promised; times in seconds since the request."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    first_byte_after: float
    took: float
    pieces: list[tuple[float, int]] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


async def get(
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "GET",
    timeout: float = 60.0,
    keep_body: bool = True,
) -> Answer:
    """One request on a connection of its own. A cut connection is not an error: see `complete`.

    It is not said that the connection will be closed: hits then come down the fast path, as players get them.
    """
    host, port, path = _split(url)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{port}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    request = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    async with asyncio.timeout(timeout):
        return await exchange(host, port, request, head_only=method == "HEAD", keep_body=keep_body)


async def exchange(
    host: str, port: int, request: bytes, *, head_only: bool = False, keep_body: bool = True
) -> Answer:
    """Send raw bytes, read one answer."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(request)
        return await read_answer(reader, began, head_only=head_only, keep_body=keep_body)
    finally:
        writer.transport.abort()


async def read_answer(
    reader: asyncio.StreamReader, began: float, *, head_only: bool = False, keep_body: bool = True
) -> Answer:
    """Read one answer; the connection stays as it is."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answer(0, {}, b"", complete=False, first_byte_after=0, took=time.monotonic() - began)
    status_line, *lines = head.decode("latin-1").rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    answer = Answer(int(status_line.split()[1]), headers, b"", complete=False, first_byte_after=0, took=0)
    length = int(headers["content-length"]) if "content-length" in headers else None
    if head_only or answer.status in (204, 304):
        length = 0
    body = bytearray()
    try:
        if headers.get("transfer-encoding") == "chunked" and not head_only:
            answer.complete = await _read_chunked(reader, body, answer, began)
        else:
            received = await _read_plain(reader, length, body, answer, began, keep_body)
            answer.complete = length is None or received == length
    except ConnectionError:
        answer.complete = False
    answer.body, answer.took = bytes(body), time.monotonic() - began
    return answer


async def _read_plain(
    reader: asyncio.StreamReader,
    length: int | None,
    body: bytearray,
    answer: Answer,
    began: float,
    keep: bool,
) -> int:
    received = 0
    while length is None or received < length:
        piece = await reader.read(min(1 << 20, length - received) if length is not None else 1 << 20)
        if not piece:
            break
        now = time.monotonic() - began
        answer.first_byte_after = answer.first_byte_after or now
        answer.pieces.append((now, len(piece)))
        received += len(piece)
        if keep:
            body += piece
    return received


async def _read_chunked(reader: asyncio.StreamReader, body: bytearray, answer: Answer, began: float) -> bool:
    while True:
        line = await reader.readline()
        if not line:
            return False
        size = int(line, 16)
        try:
            piece = await reader.readexactly(size + 2)
        except asyncio.IncompleteReadError:
            return False
        if size == 0:
            return True
        answer.first_byte_after = answer.first_byte_after or time.monotonic() - began
        body += piece[:-2]


def _split(url: str) -> tuple[str, int, str]:
    rest = url.removeprefix("http://")
    address, slash, path = rest.partition("/")
    host, _, port = address.rpartition(":")
    return host, int(port), slash + path
