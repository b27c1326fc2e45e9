"""Reads one object, or a range of it, from one source, and checks that the response is the one that was asked for."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Literal, Self

import httpx

from distributor_node.shared.adapters.sources.connections import Connections, SourceLimits, map_http_errors
from distributor_node.shared.adapters.sources.network import SourceStream
from distributor_node.shared.domain.conditionals import (
    NO_VALIDATORS,
    UNKNOWN_VERSION,
    ByteRange,
    Comparison,
    Validators,
    Version,
    parse_content_range,
)
from distributor_node.shared.domain.errors import (
    InvalidInput,
    SourceClosed,
    SourceEncoded,
    SourceError,
    SourceIgnoresRange,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
    VersionChanged,
)
from distributor_node.shared.domain.media_types import media_type_or_none
from distributor_node.shared.domain.objects import source_name
from distributor_node.shared.domain.urls import parse_source_url

MAX_SKIP = 6 * 1024 * 1024
"""If a source ignores ranges, at most so many bytes are read and skipped to reach the range."""

PAUSE = 0.25
"""Seconds between two reads of a body from which on the reader has paused: a source may close the connection then."""

MAX_WIDENED = MAX_SKIP + 64 * 1024
"""If a source ignores a small range, at most so many bytes are read instead of it."""


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """Which bytes of the body to use."""

    status: Literal[200, 206]  # 200: the whole object, 206: a range
    first: int  # position of the first byte in the object
    length: int | None  # bytes to use; None: all there are
    total: int | None  # size of the whole object; None: unknown
    media_type: str | None
    validators: Validators = NO_VALIDATORS
    skip: int = 0  # bytes to discard at the beginning
    to_the_end: bool = True  # the body must end after `length` bytes
    encoding: str | None = None  # content coding of the bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What the response must be, as far as known. Of the version, the content hash is not checked here."""

    version: Version = UNKNOWN_VERSION
    must_match: bool = False
    """The response must prove to be of this version, because its bytes follow other bytes of it."""
    encodings: frozenset[str] = frozenset()
    """Content codings in which the whole object is accepted, from a source that sends it in no other way."""
    may_widen: bool = False
    """If the source ignores the range, its bytes from the first one on are taken: MAX_WIDENED at most."""


def validate_response(
    status: int,
    headers: Mapping[str, str],
    byte_range: ByteRange | None,
    expected: Expected,
) -> BodyPlan:
    """Decide what to do with the body. `headers` has case-insensitive names.

    Raises:
        SourceRefused: the response does not have the object.
        VersionChanged: the response has another version of the object.
        SourceWrong: the response contradicts the request or the catalog.
    """
    if status not in (200, 206):
        raise SourceRefused(f"responded {status}", status, headers.get("Retry-After"))
    validators = Validators.from_headers(headers)
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        if status != 200 or byte_range is not None or encoding not in expected.encodings:
            raise SourceEncoded(encoding[:20])
        media_type = media_type_or_none(headers.get("Content-Type"))
        return BodyPlan(200, 0, None, None, media_type, validators, encoding=encoding)
    _check_version(validators, expected)
    expected_size = expected.version.size
    media_type = media_type_or_none(headers.get("Content-Type"))
    body_length = _content_length(headers)
    if status == 206:
        if byte_range is None:
            raise SourceWrong("status: expected 200 for a request without a range, got 206")
        plan = _plan_range(headers, byte_range, expected_size, body_length, media_type)
        return replace(plan, validators=validators)
    if body_length is not None and expected_size is not None and body_length != expected_size:
        raise VersionChanged(f"Content-Length: expected {expected_size}, got {body_length}", of_size=True)
    total = expected_size if expected_size is not None else body_length
    if byte_range is None:
        return BodyPlan(200, 0, total, total, media_type, validators)
    plan = _plan_skip(byte_range, total, media_type)
    if expected.may_widen and total is not None:
        length = min(total, MAX_WIDENED)
        plan = BodyPlan(200, 0, length, total, media_type, to_the_end=length == total)
    return replace(plan, validators=validators)


