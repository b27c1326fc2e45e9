"""A source's body, handed out no further and no longer than its headers and the catalog allow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import httpx

from shared.adapters.sources.checks import BodyPlan
from shared.adapters.sources.connections import map_http_errors
from shared.adapters.sources.network import SourceStream
from shared.adapters.sources.pace import MinimumRate
from shared.domain.errors import SourceTooSlow, SourceUnreachable, SourceWrong

# Seconds for a body of unstated length to end after its last expected byte; then the bytes are taken as they are.
_END_TIMEOUT = 1.0
# Bytes of a body for which a connection is given up rather than kept for the next request.
_MIN_RAW_BODY = 8 * 1024 * 1024


class CheckedBody:
    """Reads one answer. `received` counts bytes off the wire, passed over ones included."""

    def __init__(
        self, answer: httpx.Response, plan: BodyPlan, minimum_rate: MinimumRate, clock: Callable[[], float]
    ) -> None:
        """`clock` in seconds; `minimum_rate` learns only of the time spent waiting for the source."""
        self._raw = _raw_chunks(answer)
        self._plan = plan
        self._minimum_rate = minimum_rate
        self._clock = clock
        self.received = 0

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Exactly the planned bytes, or SourceUnreachable (cut), SourceWrong (too many), SourceTooSlow."""
        try:
            async for chunk in self._wanted():
                yield chunk
        finally:
            await self._raw.aclose()

    async def _wanted(self) -> AsyncGenerator[bytes]:
        skip, length = self._plan.skip, self._plan.length
        given = 0
        if length == 0 and self._plan.to_the_end:
            await self._expect_end(length)
        while length is None or given < length:
            chunk = await self._next(self._minimum_rate.time_left)
            if chunk is None:
                if length is not None:
                    raise SourceUnreachable(f"cut after {given} of {length} bytes")
                return
            if skip:
                passed = min(skip, len(chunk))
                skip -= passed
                chunk = chunk[passed:]
            if length is not None and len(chunk) > length - given:
                if self._plan.to_the_end:
                    raise SourceWrong(f"more than the {length} bytes promised")
                chunk = chunk[: length - given]
            given += len(chunk)
            if length is not None and given == length and self._plan.to_the_end:
                await self._expect_end(length)
            if chunk:
                yield chunk

    async def _expect_end(self, length: int) -> None:
        """Before the last chunk is handed out, so that a body that goes on is never taken for a complete one."""
        try:
            surplus = await self._next(_END_TIMEOUT)
        except (SourceTooSlow, SourceUnreachable):
            return  # all bytes are here; how the connection ends is no matter
        if surplus is not None:
            raise SourceWrong(f"more than the {length} bytes promised")

    async def _next(self, timeout: float) -> bytes | None:
        """The next bytes off the wire; None at the end of the body."""
        if timeout <= 0:
            raise SourceTooSlow(f"fewer bytes than the minimum rate asks for, after {self.received}")
        started = self._clock()
        try:
            with map_http_errors():
                async with asyncio.timeout(timeout):
                    chunk = await anext(self._raw, None)
        except TimeoutError as error:
            self._minimum_rate.record(self._clock() - started, 0)
            raise SourceTooSlow(f"stalled after {self.received} bytes") from error
        received = len(chunk) if chunk is not None else 0
        self._minimum_rate.record(self._clock() - started, received)
        self.received += received
        return chunk


async def _raw_chunks(answer: httpx.Response) -> AsyncGenerator[bytes]:
    """The body as it is on the wire, without the layers that decode and count."""
    stream = answer.extensions.get("network_stream")
    length = _stated_length(answer)
    if isinstance(stream, SourceStream) and stream.at_body and length > _MIN_RAW_BODY:
        async for chunk in _read_raw_stream(stream, length):
            yield chunk
        return
    body = answer.stream
    if not isinstance(body, httpx.AsyncByteStream):
        raise SourceUnreachable("the answer has no body to read")
    async for chunk in body:
        yield chunk


def _stated_length(answer: httpx.Response) -> int:
    """Bytes of a body that goes over the wire as it is; 0 if it does not, or nobody says how many it has."""
    stated = answer.headers.get("Content-Length", "")
    framed = "Transfer-Encoding" in answer.headers
    return int(stated) if stated.isascii() and stated.isdigit() and not framed else 0


async def _read_raw_stream(stream: SourceStream, length: int) -> AsyncGenerator[bytes]:
    """The library copies each byte three times more. It does not learn that the body was read, and closes the
    connection."""
    left = length
    while left:
        chunk = (await stream.receive())[:left]
        if not chunk:
            raise SourceUnreachable(f"cut after {length - left} of {length} bytes")
        left -= len(chunk)
        yield chunk
