"""Sends a response, with the faults that are to be injected."""

from __future__ import annotations

import time
from collections.abc import Callable

from distributor_node.services.demo.answers import Response
from distributor_node.services.demo.faults import Fault, body_chunk, corrupted, render_head
from distributor_node.services.demo.request_log import RequestRecord
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