def _check_version(validators: Validators, expected: Expected) -> None:
    """Raise VersionChanged for another version, or for one that cannot be proved to be the expected one."""
    version, received = expected.version, Version(None, validators)
    if version.content_hash is not None:
        return
    if version.compare(received) is Comparison.DIFFERENT:
        raise VersionChanged(f"validators: expected {version.validators}, got {validators}")
    if expected.must_match and not version.is_joinable_with(received):
        raise VersionChanged(f"validators: expected a proof of {version.validators}, got {validators}")


def _plan_range(
    headers: Mapping[str, str],
    requested: ByteRange,
    expected_size: int | None,
    body_length: int | None,
    media_type: str | None,
) -> BodyPlan:
    stated = headers.get("Content-Range", "")
    parsed = parse_content_range(stated)
    if parsed is None:
        raise SourceWrong(f"Content-Range: expected a byte range, got {stated[:60]!r}")
    given, total = parsed
    if expected_size is not None and total is not None and total != expected_size:
        raise VersionChanged(f"Content-Range: expected a size of {expected_size}, got {total}", of_size=True)
    # If the size is unknown, the requested range may extend beyond the end of the object.
    clamped = (
        expected_size is None and given.first == requested.first and total == given.last + 1 <= requested.last
    )
    if given != requested and not clamped:
        raise SourceWrong(
            f"Content-Range: expected {requested.first}-{requested.last}, got {given.first}-{given.last}"
        )
    if body_length is not None and body_length != given.length:
        raise SourceWrong(f"Content-Length: expected {given.length} for the range, got {body_length}")
    return BodyPlan(206, given.first, given.length, expected_size if total is None else total, media_type)


def _plan_skip(requested: ByteRange, total: int | None, media_type: str | None) -> BodyPlan:
    if requested.first > MAX_SKIP:
        raise SourceIgnoresRange(
            f"range ignored: it begins at {requested.first}, and at most {MAX_SKIP} bytes are skipped"
        )
    if total is not None and requested.first >= total:
        raise SourceWrong(f"range {requested.first}-{requested.last} is beyond the end of {total} bytes")
    last = requested.last if total is None else min(requested.last, total - 1)
    return BodyPlan(
        206,
        requested.first,
        last - requested.first + 1,
        total,
        media_type,
        skip=requested.first,
        to_the_end=last + 1 == total,
    )


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise SourceWrong(f"Content-Length: expected a number, got {text[:40]!r}")
    return int(text)


@dataclass(frozen=True, slots=True)
class SourceResponse:
    """A source's response, after its headers have been checked."""

    status: Literal[200, 206]  # 200: the whole object, 206: a range. The source may have sent another one
    first: int  # position of the first byte in the object
    length: int | None  # bytes; None: unknown
    total: int | None  # size of the whole object; None: unknown
    media_type: str | None  # as the source states it
    validators: Validators  # as the source states them
    chunks: AsyncIterator[bytes | memoryview]  # exactly these bytes, once; raises SourceError
    headers: Mapping[str, str]  # all of them, with case-insensitive names
    delay: float  # seconds from the request to its head
    encoding: str | None = None  # the bytes are in this content coding, which was accepted


@dataclass(frozen=True, slots=True)
class SourceAnswer:
    """The head of a source's response, whatever its status."""

    status: int
    headers: Mapping[str, str]  # with case-insensitive names
    delay: float  # seconds from the request to its head


@dataclass(frozen=True, slots=True)
class SourceObservation:
    """One finished request to a source, for metrics."""

    source: str  # host:port
    first_byte: float | None  # seconds until the response's headers; None: there was no response
    waited: float  # seconds spent waiting for the source
    received: int  # bytes of the body that have arrived
    failure: str | None  # the SourceError's reason; None: success, or the reader stopped early


NOTHING_EXPECTED = Expected()
Observer = Callable[[SourceObservation], None]
BytesCounter = Callable[[str, int], None]
"""Is told the source (host:port) and the number of bytes that have arrived from it since it was told last."""
_COUNT_STEP = 256 * 1024
"""Bytes of one body that are counted at once: a download of minutes must not be counted at its end alone."""


