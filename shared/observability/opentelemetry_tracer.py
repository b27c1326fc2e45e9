"""The tracer that sends spans to an OpenTelemetry collector by OTLP over HTTP. Imported only where tracing is on.

A thread sends the spans in batches. A collector that is down, slow or hanging costs spans, never a request: the queue
between is bounded, and so is the wait at the end.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import getrandbits

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import TRACE_SPANS
from distributor_node.shared.observability.tracing import (
    Attributes,
    Kind,
    Span,
    Value,
    parse_traceparent,
)

CLOSE_SECONDS = 2.0
"""Seconds that a process waits at its end for a collector to take the last spans."""

_KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
_KNOWN_FLAGS = 0x03  # sampled, and random trace id; others are sent as 0 (W3C Trace Context, section 3.2.2.5)

logger = structlog.get_logger()


class OpenTelemetryTracer:
    """See `Tracer`. Where spans are sent, which traces are sampled, and the bounds of the queue are in `OTEL_…`."""

    def __init__(self, service: str, version: str, instance: str) -> None:
        """Raises ConfigurationError for a variable that cannot be followed."""
        named = {"service.version": version, "service.instance.id": instance}
        if not os.environ.get(OTEL_SERVICE_NAME) and not re.search(
            r"(^|,)\s*service\.name\s*=", os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        ):
            named["service.name"] = f"distributor-{service}"
        self._ids = _Ids()
        try:
            _check_environment()
            self._provider = TracerProvider(
                resource=Resource.create(named), id_generator=self._ids, shutdown_on_exit=False
            )
            if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp":
                self._provider.add_span_processor(BatchSpanProcessor(_CountingExporter(OTLPSpanExporter())))
        except ValueError as error:
            raise ConfigurationError(f"OTEL_…: {error}") from error
        self._tracer = self._provider.get_tracer("distributor_node", version)

    def start(
        self, name: str, kind: Kind, parent: Span | str, started: float | None, attributes: Attributes
    ) -> _RunningSpan:
        return _RunningSpan(
            self._tracer.start_span(
                name,
                trace.set_span_in_context(_parent(parent)),
                _KINDS[kind],
                {name: value for name, value in attributes.items() if value is not None},
                start_time=None if started is None else int(started * 1e9),
            )
        )

    def record(
        self, name: str, kind: Kind, parent: str, seconds: float, attributes: Callable[[], Attributes]
    ) -> Span | None:
        context = parse_traceparent(parent) if parent else None
        if context is None:
            trace_id, over = getrandbits(128) or 1, None
        else:
            trace_id, over = context.trace_id, trace.set_span_in_context(_parent(parent))
        # Asked before the span is made: one that is not sampled costs a tenth of one that is.
        sampled = self._provider.sampler.should_sample(over, trace_id, name, _KINDS[kind])
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        if over is None:
            self._ids.next_trace_id = trace_id
        recorded = self.start(name, kind, parent, time.time() - seconds, attributes())
        recorded.end()
        return recorded

    async def close(self) -> None:
        """Send what has ended. Returns after CLOSE_SECONDS at the latest; what is not sent by then is lost."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the event loop has ended: it waited no longer
                loop.call_soon_threadsafe(closed.set)

        # A daemon: the end of the process does not wait for it, as it would for a thread of an executor.
        threading.Thread(target=shut_down, name="close-tracing", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await closed.wait()
        except TimeoutError:
            logger.warning("trace_spans_lost", reason=f"not sent within {CLOSE_SECONDS:g} s of the shutdown")


def _check_environment() -> None:
    """Raise ValueError for what is asked for by the standard's variables and cannot be done here."""
    expected = {
        "OTEL_TRACES_EXPORTER": ("otlp", "none"),
        "OTEL_EXPORTER_OTLP_PROTOCOL": ("http/protobuf",),
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": ("http/protobuf",),
    }
    for name, values in expected.items():
        found = os.environ.get(name)
        if found and found not in values:
            raise ValueError(f"{name}: expected {' or '.join(values)}, got {found!r}")


def _parent(parent: Span | str) -> trace.Span:
    if isinstance(parent, _RunningSpan):
        return parent.span
    context = _remote(parent) if isinstance(parent, str) else None
    return trace.INVALID_SPAN if context is None else trace.NonRecordingSpan(context)


def _remote(traceparent: str) -> trace.SpanContext | None:
    parsed = parse_traceparent(traceparent)
    if parsed is None:
        return None
    return trace.SpanContext(
        parsed.trace_id, parsed.span_id, is_remote=True, trace_flags=TraceFlags(parsed.flags)
    )


class _Ids(RandomIdGenerator):
    """Random ids. `next_trace_id`: the one that was sampled already, for the span that is started next."""

    def __init__(self) -> None:
        self.next_trace_id = 0

    def generate_trace_id(self) -> int:
        chosen, self.next_trace_id = self.next_trace_id, 0
        return chosen or super().generate_trace_id()


class _RunningSpan:
    """See `RunningSpan`."""

    __slots__ = ("span",)

    def __init__(self, span: trace.Span) -> None:
        self.span = span

    @property
    def traceparent(self) -> str:
        context = self.span.get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & _KNOWN_FLAGS:02x}"

    @property
    def trace_id(self) -> str:
        context = self.span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else ""

    @property
    def exemplar(self) -> dict[str, str] | None:
        context = self.span.get_span_context()
        if not context.trace_flags.sampled:
            return None
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def set(self, name: str, value: Value | None) -> None:
        if value is not None:
            self.span.set_attribute(name, value)

    def event(self, name: str) -> None:
        self.span.add_event(name)

    def fail(self, reason: str) -> None:
        self.span.set_status(Status(StatusCode.ERROR, reason))

    def link(self, traceparent: str) -> None:
        context = _remote(traceparent)
        if context is not None:
            self.span.add_link(context)

    def end(self) -> None:
        self.span.end()


class _CountingExporter(SpanExporter):
    """Counts what is sent, and logs an outage of the collector once, however many batches fail in it."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._outage = OutageLog(logger, down="trace_export_failed", up="trace_export_recovered")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001  whatever the collector answers, the thread goes on
            self._outage.failed(error)
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._outage.succeeded()
        else:
            self._outage.failed("the collector does not take spans")
        TRACE_SPANS.labels(result="sent" if result is SpanExportResult.SUCCESS else "failed").inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)
