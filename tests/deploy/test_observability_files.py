"""Prometheus' rules and Grafana's dashboard against the metrics that the code declares."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from distributor_node.shared.observability import metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
RULES: list[dict[str, Any]] = [
    rule
    for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
# Of others: Prometheus itself and RabbitMQ's own plugin. That they exist is seen in the tests with containers.
OF_RABBITMQ = {
    "rabbitmq_alarms_free_disk_space_watermark",
    "rabbitmq_alarms_memory_used_watermark",
    "rabbitmq_process_resident_memory_bytes",
    "rabbitmq_queue_messages_ready",
}
OF_OTHERS = {
    *OF_RABBITMQ,
    "up",
    "process_open_fds",
    "process_max_fds",
    "process_start_time_seconds",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
}
# What Prometheus adds to every series of a target.
OF_TARGETS = {"job", "instance", "le", "namespace", "node"}


def panels() -> list[dict[str, Any]]:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    return [panel for board in boards for panel in board["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [rule["expr"] for rule in RULES]


def declared() -> dict[str, set[str]]:
    """Names of series as they are exported, each with its labels."""
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        name = getattr(metric, "_name", None)
        if isinstance(metric, metrics.ReportedGauge):
            found[str(name)] = set()
        elif isinstance(metric, Histogram):
            found |= {f"{name}{part}": set(metric._labelnames) for part in ("_bucket", "_sum", "_count")}
        elif isinstance(metric, Counter):
            found[f"{name}_total"] = set(metric._labelnames)
        elif isinstance(metric, Gauge):
            found[str(name)] = set(metric._labelnames)
    return found


def names_in(query: str) -> set[str]:
    """Metric names: words that are followed by neither a bracket nor an operator of labels, outside of quotes."""
    bare = re.sub(r'"[^"]*"', '""', query)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\(|[a-zA-Z0-9_:])", bare)
    return {word for word in words if word not in {"and", "or", "unless", "offset", "h", "d", "m", "s"}}


def labels_in(query: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', '""', query)
    grouped = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", bare)
    return {label.strip() for group in grouped for label in group.split(",") if label.strip()}


def test_parsing_of_query_strings() -> None:
    query = 'sum by (le, a) (rate(x_total{b="c (d)"}[5m])) / on () y:z or vector(0) > 0.5 and z offset 1h'
    assert names_in(query) == {"x_total", "y:z", "z"}
    assert labels_in(query) == {"le", "a"}


@pytest.mark.parametrize("query", queries())
def test_every_metric_asked_for_is_declared(query: str) -> None:
    known = declared()
    assert names_in(query)
    assert names_in(query) <= set(known) | RECORDED | OF_OTHERS


@pytest.mark.parametrize("query", queries())
def test_every_label_asked_for_is_declared(query: str) -> None:
    known = declared()
    for name, selector in re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}", query):
        labels = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector)))
        assert labels <= known.get(name, set()) | OF_TARGETS, name
    in_groups = labels_in(query) - OF_TARGETS
    used = [known.get(name, {"source"} if name in RECORDED else set()) for name in names_in(query)]
    assert all(any(label in labels for labels in used) for label in in_groups)


@pytest.mark.parametrize("query", queries())
def test_what_does_not_count_as_an_error_does_not_count_as_a_request(query: str) -> None:
    asked = re.findall(r"distributor_requests_total\{([^}]*)\}", query)
    assert len({'cache!="absent"' in selector for selector in asked}) <= 1


def test_the_dashboard_has_the_required_panels() -> None:
    titles = " / ".join(panel["title"].lower() for panel in panels())
    for wanted in (
        "hit ratio, objects",
        "hit ratio, bytes",
        "traffic by source",
        "time to first byte",
        "fetch queue",
        "downloads in progress",
        "usage against limit",
        "evictions",
        "longest idle age",
        "latency of sources",
        "answers by status",
    ):
        assert wanted in titles


def test_panels_have_ids_and_places_of_their_own() -> None:
    board = json.loads(DASHBOARDS[0].read_text())
    ids = [panel["id"] for panel in board["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(set(places)) == len(places)


def test_every_alert_says_how_urgent_it_is_and_is_tested() -> None:
    tested = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())["tests"]
    fired = {
        case["alertname"] for test in tested for case in test.get("alert_rule_test", []) if case["exp_alerts"]
    }
    alerts = [rule for rule in RULES if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == fired
    assert all(rule["labels"]["severity"] in {"page", "ticket"} for rule in alerts)
    assert all(rule["annotations"]["summary"] for rule in alerts)


def test_every_rule_tells_nodes_apart() -> None:
    """Each aggregation keeps the labels of the node, so that none is drowned in another, or counted with it."""
    for rule in RULES:
        bare = re.sub(r'"[^"]*"', '""', rule["expr"])
        for operator, by in re.findall(r"\b(sum|max|min|avg|count|group)\b\s*(?:by\s*\(([^)]*)\))?", bare):
            assert {"namespace", "node"} <= {label.strip() for label in by.split(",")}, (
                operator,
                rule["expr"],
            )
        assert not re.search(r"\bvector\(|\bon\s*\(\s*\)", bare), rule["expr"]


def test_every_alert_has_a_runbook() -> None:
    written = (ROOT / "docs" / "runbooks.md").read_text()
    headings = re.findall(r"^### (\w+)$", written, re.MULTILINE)
    alerts = [rule for rule in RULES if "alert" in rule]
    assert sorted(headings) == sorted(rule["alert"] for rule in alerts)
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def test_every_target_of_the_stack_bears_its_node() -> None:
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    named = {
        job["job_name"]
        for job in jobs
        if any(one["target_label"] == "node" for one in job.get("relabel_configs", []))
    }
    assert named == {"api", "fetcher", "evictor", "rabbitmq"}


def test_every_metric_is_on_a_panel() -> None:
    shown = {name for panel in panels() for target in panel["targets"] for name in names_in(target["expr"])}
    series = re.compile(r"_(bucket|sum|count)$")
    assert {series.sub("", name) for name in declared()} <= {series.sub("", name) for name in shown}


def test_every_panel_shows_the_node_that_was_chosen() -> None:
    """Each selector names namespace and node; those of processes the instance too."""
    for panel in panels():
        for target in panel["targets"]:
            bare = re.sub(r'"[^"]*"', '""', target["expr"])
            selectors = re.findall(r"([a-z_:][a-z0-9_:]*)\{([^}]*)\}", bare)
            assert {name for name, _ in selectors} == names_in(target["expr"]), target["expr"]
            for name, labels in selectors:
                wanted = {"namespace", "node"} | (
                    {"instance"} if name not in RECORDED | OF_RABBITMQ else set()
                )
                assert wanted <= set(re.findall(r"([a-z_]+)\s*=", labels)), target["expr"]


def test_grafana_asks_the_source_that_was_chosen_which_is_the_stack_s_at_first() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    variables = {one["name"]: one for one in json.loads(DASHBOARDS[0].read_text())["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "node", "instance"]
    assert variables["datasource"]["current"]["value"] == source["uid"]
    asked = {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]}
    assert asked | {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here; the tests with containers run it"
)
@pytest.mark.timeout(180)
def test_promtool_agrees() -> None:
    for arguments in (
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "tests/alerts.yml", "tests/health.yml"],
    ):
        done = subprocess.run(
            ["promtool", *arguments], cwd=PROMETHEUS, check=False, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
