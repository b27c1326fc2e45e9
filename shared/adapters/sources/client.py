"""What is told of each request to a source when it ends: for metrics, and for ranking the sources."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Self

import httpx

from distributor_node.shared.adapters.sources.connections import Connections, SourceLimits, map_http_errors
from distributor_node.shared.adapters.sources.network import SourceStream
from distributor_node.shared.adapters.sources.validation import BodyPlan, validate_response
from distributor_node.shared.domain.errors import (
    InvalidInput,
    SourceError,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
)
from distributor_node.shared.domain.objects import source_name
from distributor_node.shared.domain.ranges import ByteRange
from distributor_node.shared.domain.urls import parse_source_url


@dataclass(frozen=True, slots=True)
class SourceObservation:
    """One request. `source` is host:port, `first_byte` the seconds until the answer's headers (None: there was no
    answer), `waited` all seconds spent waiting for the source, `received` the body's bytes taken off the wire.
    `failure` is the SourceError's reason; None for success and for a reader who left early."""

    source: str
    first_byte: float | None
    waited: float
    received: int
    failure: str | None


Observer = Callable[[SourceObservation], None]


def ignore(observation: SourceObservation) -> None:
    """The observer of those who want none."""


# A source's answer after its headers have been checked.


@dataclass(frozen=True, slots=True)
class SourceResponse:
    """Bytes `first` to `first + length - 1` of the object; `chunks` gives exactly these, once, or raises SourceError.

    `status` is 200 for the whole object and 206 for a range, whatever the source's own status was. `length` is None if
    nobody said how long it is; `total`, the size of the whole object, likewise. `media_type` is the source's word.
    """

    status: Literal[200, 206]
    first: int
    length: int | None
    total: int | None
    media_type: str | None
    chunks: AsyncIterator[bytes]


# Decides whether a source is too slow, from the time spent waiting for it alone. Pure.

_SLOTS = 10


@dataclass(slots=True)
class _Slot:
    begins: float
    latest: float
    received: int


class MinimumRate:
    """A sliding window of `window` seconds of waiting, in which at least `minimum` bytes must arrive.

    Its clock stands still while nobody waits for the source, so a reader that pauses costs the source nothing. Arrivals
    are kept in slots of a tenth of the window, by which a verdict may come late.
    """

    def __init__(self, window: float, minimum: int) -> None:
        """`window` in seconds, `minimum` in bytes; at least one byte is always demanded."""
        self._window = window
        self._minimum = max(1, minimum)
        self.waited = 0.0
        # Bytes lent at the beginning, so that the first window is judged by the same rule as the rest.
        self._slots = deque([_Slot(0.0, 0.0, self._minimum)])
        self._sum = self._minimum

    def record(self, waited: float, received: int) -> None:
        """`waited` seconds more, at the end of which `received` bytes came."""
        self.waited += waited
        while self._slots and self._slots[0].latest <= self.waited - self._window:
            self._sum -= self._slots.popleft().received
        self._sum += received
        newest = self._slots[-1] if self._slots else None
        # The lent bytes stay in a slot of their own, or early arrivals would prolong the loan.
        if newest is not None and newest.begins > 0.0 and self.waited - newest.begins < self._window / _SLOTS:
            newest.latest = self.waited
            newest.received += received
        else:
            self._slots.append(_Slot(self.waited, self.waited, received))

    @property
    def time_left(self) -> float:
        """Seconds that may still be waited for the next bytes; 0 or less: too slow already."""
        left = self._sum
        for slot in self._slots:
            if left < self._minimum:
                return 0.0
            left -= slot.received
            if left < self._minimum:
                return slot.latest + self._window - self.waited
        return 0.0


# A source's body, handed out no further and no longer than its headers and the catalog allow.

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


# Reads one object, or a range of it, from one source.


class SourceClient:
    """One for each purpose (downloads, proxying), so that one cannot use up the other's connections."""

    def __init__(
        self,
        limits: SourceLimits,
        observe: Observer = ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`observe` is called once for each request when it ends; `clock` in seconds."""
        self._limits = limits
        self._observe = observe
        self._clock = clock
        self._connections = Connections(limits)

    async def open(self) -> None:
        await self._connections.open()

    async def close(self) -> None:
        """Answers still being read fail with SourceUnreachable."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def get(
        self, url: str, byte_range: ByteRange | None = None, expected_size: int | None = None
    ) -> AsyncIterator[SourceResponse]:
        """Ask one source; never another one, never twice unless a reused connection turns out to be closed.

        `byte_range` must lie within `expected_size` (bytes, of the whole object) where that is known: InvalidInput
        otherwise, since sources answer such ranges with 500. Everything that goes wrong with the source is a
        SourceError, raised on entry or from `chunks`. Leaving the context drops what was not read.
        """
        if byte_range is not None and expected_size is not None and byte_range.last >= expected_size:
            raise InvalidInput(f"the range {byte_range} is not within {expected_size} bytes")
        attempt = _Attempt(MinimumRate(self._limits.stall_timeout, self._limits.minimum_bytes))
        try:
            async with self._answer(url, byte_range, attempt) as answer:
                plan = validate_response(answer.status_code, answer.headers, byte_range, expected_size)
                attempt.body = CheckedBody(answer, plan, attempt.minimum_rate, self._clock)
                async with aclosing(attempt.body.chunks()) as chunks:
                    yield SourceResponse(
                        plan.status, plan.first, plan.length, plan.total, plan.media_type, chunks
                    )
        except SourceError as error:
            attempt.failure = error.reason
            raise
        finally:
            self._observe(attempt.observation(source_name(url)))

    @asynccontextmanager
    async def _answer(
        self, url: str, byte_range: ByteRange | None, attempt: _Attempt
    ) -> AsyncIterator[httpx.Response]:
        try:
            parse_source_url(url)
        except InvalidInput as error:
            raise SourceUnreachable(f"not a usable source: {error}") from error
        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "distributor-node"}
        if byte_range is not None:
            headers["Range"] = str(byte_range)
        started = self._clock()
        async with self._connections.request(url, headers) as answer:
            attempt.first_byte = self._clock() - started
            yield answer


class _Attempt:
    """What becomes of one request."""

    def __init__(self, minimum_rate: MinimumRate) -> None:
        self.minimum_rate = minimum_rate
        self.body: CheckedBody | None = None
        self.first_byte: float | None = None
        self.failure: str | None = None

    def observation(self, source: str) -> SourceObservation:
        received = self.body.received if self.body is not None else 0
        waited = (self.first_byte or 0.0) + self.minimum_rate.waited
        return SourceObservation(source, self.first_byte, waited, received, self.failure)