def ignore(observation: SourceObservation) -> None:
    """Discard the observation."""


def ignore_bytes(source: str, count: int) -> None:
    """Discard the count."""


class SourceClient:
    """Reads from sources.

    Downloads and proxying have a client each, so that neither uses up the connections of the other.
    """

    def __init__(
        self,
        limits: SourceLimits,
        observe: Observer = ignore,
        clock: Callable[[], float] = time.monotonic,
        count_bytes: BytesCounter = ignore_bytes,
    ) -> None:
        """`observe`: called once for each request, when it ends. `clock`: in seconds.

        `count_bytes`: called while bodies arrive.
        """
        self._limits = limits
        self._observe = observe
        self._count_bytes = count_bytes
        self._clock = clock
        self._connections = Connections(limits)

    async def open(self) -> None:
        await self._connections.open()

    async def close(self) -> None:
        """Close all connections. Responses that are being read fail with SourceUnreachable."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def get(
        self,
        url: str,
        byte_range: ByteRange | None = None,
        expected: Expected = NOTHING_EXPECTED,
        more: Mapping[str, str] | None = None,
    ) -> AsyncIterator[SourceResponse]:
        """Send one request to one source. It is repeated only if a reused connection turns out to be closed.

        Redirects are followed. Leaving the context discards what has not been read. `byte_range` must lie within the
        expected size, because sources respond 500 to other ranges. `more`: further headers of the request.

        Raises:
            InvalidInput: the range is not within the object.
            SourceError: every failure of the source, on entry or from `chunks`.
        """
        expected_size = expected.version.size
        if byte_range is not None and expected_size is not None and byte_range.last >= expected_size:
            raise InvalidInput(f"byte_range: expected a range within {expected_size} bytes, got {byte_range}")
        attempt, source = (
            _Attempt(MinimumRate(self._limits.stall_timeout, self._limits.minimum_bytes)),
            source_name(url),
        )
        try:
            async with self._request(url, byte_range, expected.version, attempt, more) as response:
                plan = validate_response(response.status_code, response.headers, byte_range, expected)
                count = partial(self._count_bytes, source)
                attempt.body = CheckedBody(
                    response,
                    plan,
                    attempt.minimum_rate,
                    self._clock,
                    count,
                    large_reads=self._limits.large_reads,
                )
                async with aclosing(attempt.body.chunks()) as chunks:
                    yield SourceResponse(
                        plan.status,
                        plan.first,
                        plan.length,
                        plan.total,
                        plan.media_type,
                        plan.validators,
                        chunks,
                        response.headers,
                        attempt.first_byte or 0.0,
                        plan.encoding,
                    )
        except SourceClosed:
            raise
        except SourceError as error:
            attempt.failure = error.reason
            raise
        finally:
            if attempt.body is not None:
                attempt.body.count_rest()
            self._observe(attempt.observation(source))

    async def ask(self, url: str, headers: Mapping[str, str]) -> SourceAnswer:
        """Send a GET with these headers in addition, and discard its body. Redirects are followed.

        Raises SourceError.
        """
        attempt = _Attempt(MinimumRate(self._limits.stall_timeout, self._limits.minimum_bytes))
        try:
            async with self._request(url, None, UNKNOWN_VERSION, attempt, headers) as response:
                return SourceAnswer(response.status_code, response.headers, attempt.first_byte or 0.0)
        except SourceError as error:
            attempt.failure = error.reason
            raise
        finally:
            self._observe(attempt.observation(source_name(url)))

    @asynccontextmanager
    async def _request(
        self,
        url: str,
        byte_range: ByteRange | None,
        version: Version,
        attempt: _Attempt,
        more: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        try:
            parse_source_url(url)
        except InvalidInput as error:
            raise SourceUnreachable(f"invalid source URL: {error}") from error
        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "distributor-node"}
        headers |= more or {}
        if byte_range is not None:
            headers["Range"] = str(byte_range)
            if version.if_range is not None:
                headers["If-Range"] = version.if_range
        started = self._clock()
        async with self._connections.request(url, headers) as response:
            attempt.first_byte = self._clock() - started
            yield response


class _Attempt:
    """What is known of one request by now."""

    def __init__(self, minimum_rate: MinimumRate) -> None:
        self.minimum_rate = minimum_rate
        self.body: CheckedBody | None = None
        self.first_byte: float | None = None
        self.failure: str | None = None

    def observation(self, source: str) -> SourceObservation:
        received = self.body.received if self.body is not None else 0
        waited = (self.first_byte or 0.0) + self.minimum_rate.waited
        return SourceObservation(source, self.first_byte, waited, received, self.failure)


# The body: exactly the bytes that the headers and the catalog allow.

# Seconds that a body may take to end after its last expected byte. After that, it counts as complete.
_END_TIMEOUT = 1.0
# Seconds of waiting for a source after a pause, from which on it is not the pause that it closes the connection for.
_AFTER_PAUSE = 1.0
# Bytes from which a body is read directly from the connection, which cannot be reused after that.
_MIN_RAW_BODY = 8 * 1024 * 1024


class CheckedBody:
    """Reads one body. `received` counts all bytes that have arrived, including skipped ones."""

    def __init__(
        self,
        response: httpx.Response,
        plan: BodyPlan,
        minimum_rate: MinimumRate,
        clock: Callable[[], float],
        count: Callable[[int], None],
        *,
        large_reads: bool = False,
    ) -> None:
        """`clock`: in seconds. `minimum_rate`: is sent only the time spent waiting for the source. `count`: is told how
        many bytes have arrived."""
        self._raw = _raw_chunks(response, large_reads=large_reads)
        self._plan = plan
        self._minimum_rate = minimum_rate
        self._clock = clock
        self._count, self._counted = count, 0
        self._returned_at: float | None = None  # when the reader got the last bytes
        self._waited_since_pause = inf  # seconds
        self.received = 0

    async def chunks(self) -> AsyncGenerator[bytes | memoryview]:
        """Yield exactly the planned bytes.

        Raises SourceUnreachable for too few bytes (SourceClosed where the reader had paused), SourceWrong for too many,
        and SourceTooSlow.
        """
        try:
            async for chunk in self._planned():
                yield chunk
        finally:
            await self._raw.aclose()

    async def _planned(self) -> AsyncGenerator[bytes | memoryview]:
        skip, length = self._plan.skip, self._plan.length
        sent = 0
        if length == 0 and self._plan.to_the_end:
            await self._expect_end(length)
        while length is None or sent < length:
            chunk = await self._next(self._minimum_rate.time_left)
            if chunk is None:
                if length is not None:
                    kind = SourceUnreachable if self._waited_since_pause >= _AFTER_PAUSE else SourceClosed
                    raise kind(f"body ended after {sent} of {length} bytes")
                return
            if skip:
                skipped = min(skip, len(chunk))
                skip -= skipped
                chunk = chunk[skipped:]
            if length is not None and len(chunk) > length - sent:
                if self._plan.to_the_end:
                    raise SourceWrong(f"body has more than the announced {length} bytes")
                chunk = chunk[: length - sent]
            sent += len(chunk)
            if length is not None and sent == length and self._plan.to_the_end:
                await self._expect_end(length)
            if chunk:
                yield chunk

    async def _expect_end(self, length: int) -> None:
        """Check that the body ends. Called before the last chunk is yielded: a longer body must not look complete."""
        try:
            surplus = await self._next(_END_TIMEOUT)
        except (SourceTooSlow, SourceUnreachable):
            return  # all bytes have arrived: it does not matter how the connection ends
        if surplus is not None:
            raise SourceWrong(f"body has more than the announced {length} bytes")

    async def _next(self, timeout: float) -> bytes | memoryview | None:
        """Return the next bytes that arrive; None at the end of the body."""
        if timeout <= 0:
            raise SourceTooSlow(f"below the minimum rate, after {self.received} bytes")
        started = self._clock()
        if self._returned_at is not None and started - self._returned_at >= PAUSE:
            self._waited_since_pause = 0.0
        try:
            return await self._receive(timeout, started)
        except SourceUnreachable as error:
            if self._waited_since_pause >= _AFTER_PAUSE:
                raise
            raise SourceClosed(f"closed while not read, after {self.received} bytes") from error
        finally:
            self._returned_at = self._clock()
            self._waited_since_pause += self._returned_at - started

    async def _receive(self, timeout: float, started: float) -> bytes | memoryview | None:
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
        if self.received - self._counted >= _COUNT_STEP:
            self.count_rest()
        return chunk

    def count_rest(self) -> None:
        """Count what has arrived since the last time."""
        if self.received > self._counted:
            self._count(self.received - self._counted)
            self._counted = self.received


async def _raw_chunks(response: httpx.Response, *, large_reads: bool) -> AsyncGenerator[bytes | memoryview]:
    """Yield the body as it was sent, without httpx's layers that decode and count."""
    stream = response.extensions.get("network_stream")
    length = _stated_length(response)
    if isinstance(stream, SourceStream) and stream.at_body and length > _MIN_RAW_BODY:
        receive = stream.receive_large if large_reads else stream.receive
        async for chunk in _read_raw_stream(receive, length):
            yield chunk
        return
    body = response.stream
    if not isinstance(body, httpx.AsyncByteStream):
        raise SourceUnreachable("the response has no readable body")
    async for chunk in body:
        yield chunk


