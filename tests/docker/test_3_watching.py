"""Prometheus and Grafana on the running stack."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.docker.compose import ROOT, until
from tests.docker.world import LARGE_OBJECTS, World, fetch_json

pytestmark = pytest.mark.docker

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "distributor-node.json"


def targets(world: World) -> list[dict[str, Any]]:
    base = f"http://127.0.0.1:{world.stack.ports['PROMETHEUS_PORT']}/api/v1/targets"
    found: list[dict[str, Any]] = fetch_json(base)["data"]["activeTargets"]
    return found


def test_every_target_is_up_and_every_fetcher_is_one(world: World) -> None:
    def all_up() -> bool:
        return [target["health"] for target in targets(world)] == ["up"] * 7

    until(all_up, "seven targets are up", timeout=90)
    jobs = sorted(target["labels"]["job"] for target in targets(world))
    assert jobs == ["api", "evictor", "fetcher", "fetcher", "fetcher", "prometheus", "rabbitmq"]


def test_configuration_and_rules_as_promtool_sees_them(world: World) -> None:
    world.stack.exec("prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    world.stack.exec("prometheus", "promtool", "test", "rules", "/etc/prometheus/tests/alerts.yml")


def test_the_rules_are_loaded_and_none_fails(world: World) -> None:
    def evaluated() -> list[dict[str, Any]] | None:
        groups = fetch_json(f"http://127.0.0.1:{world.stack.ports['PROMETHEUS_PORT']}/api/v1/rules")["data"][
            "groups"
        ]
        found = [rule for group in groups for rule in group["rules"]]
        return found if found and all(rule["health"] == "ok" for rule in found) else None

    rules = until(evaluated, "all rules are evaluated", timeout=60)
    names = {rule["name"] for rule in rules}
    written = "".join(path.read_text() for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    assert names == set(re.findall(r"- (?:alert|record): (\S+)", written))
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert not firing


async def test_every_query_of_the_dashboard_returns_data(world: World) -> None:
    # More than the volume may hold, so that there is an eviction to show.
    for object_id in ("64", *LARGE_OBJECTS):
        await world.cached([object_id])
    queries = [
        target["expr"].replace("$__rate_interval", "1m")
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", [])
    ]
    assert len(queries) > 30

    def without_data() -> list[str]:
        return [query for query in queries if not world.prometheus(query)]

    def all_have_data() -> bool:
        return not without_data()

    try:
        until(all_have_data, "data for every query", timeout=90, pause=3)
    except AssertionError:
        raise AssertionError(f"no data for {without_data()}") from None


def test_metrics_of_others_that_rules_rely_on(world: World) -> None:
    for name in ("rabbitmq_alarms_memory_used_watermark", "rabbitmq_alarms_free_disk_space_watermark"):
        assert [float(one["value"][1]) for one in world.prometheus(name)] == [0.0]
    (limit,) = world.prometheus("distributor_state_store_server_memory_limit_bytes")
    assert float(limit["value"][1]) == 384 * 1024**2


def test_grafana_has_the_dashboard_and_its_source(world: World) -> None:
    base = f"http://127.0.0.1:{world.stack.ports['GRAFANA_PORT']}/api"
    assert fetch_json(f"{base}/health")["database"] == "ok"
    assert "distributor-node" in {board["uid"] for board in fetch_json(f"{base}/search")}
    shown = fetch_json(f"{base}/dashboards/uid/distributor-node")["dashboard"]
    assert shown["title"] == json.loads(DASHBOARD.read_text())["title"]
