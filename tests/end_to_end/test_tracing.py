"""One trace from a request to the commit of its fetch, over real servers and processes, as a collector gets it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator

import pytest

from distributor_node.services.demo.faults import Fault
from distributor_node.services.demo.objects import MIB, generated_object
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.servers.otlp_collector import Collector, ReceivedSpan, otlp_collector
from tests.waiting import eventually

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GET = "GET /api/v1/assets/<object_id>"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with otlp_collector() as collector:
        yield collector


@pytest.fixture
async def traced(harness: Harness, collector: Collector) -> Harness:
    harness.publish([generated_object("1", 2 * MIB), generated_object("2", 1000)])
    harness.stack.environment |= collector.environment()
    await harness.stack.up()
    return harness


@pytest.mark.servers
async def test_one_miss_is_one_trace_through_both_processes(traced: Harness, collector: Collector) -> None:
    traced.first.faults.add(Fault(bytes_per_second=2 * MIB))
    head = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-ID": "asked"}
    first = asyncio.create_task(get(traced.stack.url("1"), head))
    await eventually(lambda: bool(traced.first.requests.of("1", "GET")), 30)
    follower = await get(traced.stack.url("1"))
    answer = await first
    assert (answer.status, answer.headers["x-cache"], answer.complete) == (200, "miss", True)
    assert (follower.status, follower.headers["x-cache"], follower.complete) == (200, "pending", True)
    await eventually(lambda: bool(collector.named("fetch")) and len(collector.named(GET)) == 2, 30)

    spans = collector.of_trace(TRACE)
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans), spans

    def parents(span: ReceivedSpan) -> list[str]:
        """The names of the spans above, from the outermost one."""
        above = next((one for one in spans if one.span_id == span.parent), None)
        return [] if above is None else [*parents(above), above.name]

    request, publish, fetch = by_name[GET], by_name["publish"], by_name["fetch"]
    assert request.parent == SPAN
    assert {name: parents(span) for name, span in by_name.items()} == {
        GET: [],
        "catalog": [GET],
        "claim": [GET],
        "publish": [GET],
        "fetch": [GET, "publish"],
        "queue_wait": [GET, "publish", "fetch"],
        "lease": [GET, "publish", "fetch"],
        "source_request": [GET, "publish", "fetch"],
        "verification": [GET, "publish", "fetch"],
        "publication": [GET, "publish", "fetch"],
        "commit": [GET, "publish", "fetch"],
    }
    assert {
        name: span.service for name, span in by_name.items() if "api" not in span.service
    } == dict.fromkeys(
        ("fetch", "queue_wait", "lease", "source_request", "verification", "publication", "commit"),
        "distributor-fetcher",
    )
    assert request.instance != fetch.instance
    kinds = (request.kind, publish.kind, fetch.kind, by_name["source_request"].kind)
    assert kinds == ("server", "producer", "consumer", "client")
    assert request.attributes == {
        "http.request.method": "GET",
        "http.route": "/api/v1/assets/<object_id>",
        "http.response.status_code": 200,
        "http.response.body.size": 2 * MIB,
        "distributor.object_id": "1",
        "distributor.request_id": "asked",
        "distributor.cache": "miss",
        "distributor.data_source": "local",
    }
    assert fetch.attributes["distributor.outcome"] == "fetched"
    assert by_name["source_request"].events == request.events == ["first_byte"]
    ordered = ["queue_wait", "lease", "source_request", "verification", "publication", "commit"]
    starts = [by_name[name].start for name in ordered]
    assert starts == sorted(starts)
    assert all(span.start <= span.end and not span.failed for span in spans)
    lines = [json.loads(line) for line in traced.stack.logs().splitlines() if line.startswith("{")]
    traced_events = {line["event"] for line in lines if line.get("trace_id") == TRACE}
    assert traced_events >= {"request_answered", "job_ended"}

    # The follower has a trace of its own, which names the fetch that it joined.
    (joined,) = [span for span in collector.named(GET) if span.trace_id != TRACE]
    assert joined.attributes["distributor.cache"] == "pending"
    assert joined.links == [(TRACE, fetch.span_id)]
    assert joined.parent == ""


@pytest.mark.servers
async def test_hits_errors_and_heads_have_spans_too(traced: Harness, collector: Collector) -> None:
    await get(traced.stack.url("2"))
    await traced.stack.until_hit("2")
    head = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    # A request with TE takes the framework's path, the others the fast one.
    for more, status in (({}, 200), ({"TE": "trailers"}, 200), ({"Range": "bytes=0-9"}, 206)):
        assert (await get(traced.stack.url("2"), head | more)).status == status
    assert (await get(traced.stack.url("unknown"), head)).status == 404
    assert (await get(traced.stack.url("2"), head, method="HEAD")).status == 200
    unsampled = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
    assert (await get(traced.stack.url("2"), unsampled)).status == 200
    await get(traced.stack.url("2"), {"traceparent": "nonsense"})
    await eventually(
        lambda: any(
            span.parent == "" and span.attributes.get("distributor.cache") == "hit"
            for span in collector.named(GET)
        ),
        30,
    )
    found = [span for span in collector.of_trace(TRACE) if span.parent == SPAN]
    shown = sorted(
        (
            span.name.split()[0],
            span.attributes["http.response.status_code"],
            span.attributes.get("distributor.cache", ""),
            span.failed,
        )
        for span in found
    )
    assert shown == [
        ("GET", 200, "hit", False),
        ("GET", 200, "hit", False),
        ("GET", 206, "hit", False),
        ("GET", 404, "", False),
        ("HEAD", 200, "hit", False),
    ]
    (small,) = [span for span in found if span.attributes["http.response.status_code"] == 206]
    assert small.attributes["http.response.body.size"] == 10


@pytest.mark.servers
async def test_the_time_to_first_byte_names_a_trace(traced: Harness, collector: Collector) -> None:
    await get(traced.stack.url("1"), {"traceparent": f"00-{TRACE}-{SPAN}-01"})
    await traced.stack.until_hit("1")
    hit_trace = TRACE[::-1]
    await get(traced.stack.url("1"), {"traceparent": f"00-{hit_trace}-{SPAN}-01"})
    (api,) = traced.stack.of("api")
    metrics = f"{api.health_url}/metrics"
    answer = await get(metrics, {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    text = answer.body.decode()
    assert text.endswith("# EOF\n")
    named = dict(
        re.findall(
            r'time_to_first_byte_seconds_bucket\{cache="(\w+)",le="[^"]+"\} \S+ # \{span_id="\w+",trace_id="(\w+)"\}',
            text,
        )
    )
    assert named == {"miss": TRACE, "hit": hit_trace}
    plain = await get(metrics)
    assert plain.headers["content-type"].startswith("text/plain")
    assert b"# {" not in plain.body


@pytest.mark.servers
@pytest.mark.parametrize("state", ["down", "failing", "hanging"])
async def test_a_collector_that_takes_nothing_slows_no_request_and_no_shutdown(
    harness: Harness, collector: Collector, state: str
) -> None:
    objects = [generated_object(str(number), 1000) for number in range(20)]
    harness.publish(objects)
    harness.stack.environment |= collector.environment()
    if state == "down":
        harness.stack.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
    elif state == "failing":
        collector.status = 400
    else:
        collector.hanging.set()
    await harness.stack.up()
    answers = await asyncio.gather(*(get(harness.stack.url(item.object_id), timeout=30) for item in objects))
    assert [(answer.status, answer.complete) for answer in answers] == [(200, True)] * len(objects)
    if state != "down":
        await eventually(lambda: collector.requests > 0, 30)
    for service in ("api", "fetcher"):
        (process,) = harness.stack.of(service)
        began = time.monotonic()
        assert await process.stop() == 0, process.tail()
        # The limit for the last spans is 2 s, that of a request to the collector 10 s.
        assert time.monotonic() - began < 9, process.tail()
    logs = harness.stack.logs()
    # An outage is one event, not one per batch. A hanging collector has not failed yet.
    assert logs.count('"trace_export_failed"') <= 4
    if state == "failing":
        assert '"trace_export_failed"' in logs
    if state == "hanging":
        assert '"trace_spans_lost"' in logs


@pytest.mark.servers
async def test_several_workers_trace_but_have_no_exemplars(harness: Harness, collector: Collector) -> None:
    harness.publish([generated_object("1", 1000)])
    harness.stack.environment |= collector.environment()
    await harness.stack.up(workers=2)
    await get(harness.stack.url("1"), {"traceparent": f"00-{TRACE}-{SPAN}-01"})
    await eventually(lambda: any(span.name == "commit" for span in collector.of_trace(TRACE)), 30)
    (api,) = harness.stack.of("api")
    answer = await get(f"{api.health_url}/metrics", {"Accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("text/plain")
