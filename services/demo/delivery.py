"""Sends an answer, rightly or as wrongly as the knobs say."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.demo.answers import Answer
from services.demo.knobs import Behaviour
from services.demo.request_log import RequestRecord
from services.demo.spoiling import body_piece, render_head, spoiled
from services.demo.wire import Wire

PIECE_BYTES = 256 * 1024
_TICK_SECONDS = 0.02
_CATCH_UP_SECONDS = 0.1
_FOREVER = float("inf")


class Pacer:
    """Spreads bytes evenly over time; a delay is made up for, by at most 0.1 s worth of bytes."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._due = 0.0

    @property
    def piece_bytes(self) -> int:
        """How much to send at a time: 20 ms worth, at least one byte."""
        return max(1, int(self._rate * _TICK_SECONDS))

    def pause_after(self, sent: int, now: float) -> float:
        """Seconds to wait after `sent` more bytes; `now` is a monotonic time in seconds."""
        self._due = max(self._due, now - _CATCH_UP_SECONDS) if self._due else now
        self._due += sent / self._rate
        return max(0.0, self._due - now)


class Delivery:
    """Sends one answer on one connection and keeps its record."""

    def __init__(
        self,
        wire: Wire,
        answer: Answer,
        behaviour: Behaviour,
        record: RequestRecord,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self._wire = wire
        self._answer = spoiled(answer, behaviour)
        self._behaviour = behaviour
        self._record = record
        self._notify = notify

    async def send(self, keep_alive: bool) -> bool:
        """Send head and body; whether the connection can serve another request. Raises ConnectionLost."""
        behaviour, answer = self._behaviour, self._answer
        lies = behaviour.content_length_delta != behaviour.body_delta or behaviour.omit_content_length
        keep_alive = keep_alive and not (lies or behaviour.endless_body)
        if behaviour.hang_before_headers:
            await self._wire.sleep(_FOREVER)
        await self._wire.sleep(behaviour.latency_before_headers)
        self._record.status = answer.status
        head = render_head(answer, behaviour, keep_alive)
        if self._record.method == "HEAD" or answer.status == 304:
            await self._wire.write(head)
            return keep_alive
        if behaviour.latency_before_body > 0:
            await self._wire.write(head)
            head = b""
            await self._wire.sleep(behaviour.latency_before_body)
        return await self._send_body(head) and keep_alive

    async def _send_body(self, head: bytes) -> bool:
        """Send the body behind the head (a small answer is one packet); False if cut on purpose."""
        behaviour = self._behaviour
        total = _FOREVER if behaviour.endless_body else max(0, self._answer.length + behaviour.body_delta)
        stops = [stop for stop in (behaviour.cut_after, behaviour.hang_after) if stop is not None]
        end = min([total, *stops])
        steady = Pacer(behaviour.bytes_per_second) if behaviour.bytes_per_second else None
        drip = Pacer(behaviour.drip_bytes_per_second) if behaviour.drip_bytes_per_second else None
        if head and end <= 0:
            await self._wire.write(head)
        position = 0
        while position < end:
            pacer, limit = steady, PIECE_BYTES
            if drip is not None and position >= behaviour.drip_after:
                pacer = drip
            elif drip is not None:
                limit = min(limit, behaviour.drip_after - position)
            size = int(min(limit, end - position, pacer.piece_bytes if pacer else limit))
            await self._write_piece(head, body_piece(self._answer, behaviour, position, size))
            head = b""
            position += size
            if pacer is not None and position < end:
                await self._wire.sleep(pacer.pause_after(size, time.monotonic()))
        return await self._stop(position, total)

    async def _write_piece(self, head: bytes, piece: bytes) -> None:
        record = self._record
        if record.bytes_sent == 0:
            record.first_byte_at = time.time()
        before = record.bytes_sent
        record.bytes_sent = before + len(piece)
        await self._wire.write(head + piece if head else piece)
        if before == 0:
            self._notify()

    async def _stop(self, position: int, total: float) -> bool:
        """What comes after the last byte to be sent; whether the answer ended as a right one does."""
        behaviour = self._behaviour
        if behaviour.hang_after is not None and position >= behaviour.hang_after and position < total:
            await self._wire.sleep(_FOREVER)
        if behaviour.cut_after is not None and position >= behaviour.cut_after and position < total:
            await self._wire.flush()
            if behaviour.cut_by_reset:
                self._wire.abort(reset=True)
            self._record.aborted = True
            return False
        return True
