"""The access log in the combined format of Apache and nginx, for tools such as GoAccess.

    203.0.113.7 - - [29/Nov/2026:21:45:17 +0000] "GET /api/v1/assets/7 HTTP/1.1" 206 65536 "-" "Mozilla/5.0"

Lines are collected in memory and written in a thread, about once a second: no response waits for a disk.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import stat
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from time import localtime, strftime

import structlog
from sanic import Request

from distributor_node.services.api.clients import ClientAddresses
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.runtime.threads import run_blocking
from distributor_node.shared.waiting import wait_event

FLUSH_INTERVAL = 1.0
"""Seconds between two writes. A file that was moved away is noticed within that time."""
_BATCH_BYTES = 64 * 1024
_MAX_BUFFERED = 8 * 1024 * 1024
"""Bytes that wait for a disk that does not take them. Further lines are dropped, and counted in the log."""

_MAX_WRITE_WAIT = 1
"""Seconds until a pipe that is not read counts as an outage."""

_UNREADABLE = "NONE"
"""The method that Sanic gives to a request whose first line it could not read."""

# What may not stand between quotation marks, as nginx writes it. No byte of a client can end a line or a field.
_UNSAFE = re.compile(r"[^\x20-\x7e]|[\"\\]")
_HEADERS = re.compile(rb"\r\n(user-agent|referer):[ \t]*([^\r\n]*)", re.IGNORECASE)
_FORWARDED_FOR = re.compile(rb"\r\nx-forwarded-for:[ \t]*([^\r\n]*)", re.IGNORECASE)

logger = structlog.get_logger()


class AccessLog:
    """Collects one line per response. `run` is its task, `close` writes what is left."""

    def __init__(self, path: Path | None, client_addresses: ClientAddresses) -> None:
        """`path`: a file that is appended to, and opened again once it was moved away. None: standard output."""
        self._path, self._client_addresses = path, client_addresses
        self._lines: deque[bytes] = deque()
        self._buffered = self._dropped = 0
        self._batch_ready = asyncio.Event()
        self._descriptor: int | None = None
        self._second, self._time = 0, ""
        self._outage = OutageLog(logger, down="access_log_unavailable", up="access_log_available")

    def add_request(self, request: Request, peer: str, status: int, sent: int, now: float) -> None:
        """Add a line for a request that Sanic has read.

        `peer`: the address of the connection; `sent`: bytes of the body; `now`: POSIX time.
        """
        headers, line = request.headers, ""
        if request.method != _UNREADABLE:
            line = f"{request.method} {request.raw_url.decode('latin-1')} HTTP/{request.version}"
        client = self._client_addresses.address_of(peer, headers.getall("x-forwarded-for", ()))
        self._add(client, line, status, sent, headers.get("referer", ""), headers.get("user-agent", ""), now)

    def add_head(self, head: bytes, peer: str, status: int, sent: int, now: float) -> None:
        """Add a line for a request of the fast path. `head`: its bytes; `peer`: the address of the connection."""
        fields = {name.lower(): value.rstrip().decode("latin-1") for name, value in _HEADERS.findall(head)}
        line = head[: head.find(b"\r\n")].decode("latin-1")
        client = self._client_addresses.address_of(peer, forwarded_for(head))
        self._add(client, line, status, sent, fields.get(b"referer", ""), fields.get(b"user-agent", ""), now)

    def _add(
        self, client: str, line: str, status: int, sent: int, referer: str, agent: str, now: float
    ) -> None:
        if int(now) != self._second:
            self._second, self._time = int(now), _format_time(int(now))
        texts = [_UNSAFE.sub(_escape, text) if text else "-" for text in (line, referer, agent)]
        entry = f'{client or "-"} - - [{self._time}] "{texts[0]}" {status} {sent} "{texts[1]}" "{texts[2]}"\n'
        if self._buffered > _MAX_BUFFERED:
            self._dropped += 1
            return
        self._lines.append(entry.encode("ascii"))
        self._buffered += len(entry)
        if self._buffered >= _BATCH_BYTES:
            self._batch_ready.set()

    async def run(self) -> None:
        """Write at intervals, until cancelled."""
        while True:
            await wait_event(self._batch_ready, FLUSH_INTERVAL)
            self._batch_ready.clear()
            await self.flush()

    async def flush(self) -> None:
        """Write all lines. Those that cannot be written are kept for the next time, as far as there is room."""
        if not self._lines:
            return
        lines, self._lines, self._buffered = self._lines, deque(), 0
        try:
            await run_blocking(self._write, lines)
        except OSError as error:
            self._outage.failed(error, file=str(self._path or "standard output"))
            lines.extend(self._lines)
            self._lines, self._buffered = lines, sum(map(len, lines))
            return
        self._outage.succeeded(dropped=self._dropped)
        self._dropped = 0

    def _write(self, lines: deque[bytes]) -> None:
        """Blocking: call from a worker thread. Removes from `lines` what it has written."""
        descriptor = self._open()
        # Several processes may write to one pipe: up to PIPE_BUF bytes arrive in one piece, without a wait if it takes
        # anything. A file takes everything.
        limit = select.PIPE_BUF if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else _BATCH_BYTES
        ready = select.poll()
        ready.register(descriptor, select.POLLOUT)
        while lines:
            batch, size = 0, 0
            while batch < len(lines) and (not batch or size + len(lines[batch]) <= limit):
                size += len(lines[batch])
                batch += 1
            if not ready.poll(_MAX_WRITE_WAIT * 1000):
                raise TimeoutError(f"nothing was taken for {_MAX_WRITE_WAIT} s")
            view = memoryview(b"".join(islice(lines, batch)))
            while view:
                view = view[os.write(descriptor, view) :]
            for _ in range(batch):
                lines.popleft()

    def _open(self) -> int:
        """Return the descriptor to write to. Opens the file again if its name stands for another one."""
        if self._path is None:
            return 1
        if self._descriptor is not None and not _is_file(self._descriptor, self._path):
            self._close()
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # it may be a pipe
            self._descriptor = os.open(self._path, flags, 0o640)
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    async def close(self) -> None:
        """Write what is left. What cannot be written now is dropped."""
        await self.flush()
        if self._lines:
            logger.warning("access_log_lines_dropped", lines=len(self._lines) + self._dropped)
        self._close()


def forwarded_for(head: bytes) -> list[str]:
    """Return the lines of X-Forwarded-For in the head of a request."""
    return [value.rstrip().decode("latin-1") for value in _FORWARDED_FOR.findall(head)]


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _escape(match: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02X}" for byte in match[0].encode("latin-1", "replace"))


_MONTHS: Sequence[str] = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def _format_time(second: int) -> str:
    """As Apache writes it, in local time, whatever the locale is."""
    local = localtime(second)
    return f"{local.tm_mday:02}/{_MONTHS[local.tm_mon - 1]}/{strftime('%Y:%H:%M:%S %z', local)}"