def _stated_length(response: httpx.Response) -> int:
    """Return the body's length on the wire; 0 if it is unknown or the body is chunked."""
    stated = response.headers.get("Content-Length", "")
    framed = "Transfer-Encoding" in response.headers
    return int(stated) if stated.isascii() and stated.isdigit() and not framed else 0


async def _read_raw_stream(
    receive: Callable[[], Awaitable[bytes | memoryview]], length: int
) -> AsyncGenerator[bytes | memoryview]:
    """Read the body directly from the connection, which saves three copies of each byte.

    httpcore does not notice that the body has been read, so it closes the connection.
    """
    left = length
    while left:
        chunk = (await receive())[:left]
        if not chunk:
            raise SourceUnreachable(f"body ended after {length - left} of {length} bytes")
        left -= len(chunk)
        yield chunk


# Whether a source is too slow. Pure: only the time spent waiting for the source counts.

_SLOTS = 10  # in the window: a verdict may be late by one of them


@dataclass(slots=True)
class _Slot:
    """Bytes received in a tenth of the window. Times are seconds of waiting since the start."""

    begins: float
    latest: float
    received: int


class MinimumRate:
    """A sliding window of `window` seconds of waiting, in which at least `minimum` bytes must arrive.

    Time counts only while we wait for the source. So a reader that pauses does not make the source look slow.
    """

    def __init__(self, window: float, minimum: int) -> None:
        """`window`: in seconds. `minimum`: in bytes, at least 1."""
        self._window = window
        self._minimum = max(1, minimum)
        self.waited = 0.0
        # The window starts with a credit of `minimum` bytes, so that the same rule applies from the beginning.
        self._slots = deque([_Slot(0.0, 0.0, self._minimum)])
        self._sum = self._minimum

    def record(self, waited: float, received: int) -> None:
        """Add `waited` seconds, at the end of which `received` bytes arrived."""
        self.waited += waited
        while self._slots and self._slots[0].latest <= self.waited - self._window:
            self._sum -= self._slots.popleft().received
        self._sum += received
        newest = self._slots[-1] if self._slots else None
        # The credit keeps a slot of its own: together with early arrivals it would expire later.
        if newest is not None and newest.begins > 0.0 and self.waited - newest.begins < self._window / _SLOTS:
            newest.latest = self.waited
            newest.received += received
        else:
            self._slots.append(_Slot(self.waited, self.waited, received))

    @property
    def time_left(self) -> float:
        """Seconds to wait for the next bytes. 0 or less: the source is too slow."""
        left = self._sum
        for slot in self._slots:
            if left < self._minimum:
                return 0.0
            left -= slot.received
            if left < self._minimum:
                return slot.latest + self._window - self.waited
        return 0.0
