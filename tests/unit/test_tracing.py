"""What a traceparent is, what tracing costs when it is off, and what is refused of the standard's variables."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sanic.compat import Header

from distributor_node.services.api.fast_path.handler import SpanLimit
from distributor_node.services.api.request_log import RequestRecord
from distributor_node.services.api.sanic_app import TracedAssets
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.tracing import NO_SPAN, parse_traceparent
from tests.servers.otlp_collector import Collector, otlp_collector

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"  00-{TRACE}-{SPAN}-00\t", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE[1:]}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"00-{TRACE}-{SPAN}-1", False),
        ("", False),
    ],
)
def test_a_traceparent_is_what_the_standard_says(text: str, valid: bool) -> None:
    context = parse_traceparent(text)
    assert (context is not None) == valid
    if context is not None:
        assert (f"{context.trace_id:032x}", f"{context.span_id:016x}") == (TRACE, SPAN)


async def test_off_there_is_one_span_and_it_does_nothing() -> None:
    async with tracing.tracing(False, "api", version="1", instance="here"):
        with tracing.span("one") as one, tracing.span("two", parent=one) as two:
            two.set("name", 1)
            two.fail("reason")
            assert one is two is tracing.current_span() is NO_SPAN
            assert (one.traceparent, one.trace_id, one.exemplar) == ("", "", None)
        assert tracing.installed_tracer() is None


_SERVES_AND_SHOWS_MODULES = """
import asyncio, sys, tempfile

class HiddenFromRedis:
    # redis-py loads OpenTelemetry wherever it is installed. What is left in sys.modules is what the node has loaded.
    def find_spec(self, name, path=None, target=None):
        if name == "opentelemetry":
            frame = sys._getframe()
            while frame is not None:
                if frame.f_globals.get("__name__", "").startswith("redis."):
                    raise ModuleNotFoundError(name)
                frame = frame.f_back

sys.meta_path.insert(0, HiddenFromRedis())
from pathlib import Path
from distributor_node.services.demo.objects import generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.standalone.main import run_standalone
import distributor_node.services.api.supervisor, distributor_node.services.evictor.main
import distributor_node.services.fetcher.main, distributor_node.services.command_line.main
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.settings.load import load_settings
from tests.end_to_end.client import get
from tests.end_to_end.stack import write_manifest
from contextlib import AsyncExitStack
import os

async def main():
    folder = Path(tempfile.mkdtemp())
    one = generated_object("1", 100_000)
    async with StorageNode([one]).run() as node, AsyncExitStack() as resources:
        write_manifest(folder / "manifest.json", [one], [f"{node.api_url}/files/"])
        os.environ |= {
            "DISTRIBUTOR_STATE_STORE__URL": "memory://", "DISTRIBUTOR_JOB_QUEUE__URL": "memory://",
            "DISTRIBUTOR_CATALOG__MANIFEST": str(folder / "manifest.json"),
            "DISTRIBUTOR_STORAGE__PATH": str(folder / "volume"), "DISTRIBUTOR_STORAGE__LIMIT": "1G",
            "DISTRIBUTOR_PUBLIC_API__PORT": "0", "DISTRIBUTOR_METRICS__PORT": "0",
            "DISTRIBUTOR_PUBLIC_API__HOST": "127.0.0.1", **MORE,
        }
        scope = ServiceScope(asyncio.Event(), resources)
        port = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(run_standalone(scope, load_settings(None), port.set_result))
        url = f"http://127.0.0.1:{await port}/api/v1/assets/1"
        seen = []
        while "hit" not in seen:
            answer = await get(url)
            assert answer.complete and answer.status == 200
            seen.append(answer.headers["x-cache"])
            await asyncio.sleep(0.02)
        assert seen[0] == "miss"
        scope.stop_requested.set()
        await running
    print("opentelemetry" in sys.modules, "opentelemetry.sdk.trace" in sys.modules)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("more", "loaded"),
    [
        ("{}", "False False"),
        ('{"DISTRIBUTOR_TRACING__ENABLED": "1", "OTEL_TRACES_EXPORTER": "none"}', "True True"),
    ],
)
def test_a_node_loads_opentelemetry_only_if_tracing_is_on(more: str, loaded: str) -> None:
    code = _SERVES_AND_SHOWS_MODULES.replace("MORE", more)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == loaded


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "grpc",
            "OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got 'grpc'",
        ),
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER: expected otlp or none, got 'zipkin'"),
    ],
)
async def test_what_cannot_be_followed_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=expected):
        async with tracing.tracing(True, "api", version="1", instance="here"):
            pass
    assert tracing.installed_tracer() is None


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with otlp_collector() as collector:
        for name, value in collector.environment().items():
            monkeypatch.setenv(name, value)
        yield collector


