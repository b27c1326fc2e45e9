"""Reads one object, or a range of it, from one source."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Self

import httpx

from shared.adapters.sources.answer import SourceResponse
from shared.adapters.sources.body import CheckedBody
from shared.adapters.sources.checks import validate_response
from shared.adapters.sources.connections import Connections
from shared.adapters.sources.limits import SourceLimits
from shared.adapters.sources.observation import Observer, SourceObservation, ignore
from shared.adapters.sources.pace import MinimumRate
from shared.domain.errors import InvalidInput, SourceError, SourceUnreachable
from shared.domain.objects import source_name
from shared.domain.ranges import ByteRange
from shared.domain.source_urls import parse_source_url


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
