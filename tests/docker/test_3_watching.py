"""Prometheus and Grafana on the running stack."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from distributor_node.services.demo.faults import Fault, Match, Rule
from distributor_node.shared.waiting import background
from tests.docker.compose import ROOT
from tests.docker.harness import LARGE_OBJECTS, Harness, fetch_json
from tests.end_to_end.client import get
from tests.waiting import poll

pytestmark = pytest.mark.docker

FAILING, UNPUBLISHED, UNREACHABLE = "150", "151", "152"
"""Objects that no other test asks for."""
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "distributor-node.json"


def targets(harness: Harness) -> list[dict[str, Any]]:
    base = f"http://127.0.0.1:{harness.stack.ports['PROMETHEUS_PORT']}/api/v1/targets"
    found: list[dict[str, Any]] = fetch_json(base)["data"]["activeTargets"]
    return found


def test_every_target_is_up_and_every_fetcher_is_one(harness: Harness) -> None:
    def all_up() -> bool:
        return [target["health"] for target in targets(harness)] == ["up"] * 7

    poll(all_up, 90, what="seven targets are up")
    jobs = sorted(target["labels"]["job"] for target in targets(harness))
    assert jobs == ["api", "evictor", "fetcher", "fetcher", "fetcher", "prometheus", "rabbitmq"]


def test_configuration_and_rules_as_promtool_sees_them(harness: Harness) -> None:
    harness.stack.exec("prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    for name in ("alerts.yml", "health.yml"):
        harness.stack.exec("prometheus", "promtool", "test", "rules", f"/etc/prometheus/tests/{name}")


def test_the_rules_are_loaded_and_none_fails(harness: Harness) -> None:
    def evaluated() -> list[dict[str, Any]] | None:
        groups = fetch_json(f"http://127.0.0.1:{harness.stack.ports['PROMETHEUS_PORT']}/api/v1/rules")[
            "data"
        ]["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        fine = all(rule["health"] == "ok" and rule.get("state") != "firing" for rule in found)
        return found if found and fine else None

    # Firing is what was missing while the stack started, at first.
    rules = poll(evaluated, 150, what="all rules are evaluated, and no alert fires")
    names = {rule["name"] for rule in rules}
    written = "".join(path.read_text() for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    assert names == set(re.findall(r"- (?:alert|record): (\S+)", written))


async def some_trouble(harness: Harness) -> None:
    """Something for every panel that shows errors: 4xx and 5xx answers, a source that fails, a client that leaves, and
    calls of Redis and RabbitMQ that get no answer."""
    assert (await get(harness.stack.url("no-such-object"))).status == 404
    harness.behave([Rule(Fault(status=500), Match(object_id=FAILING, method="GET", endpoint="files"))])
    assert (await get(harness.stack.url(FAILING))).status == 502
    harness.behave([])
    with contextlib.suppress(TimeoutError):
        await get(harness.stack.url("64"), timeout=0.05)
    await asyncio.to_thread(harness.stack.compose, "pause", "rabbitmq")
    try:
        answer = await get(harness.stack.url(UNPUBLISHED))
        assert harness.right(answer, UNPUBLISHED)
        assert answer.headers["x-data-source"] == "external"
    finally:
        await asyncio.to_thread(harness.stack.compose, "unpause", "rabbitmq")
    await asyncio.to_thread(harness.stack.compose, "pause", "redis")
    try:
        await asyncio.sleep(4)  # two rounds of what every process asks of itself
    finally:
        await asyncio.to_thread(harness.stack.compose, "unpause", "redis")
    # Docker calls a paused container unhealthy until it is next looked at, and nothing is started that depends on it.
    for service in ("rabbitmq", "redis"):
        await asyncio.to_thread(harness.stack.until_healthy, service)


def chosen(query: str) -> str:
    """As Grafana sends it, with the stack's node and all of its instances."""
    for variable, value in (
        ("$__rate_interval", "1m"), ("$namespace", ".*"), ("$node", "distributor-node"), ("$instance", ".*"),
    ):  # fmt: skip
        query = query.replace(variable, value)
    return query


UNUSED = ("distributor_trace_spans_total", "distributor_peer")
"""Metrics of what the stack does not use: traces, and other nodes. Their panels stay empty."""


@contextlib.asynccontextmanager
async def open_page(harness: Harness) -> AsyncIterator[None]:
    """The node's page, as a browser follows it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", harness.stack.ports["DASHBOARD_PORT"])
    writer.write(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

    async def read() -> None:
        while await reader.read(65536):
            pass

    try:
        async with background(read(), "page"):
            yield
    finally:
        writer.close()
        await writer.wait_closed()


async def test_every_query_of_the_dashboard_returns_data(harness: Harness) -> None:
    # More than the volume may hold, so that there is an eviction to show.
    for object_id in ("64", *LARGE_OBJECTS):
        await harness.cached([object_id])
    await some_trouble(harness)
    # Without what stands in for missing series: they are there.
    queries = [
        chosen(target["expr"]).replace(" or vector(0)", "")
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", [])
        if not any(name in target["expr"] for name in UNUSED)
    ]
    assert len(queries) > 30

    # A source's failures in relation to its requests are shown from a few requests in five minutes on.
    # Of another object: the job of the first one goes on trying, and may have succeeded.
    harness.behave([Rule(Fault(status=500), Match(object_id=UNREACHABLE, method="GET", endpoint="files"))])
    for _ in range(10):
        assert (await get(harness.stack.url(UNREACHABLE))).status == 502
    harness.behave([])
    async with open_page(harness):
        deadline = asyncio.get_running_loop().time() + 90
        while without_data := [query for query in queries if not harness.prometheus(query)]:
            assert asyncio.get_running_loop().time() < deadline, f"no data for {without_data}"
            assert harness.right(await get(harness.stack.url("64")), "64")  # a ratio needs someone who asks
            await asyncio.sleep(3)


def test_metrics_of_others_that_rules_rely_on(harness: Harness) -> None:
    for name in ("rabbitmq_alarms_memory_used_watermark", "rabbitmq_alarms_free_disk_space_watermark"):
        assert [float(one["value"][1]) for one in harness.prometheus(name)] == [0.0]
    (limit,) = harness.prometheus("distributor_state_store_server_memory_limit_bytes")
    assert float(limit["value"][1]) == 384 * 1024**2


def test_grafana_has_the_dashboard_and_its_source(harness: Harness) -> None:
    base = f"http://127.0.0.1:{harness.stack.ports['GRAFANA_PORT']}/api"
    assert fetch_json(f"{base}/health")["database"] == "ok"
    assert "distributor-node" in {board["uid"] for board in fetch_json(f"{base}/search")}
    shown = fetch_json(f"{base}/dashboards/uid/distributor-node")["dashboard"]
    assert shown["title"] == json.loads(DASHBOARD.read_text())["title"]
