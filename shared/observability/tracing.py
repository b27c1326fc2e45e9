"""Traces: the spans of one request through the API, the job and the fetcher, as OpenTelemetry defines them.

Tracing is off by default and costs nothing then: nothing of OpenTelemetry is imported, and `span` returns one object
that does nothing. `tracing` turns it on for a process; opentelemetry_tracer.py sends the spans to a collector.

Between processes a span is named by a traceparent of version 00 (W3C Trace Context, section 3.2): `00-`, 32 hexadecimal
digits of the trace, `-`, 16 of the span, `-`, two of the flags. Their last bit says whether the trace is sampled.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability.logging import redact_text

Kind = Literal["internal", "server", "client", "producer", "consumer"]
"""What a span is to its trace (OpenTelemetry, SpanKind)."""

Value = str | int | float | bool
Attributes = Mapping[str, Value | None]
"""Attributes of a span by name. None: the attribute is left out."""

_MAX_REASON = 500
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class SpanContext:
    """What a traceparent says."""

    trace_id: int
    span_id: int
    flags: int


def parse_traceparent(text: str) -> SpanContext | None:
    """Read a traceparent (W3C Trace Context, sections 3.2 and 4.3). None if it is not valid, and then it is ignored.

    A later version than 00 may have more fields, which are ignored. Version ff is forbidden, as are ids of zeros alone.
    """
    found = _TRACEPARENT.fullmatch(text.strip(" \t"))
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5] is not None):
        return None
    context = SpanContext(int(found[2], 16), int(found[3], 16), int(found[4], 16))
    return context if context.trace_id and context.span_id else None


class Span(Protocol):
    """One step of a trace, while it runs."""

    @property
    def traceparent(self) -> str:
        """Names this span for other processes; empty while tracing is off."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty while tracing is off or the trace is not sampled."""

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Labels that name this span beside an observation of a metric (OpenMetrics). None if it is not sampled."""

    def set(self, name: str, value: Value | None) -> None:
        """Set an attribute. None: do nothing."""

    def event(self, name: str) -> None:
        """Note that something has happened now."""

    def fail(self, reason: str) -> None:
        """Mark the span as failed."""

    def link(self, traceparent: str) -> None:
        """Link a span of another trace. An invalid or empty traceparent is ignored."""


class RunningSpan(Span, Protocol):
    """A span that its tracer has started."""

    def end(self) -> None:
        """End the span, once."""


class Tracer(Protocol):
    """Starts the spans of a process, and sends those that have ended."""

    def start(
        self, name: str, kind: Kind, parent: Span | str, started: float | None, attributes: Attributes
    ) -> RunningSpan:
        """Start a span. `parent`: a span of this process, or a traceparent; an invalid one begins a trace.

        `started`: POSIX seconds. None: now.
        """

    def record(
        self, name: str, kind: Kind, parent: str, seconds: float, attributes: Callable[[], Attributes]
    ) -> Span | None:
        """Record a span that ends now, `seconds` after it began, if its trace is sampled.

        `attributes` is called only for what is recorded.
        """

    async def close(self) -> None:
        """Send what has ended, within a bound."""


class _NoSpan:
    traceparent = trace_id = ""
    exemplar = None

    def set(self, name: str, value: Value | None) -> None:
        pass

    def event(self, name: str) -> None:
        pass

    def fail(self, reason: str) -> None:
        pass

    def link(self, traceparent: str) -> None:
        pass


class _Off:
    def __enter__(self) -> Span:
        return NO_SPAN

    def __exit__(self, *_: object) -> None:
        return None


NO_SPAN: Span = _NoSpan()
_OFF = _Off()
_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)
_tracer: Tracer | None = None


def installed_tracer() -> Tracer | None:
    """Return the tracer of this process, None while tracing is off."""
    return _tracer


def current_span() -> Span:
    """Return the innermost span of this task that is current; one that does nothing while tracing is off."""
    return _current.get()


def span(
    name: str,
    kind: Kind = "internal",
    *,
    parent: Span | str | None = None,
    current: bool = True,
    started: float | None = None,
    attributes: Attributes | None = None,
) -> AbstractContextManager[Span]:
    """A span that lasts as long as the block. An exception marks it as failed, a cancellation as cancelled.

    `parent`: a span or a traceparent; the default is the current span. `current`: the span is the parent of those that
    begin in the block. Generators must not set it: their block may end in another task. `started`: POSIX seconds.
    """
    if _tracer is None:
        return _OFF
    over = _current.get() if parent is None else parent
    return _Block(_tracer.start(name, kind, over, started, attributes or {}), current)


class _Block:
    def __init__(self, running: RunningSpan, current: bool) -> None:
        self._span, self._is_current = running, current
        self._token: Token[Span] | None = None

    def __enter__(self) -> Span:
        if self._is_current:
            self._token = _current.set(self._span)
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
        if isinstance(error, asyncio.CancelledError):
            self._span.event("cancelled")
        elif error is not None and not isinstance(error, GeneratorExit):
            self._span.fail(f"{type(error).__name__}: {redact_text(str(error))[:_MAX_REASON]}")
        self._span.end()


@asynccontextmanager
async def tracing(enabled: bool, service: str, *, version: str, instance: str) -> AsyncIterator[None]:
    """Trace while the block runs, if `enabled`. At its end the last spans are sent, within a bound.

    `service` (api, fetcher or standalone), `version` and `instance` name the process. Where and how spans are sent is
    in the environment, by the variables that OpenTelemetry defines (`OTEL_…`). Raises ConfigurationError if the
    packages are missing, or for variables that cannot be followed.
    """
    global _tracer
    if not enabled:
        yield
        return
    try:
        # Imported here, so that a process without tracing does not load it.
        from distributor_node.shared.observability import opentelemetry_tracer  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            "tracing.enabled: expected the packages of the extra `tracing` (pip install 'distributor-node[tracing]'),"
            f" got {error}"
        ) from error
    tracer = opentelemetry_tracer.OpenTelemetryTracer(service, version, instance)
    _tracer = tracer
    try:
        yield
    finally:
        _tracer = None
        await tracer.close()
