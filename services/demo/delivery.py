"""Sends a response, with the faults that are to be injected, and records how much of it was sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from distributor_node.services.demo.answers import Response
from distributor_node.services.demo.faults import Fault, body_chunk, corrupted, render_head
from distributor_node.services.demo.wire import HttpConnection

CHUNK_BYTES = 256 * 1024
_TICK_SECONDS = 0.02  # between two chunks
_CATCH_UP_SECONDS = 0.1  # of delay that may be made up for
_FOREVER = float("inf")


class Pacer:
    """Spreads bytes evenly over time. After a delay, it catches up by the bytes of at most 0.1 s."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._due = 0.0

    @property
    def chunk_bytes(self) -> int:
        """How many bytes to send at a time: those of 20 ms, at least one."""
        return max(1, int(self._rate * _TICK_SECONDS))

    def pause_after(self, sent: int, now: float) -> float:
        """Return how many seconds to wait after `sent` bytes. `now`: monotonic seconds."""
        self._due = max(self._due, now - _CATCH_UP_SECONDS) if self._due else now
        self._due += sent / self._rate
        return max(0.0, self._due - now)


class ResponseSender:
    """Sends one response on one connection, and updates its record."""

    def __init__(
        self,
        connection: HttpConnection,
        response: Response,
        fault: Fault,
        record: RequestRecord,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._response = corrupted(response, fault)
        self._fault = fault
        self._record = record
        self._notify = notify

    async def send(self, keep_alive: bool) -> bool:
        """Send head and body. Returns whether the connection can be reused. Raises ConnectionLost."""
        fault, response = self._fault, self._response
        has_wrong_length = fault.content_length_delta != fault.body_delta or fault.omit_content_length
        keep_alive = keep_alive and not (has_wrong_length or fault.endless_body)
        if fault.hang_before_headers:
            await self._connection.sleep(_FOREVER)
        await self._connection.sleep(fault.latency_before_headers)
        self._record.status = response.status
        head = render_head(response, fault, keep_alive)
        if self._record.method == "HEAD" or response.status == 304:
            await self._connection.write(head)
            return keep_alive
        if fault.latency_before_body > 0:
            await self._connection.write(head)
            head = b""
            await self._connection.sleep(fault.latency_before_body)
        return await self._send_body(head) and keep_alive

    async def _send_body(self, head: bytes) -> bool:
        """Send the body with the head, so that a small response is one packet. Returns False if it was cut."""
        fault = self._fault
        total = _FOREVER if fault.endless_body else max(0, self._response.length + fault.body_delta)
        stops = [stop for stop in (fault.cut_after, fault.hang_after) if stop is not None]
        end = min([total, *stops])
        steady = Pacer(fault.bytes_per_second) if fault.bytes_per_second else None
        drip = Pacer(fault.drip_bytes_per_second) if fault.drip_bytes_per_second else None
        if head and end <= 0:
            await self._connection.write(head)
        position = 0
        while position < end:
            pacer, limit = steady, CHUNK_BYTES
            if drip is not None and position >= fault.drip_after:
                pacer = drip
            elif drip is not None:
                limit = min(limit, fault.drip_after - position)
            size = int(min(limit, end - position, pacer.chunk_bytes if pacer else limit))
            await self._write_chunk(head, body_chunk(self._response, fault, position, size))
            head = b""
            position += size
            if pacer is not None and position < end:
                await self._connection.sleep(pacer.pause_after(size, time.monotonic()))
        return await self._finish(position, total)

    async def _write_chunk(self, head: bytes, chunk: bytes) -> None:
        record = self._record
        if record.bytes_sent == 0:
            record.first_byte_at = time.time()
        before = record.bytes_sent
        record.bytes_sent = before + len(chunk)
        if self._fault.chunked:
            chunk = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        await self._connection.write(head + chunk if head else chunk)
        if before == 0:
            self._notify()

    async def _finish(self, position: int, total: float) -> bool:
        """Hang or cut, if a fault says so. Returns whether the response ended correctly."""
        fault = self._fault
        if fault.hang_after is not None and position >= fault.hang_after and position < total:
            await self._connection.sleep(_FOREVER)
        if fault.cut_after is not None and position >= fault.cut_after and position < total:
            await self._connection.flush()
            if fault.cut_by_reset:
                self._connection.abort(reset=True)
            self._record.aborted = True
            return False
        if fault.chunked:
            await self._connection.write(b"0\r\n\r\n")
        return True


@dataclass(slots=True)
class RequestRecord:
    """One request. The fields after `headers` are set while the response is sent. Times are POSIX seconds."""

    method: str
    path: str
    connection: int  # number of the connection, from 1; equal numbers mean a reused connection
    started_at: float
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    bytes_sent: int = (
        0  # of the body, passed to the kernel or buffered; the peer may have read up to 1 MiB less
    )
    first_byte_at: float | None = None
    finished_at: float | None = None
    aborted: bool = False  # the connection ended before the response was complete, on either side

    @property
    def range(self) -> str | None:
        """The Range header, if there was one."""
        return self.headers.get("range")

    @property
    def finished(self) -> bool:
        """Whether the response has ended."""
        return self.finished_at is not None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON, with `range` in addition to the headers."""
        return asdict(self) | {"range": self.range}


class RequestLog:
    """The records of one node in order of arrival. They can be iterated, indexed and waited for."""

    def __init__(self) -> None:
        self._records: list[RequestRecord] = []
        self._changed = asyncio.Event()

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> RequestRecord:
        return self._records[index]

    def of(self, object_id: str, method: str | None = None) -> list[RequestRecord]:
        """Return the requests for one object, of one method if given."""
        suffix = f"/files/{object_id}"
        return [
            record
            for record in self._records
            if record.path.endswith(suffix) and method in (None, record.method)
        ]

    def append(self, record: RequestRecord) -> None:
        """Add a new request."""
        self._records.append(record)
        self.notify()

    def clear(self) -> None:
        """Remove all records, including those of requests under way."""
        self._records.clear()

    def notify(self) -> None:
        """Wake all waiters after a record was added or changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, condition: Callable[[RequestLog], bool], timeout_seconds: float = 60.0) -> None:
        """Wait until the condition holds. It is checked when a request arrives, begins its body or ends."""
        async with asyncio.timeout(timeout_seconds):
            while not condition(self):
                await self._changed.wait()

    def to_json(self) -> dict[str, Any]:
        """Return all records as JSON."""
        return {"requests": [record.to_json() for record in self._records]}