async def test_spans_are_nested_and_tell_how_they_ended(collector: Collector) -> None:
    async with tracing.tracing(True, "api", version="1", instance="here"):
        with tracing.span("outer", "server", parent=f"00-{TRACE}-{SPAN}-01") as outer:
            outer.set("absent", None)
            with pytest.raises(OSError, match="full"), tracing.span("failing"):
                raise OSError("full: http://user:secret@host/")
            with pytest.raises(asyncio.CancelledError), tracing.span("cancelled"):
                raise asyncio.CancelledError
            task = asyncio.create_task(_in_a_span("task"))
            with tracing.span("aside", "client", current=False):
                assert tracing.current_span() is outer
            outer.link(f"00-{TRACE[::-1]}-{SPAN}-01")
            outer.link("nonsense")
            await task
        assert tracing.current_span() is NO_SPAN
    spans = {span.name: span for span in collector.spans}
    assert {span.service for span in spans.values()} == {"distributor-api"}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert spans["outer"].parent == SPAN
    assert spans["outer"].attributes == {}
    assert spans["outer"].links == [(TRACE[::-1], SPAN)]
    assert {spans[name].parent for name in ("failing", "cancelled", "task", "aside")} == {
        spans["outer"].span_id
    }
    assert {name for name, span in spans.items() if span.failed} == {"failing"}
    assert spans["cancelled"].events == ["cancelled"]


async def test_a_response_whose_client_has_left_has_what_was_sent(collector: Collector) -> None:
    """A client that has read the last byte may close its connection before the response has ended here."""

    class Leaving:
        async def handle(self, request: Any, _: ObjectId) -> None:
            headers = {"X-Cache": "pending", "X-Data-Source": "local"}
            request.stream.response, request.ctx.record.sent = SimpleNamespace(status=200, headers=headers), 7
            raise asyncio.CancelledError

    request: Any = SimpleNamespace(
        method="GET",
        headers=Header(),
        ctx=SimpleNamespace(record=RequestRecord("asked", "GET")),
        stream=SimpleNamespace(response=None),
    )
    async with tracing.tracing(True, "api", version="1", instance="here"):
        with pytest.raises(asyncio.CancelledError):
            await TracedAssets(Leaving()).handle(request, ObjectId("1"))
    (span,) = collector.spans
    assert span.events == ["cancelled"]
    shown = {name: value for name, value in span.attributes.items() if name.startswith("distributor.")}
    assert shown == {
        "distributor.object_id": "1",
        "distributor.request_id": "asked",
        "distributor.cache": "pending",
        "distributor.data_source": "local",
    }
    assert (span.attributes["http.response.status_code"], span.attributes["http.response.body.size"]) == (
        200,
        7,
    )


async def _in_a_span(name: str) -> None:
    with tracing.span(name):
        await asyncio.sleep(0)


async def test_the_parent_decides_whether_a_trace_is_sampled(collector: Collector) -> None:
    async with tracing.tracing(True, "api", version="1", instance="here"):
        with tracing.span("outer", parent=f"00-{TRACE}-{SPAN}-00") as outer, tracing.span("inner") as inner:
            assert (outer.trace_id, outer.exemplar, inner.exemplar) == ("", None, None)
            # The job carries it, so that the fetcher begins no trace of its own.
            assert inner.traceparent.startswith(f"00-{TRACE}-")
            assert inner.traceparent.endswith("-00")
        with tracing.span("after"):
            pass
    assert [span.name for span in collector.spans] == ["after"]


async def test_recorded_spans_are_sampled_by_the_standards_variables(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    asked = 0

    def attributes() -> tracing.Attributes:
        nonlocal asked
        asked += 1
        return {"n": asked}

    async with tracing.tracing(True, "api", version="1", instance="here"):
        tracer = tracing.installed_tracer()
        assert tracer is not None
        found = [tracer.record("hit", "server", "", 0.5, attributes) for _ in range(400)]
        parent = f"00-{TRACE}-{SPAN}-01"
        assert tracer.record("hit", "server", parent, 0.5, attributes) is not None
        # A trace that begins after a recorded one has an id of its own.
        with tracing.span("one") as one, tracing.span("two", parent="") as two:
            assert one.traceparent[:35] != two.traceparent[:35]
    sampled = [span for span in found if span is not None]
    assert 40 < len(sampled) < 180
    assert asked == len(sampled) + 1
    hits = collector.named("hit")
    assert len(hits) == asked
    assert len({span.trace_id for span in hits}) == asked
    assert {span.service for span in hits} == {"named"}
    assert [span.parent for span in hits if span.trace_id == TRACE] == [SPAN]
    assert all(0.49e9 < span.end - span.start < 0.6e9 for span in hits)


def test_spans_of_hits_are_limited_for_each_second() -> None:
    limit = SpanLimit(per_second=3)

    def recorded(start: float, count: int) -> int:
        admitted = 0
        for number in range(count):
            if limit.admits(start + number / 1000):
                admitted += 1
                limit.count()
        return admitted

    before = refused()
    assert recorded(100.0, 10) == 3
    assert recorded(100.9, 10) == 0
    assert recorded(101.5, 2) == 2
    # The count of one second is shown with the next.
    assert refused() - before == 17
    # What is not sampled does not count.
    assert all(limit.admits(200.0 + number / 1000) for number in range(10))


def refused() -> float:
    return REGISTRY.get_sample_value("distributor_trace_spans_total", {"result": "over_limit"}) or 0.0
